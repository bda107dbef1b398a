"""Loading a model for evaluation, and a fingerprint of its weights that keeps stale results from being reused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fdiv.errors import DataError
from fdiv.eval.processes import process_state
from fdiv.four_bit_weights import keep_trainable_layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_model", "load_tokenizer", "model_fingerprint"]

_SAMPLE = 65_536


def load_tokenizer(model: str, adapter: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside the adapter where there is one, else the model's."""
    from transformers import AutoTokenizer

    if adapter is not None and (Path(adapter) / "tokenizer_config.json").exists():
        model = adapter
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise DataError(f"no tokenizer can be loaded from {model}: {str(error).splitlines()[0]}") from None


def load_model(model: str, adapter: str | None = None, dtype: str = "auto") -> PreTrainedModel:
    """A causal LM in eval mode on this process's device, with a PEFT adapter on it if one is given.

    Args:
        model: local path or hub name; an adapter folder works too (its base model is loaded).
        adapter: path or hub name of a PEFT adapter.
        dtype: `auto` is float32 on a CPU and the checkpoint's own type elsewhere.
    Raises:
        DataError: the model or the adapter cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    device = process_state().device
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise DataError(f"no causal language model can be loaded from {model}: {str(error).splitlines()[0]}") from None
    keep_trainable_layout(loaded)  # a base in 4 bits has to score as it does in training
    if adapter is not None:
        from peft import PeftModel

        try:
            loaded = PeftModel.from_pretrained(loaded, adapter)
        except (OSError, ValueError) as error:
            raise DataError(f"no PEFT adapter can be loaded from {adapter}: {str(error).splitlines()[0]}") from None
    return loaded.to(device).eval()


@torch.no_grad()
def model_fingerprint(model: torch.nn.Module) -> str:
    """Digest of the parameters' names, shapes, types and up to 65,536 evenly spaced values of each.

    It depends on the weights, not on where they lie, so a checkpoint written over an older one is noticed.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLE)
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:24]
