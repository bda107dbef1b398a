"""Loading models and tokenizers, and what is checked before they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fdiv.errors import DataError
from fdiv.files import home_path, one_line
from fdiv.inference.processes import process_state, whole_models
from fdiv.models.adapters import base_and_adapter, with_adapter
from fdiv.models.dtypes import dtype_name
from fdiv.models.fetch import find_model

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "base_and_adapter",
    "check_all_fit",
    "check_causal",
    "check_fits",
    "check_pad_token",
    "check_vocabulary",
    "checked_tokenizer",
    "context_length",
    "context_of",
    "keep_trainable_layout",
    "load_model",
    "load_second_model",
    "load_tokenizer",
    "vocabulary_of",
]


def load_tokenizer(model: str, adapter: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter where there is one, else the model's."""
    from transformers import AutoTokenizer

    model, adapter = base_and_adapter(model, adapter)
    model = find_model(model)
    if adapter is not None and (Path(adapter) / "tokenizer_config.json").exists():
        model = adapter
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise DataError(f"no tokenizer can be loaded from {model}: {str(error).splitlines()[0]}") from None


def checked_tokenizer(
    given: Any, model: Any, *, pad_token: str | None = None, processor: bool = False, **loading: Any
) -> Any:
    """The tokenizer or processor of a trainer: the one given, or the model's own, loaded as TRL would.

    It is refused without a pad token, where TRL takes the end token silently.

    Args:
        given: `processing_class` of the trainer. model: its path or hub name, or the model itself.
        pad_token: from the config. processor: load an `AutoProcessor`. loading: arguments of `from_pretrained`.

    Raises:
        DataError: (a ValueError) nothing given for a model that was built in memory; see `check_pad_token`.
    """
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    if given is None:
        import transformers

        if not name:
            raise DataError(f"pass processing_class: the {type(model).__name__} was built in memory and has no path")
        kind = transformers.AutoProcessor if processor else transformers.AutoTokenizer
        given = kind.from_pretrained(name, **loading)
    check_pad_token(getattr(given, "tokenizer", given), name or type(model).__name__, pad_token)
    return given


def check_pad_token(tokenizer: PreTrainedTokenizerBase, model_name: str, pad_token: str | None = None) -> None:
    """Check that there is a token to pad with: the tokenizer's own, or `pad_token` from the config.

    Raises:
        DataError: (a ValueError) no pad token, or `pad_token` is not in the vocabulary.
    """
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise DataError(f"pad_token {pad_token!r} is not in the vocabulary of the tokenizer of {model_name!r}")
    elif tokenizer.pad_token is None:
        raise DataError(
            f"the tokenizer of {model_name!r} has no pad token: set `pad_token` in the config (or "
            f"`tokenizer.pad_token`) to a token that never occurs inside a text; its special tokens are "
            f"{tokenizer.all_special_tokens}"
        )


def check_causal(model: Any, revision: str | None = None) -> None:
    """Refuse an encoder-decoder model (T5, BART, …): its decoder alone would be trained or scored, as another model.

    Args:
        model: a config, a model (plain or PEFT), or its path or hub name; a name whose config cannot be read passes,
            for the loader that follows gives the reason.
        revision: of a hub name.

    Raises:
        DataError: (a ValueError) the config says `is_encoder_decoder`.
    """
    name, config = model, model
    if isinstance(model, str):
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(find_model(model), revision=revision)
        except (OSError, ValueError, KeyError):
            return
    else:
        config = getattr(model, "config", model)
        name = getattr(config, "_name_or_path", "") or type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise DataError(
            f"{name} is an encoder-decoder model ({getattr(config, 'model_type', '?')}): fdiv trains and scores "
            "causal (decoder-only) language models; name one of those"
        )


def load_model(model: str, adapter: str | None = None, dtype: str = "auto") -> PreTrainedModel:
    """A causal LM in eval mode on this process's device, whole, with a PEFT adapter on it if one is given.

    Args:
        model: local path or hub name; an adapter works too (its base model is loaded).
        adapter: path or hub name of a PEFT adapter.
        dtype: see `dtype_name`; `auto` is float32 on a CPU and the checkpoint's own type elsewhere.
    Raises:
        DataError: another `dtype`; the model or the adapter cannot be loaded, or it is an encoder-decoder model.
    """
    from transformers import AutoModelForCausalLM

    model, adapter = base_and_adapter(model, adapter)
    check_causal(model)
    model, device, dtype = find_model(model), process_state().device, dtype_name(dtype)
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    try:
        with whole_models():
            loaded = AutoModelForCausalLM.from_pretrained(
                model, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
            )
    except (OSError, ValueError) as error:
        raise DataError(f"no causal language model can be loaded from {model}: {str(error).splitlines()[0]}") from None
    keep_trainable_layout(loaded)  # a base in 4 bits has to score as it does in training
    return (loaded if adapter is None else with_adapter(loaded, adapter)).to(device).eval()


