"""`fdiv replay`: a finished run again, without some of its rows, from the last checkpoint that knows nothing of them.

The batches of a run are a function of (seed, epoch, index), and a resumed run is the uninterrupted one, bit for bit.
So the run that never had a row is the run up to the last checkpoint before the first step that held it, and from there
on the same steps with that row's places empty. It is the run that `exclude_rows` makes from the beginning, for less.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdiv.errors import FdivError
from fdiv.named import split_spec
from fdiv.provenance import environment
from fdiv.recipe.load import load_recipe
from fdiv.run.batch_log import EXCLUDED, KEY, LOG, BatchLog, changes, made_with, read_key
from fdiv.run.data import load_datasets
from fdiv.run.directory import RunDirectory
from fdiv.run.plan import RunPlan, plan_run, prepare
from fdiv.run.rows import Matched, RunRows, match_rows, row_tables
from fdiv.run.run import run_plan
from fdiv.sealed import check_listed, read_record
from fdiv.terminal import is_main_process
from fdiv.training.checkpoints import checkpoint_fault

__all__ = ["Replay", "plan_replay", "replay"]

_RESOLVED = "recipe_resolved.yaml"


@dataclass(frozen=True)
class Replay:
    """What a replay does.

    Args:
        run: the directory of the run. output: where the replayed one goes.
        plan: the run's plan, for `output`.
        rows: the rows of the run's data, those that are left out now among them.
        matched: what became of the rows that were asked for.
        first_step: the first optimizer step that held one of them; None: none did.
        checkpoint: where it goes on from; None: from the start model.
        skipped: steps that need not be made again. total: steps of the run.
        model: the fingerprint of the start model. seconds: what the run's training took.
        notes: checkpoints that cannot be used.
    """

    run: Path
    output: Path
    plan: RunPlan
    rows: RunRows
    matched: Matched
    first_step: int | None
    checkpoint: Path | None
    skipped: int
    total: int
    model: str
    seconds: float
    notes: list[str] = field(default_factory=list)

    def begin(self, model: str) -> None:
        """Compare the start model with the run's, and take along what the run measured of it.

        Raises:
            FdivError: it is another.
        """
        if model != self.model:
            raise _refusal(self.run, ["the start model is not the one that it began with; restore it"])
        earlier = self.run / "eval_before.json"
        if self.checkpoint is not None and earlier.is_file() and is_main_process():
            shutil.copyfile(earlier, self.output / earlier.name)

    def lines(self) -> list[str]:
        """What was found, where the replay goes on, and what that saves."""
        found = [f"replay: {self.matched.line()}", *(f"replay: {note}" for note in self.notes)]
        if self.first_step is None:
            return [*found, f"replay: no step of {self.run} held one of them: its weights are those of a run without"]
        start = "there is no checkpoint before it, so all steps are made again"
        if self.checkpoint is not None:
            share = self.skipped / self.total
            saved = (
                f"{self.skipped} of {self.total} steps ({share:.0%}, about {share * self.seconds:.0f} s of training)"
            )
            start = f"from {self.checkpoint.name}: {saved} are kept"
        left = self.total - self.skipped
        return [*found, f"replay: first held in step {self.first_step}; {start}, {left} are made without the rows"]


def replay(made: Replay, command: str) -> dict[str, Any] | None:
    """Carry out a replay; its result, or None where no step held a row.

    Raises:
        FdivError: it turns out not to be exact (another start model, other settings), or the run fails.
    """
    if made.first_step is None:
        return None
    prepared = made.run / "prepared"
    return run_plan(made.plan, command, prepared if prepared.is_dir() else None)


def plan_replay(run: Path, without: Path, output: Path | None = None) -> Replay:
    """Find out what a replay would do. Nothing is trained or written.

    Args:
        run: the directory of a finished run with a batch log.
        without: the rows to leave out, lines of the data. output: where the new run goes; None: `RUN-replay`.

    Raises:
        FdivError: the result would not be exact, with every reason; or the rows are not in the data.
    """
    output = Path(f"{run}-replay") if output is None else output
    log, key, result = _records(run)
    plan = _plan(run, output, result["recipe"])
    reasons = [*_log_reasons(log), *_option_reasons(plan)]
    if reasons:  # before the data are read
        raise _refusal(run, reasons)
    datasets = load_datasets(plan)
    rows = RunRows(key, row_tables(plan, datasets, key), _left_out_before(run))
    reasons = _data_reasons(rows, log)
    reasons += filter(None, [plan.recipe.method.why_not_resumed(plan.configs.training, datasets["train"])])
    if reasons:
        raise _refusal(run, reasons)
    matched = match_rows(without, rows.digests, key)
    removed = {
        name: matched.rows.get(name, frozenset()) | rows.removed.get(name, frozenset()) for name in rows.digests
    }
    rows = dataclasses.replace(rows, removed=removed)
    reasons = _selection_reasons(plan, matched)
    if reasons:
        raise _refusal(run, reasons)
    first = log.first_steps()
    held = [first[digest] for digest in matched.digests if digest in first]
    step, total = min(held, default=None), max(log.steps)
    checkpoint, notes = (None, []) if step is None else _checkpoint_before(run, step)
    skipped = 0 if checkpoint is None else _step_of(checkpoint)
    _check_parts(run, log, skipped)
    made = Replay(
        run, output, plan, rows, matched, step, checkpoint, skipped, total, log.parts[0]["model"],
        float(result.get("train_seconds") or 0), notes,
    )  # fmt: skip
    return dataclasses.replace(made, plan=_resumed(made))


# ---------------------------------------------------------------- what the run left
def _records(run: Path) -> tuple[BatchLog, bytes, Mapping[str, Any]]:
    """The batch log of a finished run, its key, and its result."""
    directory = RunDirectory(run)
    if not run.is_dir() or not (run / _RESOLVED).is_file():
        raise FdivError(f"{run} is no run of fdiv: it has no {_RESOLVED}")
    if not directory.finished:
        raise FdivError(f"{run} is not finished: go on with --resume_from_checkpoint true, then replay it")
    for name in (_RESOLVED, LOG):
        check_listed(run / name, "it does not say any more what the run was")
    log, key = BatchLog.read(run / LOG), read_key(run)
    if key is None:
        raise _refusal(run, [f"the key of its batch log, {run / KEY}, is gone, so no row can be found in it"])
    return log, key, read_record(run / "result.json", "run it again")


def _plan(run: Path, output: Path, name: str) -> RunPlan:
    """The run's recipe, for another directory; its data as they were built for it."""
    recipe = load_recipe(run / _RESOLVED, ["--output_dir", str(output)])
    stated = {name: value for name, value in recipe.stated.items() if name != "exclude_rows"}
    plan = plan_run(dataclasses.replace(recipe, name=name, stated=stated))
    stated |= {"exclude_rows": str(output / EXCLUDED), "batch_log": True}  # written when the training begins
    plan = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, stated=stated))
    prepared = run / "prepared"
    return prepare(plan, prepared) if prepared.is_dir() else prepare(plan, output / "prepared")


