"""The directory of a pre-sampling: whether it may be written, and its files."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.files import temporary_of
from fdiv.inference.processes import process_state
from fdiv.lock import LOCK
from fdiv.rl.presample.coverage import coverage, coverage_warnings, kinds_of
from fdiv.rows.report import RowReport, records_of
from fdiv.sealed import NO_DIGEST, check_listed, listed, read_record, write_record
from fdiv.stamps import compare_stamps
from fdiv.terminal import info

if TYPE_CHECKING:
    from datasets import Dataset

    from fdiv.rl.dph.rehearsal import Partition, RehearsalCache
    from fdiv.rl.presample.config import PresampleConfig

__all__ = ["EXPLORE", "PARTITION", "REHEARSAL", "Sample", "enter_directory", "explored", "write_outputs", "write_rows"]

SETTINGS, PARTITION = "settings.json", "partition.json"
SAMPLES, VERIFICATION = "samples.jsonl", "verification.jsonl"
EXPLORE, REHEARSAL = "explore.parquet", "rehearsal.safetensors"
_AGAIN = f"remove {PARTITION} and run `fdiv presample` again: what was sampled is kept in cache/, and used again"


@dataclass(frozen=True)
class Sample:
    """Sample `number` of prompt `index`, scored. `correct` is None where the reward gave no score; `truncated`: it
    was cut at the bound on its length."""

    index: int
    number: int
    completion_ids: tuple[int, ...]
    completion: str
    truncated: bool
    reward: float | None
    correct: bool | None


def enter_directory(
    path: Path, drawing: Mapping[str, Any], decisions: Mapping[str, Any], repartition: bool
) -> dict[str, Any] | None:
    """Claim `path` for a run with these settings; the content of `partition.json` where that very run is finished.

    Raises:
        DataError: it holds a run with other settings, something that is no pre-sampling, or a damaged file.
    """
    state = process_state()
    settings, finished = path / SETTINGS, path / PARTITION
    unchecked: list[str] = []
    if path.exists() and not path.is_dir():
        raise DataError(f"{path} is a file: choose another output directory")
    if settings.is_file():
        found = read_record(settings, "choose another output directory", unchecked=unchecked)
        unchecked += _compare(path, found, json.loads(json.dumps(drawing)))
    elif path.is_dir() and any(entry.name not in (LOCK, temporary_of(settings).name) for entry in path.iterdir()):
        raise DataError(f"{path} is not empty and no pre-sampling: choose another output directory")
    elif repartition:
        raise DataError(
            f"{path} holds no pre-sampling whose samples could be split again: leave --repartition out to sample, or "
            "give the directory of one"
        )
    content = read_record(finished, _AGAIN, unchecked=unchecked) if finished.is_file() else None
    state.wait_for_everyone()  # everybody has looked before anybody writes
    if content is not None:
        if content["decisions"] == decisions:
            for line in [*unchecked, *check_outputs(path)]:
                info(line)
            info(f"pre-sampling is finished: {path}")
            return content
        if not repartition:
            name = next(name for name, value in decisions.items() if content["decisions"].get(name) != value)
            raise DataError(
                f"{path} holds a finished partition with {name}={content['decisions'].get(name)!r}, now it is "
                f"{decisions[name]!r}: choose another output directory, or replace the partition (not the samples) "
                "with --repartition"
            )
    if state.is_main_process:
        path.mkdir(parents=True, exist_ok=True)
        write_record(settings, drawing)
    state.wait_for_everyone()
    return None


def check_outputs(path: Path) -> list[str]:
    """See that the files of a finished directory are what was written; a line for each that holds no digest.

    Raises:
        DataError: one is missing, was cut off or has changed, or is no rehearsal cache.
    """
    from fdiv.rl.dph.rehearsal import RehearsalCache

    unchecked = []
    for name in (SAMPLES, VERIFICATION, EXPLORE, REHEARSAL):
        if not (path / name).is_file():
            raise DataError(f"{path / name} is missing; {_AGAIN}")
        if name != REHEARSAL and check_listed(path / name, _AGAIN) is None:
            unchecked.append(f"{path / name}: {NO_DIGEST}")
    RehearsalCache.load(path / REHEARSAL)
    return unchecked


def _compare(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Refuse a directory with other settings; what may be fine, or is not known, as notes."""
    for name, value in wanted.items():
        if name != "encoding" and (name not in found or found[name] != value):
            raise DataError(
                f"{path} was begun with {name}={found.get(name)!r}, now it is {value!r}: restore the setting, or "
                "choose another output directory"
            )
    remedy = "restore the setting, or choose another output directory"
    return compare_stamps(wanted["encoding"], found.get("encoding"), str(path), remedy)


