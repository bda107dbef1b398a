"""One run of a recipe: prepare → data and tokenizer → evaluate → train → evaluate → save → report.

from fdiv.recipe import load_recipe
from fdiv.run import run_recipe

result = run_recipe(load_recipe("tiny/f_dpo", ["--output_dir", "runs/mine"]))
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fdiv.errors import FdivError, RecipeError, TerminatedError
from fdiv.files import one_line, plain, read_json, write_json
from fdiv.models.fetch import find_model
from fdiv.provenance import command_line, environment
from fdiv.recipe.dump import resolved_yaml
from fdiv.recipe.model import Block, Configs, Recipe
from fdiv.run.data import load_datasets, load_tokenizer, model_arguments
from fdiv.run.directory import RunDirectory
from fdiv.terminal import info

__all__ = ["check_blocks", "prepare", "run_recipe"]


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
    """
    from accelerate import PartialState
    from transformers import set_seed

    from fdiv.training.signals import StopOnSigterm

    started = time.perf_counter()
    configs = recipe.configs()
    check_blocks(recipe)
    find_model(configs.model.model_name_or_path)  # one that was not fetched ends the run here
    directory = RunDirectory(recipe.output_dir)
    resume = recipe.value("resume_from_checkpoint") or None
    directory.check(recipe.value("overwrite_output_dir", False), resume)
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        directory.open()
    state.wait_for_everyone()

    set_seed(configs.training.seed)
    if recipe.prepare:
        with state.main_process_first():
            recipe, configs = prepare(recipe, prepared or directory.path / "prepared")
    command = command or command_line()
    record = environment(command, configs.training.seed)
    trainer, evaluations, bar = _trainer(recipe, configs, directory, record)
    state.wait_for_everyone()
    if state.is_main_process and not resume:
        directory.clear()  # no sooner: data and model of the new run can be used
    state.wait_for_everyone()
    trainer.force_resume = recipe.value("force_resume", False)
    training_started = time.perf_counter()
    try:
        with StopOnSigterm() as sigterm:
            trainer.add_callback(sigterm)
            trainer.train(resume_from_checkpoint=resume)
    finally:
        bar.close()
    if sigterm.stopped_at is not None:
        raise TerminatedError(
            f"terminated (SIGTERM): stopped after step {sigterm.stopped_at}, whose checkpoint is in {directory.path}; "
            "go on with --resume_from_checkpoint true"
        )
    training_seconds = time.perf_counter() - training_started - evaluations.seconds
    if evaluations.evaluations:
        evaluations.measure("after")
    _save(recipe, configs, trainer)
    result = _result(recipe, trainer, evaluations)
    result["train_seconds"] = round(training_seconds, 3)
    result["wall_seconds"] = round(time.perf_counter() - started, 3)
    state.wait_for_everyone()
    if state.is_main_process:
        write_json(directory.path / "environment.json", {**record, "wall_seconds": result["wall_seconds"]})
        _append_results(directory.path / "README.md", recipe, result, command)
        write_json(directory.path / "result.json", result)
        if recipe.report:
            from fdiv.report.page import write_report

            info(f"report: {write_report([directory.path], directory.path / 'report.html', recipe.report.title)}")
    state.wait_for_everyone()
    return result


def check_blocks(recipe: Recipe) -> None:
    """Construct the dataclasses of `prepare:` and `eval:`, so that a value they refuse ends the run here."""
    variables = {**({"prepare": "prepared"} if recipe.prepare else {}), **recipe.variables}
    for block in (recipe.prepare, *recipe.evaluations):
        if block is not None:
            block.instance(variables)


def prepare(recipe: Recipe, root: Path) -> tuple[Recipe, Configs]:
    """Build what the `prepare:` block describes, unless the same block was built under `root` before.

    Returns:
        The recipe with the keys the builder settled (`recipe.filled`; a stated key wins) and its configs.
    """
    block = recipe.prepare
    builder = block.instance()
    identity = json.dumps([block.name, plain(builder)], sort_keys=True)
    folder = root / f"{block.name.replace(':', '.')}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    marker = folder / "recipe_keys.json"
    if not marker.is_file():
        if folder.exists():
            shutil.rmtree(folder)  # a build that was cut off: the marker is written last
        folder.mkdir(parents=True)
        info(f"prepare: building {block.name} in {folder}")
        try:
            keys = builder.build(folder)
        except (ValueError, FileNotFoundError) as error:
            raise RecipeError(f"{block.where}: prepare ({block.name}): {one_line(error)}") from error
        relative = {key: _relative(value, folder) for key, value in keys.items()}
        write_json(marker, {"prepare": json.loads(identity), "keys": relative})
    else:
        info(f"prepare: {block.name} was built before: {folder}")
    keys = {key: _absolute(value, folder) for key, value in read_json(marker)["keys"].items()}
    recipe.filled = keys
    recipe.variables = {"prepare": str(folder)}
    return recipe, recipe.configs()


