"""The row sets of an evaluation: what is to go, the same in other words, and what is to stay; as texts to score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.eval.benchmark.evaluation import selected_rows
from fdiv.eval.metrics.leakage import Secret, secrets_of
from fdiv.eval.unlearning.attacks.prompts import Paraphrase
from fdiv.eval.unlearning.attacks.rows import answered, asked, encode, prompt_rows, with_asked
from fdiv.eval.unlearning.data import Row, Rows, check_apart, held_out_nothing, passages, read_rows, with_paraphrases
from fdiv.eval.unlearning.general import GENERAL_QUESTIONS, GENERAL_TEXTS
from fdiv.files import folded
from fdiv.inference.prompting import EncodedText, PromptFormat
from fdiv.inference.scoring import ScoringRequest
from fdiv.rows.report import RowReport
from fdiv.rows.sources import source_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RowSets", "check_context", "check_end", "check_retrained", "load_sets"]


@dataclass
class RowSets:
    """The rows of an evaluation.

    Attributes:
        forget: as they stand in the file. asked: the same as prompts and answers; running text is cut into passages,
            and each into a beginning and a continuation.
        paraphrased: `asked` in other words, row by row. neighbours, holdout, general: other rows; empty for none.
        retain: what attacks may show the model.
        secrets: of `asked`. missing: why a set is empty.
    """

    forget: Rows
    asked: list[Row]
    paraphrased: list[Row]
    neighbours: list[Row] = field(default_factory=list)
    holdout: list[Row] = field(default_factory=list)
    general: list[Row] = field(default_factory=list)
    retain: list[Row] = field(default_factory=list)
    secrets: list[Secret] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def requests(
        self, tokenizer: PreTrainedTokenizerBase, prompt: PromptFormat, *, chance: bool, paraphrased: bool
    ) -> list[ScoringRequest]:
        """Every text to score, with the keys `SET/number`; `chance`: also the answers under other questions,
        `paraphrased`: also under their own in other words."""
        found = []
        sets = {"forget": self.asked, "neighbour": self.neighbours}
        sets |= {"holdout": self.holdout, "general": self.general}
        sets |= {"paraphrase": self.paraphrased} if paraphrased else {}
        sets |= {"chance": self.asked_otherwise()} if chance else {}
        for name, rows in sets.items():
            whole = name in ("forget", "holdout")  # Min-K needs every token
            for number, row in enumerate(rows):
                text = encode(row, tokenizer, prompt)
                found.append(ScoringRequest(f"{name}/{number}", text, whole, name, hits=not whole))
        return found

    def asked_otherwise(self) -> list[Row]:
        """The answers, each under the question of another row, half of the rows further; where that asks the same,
        under a question of general knowledge."""
        count = len(self.asked)
        found = []
        for number, row in enumerate(self.asked):
            other = asked(self.asked[(number + max(1, count // 2)) % count])
            if folded(other) == folded(asked(row)):
                other = GENERAL_QUESTIONS[number % len(GENERAL_QUESTIONS)]
            found.append(with_asked(row, other))
        return found

    def reports(self, requests: Sequence[ScoringRequest]) -> list[RowReport]:
        """What became of the rows of each set."""
        found = []
        for name, what, read in (
            ("forget", "rows to forget", len(self.forget)),
            ("neighbour", "neighbouring rows", len(self.neighbours)),
            ("holdout", "holdout rows", len(self.holdout)),
        ):
            texts = [request.text for request in requests if request.key.startswith(f"{name}/")]
            if texts:
                empty = sum(text.label_count == 0 for text in texts)
                longest = max(len(text.input_ids) for text in texts)
                found.append(RowReport(what, read, longest=longest, without_signal={"without a label": empty}))
        return found


def load_sets(
    tokenizer: PreTrainedTokenizerBase,
    forget: str,
    *,
    neighbours: str | None = None,
    retain: str | None = None,
    holdout: str | None = None,
    general: str | None = None,
    paraphrases: str | None = None,
    paraphrase_model: str | None = None,
    max_items: int | None = None,
    seed: int = 0,
) -> RowSets:
    """Read every set.

    Args:
        tokenizer: of the evaluated model. forget, neighbours, retain, holdout, general: files (see
            `fdiv.eval.unlearning.data`); without `neighbours`, or where a build had too few rows to hold some out, the
            retain rows are measured in their place, without `general` a few sentences of our own.
        paraphrases: file with other wordings of the forget rows. paraphrase_model: a model that writes those that are
            missing, instead of templates.
        max_items: evenly spaced rows of each set that are kept. seed: chooses among wordings.

    Raises:
        DataError: see `read_rows`, `check_apart` and `with_paraphrases`.
    """
    rows, missing = read_rows(forget, "forget"), {}
    if paraphrases is not None:
        rows = with_paraphrases(rows, paraphrases)
    too_few = neighbours is not None and held_out_nothing(neighbours)
    neighbours = None if too_few else neighbours
    others: dict[str, list[Row]] = {}
    given = {"neighbours": neighbours or retain, "retain": retain, "holdout": holdout, "general": general}
    for name, file in given.items():
        others[name] = [] if file is None else read_rows(file, name)
        if name in ("neighbours", "retain", "holdout"):
            check_apart(rows, others[name], "retain" if name == "neighbours" and neighbours is None else name)
    if not others["neighbours"]:
        missing["neighbours"] = "no retain rows and no neighbours were given"
    elif neighbours is None:
        missing["neighbours_kept_apart"] = (
            "the neighbours are the retain rows: what was trained on is what is measured"
            + ("; too few answers of the model could be used to hold some of them out" if too_few else "")
        )
    if not others["holdout"]:
        missing["holdout"] = "no holdout rows were given: rows of the same kind that the model has never seen"
    whole = prompt_rows(_thinned(passages(rows), max_items))
    given_secrets, astray = _secrets_given(whole)
    wording = Paraphrase(model=paraphrase_model)
    reworded = wording(None, tokenizer, whole, seed=seed)
    return RowSets(
        rows,
        whole,
        list(reworded.rows),
        neighbours=prompt_rows(_thinned(passages(others["neighbours"]), max_items)),
        holdout=prompt_rows(_thinned(passages(others["holdout"]), max_items)),
        general=others["general"] or [{"text": text} for text in GENERAL_TEXTS],
        retain=prompt_rows(passages(others["retain"])),
        secrets=secrets_of([asked(row) for row in whole], [answered(row) for row in whole], given_secrets),
        missing=missing,
        origins={"paraphrases": "; ".join(reworded.notes), "general": general or "sentences of fdiv's own"}
        | ({"secrets": _astray_line(astray, len(rows), source_of(rows, "the forget rows"))} if astray else {}),
    )


def _secrets_given(rows: Sequence[Row]) -> tuple[list[Sequence[str]], list[int]]:
    """What is looked for in samples of each row, of the secrets that came with it; numbers of the rows, as in the
    file, no answer of which holds one.

    A passage of a running text can only give what stands in its continuation; the others are judged by their words.
    """
    found: list[Sequence[str]] = []
    holding, given = set(), set()
    for row in rows:
        texts = row.get("secret", ())
        said = [text for text in texts if Secret((text,), ()).held_by(answered(row))]
        given |= {row["row"]} if texts else set()
        holding |= {row["row"]} if said else set()
        found.append(said if row.get("passage") else texts)
    return found, sorted(given - holding)


def _astray_line(astray: Sequence[int], count: int, source: Any) -> str:
    return (
        f"the secret of {len(astray)} of {count} rows does not stand in what their answer says (first: "
        f"{source.row(astray[0])}): samples are searched for it all the same; check its spelling"
    )


def _thinned(rows: list[Row], max_items: int | None) -> list[Row]:
    return [rows[i] for i in selected_rows(len(rows), None, max_items)]


def check_end(tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer without an end token: its answers have no end that could be learned or sampled to.

    Raises:
        DataError: it has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of {name} has no end-of-sequence token, so no answer ends: set eos_token in its "
            "tokenizer_config.json to the token that ended the answers in training"
        )


def check_retrained(name: str, tokenizer: Any) -> None:
    """Refuse a retrained model that is not there, or that reads text in other tokens than the model it stands beside.

    Raises:
        DataError: see above.
    """
    from fdiv.models.fingerprints import tokenizer_fingerprint
    from fdiv.models.loading import context_of, load_tokenizer

    try:
        context_of(name)
    except DataError as error:
        raise DataError(f"retrained: {error}") from error
    if tokenizer_fingerprint(load_tokenizer(name)) != tokenizer_fingerprint(tokenizer):
        raise DataError(
            f"retrained: {name} has another tokenizer than the model: name one that was trained from the same start "
            "without the rows"
        )


def check_context(texts: Iterable[EncodedText], rows: Sequence[Row], what: str, limit: int | None) -> None:
    """Refuse rows that are longer than the model's context.

    Args:
        texts: of the rows, in their order. rows: `Rows`, or passages that know the `row` they come from.
        what: what a message calls them. limit: tokens; None: not known.

    Raises:
        DataError: the first row that is longer, by file and line.
    """
    source = source_of(rows, f"the {what} rows")
    for number, text in enumerate(texts):
        if limit is not None and len(text.input_ids) > limit:
            raise DataError(
                f"{source.row(rows[number].get('row', number))} has {len(text.input_ids)} tokens with its prompt, the "
                f"model's context is {limit}: shorten it, or divide it into several rows"
            )
