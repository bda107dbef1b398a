"""Relearning: a few steps of fine-tuning on a few forget rows, or on text that has nothing to do with them.

What was only hidden comes back faster than it was learned (Lynch et al. 2024, arXiv:2402.16835; Hu et al. 2024,
arXiv:2406.13356; Deeb & Roger 2024, arXiv:2410.08827). Read the numbers beside those of a retrained model after the
same steps: it shows what the steps teach by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from fdiv.errors import DataError
from fdiv.eval.unlearning.attacks.attacked import Attacked, NotApplicable, Row
from fdiv.eval.unlearning.attacks.copies import adapter_parameters, copied, has_adapter, merged_copy
from fdiv.eval.unlearning.attacks.passages import UNRELATED
from fdiv.eval.unlearning.attacks.rows import DEFAULT_FORMAT, encode, row_generator
from fdiv.inference.encoding import EncodedText
from fdiv.inference.prompting import PromptFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Relearning", "relearn_unrelated"]


@dataclass(frozen=True)
class Relearning:
    """Fine-tunes a copy with AdamW at a constant learning rate, gradients clipped to norm 1, without dropout.

    Steps of 1e-5 are below the rounding of bfloat16 weights, so all weights are trained and measured in float32 (16
    bytes each, with gradients and AdamW's moments); an adapter, and what is not quantised of a quantised model, keep
    their type, and AdamW holds float32 masters of them.

    Args:
        steps: of the optimizer; several for a curve: the first k steps of a longer training are those of a shorter.
        on: `forget`: on `share` of the rows; `unrelated`: on `unrelated`.
        share: of the forget rows, at least one row; which of them is up to the seed.
        unrelated: rows of any columns; None: some sentences from old books (`passages.UNRELATED`).
        learning_rate: None: 1e-4 for an adapter, 1e-5 for all weights, as they are unlearned with.
        batch_size: rows of a step; each pass goes through them in another order.
        parameters: `adapter`: the adapter that is there, trained on; `all`: all weights, an adapter merged first;
            `auto`: the adapter where there is one, else all.
        max_length: tokens kept of a row.
        prompt: how questions are asked; an evaluation gives its own.
    """

    steps: int | Sequence[int] = 5
    on: Literal["forget", "unrelated"] = "forget"
    share: float = 0.1
    unrelated: Sequence[Mapping[str, Any]] | None = None
    learning_rate: float | None = None
    batch_size: int = 8
    parameters: Literal["auto", "adapter", "all"] = "auto"
    max_length: int = 512
    prompt: PromptFormat = DEFAULT_FORMAT

    def __post_init__(self) -> None:
        points = self.points
        if not points or any(isinstance(p, bool) or not isinstance(p, int) or p < 1 for p in points):
            raise DataError(f"steps={self.steps!r}: must be a number of steps, at least 1, or a list of such")
        if points != sorted(set(points)):
            raise DataError(f"steps={self.steps!r}: must rise")
        for name, choices in (("on", ("forget", "unrelated")), ("parameters", ("auto", "adapter", "all"))):
            if getattr(self, name) not in choices:
                raise DataError(f"{name}={getattr(self, name)!r}: choose {', '.join(choices)}")
        if not 0 < self.share <= 1:
            raise DataError(f"share={self.share!r}: must lie in (0, 1]")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise DataError(f"learning_rate={self.learning_rate!r}: must lie between 0 and 1")
        if self.batch_size < 1 or self.max_length < 2:
            raise DataError("batch_size must be at least 1, max_length at least 2")
        if self.unrelated is not None and not len(self.unrelated):
            raise DataError("unrelated: there are no rows")

    @property
    def points(self) -> list[int]:
        """`steps` as a list."""
        return [self.steps] if isinstance(self.steps, int) else list(self.steps)

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, seed: int
    ) -> Attacked:
        """The model after the last of `steps`."""
        for _, attacked in self.stages(model, tokenizer, rows, seed=seed):
            last = attacked
        return last

    def stages(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, seed: int
    ) -> Iterator[tuple[str, Attacked]]:
        """(number of steps, what to measure) of every point of the curve; one model, trained on in between."""
        trained_on = self.chosen(len(rows), seed) if self.on == "forget" else ()
        source = [rows[i] for i in trained_on] if self.on == "forget" else self.unrelated or UNRELATED
        texts = [encode(row, tokenizer, self.prompt, max_length=self.max_length) for row in source]
        texts = [text for text in texts if text.label_count]
        if not texts:
            raise NotApplicable(f"no row to relearn has an answer within max_length={self.max_length}")
        twin, trained = self._attacked_copy(model)
        rate = self.learning_rate or (1e-4 if has_adapter(twin) else 1e-5)
        what = "forget rows" if self.on == "forget" else "unrelated texts"
        note = f"{len(texts)} {what}, learning rate {rate:g}, {'the adapter' if has_adapter(twin) else 'all weights'}"
        masters = [_master(parameter) for parameter in trained]
        optimizer = torch.optim.AdamW(masters, lr=rate, weight_decay=0.0)
        done = 0
        for point in self.points:
            while done < point:
                self._step(twin, trained, masters, optimizer, _batch(texts, self.batch_size, seed, done))
                done += 1
            yield str(point), Attacked(twin, rows, trained_on=trained_on, notes=(note,))

    def chosen(self, count: int, seed: int) -> tuple[int, ...]:
        """Numbers of the rows trained on, in order."""
        if not count:
            raise NotApplicable("there are no forget rows to relearn")
        size = max(1, round(self.share * count))
        return tuple(sorted(row_generator(seed, 0, "relearned rows").permutation(count)[:size].tolist()))

    def _attacked_copy(self, model: PreTrainedModel) -> tuple[PreTrainedModel, list[torch.nn.Parameter]]:
        """The copy, and its parameters that are trained."""
        if self.parameters == "adapter" and not has_adapter(model):
            raise NotApplicable("parameters: adapter, and the model has none")
        if has_adapter(model) and self.parameters != "all":
            own = adapter_parameters(model)
            trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            twin = copied(model, lambda name: name in own | trainable)
            for name, parameter in twin.named_parameters():
                if name in own:
                    parameter.requires_grad_(True)
            names = own
        else:
            twin = merged_copy(model)
            if not getattr(twin, "is_quantized", False):  # transformers refuses to cast those
                twin = twin.float()
            names = {name for name, parameter in twin.named_parameters() if parameter.is_floating_point()}
            for name, parameter in twin.named_parameters():
                parameter.requires_grad_(name in names)
        return twin, [parameter for name, parameter in twin.named_parameters() if name in names]

    @staticmethod
    def _step(
        model: Any,
        trained: list[torch.nn.Parameter],
        masters: list[torch.nn.Parameter],
        optimizer: Any,
        batch: Sequence[EncodedText],
    ) -> None:
        """One step of the masters, which `trained` follow, on the mean over rows of the mean −log p of a label."""
        width = max(len(text.input_ids) for text in batch)
        device = trained[0].device
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.zeros((len(batch), width), dtype=torch.bool)
        for row, text in enumerate(batch):
            length = len(text.input_ids)
            ids[row, :length], mask[row, :length] = torch.tensor(text.input_ids), 1
            labels[row, text.prompt_length : length] = True
        ids, mask, labels = ids.to(device), mask.to(device), labels.to(device)[:, 1:]
        with torch.enable_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            loss = ((losses * labels).sum(1) / labels.sum(1).clamp(min=1)).mean()
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.to(master.dtype)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in zip(trained, masters, strict=True):
                if parameter is not master:
                    parameter.copy_(master)


def _master(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """What AdamW steps: the parameter itself, of one in fewer bits than 32 a float32 copy."""
    return parameter if parameter.element_size() >= 4 else torch.nn.Parameter(parameter.detach().float())


def _batch(texts: Sequence[EncodedText], size: int, seed: int, step: int) -> list[EncodedText]:
    """The rows of a step: a function of seed and step alone, each pass over all rows in an order of its own."""
    size = min(size, len(texts))
    steps = -(-len(texts) // size)
    order = row_generator(seed, step // steps, "relearning order").permutation(len(texts))
    return [texts[i] for i in order[step % steps * size : (step % steps + 1) * size]]


def relearn_unrelated(
    steps: int | Sequence[int] = 5,
    unrelated: Sequence[Mapping[str, Any]] | None = None,
    learning_rate: float | None = None,
    batch_size: int = 8,
    parameters: Literal["auto", "adapter", "all"] = "auto",
    max_length: int = 512,
    prompt: PromptFormat = DEFAULT_FORMAT,
) -> Relearning:
    """`Relearning` on text that has nothing to do with the forget rows."""
    return Relearning(
        steps, "unrelated", unrelated=unrelated, learning_rate=learning_rate, batch_size=batch_size,
        parameters=parameters, max_length=max_length, prompt=prompt,
    )  # fmt: skip
