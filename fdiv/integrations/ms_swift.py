"""ms-swift: f-DPO, and any loss of a pair of answers, in its DPO trainer.

    # my_plugin.py, started with: swift rlhf --rlhf_type dpo --external_plugins my_plugin.py --beta 0.1 …
    from fdiv.integrations.ms_swift import register_f_dpo

    register_f_dpo("jensen_shannon")

The interface, `DPOTrainer.dpo_loss` and `TrainerFactory.TRAINER_MAPPING`, is that of ms-swift 4.6.0, read from its
wheel. What was run and what not: docs/integrations.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from fdiv.alignment.f_dpo.loss import check_f_dpo_divergence, f_dpo_loss, f_dpo_rewards

if TYPE_CHECKING:
    from fdiv.divergences import Divergence

__all__ = ["Pairs", "dpo_trainer", "register_f_dpo", "register_pair_loss"]


class Pairs(NamedTuple):
    """What ms-swift's DPO trainer knows of B pairs, `[B]` each; log-probabilities are sums over tokens, in nats.

    Attributes:
        chosen_log_prob, rejected_log_prob: under the policy, with gradient.
        chosen_reference, rejected_reference: under the reference.
        chosen_tokens, rejected_tokens: how many tokens were summed.
        beta: ms-swift's `beta`.
    """

    chosen_log_prob: Tensor
    rejected_log_prob: Tensor
    chosen_reference: Tensor
    rejected_reference: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    beta: float

    @property
    def chosen_log_ratio(self) -> Tensor:
        """log π − log π_ref of the chosen answer."""
        return self.chosen_log_prob - self.chosen_reference

    @property
    def rejected_log_ratio(self) -> Tensor:
        """log π − log π_ref of the rejected answer."""
        return self.rejected_log_prob - self.rejected_reference


PairLoss = Callable[[Pairs], Tensor]
_Rewards = Callable[[Tensor, float], Tensor]


def register_f_dpo(divergence: str | Mapping[str, Any] | Divergence, *, max_exponent: float | None = None) -> type:
    """Make `swift rlhf --rlhf_type dpo` train f-DPO (arXiv:2309.16240) under `divergence`; returns the trainer class.

    The logged rewards are f-DPO's own, β·f′(π/π_ref).

    Raises:
        ImportError: ms-swift is not installed.
        ValueError: a divergence that f-DPO is not defined for (`check_f_dpo_divergence`).
    """
    divergence = check_f_dpo_divergence(divergence)

    def loss(pairs: Pairs) -> Tensor:
        chosen, rejected = pairs.chosen_log_ratio, pairs.rejected_log_ratio
        return f_dpo_loss(chosen, rejected, divergence, pairs.beta, max_exponent=max_exponent)

    def rewards(log_ratio: Tensor, beta: float) -> Tensor:
        return f_dpo_rewards(log_ratio, divergence, beta, max_exponent=max_exponent)

    return register_pair_loss(loss, rewards)


def register_pair_loss(loss: PairLoss, rewards: _Rewards | None = None) -> type:
    """Make `swift rlhf --rlhf_type dpo` train `loss`; returns the trainer class.

    FLAT on the geometric mean of an answer's token probabilities, templates as chosen answers, for example:

        register_pair_loss(lambda pairs: flat_loss(
            (pairs.chosen_log_prob / pairs.chosen_tokens).exp(),
            (pairs.rejected_log_prob / pairs.rejected_tokens).exp(), "jensen_shannon"))

    Args:
        loss: `Pairs` → `[B]`, smaller is better; ms-swift averages.
        rewards: (log-ratio `[B]`, β) → `[B]`, what is logged under `rewards/*`; None: β·log-ratio.

    Raises:
        ImportError: ms-swift is not installed.
    """
    from swift.rlhf_trainers import DPOTrainer
    from swift.trainers.trainer_factory import TrainerFactory

    made = dpo_trainer(DPOTrainer, loss, rewards)
    # ms-swift finds a trainer by the path of its class: it has to stand in a module.
    sys.modules[__name__].__dict__[made.__name__] = made
    TrainerFactory.TRAINER_MAPPING["dpo"] = f"{__name__}.{made.__name__}"
    return made


def dpo_trainer(base: type, loss: PairLoss, rewards: _Rewards | None = None) -> type:
    """A subclass of ms-swift's `DPOTrainer` with another `dpo_loss`; see `register_pair_loss`."""

    class FdivDPOTrainer(base):
        def dpo_loss(
            self,
            chosen_logps: Tensor,
            rejected_logps: Tensor,
            ref_chosen_logps: Tensor,
            ref_rejected_logps: Tensor,
            loss_type: str = "sigmoid",
            model_output: Mapping[str, Tensor] | None = None,
        ) -> tuple[Tensor, Tensor, Tensor]:
            """The loss of each pair and both rewards, `[B]` each.

            Raises:
                ValueError: options of ms-swift's own losses, which would be without effect.
            """
            _refuse_options(self, loss_type)
            device, output = self.accelerator.device, model_output or {}
            given = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
            counts = (output[f"{side}_completion_token_counts"] for side in ("chosen", "rejected"))
            pairs = Pairs(*(tensor.to(device) for tensor in (*given, *counts)), beta=self.beta)
            ratios = pairs.chosen_log_ratio.detach(), pairs.rejected_log_ratio.detach()
            shown = [self.beta * ratio if rewards is None else rewards(ratio, self.beta) for ratio in ratios]
            return loss(pairs), shown[0], shown[1]

    return FdivDPOTrainer


def _refuse_options(trainer: Any, loss_type: str) -> None:
    """ms-swift's defaults only: sigmoid, no smoothing, a reference, its own f, whole log-probabilities."""
    own_f = trainer.f_divergence_type
    expected = {
        "loss_type": (loss_type, "sigmoid"),
        "label_smoothing": (trainer.label_smoothing, 0),
        "reference_free": (trainer.reference_free, False),
        "f_divergence_type": (str(getattr(own_f, "value", own_f)), "reverse_kl"),
        "ld_alpha": (getattr(trainer.args, "ld_alpha", None), None),
    }
    for name, (found, default) in expected.items():
        if found != default:
            raise ValueError(f"{name}={found!r} changes ms-swift's own loss, which is replaced here: leave it out")
