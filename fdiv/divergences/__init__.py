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
from fdiv.divergences.distances import Distance
from fdiv.divergences.gates import Gate, get_gate
from fdiv.divergences.registry import (
    DistanceSpec,
    DivergenceSpec,
    aliases_of,
    distance_parameters,
    gated,
    get_distance,
    get_divergence,
    list_distances,
    list_divergences,
    parameters_of,
    register_divergence,
)

__all__ = [
    "Distance",
    "DistanceSpec",
    "Divergence",
    "DivergenceSpec",
    "Estimate",
    "Gate",
    "aliases_of",
    "distance_parameters",
    "from_generator",
    "gated",
    "get_distance",
    "get_divergence",
    "get_gate",
    "list_distances",
    "list_divergences",
    "parameters_of",
    "register_divergence",
]
