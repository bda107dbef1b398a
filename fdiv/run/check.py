"""What is checked of a plan beyond what its configs refuse when they are made: the parts that the run would build from
several keys, or by a name, after data and model have been loaded. Nothing is loaded or written here."""

from __future__ import annotations

import inspect
import json
import math
import re
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

from fdiv.bounds import fault
from fdiv.bounds.inherited import INHERITED
from fdiv.catalog import REWARDS, build_reward
from fdiv.errors import FdivError, OptionError, RecipeError
from fdiv.files import DATA_FORMATS, home_path, one_line, read_json
from fdiv.named import hint, is_path, shown, split_spec
from fdiv.recipe.model import Block, Configs, Recipe
from fdiv.recipe.schema import Key, coerce
from fdiv.recipe.sweep import Screen, SweepBlock, staged
from fdiv.report.metrics import GLOSSARY, describe
from fdiv.run.batch_log import EXCLUDED

__all__ = ["check_configs", "check_screen_names", "check_sweep_names", "wanted_splits"]

# What a library raises for a value that it cannot use.
_REFUSALS = (
    ValueError, TypeError, ImportError, KeyError, AttributeError, ArithmeticError, RuntimeError, AssertionError
)  # fmt: skip


def check_configs(recipe: Recipe, configs: Configs, evaluations: Sequence[tuple[Block, Any]] = ()) -> None:
    """Make what the run would make of its options: adapter, optimizer, learning rates, reward, …

    Raises:
        RecipeError: one of them cannot be made; the message names the key and its place.
    """
    for key, made in _PARTS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made(recipe, configs)
        except (*_REFUSALS, FdivError) as error:
            stated = getattr(error, "key", None)
            where = recipe.place_of(OptionError("", stated or key), {})
            said = one_line(error) or type(error).__name__
            raise RecipeError(f"{where}: {said if stated else f'{key}: {said}'}") from error
    for block, evaluation in evaluations:
        _check_evaluation(recipe, block, evaluation)


def _adapter(recipe: Recipe, configs: Configs) -> None:
    from trl import get_peft_config, get_quantization_config

    get_peft_config(configs.model)
    get_quantization_config(configs.model)
    model = configs.model
    bits = "load_in_4bit" if model.load_in_4bit else "load_in_8bit" if model.load_in_8bit else None
    given = (home_path(model.model_name_or_path or ".") / "adapter_config.json").is_file()
    if bits is not None and not model.use_peft and not given:
        raise OptionError(
            f"{bits}: true without an adapter: weights of {bits[8]} bits are not trained themselves; set `use_peft: "
            "true`",
            bits,
        )


def _attention(recipe: Recipe, configs: Configs) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = configs.model.attn_implementation
    known = ["eager", *(known for known in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in known)]
    if name is not None and "/" not in name and name not in known:
        raise OptionError(
            f"attn_implementation={shown(name)}: {hint(name, known)} A kernel of the hub has a / in its name",
            "attn_implementation",
        )


def _rates(recipe: Recipe, configs: Configs) -> None:
    """The optimizer, and the learning rates of its first steps."""
    import torch
    from transformers import Trainer, get_scheduler

    args = configs.training
    weights = [torch.nn.Parameter(torch.zeros(1))]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(weights, lr=args.learning_rate)
    if args.optim_target_modules is None:
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
            if kind.__module__.startswith("torch.optim"):
                optimizer = kind(weights, **options)
        except _REFUSALS as error:
            key = "optim_args" if args.optim_args else "optim"
            raise OptionError(f"{key}={shown(getattr(args, key))}: {one_line(error)}", key) from error
    try:
        scheduler = get_scheduler(
            args.lr_scheduler_type, optimizer, args.get_warmup_steps(10), 10, args.lr_scheduler_kwargs or {}
        )
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            rates = [optimizer.param_groups[0]["initial_lr"] * scheduler.lr_lambdas[0](step) for step in range(10)]
            if not all(math.isfinite(rate) for rate in rates):
                raise ValueError(f"the learning rates of the first steps are {rates[:3]}")
    except _REFUSALS as error:
        key = "lr_scheduler_kwargs" if args.lr_scheduler_kwargs else "lr_scheduler_type"
        stated = shown(getattr(args, key))
        raise OptionError(f"{key}={stated}: the schedule {args.lr_scheduler_type} {one_line(error)}", key) from error


def _reporting(recipe: Recipe, configs: Configs) -> None:
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for name in configs.training.report_to or ():
        if name not in available:
            raise OptionError(f"report_to={shown(name)}: the package for it is not installed; install it", "report_to")


