"""A student of some of its teacher's layers: the same embeddings, head and width, evenly spread layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["kept_layers", "write_thinned"]


def write_thinned(teacher: str, layers: int, folder: Path) -> None:
    """Write `layers` of the layers of `teacher` (path, hub name or packaged model) and its tokenizer into `folder`.

    Raises:
        ValueError: the teacher has fewer layers, keeps them in another place than `model.layers`, or has layers
            without `self_attn`.
    """
    from torch.nn import ModuleList
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fdiv.models.fetch import find_model

    source = find_model(teacher)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    whole = getattr(model.base_model, "layers", None)
    if whole is None:
        raise ValueError(f"prepare.teacher: {type(model).__name__} has no layers under `model.layers`")
    without = [number for number, layer in enumerate(whole) if not hasattr(layer, "self_attn")]
    if without:
        raise ValueError(
            f"prepare.teacher: layer {without[0]} of {type(model).__name__} has no `self_attn`, so its place in the "
            "cache cannot be set; take a teacher whose layers all have one"
        )
    kept = kept_layers(len(whole), layers)
    model.base_model.layers = ModuleList([whole[number] for number in kept])
    _thin_config(model.config.get_text_config(), kept)
    for place, layer in enumerate(model.base_model.layers):
        layer.self_attn.layer_idx = place
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def _thin_config(config: Any, kept: Sequence[int]) -> None:
    """Keep the layers `kept` in the config: their number, and every list that has an entry for each layer.

    Such a list says what each layer is: `layer_types`, SmolLM3's `no_rope_layers` (which of them see positions). Token
    ids and names of classes may be as many as the layers by chance, and stay.
    """
    whole = config.num_hidden_layers
    config.num_hidden_layers = len(kept)
    for name, entries in list(vars(config).items()):
        by_chance = name.endswith(("token_id", "token_ids")) or name == "architectures"
        if isinstance(entries, (list, tuple)) and len(entries) == whole and not by_chance:
            setattr(config, name, [entries[number] for number in kept])


def kept_layers(of: int, count: int) -> list[int]:
    """`count` layer numbers of `of`, evenly spread, the first and (from two on) the last among them.

    Raises:
        ValueError: more are asked for than there are.
    """
    if count > of:
        raise ValueError(f"prepare.layers={count}: the teacher has {of}")
    return [0] if count == 1 else [round(place * (of - 1) / (count - 1)) for place in range(count)]
