"""The benchmark presets: which definition of each metric is used. Every result is stamped with the preset's name.

| preset | truth ratio | rows | generation | ROUGE | ES floor | Min-K |
|---|---|---|---|---|---|---|
| `open_unlearning` (default) | geometric, +1e-10 | all | 200 new tokens | stemmed | 1/L | no last label, >= 1 token |
| `tofu_paper` | arithmetic, exact | all | 200 in total | stemmed | 0 | every label |
| `tofu_2024` (TOFU authors' code) | geometric, exact | first 300 | 200 in total | stemmed | 0 | every label |
| `muse_original` | geometric, exact | all | 128 / 32 new tokens | not stemmed, percent | 0 | every label, int(k L) |
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fdiv.errors import DataError
from fdiv.named import Table


@dataclass(frozen=True)
class Preset:
    """One set of metric definitions.

    Attributes:
        name: the stamp in every result.
        truth_ratio_mean: `geometric` or `arithmetic` over the perturbed answers.
        epsilon: added to the denominators of truth ratios, option shares and PrivLeak.
        max_rows: how many rows of the forget and retain sets count (None: all).
        answer_tokens: bound on a generated TOFU answer; `answer_bound` says whether the prompt counts.
        answer_bound: `new_tokens` or `total`.
        use_stemmer: the rouge-score flag.
        rouge_scale: 100 where the benchmark reports percent.
        extraction_floor: see `fdiv.eval.metrics.memorization.extraction_strength`.
        drop_last_label: leave the final label (end of text) out of ES, EM, Min-K, Min-K++ and GradNorm.
        at_least_one_token: Min-K uses max(1, int(k L)) tokens.
        verbatim_space: a space between a MUSE prompt and its true continuation when that is cut for ROUGE.
        verbatim_truth_tokens: MUSE's truth is cut to this many tokens, begin-of-text included (None: whole).
        assumed_retain_auc: AUC taken for PrivLeak when no retain log is given, by corpus ("" = any); the result says
            so.
    """

    name: str
    truth_ratio_mean: str = "geometric"
    epsilon: float = 1e-10
    max_rows: int | None = None
    answer_tokens: int = 200
    answer_bound: str = "new_tokens"
    use_stemmer: bool = True
    rouge_scale: float = 1.0
    extraction_floor: bool = True
    drop_last_label: bool = True
    at_least_one_token: bool = True
    verbatim_space: bool = True
    verbatim_truth_tokens: int | None = None
    assumed_retain_auc: tuple[tuple[str, float], ...] = ()

    def describe(self) -> dict:
        """The definitions as a flat dictionary, written beside every result."""
        return asdict(self) | {"assumed_retain_auc": dict(self.assumed_retain_auc)}


_EXACT = {"epsilon": 0.0, "extraction_floor": False, "drop_last_label": False}

PRESETS: Table[Preset] = Table(
    "preset",
    "a Preset",
    lambda found: isinstance(found, Preset),
    {
        p.name: p
        for p in (
            Preset("open_unlearning", assumed_retain_auc=(("", 0.5),)),
            Preset("tofu_paper", truth_ratio_mean="arithmetic", answer_bound="total", **_EXACT),
            Preset("tofu_2024", max_rows=300, answer_bound="total", **_EXACT),
            Preset(
                "muse_original",
                use_stemmer=False,
                rouge_scale=100.0,
                at_least_one_token=False,
                verbatim_space=False,
                verbatim_truth_tokens=128,
                # muse_bench's constants are P(holdout score < forget score) = 1 - AUC: .4772 (News) and .5393 (Books)
                assumed_retain_auc=(("News", 0.5228), ("Books", 0.4607)),
                **_EXACT,
            ),
        )
    },
)


def get_preset(name: str) -> Preset:
    """The preset of that name, or of `module:attribute`.

    Raises:
        DataError: (a ValueError) an unknown name, with the nearest one.
    """
    return PRESETS.find(name, error=DataError)
