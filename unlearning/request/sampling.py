"""Retain rows that are not there: the model's own answers, before unlearning, to questions near the forget rows.

Trained on with the NLL they hold the policy where it was: the mean of −log P over samples of the reference Q is
KL(Q‖P) up to a constant. What they cannot hold is what they do not ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.eval.metrics.leakage import Secret, secrets_of
from fdiv.eval.unlearning.attacks.rows import answered, asked, prompt_rows
from fdiv.eval.unlearning.data import Row, passages, read_questions
from fdiv.eval.unlearning.general import GENERAL_QUESTIONS
from fdiv.files import folded
from fdiv.inference.prompting import PromptFormat
from fdiv.inference.sampling import SamplingRequest, sample_completions
from fdiv.models.loading import context_length
from fdiv.rows.report import RowReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fdiv.unlearning.request.builder import OwnRowsConfig

__all__ = ["sampled_rows"]

_ASK = (
    "Write one short question of the same kind as the following one, about something else. Give the question alone.\n"
)
_LONGEST = 300  # characters of a question
_TRIES = 3  # questions asked for, for each that is needed


def sampled_rows(config: OwnRowsConfig, forget: Sequence[Row]) -> list[Row]:
    """`config.sample_retain` rows, or as many as could be made; what became of the questions is said.

    Left out are questions and answers that hold a secret of a forget row, questions of the forget rows themselves, and
    empty answers.

    Raises:
        DataError: the model cannot be loaded, or none is left.
    """
    from fdiv.models.loading import load_model, load_tokenizer

    tokenizer, model = load_tokenizer(config.model, config.adapter), load_model(config.model, config.adapter)
    prompt, rows = config.prompt(), prompt_rows(passages(forget))
    secrets = secrets_of(
        [asked(row) for row in rows], [answered(row) for row in rows], [row.get("secret", ()) for row in rows]
    )
    if config.questions is not None:
        questions = read_questions(config.questions, "neighbouring")
    else:
        questions = [{"question": text} for text in _written(config, model, tokenizer, [asked(row) for row in rows])]
    count = len(questions)
    own = {folded(asked(row)) for row in rows}
    questions = [row for row in questions if folded(_text(row)) not in own and not _held(secrets, _text(row))]
    answers = _sampled(config, model, tokenizer, [_ids(row, tokenizer, prompt) for row in questions], 1)
    found, leaking, empty = [], 0, 0
    for row, answer in zip(questions, answers, strict=True):
        leaks = _held(secrets, answer)
        leaking, empty = leaking + leaks, empty + (not leaks and not answer.strip())
        if not leaks and answer.strip():
            found.append(_row(row, answer.strip()))
    found = found[: config.sample_retain]
    RowReport(
        "sampled retain rows",
        count,
        left_out=count - len(found) - (count - len(questions)) - leaking - empty,
        dropped={
            "their question is a forget row's, or holds a secret": count - len(questions),
            "the answer holds a secret of a forget row": leaking,
            "the answer is empty": empty,
        },
    ).show()
    if not found:
        raise DataError("--sample_retain: none of the model's answers could be used; give retain rows with --retain")
    return found


def _text(row: Row) -> str:
    text = row.get("question", row.get("prompt"))
    return text if isinstance(text, str) else text[-1]["content"]


def _held(secrets: Sequence[Secret], text: str) -> bool:
    """Whether a text holds one of the secrets."""
    return any(secret.held_by(text) for secret in secrets)


def _row(row: Row, answer: str) -> Row:
    if "question" in row:
        return {"question": row["question"], "answer": answer}
    if isinstance(row["prompt"], str):
        return {"prompt": row["prompt"], "completion": f" {answer}"}
    return {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": answer}]}


def _ids(row: Row, tokenizer: PreTrainedTokenizerBase, prompt: PromptFormat) -> tuple[int, ...]:
    if "question" in row:
        return prompt.encode_prompt(tokenizer, row["question"])
    return prompt.encoding.encode(tokenizer, row["prompt"], _row(row, "A").get("completion")).prompt_ids


def _written(
    config: OwnRowsConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]
) -> list[str]:
    """Questions like the forget rows', written by a model with a chat template; then those of general knowledge."""
    prompt = config.prompt()
    written: list[str] = []
    if prompt.uses_chat(tokenizer):
        rounds = -(-config.sample_retain * _TRIES // max(1, len(questions)))
        ids = [prompt.encode_prompt(tokenizer, _ASK + question[:_LONGEST]) for question in questions]
        for text in _sampled(config, model, tokenizer, ids, min(rounds, 8)):
            line = text.strip().split("\n")[0].strip(' "')
            if line.endswith(("?", "？")) and len(line) <= _LONGEST:
                written.append(line)
    unique = list({folded(text): text for text in [*written, *GENERAL_QUESTIONS]}.values())
    # A third of them is of general knowledge, as far as there are any.
    general = min(len(GENERAL_QUESTIONS), max(config.sample_retain // 3, 2 * config.sample_retain - len(unique)))
    near = [text for text in unique if text not in GENERAL_QUESTIONS]
    return [*near[: 2 * config.sample_retain - general], *GENERAL_QUESTIONS[:general]]


def _sampled(
    config: OwnRowsConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    each: int,
) -> list[str]:
    """`each` samples at temperature 1 for each prompt, round by round."""
    limit = context_length(model)
    requests = []
    for sample in range(each):
        for number, ids in enumerate(prompts):
            room = config.max_new_tokens if limit is None else min(config.max_new_tokens, limit - len(ids))
            if room > 0:
                requests.append(SamplingRequest(f"{sample}/{number}", tuple(ids), room, stream=(sample, number)))
    drawn: dict[str, Any] = sample_completions(
        model, tokenizer, requests, seed=config.seed, batch_size=32, title="sampling retain rows", progress=False
    )
    texts = {key: tokenizer.decode(list(ids), skip_special_tokens=True) for key, ids in drawn.items()}
    return [texts.get(f"{sample}/{number}", "") for sample in range(each) for number in range(len(prompts))]
