"""Read every row with the teacher once, and keep the top k of each distribution: `fdiv teach`.

A part of the cache is computed and written at a time; a run that was killed goes on at the first part that is missing,
and the parts are the same bytes as in one go (on one machine, with one batch size).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fdiv.distillation.cache import FORMAT as CACHE_FORMAT
from fdiv.distillation.cache import (
    SETTINGS,
    TAUGHT,
    TOKENIZER,
    Said,
    TeacherCache,
    bytes_of,
    part_fault,
    part_name,
    settings_digest,
    write_part,
)
from fdiv.distillation.f_distill.data import batch_tensors
from fdiv.distillation.teach.config import TeachConfig
from fdiv.distillation.teach.rows import Taught, load_rows
from fdiv.distillation.teach.share import measure_share
from fdiv.distillation.teachers.base import Encoded
from fdiv.distillation.teachers.served import joined
from fdiv.distillation.teachers.vocabularies import check_known_tokens, shared_tokens
from fdiv.errors import DataError
from fdiv.files import temporary_of
from fdiv.inference.encoding import encoding_stamp
from fdiv.inference.processes import process_state
from fdiv.inference.prompt_log_probs import PromptLogProbs
from fdiv.lock import LOCK, output_lock
from fdiv.models.fingerprints import tokenizer_fingerprint, weights_fingerprint
from fdiv.models.loading import check_all_fit, load_model, load_tokenizer
from fdiv.models.vocabulary import Head, TopK, check_head, last_hidden_states, model_head, top_tokens
from fdiv.provenance import command_line, environment
from fdiv.rows.report import records_of
from fdiv.sealed import read_record, write_record
from fdiv.stamps import compare_stamps
from fdiv.terminal import info
from fdiv.training.finite import refuse_broken

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Plan", "plan_teaching", "teach"]

_REMEDY = "restore the setting, or choose another output directory"


@dataclass
class Plan:
    """What will be read by whom, before the teacher is loaded.

    Attributes:
        config: the settings. tokenizer: encodes the rows. teacher_tokenizer: of the teacher. taught: the rows.
        parts: where each part begins and ends among the rows.
    """

    config: TeachConfig
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    taught: Taught
    parts: list[tuple[int, int]]

    @property
    def tokens(self) -> int:
        """Tokens that the teacher speaks of."""
        return sum(len(row.completion_ids) for row in self.taught.rows)

    @property
    def size(self) -> int:
        """Bytes on disk, but for the headers."""
        return bytes_of(self.tokens, len(self.taught.rows), self.config.k)

    @property
    def vocabulary(self) -> int:
        """Tokens that both tokenizers have."""
        sizes = [max(part.get_vocab().values()) + 1 for part in (self.tokenizer, self.teacher_tokenizer)]
        shared_tokens(self.tokenizer, self.teacher_tokenizer, *sizes)
        return min(sizes)

    def check_tokens(self, known: int) -> None:
        """Refuse rows with a token beyond the `known` ones of the teacher."""
        pairs = zip(self.taught.rows, self.taught.students, strict=True)
        read = [[*row.prompt_ids, *student.prompt_ids, *row.completion_ids] for row, student in pairs]
        check_known_tokens(read, self.tokenizer, known, self.config.dataset, self.taught.names)


def plan_teaching(config: TeachConfig) -> Plan:
    """Load tokenizers and rows, encode them, and cut them into parts.

    Raises:
        DataError: data or tokenizers that cannot be used, or of two vocabularies.
    """
    named = config.tokenizer or config.model
    theirs = load_tokenizer(named, config.adapter)
    ours = theirs if config.student is None else load_tokenizer(config.student)
    taught = load_rows(config, ours)
    plan = Plan(config, ours, theirs, taught, _parts(taught.rows, config.part_tokens))
    plan.check_tokens(plan.vocabulary)
    if config.k > plan.vocabulary:
        raise DataError(f"k={config.k}: there are {plan.vocabulary} tokens, and no more can be kept")
    return plan


def _parts(rows: Sequence[Encoded], tokens: int) -> list[tuple[int, int]]:
    """Consecutive rows with at most `tokens` completion tokens together (a longer row stands alone)."""
    starts, held = [0], 0
    for number, row in enumerate(rows):
        if held and held + len(row.completion_ids) > tokens:
            starts.append(number)
            held = 0
        held += len(row.completion_ids)
    return list(pairwise([*starts, len(rows)]))


def teach(config: TeachConfig, output_dir: str | Path) -> dict[str, Any]:
    """Write the cache; call it on all processes, which share the parts.

    Args:
        config: the settings. output_dir: new, or with an earlier run of the same settings, which is continued or found
            finished.

    Returns:
        The content of `taught.json`.

    Raises:
        DataError: data, teacher or tokenizers cannot be used; the directory holds something else.
        RolloutError: the server fails, or says what no teacher can have said; what was written stays.
    """
    output_dir = Path(output_dir)
    with output_lock(output_dir):
        plan = plan_teaching(config)
        source = make_source(plan)
        settings = _settings(plan, source)
        finished = _entered(output_dir, settings, plan)
        if finished is not None:
            return finished
        _write_parts(plan, source, output_dir, settings_digest(settings))
        state = process_state()
        state.wait_for_everyone()
        if state.is_main_process:
            content = _finish(plan, source, output_dir)
        state.wait_for_everyone()
        return content if state.is_main_process else read_record(output_dir / TAUGHT, _REMEDY)


# ---------------------------------------------------------------- who speaks
class ModelSource:
    """A model in memory."""

    def __init__(self, plan: Plan) -> None:
        config = plan.config
        self.model: PreTrainedModel = load_model(config.model, config.adapter, config.dtype)
        refuse_broken(self.model, f"the teacher {config.model}", "look at the run that wrote it, or take another")
        check_head(self.model)
        check_all_fit(
            (len(row.prompt_ids) + len(row.completion_ids) for row in plan.taught.rows), self.model,
            lambda number: f"{plan.taught.name_of(number)}: prompt and completion",
            "shorten it, or lower max_completion_length: the teacher's context is",
        )  # fmt: skip
        head = model_head(self.model)
        self.vocabulary = min(plan.vocabulary, head.weight.shape[0])
        if config.k > self.vocabulary:
            raise DataError(f"k={config.k}: the teacher has {self.vocabulary} tokens, and no more can be kept")
        plan.check_tokens(self.vocabulary)
        self.config, self.pad = config, plan.tokenizer.pad_token_id or 0
        self.identity = {"weights": weights_fingerprint(self.model), "dtype": str(next(self.model.parameters()).dtype)}

    def head(self) -> Head:
        """The LM head, cut to the shared tokens."""
        return model_head(self.model).cut(self.vocabulary)

    @torch.no_grad()
    def say(self, rows: Sequence[Encoded]) -> list[Said]:
        """What it says of each row's completion, row by row."""
        ids, mask, answers = (part.to(self.model.device) for part in batch_tensors(rows, self.pad))
        hidden = last_hidden_states(self.model, ids, mask)[answers]
        top, log_probs, entropy = top_tokens(
            hidden, self.head(), self.config.k, ids[:, 1:][answers], temperature=self.config.temperature
        )
        if bool(torch.isnan(top.log_probs).any()) or bool(torch.isnan(entropy).any()):
            raise DataError(
                f"the teacher {self.config.model} gives NaN: its weights are broken, or {self.identity['dtype']} is "
                "too narrow for it; look at them, or take another dtype"
            )
        lengths = [len(row.completion_ids) for row in rows]
        columns = [part.cpu().split(lengths) for part in (*top, log_probs, entropy)]
        return [Said(TopK(*parts[:3]), parts[3], parts[4]) for parts in zip(*columns, strict=True)]