def _compiler(recipe: Recipe, configs: Configs) -> None:
    args = configs.training
    if args.torch_compile and args.torch_compile_backend is not None:
        import torch._dynamo

        known = torch._dynamo.list_backends(exclude_tags=())
        if args.torch_compile_backend not in known:
            said = f"{shown(args.torch_compile_backend)}: {hint(args.torch_compile_backend, known)}"
            raise OptionError(f"torch_compile_backend={said}", "torch_compile_backend")


def _sampling(recipe: Recipe, configs: Configs) -> None:
    """The generation config of a method that samples."""
    args = configs.training
    if not hasattr(args, "generation_kwargs"):
        return
    from transformers import GenerationConfig

    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    keys = {name: getattr(args, name) for name in names if hasattr(args, name)}
    for name, value in (args.generation_kwargs or {}).items():
        wrong = fault(value, (float, int, NoneType), INHERITED[name]) if name in INHERITED else None
        if wrong:
            raise OptionError(f"generation_kwargs: {name}={shown(value)}: must be {wrong}", "generation_kwargs")
        if name not in GenerationConfig().to_dict():
            said = hint(name, GenerationConfig().to_dict())
            raise OptionError(f"generation_kwargs: no key {shown(name)}; {said}", "generation_kwargs")
    made = {**keys, "max_new_tokens": args.max_completion_length, "do_sample": True, **(args.generation_kwargs or {})}
    GenerationConfig(**made).validate(strict=True)


def _reward(recipe: Recipe, configs: Configs) -> None:
    spec = getattr(configs.training, "reward", None)
    if spec is not None:
        _build_once(json.dumps(spec, sort_keys=True, default=str))


@cache
def _build_once(spec: str) -> None:
    """Build a reward of this package, its paths left open (a dry run needs no data); of another look at the keys."""
    name, keys = split_spec(json.loads(spec), "reward")
    made = REWARDS.find(name, what="reward")
    target = made.__init__ if inspect.isclass(made) else made
    hints = typing.get_type_hints(target)
    for key, value in keys.items():
        if key in hints:
            coerce(value, Key(key, hints[key], None), f"reward {name!r}")
    if not is_path(name):
        paths = {key for key, hint in hints.items() if Path in (hint, *typing.get_args(hint))}
        build_reward({"name": name, **{key: "." if key in paths else value for key, value in keys.items()}})


def wanted_splits(recipe: Recipe, configs: Configs) -> dict[str, str]:
    """Role → split of the data that the run cannot do without: `train`, and `test` where something needs it."""
    # A run that evaluates on a benchmark while it trains (`epoch_evaluation`) needs no rows for it.
    own_rows = getattr(configs.training, "epoch_evaluation", None) is None
    wanted = {"train": configs.script.dataset_train_split}
    if (configs.training.eval_strategy != "no" and own_rows) or "dataset_test_split" in recipe.stated:
        wanted["test"] = configs.script.dataset_test_split
    return wanted


def _splits(recipe: Recipe, configs: Configs) -> None:
    """The names of splits, where data on this machine say by their names alone which there are."""
    name = configs.script.dataset_name
    there = None if not name or configs.mixture.datasets else _named_splits(home_path(name))
    for role, split in wanted_splits(recipe, configs).items():
        if there is not None and split not in there:
            raise OptionError(
                f"dataset {name!r} has no split {shown(split)} (it has: {', '.join(sorted(there))}); set "
                f"`dataset_{role}_split`" + ("" if role == "train" else ", or `eval_strategy: no`"),
                f"dataset_{role}_split",
            )


def _named_splits(path: Path) -> set[str] | None:
    """The splits of a file, of a folder of `save_to_disk`, or of a folder of `train.jsonl`, `test.jsonl` …; None where
    that takes reading the data."""
    if path.is_file():
        return {"train"}
    if (path / "dataset_dict.json").is_file():
        return set(read_json(path / "dataset_dict.json").get("splits", ()))
    if not path.is_dir() or (path / "state.json").is_file():
        return None
    stems = {file.stem for file in path.iterdir() if file.suffix in DATA_FORMATS}
    return stems if stems and stems <= {"train", "test", "validation"} else None


