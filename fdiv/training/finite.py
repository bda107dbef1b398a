"""Weights that are NaN or infinite are noticed before anything is made of them; what a stopped run leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdiv.errors import CheckpointError, DataError, NonFiniteLossError
from fdiv.training.checkpoints import newest_checkpoint, read_marker

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["broken_weight", "broken_weights_stop", "check_weights", "refuse_broken", "what_stands"]


def broken_weight(model: nn.Module, *, trained: bool = True) -> str | None:
    """The name of the first weight with a NaN or an infinite entry, on this process; None where all are finite.

    Args:
        model: parameters that ZeRO-3 or FSDP shard are looked at by their part on this process.
        trained: look only at the weights that are trained.
    """
    for name, weight in model.named_parameters():
        if (weight.requires_grad or not trained) and not _finite(weight):
            return name
    return None


def _finite(weight: Tensor) -> bool:
    import torch

    part = getattr(weight, "ds_tensor", weight).detach()  # ZeRO-3
    part = part.to_local() if hasattr(part, "to_local") else part  # FSDP
    return not part.is_floating_point() or bool(torch.isfinite(part).all())


def check_weights(trainer: Any) -> None:
    """Stop where a trained weight is NaN or infinite; called on all processes.

    Raises:
        NonFiniteLossError: on all processes, when a weight of any of them is not finite.
    """
    import torch

    name = broken_weight(trainer.model)
    broken = torch.tensor([float(name is not None)], device=trainer.args.device)
    if trainer.accelerator.reduce(broken).item() > 0:
        raise NonFiniteLossError(broken_weights_stop(trainer, name))


def refuse_broken(model: nn.Module, name: str, remedy: str) -> None:
    """Refuse a model that is to be written, or made something of, where any of its weights is NaN or infinite.

    Raises:
        DataError: it is; the message names the weight.
    """
    weight = broken_weight(model, trained=False)
    if weight is not None:
        raise DataError(f"{name} has weights that are NaN or infinite ({weight}): {remedy}")


def broken_weights_stop(trainer: Any, name: str | None) -> str:
    """What the stop on weights that are not finite says. `name`: of one of them; None for one of another process."""
    step = trainer.state.global_step
    culprit = "the optimizer made" if step else "the model was loaded with"
    state = "NaN or infinite" if step else "that are NaN or infinite"
    return (
        f"step {step}: {culprit} weights {state} ({name or 'on another process'}); they are not saved. "
        f"Remedy: a lower learning_rate. {what_stands(trainer)}"
    )


def what_stands(trainer: Any) -> str:
    """Which complete checkpoint of this run there is, and how to go on: the end of a stop's message. Reads only."""
    from fdiv.files import plain

    try:
        checkpoint, _ = newest_checkpoint(Path(trainer.args.output_dir))
    except CheckpointError:
        checkpoint = None
    if checkpoint is not None:
        stored = read_marker(checkpoint)["identity"]
        current = trainer.json_identity()
        if stored == current or getattr(trainer, "force_resume", False):
            return f"{checkpoint} is complete: go on from there with resume_from_checkpoint: true"
    reason = " (save_strategy: no)" if str(plain(trainer.args.save_strategy)) == "no" else ""
    return f"No checkpoint was written{reason}: start again"