class ServerSource:
    """A vLLM server; it says the top k of a distribution alone, so there is no entropy and no share."""

    model = None

    def __init__(self, plan: Plan) -> None:
        config = plan.config
        assert config.server_url is not None
        self.asked = PromptLogProbs(config.server_url, config.model, config.k, setting="server_url")
        self.vocabulary, self.k = plan.vocabulary, config.k
        self.identity = {"weights": None, "dtype": None, "server": self.asked.root}

    def say(self, rows: Sequence[Encoded]) -> list[Said]:
        """What it says of each row's completion, row by row."""
        return [joined([row], self.k) for row in self.asked.ask(rows, self.vocabulary)]


def make_source(plan: Plan) -> Any:
    """The model in memory, or the server."""
    return ModelSource(plan) if plan.config.server_url is None else ServerSource(plan)


# ---------------------------------------------------------------- the directory
def _settings(plan: Plan, source: Any) -> dict[str, Any]:
    """What the parts depend on."""
    config, rows = plan.config, plan.taught
    stamp = encoding_stamp(plan.tokenizer, config.encoding(), chat=not rows.is_text)
    return {
        "format": CACHE_FORMAT,
        "model": config.model,
        **source.identity,
        "tokenizer": tokenizer_fingerprint(plan.teacher_tokenizer),
        "vocabulary": source.vocabulary,
        "dataset": config.dataset,
        "splits": list(config.splits),
        **{name: getattr(config, name) for name in ("k", "temperature", "max_completion_length", "part_tokens")},
        "encoding": stamp,
        "rows": rows.digest,
    }


