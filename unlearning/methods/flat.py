"""FLAT: −g(P_e) + f*(g(P_f)), g the f-GAN activation of f, P_e and P_f the scores of template and forget answer.

Wang et al., "LLM Unlearning via Loss Adjustment with Only Forget Data", ICLR 2025. Every f; forget data only.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdiv.divergences import get_divergence
from fdiv.training.config import DivergenceOptions, divergence_option, option
from fdiv.unlearning.config import TemplateConfig, retain_option
from fdiv.unlearning.losses import (
    OFFICIAL_FLAT_DIVERGENCES,
    REDUCTIONS,
    answer_score,
    flat_loss,
    padded_batch_mean,
)
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer


@dataclass
class FLATConfig(DivergenceOptions, TemplateConfig):
    r"""Configuration of `FLATTrainer`: the shared keys and those below.

    `retain_term: none` is the paper's FLAT, which needs no retain rows and no reference. `compat: official` is a
    statistic of the micro-batch: every position up to `max_length` counts, and g sees its mean, so the run depends on
    how the global batch is split.

    Raises:
        ValueError: `compat: official` with a divergence whose sign is wrong in the released code, or with another
            reduction.
    """

    divergence: dict[str, Any] | str | None = divergence_option(
        "total_variation",
        'The f, any of them; the paper reports `total_variation`, `reverse_kl` (its "KL"), `jensen_shannon` and '
        "`pearson_chi2`",
    )
    reduction: str = option(
        "token_mean",
        "How an answer's token probabilities become its score, see `fdiv.unlearning.losses.answer_score`",
        choices=REDUCTIONS,
    )
    compat: str = option(
        "paper",
        "`paper`, the paper's formula per example, or `official`, the released code's padded batch mean",
        choices=("paper", "official"),
    )
    retain_term: str = retain_option("none", "nll", "divergence")

    def __post_init__(self) -> None:
        super().__post_init__()
        divergence = get_divergence(self.divergence)
        if self.compat == "official" and divergence.name not in OFFICIAL_FLAT_DIVERGENCES:
            raise ValueError(
                f"compat=official with divergence={divergence.name!r}: the released code has the right sign for "
                f"{', '.join(OFFICIAL_FLAT_DIVERGENCES)} only (its reverse-KL and squared-Hellinger reinforce the "
                "answer to forget). Use compat=paper"
            )
        if self.compat == "official" and self.reduction != "token_mean":
            raise ValueError(
                f"compat=official averages token probabilities: reduction={self.reduction!r} has no effect"
            )


class FLATTrainer(UnlearningTrainer):
    r"""Trains FLAT; see `UnlearningTrainer` for the arguments and `flat_loss` for the loss.

    Logged besides: `score/template` and `score/forget`, the P_e and P_f that the divergence sees.
    """

    config_class = FLATConfig
    title = "unlearning by loss adjustment with forget data only, every f-divergence"
    paper = "arXiv:2410.11143"
    check_divergence = staticmethod(get_divergence)
    _paper = {
        "title": "LLM Unlearning via Loss Adjustment with Only Forget Data",
        "id": "2410.11143",
        "citation": """\
@inproceedings{wang2025flat,
    title     = {{LLM Unlearning via Loss Adjustment with Only Forget Data}},
    author    = {Yaxuan Wang and Jiaheng Wei and Chris Yuhao Liu and Jinlong Pang and Quan Liu and others},
    year      = 2025,
    booktitle = {The Thirteenth International Conference on Learning Representations, {ICLR} 2025},
    eprint    = {2410.11143}
}""",
    }

    def _answer_scores(self, scores: dict[str, RoleScores]) -> tuple[Tensor, Tensor]:
        """P_e and P_f: [B] each, or [1] with `compat: official`."""
        rows = scores["template"], scores["forget"]
        if self.args.compat == "official":
            return tuple(padded_batch_mean(part.log_probs, part.mask, self.args.max_length) for part in rows)
        return tuple(answer_score(part.log_probs, part.mask, self.args.reduction) for part in rows)

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        return flat_loss(*self._answer_scores(scores), self.divergence)

    @torch.no_grad()
    def method_columns(self, scores: dict[str, RoleScores]) -> dict[str, Tensor]:
        """P_e and P_f, for the log."""
        template, forget = self._answer_scores(scores)
        return {"score/template": template, "score/forget": forget}
