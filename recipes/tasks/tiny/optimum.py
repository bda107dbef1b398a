"""Exact evaluation of a policy on the small preference world: sums over all outcomes, nothing sampled."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fdiv.divergences import Divergence, get_divergence
from fdiv.recipes.tasks.tiny.closed_form import optimal_policy
from fdiv.recipes.tasks.tiny.preferences import TinyWorld, response_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fdiv.evaluation import EvalContext

_TIE = 1e-4  # log-ratios closer than this are equal: float32 log-probabilities of three tokens are good to about 1e-6
_SMALLEST_MASS = 1e-7  # the rest to 1 of 64 float32 probabilities is noise below this


@dataclass
class TinyWorldEvalConfig:
    """Recipe block `eval: {name: tiny_world}`.

    Args:
        world: path of the `world.json` that `prepare: {name: tiny_preferences}` wrote; a directory means the file in
            it.
    """

    world: str

    summary_metrics: ClassVar[tuple[str, ...]] = (
        "held_out_preference_accuracy",
        "held_out_win_rate",
        "held_out_expected_reward",
        "held_out_divergence",
        "held_out_entropy",
        "held_out_malformed_mass",
        "held_out_optimum_tv",
        "held_out_objective_gap",
    )
    frontier: ClassVar[tuple[str, str]] = ("held_out_reverse_kl", "held_out_expected_reward")

    def evaluate(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        datasets: dict[str, Any],
        context: "EvalContext",
    ) -> dict[str, float]:
        """Score `model` on every prompt: `train_*` averages over prompts with pairs, `held_out_*` over those without.

        The divergence and β are those of the run (`context.training_args`). See `policy_metrics` for the numbers.
        """
        path = Path(self.world)
        world = TinyWorld.load(path / "world.json" if path.is_dir() else path)
        arguments = context.training_args
        metrics = policy_metrics(
            response_log_probs(model, tokenizer), world, arguments.resolve_divergence(), arguments.beta
        )
        return {
            f"{split}_{name}": values[rows].mean().item()
            for split, rows in (("train", ~world.held_out), ("held_out", world.held_out))
            for name, values in metrics.items()
        }


def policy_metrics(
    log_probs: torch.Tensor, world: TinyWorld, divergence: Divergence, beta: float
) -> dict[str, torch.Tensor]:
    """Exact numbers of a policy from its `[36, 64]` log-probabilities; each value is `[36]` float64, one per prompt.

    All malformed responses count as one outcome with the world's `malformed_reward`. They share one reward, so the
    closed-form optimum π* of E[r] − β D_f(· ‖ π_ref) has one ratio on them and is exact; distances of other policies
    are lower bounds in so far as their ratios differ among malformed responses.

    * `preference_accuracy`: share of pairs of well-formed responses, weighted by π_ref(y_1) π_ref(y_2), that
      log π/π_ref orders as the reward does (every f' is increasing, so this is the accuracy of f-DPO's implicit reward
      too); a tie counts ½, so π_ref itself has ½;
    * `win_rate`: P(r(y) > r(y')) for y ~ π, y' ~ π_ref, a tie counting ½;
    * `expected_reward`: E_π[r];
    * `divergence`, `reverse_kl`, `forward_kl`: D_f(π ‖ π_ref) for the given f, KL(π ‖ π_ref), KL(π_ref ‖ π), in nats;
    * `entropy`: of π over the 65 outcomes, in nats;
    * `malformed_mass`: π(malformed);
    * `optimum_tv`: total variation distance to π*;
    * `optimum_divergence`: D_f(π ‖ π*);
    * `objective_gap`: how much less than π* the policy attains of E[r] − β D_f(· ‖ π_ref); at least 0.
    """
    policy, reference = _with_malformed(log_probs), _with_malformed(world.reference_log_probs)
    reward = torch.nn.functional.pad(world.reward, (0, 1), value=world.malformed_reward)
    optimum = optimal_policy(reference, reward, divergence, beta)

    def objective(log_policy: torch.Tensor) -> torch.Tensor:
        return (log_policy.exp() * reward).sum(dim=-1) - beta * divergence.exact(log_policy, reference)

    return {
        "preference_accuracy": _preference_accuracy(policy, reference, reward),
        "win_rate": _win_rate(policy, reference, reward),
        "expected_reward": (policy.exp() * reward).sum(dim=-1),
        "divergence": divergence.exact(policy, reference),
        "reverse_kl": get_divergence("reverse_kl").exact(policy, reference),
        "forward_kl": get_divergence("forward_kl").exact(policy, reference),
        "entropy": -(policy.exp() * policy).sum(dim=-1),
        "malformed_mass": policy[..., -1].exp(),
        "optimum_tv": 0.5 * (policy.exp() - optimum.exp()).abs().sum(dim=-1),
        "optimum_divergence": divergence.exact(policy, optimum),
        "objective_gap": objective(optimum) - objective(policy),
    }


def _with_malformed(log_probs: torch.Tensor) -> torch.Tensor:
    """`[..., 65]` normalised log-probabilities: the 64 well-formed responses, then all others together."""
    rest = (1.0 - log_probs.exp().sum(dim=-1, keepdim=True)).clamp(min=_SMALLEST_MASS)
    return torch.log_softmax(torch.cat([log_probs, rest.log()], dim=-1), dim=-1)


def _order(values: torch.Tensor, tie: float) -> torch.Tensor:
    """`[..., N, N]` sign of values[i] − values[j], 0 within `tie`."""
    difference = values[..., :, None] - values[..., None, :]
    return torch.where(difference.abs() <= tie, torch.zeros_like(difference), difference.sign())


def _preference_accuracy(policy: torch.Tensor, reference: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """Weighted share of well-formed pairs of unequal reward that the log-ratio orders rightly, a tie counting ½."""
    log_ratio, reference, reward = (policy - reference)[..., :-1], reference[..., :-1], reward[..., :-1]
    truth = _order(reward, tie=0.0)
    weight = (reference[..., :, None] + reference[..., None, :]).exp() * truth.abs()
    agreement = 0.5 * (1.0 + truth * _order(log_ratio, tie=_TIE))
    return (weight * agreement).sum(dim=(-2, -1)) / weight.sum(dim=(-2, -1))


def _win_rate(policy: torch.Tensor, reference: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """P(r(y) > r(y')) + ½ P(r(y) = r(y')) for y ~ policy, y' ~ reference, independent."""
    wins = 0.5 * (1.0 + _order(reward, tie=0.0))
    return ((policy[..., :, None] + reference[..., None, :]).exp() * wins).sum(dim=(-2, -1))


__all__ = ["TinyWorldEvalConfig", "policy_metrics"]
