"""One run of a recipe: prepare → data and tokenizer → evaluate → train → save → evaluate → report.

from fdiv.recipe import load_recipe
from fdiv.run import run_recipe

result = run_recipe(load_recipe("tiny/f_dpo", ["--output_dir", "runs/mine"]))
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fdiv.errors import FdivError, TerminatedError
from fdiv.files import one_line, plain, write_text
from fdiv.inference.encoding import encoding_stamp
from fdiv.interrupts import Sigterm, held_back, stoppable
from fdiv.models.fetch import find_model
from fdiv.models.reference import REFERENCE_ADAPTER
from fdiv.provenance import command_line, environment
from fdiv.recipe.dump import resolved_yaml
from fdiv.recipe.model import Recipe
from fdiv.rows.report import RowReport, records_of
from fdiv.run.data import load_datasets, load_tokenizer, model_arguments, starting_model
from fdiv.run.directory import AFTER_TRAINING, RunDirectory, raise_on_all
from fdiv.run.plan import RunPlan, plan_run, prepare
from fdiv.sealed import write_record
from fdiv.terminal import info
from fdiv.training.checkpoints import STAGING

__all__ = ["measure_plan", "run_plan", "run_recipe"]


def run_recipe(recipe: Recipe, command: str | None = None, prepared: Path | None = None) -> dict[str, Any]:
    """Run a recipe to its end and return its flat summary, the content of `result.json`.

    Args:
        recipe: A checked recipe.
        command: The command line to record; that of this process when None.
        prepared: Where `prepare:` builds and looks for earlier builds; `OUTPUT_DIR/prepared` when None.

    Raises:
        RecipeError: a config or block refuses its values.
        DataError: data, model or tokenizer cannot be used.
        FdivError: the output directory holds something that must not be touched; a non-finite loss.
        TerminatedError: SIGTERM; the message says how to go on. During training a checkpoint is saved first.
    """
    return run_plan(plan_run(recipe), command, prepared)


def run_plan(plan: RunPlan, command: str | None = None, prepared: Path | None = None) -> dict[str, Any]:
    """`run_recipe` of a recipe that has been resolved.

    Args:
        plan: the resolved run. command: the command line, for `environment.json`. prepared: as of `run_recipe`.
    """
    progress = _Progress(plan.directory, bool(plan.value("resume_from_checkpoint")))
    with stoppable(progress.how_to_go_on):
        find_model(plan.configs.model.model_name_or_path)  # one that was not fetched ends the run here
        resume = plan.value("resume_from_checkpoint") or None
        with plan.directory.claimed(plan.value("overwrite_output_dir", False), resume):
            return _run(plan, command, prepared, progress)


@dataclass
class _Progress:
    """How far a run has come, for the line that a signal ends it with."""

    directory: RunDirectory
    resumed: bool = False
    training: bool = False
    saved: bool = False

    def how_to_go_on(self) -> str:
        """What stands on disk and the next command."""
        path = self.directory.path
        if self.saved and self.directory.finished:
            return f"the run in {path} is finished; its page is made again with `fdiv report {path}`"
        if self.saved:
            return f"the trained model is saved in {path}, its evaluation is not finished; {AFTER_TRAINING}"
        if (self.training or self.resumed) and self.directory.checkpoints():
            return f"{path} holds checkpoints; go on with --resume_from_checkpoint true"
        return "no checkpoint was written; run the same command again"


def _run(plan: RunPlan, command: str | None, prepared: Path | None, progress: _Progress) -> dict[str, Any]:
    from accelerate import PartialState

    started = time.perf_counter()
    directory = plan.directory
    resume = plan.value("resume_from_checkpoint") or None
    state = PartialState()
    command = command or command_line()
    plan = _opened(plan, prepared)
    record = environment(command, plan.configs.training.seed)
    trainer, evaluations, bar = _trainer(plan, record)
    state.wait_for_everyone()
    if state.is_main_process and not resume:
        directory.clear()  # no sooner: data and model of the new run can be used
    state.wait_for_everyone()
    trainer.force_resume = plan.value("force_resume", False)
    training_started = time.perf_counter()
    trainer.clocks |= {  # checkpoints hold them, so a resumed run counts the seconds of its earlier parts
        "train_seconds": lambda: time.perf_counter() - training_started - evaluations.seconds,
        "wall_seconds": lambda: time.perf_counter() - started,
    }
    progress.training = True
    _train(plan, trainer, bar, resume, progress)
    training_seconds = trainer.run_seconds("train_seconds")
    try:
        if evaluations.evaluations:
            evaluations.measure("after")
    except Exception:
        info(f"the trained model is saved in {directory.path}; its evaluation failed; {AFTER_TRAINING}")
        raise
    if plan.configs.training.push_to_hub:
        trainer.push_to_hub(dataset_name=_hub_dataset(plan))
    result = _result(plan, trainer, evaluations)
    result["train_seconds"] = round(training_seconds, 3)
    result["wall_seconds"] = round(trainer.run_seconds("wall_seconds"), 3)
    state.wait_for_everyone()
    if state.is_main_process:
        write_record(directory.path / "environment.json", {**record, "wall_seconds": result["wall_seconds"]})
        _append_results(directory.path / "README.md", plan.recipe, result, command)
        directory.finish(result)
        if plan.recipe.report:
            from fdiv.report import write_report

            title = plan.recipe.report.title
            info(f"report: {write_report([directory.path], directory.path / 'report.html', title)}")
    state.wait_for_everyone()
    return result


def _train(plan: RunPlan, trainer: Any, bar: Any, resume: bool | str | None, progress: _Progress) -> None:
    """Train and save the model, before anything else can fail: it may be the only copy of the weights.

    Raises:
        TerminatedError: SIGTERM in a step, whose checkpoint is saved.
        Sigterm: it came after the last step; the model is saved.
    """
    from fdiv.training.signals import StopOnSigterm

    with StopOnSigterm() as sigterm:
        try:
            trainer.add_callback(sigterm)
            trainer.train(resume_from_checkpoint=resume)
        finally:
            bar.close()
        if sigterm.stopped_at is not None:
            raise TerminatedError(
                f"terminated (SIGTERM): stopped after step {sigterm.stopped_at}, whose checkpoint is in "
                f"{plan.output_dir}; go on with --resume_from_checkpoint true"
            )
        if trainer.state.global_step == 0 and not sigterm.requested:
            raise FdivError(
                f"{plan.recipe.source}: no optimizer step was made, so nothing was trained: the data holds fewer rows "
                "than one batch takes; lower per_device_train_batch_size, or set dataloader_drop_last: false"
            )
        with held_back():
            _save(plan, trainer)
            progress.saved = True
    if sigterm.requested:
        raise Sigterm


def _opened(plan: RunPlan, prepared: Path | None) -> RunPlan:
    """Seed the random streams, and run the `prepare:` step; on all processes."""
    from accelerate import PartialState
    from transformers import set_seed

    from fdiv.inference.processes import main_process_first

    state = PartialState()
    state.wait_for_everyone()
    set_seed(plan.configs.training.seed)
    root = prepared or plan.output_dir / "prepared"
    made, failed = None, None
    with main_process_first():
        if state.is_main_process:
            try:
                made = prepare(plan, root)
            except FdivError as error:
                failed = error
    raise_on_all(failed)
    return prepare(plan, root) if made is None else made  # the others find what was built


def _trainer(plan: RunPlan, record: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """The trainer, its evaluations and its progress bar; everything it reads is checked first."""
    from transformers import ProgressCallback
    from trl import get_peft_config, get_quantization_config

    from fdiv.run.callbacks import MetricsFile, ProgressBar, RecordFiles
    from fdiv.run.evaluation import Evaluations
    from fdiv.run.rows import open_rows

    tokenizer = load_tokenizer(plan)
    plan = plan.with_keys(model_init_kwargs=model_arguments(plan.configs))
    configs, directory = plan.configs, plan.directory
    datasets = load_datasets(plan)
    rows = open_rows(plan, datasets)
    kept = datasets if rows is None else rows.kept(datasets)
    evaluations, bar = Evaluations(plan.evaluations, kept, directory.path), ProgressBar()
    trainer_class, model = plan.recipe.method, starting_model(plan)
    try:
        trainer = trainer_class(
            model=model,
            args=configs.training,
            train_dataset=datasets["train"],
            eval_dataset=kept.get("test") if configs.training.eval_strategy != "no" else None,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(configs.model) if isinstance(model, str) else None,
            peft_config=get_peft_config(configs.model) if isinstance(model, str) else None,
            callbacks=[
                RecordFiles(directory, resolved_yaml(plan.recipe, plan.settled), record),
                evaluations,
                MetricsFile(directory.path / "metrics.jsonl"),
            ],
        )
    except FdivError:
        raise
    except ValueError as error:
        raise FdivError(f"{plan.recipe.source}: {trainer_class.__name__}: {one_line(error)}") from error
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise FdivError(f"{plan.recipe.source}: every weight is frozen, so nothing would be trained; free some")
    if rows is not None:
        _watch_rows(plan, rows, trainer, record)
    if trainer.pop_callback(ProgressCallback) is not None:  # absent where disable_tqdm is set
        trainer.add_callback(bar)
    evaluations.trainer = trainer
    return trainer, evaluations, bar


def _watch_rows(plan: RunPlan, rows: Any, trainer: Any, record: Mapping[str, Any]) -> None:
    """Tell the trainer which rows are left out, and keep a log of those in each step."""
    from fdiv.run.rows import RowFiles
    from fdiv.training.places import DATA_ENTRIES

    trainer.places = rows.places(trainer)
    files = RowFiles(plan, rows, trainer, record)
    trainer.add_callback(files)
    if plan.replay is not None:
        plan.replay.begin(files.part["model"])
        trainer.known_differences, trainer.exact_resume = DATA_ENTRIES, True


def _save(plan: RunPlan, trainer: Any) -> None:
    """The model, its tokenizer and its card, in `output_dir`."""
    from fdiv.training.finite import what_stands

    aside = plan.output_dir / STAGING / "model"  # a process that is killed leaves no half of a model in `output_dir`
    try:
        trainer.save_model(str(aside))
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            # The adapter as it was: a reference while training, and after unlearning what must not be passed on.
            shutil.rmtree(aside / REFERENCE_ADAPTER, ignore_errors=True)
            for entry in sorted(aside.iterdir(), key=lambda entry: entry.suffix == ".safetensors"):  # weights last
                target = plan.output_dir / entry.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(entry, target)
            shutil.rmtree(plan.output_dir / STAGING, ignore_errors=True)
        trainer.create_model_card(model_name=plan.output_dir.name, dataset_name=_hub_dataset(plan))
    except (OSError, SafetensorError) as error:
        raise FdivError(
            f"the trained model could not be written to {plan.output_dir}: {one_line(error)}. Make room. "
            f"{what_stands(trainer)}"
        ) from error


def _hub_dataset(plan: RunPlan) -> str | None:
    """The dataset as a model card names it: one of the hub."""
    dataset = plan.configs.script.dataset_name
    return None if dataset is None or Path(dataset).exists() else dataset


def _result(plan: RunPlan, trainer: Any, evaluations: Any) -> dict[str, Any]:
    """The flat summary: settings, then `before/…`, `after/…`, `train/…` (last logged values)."""
    from fdiv.run.evaluation import summary_metrics, unmet_requirements

    blocks, names = evaluations.evaluations, evaluations.names
    before, after = evaluations.results.get("before", {}), evaluations.results.get("after", {})
    last: dict[str, Any] = {}
    for entry in trainer.state.log_history:
        last.update(entry)
    args = trainer.args
    result = {
        "recipe": plan.recipe.name,
        "method": plan.recipe.method_name,
        "divergence": plain(getattr(args, "divergence", None)),  # None for a method without one
        "beta": trainer.objective_settings().get("beta"),  # None for a method without one
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "unmet_requirements": unmet_requirements(blocks, before, after, plan.recipe.method_name, names),
        "summary_metrics": summary_metrics(blocks, after, names.get("after", ())),
        "notes": {**getattr(trainer, "notes", {}), **evaluations.notes},
        "encoding": _encoding(trainer, evaluations.datasets["train"]),
        "rows": records_of([*getattr(trainer, "row_reports", ()), *evaluations.row_reports]),
    }
    result.update({f"before/{name}": value for name, value in before.items()})
    result.update({f"after/{name}": value for name, value in after.items()})
    result.update({f"train/{name}": value for name, value in last.items() if isinstance(value, (int, float))})
    return result | _late(trainer.state.log_history) | _best(trainer.state)


def _encoding(trainer: Any, rows: Any) -> dict[str, Any] | None:
    """The stamp of how the run's rows were encoded; None for a method whose config does not say."""
    args = trainer.args
    if not hasattr(args, "encoding"):
        return None
    row = next(iter(rows))
    prompt = row.get("prompt", row.get("chosen"))
    chat = isinstance(prompt, list) or (prompt is None and "question" in row and args.prompt_format is None)
    plain = {"prompt_format": args.prompt_format} if getattr(args, "prompt_format", None) is not None else {}
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    return encoding_stamp(tokenizer, args.encoding(), chat=chat, **plain)