def _left_out(recipe: Recipe, configs: Configs) -> None:
    """Whether the method can leave rows out, and where they are named."""
    named = recipe.stated.get("exclude_rows")
    if named is None:
        return
    reason = recipe.method.why_not_exact(configs.training)
    if reason is None and configs.training.world_size > 1:
        reason = f"{configs.training.world_size} processes share a batch, and one without rows would wait; use one"
    if reason is not None:
        raise OptionError(f"exclude_rows: {reason}", "exclude_rows")
    written_by_the_run = home_path(named).name == EXCLUDED
    if not (named.startswith("$") or written_by_the_run or home_path(named).is_file()):
        raise OptionError(f"exclude_rows: no such file: {named}", "exclude_rows")


_PARTS: tuple[tuple[str, Callable[[Recipe, Configs], None]], ...] = (
    ("use_peft", _adapter),
    ("attn_implementation", _attention),
    ("optim", _rates),
    ("report_to", _reporting),
    ("torch_compile_backend", _compiler),
    ("generation_kwargs", _sampling),
    ("reward", _reward),
    ("dataset_train_split", _splits),
    ("exclude_rows", _left_out),
)


# ---------------------------------------------------------------- evaluations
_ROLES = ("train", "test")
_MEASURES = ("wall_seconds", "train_seconds", "steps", "seed", "beta")  # of result.json, beside metrics


def _check_evaluation(recipe: Recipe, block: Block, evaluation: Any) -> None:
    """The names of splits and metrics in one `eval:` block."""
    if not _of_this_package(block):  # its metrics and splits are its own
        return
    if block.name == "preferences" and evaluation.split not in _ROLES:
        raise RecipeError(
            f"{block.where}: eval ({block.name}): no split {shown(evaluation.split)}: rows are called train and test "
            "here; `dataset_train_split` and `dataset_test_split` say which splits of the data they are"
        )
    for key, names in (("require", block.require), ("summary", block.summary)):
        _check_metric_names(names, recipe.method_name, f"{block.where}: `eval.{key}`")


def _of_this_package(block: Block) -> bool:
    return block.config.__module__.startswith("fdiv.")


def check_sweep_names(block: SweepBlock, recipe: Recipe) -> None:
    """Refuse a metric of a `sweep:` block that this package does not have, where all that measures is of it.

    Raises:
        RecipeError: with the nearest one.
    """
    known = all(map(_of_this_package, recipe.evaluations)) and not is_path(recipe.method_name)
    if not known or block.arms:  # rows of other methods have metrics of their own
        return
    parts = {"metrics": list((block.metrics or {}).values()), "table": list(block.table)}
    if block.screen is not None:
        parts |= {"screen.metric": [block.screen.metric], "screen.at_least": list(block.screen.at_least or {})}
    for part, metrics in parts.items():
        where = recipe.place_of(OptionError("", f"sweep.{part}"), {})
        _check_metric_names(metrics, recipe.method_name, f"{where}: `sweep.{part}`")


def check_screen_names(screen: Screen, recipe: Recipe) -> None:
    """Refuse a number of an evaluation that a screening run cannot have; what a training logs shows in the first run.

    Args:
        screen: of the sweep. recipe: of one of its screening runs.

    Raises:
        RecipeError: the run has no evaluation, or this package has no such metric.
    """
    for part, names in (("metric", [screen.metric]), ("at_least", list(screen.at_least or {}))):
        for name in names:
            stage, _, plain = staged(name).partition("/")
            if stage not in ("before", "after"):
                continue
            where = f"{recipe.place_of(OptionError('', f'sweep.screen.{part}'), {})}: `sweep.screen.{part}`"
            if not recipe.evaluations:
                raise RecipeError(
                    f"{where}: {shown(name)} is a number of an evaluation, and the screening runs have no `eval:`; "
                    "give them one, or choose by a number of the training, such as train/best_metric"
                )
            if all(map(_of_this_package, recipe.evaluations)):
                prefixes = "|".join(re.escape(block.name) for block in recipe.evaluations)
                own = re.sub(rf"^({prefixes})_(\d+_)?", "", plain)  # the name of a second evaluation's metric
                if describe(own, recipe.method_name) is None:
                    _check_metric_names([plain], recipe.method_name, where)


def _check_metric_names(names: Mapping[str, Any] | Sequence[str], method: str | None, where: str) -> None:
    """Refuse a name that no metric of this package has.

    Raises:
        RecipeError: with the nearest one.
    """
    known = [metric.name for part in GLOSSARY.values() for metric in part]
    for name in names:
        if describe(str(name), method) is None and name not in _MEASURES:
            raise RecipeError(f"{where}: no metric {shown(name)}; {hint(name, known)}")
