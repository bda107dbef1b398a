"""The frozen reference π_ref: a copy, a model of its own, or the policy with its adapter off.

* `Reference`: for a trainer. It hides which of them it is and how it is placed under DDP, DeepSpeed and FSDP, and
  scores batches.
* `reference_of`: for code that is passed a policy and perhaps a reference (evaluations).
* `reference_for_trl`: what a TRL trainer that makes its own reference is to be passed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from fdiv.errors import DataError
from fdiv.models.loading import keep_trainable_layout
from fdiv.models.logprobs import TokenScores, enable_fused_head, token_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "REFERENCE_ADAPTER",
    "FrozenReference",
    "Reference",
    "frozen_copy",
    "placed",
    "reference_for_trl",
    "reference_of",
]

REFERENCE_ADAPTER = "ref"
"""Name of the frozen copy of an adapter: the one TRL uses, so that its own tools find it."""


class Reference:
    """The policy as it was when this object was made, or another model.

    Make it when the trainer's model exists and no step was taken. Without `model`: for a PEFT policy the base with the
    adapter off, or a frozen copy of the adapter where `copy_adapter` says so (training continues one, or `refresh`
    will be called); else a frozen copy of the weights, loaded again from their path where they are sharded by ZeRO-3
    or spread by a device map.

    Args:
        trainer: a TRL trainer; its model, accelerator and arguments are used.
        model: the reference, when it is another model.
        copy_adapter: keep a frozen copy of the policy's adapter.
        temperature: the logits of a reference of its own weights are divided by it.

    Raises:
        DataError: the weights are sharded and there is no path to load them again from.
    """

    def __init__(
        self,
        trainer: Any,
        model: PreTrainedModel | None = None,
        *,
        copy_adapter: bool = False,
        temperature: float = 1.0,
    ) -> None:
        self.trainer, self.model, self.adapter = trainer, model, None
        if model is None and is_peft_model(trainer.model):
            if copy_adapter:
                self.adapter = REFERENCE_ADAPTER
                trainer.model.add_adapter(REFERENCE_ADAPTER, trainer.model.peft_config[trainer.model.active_adapter])
                self._copy_adapter()
            return
        if model is None:
            self.model = _second_model(trainer)
        keep_trainable_layout(self.model)  # it has to round as the policy does
        enable_fused_head(self.model, temperature=temperature)
        self.model.requires_grad_(False).eval()
        self.model = placed(trainer, self.model)

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The model to call, without gradient and, for an adapter, with the right one switched on."""
        from trl.models.utils import disable_gradient_checkpointing
        from trl.trainer.utils import use_adapter

        policy = self.trainer.model
        with torch.no_grad(), self.trainer.accelerator.autocast():
            if self.model is not None:
                yield self.model
                return
            unwrapped = self.trainer.accelerator.unwrap_model(policy)
            kwargs = self.trainer.args.gradient_checkpointing_kwargs
            with disable_gradient_checkpointing(policy, kwargs), use_adapter(unwrapped, adapter_name=self.adapter):
                yield policy

    def score(self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> TokenScores:
        """`fdiv.models.logprobs.token_scores` under the reference, without gradient."""
        with self.active() as model:
            return token_scores(model, input_ids, attention_mask, completion_mask)

    @property
    def is_sharded(self) -> bool:
        """Whether ZeRO-3 or FSDP hold the weights in parts, so that they cannot be refreshed."""
        plugin = self.trainer.args.deepspeed_plugin
        return self.trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    def refresh(self, share: float = 1.0) -> None:
        """Make the reference the current policy, or move it by `share` of the way; call it on every process.

        Raises:
            DataError: weights sharded by ZeRO-3 or FSDP, or an adapter reference without a copy to write into.
        """
        trainer = self.trainer
        if self.is_sharded:
            raise DataError(
                "a reference cannot be refreshed while weights are sharded (ZeRO-3, FSDP): use DDP or ZeRO-2"
            )
        if self.model is None:
            if self.adapter is None:
                raise DataError("this reference is the base with the adapter off: make it with copy_adapter=True")
            self._copy_adapter(share)
            return
        from trl.trainer.callbacks import SyncRefModelCallback

        unwrap = trainer.accelerator.unwrap_model
        SyncRefModelCallback.sync_target_model(unwrap(trainer.model), unwrap(self.model), share)

    def save(self, directory: Path) -> None:
        """Write a refreshed copy of the weights; an adapter is in the trainer's own checkpoint already."""
        if self.model is not None and self.trainer.accelerator.is_main_process:
            self.trainer.accelerator.unwrap_model(self.model).save_pretrained(directory)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote.

        Raises:
            DataError: there is nothing at `directory`.
        """
        if self.model is None:
            return
        path = Path(directory) / "model.safetensors"
        if not path.is_file():
            raise DataError(f"{path} does not exist: the checkpoint holds no reference, start training again")
        from safetensors.torch import load_model

        load_model(self.trainer.accelerator.unwrap_model(self.model), path)

    @torch.no_grad()
    def _copy_adapter(self, share: float = 1.0) -> None:
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        active = policy.active_adapter
        parameters = dict(policy.named_parameters())
        for key, parameter in parameters.items():
            # The adapter's name is a part of the key, and its last part for embeddings, IA3 and trainable tokens.
            parts = key.split(".")
            if active not in parts:
                continue
            copied = parameters[".".join(REFERENCE_ADAPTER if part == active else part for part in parts)]
            copied.mul_(1.0 - share).add_(parameter, alpha=share) if share < 1.0 else copied.copy_(parameter)
            copied.requires_grad_(False)


def _second_model(trainer: Any) -> PreTrainedModel:
    """A frozen copy in memory; loaded from its path where the weights are sharded or spread."""
    policy, args = trainer.model, trainer.args
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if not zero3 and getattr(policy, "hf_device_map", None) is None:
        return frozen_copy(policy)
    from trl.trainer.utils import create_model_from_path

    path = getattr(policy.config, "_name_or_path", "")
    if not path:
        raise DataError(
            f"the {type(policy).__name__} was built in memory and is spread over devices or sharded by ZeRO-3, so no "
            "reference can be made from it: save it and pass its path"
        )
    return create_model_from_path(path, **{"dtype": policy.dtype, **(args.model_init_kwargs or {})})


def placed(trainer: Any, model: nn.Module) -> nn.Module:
    """`model` placed and sharded as the trainer's backend wants it."""
    from trl.models import prepare_deepspeed, prepare_fsdp

    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy of `model` in evaluation mode, for use as the reference; a fused LM head is not copied along."""
    reference = copy.deepcopy(model)
    # A patched forward is an instance attribute whose closure still calls the original model's forward.
    vars(reference).pop("forward", None)
    return reference.requires_grad_(False).eval()


FrozenReference = Reference  # its name in release 0.1


@contextmanager
def reference_of(
    policy: nn.Module, reference: nn.Module | None = None, *, at_start: bool = False
) -> Iterator[nn.Module | None]:
    """The reference to call: `reference` where there is one, else what the policy itself holds of it.

    Args:
        policy: a PEFT policy is its own reference with the adapter off, or with the frozen copy of its adapter on.
        reference: a model of its own.
        at_start: no step was taken yet, so any policy is its own reference.

    Yields:
        The model, or None where there is no reference.
    """
    if reference is not None:
        yield reference
    elif hasattr(policy, "peft_config"):
        from trl.trainer.utils import use_adapter

        with use_adapter(policy, REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None):
            yield policy
    else:
        yield policy if at_start else None


def reference_for_trl(model: nn.Module, args: Any) -> nn.Module | None:
    """A frozen copy of a model object, so that π_ref is the policy as passed, wherever it came from.

    None where TRL has a better way (an adapter to switch off, precomputed log-probabilities) or must load a second one
    itself (weights spread by a device map, or sharded by ZeRO-3).

    Raises:
        DataError: TRL must load it again, and there is no path to load it from.
    """
    if is_peft_model(model) or args.precompute_ref_log_probs:
        return None
    spread = getattr(model, "hf_device_map", None) is not None
    sharded = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if not spread and not sharded:
        return frozen_copy(model)
    if not getattr(model.config, "_name_or_path", ""):
        raise DataError(
            f"the {type(model).__name__} was built in memory and is spread over devices or sharded by ZeRO-3, so no "
            "reference can be made from it: save it and pass its path, or pass ref_model"
        )
    return None
