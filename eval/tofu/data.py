"""TOFU's rows, or one's own questions and answers, from the hub or from local files, checked before any model is
loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fdiv.errors import DataError
from fdiv.eval.benchmark.sources import Rows, first_of, load_rows
from fdiv.eval.layouts.layout import load_layout
from fdiv.eval.tofu.rows import Row, checked_rows, forget_columns
from fdiv.files import DATA_FORMATS, folded
from fdiv.inference.cache import fingerprint

__all__ = ["HUB_DATASET", "TofuRows", "load_rows", "load_tofu_rows", "question_rows"]

HUB_DATASET = "locuslab/TOFU"
_SETS = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts", "holdout": "holdout"}
"""Row set → its name in a layout."""


@dataclass
class TofuRows:
    """The row sets of one forget split; `missing` says why a set is empty, or why its rows do not give a metric."""

    split: str
    forget: list[Row]
    retain: list[Row]
    ra: list[Row]
    wf: list[Row]
    holdout: list[Row]
    missing: dict[str, str]

    def forget_digest(self) -> str:
        """Fingerprint of the forget rows: what makes two logs comparable."""
        return fingerprint([forget_columns(row) for row in self.forget])


def _set_names(split: str, holdout: str | None, retain: str | None) -> dict[str, list[str]]:
    """Which names are looked for, by row set; the first that exists is read."""
    own = {"split": split, "retain": split.replace("forget", "retain")}
    own["holdout"] = holdout or split.replace("forget", "holdout")
    sets = load_layout("tofu").filled(own).sets
    names = {row_set: list(sets[name].names) for row_set, name in _SETS.items()}
    # A split that is not called forget… has no retain set of its own.
    others = list(dict.fromkeys(name for name in names["retain"] if name not in names["forget"]))
    return names | {"retain": [retain] if retain else others}


def _pairs(rows: Sequence[Row]) -> set[tuple[str, str]]:
    return {(folded(row["question"]), folded(row["answer"])) for row in rows}


def _files_of(source: str) -> str:
    """What a folder holds, for an error message."""
    names = sorted(path.name for path in Path(source).glob("*") if path.suffix in DATA_FORMATS)
    return f"; it holds {', '.join(names[:8])}: name one with --split" if names else ""


def load_tofu_rows(
    split: str, source: str = HUB_DATASET, holdout: str | None = None, retain: str | None = None
) -> TofuRows:
    """The row sets TOFU's metrics need for one forget split, or as many of them as there are.

    Args:
        split: `forget01`, `forget05`, `forget10`, or any NAME for which `NAME_perturbed` or `NAME` exists. A file is a
            split of its own, named by its stem.
        source: hub name, local folder with files as those of `locuslab/TOFU` (see `load_rows`), or a file of forget
            rows.
        holdout: name or file of the holdout set for the membership attacks; by default `forgetXX` → `holdoutXX`.
        retain: name or file of the retain set; by default `retain_perturbed`, else `retain`.
    Returns:
        All rows. Every set but the forget rows may be absent, and rows may lack `paraphrased_answer` and
        `perturbed_answer`: `missing` then says so.
    Raises:
        DataError: no forget file, a row without question or answer, a forget row that stands in the retain or holdout
        set.
    """
    if Path(source).is_file():
        split, names = Path(source).stem, _set_names(Path(source).stem, holdout, retain) | {"forget": [source]}
    else:
        names = _set_names(split, holdout, retain)

    def read(row_set: str) -> tuple[str, Rows]:
        if row_set == "holdout" and names["holdout"] == [split]:
            raise FileNotFoundError(f"split {split} names no holdout set; give one with --holdout")
        return first_of(source, names[row_set])

    return question_rows(split, read, f"the forget set of split {split}{_files_of(source)}")


def question_rows(split: str, read: Callable[[str], tuple[str, Rows]], forget: str = "the forget set") -> TofuRows:
    """The row sets of a benchmark of questions, checked.

    Args:
        split: what they are called. read: (name, rows) of `forget`, `retain`, `ra`, `wf` or `holdout`;
            FileNotFoundError with the reason where there are none. forget: what an error calls the forget set.

    Raises:
        DataError: see `load_tofu_rows`.
    """
    sets: dict[str, list[Row]] = {}
    missing: dict[str, str] = {}
    for row_set in _SETS:
        try:
            name, rows = read(row_set)
        except FileNotFoundError as error:
            if row_set == "forget":
                raise DataError(f"{error}: {forget}") from None
            sets[row_set], missing[row_set] = [], str(error)
            continue
        sets[row_set], reasons = checked_rows(rows, name, row_set)
        missing |= reasons
    for other in ("retain", "holdout"):
        both = _pairs(sets["forget"]) & _pairs(sets[other])
        if both:
            raise DataError(
                f"{len(both)} forget rows of {split} stand in the {other} set too, for example {min(both)[0]!r}: "
                "the two must not overlap"
            )
    return TofuRows(split=split, missing=missing, **sets)
