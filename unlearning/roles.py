"""A forward pass over rows of one or more roles, and what a loss needs of it; the reference scores the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fdiv.models.logprobs import token_scores
from fdiv.models.reference import Reference

if TYPE_CHECKING:
    from fdiv.unlearning.data import EncodedAnswer, UnlearningCollator

__all__ = ["PrecomputedReference", "RoleScores", "score_reference", "score_rows", "split_roles", "trimmed_rows"]


@dataclass(frozen=True)
class RoleScores:
    """What one role's rows got from a model; position t scores token t+1 given the tokens before it.

    Attributes:
        log_probs: [B, T−1] of the rows' own tokens, 0 outside the answer. mask: [B, T−1], the answer's positions.
        token_ids: [B, T−1] the tokens that are scored.
        target_ids: [B, T−1] the tokens to score instead (JensUn), else None.
        logits: [B, T−1, V] where the loss looks at the vocabulary, else None.
        hidden: [B, T−1, D] one layer's activations at the scored tokens themselves, else None.
        reference: the same rows under the reference, where the loss or the log needs them, else None.
    """

    log_probs: Tensor
    mask: Tensor
    token_ids: Tensor
    target_ids: Tensor | None = None
    logits: Tensor | None = None
    hidden: Tensor | None = None
    reference: RoleScores | None = None

    @property
    def token_log_ratio(self) -> Tensor:
        """[B, T−1] log P − log Q of every answer token, 0 elsewhere."""
        return self.log_probs - self.reference.log_probs

    @property
    def log_ratio(self) -> Tensor:
        """[B] log P − log Q of the whole answer, in nats."""
        return self.token_log_ratio.sum(-1)

    def with_reference(self, reference: RoleScores) -> RoleScores:
        """The same with the reference's scores attached."""
        return replace(self, reference=reference)

    def rows(self, part: slice) -> RoleScores:
        """A part of the rows."""
        tensors = {name: value[part] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def score_rows(
    model: nn.Module, inputs: dict[str, Tensor], *, logits: bool = False, layer: int | None = None
) -> RoleScores:
    """Score a padded batch in one forward.

    Args:
        model: a causal language model with the fused head, possibly wrapped.
        inputs: `input_ids`, `attention_mask`, `completion_mask` `[R, T]`, and `target_ids` or not.
        logits: keep the logits (the fused head is bypassed, and [R, T, V] is materialised).
        layer: keep the activations that leave this layer, counted from 0.
    """
    ids, attention = inputs["input_ids"], inputs["attention_mask"]
    shared = {
        "token_ids": ids[:, 1:],
        "target_ids": inputs["target_ids"][:, 1:] if "target_ids" in inputs else None,
    }
    if not logits and layer is None:
        scores = token_scores(model, ids, attention, inputs["completion_mask"])
        return RoleScores(log_probs=scores.log_probs, mask=scores.mask, **shared)
    output = model(input_ids=ids, attention_mask=attention, use_cache=False, output_hidden_states=layer is not None)
    width = ids.size(1)  # prompt-learning PEFT puts virtual tokens in front
    raw = output.logits[:, -width:-1]
    mask = inputs["completion_mask"][:, 1:].bool() & attention[:, 1:].bool()
    scores = raw[mask].float()
    chosen = scores.gather(-1, ids[:, 1:][mask].unsqueeze(-1)).squeeze(-1) - scores.logsumexp(-1)
    log_probs = torch.zeros(mask.shape, dtype=chosen.dtype, device=chosen.device).masked_scatter(mask, chosen)
    return RoleScores(
        log_probs=log_probs,
        mask=mask,
        logits=raw if logits else None,
        hidden=None if layer is None else output.hidden_states[layer + 1][:, -width:][:, 1:],
        **shared,
    )


def trimmed_rows(inputs: dict[str, Tensor], rows: slice, multiple: int | None = None) -> dict[str, Tensor]:
    """Some rows of a padded batch without the columns in which all of them are padding on the right.

    Args:
        inputs: what `UnlearningCollator` gives. rows: those to take. multiple: round the width up to it.
    """
    width = int(inputs["attention_mask"][rows].any(0).nonzero().max()) + 1
    width = -(-width // (multiple or 1)) * (multiple or 1)
    return {name: value[rows, :width] for name, value in inputs.items() if name != "index"}


def split_roles(scores: RoleScores, roles: Sequence[str], batch_size: int) -> dict[str, RoleScores]:
    """Cut rows that stand role after role into one `RoleScores` per role."""
    return {role: scores.rows(slice(i * batch_size, (i + 1) * batch_size)) for i, role in enumerate(roles)}


def score_reference(
    reference: Reference | PrecomputedReference,
    inputs: dict[str, Tensor],
    *,
    logits: bool = False,
    layer: int | None = None,
) -> RoleScores:
    """`score_rows` under the reference, without gradient; looked up where it was precomputed.

    Raises:
        ValueError: more than log-probabilities of a precomputed reference, or a row it does not hold.
    """
    if isinstance(reference, PrecomputedReference):
        if logits or layer is not None:
            raise ValueError("precompute_reference keeps log-probabilities only: set it to false for this method")
        return reference.look_up(inputs)
    with reference.active() as model:
        return score_rows(model, inputs, logits=logits, layer=layer)


@dataclass
class PrecomputedReference:
    """Token log-probabilities of the reference, kept per row instead of the model."""

    table: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @staticmethod
    def _key(row: EncodedAnswer) -> tuple[int, ...]:
        return (len(row.prompt_ids), *row.prompt_ids, *row.answer_ids)

    def fill(
        self, reference: Reference, rows: Sequence[EncodedAnswer], collator: UnlearningCollator, batch_size: int
    ) -> None:
        """Score `rows` once, each process its share, and keep the answers' log-probabilities."""
        from accelerate.utils import gather_object

        accelerator = reference.trainer.accelerator
        unique = list({self._key(row): row for row in rows}.values())
        unique.sort(key=lambda row: len(row.prompt_ids) + len(row.answer_ids))
        mine = unique[accelerator.process_index :: accelerator.num_processes]
        found = []
        for begin in range(0, len(mine), batch_size):
            part = mine[begin : begin + batch_size]
            batch = collator([{"index": 0, "forget": row} for row in part])
            scores = score_reference(reference, {key: value.to(accelerator.device) for key, value in batch.items()})
            found += [
                (self._key(row), log_probs[mask].cpu())
                for row, log_probs, mask in zip(part, scores.log_probs, scores.mask, strict=True)
            ]
        self.table.update(gather_object(found))

    def look_up(self, inputs: dict[str, Tensor]) -> RoleScores:
        """The kept log-probabilities of a batch's rows.

        Raises:
            ValueError: a row that was not scored before training.
        """
        ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:].bool()
        log_probs = torch.zeros(mask.shape, device=ids.device)
        starts, ends = inputs["completion_mask"].argmax(1).tolist(), inputs["attention_mask"].sum(1).tolist()
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            key = (start, *ids[row, :end].tolist())
            if key not in self.table:
                raise ValueError(
                    "a row has no precomputed reference score (a dataset passed to evaluate() was not there when "
                    "training was set up): set precompute_reference to false, or pass it as eval_dataset"
                )
            log_probs[row, mask[row]] = self.table[key].to(ids.device)
        return RoleScores(log_probs=log_probs, mask=mask, token_ids=ids[:, 1:])
