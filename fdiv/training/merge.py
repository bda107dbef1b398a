"""A trained adapter added to the weights of its base: a model of its own, that no longer needs PEFT.

merge_adapter("runs/mine", "runs/mine_merged")
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fdiv.errors import DataError, FdivError
from fdiv.files import flush_tree
from fdiv.inference.tied_weights import adapter_on_tied_weights
from fdiv.models.adapters import adapter_folder, fit_vocabulary
from fdiv.models.dtypes import DTYPES, dtype_name
from fdiv.models.fetch import find_model
from fdiv.models.loading import check_causal, load_tokenizer
from fdiv.training.finite import refuse_broken

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DTYPES", "merge_adapter", "trained_rounding"]


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    quantization: dict[str, Any] | None = None,
) -> Path:
    r"""Write base + adapter (W + α/r·B·A for LoRA) as an ordinary model folder, whole or not at all.

    The folder holds weights in safetensors, config, generation config, the tokenizer (the adapter's where it has one,
    else the base's) and a model card.

    An adapter trained on a 4-bit base corrects that base, rounding errors included. `quantization` therefore rounds
    the base as in training and writes it out again at full width before the adapter is added: the merged model is then
    the trained one. Without it the adapter is added to the base as stored, which differs by those errors. A base
    that is stored quantised is written out at full width in any case.

    Args:
        adapter: folder or hub name of a PEFT adapter.
        output: the folder to write; it must not exist or be empty.
        base: path or hub name of the base; None: the one the adapter names.
        dtype: number type of the merged weights; `auto`: that of the base.
        quantization: arguments of `transformers.BitsAndBytesConfig`, as the adapter was trained with.

    Returns:
        `output`.

    Raises:
        DataError: no adapter at `adapter`, one that is not made of weights (prompt tuning and the like), no base, or a
            base it does not fit; one on the embeddings or the head of a model that ties them; weights of the base, or
            of the two together, that are NaN or infinite.
        FdivError: `output` holds something or cannot be written.
    """
    output = Path(output)
    _check_output(output)
    settings = _adapter_settings(str(adapter))
    adapter = adapter_folder(str(adapter)) or adapter
    base = find_model(base or settings.base_model_name_or_path)
    if not base:
        raise DataError(f"the adapter {adapter} does not name its base model: give it with --base")
    loaded = _load_base(base, dtype, quantization)
    refuse_broken(
        loaded, f"the base model {base}", "choose a number type that holds them with --dtype, or another base"
    )
    was_quantised = getattr(loaded, "hf_quantizer", None) is not None
    if was_quantised:
        loaded = loaded.dequantize(dtype=loaded.dtype)
    model = _with_adapter(loaded, str(adapter), base)
    tied = adapter_on_tied_weights(model)
    if tied is not None:
        raise DataError(
            f"the adapter {adapter} changes {tied}, and {base} shares one matrix between embeddings and head, so no "
            "merged model is the trained one: use it with --adapter, or train without that module in "
            "lora_target_modules and lora_modules_to_save"
        )
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # safe_merge: weights that are not finite
        raise DataError(f"the adapter {adapter} cannot be merged: {_first_line(error)}") from error
    refuse_broken(merged, f"{base} with the adapter {adapter}", "take a wider --dtype, or an earlier checkpoint")
    card = _card(str(adapter), base, settings.peft_type.value, quantization is not None)
    # What transformers undoes to save in the format it read does not exist for weights it read in 4 bits (5.23).
    _publish(merged, load_tokenizer(base, str(adapter)), card, output, save_original_format=not was_quantised)
    return output


def trained_rounding(adapter: str | Path) -> tuple[dict[str, Any], str] | None:
    """How the run that trained `adapter` rounded its base: (`quantization`, `dtype`) for `merge_adapter`.

    Read from `recipe_resolved.yaml`, which `fdiv run` leaves beside its model and above its checkpoints. None: there
    is no such file, or the base was not rounded.
    """
    from fdiv.recipe.document import read_document

    folder = Path(adapter)
    places = [place / "recipe_resolved.yaml" for place in (folder, Path(os.path.realpath(folder)).parent)]
    recipe = next((place for place in places if place.is_file()), None)
    if recipe is None:
        return None
    values = read_document(recipe).values
    dtype = values.get("dtype") or "auto"
    if values.get("load_in_8bit"):
        return {"load_in_8bit": True}, dtype
    if not values.get("load_in_4bit"):
        return None
    # TRL's defaults, where the file was written by hand
    kind, nested = values.get("bnb_4bit_quant_type", "nf4"), values.get("use_bnb_nested_quant", False)
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}, dtype


def _check_output(output: Path) -> None:
    if output.is_file():
        raise FdivError(f"--output {output} is a file: choose a folder that does not exist yet")
    if output.is_dir() and any(output.iterdir()):
        raise FdivError(f"--output {output} is not empty: choose a folder that does not exist yet")


def _adapter_settings(adapter: str) -> Any:
    from peft import PeftConfig

    folder = Path(adapter)
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        held = "a whole model, which needs no merging" if (folder / "config.json").is_file() else "no adapter"
        raise DataError(f"{adapter} holds {held}: there is no adapter_config.json in it")
    try:
        settings = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise DataError(f"no PEFT adapter can be loaded from {adapter}: {_first_line(error)}") from error
    except KeyError as error:
        raise DataError(f"no PEFT adapter can be loaded from {adapter}: PEFT knows no type {error}") from error
    if settings.is_prompt_learning:
        raise DataError(
            f"{adapter} is a {settings.peft_type.value} adapter: it adds virtual tokens and no weights, so there is "
            "nothing to merge; use it with --adapter"
        )
    return settings


def _load_base(base: str, dtype: str, quantization: dict[str, Any] | None) -> PreTrainedModel:
    """The base, rounded as `quantization` says."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = dtype_name(dtype)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    check_causal(base)
    options = {} if quantization is None else {"quantization_config": BitsAndBytesConfig(**quantization)}
    try:
        return AutoModelForCausalLM.from_pretrained(base, dtype=wanted, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise DataError(
            f"the base model {base} cannot be loaded: {_first_line(error)}; if it has moved, name it with --base"
        ) from error


def _with_adapter(model: PreTrainedModel, adapter: str, base: str) -> Any:
    from peft import PeftModel

    try:
        fit_vocabulary(model, adapter)
        return PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:  # RuntimeError: of other shapes
        reason = _first_line(error)
        raise DataError(f"the adapter {adapter} does not fit the base model {base}: {reason}") from error


def _publish(model: PreTrainedModel, tokenizer: Any, card: str, output: Path, **saving: Any) -> None:
    """Write aside, flush and rename, so that `output` is either whole or not there."""
    staged = output.with_name(f".{output.name}.part")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        model.save_pretrained(staged, **saving)
        tokenizer.save_pretrained(staged)
        (staged / "README.md").write_text(card, encoding="utf-8")
        flush_tree(staged)
        os.replace(staged, output)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        shutil.rmtree(staged, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise FdivError(f"--output {output} cannot be written: {reason}") from error


def _card(adapter: str, base: str, kind: str, rounded: bool) -> str:
    rounding = ", rounded to fewer bits as in training and written out again," if rounded else ""
    return (
        "---\nlibrary_name: transformers\ntags: [fdiv, merged]\n---\n\n"
        f"The {kind} adapter `{adapter}` added to the weights of `{base}`{rounding} by `fdiv merge`.\n"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
