"""The divergence registry: D_f(P‖Q) = E_Q[f(t)], t = P/Q, P the trained policy, Q the reference or target.

>>> import torch
>>> from fdiv.divergences import get_divergence
>>> js = get_divergence("jensen_shannon")
>>> js.derivative(torch.tensor([0.0, 100.0]))
tensor([0.0000, 0.6931])

Imports torch and nothing else. Scales and other projects' names: docs/divergences.md.
"""

from fdiv.divergences.base import Divergence, Estimate
from fdiv.divergences.derived import from_generator
from fdiv.divergences.registry import (
    DivergenceSpec,
    aliases_of,
    get_divergence,
    list_divergences,
    parameters_of,
    register_divergence,
)

__all__ = [
    "Divergence",
    "DivergenceSpec",
    "Estimate",
    "aliases_of",
    "from_generator",
    "get_divergence",
    "list_divergences",
    "parameters_of",
    "register_divergence",
]
