"""A teacher on disk: what `fdiv teach` wrote of the rows' completions. No weights of it are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fdiv.distillation.cache import TOKENIZER, Said, TeacherCache, settings_digest
from fdiv.distillation.teachers.base import Encoded, Teacher, given_tokens
from fdiv.distillation.teachers.top import check_is_f, check_student_tokens, score_said, share_note
from fdiv.errors import DataError
from fdiv.inference.processes import process_state
from fdiv.models.vocabulary import Head, VocabularyScores, check_head
from fdiv.training.config import option

__all__ = ["CachedTeacher"]


@dataclass
class CachedTeacher(Teacher):
    """`teacher: {name: cache, path: DIR}`: the top k of every token, and one cell for all others.

    The divergence over these cells is a lower bound of the whole one for every f. `teacher_model_name_or_path` may
    still name the teacher for the evaluation; it is not loaded for training.

    Args:
        path: the folder that `fdiv teach` wrote.
        k: use that many of the tokens it holds; the others join the rest. Not set: all.
    """

    title: ClassVar[str] = "a cache"
    given_only: ClassVar[bool] = True

    path: str = option("", "Folder that `fdiv teach` wrote")
    k: int | None = option(None, "Tokens of each distribution that are used; not set: all that it holds", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError("teacher.path is not set: name the folder that `fdiv teach` wrote")

    def check(self, args: Any) -> None:
        """Given completions, and an f."""
        super().check(args)
        check_is_f(args, self.title)

    def attach(self, trainer: Any, model: Any) -> None:
        """Open the files, and compare temperature and tokens."""
        if model is not None and not isinstance(model, str):
            raise DataError("teacher_model is a model in memory, and the teacher is a cache: leave one of them out")
        check_head(trainer.model)
        self.cache = TeacherCache(self.path, check=process_state().is_main_process)
        made = self.cache.settings
        if float(trainer.args.temperature) != made["temperature"]:
            raise DataError(
                f"{self.cache.name} was made at temperature {made['temperature']:g}, the training temperature is "
                f"{trainer.args.temperature:g}: set temperature: {made['temperature']:g}, or run `fdiv teach` again"
            )
        if self.k is not None and self.k > self.cache.k:
            raise DataError(f"teacher.k={self.k}: {self.cache.name} holds {self.cache.k} tokens of each distribution")
        self.shared = check_student_tokens(
            trainer, str(self.cache.path / TOKENIZER), made["tokenizer"], made["vocabulary"], self.cache.name
        )
        self.trainer, self.used = trainer, self.cache.k if self.k is None else self.k
        trainer.note("teacher", share_note(self.cache.taught.get("share"), trainer.divergence, self.used))

    def check_rows(self, rows: Sequence[Encoded], name: str) -> None:
        """Every row must be there."""
        missing = [number for number, row in enumerate(rows) if row not in self.cache]
        if not missing:
            return
        made, room = self.cache.settings, self.trainer.args.max_completion_length
        raise DataError(
            f"{name}: {len(missing)} of {len(rows)} rows are not in {self.cache.name}, the first is row {missing[0]}; "
            f"it was made of {made['dataset']} ({', '.join(made['splits'])}; {len(self.cache)} rows, completions cut "
            f"at max_completion_length={made['max_completion_length']}, here {room}): train on those rows with that "
            "bound, or run `fdiv teach` on these"
        )

    def identity(self) -> Any:
        """The teacher's weights, and how much of it is known."""
        return [self.cache.settings["weights"], settings_digest(self.cache.settings), self.used]

    def settings(self) -> Any:
        """Whose cache it is."""
        return f"{self.cache.settings['model']}, top {self.used} of each token ({self.cache.path})"

    def read(self, inputs: dict[str, Tensor], mask: Tensor) -> Said:
        """The cells of the tokens."""
        return self.cache.read([row for row in given_tokens(inputs) if row.completion_ids], self.used)

    def score(self, said: Said, hidden: Tensor, head: Head, token_ids: Tensor, uniform: bool) -> VocabularyScores:
        """Over the cells."""
        return score_said(self.trainer, said, hidden, head, token_ids, uniform)
