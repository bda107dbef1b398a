"""The evaluation `to_teacher`: how far a student is from its teacher, by several divergences, on held-out answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fdiv.distillation.f_distill.data import batch_tensors, check_rows, completion_tokens
from fdiv.distillation.teachers import check_known_tokens, load_teacher, shared_tokens, teacher_tokenizer
from fdiv.distillation.teachers.local import cut_head
from fdiv.divergences import get_distance
from fdiv.evaluation import EvalContext
from fdiv.inference.encoding import Encoding
from fdiv.inference.processes import whole_models
from fdiv.models.vocabulary import gathered_weights, last_hidden_states, vocabulary_divergence
from fdiv.rows.report import RowReport
from fdiv.statistics.estimates import clustered_mean
from fdiv.training.config import RowOptions

__all__ = ["ToTeacherEvalConfig"]


@dataclass
class ToTeacherEvalConfig(RowOptions):
    """Recipe block `eval: {name: to_teacher}`: D_f(student‖teacher) per token on held-out prompts with completions.

    Both distributions are taken at temperature 1 over the whole vocabulary. Gives `to_teacher/NAME` with `_se` over
    answers for each divergence, and `to_teacher/agreement`, the share of tokens where both would say the same.

    Args:
        teacher: path or hub name; left out: the run's `teacher_model_name_or_path`, loaded as the run loads it.
        split: of the data. divergences: names or mappings, also without an f.
        max_rows: at most this many rows; None: all.
        max_tokens: answers are cut to it. batch_size: rows scored at once.
        system_prompt, date_string, chat_template_kwargs: of the chat template; left out: as in training.
        min_used_fraction: smallest share of the rows that must have an answer token.
    """

    teacher: str | None = None
    split: str = "test"
    divergences: list[Any] = field(default_factory=lambda: ["reverse_kl", "forward_kl", "jensen_shannon"])
    max_rows: int | None = None
    max_tokens: int = 512
    batch_size: int = 8
    system_prompt: str | None = None
    date_string: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def summary_metrics(self) -> tuple[str, ...]:
        """What the tables show."""
        return (*(f"to_teacher/{get_distance(spec).label}" for spec in self.divergences), "to_teacher/agreement")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.divergences:
            raise ValueError("divergences is empty: name at least one")
        for spec in self.divergences:
            get_distance(spec)
        for name in ("max_tokens", "batch_size", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                left_out = "; leave it out for all rows" if name == "max_rows" else ""
                raise ValueError(f"{name} must be at least 1, got {value}{left_out}")

    @torch.no_grad()
    def evaluate(
        self, model: Any, tokenizer: Any, datasets: Mapping[str, Any], context: EvalContext
    ) -> dict[str, float | None]:
        """The numbers of `model` on `datasets[split]`.

        Raises:
            DataError: no such rows, no teacher, or a teacher of another vocabulary.
            ValueError: neither `teacher` nor the run names one.
        """
        name, loading = self._teacher(context.training_args)
        given = list(check_rows(datasets.get(self.split), f"the {self.split} split", given=True))
        rows = given[: self.max_rows]
        context.report_rows(self._report(tokenizer, len(given), rows), self.min_used_fraction)
        with whole_models():
            teacher = load_teacher(name, **loading).to(model.device)
        widths = [part.config.get_text_config().vocab_size for part in (model, teacher)]
        remote = {key: loading[key] for key in ("trust_remote_code",) if key in loading}
        shared = shared_tokens(tokenizer, teacher_tokenizer(name, **remote), *widths)
        read = [[*prompt, *ids] for prompt, ids in (self._tokens(tokenizer, row) for row in rows)]
        check_known_tokens(read, tokenizer, shared, f"the {self.split} split")
        columns: dict[str, list[Tensor]] = {}
        for start in range(0, len(rows), self.batch_size):
            batch = [self._tokens(tokenizer, row) for row in rows[start : start + self.batch_size]]
            for key, values in self._score(model, teacher, shared, tokenizer, batch).items():
                columns.setdefault(key, []).append(values)
        return _reduce({key: torch.cat(parts).double().cpu() for key, parts in columns.items()})

    def _teacher(self, args: Any) -> tuple[str, dict[str, Any]]:
        """Name and loading options of the teacher: the run's own, loaded as the run loads it, where none is named.

        Raises:
            ValueError: neither `teacher` nor the run names one.
        """
        if self.teacher is not None:
            return self.teacher, {}
        name = getattr(args, "teacher_model_name_or_path", None)
        if name is None:
            raise ValueError("to_teacher needs a teacher: set `teacher`, or teacher_model_name_or_path of the run")
        stated = getattr(args, "teacher_model_init_kwargs", None) or {}
        loading = {
            "revision": getattr(args, "teacher_model_revision", None),
            "trust_remote_code": getattr(args, "trust_remote_code", False),
            **stated,
        }
        return name, loading

    def _report(self, tokenizer: Any, read: int, rows: list[Any]) -> RowReport:
        lengths = [len(self._whole(tokenizer, row)[1]) for row in rows]
        return RowReport(
            f"to_teacher rows of {self.split}",
            read,
            read - len(rows),
            max_length=self.max_tokens,
            cut=sum(tokens > self.max_tokens for tokens in lengths),
            longest=max(lengths, default=0),
            without_signal={"without an answer token": lengths.count(0)},
        )

    def _whole(self, tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        encoding = Encoding(self.system_prompt, self.date_string, self.chat_template_kwargs, context="generation")
        return completion_tokens(tokenizer, row, encoding, [tokenizer.eos_token_id])

    def _tokens(self, tokenizer: Any, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        prompt, ids = self._whole(tokenizer, row)
        return prompt, ids[: self.max_tokens]

    def _score(
        self,
        model: Any,
        teacher: Any,
        shared: int | None,
        tokenizer: Any,
        batch: Sequence[tuple[list[int], list[int]]],
    ) -> dict[str, Tensor]:
        """Sums over the tokens of each row, and their number."""
        ids, mask, answers = (part.to(model.device) for part in batch_tensors(batch, tokenizer.pad_token_id))
        hidden, heads = [], []
        for part in (model, teacher):
            hidden.append(last_hidden_states(part, ids, mask)[answers])
            heads.append(cut_head(part, shared))
        owner = answers.nonzero()[:, 0]

        def sums(values: Tensor) -> Tensor:
            return torch.zeros(len(batch), device=values.device).index_add(0, owner, values.float())

        options = {
            f"{key}_{side}": getattr(head, key)
            for side, head in zip("pq", heads, strict=True)
            for key in ("bias", "scale", "softcap")
        }
        found = {"tokens": answers.sum(-1)}
        for spec in self.divergences:
            values = vocabulary_divergence(hidden[0], heads[0].weight, hidden[1], heads[1].weight, spec, **options)
            found[get_distance(spec).label] = sums(values)
        same = _top(hidden[0], heads[0]) == _top(hidden[1], heads[1])
        return found | {"agreement": sums(same)}


def _top(hidden: Tensor, head: Any) -> Tensor:
    """The most likely token of each row; scale and soft cap keep the order where the scale is above 0."""
    chosen = []
    with gathered_weights(head.weight, head.bias):
        for rows in hidden.split(max(1, 2**22 // head.weight.shape[0])):
            logits = rows @ head.weight.t().to(rows.dtype)
            chosen.append((logits if head.bias is None else logits + head.bias).argmax(-1))
    return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.long)


def _reduce(columns: dict[str, Tensor]) -> dict[str, float | None]:
    """Means over tokens, with errors over rows."""
    tokens = columns.pop("tokens")
    agreement = columns.pop("agreement")
    result: dict[str, float | None] = {}
    for name, sums in columns.items():
        value, error = clustered_mean(sums / tokens.clamp(min=1), tokens, torch.arange(len(tokens)))
        result |= {f"to_teacher/{name}": value, f"to_teacher/{name}_se": error}
    return result | {"to_teacher/agreement": (agreement.sum() / tokens.sum()).item()}
