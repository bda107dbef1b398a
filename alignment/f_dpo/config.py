"""The options of f-DPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl import DPOConfig

from fdiv.alignment.f_dpo.loss import check_f_dpo_divergence
from fdiv.memory.step_shape import StepShape
from fdiv.training.config import CappedDivergenceOptions, EncodingOptions, divergence_option, option, refuse

__all__ = ["FDPOConfig"]


# TRL keys that change the loss in a way f-DPO has no counterpart for, and why.
_REFUSED = {
    "loss_type": "the f-DPO loss is -log sigmoid of the difference of f-scored rewards",
    "loss_weights": "there is one loss",
    "f_divergence_type": "set `divergence` instead (js_divergence is jensen_shannon here)",
    "f_alpha_divergence_coef": "set `divergence: {name: alpha, alpha: A}`, where A = 1 - f_alpha_divergence_coef",
    "label_smoothing": "it belongs to the robust and exo_pair losses of TRL",
    "use_weighting": "WPO weights pairs by the policy's probability, and the optimum is no longer f-DPO's",
    "discopop_tau": "it belongs to the discopop loss of TRL",
    "ld_alpha": "LD-DPO reweights tokens, so the log-ratio is no longer that of two distributions and f' of it has no "
    "meaning",
    "padding_free": "TRL 1.16 accepts it and pads all the same",
}


@dataclass
class FDPOConfig(EncodingOptions, CappedDivergenceOptions, DPOConfig):
    """Configuration of `FDPOTrainer`: every key of TRL's `DPOConfig`, `divergence`, `normalized`, `max_exponent`, and
    those below. The fraction of pairs that the cap touched is logged as `clamped_fraction`.

    Raises:
        ValueError: a divergence that f-DPO cannot use (f′(0⁺) is finite), a value outside its range, or a TRL key that
            would change the loss.
    """

    divergence: dict[str, Any] | str | None = divergence_option(
        "reverse_kl", "The f of D_f(π‖π_ref), with f'(0+) = −∞"
    )
    beta: float = option(0.1, "β, the weight of the divergence", above=0)
    ece_bins: int = option(10, "Equal bins of [0, 1] for the calibration errors logged in evaluation", least=1)
    check_divergence = staticmethod(check_f_dpo_divergence)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, _REFUSED)  # TRL has made a list of `loss_type` by now

    def step_shape(self, *, peft: bool, **_: Any) -> StepShape:
        """Chosen and rejected rows; a reference unless its scores are precomputed or the adapter switched off."""
        references = int(not (peft or self.precompute_ref_log_probs))
        rows = 2 * self.per_device_train_batch_size
        return StepShape(rows, self.max_length, f"max_length={self.max_length}", references)
