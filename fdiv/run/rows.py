"""The rows of a run: which are left out (`exclude_rows`), and their digests for the batch log (`batch_log`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fdiv.errors import DataError, FdivError
from fdiv.files import DATA_FORMATS, home_path
from fdiv.models.fingerprints import weights_fingerprint
from fdiv.recipe.variables import interpolate
from fdiv.rows.digests import data_digest, new_key, row_digests
from fdiv.rows.loading import read_file
from fdiv.rows.sources import source_of
from fdiv.run.batch_log import EXCLUDED, LOG, BatchLog, made_with, part_line, read_key, step_line, write_key
from fdiv.run.plan import RunPlan
from fdiv.sealed import forget_listed, read_record, write_record
from fdiv.terminal import info
from fdiv.training.places import Places, PlacesMixin

__all__ = ["Matched", "RowFiles", "RunRows", "match_rows", "open_rows", "row_tables"]

_TRAINED = ("train", "retain")
_FORMATS = {**DATA_FORMATS, ".txt": "text"}


@dataclass(frozen=True)
class RunRows:
    """Digests of the rows of a run and the numbers of those it leaves out, by data set (`train`, `retain`, `test`)."""

    key: bytes
    digests: Mapping[str, list[str]]
    removed: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def data(self) -> dict[str, str]:
        """One digest for each data set that is trained on; removed rows count by their places alone."""
        trained = (name for name in _TRAINED if name in self.digests)
        return {name: data_digest(self.digests[name], self.removed.get(name, ()), self.key) for name in trained}

    def numbers(self) -> dict[str, list[int]]:
        """The numbers of the removed rows, by data set."""
        return {name: sorted(rows) for name, rows in self.removed.items() if rows}

    def kept(self, datasets: Mapping[str, Any]) -> dict[str, Any]:
        """The data sets without the removed rows: what evaluations are given.

        Raises:
            DataError: no row is left.
        """
        result = dict(datasets)
        for name, rows in datasets.items():
            without = self.removed.get(name)
            if without:
                result[name] = rows.select([number for number in range(len(rows)) if number not in without])
                if not len(result[name]):
                    raise DataError(f"exclude_rows leaves no row of {source_of(rows, name)}: leave out fewer")
        return result

    def places(self, trainer: Any) -> Places:
        """What the trainer needs of it.

        Raises:
            FdivError: the trainer dropped rows and does not say which.
        """
        used, read = len(trainer.train_dataset), len(self.digests["train"])
        if used != read and trainer.row_numbers is None and type(trainer).rows_at is PlacesMixin.rows_at:
            raise FdivError(
                f"{type(trainer).__name__} uses {used} of {read} training rows and does not say which "
                "(`row_numbers`): batch_log and exclude_rows need to know"
            )
        identity = " ".join(["rows removed;", *(f"{name} {digest}" for name, digest in self.data().items())])
        return Places(trainer.rows_at(), self.removed, self.digests, identity)


# ---------------------------------------------------------------- reading
def row_tables(plan: RunPlan, datasets: Mapping[str, Any], key: bytes) -> dict[str, list[str]]:
    """The digests of every row that the run reads, by data set.

    Raises:
        DataError: a stream; a row that has no digest.
    """
    tables = {**datasets, **plan.recipe.method.further_rows(plan.configs.training)}
    for name, rows in tables.items():
        if not hasattr(rows, "__len__"):
            raise DataError(
                f"{source_of(rows, name)} is a stream, whose rows have no numbers: batch_log and exclude_rows need "
                "dataset_streaming: false"
            )
    return {name: row_digests(rows, key, source_of(rows, f"the {name} rows")) for name, rows in tables.items()}


@dataclass(frozen=True)
class Matched:
    """What became of rows that were looked for.

    Args:
        rows: by data set, the numbers of the rows that are one of them.
        names: the name of each row looked for, `FILE, line 3`. digests: the digest of each.
        missing: the names of those that are not in the data.
    """

    rows: Mapping[str, frozenset[int]]
    names: list[str]
    digests: list[str]
    missing: list[str]

    def line(self) -> str:
        """How many were found, and which were not."""
        found = len(self.names) - len(self.missing)
        line = f"{found} of {len(self.names)} rows found in the data"
        more = f" and {len(self.missing) - 3} more" if len(self.missing) > 3 else ""
        return line + (f"; not found: {', '.join(self.missing[:3])}{more}" if self.missing else "")


def match_rows(path: Path, digests: Mapping[str, list[str]], key: bytes) -> Matched:
    """Find the rows of a file in the data: the same columns with the same values, nothing folded.

    Raises:
        DataError: the file cannot be read, or none of its rows is there.
    """
    if not path.is_file():
        raise DataError(f"no such file of rows: {path}")
    wanted = read_file(path, formats=_FORMATS)
    source = source_of(wanted, str(path))
    own = row_digests(wanted, key, source)
    looked_for = set(own)
    rows = {name: frozenset(n for n, d in enumerate(table) if d in looked_for) for name, table in digests.items()}
    present = {digest for name in rows for digest in (digests[name][number] for number in rows[name])}
    missing = [source.row(number) for number, digest in enumerate(own) if digest not in present]
    if len(missing) == len(own):
        raise DataError(
            f"none of the {len(own)} rows of {path} is in the data of the run: a row is found where all of its "
            "columns are those of a row of the data, letter by letter; copy the lines from the data"
        )
    return Matched(rows, [source.row(number) for number in range(len(own))], own, missing)


def open_rows(plan: RunPlan, datasets: Mapping[str, Any]) -> RunRows | None:
    """What `batch_log` and `exclude_rows` need of the data; None where neither is set.

    Raises:
        DataError: rows that cannot be told apart or found; data that changed since rows of it were left out.
    """
    excluded, folder = plan.value("exclude_rows"), plan.output_dir
    if not (plan.value("batch_log") or excluded or plan.replay):
        return None
    if plan.replay:
        return plan.replay.rows
    key = read_key(folder) if plan.value("resume_from_checkpoint") else None
    if excluded is None:
        key = key or new_key()
        return RunRows(key, row_tables(plan, datasets, key))
    path = home_path(interpolate(excluded, plan.variables, "exclude_rows", plan.recipe.source))
    if path.name == EXCLUDED:
        return _rows_of_record(plan, datasets, path)
    key = key or new_key()
    digests = row_tables(plan, datasets, key)
    matched = match_rows(path, digests, key)
    info(f"exclude_rows: {matched.line()}; their places stay empty")
    return RunRows(key, digests, matched.rows)


def _rows_of_record(plan: RunPlan, datasets: Mapping[str, Any], path: Path) -> RunRows:
    """The rows that another run left out, by the file that it wrote."""
    key, record = read_key(path.parent), read_record(path, "the rows that were left out are not known")
    if key is None:
        raise DataError(f"{path} needs the key that stood beside it, and there is none")
    removed = {name: frozenset(numbers) for name, numbers in record["rows"].items()}
    rows = RunRows(key, row_tables(plan, datasets, key), removed)
    if rows.data() != record["data"]:
        raise DataError(f"the data have changed since {path} was written: rows that stay must stay where they were")
    return rows


# ---------------------------------------------------------------- writing
class RowFiles(TrainerCallback):
    """Writes the log while training goes on, its key, and which rows were left out.

    Args:
        plan: the run. rows: its rows. trainer: with `places`. record: `fdiv.provenance.environment`.
    """

    def __init__(self, plan: RunPlan, rows: RunRows, trainer: Any, record: Mapping[str, Any]) -> None:
        self.folder, self.rows, self.trainer = plan.output_dir, rows, trainer
        self.log = self.folder / LOG if plan.value("batch_log") else None
        self.earlier = (plan.replay.run if plan.replay else self.folder) / LOG
        self.part = {
            "rows": {name: len(rows.digests[name]) for name in rows.data()},
            "removed": rows.numbers(),
            "data": rows.data(),
            "model": weights_fingerprint(trainer.model),  # at the start, before a checkpoint is loaded
            "made_with": made_with(record),
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The key, the numbers of the removed rows, and the log up to the step that the run goes on from."""
        if not state.is_world_process_zero:
            return
        write_key(self.folder, self.rows.key)
        if any(self.rows.removed.values()):
            write_record(self.folder / EXCLUDED, {"rows": self.rows.numbers(), "data": self.rows.data()})
        if self.log is not None:
            step = state.global_step
            before = "".join(BatchLog.read(self.earlier).lines(step)) if step and self.earlier.is_file() else ""
            forget_listed(self.log)
            self.log.write_text(before + part_line(step, self.part), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One line for the step, before its checkpoint."""
        batches = self.trainer.places.taken()
        if state.is_world_process_zero and self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(step_line(state.global_step, batches))
