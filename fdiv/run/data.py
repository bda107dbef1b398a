"""What a run reads: its datasets, its tokenizer and the outlines of its model, each checked before any long work."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError, RecipeError
from fdiv.files import home_path, one_line
from fdiv.models.dtypes import dtype_name
from fdiv.models.fetch import find_model
from fdiv.named import nearest
from fdiv.recipe.model import Configs, Recipe
from fdiv.rows.checks import check_columns, check_rows, null_fault
from fdiv.rows.loading import loaded, named_dataset
from fdiv.rows.sources import Source, mark_source, source_of
from fdiv.run.check import wanted_splits
from fdiv.run.plan import RunPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_datasets", "load_tokenizer", "model_arguments", "named_dataset", "starting_model"]


def load_datasets(plan: RunPlan) -> dict[str, Any]:
    """The untokenised rows as `{"train": …, "test": …}`; `test` only where the data has that split.

    `dataset_name` is a file (json, jsonl, parquet, csv), a directory of such files or of `save_to_disk`, or a dataset
    on the hub; `datasets:` is TRL's mixture.

    Raises:
        DataError: no dataset named, not found, no such split, no rows, a column missing.
    """
    recipe, configs = plan.recipe, plan.configs
    script = configs.script
    if configs.mixture.datasets:
        from trl import get_dataset

        found, name = loaded(lambda: get_dataset(configs.mixture), "datasets"), "datasets"
    elif script.dataset_name:
        name = script.dataset_name
        found = named_dataset(name, script.dataset_config, script.dataset_streaming)
    else:
        raise DataError(
            f"{recipe.source}: no data; set `dataset_name` (a file, a directory or a hub name), `datasets`, "
            "or a `prepare` block that builds it"
        )
    if not hasattr(found, "keys"):
        found = {script.dataset_train_split: found}
    splits = {"train": script.dataset_train_split, "test": script.dataset_test_split}
    wanted = wanted_splits(recipe, configs)
    result = {}
    for role, split in splits.items():
        if split in found:
            title = f"dataset {name!r}, split {split!r}"
            result[role] = mark_source(found[split], source_of(found[split], title))
            _check_rows(recipe, found[split], title)
        elif role in wanted:
            raise DataError(
                f"dataset {name!r} has no split {split!r} (it has: {', '.join(map(str, found))}); "
                f"set `dataset_{role}_split`" + ("" if role == "train" else ", or `eval_strategy: no`")
            )
    return result


def _check_rows(recipe: Recipe, rows: Any, name: str) -> None:
    """At least one row, and the columns of the method."""
    if hasattr(rows, "__len__") and len(rows) == 0:
        raise DataError(f"{name} is empty; check the file, the split's name and the filters that made it")
    present, method, source = rows.column_names, recipe.method, source_of(rows, name)
    if present is not None:
        needs = ", ".join(method.columns) + (
            f" (and uses {', '.join(method.optional_columns)})" if method.optional_columns else ""
        )
        remedy = f"{recipe.method_name} needs {needs}: rename the columns in the data"
        check_columns(present, Source(name), method.columns, remedy)
    if hasattr(rows, "__len__") and method.columns:
        checks = dict.fromkeys(method.columns, null_fault)
        check_rows(rows.select_columns(list(method.columns)), source, checks, "fill it in or leave the row out")


def load_tokenizer(plan: RunPlan) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, with a pad token: its own, or `pad_token` of the recipe.

    Raises:
        DataError: no model named, model not found, no pad token, one outside the vocabulary.
    """
    from transformers import AutoTokenizer

    from fdiv.models.loading import check_pad_token

    name = find_model(plan.configs.model.model_name_or_path)
    if not name:
        raise DataError(f"{plan.recipe.source}: no model; set `model_name_or_path` (a directory or a hub name)")
    if _is_missing_path(name):
        raise DataError(f"model_name_or_path: no such directory: {name}")
    if (home_path(name) / "adapter_config.json").is_file() and not (home_path(name) / "config.json").is_file():
        raise DataError(
            f"model_name_or_path: {name} is an adapter: `fdiv merge {name} --output DIR` makes a model of it; a "
            "program can go on training it by passing a PeftModel"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=plan.configs.model.model_revision)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load the tokenizer of the model {name!r}: {one_line(error)}") from error
    pad_token = plan.value("pad_token")
    check_pad_token(tokenizer, name, pad_token)
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    return tokenizer


def _is_missing_path(name: str) -> bool:
    path = home_path(name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    return looks_local and not path.exists()


def model_arguments(configs: Configs) -> dict[str, Any]:
    """`model_init_kwargs` as TRL's own scripts put them together, with its keys checked against the model's config.

    Raises:
        DataError: the model's config cannot be read, or is that of an encoder-decoder model.
        RecipeError: a key of `model_init_kwargs` is neither an argument of `from_pretrained` nor an attribute of it.
    """
    from transformers import AutoConfig, PreTrainedModel

    from fdiv.models.loading import check_causal

    model = configs.model
    try:
        config = AutoConfig.from_pretrained(find_model(model.model_name_or_path), revision=model.model_revision)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load the model {model.model_name_or_path!r}: {one_line(error)}") from error
    check_causal(config)
    stated = configs.training.model_init_kwargs or {}
    known = {*inspect.signature(PreTrainedModel.from_pretrained).parameters, *config.to_dict(), *_MODEL_ARGUMENTS}
    for key in stated:
        if key not in known:
            near = nearest(key, known)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"unknown key {key!r} in `model_init_kwargs` for a {type(config).__name__}{hint}")
    arguments = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": None if model.dtype is None else dtype_name(model.dtype),
    }
    return {**arguments, **stated}


def starting_model(plan: RunPlan) -> Any:
    """What the trainer starts from: the model by name, or with `adapter_name_or_path` in memory, the adapter on it.

    Raises:
        DataError: no adapter there, one of another base, or one that cannot be trained.
    """
    from fdiv.models.adapters import check_base, with_adapter

    name, adapter = find_model(plan.configs.model.model_name_or_path), plan.value("adapter_name_or_path")
    if adapter is None:
        return name
    from trl import get_quantization_config
    from trl.trainer.utils import create_model_from_path

    check_base(adapter, name)
    arguments = dict(plan.configs.training.model_init_kwargs or {})
    quantization = get_quantization_config(plan.configs.model)
    if quantization is not None:
        arguments["quantization_config"] = quantization
    model = with_adapter(create_model_from_path(name, **arguments), adapter, trainable=True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DataError(f"the adapter {adapter} has no weights that can be trained")
    return model


# Documented keyword arguments of `PreTrainedModel.from_pretrained` that its signature hides in **kwargs.
_MODEL_ARGUMENTS = (
    "attn_implementation",
    "device_map",
    "dtype",
    "max_memory",
    "offload_folder",
    "quantization_config",
    "subfolder",
    "torch_dtype",
    "use_kernels",
    "variant",
)
