"""Unlearning methods side by side on TOFU rows and the small TOFU model, into `results/`.

    FDIV_SHARED=DIR python -m benchmarks.tofu_methods --output results/tofu_forget10 --runs runs/tofu --minutes 120

The protocol is that of `method_comparison.py`; epochs are selected on 40 rows of each set.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from method_comparison import MARKERS, Comparison, compare


class TofuComparison(Comparison):
    """The recipes of `recipes/tofu/mini`."""

    description = __doc__.splitlines()[0]
    benchmark = "tofu"
    recipes = "tofu/mini"
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
        "AltPO": ("alt_po",),
        "RMU": ("rmu",),
        "UNDIAL": ("undial",),
        "CE-U": ("ce_u",),
        "WGA": ("wga",),
        "SatImp": ("sat_imp",),
        "PDU": ("pdu",),
        "JensUn": ("jensun",),
    }
    columns = {
        "forget_quality": "FQ", "model_utility": "MU", "forget_Q_A_ROUGE": "F-RL", "retain_Q_A_ROUGE": "R-RL",
        "extraction_strength": "ES", "privleak": "PrivLeak", "forget_ngram_entropy": "fluency",
    }  # fmt: skip
    digits = {"forget_quality": 0, "privleak": 1}
    also_kept = ("forget_truth_ratio", "forget_Q_A_Prob")
    rates = ["1e-4", "3e-4"]
    epochs = 3
    figure = "forget_quality_utility.png"
    trajectory = ("model_utility", "forget_Q_A_ROUGE")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """The forget split."""
        parser.add_argument("--split", default="forget10")

    def train_options(self) -> list[str]:
        """The split, in both blocks that name it."""
        return ["--prepare.split", self.args.split, "--epoch_evaluation.split", self.args.split]

    def evaluate_options(self) -> list[str]:
        """Local rows, against the retain model's log on all of them."""
        (log, *_) = sorted(self.prepared.glob("tofu_unlearning-*/full/TOFU_EVAL.json"))
        data = f"{os.environ['FDIV_SHARED']}/data/tofu"
        return ["--split", self.args.split, "--data", data, "--retain_logs", str(log)]

    def reference_models(self) -> dict[str, Path]:
        """The model before unlearning and the one that never saw the forget rows."""
        folder = Path(os.environ["FDIV_SHARED"]) / "models"
        return {name: folder / f"tofu-mini-{name}" for name in ("full", "retain")}

    def draw(self, axes: Any, results: dict[str, Any], points: dict[str, list[dict[str, Any]]]) -> None:
        """Forget quality (log scale) against model utility."""
        for number, (label, runs) in enumerate(points.items()):
            quality = [max(run["forget_quality"], 1e-60) for run in runs if run["forget_quality"] is not None]
            utility = [run["model_utility"] for run in runs if run["forget_quality"] is not None]
            axes.scatter(utility, quality, label=label, marker=MARKERS[number % len(MARKERS)], alpha=0.8)
        axes.axhline(0.05, color="grey", linewidth=0.8, linestyle="--")
        title = results["split"]
        axes.set(yscale="log", xlabel="model utility", ylabel="forget quality (KS p-value)", title=title)


if __name__ == "__main__":
    compare(TofuComparison)
