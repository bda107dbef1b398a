"""The options of f-DPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from trl import DPOConfig

from fdiv.alignment.f_dpo.loss import check_f_dpo_divergence
from fdiv.divergences import Divergence, get_divergence
from fdiv.memory.step_shape import StepShape

__all__ = ["FDPOConfig"]


# TRL options that change the loss in a way f-DPO has no counterpart for: name → (value that leaves it alone, reason).
_REFUSED_OPTIONS: dict[str, tuple[Any, str]] = {
    "loss_type": (["sigmoid"], "the f-DPO loss is -log sigmoid of the difference of f-scored rewards"),
    "loss_weights": (None, "there is one loss"),
    "f_divergence_type": ("reverse_kl", "set `divergence` instead (js_divergence is jensen_shannon here)"),
    "f_alpha_divergence_coef": (
        0.5,
        "set `divergence: {name: alpha, alpha: A}` instead, where A = 1 - f_alpha_divergence_coef",
    ),
    "label_smoothing": (0.0, "it belongs to the robust and exo_pair losses of TRL"),
    "use_weighting": (False, "WPO weights pairs by the policy's probability, and the optimum is no longer f-DPO's"),
    "discopop_tau": (0.05, "it belongs to the discopop loss of TRL"),
    "ld_alpha": (
        None,
        "LD-DPO reweights tokens, so the log-ratio is no longer that of two distributions and f' of it has no meaning",
    ),
    "padding_free": (False, "TRL 1.16 accepts it and pads all the same"),
}


@dataclass
class FDPOConfig(DPOConfig):
    r"""Configuration of `FDPOTrainer`: every key of TRL's `DPOConfig`, and those below.

    Args:
        divergence: The f of D_f(π‖π_ref): a registry name (`reverse_kl`) or a mapping with its parameters
            (`{name: alpha, alpha: 0.3}`; as JSON on the command line). Needs f′(0⁺) = −∞; see `fdiv divergences`.
        normalized: Divide f by f″(1), so that one β means the same first step for every divergence.
        max_exponent: Overflow cap on exp-type scores, in (0, 80]; above it the score follows a logarithmic
            continuation. None: the registry's own, 60. `clamped_fraction` is the fraction of pairs it touched.
        ece_bins: Equal bins of [0, 1] for the calibration errors logged in evaluation.

    Raises:
        ValueError: a divergence f-DPO is not lawful with, a parameter outside its domain, `beta` ≤ 0, or a TRL option
            that would change the loss.
    """

    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "divergence"]

    # `| None` is what makes HfArgumentParser hand the command line's string over unparsed; None itself is refused.
    divergence: dict[str, Any] | str | None = field(
        default="reverse_kl",
        metadata={
            "help": "The f-divergence from the reference: a name, or a mapping with parameters (JSON), for instance "
            '\'{"name": "alpha", "alpha": 0.3}\'. `fdiv divergences` lists them.'
        },
    )
    normalized: bool = field(
        default=False,
        metadata={"help": "Divide f by f''(1), so that one beta means the same first step for every divergence."},
    )
    max_exponent: float | None = field(
        default=None,
        metadata={"help": "Overflow cap on exp-type scores, in (0, 80]. Not set: the registry's own, 60."},
    )
    ece_bins: int = field(
        default=10,
        metadata={"help": "Equal bins of [0, 1] for the expected calibration errors logged in evaluation."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta}: f-DPO needs beta > 0, the weight of the divergence")
        if self.ece_bins < 1:
            raise ValueError(f"ece_bins={self.ece_bins}: calibration needs at least one bin")
        for name, (neutral, reason) in _REFUSED_OPTIONS.items():
            value = getattr(self, name)
            if value != neutral:
                raise ValueError(f"{name}={value!r} cannot be honoured by f-DPO: {reason}. Leave it at {neutral!r}")
        if isinstance(self.divergence, Divergence):
            raise ValueError(
                f"divergence={self.divergence!r}: a config holds names, so that it can be written beside the result. "
                "Register it (`register_divergence`) and give its name"
            )
        if self.divergence is None:
            raise ValueError("divergence is not set: give a name, for instance reverse_kl")
        self.resolve_divergence().score(torch.zeros(1), self.max_exponent)  # refuses a cap outside its range

    def resolve_divergence(self) -> Divergence:
        """The `Divergence` the loss uses: `divergence`, scaled to f″(1) = 1 where `normalized` is set."""
        divergence = check_f_dpo_divergence(get_divergence(self.divergence))
        return divergence.normalized() if self.normalized else divergence

    def step_shape(self, *, peft: bool, **_: Any) -> StepShape:
        """Chosen and rejected rows; a reference unless its scores are precomputed or the adapter switched off."""
        references = int(not (peft or self.precompute_ref_log_probs))
        rows = 2 * self.per_device_train_batch_size
        return StepShape(rows, self.max_length, f"max_length={self.max_length}", references)
