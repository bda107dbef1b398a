"""The adapter that holds the unlearning, taken off or turned down: whoever has the files can do so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fdiv.errors import DataError
from fdiv.eval.unlearning.attacks.attacked import Attacked, NotApplicable, Row
from fdiv.eval.unlearning.attacks.copies import copied, has_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["AdapterRemoval", "AdapterScaling"]


def _check_adapter(model: PreTrainedModel) -> None:
    if not has_adapter(model):
        raise NotApplicable("the model has no adapter: its weights themselves were unlearned")


@dataclass(frozen=True)
class AdapterRemoval:
    """The model without its adapter, which is the model before unlearning where the adapter was trained for that."""

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, seed: int
    ) -> Attacked:
        """The base alone. `seed` has no influence."""
        _check_adapter(model)
        twin = copied(model, lambda name: False)
        base = twin.get_base_model() if twin.active_peft_config.is_prompt_learning else twin.unload()
        return Attacked(base.eval(), rows)


@dataclass(frozen=True)
class AdapterScaling:
    """The LoRA term times `factor`: W + factor·α/r·B·A.

    Args:
        factor: 0 takes it off, 1 leaves it; between them the unlearning is turned down, above 1 up.
    """

    factor: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.factor, bool) or not isinstance(self.factor, int | float) or not abs(self.factor) < 1e6:
            raise DataError(f"factor={self.factor!r}: must be a finite number")

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, seed: int
    ) -> Attacked:
        """The model with the scaled adapter. `seed` has no influence."""
        from peft.tuners.lora import LoraLayer

        _check_adapter(model)
        twin, found = copied(model, lambda name: False), False
        for module in twin.modules():
            if isinstance(module, LoraLayer):
                found = True
                # Numbers of the module itself, which is a copy; its weights are shared and stay as they are.
                module.scaling = {name: self.factor * value for name, value in module.scaling.items()}
        if not found:
            raise NotApplicable("the adapter has no LoRA layer: there is no term to scale")
        return Attacked(twin, rows)
