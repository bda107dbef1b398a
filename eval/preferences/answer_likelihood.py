"""Likelihood of held-out answers, chosen and rejected, and a look at what the model says by itself.

For training on negatives alone: does the likelihood of rejected answers fall on prompts never seen, does that of
chosen answers stay, and does the model still write like the one it started from? In a recipe: `eval: {name:
answer_likelihood, data: …}`. It asks nothing of the training method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fdiv.errors import DataError
from fdiv.rows.loading import read_file
from fdiv.statistics.estimates import mean_and_error
from fdiv.training.config import RowOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fdiv.evaluation import EvalContext

__all__ = ["AnswerLikelihoodConfig"]

_SIDES = ("chosen", "rejected")


@dataclass
class AnswerLikelihoodConfig(RowOptions):
    """The `answer_likelihood` evaluation, on files of rows with `prompt`, `chosen` and `rejected`.

    For each split and side, log π(y|x) summed over the answer's tokens and its end, in nats, mean over rows:
    `{split}_{side}_log_prob`, with `{split}_{side}_change` since the start of training and its standard error over
    rows `_se`; `{split}_margin_change` is the chosen change less the rejected one, `{split}_preference_accuracy` the
    share of pairs whose chosen answer has the higher mean log-prob per token.

    Of samples at temperature 1 for the first prompts of the last split: `sample_start_log_prob`, their mean log-prob
    per token under the start model (it falls when the text comes apart), `sample_distinct_2`, `sample_tokens`, and
    with a scorer `sample_harmfulness` and `sample_harmful_share`.

    Args:
        data: Directory with a `{split}.jsonl` for each split.
        splits: The splits, in order.
        start_model: Directory of the start model, for `sample_start_log_prob` after training. None: it is None then.
        batch_size: Rows of a forward.
        num_prompts: Prompts to sample for; 0 leaves the samples out.
        num_samples: Samples for each of them.
        max_new_tokens: Longest sample.
        harmfulness_scorer: A scorer of `fdiv.alignment.scorers`, by name or as a mapping.
        harmful_above: A sample with a higher score is harmful.
        min_used_fraction: Smallest share of the pairs that must be left, not the same twice.
    """

    data: str
    splits: list[str] = field(default_factory=lambda: ["test"])
    start_model: str | None = None
    batch_size: int = 32
    num_prompts: int = 32
    num_samples: int = 1
    max_new_tokens: int = 64
    harmfulness_scorer: dict[str, Any] | str | None = None
    harmful_above: float = 0.5

    summary_metrics: ClassVar[tuple[str, ...]] = (
        "test_rejected_log_prob",
        "test_chosen_log_prob",
        "test_margin_change",
        "test_preference_accuracy",
        "sample_start_log_prob",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, smallest in (("batch_size", 1), ("num_prompts", 0), ("num_samples", 1), ("max_new_tokens", 1)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {smallest}")
        if not self.splits:
            raise ValueError("splits is empty: name at least one")
        if self.harmfulness_scorer is not None:
            self._scorer()
        self._start: dict[str, Tensor] = {}

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        datasets: Mapping[str, Any],
        context: EvalContext,
    ) -> dict[str, float | None]:
        """Measure `model`; call it on all processes. `datasets` is not used: the files in `data` are.

        Raises:
            DataError: a file is missing, or its rows are no preferences.
        """

        metrics: dict[str, float | None] = {}
        for split in self.splits:
            rows = self._rows(tokenizer, split, context)
            log_probs, tokens = {}, {}
            for side in _SIDES:
                texts = [(row["prompt_ids"], row[f"{side}_ids"]) for row in rows]
                log_probs[side], tokens[side] = self._score(model, texts, f"scoring {split} {side}")
            metrics |= self._split_metrics(split, log_probs, tokens, context.stage)
        if self.num_prompts:
            metrics |= self._sample_metrics(model, tokenizer, rows, context)
        return metrics

    def _rows(self, tokenizer: Any, split: str, context: EvalContext) -> list[dict[str, Any]]:
        from fdiv.training.data_checks import encoding_of, preference_report, tokenize_preferences

        path = Path(self.data) / f"{split}.jsonl"
        if not path.is_file():
            raise DataError(
                f"eval answer_likelihood: {path} does not exist; set `data` to the directory of the splits"
            )
        rows = read_file(path)
        tokenized = tokenize_preferences(
            rows,
            tokenizer,
            encoding=encoding_of(context.training_args),
            name=split,
            method="eval answer_likelihood",
        )
        report = preference_report(len(rows), tokenized, None, f"answers of {split}")
        context.report_rows(report, self.min_used_fraction)
        return list(tokenized)

    def _score(self, model: Any, texts: Sequence[tuple[Sequence[int], Sequence[int]]], title: str):
        """Summed log-probabilities and numbers of tokens of the completions, `[N]` float64 each."""
        from accelerate.utils import extract_model_from_parallel

        from fdiv.inference.prompting import EncodedText
        from fdiv.inference.scoring import ScoringRequest, score_texts

        requests = [
            ScoringRequest(f"{i:08d}", EncodedText((*prompt, *completion), len(prompt)), False)
            for i, (prompt, completion) in enumerate(texts)
        ]
        model = extract_model_from_parallel(model)
        found = score_texts(model, requests, pad_id=0, batch_size=self.batch_size, title=title)
        records = [found[request.key] for request in requests]
        tokens = torch.tensor([record["labels"] for record in records], dtype=torch.float64)
        return -torch.tensor([record["avg_loss"] or 0.0 for record in records], dtype=torch.float64) * tokens, tokens

    def _split_metrics(
        self, split: str, log_probs: dict[str, Tensor], tokens: dict[str, Tensor], stage: str
    ) -> dict[str, float | None]:
        metrics: dict[str, float | None] = {}
        changes: dict[str, Tensor] = {}
        for side in _SIDES:
            key = f"{split}_{side}"
            if stage == "before":
                self._start[key] = log_probs[side]
            metrics[f"{key}_log_prob"] = log_probs[side].mean().item()
            if key in self._start:
                changes[side] = log_probs[side] - self._start[key]
                metrics[f"{key}_change"], metrics[f"{key}_change_se"] = mean_and_error(changes[side])
        if changes:
            margin = changes["chosen"] - changes["rejected"]
            metrics[f"{split}_margin_change"], metrics[f"{split}_margin_change_se"] = mean_and_error(margin)
        mean = {side: log_probs[side] / tokens[side] for side in _SIDES}
        metrics[f"{split}_preference_accuracy"] = (mean["chosen"] > mean["rejected"]).double().mean().item()
        return metrics

    def _sample_metrics(
        self, model: Any, tokenizer: Any, rows: list[dict[str, Any]], context: EvalContext
    ) -> dict[str, float | None]:
        from fdiv.inference.sampling import SamplingRequest, sample_completions
        from fdiv.statistics.diversity import distinct_n, words_of

        chosen = rows[: self.num_prompts]
        requests = [
            SamplingRequest(f"{i:08d}-{k:04d}", tuple(row["prompt_ids"]), self.max_new_tokens, stream=(i, k))
            for i, row in enumerate(chosen)
            for k in range(self.num_samples)
        ]
        drawn = sample_completions(model, tokenizer, requests, seed=context.seed, batch_size=self.batch_size)
        ids = [drawn[request.key] for request in requests]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        start = self._start_model(model, context)
        metrics: dict[str, float | None] = {
            "sample_start_log_prob": None,
            "sample_distinct_2": distinct_n([words_of(text) for text in texts], 2),
            "sample_tokens": sum(len(completion) for completion in ids) / len(ids),
        }
        if start is not None:
            pairs = [(request.prompt_ids, completion) for request, completion in zip(requests, ids, strict=True)]
            log_probs, tokens = self._score(start, pairs, "scoring samples under the start model")
            metrics["sample_start_log_prob"] = (log_probs.sum() / tokens.sum()).item()
        if self.harmfulness_scorer is not None:
            prompts = [row["prompt"] for row in chosen for _ in range(self.num_samples)]
            scores = self._scorer()(prompts=prompts, completions=texts)
            metrics["sample_harmfulness"] = sum(scores) / len(scores)
            metrics["sample_harmful_share"] = sum(score > self.harmful_above for score in scores) / len(scores)
        return metrics

    def _start_model(self, model: Any, context: EvalContext) -> Any:
        if context.stage == "before":
            return model
        if self.start_model is None:
            return None
        from fdiv.models.loading import load_model

        return load_model(self.start_model, dtype="float32").to(next(model.parameters()).device)

    def _scorer(self) -> Any:
        from fdiv.alignment.scorers import build_scorer, checked_scorer

        return checked_scorer(build_scorer(self.harmfulness_scorer))