def _late(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`late/NAME`: the mean over the last fifth of the logs that hold it; one batch alone is noise."""
    names = dict.fromkeys(name for entry in history for name in entry)
    found = {}
    for name in names:
        values = [entry[name] for entry in history if isinstance(entry.get(name), (int, float))]
        if len(values) > 1:
            found[f"late/{name}"] = statistics.fmean(values[-max(1, len(values) // 5) :])
    return found


def _best(state: Any) -> dict[str, float]:
    """`train/best_metric` and `train/best_epoch`, where the run kept the best of its checkpoints."""
    if state.best_metric is None:
        return {}
    epochs = [e["epoch"] for e in state.log_history if e.get("step") == state.best_global_step and "epoch" in e]
    return {"train/best_metric": state.best_metric, **({"train/best_epoch": epochs[0]} if epochs else {})}


def measure_plan(plan: RunPlan, command: str | None = None, prepared: Path | None = None) -> dict[str, Any]:
    """The evaluations of a plan on its model as loaded, without training; `result.json` has them under `after/`.

    Raises:
        DataError: data, model or tokenizer cannot be used.
    """
    with plan.directory.claimed(plan.value("overwrite_output_dir", False), None):
        return _measure(plan, command, prepared)


def _measure(plan: RunPlan, command: str | None, prepared: Path | None) -> dict[str, Any]:
    import torch
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM

    from fdiv.evaluation import EvalContext
    from fdiv.inference.processes import whole_models
    from fdiv.run.evaluation import add_metrics, summary_metrics

    started = time.perf_counter()
    state = PartialState()
    plan = _opened(plan, prepared)
    directory, args = plan.directory, plan.configs.training
    record = environment(command or command_line(), args.seed)
    tokenizer, datasets = load_tokenizer(plan), load_datasets(plan)
    name = find_model(plan.configs.model.model_name_or_path)
    with whole_models():
        model = AutoModelForCausalLM.from_pretrained(name, **model_arguments(plan.configs)).to(state.device).eval()
    found: dict[str, Any] = {}
    names: list[dict[str, str]] = []
    notes: dict[str, str] = {}
    reports: list[RowReport] = []
    folder = directory.path / "eval" / "standalone"
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for block, evaluation in plan.evaluations:
            context = EvalContext(args, folder, seed=args.seed, stage="standalone", row_reports=reports)
            values = dict(evaluation.evaluate(model, tokenizer, datasets, context))
            notes |= values.pop("notes", {})
            names.append(add_metrics(found, values, block.name))
    result = {
        "recipe": plan.recipe.name, "method": None, "divergence": None, "beta": None, "seed": args.seed, "steps": 0,
        "unmet_requirements": [], "summary_metrics": summary_metrics(plan.evaluations, found, names), "notes": notes,
        "rows": records_of(reports),
        **{f"after/{name}": value for name, value in found.items()},
        "wall_seconds": round(time.perf_counter() - started, 3),
    }  # fmt: skip
    if state.is_main_process:
        directory.write("recipe_resolved.yaml", resolved_yaml(plan.recipe, plan.settled))
        write_record(directory.path / "environment.json", record)
        directory.finish(result)
    state.wait_for_everyone()
    return result


def _append_results(card: Path, recipe: Recipe, result: Mapping[str, Any], command: str) -> None:
    """Add what was measured, and the command, to the model card."""
    from fdiv.terminal import number

    rows = [
        f"| {name} | {number(result.get(f'before/{name}'))} | {number(result.get(f'after/{name}'))} |"
        for name in result["summary_metrics"]
    ]
    table = ["", "## Measured", "", "| metric | before | after |", "|---|---|---|", *rows] if rows else []
    lines = [*table, "", "## Reproduce", "", f"`{command}` (recipe: `recipe_resolved.yaml`)", ""]
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {recipe.name}\n"
    write_text(card, text.rstrip("\n") + "\n" + "\n".join(lines))
