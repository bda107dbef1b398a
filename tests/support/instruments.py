"""What the invariance runs do to a trainer, and count while it trains: where rows are padded, which LM head scores them."""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


def models(trainer: Any) -> list[nn.Module]:
    """The policy and, where there is one, the reference."""
    reference = getattr(trainer, "ref_model", None)
    return [trainer.model] if reference is None else [trainer.model, reference]


@contextmanager
def watched(trainer: Any) -> Iterator[Counter[str]]:
    """Count while the block runs.

    * `forwards`, `rows`: forwards of the policy with gradient, and the rows in them.
    * `padded_left`, `padded_right`: padding tokens in those rows, before the first and after the last token.
    * `layer`: forwards inside the policy's first layer; gradient checkpointing does each twice.
    * `fused`, `plain`: batches scored by TRL's fused head, and from logits, by policy and reference.
    """
    import trl.trainer.utils
    from transformers.modeling_layers import GradientCheckpointingLayer

    import fdiv.models.logprobs

    counts: Counter[str] = Counter()

    def see_batch(_module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            mask = kwargs["attention_mask"]
            counts.update(forwards=1, rows=len(mask), padded_left=int((mask.cumsum(1) == 0).sum()),
                          padded_right=int((mask.flip(1).cumsum(1) == 0).sum()))  # fmt: skip

    def see_layer(_module: nn.Module, _args: tuple) -> None:
        counts["layer"] += 1

    def counted(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    kernel = trl.trainer.utils._ChunkedLogProbFunction
    layer = next(part for part in trainer.model.modules() if isinstance(part, GradientCheckpointingLayer))
    handles = [
        trainer.model.base_model.register_forward_pre_hook(see_batch, with_kwargs=True),
        next(layer.children()).register_forward_pre_hook(see_layer),  # hooks of the layer stay outside the checkpoint
    ]
    plain = fdiv.models.logprobs._reduce_logits
    with (
        mock.patch.object(kernel, "apply", counted("fused", kernel.apply)),
        mock.patch.object(fdiv.models.logprobs, "_reduce_logits", counted("plain", plain)),
    ):
        try:
            yield counts
        finally:
            for handle in handles:
                handle.remove()


def remove_fused_head(trainer: Any) -> None:
    """Score from the models' own logits, by `token_scores(fused=False)`.

    D²O and FLAT come to that path by themselves. The others ask the model for a fused forward, as TRL's trainers do, and
    get the same values from a plain one.
    """
    from fdiv.models.logprobs import fused_head, token_scores

    for model in models(trainer):
        head = fused_head(model)

        def forward(self, *args, fused_lm_head=False, labels=None, _head=head, **kwargs):
            if not fused_lm_head:
                return type(self).forward(self, *args, **kwargs)
            scores = token_scores(
                self, kwargs["input_ids"], kwargs["attention_mask"], labels != -100, outputs=_head.outputs,
                position_ids=kwargs.get("position_ids"), fused=False, temperature=_head.temperature,
            )  # fmt: skip
            return types.SimpleNamespace(**scores._asdict(), aux_loss=None)

        model.forward = types.MethodType(forward, model)
        assert fused_head(model) is None


def move_padding(trainer: Any, side: str) -> None:
    """Every batch that a model scores is padded on `side`, whatever side the trainer chose; scores come back in place."""
    for model in models(trainer):
        shifts: list[Tensor] = []

        def move(_module, args, kwargs, _shifts=shifts):
            mask = kwargs["attention_mask"]
            before, after = ((part.cumsum(1) == 0).sum(1) for part in (mask, mask.flip(1)))
            shift = after if side == "left" else -before
            _shifts.append(shift)
            names = ("input_ids", "attention_mask", "labels", "position_ids")
            return args, kwargs | {name: _rolled(kwargs[name], shift) for name in names if name in kwargs}

        def move_back(_module, _args, output, _shifts=shifts):
            shift = _shifts.pop()
            for name in ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"):
                if getattr(output, name) is not None:
                    setattr(output, name, _rolled(getattr(output, name), -shift))
            return output

        model.register_forward_pre_hook(move, with_kwargs=True)
        model.register_forward_hook(move_back)


def _rolled(rows: Tensor, shift: Tensor) -> Tensor:
    """`rows[B, T]`, each moved right by its `shift[B]`, around the end."""
    columns = torch.arange(rows.size(1), device=rows.device)
    return rows.gather(1, (columns[None] - shift[:, None]) % rows.size(1))


# ------------------------------------------------------------------------------------------------------------- faults


def scale_gradients(trainer: Any, factor: float) -> None:
    """Fault: every micro-batch's gradient times `factor`."""
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss, **kwargs: backward(loss * factor, **kwargs)


def recompute_differently(trainer: Any) -> None:
    """Fault: what gradient checkpointing computes again in the backward pass is half as large again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layer = next(part for part in trainer.model.modules() if isinstance(part, GradientCheckpointingLayer))
    calls = 0

    def larger(_module: nn.Module, _args: tuple, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return output if calls % 2 else (1.5 * output[0], *output[1:])

    next(layer.children()).register_forward_hook(larger)


def damp_logits(trainer: Any) -> None:
    """Fault: the logits are 1 % smaller. The fused head multiplies by the LM head's weight and does not see it."""
    for model in models(trainer):
        model.get_output_embeddings().register_forward_hook(lambda _module, _args, logits: 0.99 * logits)


def forget_positions(trainer: Any) -> None:
    """Fault: the models get no position ids."""
    for model in models(trainer):
        model.register_forward_pre_hook(
            lambda _module, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != "position_ids"}),
            with_kwargs=True,
        )
