"""A student of some of its teacher's layers: the same embeddings, head and width, evenly spread layers."""

from __future__ import annotations

from pathlib import Path

__all__ = ["kept_layers", "write_thinned"]


def write_thinned(teacher: str, layers: int, folder: Path) -> None:
    """Write `layers` of the layers of `teacher` (path, hub name or packaged model) and its tokenizer into `folder`.

    Raises:
        ValueError: the teacher has fewer layers, or keeps them in another place than `model.layers`.
    """
    from torch.nn import ModuleList
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fdiv.models.fetch import find_model

    source = find_model(teacher)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    whole = getattr(model.base_model, "layers", None)
    if whole is None:
        raise ValueError(f"prepare.teacher: {type(model).__name__} has no layers under `model.layers`")
    kept = kept_layers(len(whole), layers)
    model.base_model.layers = ModuleList([whole[number] for number in kept])
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = [model.config.layer_types[number] for number in kept]
    for place, layer in enumerate(model.base_model.layers):
        layer.self_attn.layer_idx = place
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def kept_layers(of: int, count: int) -> list[int]:
    """`count` layer numbers of `of`, evenly spread, the first and (from two on) the last among them.

    Raises:
        ValueError: more are asked for than there are.
    """
    if count > of:
        raise ValueError(f"prepare.layers={count}: the teacher has {of}")
    return [0] if count == 1 else [round(place * (of - 1) / (count - 1)) for place in range(count)]
