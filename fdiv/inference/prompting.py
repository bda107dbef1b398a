"""How questions become prompts, and what text a completion is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fdiv.errors import DataError
from fdiv.filling import check_template, fill
from fdiv.inference.encoding import EncodedText, Encoding, Text, encoding_stamp, shared_length, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHAT_TEMPLATE", "EncodedText", "PromptFormat", "completion_text"]

CHAT_TEMPLATE = ("auto", "always", "never")
"""When the tokenizer's chat template is used."""

_ANY_ANSWER = "A"


@dataclass(frozen=True)
class PromptFormat:
    """How questions become prompts.

    Args:
        chat_template: `auto` uses the tokenizer's chat template where it has one, `never` uses the plain format,
            `always` refuses a tokenizer without one.
        question_format: plain format of the prompt; `{question}` is filled in (see `fdiv.filling`).
        answer_format: plain format of the answer that follows it; `{answer}` is filled in.
        example_separator: plain format: what stands between few-shot examples and the next question.
        system_prompt, date_string, chat_template_kwargs, end_token: see `fdiv.inference.encoding.Encoding`.

    Raises:
        DataError: a format without its hole, a value that a key does not have, `chat_template: never` with a system
            prompt.
    """

    chat_template: Literal["auto", "always", "never"] = "auto"
    question_format: str = "Question: {question}\nAnswer:"
    answer_format: str = " {answer}"
    example_separator: str = "\n\n"
    system_prompt: str | None = None
    date_string: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    end_token: Literal["turn", "appended"] = "turn"

    def __post_init__(self) -> None:
        if self.chat_template not in CHAT_TEMPLATE:
            raise DataError(f"chat_template={self.chat_template!r}: choose {', '.join(CHAT_TEMPLATE)}")
        for name in ("question", "answer"):
            check_template(getattr(self, f"{name}_format"), (name,), needs=(name,), what=f"{name}_format")
        if self.chat_template == "never" and self.system_prompt is not None:
            raise DataError(
                f"system_prompt={self.system_prompt!r:.60} belongs to a chat template: drop it, or `never`"
            )
        _ = self.encoding

    @property
    def encoding(self) -> Encoding:
        """How the rows these formats make are encoded."""
        return Encoding(self.system_prompt, self.date_string, self.chat_template_kwargs, self.end_token)

    def uses_chat(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether questions go through the tokenizer's chat template.

        Raises:
            DataError: `chat_template: always`, and there is none.
        """
        has_template = bool(tokenizer.chat_template)
        if self.chat_template == "always" and not has_template:
            raise DataError("chat_template: always, but the tokenizer has no chat template; use auto or never")
        return has_template and self.chat_template != "never"

    def stamp(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """`encoding_stamp` of questions under these formats."""
        plain = {name: getattr(self, name) for name in ("question_format", "answer_format", "example_separator")}
        return encoding_stamp(tokenizer, self.encoding, chat=self.uses_chat(tokenizer), **plain)

    def row(
        self,
        tokenizer: PreTrainedTokenizerBase,
        question: str,
        answer: str,
        examples: Sequence[tuple[str, str]] = (),
    ) -> tuple[Text, Text]:
        """Prompt and answer: two lists of messages through a chat template, else two texts."""
        if not self.uses_chat(tokenizer):
            shots = "".join(self._plain(q) + self._plain_answer(a) + self.example_separator for q, a in examples)
            return shots + self._plain(question), self._plain_answer(answer)
        turns = [turn for q, a in examples for turn in (_turn("user", q), _turn("assistant", a))]
        return [*turns, _turn("user", question)], [_turn("assistant", answer)]

    def _plain(self, question: str) -> str:
        return fill(self.question_format, question=question)

    def _plain_answer(self, answer: str) -> str:
        return fill(self.answer_format, answer=answer)

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        question: str,
        answer: str,
        examples: Sequence[tuple[str, str]] = (),
        **variables: Any,
    ) -> EncodedText:
        """One question with its answer, encoded as in training (see `fdiv.inference.encoding`)."""
        prompt, whole = self.row(tokenizer, question, answer, examples)
        return self._encoding_of(tokenizer).encode(tokenizer, prompt, whole, **variables)

    def encode_prompt(
        self,
        tokenizer: PreTrainedTokenizerBase,
        question: str,
        examples: Sequence[tuple[str, str]] = (),
        answer: str = _ANY_ANSWER,
    ) -> tuple[int, ...]:
        """What the labels of `answer` follow, and a generation to be compared with it goes on from.

        It never holds a token of the answer: a token that spans the border is the first label.
        """
        return self.encode(tokenizer, question, answer, examples).prompt_ids

    def _encoding_of(self, tokenizer: PreTrainedTokenizerBase) -> Encoding:
        """The encoding; a tokenizer without a chat template has no system turn."""
        if self.uses_chat(tokenizer) or self.system_prompt is None:
            return self.encoding
        raise DataError(
            f"system_prompt={self.system_prompt!r:.60} belongs to a chat template, and the tokenizer has none"
        )

    @staticmethod
    def encode_continuation(
        tokenizer: PreTrainedTokenizerBase, prefix: str, text: str, max_length: int, insert_space: bool = False
    ) -> EncodedText:
        """Tokenise running text after a prefix, without an end token; at most `max_length` tokens of text are kept.

        A token that spans the border is a label. With an empty prefix the labels begin at the second token: the first
        has nothing before it to be predicted from.
        """
        prefix_ids = token_ids(tokenizer, prefix)
        ids = token_ids(tokenizer, prefix + (" " if insert_space else "") + text)
        start = shared_length([prefix_ids, ids])
        return EncodedText(tuple(ids[: start + max_length]), max(1, start))


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion, plain or conversational (the contents of its messages, joined by newlines).

    A message without content (a tool call) counts as empty.
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] or "" for message in completion)
