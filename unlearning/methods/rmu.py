"""RMU (Li et al. 2024): mean token ‖h_t − c·u‖²/D on forget answers, ‖h_t − h_t^ref‖²/D on retain answers, one layer.

u is a random unit vector, uniform on [0, 1)^D and normed; the layers above the steered one are frozen.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fdiv.training.config import option
from fdiv.unlearning.config import UnlearningConfig, retain_option
from fdiv.unlearning.losses import nll, rmu
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer


@dataclass
class RMUConfig(UnlearningConfig):
    r"""Configuration of `RMUTrainer`: the shared keys and those below.

    Parameters above the layer get no gradient and are frozen, so that weight decay does not move them.
    """

    layer: int = option(
        7, "Layer whose output is steered, from 0; not the last one, whose output is only seen normed", least=0
    )
    steering_coefficient: float = option(
        2.0, "c, the length of the target vector (2 for TOFU in open-unlearning, 6.5 for WMDP)", above=0
    )
    trainable: str | None = option(
        None,
        "Regular expression over the names of the parameters of layers 0 … `layer` to train (the paper: "
        r"`layers\.(5|6|7)\.mlp\.down_proj`); not set: all of them",
    )
    retain_term: str = retain_option(
        "activations", "none", why="The layers above the steered one are frozen, so only its activations can be held"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precompute_reference:
            raise ValueError("precompute_reference keeps log-probabilities only, and RMU compares activations")


class RMUTrainer(UnlearningTrainer):
    """Trains `rmu`; u is sampled from the seed once, uniform on [0, 1)^D and normed, the same on all processes."""

    config_class = RMUConfig
    title = "steer one layer's activations to a random vector"
    paper = "arXiv:2403.03218"

    def __init__(self, model, args: RMUConfig | None = None, **kwargs) -> None:
        super().__init__(model, args, **kwargs)
        config = self.model.config.get_text_config()
        if self.args.layer >= config.num_hidden_layers - 1:
            raise ValueError(
                f"layer={self.args.layer}: the model has {config.num_hidden_layers} layers and the last one's output "
                f"is not seen before the final norm; use 0 … {config.num_hidden_layers - 2}"
            )
        self.freeze_untrained(self.args, self.model)
        generator = torch.Generator().manual_seed(self.args.seed)
        direction = torch.rand(config.hidden_size, generator=generator)
        self.target = self.args.steering_coefficient * direction / direction.norm()

    @classmethod
    def freeze_untrained(cls, args: RMUConfig, model: torch.nn.Module) -> None:
        """Everything above the steered layer, and what does not match `trainable`."""
        _freeze_outside(model, args.layer, args.trainable)

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        """Mean squared error to c·u over the forget answer's tokens."""
        forget = scores["forget"]
        return rmu(forget.hidden, self.target.to(forget.hidden.device), forget.mask)

    def retain_loss(self, retain: RoleScores) -> Tensor:
        """Mean squared error to the reference's activations over the retain answer's tokens."""
        return rmu(retain.hidden, retain.reference.hidden, retain.mask)

    def method_columns(self, scores: dict[str, RoleScores]) -> dict[str, Tensor]:
        """The forget answer's NLL, which the loss does not look at."""
        return {"nll/forget": nll(scores["forget"].log_probs, scores["forget"].mask)}


def _freeze_outside(model: torch.nn.Module, layer: int, pattern: str | None) -> None:
    """Leave trainable what is trainable, lies in layers 0 … `layer` (or below them) and matches `pattern`.

    Raises:
        ValueError: nothing is left.
    """
    kept = []
    embedding = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    for name, parameter in model.named_parameters():
        numbers = re.findall(r"\.(?:layers|h|blocks)\.(\d+)\.", name)
        inside = id(parameter) in embedding or any(int(number) <= layer for number in numbers)
        if inside and parameter.requires_grad and (pattern is None or re.search(pattern, name)):
            kept.append(name)
        else:
            parameter.requires_grad_(False)
    if not kept:
        raise ValueError(f"no trainable parameter in layers 0 … {layer} matches trainable={pattern!r}: change it")
