"""Quasi-rejection sampling from a target, usable without any training (Eikema et al. 2022, arXiv:2112.05702).

A sample x of the proposal q is accepted with probability min(1, P(x)/(β q(x))); accepted ones follow
p_β ∝ min(P, βq). A larger β is closer to p and accepts less: the rate is Z_β/β with Z_β = Σ min(P, βq), and
TV(p, p_β) ≤ 1 − Z_β/Z, 0 once β ≥ max P/q (both densities are at least min(P, βq)/Z, so they share that mass).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdiv.alignment.f_dpg.loss import log_partition
from fdiv.errors import FdivError
from fdiv.statistics.estimates import mean_and_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fdiv.alignment.f_dpg.targets import Target

__all__ = ["QuasiRejection", "log_beta_for_rate", "quasi_rejection", "quasi_rejection_statistics", "sample_target"]


@dataclass(frozen=True)
class QuasiRejection:
    """What one β gives, estimated from proposal samples."""

    log_beta: float
    acceptance_rate: float
    """E_q[min(1, P/(βq))] = Z_β/β."""
    acceptance_rate_se: float
    """Its standard error; NaN for one sample."""
    total_variation_bound: float
    """1 − Z_β/Ẑ, an upper bound of TV(p, p_β) (of its estimate, while Ẑ is one)."""
    log_z: float
    """log Ẑ, the mean of P/q."""


def quasi_rejection(log_importance: Tensor, log_beta: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Which proposal samples to accept: `[N]` bool, each with probability min(1, e^{log_importance − log_beta}).

    Args:
        log_importance: `[N]`, log P(x) − log q(x); −inf where P = 0 (never accepted).
        log_beta: log β.
        generator: source of randomness.
    """
    uniform = torch.rand(log_importance.shape, generator=generator, dtype=torch.float64, device=log_importance.device)
    return uniform < (log_importance.double() - log_beta).exp()


def quasi_rejection_statistics(log_importance: Tensor, log_beta: float) -> QuasiRejection:
    """Acceptance rate and distance bound of β on these proposal samples.

    Raises:
        ValueError: every sample has P = 0.
    """
    log_importance = log_importance.double()
    log_z = log_partition(log_importance).item()
    if log_z == -math.inf:
        raise ValueError(
            f"every one of the {log_importance.numel()} proposal samples has P = 0: the proposal misses it"
        )
    accept = (log_importance - log_beta).clamp(max=0.0).exp()
    rate, error = mean_and_error(accept.flatten())
    bound = max(0.0, 1.0 - rate * math.exp(log_beta - log_z))
    return QuasiRejection(float(log_beta), rate, error, bound, log_z)


def log_beta_for_rate(log_importance: Tensor, rate: float) -> float:
    """The log β at which the acceptance rate on these proposal samples is `rate`.

    Raises:
        ValueError: `rate` is not in (0, 1), or above the share of samples with P > 0, which no β can accept.
    """
    from scipy.optimize import brentq

    if not 0 < rate < 1:
        raise ValueError(f"rate={rate}: an acceptance rate must lie strictly between 0 and 1")
    finite = log_importance.double()[~torch.isneginf(log_importance)]
    reachable = len(finite) / max(1, log_importance.numel())
    if not len(finite):
        raise ValueError(
            f"every one of the {log_importance.numel()} proposal samples has P = 0, so no beta can be chosen: draw "
            "more (batch_size), take a proposal closer to the target, or set log_beta"
        )
    if rate >= reachable:
        raise ValueError(f"rate={rate}: only {reachable:.3g} of the proposal samples have P > 0; ask for less")

    def surplus(log_beta: float) -> float:
        return (finite - log_beta).clamp(max=0.0).exp().sum().item() / log_importance.numel() - rate

    # At the smallest weight all of `finite` is accepted; far above the largest one less than `rate`.
    return float(brentq(surplus, finite.min().item(), finite.max().item() - math.log(rate) + 1.0, xtol=1e-12))


