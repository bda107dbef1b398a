r"""One row, one encoding: a prompt and an answer as token ids, where the labels begin and where they end.

Training, evaluation, pre-sampling and rollouts all encode through `Encoding`, so that what is trained is what is
scored, and a generation goes on from where the labels begin:

* **Plain text.** Prompt and answer are tokenised together, closed by the end-of-sequence token. The labels begin
  where the tokens of the prompt alone and those of the whole part: a token that holds the end of the prompt and the
  beginning of the answer (a prompt that ends in a space) is a label.
* **Messages.** The finished conversation as the chat template renders it, its own end of turn included and nothing
  after it. What the template writes before any answer, for instance an empty `<think>\n\n</think>\n\n` (Qwen3),
  belongs to the prompt; what the generation prompt alone holds, such as an opened `<think>` (R1 distils), is left out.
  These are the labels of TRL's `SFTTrainer`, without that block.

`context="generation"` (D²O) is for answers compared with samples: the prompt is the generation prompt, whatever it
opens, and the answer follows it. No input depends on the clock: see `date_string`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fdiv.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DATE_STRING",
    "ENCODING_HELP",
    "END_TOKENS",
    "EncodedText",
    "Encoding",
    "Text",
    "add_encoding",
    "encoding_stamp",
    "shared_length",
    "template_without_clock",
    "token_ids",
]

DATE_STRING = "26 Jul 2024"
"""The date of templates that would ask the clock, unless `date_string` is set: the one Llama 3's template falls back
to."""

END_TOKENS = ("turn", "appended")
"""`turn`: a turn ends as the template ends it, as in our trainers and in TRL's `SFTTrainer`. `appended`: an
end-of-sequence token follows where the text does not end in one, as open-unlearning trains and scores it."""

ENCODING_HELP = {
    "system_prompt": "System turn before conversations that have none; an empty text is an empty turn",
    "date_string": f"Date in chat templates that print one; not set: the template's own, {DATE_STRING} where it asks "
    "the clock",
    "chat_template_kwargs": "Further variables of the chat template, for instance {enable_thinking: false}",
    "end_token": "`turn`: a turn ends as the chat template ends it; `appended`: an end-of-sequence token follows "
    "where it does not end in one (open-unlearning's way of training and scoring)",
}
"""The keys that training, evaluation, pre-sampling and rollouts share, with their help."""

Messages = Sequence[Mapping[str, Any]]
Text = str | Messages

_DATE_FORMATS = ("%d %b %Y", "%d %B %Y", "%Y-%m-%d", "%B %d, %Y", "%b %d, %Y", "%d/%m/%Y")
_DIRECTIVES = ("-d", "-m", "-j", "-I", "-H", "-M", "-S", *"aAwdbBmyYHIpMSfjUWcxX")
_MARK = "«the answer begins here»"


@dataclass(frozen=True)
class EncodedText:
    """Token ids of prompt and answer; the labels are `input_ids[prompt_length:]`."""

    input_ids: tuple[int, ...]
    prompt_length: int

    @property
    def label_count(self) -> int:
        """Number of labels; 0 where the tokenised prompt is as long as the whole."""
        return max(0, len(self.input_ids) - self.prompt_length)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """What the labels follow, and a generation goes on from."""
        return self.input_ids[: self.prompt_length]

    @property
    def label_ids(self) -> tuple[int, ...]:
        """The answer with its end."""
        return self.input_ids[self.prompt_length :]


class _Parts(NamedTuple):
    """A row as text: `whole` begins with `head`, and the answer is the rest. `special`: the tokenizer still adds its
    special tokens."""

    head: str
    whole: str
    special: bool


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens: the keys that training, evaluation, pre-sampling and rollouts have in common.

    Args:
        system_prompt: a system turn before conversations that have none of their own; None for none, "" for an empty
            one. Plain text has no turns: it is refused there.
        date_string: the date that chat templates print (Llama 3). None: the template's own, and `DATE_STRING` where it
            would ask the clock.
        chat_template_kwargs: further variables of the chat template, for instance `{"enable_thinking": False}`. A
            `date_string` in it wins.
        end_token: see `END_TOKENS`.
        context: `answer`: the labels follow what the template writes before an answer; `generation`: they follow the
            generation prompt.

    Raises:
        DataError: a value that `end_token` or `context` does not have.
    """

    system_prompt: str | None = None
    date_string: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    end_token: Literal["turn", "appended"] = "turn"
    context: Literal["answer", "generation"] = "answer"

    def __post_init__(self) -> None:
        if self.end_token not in END_TOKENS:
            raise DataError(f"end_token={self.end_token!r}: choose {' or '.join(END_TOKENS)}")
        if self.context not in ("answer", "generation"):
            raise DataError(f"context={self.context!r}: choose answer or generation")

    # ---------------------------------------------------------------- rendering
    def turns(self, messages: Text) -> list[Mapping[str, Any]]:
        """`messages` with the system turn before them, unless they begin with one.

        Raises:
            DataError: a system prompt, and text.
        """
        if isinstance(messages, str):
            self._check_text()
        if self.system_prompt is None or (messages and messages[0].get("role") == "system"):
            return list(messages)
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def template_variables(self) -> dict[str, Any]:
        """What is passed to the chat template: `date_string` where it is set, and `chat_template_kwargs`."""
        date = {} if self.date_string is None else {"date_string": self.date_string}
        return date | dict(self.chat_template_kwargs or {})

    def template(self, tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> str:
        """The tokenizer's chat template, its clock stopped (see `template_without_clock`).

        Raises:
            DataError: it has none.
        """
        if not tokenizer.chat_template:
            raise DataError(
                "the rows are messages, and the tokenizer has no chat template: give texts, or a prompt_format "
                "(question_format) for questions"
            )
        date = self.template_variables().get("date_string")
        return template_without_clock(tokenizer.get_chat_template(tools=tools), date)

    def render(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation; `variables` of the row win over `chat_template_kwargs`.

        Raises:
            DataError: no chat template, or one that refuses the conversation.
        """
        from jinja2 import TemplateError

        template = self.template(tokenizer, variables.get("tools"))
        try:
            return tokenizer.apply_chat_template(
                self.turns(messages),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(self.template_variables() | variables),
            )
        except TemplateError as error:
            roles = [message.get("role") for message in self.turns(messages)]
            raise DataError(f"the chat template refuses a conversation with the roles {roles}: {error}") from error

    # ---------------------------------------------------------------- encoding
    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: Text, answer: Text, **variables: Any) -> EncodedText:
        """One row: see the module. Prompt and answer are both text or both messages.

        Raises:
            DataError: see `render`; a system prompt, and text.
        """
        prompt_ids, (answer_ids,) = self.encode_answers(tokenizer, prompt, [answer], **variables)
        return EncodedText((*prompt_ids, *answer_ids), len(prompt_ids))

    def encode_answers(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Text, answers: Sequence[Text], **variables: Any
    ) -> tuple[list[int], list[list[int]]]:
        """Several answers to one prompt, in one context: the prompt's ids, and those of each answer with its end.

        Where the answers' borders differ, the prompt ends at the first of them.
        """
        parts = self._parts(tokenizer, prompt, answers, variables)
        if self.context == "generation":
            ids = self.encode_prompt(tokenizer, prompt, **variables)
            text = self._generation_text(tokenizer, prompt, variables)
            labels = [_following(tokenizer, text, ids, part) for part in parts]
            return ids, [self._ended(tokenizer, answer_ids) for answer_ids in labels]
        rows = [_split(tokenizer, part) for part in parts]
        start = shared_length([row.prompt_ids for row in rows])
        return list(rows[0].input_ids[:start]), [self._ended(tokenizer, row.input_ids[start:]) for row in rows]

    def encode_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: Text, **variables: Any) -> list[int]:
        """What a model sees that is asked `prompt`: the text, or the messages with the generation prompt.

        Rollouts, pre-sampling and Pass@k, which know no answer, begin here.

        Raises:
            DataError: see `encode`.
        """
        return token_ids(tokenizer, self._generation_text(tokenizer, prompt, variables), isinstance(prompt, str))

    def _generation_text(self, tokenizer: Any, prompt: Text, variables: Mapping[str, Any]) -> str:
        if isinstance(prompt, str):
            self._check_text()
            return prompt
        return self.render(tokenizer, prompt, add_generation_prompt=True, **variables)

    def _parts(
        self, tokenizer: Any, prompt: Text, answers: Sequence[Text], variables: Mapping[str, Any]
    ) -> list[_Parts]:
        """The rows as text, each cut where its answer begins."""
        for answer in answers:
            if isinstance(prompt, str) != isinstance(answer, str):
                raise DataError(
                    f"prompt {prompt!r:.60}, answer {answer!r:.60}: give two texts, or two lists of messages"
                )
        if isinstance(prompt, str):
            self._check_text()
            end = tokenizer.eos_token or ""
            texts = [str(answer).removesuffix(end) if end else str(answer) for answer in answers]
            return [_Parts(prompt, prompt + text + end, special=True) for text in texts]
        opened = self.render(tokenizer, prompt, add_generation_prompt=True, **variables)
        roles = dict.fromkeys(_role(answer) for answer in answers)
        headers = {role: self._header(tokenizer, prompt, opened, role, variables) for role in roles}
        parts = []
        for answer in answers:
            head, whole = headers[_role(answer)], self.render(tokenizer, [*prompt, *answer], **variables)
            if not whole.startswith(head):
                # It changes what the template writes before it: an answer with thoughts, which are part of it.
                head = whole[: shared_length([opened, whole])]
            parts.append(_Parts(head, whole, special=False))
        return parts

    def _header(self, tokenizer: Any, prompt: Messages, opened: str, role: str, variables: Mapping[str, Any]) -> str:
        """What the template writes before an answer, whatever the answer says; `opened` is the generation prompt."""
        rendered = self.render(tokenizer, [*prompt, {"role": role, "content": _MARK}], **variables)
        header = rendered[: rendered.rfind(_MARK)] if _MARK in rendered else rendered
        # A space before every answer is one with its first word.
        return opened if header.startswith(opened) and not header[len(opened) :].strip() else header

    def _check_text(self) -> None:
        if self.system_prompt is not None:
            raise DataError(
                f"system_prompt={self.system_prompt!r:.60} belongs to conversations, and a row is plain text: leave "
                "it out, or give prompts as lists of messages"
            )

    def _ended(self, tokenizer: Any, ids: Sequence[int]) -> list[int]:
        """`ids` under the rule of `end_token`."""
        end = tokenizer.eos_token_id
        appended = self.end_token == "appended" and end is not None and tuple(ids[-1:]) != (end,)
        return [*ids, end] if appended else list(ids)


def _role(answer: Text) -> str:
    return "" if isinstance(answer, str) or not answer else answer[0].get("role", "assistant")


# ------------------------------------------------------------------------------------------------------- tokenising


def token_ids(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Token ids, with the tokenizer's special tokens where `special`; an end-of-sequence token that it would write by
    itself is left out."""
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    end, name = tokenizer.eos_token_id, tokenizer.eos_token
    if special and end is not None and ids[-1:] == [end]:
        stated = 1 if text.endswith(name) else 0
        if ids[-1 - stated :] == [end] * (1 + stated) and not text.endswith(name * (1 + stated)):
            return ids[:-1]
    return ids


def shared_length(rows: Sequence[Sequence[Any]]) -> int:
    """How many tokens (or characters) all `rows` begin with."""
    return next((i for i, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), min(map(len, rows)))


def _split(tokenizer: Any, part: _Parts) -> EncodedText:
    """The whole tokenised at once; the labels begin where the tokens of the head alone differ from it."""
    ids = token_ids(tokenizer, part.whole, part.special)
    return EncodedText(tuple(ids), shared_length([token_ids(tokenizer, part.head, part.special), ids]))


def _following(tokenizer: Any, text: str, prompt_ids: Sequence[int], part: _Parts) -> list[int]:
    """The answer's ids after `prompt_ids`, the tokens of `text`: as in one piece with it where no token spans the
    border, else tokenised by itself."""
    answer = part.whole[len(part.head) :]
    ids = token_ids(tokenizer, text + answer, part.special)
    if ids[: len(prompt_ids)] == list(prompt_ids):
        return ids[len(prompt_ids) :]
    # After a newline, a tokenizer that writes a space before a text (SentencePiece) leaves it out.
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids = tokenizer("\n" + answer, add_special_tokens=False)["input_ids"]
    alone = ids[: len(newline)] == newline
    return list(ids[len(newline) :]) if alone else list(tokenizer(answer, add_special_tokens=False)["input_ids"])


# --------------------------------------------------------------------------------------------------------- the clock


def template_without_clock(template: str, date_string: str | None = None) -> str:
    """`template` with `strftime_now` bound to a fixed day; unchanged where it does not ask for the time.

    Args:
        template: a Jinja chat template.
        date_string: the day, in a usual form (`26 Jul 2024`, `2024-07-26`); a text that is no date is printed whatever
            form the template asks for. None: `DATE_STRING`.
    """
    if "strftime_now" not in template:
        return template
    date = DATE_STRING if date_string is None else date_string
    day = _day(date)
    if day is None:
        said = f"{{{{ {_quoted(date)} }}}}"
    else:
        codes = "".join(f" | replace('%{code}', {_quoted(day.strftime('%' + code))})" for code in _DIRECTIVES)
        said = f"{{{{ format{codes} }}}}"
    # The newline after a block tag is left out, and the template begins a line as before.
    return f"{{% macro strftime_now(format) %}}{said}{{% endmacro %}}\n{template}"


def _day(text: str) -> datetime | None:
    for form in _DATE_FORMATS:
        try:
            return datetime.strptime(text.strip(), form)
        except ValueError:
            continue
    return None


def _quoted(text: str) -> str:
    """`text` as a Jinja string."""
    return json.dumps(text)


# --------------------------------------------------------------------------------------------------------- the stamp


def encoding_stamp(
    tokenizer: PreTrainedTokenizerBase, encoding: Encoding, *, chat: bool = True, **plain: Any
) -> dict[str, Any]:
    """What the token ids of a row depend on besides its text and the tokenizer's vocabulary, as plain values.

    Two results whose stamps are equal were encoded alike. Only what has an effect is in it: through a chat template
    the digest of the template, system prompt, date and variables; for plain text the formats. A key that one of two
    stamps lacks is a difference, unless that stamp is empty or of an earlier release (it has no `template`).

    Args:
        tokenizer: of the model. encoding: the keys.
        chat: whether rows go through the chat template.
        plain: the formats of plain text, by the name of their key.
    """
    template = tokenizer.chat_template if chat else None
    stamp: dict[str, Any] = {"template": None, "end_token": encoding.end_token}
    if encoding.context != "answer":
        stamp["context"] = encoding.context
    if not template:
        return stamp | plain
    text = json.dumps(template, sort_keys=True)
    variables = encoding.template_variables()
    date = variables.pop("date_string", None)
    if "strftime_now" in text:
        date = date or DATE_STRING
    return stamp | {
        "template": hashlib.sha256(text.encode()).hexdigest()[:16],
        "system_prompt": encoding.system_prompt,
        "date_string": date if "date_string" in text or "strftime_now" in text else None,
        "chat_template_kwargs": variables,
    }


# ------------------------------------------------------------------------------------------------------- the options


def add_encoding(parser: argparse.ArgumentParser | argparse._ArgumentGroup, *, rows: bool = True) -> None:
    """Add the options `--system_prompt`, `--date_string`, `--chat_template_kwargs` and, for rows with answers,
    `--end_token`."""
    parser.add_argument("--system_prompt", metavar="TEXT", help=ENCODING_HELP["system_prompt"])
    parser.add_argument("--date_string", metavar="DATE", help=ENCODING_HELP["date_string"])
    parser.add_argument(
        "--chat_template_kwargs", type=_mapping, metavar="MAPPING", help=ENCODING_HELP["chat_template_kwargs"]
    )
    if rows:
        parser.add_argument("--end_token", choices=END_TOKENS, default="turn", help=ENCODING_HELP["end_token"])


def _mapping(text: str) -> dict[str, Any]:
    from fdiv.recipe.document import parse_value

    value = parse_value(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no mapping: write '{{enable_thinking: false}}'")
    return value
