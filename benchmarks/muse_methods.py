"""Unlearning methods side by side on a MUSE-like task built from novels, into `results/`.

    FDIV_SHARED=DIR python -m benchmarks.muse_methods --output results/muse_novels --runs runs/muse --minutes 60

The protocol is that of `method_comparison.py`; epochs are selected on 40 rows of each set. The first run builds the
task and its two models (`fdiv.recipes.tasks.novels.unlearning`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from method_comparison import MARKERS, Comparison, compare


class NovelsComparison(Comparison):
    """The recipes of `recipes/muse/novels`."""

    description = __doc__.splitlines()[0]
    benchmark = "muse"
    recipes = "muse/novels"
    main = {
        "FLAT TV": ("flat", "--divergence", "total_variation"),
        "FLAT KL": ("flat", "--divergence", "reverse_kl"),
        "FLAT JS": ("flat", "--divergence", "jensen_shannon"),
        "FLAT Pearson": ("flat", "--divergence", "pearson_chi2"),
        "GradDiff": ("grad_diff",),
        "NPO": ("npo",),
        "SimNPO": ("simnpo",),
        "IdkDPO": ("idk_dpo",),
    }
    rest = {
        "GradAscent": ("grad_ascent",),
        "KL-retain": ("kl_retain",),
        "RMU": ("rmu",),
        "UNDIAL": ("undial",),
        "CE-U": ("ce_u",),
        "WGA": ("wga",),
        "SatImp": ("sat_imp",),
        "PDU": ("pdu",),
        "JensUn": ("jensun",),
    }
    columns = {
        "forget_verbmem_ROUGE": "VerbMem", "forget_knowmem_ROUGE": "KnowMem-f", "retain_knowmem_ROUGE": "KnowMem-r",
        "privleak": "PrivLeak", "extraction_strength": "ES", "forget_ngram_entropy": "fluency",
    }  # fmt: skip
    digits = {"privleak": 1}
    also_kept = ("memory_gap", "exact_memorization", "mia_min_k", "mia_loss")
    rates = ["1e-4", "3e-4", "1e-3"]
    epochs = 8
    figure = "verbmem_knowmem.png"
    trajectory = ("retain_knowmem_ROUGE", "forget_verbmem_ROUGE")

    @property
    def task(self) -> Path:
        """What the first run built."""
        (marker, *_) = sorted(self.prepared.glob("novels_unlearning-*/recipe_keys.json"))
        return marker.parent

    def evaluate_options(self) -> list[str]:
        """The built rows, against the retrained model's log on them."""
        log = self.task / "retain_log" / "MUSE_EVAL.json"
        return ["--corpus", "Novels", "--data", str(self.task / "data"), "--retain_logs", str(log)]

    def reference_models(self) -> dict[str, Path]:
        """The model before unlearning and the one that never saw the forget novels."""
        return {"target": self.task / "model", "retrained": self.task / "retain_model"}

    def draw(self, axes: Any, results: dict[str, Any], points: dict[str, list[dict[str, Any]]]) -> None:
        """VerbMem of the forget set against KnowMem of the retain set; the line is the retrained model's VerbMem."""
        for number, (label, runs) in enumerate(points.items()):
            verbatim, known = (
                [run[name] for run in runs] for name in ("forget_verbmem_ROUGE", "retain_knowmem_ROUGE")
            )
            axes.scatter(known, verbatim, label=label, marker=MARKERS[number % len(MARKERS)], alpha=0.8)
        if "retrained" in results["models"]:
            level = results["models"]["retrained"]["forget_verbmem_ROUGE"]
            axes.axhline(level, color="grey", linewidth=0.8, linestyle="--")
        title = "MUSE-like, novels"
        axes.set(xlabel="KnowMem, retain", ylabel="VerbMem, forget (lower is better)", title=title)


if __name__ == "__main__":
    compare(NovelsComparison)
