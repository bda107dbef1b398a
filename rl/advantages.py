r"""Advantages for verifiable rewards: what each of n samples of a prompt counts in the policy gradient.

`resolve_advantage(spec)(rewards[G, n])` gives `[G, n]`. Everywhere the gradient meant is the mean over the group,
ĝ = (1/n) Σ_i A_i ∇log π(y_i), of n independent samples of one prompt; papers that write a sum have A_i/n. With binary
rewards, p the policy's success rate and pass@k = 1 − (1 − p)^k:

| name | A_i | E[ĝ] |
|---|---|---|
| `grpo` | (r_i − r̄)/(std + 1e-4) | of no objective at finite n; for n → ∞ and binary rewards ∇ 2 arcsin √p |
| `dr_grpo` | r_i − r̄ | (1 − 1/n)·∇E[r] |
| `rloo` | r_i − mean of the others | ∇E[r] |
| `pkpo` | n·s_i, s_i = Σ of max r_S over the k-subsets S that hold i, over C(n, k) | ∇E[max of k rewards] |
| `pkpo_loo` | the same with max r_S − max r_{S∖i} | ∇E[max of k rewards] |
| `passk_analytic` | (s_i − s̄)·(n/k)/σ, σ² = R̄(1 − R̄), R̄ = 1 − C(n−c, k)/C(n, k) | of none; ·σ: (1/k − 1/n)·∇pass@k |
| `maxrl` | (r_i − r̄)/r̄, 0 if r̄ = 0 | Σ_{j<n} ∇pass@j / j, which tends to ∇log p |
| `nsr` | `weight` if correct, −1 if wrong | (1 + `weight`)·∇p |

A reward of NaN means "not scored": such a sample takes no part in its group's statistics, has advantage 0, and n above
is the number of scored samples. A group with fewer scored samples than the method needs is skipped: advantages 0, and
`Advantage.skipped` counts it. Computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fdiv.divergences.saturation import as_float
from fdiv.named import Table, build_own, check_keys, is_path, split_spec

__all__ = [
    "ADVANTAGES",
    "Advantage",
    "dr_grpo",
    "grpo",
    "list_advantages",
    "maxrl",
    "nsr",
    "passk_analytic",
    "pkpo",
    "pkpo_loo",
    "resolve_advantage",
    "rloo",
    "subset_share",
]

#: What GRPO (and TRL) adds to the standard deviation.
GRPO_EPSILON = 1e-4


def grpo(rewards: Tensor) -> Tensor:
    """(r_i − r̄)/(std + 1e-4), std with n − 1 in the denominator: as TRL's `scale_rewards="group"` (arXiv:2402.03300).

    Dividing by a random std leaves it unbiased for nothing at finite n. For n → ∞ and binary rewards the weight of ∇p
    is 1/√(p(1−p)), the gradient of 2 arcsin √p: prompts near 0 and 1 count more.

    Args:
        rewards: `[G, n]`, NaN where not scored.

    Returns:
        `[G, n]`; 0 for unscored samples and for groups with fewer than two scored ones.
    """
    group = _Group(rewards, 2)
    centred = group.values - group.mean
    variance = group.sum(centred.masked_fill(~group.scored, 0.0).square()) / (group.count - 1).clamp(min=1)
    return group.finish(centred / (variance.sqrt() + GRPO_EPSILON))


def dr_grpo(rewards: Tensor) -> Tensor:
    """r_i − r̄ (arXiv:2503.20783): E[ĝ] = (1 − 1/n)·∇E[r], the mean holding the sample's own reward.

    Args and returns: as `grpo`.
    """
    group = _Group(rewards, 2)
    return group.finish(group.values - group.mean)


def rloo(rewards: Tensor) -> Tensor:
    """r_i − mean of the others' rewards (arXiv:2402.14740): E[ĝ] = ∇E[r]. It is `dr_grpo` times n/(n − 1).

    Args and returns: as `grpo`. A lone scored sample has nothing to be compared with and gets 0.
    """
    group = _Group(rewards, 2)
    return group.finish((group.values - group.mean) * group.count / (group.count - 1).clamp(min=1))


def pkpo(rewards: Tensor, k: int) -> Tensor:
    """PKPO (arXiv:2505.15201): E[ĝ] = ∇E[max of k rewards], for binary rewards ∇pass@k; any k ≤ n.

    A_i = n·s_i with s_i = Σ_{S∋i, |S|=k} max r_S / C(n, k). Binary, c correct: k if correct, k·ρ(n−1, c, k−1) if
    wrong, ρ(n, c, k) = 1 − C(n−c, k)/C(n, k); the paper's rewards are these over n, summed. No
    baseline: see `pkpo_loo`.

    Args:
        rewards: `[G, n]`, any finite values, NaN where not scored.
        k: size of the sets, 1 ≤ k ≤ n.

    Returns:
        `[G, n]`; 0 for unscored samples and for groups with fewer than k scored ones.

    Raises:
        ValueError: k < 1 or k > n.
    """
    group = _Group(rewards, _check_k("pkpo", k))
    return group.finish(group.count * group.set_means(k))


def pkpo_loo(rewards: Tensor, k: int) -> Tensor:
    """`pkpo` with the leave-one-out baseline max r_{S∖i} in each set (arXiv:2505.15201): the same E[ĝ], less variance.

    A sample counts only where it raises the maximum of its set. Binary: k·(1 − ρ(n−1, c−1, k−1)) if correct, 0 if
    wrong. With k = 1 the baseline is 0.

    Args, returns and errors: as `pkpo`.
    """
    group = _Group(rewards, _check_k("pkpo_loo", k))
    return group.finish(group.count * group.set_means(k, leave_one_out=True))


def passk_analytic(rewards: Tensor, k: int) -> Tensor:
    """The analytic advantage of Pass@k training (arXiv:2508.10751), from the counts of a group; binary rewards.

    R̄ = 1 − C(n⁻, k)/C(n, k), σ = √(R̄(1 − R̄)), n⁻ wrong of n: A⁺ = (1 − R̄)/σ,
    A⁻ = (1 − R̄ − C(n⁻−1, k−1)/C(n−1, k−1))/σ. They sum to 0 over a group, and are `pkpo` minus its
    group mean, over k·σ; hence, but for the random σ, E[ĝ] = (1/k − 1/n)·∇pass@k, and nothing at all with k = n. σ = 0
    (all wrong, or fewer than k wrong): advantages 0.

    Args, returns and errors: as `pkpo`, and ValueError for rewards other than 0, 1 or NaN.
    """
    group = _Group(rewards, _check_k("passk_analytic", k))
    group.check_binary("passk_analytic")
    wrong = group.count - group.sum(group.values)
    fails = subset_share(wrong, group.count, k)  # 1 − R̄
    sigma = (fails * (1.0 - fails)).sqrt()
    loss = subset_share(wrong - 1, group.count - 1, k - 1)
    advantage = torch.where(group.values > 0, fails, fails - loss) / sigma.where(sigma > 0, 1.0)
    return group.finish(advantage.where(sigma > 0, 0.0))


def maxrl(rewards: Tensor) -> Tensor:
    """MaxRL (arXiv:2602.02710): (r_i − r̄)/r̄, 0 where no sample is correct; binary rewards.

    E[ĝ] = Σ_{j=1}^{n−1} (1/j)·∇pass@j exactly: the series of ∇log p = Σ_j (1/j)·∇pass@j, cut off at n − 1.

    Args, returns and errors: as `grpo`, and ValueError for rewards other than 0, 1 or NaN.
    """
    group = _Group(rewards, 2)
    group.check_binary("maxrl")
    solved = group.mean > 0
    advantage = (group.values - group.mean) / group.mean.where(solved, 1.0)
    return group.finish(advantage.where(solved, 0.0))


def nsr(rewards: Tensor, weight: float) -> Tensor:
    """Negative-sample reinforcement (arXiv:2506.01347): `weight` if correct, −1 if wrong; binary rewards, no baseline.

    weight 0 is NSR proper, 0.1 the paper's W-REINFORCE, 1 REINFORCE with rewards ±1. A = (1 + weight)·r − 1 is
    REINFORCE with the constant baseline 1/(1 + weight): on-policy E[ĝ] = (1 + weight)·∇p whatever the weight. What it
    changes is which samples carry the gradient, hence its variance, and what clipping and reused samples do.

    Args, returns and errors: as `grpo`; one scored sample suffices. ValueError for rewards other than 0, 1 or NaN, and
    for a `weight` that is negative or not finite.
    """
    weight = _check_weight("nsr", weight)
    group = _Group(rewards, 1)
    group.check_binary("nsr")
    return group.finish(torch.full_like(group.values, -1.0).masked_fill(group.values > 0, weight))


def _check_k(name: str, k: Any) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"{name}: k={k!r} must be an integer >= 1, the k of pass@k")
    return k


def _check_weight(name: str, weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 <= weight < math.inf:
        raise ValueError(
            f"{name}: weight={weight!r} must be a finite number >= 0 (0: wrong samples only; 0.1: W-REINFORCE)"
        )
    return float(weight)


class _Group:
    """Rewards `[G, n]` in float64 with the unscored at 0, and statistics `[G, 1]` of the scored."""

    def __init__(self, rewards: Tensor, least: int) -> None:
        if rewards.dim() != 2:
            raise ValueError(f"rewards have shape {tuple(rewards.shape)}: [groups, samples per group] is due")
        if rewards.size(1) < least:
            raise ValueError(
                f"groups of {rewards.size(1)} samples: this advantage needs at least {least}; raise num_generations"
            )
        rewards = rewards.detach()
        self.given_type = as_float(rewards, "rewards").dtype
        self.scored = ~rewards.isnan()
        self.values = rewards.double().masked_fill(~self.scored, 0.0)
        if self.values.isinf().any():
            raise ValueError("a reward is infinite: give a finite number, or NaN for a sample that is not scored")
        self.count = self.scored.sum(-1, keepdim=True).double()
        self.enough = self.count >= least
        self.mean = self.sum(self.values) / self.count.clamp(min=1)

    @staticmethod
    def sum(values: Tensor) -> Tensor:
        return values.sum(-1, keepdim=True)

    def finish(self, advantage: Tensor) -> Tensor:
        """`advantage` with 0 for unscored samples and skipped groups, in the type of the rewards."""
        return advantage.where(self.scored & self.enough, 0.0).to(self.given_type)

    def check_binary(self, name: str) -> None:
        other = self.values[(self.values != 0) & (self.values != 1)]
        if other.numel():
            raise ValueError(
                f"{name} counts correct and wrong samples: rewards must be 0 or 1 (NaN: not scored), got "
                f"{other[0].item():g}; use grpo, dr_grpo, rloo or pkpo for other rewards"
            )

    def set_means(self, k: int, *, leave_one_out: bool = False) -> Tensor:
        """`[G, n]`: Σ over the k-subsets S holding i of max r_S (less max r_{S∖i}, 0 if empty), over C(n, k)."""
        order = self.values.masked_fill(~self.scored, math.inf).argsort(dim=-1, stable=True)
        ordered = self.values.gather(-1, order)  # ascending, the unscored last as 0
        rank = torch.arange(1, order.size(-1) + 1, device=order.device)
        row, column = rank[:, None], rank
        total = _log_binomial(self.count, k)[..., None]
        if leave_one_out and k > 1:  # i counts where it is the maximum: j < i is the next in C(j − 1, k − 2) sets
            weight = _log_binomial(column - 1, k - 2)
            weight = weight.where(column < row, -math.inf)
            gaps = ordered[:, :, None] - ordered[:, None, :]
            sums = ((weight - total).exp() * gaps).sum(-1)
        else:  # j is the maximum of a set that holds i: i itself in C(i − 1, k − 1) of them, j > i in C(j − 2, k − 2)
            weight = torch.where(column == row, _log_binomial(row - 1, k - 1), _log_binomial(column - 2, k - 2))
            weight = weight.where(column >= row, -math.inf)
            sums = ((weight - total).exp() * ordered[:, None, :]).sum(-1)
        return torch.empty_like(sums).scatter_(-1, order, sums)


def _log_binomial(n: Tensor, k: int) -> Tensor:
    """log C(n, k) in float64; −inf where C is 0 (k < 0 or k > n)."""
    n = n.double()
    if k < 0:
        return torch.full_like(n, -math.inf)
    ways = torch.lgamma(n + 1) - math.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return ways.where(n >= k, -math.inf)


def subset_share(part: Tensor, whole: Tensor, k: int) -> Tensor:
    """C(part, k)/C(whole, k): the share of the k-subsets of `whole` that lie in `part`; 0 where whole < k."""
    of_whole = _log_binomial(whole, k)
    return (_log_binomial(part, k) - of_whole.where(of_whole.isfinite(), 0.0)).exp()


@dataclass(frozen=True)
class Advantage:
    """An advantage with its parameters set: call it with rewards `[G, n]`.

    Attributes:
        name: as in a config.
        function: the formula, `function(rewards, **parameters)`.
        least: scored samples a group needs; with fewer it is skipped.
        parameters: by name, read-only.
        binary: whether rewards must be 0 or 1.
        estimates: what the mean over the group of A_i ∇log π(y_i) is an unbiased estimate of.
    """

    name: str
    function: Callable[..., Tensor]
    least: int
    binary: bool
    estimates: str
    parameters: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __call__(self, rewards: Tensor) -> Tensor:
        """`[G, n]` advantages, no gradient; computed in float64, float32 for half-precision rewards.

        Raises:
            ValueError: fewer than `least` samples per group, infinite rewards, rewards other than 0 or 1 if `binary`.
        """
        return self.function(rewards, **self.parameters)

    def skipped(self, rewards: Tensor) -> Tensor:
        """`[G]` bool: groups with too few scored samples, whose advantages are all 0."""
        return (~rewards.isnan()).sum(-1) < self.least

    @property
    def label(self) -> str:
        """Short text for tables: the name, with the parameters in brackets."""
        inside = ",".join(f"{value:g}" for value in self.parameters.values())
        return f"{self.name}({inside})" if inside else self.name


@dataclass(frozen=True)
class _Row:
    function: Callable[..., Tensor]
    estimates: str
    least: int | str = 2
    """Scored samples a group needs, or the parameter that holds it."""
    binary: bool = False
    parameters: Mapping[str, Callable[[str, Any], Any]] = field(default_factory=dict)
    """The check of each parameter, by name; all are required."""


#: Name → formula, parameters and what the advantage needs and estimates.
ADVANTAGES: Table[_Row] = Table(
    "advantage",
    "an Advantage, or a function of its parameters that returns one",
    lambda found: isinstance(found, Advantage) or callable(found),
    {
        "grpo": _Row(grpo, "no objective at finite n; as n grows, binary rewards: grad 2 arcsin sqrt(p)"),
        "dr_grpo": _Row(dr_grpo, "(1 - 1/n) grad E[r]"),
        "rloo": _Row(rloo, "grad E[r]"),
        "pkpo": _Row(pkpo, "grad E[max of k rewards]", "k", parameters={"k": _check_k}),
        "pkpo_loo": _Row(pkpo_loo, "grad E[max of k rewards]", "k", parameters={"k": _check_k}),
        "passk_analytic": _Row(
            passk_analytic,
            "no objective at finite n; times sigma: (1/k - 1/n) grad pass@k",
            "k",
            binary=True,
            parameters={"k": _check_k},
        ),
        "maxrl": _Row(maxrl, "sum over j < n of grad pass@j / j", binary=True),
        "nsr": _Row(nsr, "(1 + weight) grad E[r]", 1, binary=True, parameters={"weight": _check_weight}),
    },
)


def list_advantages() -> list[str]:
    """The names, sorted."""
    return sorted(ADVANTAGES)


def resolve_advantage(spec: str | Mapping[str, Any] | Advantage) -> Advantage:
    """The advantage of a spec: a name, a mapping `{name: pkpo, k: 4}`, or an `Advantage` (returned as is).

    A name is one of `ADVANTAGES`, or `module:attribute`: an `Advantage`, or a function of its parameters.

    Nothing has a default parameter.

    Raises:
        ValueError: an unknown name (with the nearest one), a parameter missing, unknown or outside its domain.
        TypeError: a spec of another type.
    """
    if isinstance(spec, Advantage):
        return spec
    name, parameters = split_spec(spec, "advantage", error=TypeError)
    row = ADVANTAGES.find(name)
    if is_path(name):
        return build_own(row, parameters, f"advantage {name!r}", ADVANTAGES.must_be, Advantage)
    check_keys(parameters, row.parameters, f"advantage {name!r}", "parameter")
    for parameter in row.parameters:
        if parameter not in parameters:
            example = "4" if parameter == "k" else "0.1"
            raise ValueError(
                f"advantage {name!r} needs the parameter {parameter!r}: write {{name: {name}, {parameter}: {example}}}"
            )
    parameters = {key: check(name, parameters[key]) for key, check in row.parameters.items()}
    least = parameters[row.least] if isinstance(row.least, str) else row.least
    return Advantage(name, row.function, least, row.binary, row.estimates, MappingProxyType(parameters))