_HERE = "${prepare}"


def _relative(value: Any, folder: Path) -> Any:
    """A path inside the build without the place of the build, which may move."""
    if isinstance(value, (str, Path)) and str(value).startswith(str(folder)):
        return _HERE + str(value)[len(str(folder)) :]
    return value


def _absolute(value: Any, folder: Path) -> Any:
    return str(folder) + value[len(_HERE) :] if isinstance(value, str) and value.startswith(_HERE) else value


def _trainer(
    recipe: Recipe, configs: Configs, directory: RunDirectory, record: Mapping[str, Any]
) -> tuple[Any, Any, Any]:
    """The trainer, its evaluations and its progress bar; everything it reads is checked first."""
    from transformers import ProgressCallback
    from trl import get_peft_config, get_quantization_config

    from fdiv.run.callbacks import MetricsFile, ProgressBar, RecordFiles
    from fdiv.run.evaluation import Evaluations

    training = configs.training
    tokenizer = load_tokenizer(recipe, configs)
    training.model_init_kwargs = model_arguments(configs)
    datasets = load_datasets(recipe, configs)
    instances = [(block, block.instance(recipe.variables)) for block in recipe.evaluations]
    evaluations, bar = Evaluations(instances, datasets, directory.path), ProgressBar()
    trainer_class = recipe.method
    try:
        trainer = trainer_class(
            model=find_model(configs.model.model_name_or_path),
            args=training,
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("test") if training.eval_strategy != "no" else None,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(configs.model),
            peft_config=get_peft_config(configs.model),
            callbacks=[
                RecordFiles(directory, resolved_yaml(recipe), record),
                evaluations,
                MetricsFile(directory.path / "metrics.jsonl"),
            ],
        )
    except FdivError:
        raise
    except ValueError as error:
        raise FdivError(f"{recipe.source}: {trainer_class.__name__}: {one_line(error)}") from error
    if trainer.pop_callback(ProgressCallback) is not None:  # absent where disable_tqdm is set
        trainer.add_callback(bar)
    evaluations.trainer = trainer
    return trainer, evaluations, bar


def _save(recipe: Recipe, configs: Configs, trainer: Any) -> None:
    """The model, its tokenizer and its card, in `output_dir`; and on the hub where the recipe asks for it."""
    dataset = configs.script.dataset_name
    dataset = None if dataset is None or Path(dataset).exists() else dataset  # a card names datasets of the hub
    try:
        trainer.save_model(str(recipe.output_dir))
        trainer.create_model_card(model_name=recipe.output_dir.name, dataset_name=dataset)
    except (OSError, SafetensorError) as error:
        raise FdivError(
            f"the trained model could not be written to {recipe.output_dir}: {one_line(error)}; make room, and go on "
            "from the last checkpoint with --resume_from_checkpoint true"
        ) from error
    if configs.training.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset)


def _result(recipe: Recipe, trainer: Any, evaluations: Any) -> dict[str, Any]:
    """The flat summary: settings, then `before/…`, `after/…`, `train/…` (last logged values)."""
    from fdiv.run.evaluation import unmet_requirements

    before, after = evaluations.results.get("before", {}), evaluations.results.get("after", {})
    last: dict[str, Any] = {}
    for entry in trainer.state.log_history:
        last.update(entry)
    args = trainer.args
    result = {
        "recipe": recipe.name,
        "method": recipe.method_name,
        "divergence": plain(getattr(args, "divergence", None)),  # None for a method without one
        "beta": getattr(args, "beta", None),
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "unmet_requirements": unmet_requirements(evaluations.evaluations, before, after),
        "summary_metrics": _summary_metrics(evaluations.evaluations, after),
        "notes": evaluations.notes,
    }
    result.update({f"before/{name}": value for name, value in before.items()})
    result.update({f"after/{name}": value for name, value in after.items()})
    result.update({f"train/{name}": value for name, value in last.items() if isinstance(value, (int, float))})
    return result


def _summary_metrics(evaluations: list[tuple[Block, Any]], after: Mapping[str, Any]) -> list[str]:
    """The metrics of the end-of-run table: those an evaluation puts forward, all of them where it does not say."""
    chosen: list[str] = []
    for block, evaluation in evaluations:
        # `summary_metrics` is an optional class attribute, see fdiv.catalog.EVALUATIONS
        chosen += block.summary or getattr(evaluation, "summary_metrics", ())
    return [name for name in dict.fromkeys(chosen) if name in after] or list(after)


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
    card.write_text(text.rstrip("\n") + "\n" + "\n".join(lines), encoding="utf-8")