@torch.no_grad()
def sample_target(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    target: Target,
    count: int,
    *,
    base_model: PreTrainedModel | None = None,
    acceptance_rate: float | None = None,
    log_beta: float | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    max_proposals: int = 100_000,
    score: Callable[[list[str], list[str]], Tensor] | None = None,
) -> tuple[list[str], QuasiRejection]:
    """`count` texts from `target` by quasi-rejection, with `model` as the proposal at temperature 1.

    Args:
        model: the proposal q, for instance an f-DPG policy.
        tokenizer: its tokenizer, with a pad token.
        prompt: the text to continue; `""` starts from the bos (or eos) token.
        target: P; its λ must be fitted.
        count: accepted texts to return.
        base_model: the base a; None when the proposal is the base.
        acceptance_rate: choose β for this rate on the first batch.
        log_beta: or set it.
        batch_size: proposals per `generate` call.
        max_new_tokens: longest continuation.
        max_proposals: give up after that many.
        score: `(prompts, completions) -> [B, S]`; None runs the target's own functions.

    Returns:
        The texts and the statistics over every proposal sampled.

    Raises:
        ValueError: not exactly one of `acceptance_rate` and `log_beta`; no proposal in reach of the target.
        FdivError: a model whose scores depend on the batch, with `batch_size` above 1; fewer than `count`
            accepted after `max_proposals`, with the rate seen.
    """
    if (acceptance_rate is None) == (log_beta is None):
        raise ValueError("give exactly one of acceptance_rate and log_beta")
    from fdiv.inference.padding import depends_on_padding

    reason = depends_on_padding(model)
    if reason is not None and batch_size > 1:
        raise FdivError(f"proposals of one batch are scored together, and {reason}: give batch_size=1 and log_beta")
    accepted: list[str] = []
    seen: list[Tensor] = []
    drawn = 0
    while len(accepted) < count:
        if drawn >= max_proposals:
            raise FdivError(
                f"{len(accepted)} of {count} texts accepted after {drawn} proposals: raise the acceptance rate (lower "
                "log_beta), raise max_proposals, or use a proposal closer to the target"
            )
        texts, log_q, log_a = _propose(model, base_model, tokenizer, prompt, batch_size, max_new_tokens)
        drawn += len(texts)
        scores = (
            _scores(target, [prompt] * len(texts), texts) if score is None else score([prompt] * len(texts), texts)
        )
        log_importance = log_a.double() + target.log_potential(scores.double()).to(log_a.device) - log_q.double()
        seen.append(log_importance)
        if log_beta is None:
            log_beta = log_beta_for_rate(log_importance, acceptance_rate)
        keep = quasi_rejection(log_importance, log_beta)
        accepted += [text for text, kept in zip(texts, keep.tolist(), strict=True) if kept]
    return accepted[:count], quasi_rejection_statistics(torch.cat(seen), log_beta)


def _scores(target: Target, prompts: list[str], completions: list[str]) -> Tensor:
    from fdiv.alignment.f_dpg.targets import as_scores
    from fdiv.alignment.scorers import checked_scorer

    return as_scores([checked_scorer(function)(prompts, completions) for function in target.functions])


def _propose(
    model: PreTrainedModel,
    base_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    batch_size: int,
    max_new_tokens: int,
) -> tuple[list[str], Tensor, Tensor]:
    """Texts sampled from `model`, with log q and log a of each."""
    from fdiv.models.logprobs import sequence_log_prob, token_scores
    from fdiv.training.rollouts import without_generation_defaults

    ids = tokenizer(prompt)["input_ids"] or [
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ]
    inputs = torch.tensor([ids] * batch_size, device=model.device)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    end_ids = _end_ids(model, tokenizer)
    with without_generation_defaults(model):  # penalties and forbidden tokens of the model's own would not be in log q
        output = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=end_ids or None, **options,
        )  # fmt: skip
    completion = output[:, inputs.size(1) :]
    ended = torch.isin(completion, torch.tensor(end_ids, device=output.device))
    inside = (ended.cumsum(1) - ended.long()) == 0  # up to and including the first end token
    mask = torch.cat([torch.zeros_like(inputs), inside.long()], 1)
    attention = torch.cat([torch.ones_like(inputs), inside.long()], 1)
    log_q = sequence_log_prob(token_scores(model, output, attention, mask))
    same = base_model is None or base_model is model
    log_a = log_q if same else sequence_log_prob(token_scores(base_model, output, attention, mask))
    texts = [
        tokenizer.decode(row[kept], skip_special_tokens=True) for row, kept in zip(completion, inside, strict=True)
    ]
    return texts, log_q, log_a


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    named = model.generation_config.eos_token_id
    ids = set(named if isinstance(named, list) else [] if named is None else [named])
    return sorted(ids | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()))