def _left_out_before(run: Path) -> dict[str, frozenset[int]]:
    """The rows that the run itself was made without."""
    if not (run / EXCLUDED).is_file():
        return {}
    record = read_record(run / EXCLUDED, "the rows that the run left out are not known")
    return {name: frozenset(numbers) for name, numbers in record["rows"].items()}


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _checkpoint_before(run: Path, step: int) -> tuple[Path | None, list[str]]:
    """The last complete checkpoint before a step was made, and a line for each that is passed over."""
    passed_over = []
    for folder in reversed(RunDirectory(run).checkpoints()):
        if _step_of(folder) >= step:
            continue
        fault = checkpoint_fault(folder) or _best_is_gone(folder)
        if fault is None:
            return folder, passed_over
        passed_over.append(f"{folder.name} cannot be used: {fault}")
    return None, passed_over


def _best_is_gone(checkpoint: Path) -> str | None:
    """Whether the best checkpoint up to then, which the end of the run may load, is not there any more."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    best = state.get("best_model_checkpoint")
    return f"the best one up to then, {best}, is gone" if best and not Path(best).is_dir() else None


def _resumed(made: Replay) -> RunPlan:
    """The plan with the checkpoint that it goes on from."""
    stated = dict(made.plan.recipe.stated)
    if made.checkpoint is not None:
        stated["resume_from_checkpoint"] = str(made.checkpoint)
    recipe = dataclasses.replace(made.plan.recipe, stated=stated)
    plan = dataclasses.replace(made.plan, recipe=recipe)
    return dataclasses.replace(plan, replay=made)


# ---------------------------------------------------------------- why it would not be exact
def _refusal(run: Path, reasons: list[str]) -> FdivError:
    return FdivError(f"cannot replay {run} exactly: {'; '.join(reasons)}")


def _log_reasons(log: BatchLog) -> list[str]:
    gap = log.gap()
    reasons = [] if gap is None else [f"its batch log does not know every step: {gap}"]
    again = "; `fdiv run` with exclude_rows makes it from the beginning"
    for device in sorted({part["made_with"]["device"] for part in log.parts} - {"cpu"}):
        reasons.append(f"it was trained on {device}, whose sums depend on the order of its threads{again}")
    if any(part["made_with"]["processes"] != 1 for part in log.parts):
        reasons.append(f"several processes made it, and one without rows in a batch would wait for ever{again}")
    return reasons


def _check_parts(run: Path, log: BatchLog, skipped: int) -> None:
    """Refuse to go on with other code, packages, threads or another processor than made the steps that are kept.

    Raises:
        FdivError: with every difference.
    """
    # From the beginning everything is made again, by what is here now.
    now = made_with(environment(""))
    kept = [part for part in log.parts if part["from_step"] < skipped]
    reasons = [change for part in kept for change in changes(part["made_with"], now)]
    if reasons:
        raise _refusal(run, list(dict.fromkeys(reasons)))


def _option_reasons(plan: RunPlan) -> list[str]:
    """Options under which the steps after a checkpoint are not those of the run without the rows."""
    args = plan.configs.training
    reasons = [plan.recipe.method.why_not_exact(args)]
    reasons += [reason for name, value, reason in _INEXACT if getattr(args, name, None) == value]
    if getattr(args, "use_vllm", False) or getattr(args, "rollout_server_url", None):
        reasons.append("an inference server sampled its completions, whose random numbers no checkpoint holds")
    teacher = getattr(args, "teacher", None)
    if teacher is not None and split_spec(teacher, "teacher")[0] == "server":
        reasons.append("its teacher answered from a server, which need not say the same again")
    return [reason for reason in reasons if reason]


_INEXACT = (
    ("ignore_data_skip", True, "ignore_data_skip: true resumes with other batches than the next ones"),
    ("auto_find_batch_size", True, "auto_find_batch_size: true makes the batches follow from the memory that is free"),
    ("train_sampling_strategy", "group_by_length", "group_by_length orders the rows by the lengths of all of them"),
    ("sync_ref_model", True, "sync_ref_model: true moves the reference, which no checkpoint holds"),
)


def _data_reasons(rows: RunRows, log: BatchLog) -> list[str]:
    """Data other than those of the run."""
    # What a replay of a replay goes on from was compared then, with the rows that are gone by now.
    now, removed = rows.data(), log.parts[-1]["removed"]
    alike = [part["data"] for part in log.parts if part["removed"] == removed]
    changed = sorted({name for data in alike for name in data.keys() | now.keys() if data.get(name) != now.get(name)})
    return [f"the {name} rows are not those of the run any more" for name in changed]


def _selection_reasons(plan: RunPlan, matched: Matched) -> list[str]:
    """Whether the choice of a checkpoint, or the end of the training, followed from numbers of the removed rows."""
    args = plan.configs.training
    chooses = {
        "load_best_model_at_end": args.load_best_model_at_end,
        "early_stopping_patience": getattr(args, "early_stopping_patience", None) is not None,
        "lr_scheduler_type: reduce_lr_on_plateau": args.lr_scheduler_type == "reduce_lr_on_plateau",
        "lr_scheduler_type: greedy": args.lr_scheduler_type == "greedy",
    }
    chosen = [name for name, on in chooses.items() if on]
    if not chosen:
        return []
    if getattr(args, "epoch_evaluation", None) is not None:
        return [f"{chosen[0]} followed epoch_evaluation, which may have measured the rows"]
    return [f"{chosen[0]} followed an evaluation on the rows"] if matched.rows.get("test") else []
