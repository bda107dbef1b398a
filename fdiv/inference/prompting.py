"""From a question and an answer to token ids and the place where the answer begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fdiv.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EncodedText", "PromptFormat", "completion_text"]


@dataclass(frozen=True)
class EncodedText:
    """Token ids of prompt and answer; the labels are `input_ids[prompt_length:]`."""

    input_ids: tuple[int, ...]
    prompt_length: int

    @property
    def label_count(self) -> int:
        """Number of labels; 0 where the tokenised prompt is as long as the whole."""
        return max(0, len(self.input_ids) - self.prompt_length)


@dataclass(frozen=True)
class PromptFormat:
    """How questions become prompts.

    Args:
        chat_template: `auto` uses the tokenizer's chat template where it has one, `never` uses the plain format,
            `always` refuses a tokenizer without one.
        question_format: plain format of the prompt; `{question}` is replaced.
        answer_format: plain format of the answer that follows it; `{answer}` is replaced.
        example_separator: plain format: what stands between few-shot examples and the next question.
        system_prompt: a system turn of the chat, or None.
        date_string: passed to chat templates that print a date (Llama 3), so that results do not depend on today.
    """

    chat_template: Literal["auto", "always", "never"] = "auto"
    question_format: str = "Question: {question}\nAnswer:"
    answer_format: str = " {answer}"
    example_separator: str = "\n\n"
    system_prompt: str | None = None
    date_string: str | None = None

    def __post_init__(self):
        if self.chat_template not in ("auto", "always", "never"):
            raise DataError(f"chat_template={self.chat_template!r}: choose auto, always or never")
        for name, hole in (("question_format", "{question}"), ("answer_format", "{answer}")):
            if hole not in getattr(self, name):
                raise DataError(f"{name}={getattr(self, name)!r} does not contain {hole}")

    def _uses_chat(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        has_template = bool(tokenizer.chat_template)
        if self.chat_template == "always" and not has_template:
            raise DataError("chat_template: always, but the tokenizer has no chat template; use auto or never")
        return has_template and self.chat_template != "never"

    def texts(
        self,
        tokenizer: PreTrainedTokenizerBase,
        question: str,
        answer: str,
        examples: Sequence[tuple[str, str]] = (),
    ) -> tuple[str, str, bool]:
        """(prompt text, prompt + answer text, whether special tokens are still to be added by the tokenizer)."""
        if not self._uses_chat(tokenizer):
            shots = "".join(self._plain(q) + self._plain_answer(a) + self.example_separator for q, a in examples)
            prompt = shots + self._plain(question)
            return prompt, prompt + self._plain_answer(answer), True
        turns = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        for q, a in examples:
            turns += [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        turns.append({"role": "user", "content": question})
        date = {"date_string": self.date_string} if self.date_string else {}
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **date)
        turns.append({"role": "assistant", "content": answer})
        return prompt, tokenizer.apply_chat_template(turns, tokenize=False, **date), False

    def _plain(self, question: str) -> str:
        return self.question_format.replace("{question}", question)

    def _plain_answer(self, answer: str) -> str:
        return self.answer_format.replace("{answer}", answer)

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        question: str,
        answer: str,
        examples: Sequence[tuple[str, str]] = (),
    ) -> EncodedText:
        """Tokenise one question with its answer; the end-of-text token closes the answer and counts as a label.

        As in open-unlearning, prompt and whole text are tokenised separately and the answer begins at the prompt's
        length.
        """
        prompt, whole, special = self.texts(tokenizer, question, answer, examples)
        prompt_ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
        ids = tokenizer(whole, add_special_tokens=special)["input_ids"]
        if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, tokenizer.eos_token_id]
        return EncodedText(tuple(ids), len(prompt_ids))

    def encode_prompt(
        self, tokenizer: PreTrainedTokenizerBase, question: str, examples: Sequence[tuple[str, str]] = ()
    ) -> tuple[int, ...]:
        """Token ids of the prompt alone, to generate from.

        Never the head of `encode`'s ids: where prompt and answer share a token across their border (a prompt that
        ends in a space, say), that head would give the answer's first token away.
        """
        prompt, _, special = self.texts(tokenizer, question, "", examples)
        return tuple(tokenizer(prompt, add_special_tokens=special)["input_ids"])

    @staticmethod
    def encode_continuation(
        tokenizer: PreTrainedTokenizerBase, prefix: str, text: str, max_length: int, insert_space: bool = False
    ) -> EncodedText:
        """Tokenise running text after a prefix, without an end token; at most `max_length` tokens of text are kept.

        With an empty prefix the labels begin at the second token: the first has nothing before it to be predicted
        from.
        """
        prefix_ids = tokenizer(prefix)["input_ids"]
        ids = tokenizer(prefix + (" " if insert_space else "") + text)["input_ids"][: len(prefix_ids) + max_length]
        return EncodedText(tuple(ids), max(1, len(prefix_ids)))


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion, plain or conversational (the contents of its messages, joined by newlines).

    A message without content (a tool call) counts as empty.
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] or "" for message in completion)
