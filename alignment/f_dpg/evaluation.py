"""Evaluation of a policy against its f-DPG target: distances to p, scores, and diversity of its samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fdiv.alignment.f_dpg.estimate import estimate_by_prompt
from fdiv.alignment.f_dpg.loss import effective_sample_size, log_partition
from fdiv.alignment.f_dpg.targets import as_scores
from fdiv.alignment.scorers import checked_scorer
from fdiv.errors import DataError
from fdiv.rows.report import RowReport
from fdiv.statistics.estimates import mean_and_error
from fdiv.training.config import RowOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fdiv.evaluation import EvalContext

__all__ = ["TargetEvalConfig"]

_DIVERGENCES = ("forward_kl", "reverse_kl", "total_variation", "jensen_shannon")


@dataclass
class TargetEvalConfig(RowOptions):
    """Recipe block `eval: {name: target}`.

    Half of the samples come from the policy, half from the base, and every estimate of a distance is over the mixture
    (π + a)/2 as proposal: weights π/q are at most 2, and Z is estimated even where the policy has left part of p.

    Args:
        num_samples: completions per prompt from each of the two models.
        num_prompts: distinct prompts, the first ones of the training split.
        batch_size: completions per forward pass.
        min_used_fraction: has no effect here, where every prompt is used or refused.
    """

    num_samples: int = 256
    num_prompts: int = 4
    batch_size: int = 64

    summary_metrics: ClassVar[tuple[str, ...]] = (
        "score", "forward_kl", "reverse_kl", "total_variation", "jensen_shannon", "kl_to_base", "sequence_entropy",
        "distinct_2", "self_bleu_5",
    )  # fmt: skip
    frontier: ClassVar[tuple[str, str]] = ("self_bleu_5", "score")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_samples", "num_prompts", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"eval.{name} must be at least 1, got {getattr(self, name)}")

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        datasets: dict[str, Any],
        context: EvalContext,
    ) -> dict[str, float | None]:
        """Metrics, each ± `_se`: averages over prompts.

        `score` is E_π of the target's first scorer, `score/NAME` of each; `forward_kl` is KL(p‖π), `reverse_kl`
        KL(π‖p) (None when infinite), `jensen_shannon` twice the textbook value; `kl_to_base` KL(π‖a); `z`, `z_ess`;
        `moment_gap` the largest |E_π φ − wanted| of a distributional target; `distinct_*` and `self_bleu_*` of the
        policy's samples.

        Raises:
            DataError: not called around an f-DPG training, whose target and base it needs.
        """
        trainer = (context.extra or {}).get("trainer")
        if trainer is None or not hasattr(trainer, "target"):
            raise DataError("eval: target needs the trainer's target and base model: use it in a recipe of f_dpg")
        trainer.ensure_fitted()
        target = trainer.target
        prompts = _distinct_prompts(datasets["train"], self.num_prompts)
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        context.report_rows(self._report(datasets["train"], prompt_ids), self.min_used_fraction)
        per_prompt, texts = [], []
        for number, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True)):
            completions = self._sample(trainer, model, tokenizer, list(ids), number, context.seed)
            rows = [row for group in completions for row in group]
            decoded = tokenizer.batch_decode(rows, skip_special_tokens=True)
            scores = as_scores(
                [
                    checked_scorer(function)(
                        prompts=[prompt] * len(rows), completions=_as_completions(prompt, decoded), completion_ids=rows
                    )
                    for function in target.functions
                ]
            )
            log_policy = self._score(model, tokenizer, list(ids), rows)
            with trainer.base_model() as base:
                log_base = self._score(base, tokenizer, list(ids), rows)
            per_prompt.append(_prompt_metrics(target, scores, log_policy, log_base, len(completions[0])))
            texts += decoded[: len(completions[0])]
        begins = tokenizer.batch_decode([list(ids) for ids in prompt_ids], skip_special_tokens=True)
        said = zip([begin for begin in begins for _ in range(self.num_samples)], texts, strict=True)
        context.keep_examples("target", [{"prompt": prompt, "completion": text} for prompt, text in said])
        metrics = _average(per_prompt)
        if target.features:
            gaps = [
                abs(metrics[f"score/{function.__name__}"] - wanted)
                for function, wanted in zip(target.features, target.moments, strict=True)
            ]
            metrics["moment_gap"] = max(gaps)
        from fdiv.statistics.diversity import diversity

        metrics |= diversity(texts, max_texts=500)
        return {name: value if math.isfinite(value) else None for name, value in metrics.items()}

    def _report(self, rows: Any, prompt_ids: list) -> RowReport:
        read = len(rows) if hasattr(rows, "__len__") else len(prompt_ids)
        longest = max(len(ids) for ids in prompt_ids)
        return RowReport("target prompts", read, read - len(prompt_ids), longest=longest, unit="prompts")

    def _sample(self, trainer, model, tokenizer, ids: list[int], number: int, seed: int) -> tuple[list, list]:
        """`num_samples` completions of the policy, then of the base, with the same random numbers before and after."""
        from fdiv.inference.sampling import SamplingRequest, sample_completions

        def draw(source: Any, stream: int) -> list[list[int]]:
            requests = [
                SamplingRequest(
                    key=f"{number}-{k}",
                    prompt_ids=tuple(ids),
                    max_new_tokens=trainer.max_completion_length,
                    stream=(number, stream, k),
                )
                for k in range(self.num_samples)
            ]
            drawn = sample_completions(
                source, tokenizer, requests, seed=seed, batch_size=self.batch_size, progress=False
            )
            return [list(drawn[request.key]) for request in requests]

        from_policy = draw(model, 0)
        with trainer.base_model() as base:
            return from_policy, draw(base, 1)

    @torch.no_grad()
    def _score(self, model: Any, tokenizer: Any, prompt: list[int], rows: list[list[int]]) -> Tensor:
        """`[N]` float64 log-probability of completions."""
        from fdiv.models.logprobs import sequence_log_prob, token_scores

        device, values = next(model.parameters()).device, []
        for start in range(0, len(rows), self.batch_size):
            batch = [torch.tensor(prompt + row) for row in rows[start : start + self.batch_size]]
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_token_id)
            position = torch.arange(ids.size(1))[None]
            inside = position < torch.tensor([len(row) for row in batch])[:, None]
            completion = inside & (position >= len(prompt))
            scores = token_scores(model, ids.to(device), inside.long().to(device), completion.long().to(device))
            values.append(sequence_log_prob(scores).double().cpu())
        return torch.cat(values)


def _distinct_prompts(rows: Any, count: int) -> list:
    found: list = []
    for row in rows:
        if row["prompt"] not in found:
            found.append(row["prompt"])
        if len(found) == count:
            break
    return found


def _as_completions(prompt: Any, texts: list[str]) -> list:
    return texts if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in texts]


def _prompt_metrics(
    target: Any, scores: Tensor, log_policy: Tensor, log_base: Tensor, from_policy: int
) -> dict[str, tuple[float, float]]:
    """Metric → (value, standard error) of one prompt."""
    log_p = log_base + target.log_potential(scores)
    log_q = torch.logaddexp(log_policy, log_base) - math.log(2.0)
    log_z = log_partition(log_p - log_q)
    own = slice(0, from_policy)
    names = [function.__name__ for function in target.functions]
    metrics = {f"score/{name}": mean_and_error(scores[own, column]) for column, name in enumerate(names)}
    metrics["score"] = metrics[f"score/{names[0]}"]
    metrics["kl_to_base"] = mean_and_error((log_policy - log_base)[own])
    metrics["sequence_entropy"] = mean_and_error(-log_policy[own])
    metrics["z"] = (log_z.exp().item(), math.nan)
    metrics["z_ess"] = (effective_sample_size(log_p - log_q).item(), math.nan)
    if not torch.isneginf(log_z):
        for name in _DIVERGENCES:
            one = torch.zeros_like(log_p, dtype=torch.long)
            found = estimate_by_prompt(log_policy - log_p, one, name, log_weight=log_policy - log_q)
            metrics[name] = (found.value.item(), found.standard_error.item())
    return metrics


def _average(per_prompt: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Means over the prompts that have the metric; standard errors of independent prompts add in squares."""
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for prompt in per_prompt for name in prompt):
        values = [prompt[name] for prompt in per_prompt if name in prompt]
        metrics[name] = sum(value for value, _ in values) / len(values)
        error = math.sqrt(sum(error**2 for _, error in values)) / len(values)
        if math.isfinite(error):
            metrics[f"{name}_se"] = error
    return metrics
