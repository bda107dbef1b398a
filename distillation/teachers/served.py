"""A teacher behind a vLLM server: it is asked over HTTP for the top k at every token, of any completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fdiv.distillation.cache import Said
from fdiv.distillation.teachers.base import Teacher, given_tokens
from fdiv.distillation.teachers.top import check_is_f, check_student_tokens, score_said
from fdiv.distillation.teachers.vocabularies import teacher_tokenizer
from fdiv.errors import DataError, OptionError, RolloutError
from fdiv.inference.prompt_log_probs import PromptLogProbs, ServedTokens
from fdiv.models.vocabulary import Head, TopK, VocabularyScores, check_head
from fdiv.training.config import option
from fdiv.training.finite import what_stands

__all__ = ["ServedTeacher", "joined", "served_vocabulary"]


@dataclass
class ServedTeacher(Teacher):
    """`teacher: {name: server, url: http://host:port}`: a stock vLLM server, which may be anywhere and of any size.

    Start it with `--max-logprobs K` for a k above 20. The divergence over the top k and one cell for the rest is a
    lower bound of the whole one for every f. The temperature is 1, for a server gives no other.

    Args:
        url: of the server. model: path or name of the teacher there; not set: `teacher_model_name_or_path`, else the
            one it serves. k: most likely tokens. tokenizer: path or hub name of the teacher's, to compare; not set:
            that of the model's name. timeout: seconds for one answer. retries: see `PromptLogProbs`.
    """

    title: ClassVar[str] = "a vLLM server"

    url: str = option("", "http(s)://host:port of the vLLM server")
    model: str | None = option(None, "Path or name of the teacher there; not set: teacher_model_name_or_path")
    k: int = option(20, "Most likely tokens of each distribution", least=1)
    tokenizer: str | None = option(None, "Path or hub name of the teacher's tokenizer, to compare")
    timeout: float = option(600.0, "Seconds to wait for one answer", above=0)
    retries: int = option(4, "How often a request without an answer is made again", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"teacher.url={self.url!r}: it must start with http:// or https://")

    def check(self, args: Any) -> None:
        """An f, and the temperature of the server."""
        super().check(args)
        check_is_f(args, self.title)
        if args.temperature != 1.0:
            raise OptionError(
                f"temperature={args.temperature:g}: a vLLM server gives the log-probabilities of a prompt at "
                "temperature 1, and the top k at another cannot be made of them: set temperature: 1.0, or `fdiv "
                "teach` with the model in memory",
                key="temperature",
            )

    def attach(self, trainer: Any, model: Any) -> None:
        """Find the teacher there, and compare tokens."""
        if model is not None and not isinstance(model, str):
            raise DataError("teacher_model is a model in memory, and the teacher is a server: leave one of them out")
        check_head(trainer.model)
        self.asked = PromptLogProbs(
            self.url, self.model or model, self.k, setting="teacher.url", timeout=self.timeout, retries=self.retries
        )
        name = f"the teacher {self.asked.served} at {self.url}"
        tokenizer = self.tokenizer or model or self.asked.root
        self.vocabulary = served_vocabulary(tokenizer, name, "teacher.tokenizer")
        if self.k > self.vocabulary:
            raise DataError(f"teacher.k={self.k}: {name} has {self.vocabulary} tokens")
        self.shared = check_student_tokens(trainer, tokenizer, None, self.vocabulary, name)
        self.trainer = trainer
        trainer.note("teacher", [f"top {self.k} of every token from {self.url}: a lower bound of the divergence"])

    def identity(self) -> Any:
        """What the server says it serves, and k."""
        return [self.asked.root, f"top {self.k}"]

    def settings(self) -> Any:
        """The same, to read."""
        return f"{self.asked.root}, top {self.k} of each token, from {self.url}"

    def read(self, inputs: dict[str, Tensor], mask: Tensor) -> Said:
        """What the server says of the tokens."""
        rows = [row for row in given_tokens(inputs) if row.completion_ids]
        try:
            return joined(self.asked.ask(rows, self.vocabulary), self.k)
        except RolloutError as error:
            raise RolloutError(f"{error}. {what_stands(self.trainer)}") from error

    def score(self, said: Said, hidden: Tensor, head: Head, token_ids: Tensor, uniform: bool) -> VocabularyScores:
        """Over the cells."""
        return score_said(self.trainer, said, hidden, head, token_ids, uniform)


def joined(rows: Sequence[ServedTokens], k: int) -> Said:
    """The tokens of all rows."""
    if not rows:
        none = torch.zeros(0)
        return Said(TopK(none.reshape(0, k), none.long().reshape(0, k), none), none, None)
    ids, log_probs, log_tail, own = (torch.cat(column) for column in zip(*rows, strict=True))
    return Said(TopK(log_probs, ids, log_tail), own, None)


def served_vocabulary(tokenizer: str, name: str, key: str) -> int:
    """How many tokens the teacher's tokenizer has.

    Raises:
        DataError: there is no tokenizer to read.
    """
    found = teacher_tokenizer(tokenizer)
    if found is None:
        raise DataError(
            f"{name}: no tokenizer can be read from {tokenizer!r}, so that its tokens cannot be compared with the "
            f"student's: set {key} to the path or hub name of its tokenizer"
        )
    return max(found.get_vocab().values()) + 1