def _entered(path: Path, settings: Mapping[str, Any], plan: Plan) -> dict[str, Any] | None:
    """Claim `path` for a run with these settings; the content of `taught.json` where that very run is finished.

    Raises:
        DataError: it holds a run with other settings, or something that is none.
    """
    state = process_state()
    if path.exists() and not path.is_dir():
        raise DataError(f"{path} is a file: choose another output directory")
    known = (path / SETTINGS).is_file()
    if known:
        found = read_record(path / SETTINGS, "choose another output directory")
        for name, value in settings.items():
            if name == "encoding":
                compare_stamps(value, found.get(name), str(path), _REMEDY, noted=())
            elif found.get(name) != value:
                raise DataError(f"{path} was begun with {name}={found.get(name)!r}, now it is {value!r}: {_REMEDY}")
    elif path.is_dir() and any(
        entry.name not in (LOCK, temporary_of(path / SETTINGS).name) for entry in path.iterdir()
    ):
        raise DataError(f"{path} is not empty and no teacher's cache: choose another output directory")
    whole = (path / TAUGHT).is_file() and _is_whole(path, plan)
    state.wait_for_everyone()  # everybody has looked before anybody writes
    if whole:
        info(f"the cache is finished: {path}")
        return read_record(path / TAUGHT, _REMEDY)
    if state.is_main_process:
        path.mkdir(parents=True, exist_ok=True)
        if not known:
            write_record(path / SETTINGS, settings)
        plan.teacher_tokenizer.save_pretrained(path / TOKENIZER)  # again, too: a kill may have left half of it
    state.wait_for_everyone()
    return None


def _is_whole(path: Path, plan: Plan) -> bool:
    """Whether a finished cache has all its files; what it lacks is written again.

    Raises:
        DataError: a part is damaged.
    """
    missing = [name for name in (TOKENIZER, *map(part_name, range(len(plan.parts)))) if not (path / name).exists()]
    if missing:
        info(
            f"{path} was finished, and lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}: written again"
        )
        return False
    TeacherCache(path)  # every part is looked at
    return True


def _write_parts(plan: Plan, source: Any, path: Path, settings: str) -> None:
    """Write every part that is missing; the processes take turns."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    state, rows = process_state(), plan.taught.rows
    missing = [
        number
        for number in range(len(plan.parts))
        if part_fault(path / part_name(number), settings, number) is not None
    ]
    if len(missing) < len(plan.parts):
        info(f"{len(plan.parts) - len(missing)} of {len(plan.parts)} parts were written before")
    state.wait_for_everyone()
    own = missing[state.process_index :: state.num_processes]
    total = sum(len(row.completion_ids) for number in own for row in rows[slice(*plan.parts[number])])
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} tokens"))
    with Progress(*columns, TimeRemainingColumn(), disable=not state.is_main_process, transient=True) as bar:
        task = bar.add_task("teaching", total=total)
        for number in own:
            part = rows[slice(*plan.parts[number])]
            said: dict[int, Said] = {}
            for batch in _batches(part, plan.config.batch_size):
                answers = source.say([part[place] for place in batch])
                said |= dict(zip(batch, answers, strict=True))
                bar.advance(task, sum(len(part[place].completion_ids) for place in batch))
            write_part(path / part_name(number), settings, number, part, _joined([said[n] for n in range(len(part))]))


def _batches(rows: Sequence[Encoded], size: int) -> Iterator[list[int]]:
    """Places of rows of like length, the longest first."""
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n].prompt_ids) - len(rows[n].completion_ids))
    yield from (order[start : start + size] for start in range(0, len(order), size))


def _joined(said: Sequence[Said]) -> Said:
    tops = [torch.cat(column) for column in zip(*(part.top for part in said), strict=True)]
    entropies = [part.entropy for part in said if part.entropy is not None]
    entropy = torch.cat(entropies) if len(entropies) == len(said) else None
    return Said(TopK(*tops), torch.cat([part.log_probs for part in said]), entropy)


def _finish(plan: Plan, source: Any, path: Path) -> dict[str, Any]:
    """Measure the share, and write the record that makes the cache finished."""
    config = plan.config
    sizes = [(path / part_name(number)).stat().st_size for number in range(len(plan.parts))]
    content = {
        "parts": len(plan.parts),
        "counts": {"rows": len(plan.taught.rows), "tokens": plan.tokens, "bytes": sum(sizes)},
        "bytes_per_token": sum(sizes) / plan.tokens,
        "rows": records_of(plan.taught.reports),
        "share": None,
    }
    if config.student is not None and config.share_rows > 0 and source.model is not None:
        content["share"] = measure_share(plan, source)
    write_record(path / TAUGHT, {**content, "environment": environment(command_line(), 0)})
    return content


def estimate(plan: Plan, source: Any) -> float:
    """Seconds that the whole takes, from one batch of middling length."""
    rows = plan.taught.rows
    batches = list(_batches(rows, plan.config.batch_size))
    batch = [rows[place] for place in batches[len(batches) // 2]]
    source.say(batch[:1])  # the first call of a model allocates
    started = time.perf_counter()
    source.say(batch)
    seconds = time.perf_counter() - started
    read = [sum(len(row.prompt_ids) + len(row.completion_ids) for row in part) for part in (rows, batch)]
    return seconds * read[0] / read[1] / process_state().num_processes
