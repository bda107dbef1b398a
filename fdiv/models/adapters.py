"""PEFT adapters by folder or hub name: their base, and the rows that their tokens need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fdiv.errors import DataError
from fdiv.files import read_json
from fdiv.models.fetch import find_model
from fdiv.sealed import file_digest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["adapter_folder", "base_and_adapter", "check_base", "fit_vocabulary", "with_adapter"]

_SETTINGS = "adapter_config.json"
# What an adapter and its tokenizer are made of; nothing else of a hub repository is downloaded.
_FILES = ("adapter_*", "*.json", "*.jinja", "*.model", "*.txt")


def adapter_folder(name: str) -> Path | None:
    """The folder of an adapter: a local one, or the download of one on the hub; None where `name` is no adapter."""
    local = Path(name)
    if local.exists():
        return local if (local / _SETTINGS).is_file() else None
    if local.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from transformers.utils import cached_file

    try:
        found = cached_file(
            name, _SETTINGS, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        return None if found is None else Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError):
        return None  # not on the hub, or not reachable: the loader that follows gives the reason


def base_and_adapter(model: str, adapter: str | None = None) -> tuple[str, str | None]:
    """The model, and the adapter on it; where `model` is itself an adapter, its base and that adapter.

    Adapters are given as folders, those of the hub as that of their download.

    Raises:
        DataError: an adapter as `model` beside another adapter, or one that does not name its base.
    """
    folder = adapter_folder(model)
    if folder is None:
        own = None if adapter is None else adapter_folder(adapter)
        return model, adapter if own is None else str(own)
    if adapter is not None:
        raise DataError(f"{model} is an adapter, and --adapter {adapter} another: name the base as the model")
    base = read_json(folder / _SETTINGS).get("base_model_name_or_path")
    if not base:
        raise DataError(f"the adapter {model} does not name its base: give the base as the model, it as --adapter")
    if adapter_folder(base) is not None:
        raise DataError(f"the base of the adapter {model} is itself an adapter, {base}: merge that one first")
    return find_model(base) or base, str(folder)


def check_base(adapter: str, model: str) -> None:
    """Refuse an adapter that was trained on another base than `model`.

    The two are one where the adapter names it, by path, hub name or the name of a packaged model, or where the folder
    it names holds the same weights. A base that was moved is taken for the same where the last part of its path is.

    Raises:
        DataError: no adapter, one that does not name its base, or one of another base.
    """
    folder = adapter_folder(adapter)
    if folder is None:
        raise DataError(f"{adapter} is no adapter: a folder with {_SETTINGS}, or a name on the hub, is needed")
    named = read_json(folder / _SETTINGS).get("base_model_name_or_path")
    if not named:
        raise DataError(f"the adapter {adapter} does not name its base: set base_model_name_or_path in {_SETTINGS}")
    ours, theirs = _place(model), _place(named)
    if ours == theirs or _same_weights(ours, theirs):
        return
    if not Path(theirs).is_dir() and Path(ours).name == Path(theirs).name:
        return  # it stood elsewhere when the adapter was trained
    raise DataError(
        f"the adapter {adapter} was trained on {named}, not on {model}: name that base, or where it only moved, "
        f"correct base_model_name_or_path in {folder / _SETTINGS}"
    )


def _place(name: str) -> str:
    found = find_model(name) or name
    return str(Path(found).resolve()) if Path(found).is_dir() else found


def _same_weights(ours: str, theirs: str) -> bool:
    """Whether two folders hold weights of the same bytes."""
    files = [sorted(Path(place).glob("*.safetensors")) if Path(place).is_dir() else [] for place in (ours, theirs)]
    if not files[0] or [file.name for file in files[0]] != [file.name for file in files[1]]:
        return False
    pairs = list(zip(*files, strict=True))
    return all(a.stat().st_size == b.stat().st_size for a, b in pairs) and all(
        file_digest(a) == file_digest(b) for a, b in pairs
    )


def fit_vocabulary(model: PreTrainedModel, adapter: str) -> None:
    """Give `model` as many rows as the adapter was trained with: tokens were added, or padding rows taken away.

    They are read off what the adapter saved of embedding and head, and where it trained single tokens off its
    tokenizer.

    Raises:
        DataError: tokens were added, and neither the model nor the adapter holds their rows of embedding or head.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    saved = _saved_matrices(model, Path(adapter))
    sizes = {size for size, _ in saved.values()}
    wanted = sizes.pop() if len(sizes) == 1 else None
    tokens = _tokenizer_length(Path(adapter))
    if wanted is None and tokens is not None and tokens > rows:
        wanted = tokens
    if wanted is None or wanted == rows:
        return
    if wanted > rows:
        trained = read_json(Path(adapter) / _SETTINGS).get("trainable_token_indices") or ()
        trained = [one for group in trained.values() for one in group] if isinstance(trained, dict) else trained
        missing = [name for name in _matrices(model) if not saved.get(name, (0, False))[1]]
        if missing and not set(range(rows, wanted)) <= set(trained):
            raise DataError(
                f"the adapter {adapter} was trained with {wanted} tokens, its base has rows for {rows}, and the "
                f"adapter does not hold those of {' and '.join(missing)}: save them with it (modules_to_save, or "
                "save_embedding_layers=True)"
            )
    model.resize_token_embeddings(wanted, mean_resizing=False)


def _matrices(model: PreTrainedModel) -> list[str]:
    """Names of the modules with a row per token: the embedding, and the head where it has a matrix of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    return [name for name, module in model.named_modules() if any(module is one for one in own)]


def with_adapter(model: PreTrainedModel, adapter: str, trainable: bool = False) -> PeftModel:
    """`model` with the adapter on it, after `fit_vocabulary`; `trainable`: to go on training it.

    Raises:
        DataError: no adapter can be read there, or it does not fit.
    """
    from peft import PeftModel

    fit_vocabulary(model, adapter)
    try:
        return PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: weights of other shapes
        raise DataError(f"no PEFT adapter can be loaded from {adapter}: {str(error).splitlines()[0]}") from None


def _saved_matrices(model: PreTrainedModel, folder: Path) -> dict[str, tuple[int, bool]]:
    """By module with a row per token: rows as the adapter saved it, and whether it saved them whole or in the shape of
    LoRA's matrices alone."""
    found: dict[str, tuple[int, bool]] = {}
    for key, shape in _shapes(folder).items():
        name = next((name for name in _matrices(model) if f".{name}." in key), None)
        if name is None or len(shape) != 2:
            continue
        if "lora_embedding_A" in key:
            size = shape[1]
        elif ".lora_B." in key:
            size = shape[0]
        elif key.endswith("weight") and "lora_" not in key and "token_adapter" not in key:
            found[name] = (shape[0], True)
            continue
        else:
            continue
        found.setdefault(name, (size, False))
    return found


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of the adapter's tensors."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as saved:
            return {key: tuple(saved.get_slice(key).get_shape()) for key in saved.keys()}
    except (OSError, SafetensorError):
        return {}  # PEFT says what is wrong with the file


def _tokenizer_length(folder: Path) -> int | None:
    """Tokens of the tokenizer beside the adapter; None where there is none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        return len(AutoTokenizer.from_pretrained(folder))
    except (OSError, ValueError):
        return None
