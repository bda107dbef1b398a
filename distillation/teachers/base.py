"""What a teacher is to the trainer: something that says, for every token of a completion, how it would go on.

A teacher is a dataclass: its fields are the keys of the recipe's `teacher: {name: …}`. The trainer attaches it when
its own model stands, lets it read every micro-batch before the student does, and has it score the student's hidden
states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fdiv.errors import OptionError
from fdiv.named import bind_arguments, split_spec
from fdiv.training.config import Options

if TYPE_CHECKING:
    from fdiv.distillation.f_distill.config import FDistillConfig
    from fdiv.models.vocabulary import Head, VocabularyScores

__all__ = ["Encoded", "Teacher", "build_teacher", "given_tokens", "teacher_inputs"]


class Encoded(NamedTuple):
    """A row as the teacher reads it: token ids of its prompt and of its completion, the latter cut as in training."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]


@dataclass
class Teacher(Options):
    """The base of all teachers; a teacher of your own derives from it and is named `module:attribute`.

    Attributes:
        title: what it is, for messages. own_weights: it is made of the student's weights, so that it needs a prompt of
            its own. given_only: it knows the rows' completions alone, and none that the student samples.
        in_memory: `read` gives hidden states and a head (`HiddenStates`), of which any distribution can be made.
        shared: how many tokens, from id 0 on, both speak of; None: all of the student's head.
    """

    title: ClassVar[str] = "a teacher"
    own_weights: ClassVar[bool] = False
    given_only: ClassVar[bool] = False
    in_memory: ClassVar[bool] = False
    shared: ClassVar[int | None] = None

    def check(self, args: FDistillConfig) -> None:
        """Refuse keys of the config that do not go with this teacher; before anything is loaded.

        Raises:
            OptionError: names the key.
        """
        if self.given_only and args.on_policy_share > 0:
            raise OptionError(
                f"on_policy_share={args.on_policy_share:g}: {self.title} knows the completions of the rows alone: set "
                "on_policy_share: 0, or take a teacher that can be asked (local, server)",
                key="on_policy_share",
            )

    def copies(self, peft: bool) -> int | None:
        """Models of the student's size that it holds in memory; None: a model whose size is not known."""
        return 0

    def attach(self, trainer: Any, model: Any) -> None:
        """Get ready, compare vocabularies; `model` is the `teacher_model` of the trainer, or its name, or None."""
        raise NotImplementedError

    def check_rows(self, rows: Sequence[Encoded], name: str) -> None:
        """Refuse rows of a data path that the teacher does not know."""

    def read(self, inputs: dict[str, Tensor], mask: Tensor) -> Any:
        """What the teacher says of the tokens at `mask[B, C]`, for `score`; without gradient, on every process."""
        raise NotImplementedError

    def score(self, said: Any, hidden: Tensor, head: Head, token_ids: Tensor, uniform: bool) -> VocabularyScores:
        """The student against it. `hidden[N, H]`: of the student at the same tokens, inside its wrapper's forward."""
        raise NotImplementedError

    def identity(self) -> Any:
        """What a resumed run must share with the one before (a JSON value)."""
        raise NotImplementedError

    def settings(self) -> Any:
        """What errors, the model card and checkpoints say of it (a JSON value)."""
        return self.title

    def after_step(self) -> None:
        """Called after every optimizer step, on every process."""

    def save(self, folder: Path) -> None:
        """Write what a checkpoint has to hold. Called on every process."""

    def load(self, folder: Path) -> None:
        """Read it back."""


def build_teacher(spec: Any) -> Teacher:
    """The teacher of a spec: a name, or a mapping `{name: …, key: value}`.

    Raises:
        OptionError: an unknown name, an unknown or missing key, a value out of bounds.
    """
    from fdiv.catalog import TEACHERS

    try:
        name, keys = split_spec(spec, "teacher")
        kind = TEACHERS.find(name, what="teacher")
        bind_arguments(kind, keys, f"teacher {name!r}")
        return kind(**keys)
    except ValueError as error:
        said = str(error)
        raise OptionError(said if said.startswith("teacher") else f"teacher: {said}", key="teacher") from error


def teacher_inputs(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """Token ids and attention mask `[B, P + C]` that the teacher reads, and C; its own prompt, or the student's."""
    prompt = "teacher_prompt" if "teacher_prompt_ids" in inputs else "prompt"
    ids = torch.cat([inputs[f"{prompt}_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs[f"{prompt}_mask"], inputs["completion_mask"]], dim=1)
    return ids, attention_mask, inputs["completion_ids"].size(1)


def given_tokens(inputs: dict[str, Tensor]) -> list[Encoded]:
    """The rows of a micro-batch without padding."""
    prompt = "teacher_prompt" if "teacher_prompt_ids" in inputs else "prompt"
    rows = []
    for ids, mask, answer, length in zip(
        inputs[f"{prompt}_ids"].cpu(),
        inputs[f"{prompt}_mask"].cpu().bool(),
        inputs["completion_ids"].cpu(),
        inputs["completion_mask"].sum(-1).tolist(),
        strict=True,
    ):
        rows.append(Encoded(ids[mask].tolist(), answer[:length].tolist()))
    return rows