def write_outputs(
    path: Path,
    config: PresampleConfig,
    drawing: Mapping[str, Any],
    rows: Dataset,
    prompt_ids: Sequence[Sequence[int]],
    samples: Mapping[int, Sequence[Sample]],
    verification: Sequence[Sample],
    partition: Partition,
    cache: RehearsalCache,
    report: RowReport,
) -> dict[str, Any]:
    """Write every file of the directory (main process only), `partition.json` last; returns its content."""
    kept = Counter(row.index for row in cache)
    explore = explored(partition, kept, config.wrong)
    content = {
        **_counted(config, len(rows), kept, partition, explore),
        "rows": records_of([report]),
        "threshold": config.decisions()["threshold"],
        "num_samples": config.num_samples,
        **_sampled(config, samples, verification, partition),
        "decisions": config.decisions(),
        "drawing": dict(drawing),
    }
    rates = [count / config.num_samples for count in content["prompts"]["correct"]]
    compared = coverage(prompt_ids, rates, kept, explore, kinds_of(rows, config.kind))
    content["coverage"] = {**compared, "warnings": coverage_warnings(compared)}
    if process_state().is_main_process:
        from fdiv.provenance import command_line, environment

        (path / PARTITION).unlink(missing_ok=True)  # one that is replaced stands until now
        with listed(path / SAMPLES, path / VERIFICATION, path / EXPLORE):
            _write_samples(path / SAMPLES, [sample for index in sorted(samples) for sample in samples[index]])
            _write_samples(path / VERIFICATION, sorted(verification, key=lambda s: (s.index, s.number)))
            write_rows(path / EXPLORE, rows.select(explore))
        cache.save(path / REHEARSAL)
        write_record(path / PARTITION, {**content, "environment": environment(command_line(), config.seed)})
    return content


def _counted(
    config: PresampleConfig, total: int, kept: Mapping[int, int], partition: Partition, explore: Sequence[int]
) -> dict[str, Any]:
    """How many prompts are in each part, and which of those to rehearse have no verified sample."""
    near_perfect, wanted = {*partition.near_perfect}, range(total) if config.keep == "all" else partition.near_perfect
    counts = {
        "prompts": total,
        "near_perfect": len(near_perfect),
        "rehearsal": len(kept),
        "rehearsed_and_explored": len(kept.keys() & {*explore}),
        "moved_to_explore": len(near_perfect - kept.keys()),
        "to_explore": len(partition.explore),
        "wrong": len(partition.wrong),
        "dropped": len({*partition.wrong} - kept.keys()) if config.wrong == "drop" else 0,
        "explore": len(explore),
    }
    return {
        "counts": counts,
        "shares": {name: count / total for name, count in counts.items() if name != "prompts"},
        "rehearsal_rows": sum(kept.values()),
        "without_verified_sample": [index for index in wanted if index not in kept],
    }


def _sampled(
    config: PresampleConfig,
    samples: Mapping[int, Sequence[Sample]],
    verification: Sequence[Sample],
    partition: Partition,
) -> dict[str, Any]:
    """What was sampled, in all and of each prompt."""
    groups = [samples[index] for index in range(len(samples))]
    correct = [sum(sample.correct is True for sample in group) for group in groups]
    parts = {index: name for name, indices in partition._asdict().items() for index in indices}
    histogram = Counter(correct)
    return {
        "samples": _tally([sample for group in groups for sample in group]),
        "verification": _tally(verification),
        "prompts_by_correct": [histogram[number] for number in range(config.num_samples + 1)],
        "prompts": {
            "correct": correct,
            "scored": [sum(sample.correct is not None for sample in group) for group in groups],
            "part": [parts[index] for index in range(len(groups))],
        },
    }


def explored(partition: Partition, kept: Mapping[int, Any], wrong: str) -> list[int]:
    """The explore set: all prompts but the near-perfect ones that are rehearsed, and, with `wrong: drop`, those
    without any verified sample."""
    left = {*partition.explore, *partition.wrong, *partition.near_perfect} - {
        index for index in partition.near_perfect if index in kept
    }
    dropped = {index for index in partition.wrong if index not in kept} if wrong == "drop" else set()
    return sorted(left - dropped)


def _tally(samples: Sequence[Sample]) -> dict[str, Any]:
    correct = sum(sample.correct is True for sample in samples)
    return {
        "drawn": len(samples),
        "correct": correct,
        "unscored": sum(sample.correct is None for sample in samples),
        "truncated": sum(sample.truncated for sample in samples),
        "empty": sum(not sample.completion.strip() for sample in samples),
        "share_correct": correct / len(samples) if samples else None,
    }


def _write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """One JSON object per sample; `task_id` and `correct` are what `fdiv eval passk --from_samples` reads."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for sample in samples:
            record = {"task_id": sample.index, "sample": sample.number, **asdict(sample)}
            del record["index"], record["number"]
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def write_rows(path: Path, rows: Dataset) -> None:
    """Parquet keeps every column's type; JSON would guess at them again."""
    import datasets

    partial, shown = path.with_name(path.name + ".partial"), not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows.to_parquet(str(partial))
    finally:
        if shown:
            datasets.enable_progress_bars()
    os.replace(partial, path)
