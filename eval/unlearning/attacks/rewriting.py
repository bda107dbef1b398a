"""Questions reworded or translated by a model that is named for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fdiv.errors import DataError
from fdiv.eval.unlearning.attacks.attacked import Attacked, Row
from fdiv.eval.unlearning.attacks.rows import asked, prompt_rows, with_asked
from fdiv.filling import check_template, fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Translation", "reworded"]

REWORD = "Rewrite this question in other words, with the same meaning. Give the question alone.\n{question}"
TRANSLATE = "Translate this question into {language}. Give the translation alone.\n{question}"


def reworded(model: str, questions: Sequence[str], instruction: str = REWORD, max_new_tokens: int = 128) -> list[str]:
    """What `model` makes of each question under `instruction`, greedily; the question itself where it says nothing.

    Args:
        model: path or hub name of an instruction-tuned model. questions: texts. instruction: with `{question}`.
        max_new_tokens: bound on an answer.

    Raises:
        DataError: the model cannot be loaded.
    """
    from fdiv.inference.greedy import GenerationRequest, generate_texts
    from fdiv.inference.prompting import PromptFormat
    from fdiv.models.loading import load_model, load_tokenizer

    tokenizer, prompt = load_tokenizer(model), PromptFormat(question_format="{question}\n")
    requests = [
        GenerationRequest(str(n), prompt.encode_prompt(tokenizer, fill(instruction, question=q)), max_new_tokens)
        for n, q in enumerate(questions)
    ]
    records = generate_texts(load_model(model), tokenizer, requests, title="rewording", progress=False)
    lines = [records[str(n)]["generation"].strip().split("\n")[0] for n in range(len(questions))]
    return [line or question for line, question in zip(lines, questions, strict=True)]


@dataclass(frozen=True)
class Translation:
    """The questions in another language; the answers stay, so read the probability of the true answer with care.

    Args:
        model: path or hub name of the model that translates. language: into which.
        instruction: with `{question}` and, where wanted, `{language}`.
    """

    model: str
    language: str = "French"
    instruction: str = TRANSLATE

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise DataError("model: name the model that translates")
        check_template(self.instruction, ("question", "language"), needs=("question",), what="instruction")

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, seed: int
    ) -> Attacked:
        """The model with the translated rows. `seed` has no influence: it is translated greedily."""
        rows = prompt_rows(rows)
        # `{question}` is filled in by `reworded`.
        instruction = fill(self.instruction, language=self.language, question="{question}")
        texts = reworded(self.model, [asked(row) for row in rows], instruction)
        found = [with_asked(row, text) for row, text in zip(rows, texts, strict=True)]
        return Attacked(model, found, notes=(f"translated into {self.language} by {self.model}",))
