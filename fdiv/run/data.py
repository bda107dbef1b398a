"""What a run reads: its datasets, its tokenizer and the outlines of its model, each checked before any long work."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError, RecipeError
from fdiv.files import DATA_FORMATS, home_path, one_line, read_json_lines
from fdiv.models.dtypes import dtype_name
from fdiv.models.fetch import find_model
from fdiv.named import nearest
from fdiv.recipe.model import Configs, Recipe
from fdiv.run.plan import RunPlan
from fdiv.sealed import check_listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_datasets", "load_tokenizer", "model_arguments", "named_dataset"]


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

        found, name = _loaded(lambda: get_dataset(configs.mixture), "datasets"), "datasets"
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
    # An unlearning run that evaluates on a benchmark after each epoch (`epoch_evaluation`) needs no rows for it.
    own_rows = getattr(configs.training, "epoch_evaluation", None) is None
    needs_test = (configs.training.eval_strategy != "no" and own_rows) or "dataset_test_split" in recipe.stated
    result = {}
    for role, split in splits.items():
        if split in found:
            result[role] = found[split]
            _check_rows(recipe, found[split], f"dataset {name!r}, split {split!r}")
        elif role == "train" or needs_test:
            raise DataError(
                f"dataset {name!r} has no split {split!r} (it has: {', '.join(map(str, found))}); "
                f"set `dataset_{role}_split`" + ("" if role == "train" else ", or `eval_strategy: no`")
            )
    return result


def named_dataset(name: str, config: str | None = None, streaming: bool = False) -> Any:
    """What `dataset_name` names: its splits, or one table where it has none.

    Raises:
        DataError: a file of another kind, or one that changed since we wrote it; no such file or directory, no such
            dataset, no table in it.
    """
    import datasets

    path = home_path(name)
    options = {"name": config, "streaming": streaming}
    if path.is_file():
        if path.suffix not in DATA_FORMATS:
            raise DataError(f"dataset_name {path}: a file must end in {', '.join(DATA_FORMATS)}")
        check_listed(path)
        loader = DATA_FORMATS[path.suffix]
        options = {"data_files": str(path), "streaming": streaming}
        return _loaded(lambda: datasets.load_dataset(loader, **options), str(path), quiet=True)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _loaded(lambda: datasets.load_from_disk(str(path)), str(path), quiet=True)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or path.suffix in DATA_FORMATS
    if not path.exists() and (looks_local or name.count("/") > 1):
        raise DataError(f"dataset_name: no such file or directory: {name}")
    return _loaded(lambda: datasets.load_dataset(name, **options), name, quiet=path.exists())


def _loaded(load: Any, name: str, quiet: bool = False) -> Any:
    """Call a loader of `datasets`; its errors become one line. `quiet`: no bars, for files of this machine."""
    import datasets

    hidden = datasets.utils.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        return load()
    except (
        IndexError,
        StopIteration,
    ) as error:  # datasets 5.2: load_from_disk without rows, a json file without lines
        raise DataError(f"the dataset {name!r} is empty or damaged: no table could be read from it") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        path = home_path(name)
        if path.is_file():
            if DATA_FORMATS.get(path.suffix) == "json":
                read_json_lines(path)  # names the line that is no JSON
            raise DataError(f"cannot read the rows of {name}: {one_line(error)}") from error
        remedy = "give a local path, or a dataset of the hub (needs a connection, HF_HUB_OFFLINE unset)"
        raise DataError(f"cannot load the dataset {name!r}: {one_line(error)}; {remedy}") from error
    finally:
        if quiet and not hidden:
            datasets.enable_progress_bars()


def _check_rows(recipe: Recipe, rows: Any, name: str) -> None:
    """At least one row, and the columns of the method."""
    if hasattr(rows, "__len__") and len(rows) == 0:
        raise DataError(f"{name} is empty; check the file, the split's name and the filters that made it")
    present = rows.column_names
    method = recipe.method
    missing = [column for column in method.columns if present is not None and column not in present]
    if missing:
        needs = ", ".join(method.columns) + (
            f" (and uses {', '.join(method.optional_columns)})" if method.optional_columns else ""
        )
        raise DataError(
            f"{name} has no column {missing[0]!r}; it has: {', '.join(present)}; {recipe.method_name} needs {needs}: "
            "rename the columns in the data"
        )
    if hasattr(rows, "__len__"):
        for column in method.columns:
            empty = next((number for number, value in enumerate(rows[column]) if value is None), None)
            if empty is not None:
                raise DataError(f"{name}, row {empty}: column {column!r} is null; fill it in or leave the row out")


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
