"""The Sinkhorn term of `FDistillTrainer` (SinKD, arXiv:2402.17110): its options, and where it is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdiv.distillation.transport import Transport, TransportCosts, transport_from_hidden
from fdiv.errors import DataError, OptionError
from fdiv.models.vocabulary import Head
from fdiv.training.config import Options, option

__all__ = ["SinkhornOptions", "SinkhornTerm", "sinkhorn_term"]


@dataclass
class SinkhornOptions(Options):
    """`sinkhorn_weight` and the keys that go with it."""

    sinkhorn_weight: float = option(
        0.0,
        "Weight of the Sinkhorn term (SinKD takes 0.001): the cost of carrying the student's distributions of a batch "
        "to the teacher's; needs a teacher in memory",
        least=0,
    )
    sinkhorn_words: list[str] | None = option(
        None,
        "Label words: the term compares the first token of each completion over these, each one token; not set: all "
        "tokens of completions, over the teacher's `sinkhorn_top_k` and one cell for the rest",
    )
    sinkhorn_top_k: int = option(32, "Tokens of the teacher that are cells of the term", least=1)
    sinkhorn_group: int = option(32, "Distributions that are carried to each other at once, at most", least=1)
    sinkhorn_temperature: float = option(2.0, "What both logits are divided by in the term", above=0)
    sinkhorn_epsilon: float = option(0.1, "Entropy ε of the transport; small is near an assignment", above=0)
    sinkhorn_iterations: int = option(20, "Scalings of rows and columns", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinkhorn_weight == 0:
            for entry in dataclasses.fields(SinkhornOptions):
                if getattr(self, entry.name) != entry.default:
                    raise OptionError(
                        f"{entry.name}={getattr(self, entry.name)!r} does nothing at sinkhorn_weight: 0: set a weight",
                        key=entry.name,
                    )
        elif self.sinkhorn_words is not None and len(set(self.sinkhorn_words)) < max(2, len(self.sinkhorn_words)):
            raise OptionError(
                f"sinkhorn_words={self.sinkhorn_words!r}: give at least two words, each once", key="sinkhorn_words"
            )

    def sinkhorn_settings(self) -> dict[str, Any]:
        """What the term is, for checkpoints and the model card; empty without one."""
        if self.sinkhorn_weight == 0:
            return {}
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(SinkhornOptions)}


@dataclass(frozen=True)
class SinkhornTerm:
    """λ·⟨P, C⟩ of a micro-batch.

    Args:
        weight: λ. how: the transport. first_only: the first token of each completion alone.
    """

    weight: float
    how: Transport
    first_only: bool

    def costs(
        self,
        hidden: Tensor,
        head: Head,
        teacher_hidden: Tensor,
        teacher_head: Callable[[], Head],
        mask: Tensor,
    ) -> tuple[Tensor, TransportCosts]:
        """The rows of `mask[B, C]` that the costs belong to `[n]`, and the costs.

        Args:
            hidden, teacher_hidden: `[N, H]` at the true positions of `mask`, in row-major order.
        """
        rows = mask.nonzero()[:, 0]
        if self.first_only:
            first = torch.ones_like(rows, dtype=torch.bool)
            first[1:] = rows[1:] != rows[:-1]
            hidden, teacher_hidden, rows = hidden[first], teacher_hidden[first.to(teacher_hidden.device)], rows[first]
        teacher_hidden = teacher_hidden.to(hidden.device)
        return rows, transport_from_hidden(hidden, head, teacher_hidden, teacher_head(), self.how)


def sinkhorn_term(args: SinkhornOptions, tokenizer: Any, shared: int | None) -> SinkhornTerm | None:
    """The term of a config; None at weight 0.

    Args:
        tokenizer: of the student. shared: tokens that student and teacher have in common; None: all.

    Raises:
        DataError: a label word that is not one token, two that are the same one, one that the teacher lacks; more
            cells than there are tokens.
    """
    if args.sinkhorn_weight == 0:
        return None
    words = None
    if args.sinkhorn_words is not None:
        words = tuple(_token_of(word, tokenizer, shared) for word in args.sinkhorn_words)
        if len(set(words)) < len(words):
            raise DataError(f"sinkhorn_words: two of {args.sinkhorn_words} are the same token: name different words")
    elif args.sinkhorn_top_k > (shared or len(tokenizer)):
        raise DataError(
            f"sinkhorn_top_k={args.sinkhorn_top_k}: student and teacher have {shared or len(tokenizer)} tokens"
        )
    how = Transport(
        words, args.sinkhorn_top_k, args.sinkhorn_group, args.sinkhorn_temperature, args.sinkhorn_epsilon,
        args.sinkhorn_iterations,
    )  # fmt: skip
    return SinkhornTerm(args.sinkhorn_weight, how, first_only=words is not None)


def _token_of(word: str, tokenizer: Any, shared: int | None) -> int:
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise DataError(
            f"sinkhorn_words: {word!r} is {len(ids)} tokens ({tokenizer.convert_ids_to_tokens(ids)}): a label word "
            "must be one, written as it stands behind the prompt (often with a space before it)"
        )
    if shared is not None and ids[0] >= shared:
        raise DataError(f"sinkhorn_words: {word!r} is token {ids[0]}, which student and teacher do not share")
    return ids[0]
