"""Estimators of KL(π_θ‖π_ref) from samples of the policy, each labelled by the gradient it really has.

Per token, with x = log π_θ − log π_ref on tokens the policy sampled and r = π_ref/π_θ = e^{−x} (Schulman 2020; their
gradients: arXiv:2510.01555, arXiv:2512.21852):

| name | value | enters | unbiased value | expected gradient |
|---|---|---|---|---|
| `k1_reward` | −log r = x | reward, detached | yes, signed | ∇KL(π_θ‖π_ref), of whole completions |
| `k2_loss` | ½ log² r | loss | no | ∇KL(π_θ‖π_ref) |
| `k3_loss` | r − 1 − log r | loss | yes, ≥ 0 | ∇KL(π_ref‖π_θ): the FORWARD KL |
| `k3_ratio_corrected` | (π_θ/π_old)·(r − 1 − log r) | loss | yes, off-policy too | ∇KL(π_θ‖π_ref) |

The gradients of the three losses are those of the KL between next-token distributions on the visited prefixes; how θ
changes which prefixes are visited is left out. `k1_reward`, as a reward of the whole completion, includes it. k1 as a
loss would have the expected gradient 0 and is not offered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fdiv.divergences.saturation import DEFAULT_MAX_EXPONENT, as_float, capped_expm1
from fdiv.named import Table

__all__ = [
    "KL_ESTIMATORS",
    "KLEstimator",
    "k1_reward",
    "k2_loss",
    "k3_loss",
    "k3_ratio_corrected",
    "list_kl_estimators",
    "resolve_kl",
]

#: Cap on each of the two exponents of `k3_ratio_corrected`, whose product must fit float32.
_PRODUCT_CAP = 40.0


def k1_reward(log_ratio: Tensor) -> Tensor:
    """k1 = log π_θ − log π_ref, detached: β times its sum over the tokens is subtracted from the reward.

    E[Σ_t k1_t · ∇log π_θ(y)] = ∇KL(π_θ‖π_ref) of whole completions, any baseline apart.

    Args:
        log_ratio: `[..., T]`, log π_θ − log π_ref of sampled tokens, nats.

    Returns:
        The same shape, no gradient; float32 for half-precision input.
    """
    return as_float(log_ratio, "log_ratio").detach()


def k2_loss(log_ratio: Tensor) -> Tensor:
    """k2 = ½ (log π_θ − log π_ref)²: a biased value whose expected gradient is ∇KL(π_θ‖π_ref) exactly.

    Args:
        log_ratio: `[..., T]`, with gradient.

    Returns:
        The same shape, ≥ 0.
    """
    return 0.5 * as_float(log_ratio, "log_ratio").square()


def k3_loss(log_ratio: Tensor) -> Tensor:
    """k3 = r − 1 − log r, r = π_ref/π_θ: the penalty of GRPO. Unbiased value, gradient of the FORWARD KL(π_ref‖π_θ).

    E_π[∇k3] = E_π[(1 − r)·∇log π_θ] = −E_ref[∇log π_θ] = ∇KL(π_ref‖π_θ). Beyond log r = 60 r goes on logarithmically.

    Args:
        log_ratio: `[..., T]`, with gradient.

    Returns:
        The same shape, ≥ 0.
    """
    return _k3(as_float(log_ratio, "log_ratio"), DEFAULT_MAX_EXPONENT)


def k3_ratio_corrected(log_ratio: Tensor, log_importance: Tensor) -> Tensor:
    """(π_θ/π_old)·k3 with the ratio in the graph (DeepSeek-V3.2; TRL's `use_bias_correction_kl`): ∇KL(π_θ‖π_ref).

    Tokens are samples of π_old; the prefixes stay its own. On-policy log π_old = log π_θ, detached: the ratio is 1 and
    carries only the gradient. Both exponents go on logarithmically beyond 40.

    Args:
        log_ratio: `[..., T]`, log π_θ − log π_ref, with gradient.
        log_importance: `[..., T]`, log π_θ − log π_old, with gradient.

    Returns:
        The same shape, ≥ 0.

    Raises:
        ValueError: shapes that differ.
    """
    if log_importance.shape != log_ratio.shape:
        raise ValueError(
            f"log_importance has shape {tuple(log_importance.shape)}, log_ratio {tuple(log_ratio.shape)}: unequal"
        )
    ratio = 1.0 + capped_expm1(as_float(log_importance, "log_importance"), _PRODUCT_CAP)
    return ratio * _k3(as_float(log_ratio, "log_ratio"), _PRODUCT_CAP)


def _k3(log_ratio: Tensor, cap: float) -> Tensor:
    return capped_expm1(-log_ratio, cap) + log_ratio


@dataclass(frozen=True)
class KLEstimator:
    """One row of the table above.

    Attributes:
        name: as in a config.
        function: the formula.
        enters: `"reward"` (subtract β·Σ_t) or `"loss"` (add β times it to each token's loss).
        expected_gradient: registry name of the divergence whose gradient it has on samples of the policy: `reverse_kl`
            is KL(π_θ‖π_ref), `forward_kl` KL(π_ref‖π_θ).
        scope: `"sequence"` if that divergence is between whole completions, `"token"` if between the next-token
            distributions on the visited prefixes.
        needs_importance: whether `log_importance` is read.
    """

    name: str
    function: Callable[..., Tensor]
    enters: str
    expected_gradient: str
    scope: str
    needs_importance: bool = False

    def __call__(self, log_ratio: Tensor, log_importance: Tensor | None = None) -> Tensor:
        """`[..., T]` per-token values; `log_importance` is read only where `needs_importance`.

        Raises:
            ValueError: `log_importance` needed and not given.
        """
        if not self.needs_importance:
            return self.function(log_ratio)
        if log_importance is None:
            raise ValueError(f"{self.name} needs log_importance = log pi - log pi_old of the sampled tokens")
        return self.function(log_ratio, log_importance)


#: Name → estimator.
KL_ESTIMATORS: Table[KLEstimator] = Table(
    "KL estimator",
    "a KLEstimator",
    lambda found: isinstance(found, KLEstimator),
    {
        entry.name: entry
        for entry in (
            KLEstimator("k1_reward", k1_reward, "reward", "reverse_kl", "sequence"),
            KLEstimator("k2_loss", k2_loss, "loss", "reverse_kl", "token"),
            KLEstimator("k3_loss", k3_loss, "loss", "forward_kl", "token"),
            KLEstimator(
                "k3_ratio_corrected", k3_ratio_corrected, "loss", "reverse_kl", "token", needs_importance=True
            ),
        )
    },
)


def list_kl_estimators() -> list[str]:
    """The names, sorted."""
    return sorted(KL_ESTIMATORS)


def resolve_kl(spec: str | KLEstimator) -> KLEstimator:
    """The estimator of a name or of `module:attribute`; a `KLEstimator` is returned unchanged.

    Raises:
        ValueError: an unknown name, with the nearest one.

    Args:
        spec: a name, `module:attribute`, or an estimator.
    """
    if isinstance(spec, KLEstimator):
        return spec
    return KL_ESTIMATORS.find(spec)