def load_second_model(model: str, **loading: Any) -> nn.Module:
    """A further model of a training (a reference, a base), loaded as TRL loads the policy; an adapter works too.

    Args:
        model: path or hub name. loading: arguments of TRL's `create_model_from_path`.

    Raises:
        DataError: see `base_and_adapter` and `with_adapter`.
    """
    from trl.trainer.utils import create_model_from_path

    base, adapter = base_and_adapter(model)
    loaded = create_model_from_path(find_model(base), **loading)
    return loaded if adapter is None else with_adapter(loaded, adapter)


def context_length(model: nn.Module) -> int | None:
    """The most tokens `model` (plain or wrapped) was built for; None where its configuration does not say."""
    while not hasattr(model, "config") and hasattr(model, "module"):  # DDP, DeepSpeed
        model = model.module
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def context_of(model: str) -> int | None:
    """`context_length` of a model by its path or hub name, read from its config without loading it; of an adapter that
    of its base.

    Raises:
        DataError: the config cannot be read, or is that of an encoder-decoder model.
    """
    return getattr(_text_config(model), "max_position_embeddings", None)


def vocabulary_of(model: str) -> int | None:
    """How many token ids a model takes, with errors as in `context_of`; None where its config does not say."""
    return getattr(_text_config(model), "vocab_size", None)


def _text_config(model: str) -> Any:
    from transformers import AutoConfig

    name = find_model(base_and_adapter(model)[0])
    if (home_path(name).is_absolute() or name.startswith(".") or name.count("/") > 1) and not home_path(name).exists():
        raise DataError(f"cannot load the model {model!r}: there is no such folder")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load the model {model!r}: {one_line(error)}") from error
    check_causal(config)
    return config.get_text_config()


def check_fits(tokens: int, model: nn.Module, what: str, remedy: str) -> None:
    """Refuse a text of `tokens` tokens, called `what` in the message, that the model's context does not hold.

    Raises:
        DataError: (a ValueError) it is longer.
    """
    limit = context_length(model)
    if limit is not None and tokens > limit:
        raise DataError(f"{what} has {tokens} tokens, more than the model's context of {limit}: {remedy}")


def check_all_fit(lengths: Iterable[int], model: nn.Module, name: Callable[[int], str], remedy: str) -> None:
    """`check_fits` for the first of many texts that does not fit; `name(number)` is what the message calls it.

    Raises:
        DataError: (a ValueError) one is longer than the model's context.
    """
    limit = context_length(model)
    long = None if limit is None else next((n for n in enumerate(lengths) if n[1] > limit), None)
    if long is not None:
        check_fits(long[1], model, name(long[0]), f"{remedy} {limit}")


def keep_trainable_layout(model: nn.Module) -> None:
    """Keep the 4-bit weights of `model` in the layout that has a backward pass; nothing to do for other models.

    On a CPU with AVX512-BF16, bitsandbytes (0.50.2) rearranges a 4-bit weight at the first forward in evaluation mode
    for a faster product in bfloat16, which has no gradient with respect to its input: an evaluation in the middle of
    training would leave every later gradient wrong, without a word. Call it before the first forward.

    Raises:
        DataError: the weights were rearranged already. They cannot be put back: their scales were rounded.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise DataError(
                "this model in 4 bits has been used for inference on the CPU, and bitsandbytes rearranged its weights "
                f"({name}) into a layout that cannot be trained: load it again, and hand it over unused"
            )
        module.support_avx512bf16_for_cpu = False


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, option: str) -> None:
    """Refuse a model to be scored on the token ids of another model, to which they say something else.

    Special roles may differ, and the other tokenizer may have more tokens. A folder without a tokenizer is taken.

    Args:
        name: the model. tokenizer: of the other model. option: that named the model, for the message.

    Raises:
        DataError: see above.
    """
    try:
        own = load_tokenizer(name).get_vocab()
    except DataError:
        return
    others = tokenizer.get_vocab()
    if any(others.get(token) != number for token, number in own.items()):
        raise DataError(f"{option}: {name} has another vocabulary than the model: name one of the same start")
