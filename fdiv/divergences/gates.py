"""Gates of `gated`: the weight γ ∈ [0, 1] of its forward member, read off student and teacher token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fdiv.named import Table, bind_arguments, build_own, is_path, own_object, shown

__all__ = ["GATES", "EntropyGap", "Gate", "HeadTail", "TeacherEntropy", "get_gate"]


class Gate:
    """γ of each pair of distributions; a subclass of your own gives `__call__`, and `name` and `parameters`."""

    name: str = ""
    parameters: Mapping[str, float] = MappingProxyType({})

    @property
    def label(self) -> str:
        """Short text for tables: the name, with the parameters in brackets."""
        inside = ",".join(f"{value:g}" for value in self.parameters.values())
        return f"{self.name or type(self).__name__}({inside})" if inside else self.name or type(self).__name__

    def __repr__(self) -> str:
        return f"<Gate {self.label}>"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.parameters == other.parameters

    def __hash__(self) -> int:
        return hash((type(self), tuple(self.parameters.items())))

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """γ `[...]` from log-probabilities `[..., K]` of student P and teacher Q, −inf included; no gradient."""
        raise NotImplementedError


class EntropyGap(Gate):
    """γ = σ((H(Q) − H(P))/width): forward where the student is surer than the teacher, ½ at equal entropies.

    BD-KD (arXiv:2212.12965) weighs both directions by this gap; its weights are not given here, the sigmoid is ours.

    Args:
        width: nats, > 0. Small: a switch at equal entropies.
    """

    name = "entropy_gap"

    def __init__(self, width: float) -> None:
        self.parameters = MappingProxyType({"width": _number("entropy_gap", "width", width, above=0.0)})

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return torch.sigmoid((_entropy(log_q) - _entropy(log_p)) / self.parameters["width"])


class TeacherEntropy(Gate):
    """γ = 1 where H(Q) ≥ threshold, else 0: forward on tokens where the teacher is unsure.

    Args:
        threshold: nats, ≥ 0.
    """

    name = "teacher_entropy"

    def __init__(self, threshold: float) -> None:
        self.parameters = MappingProxyType(
            {"threshold": _number("teacher_entropy", "threshold", threshold, least=0.0)}
        )

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (_entropy(log_q) >= self.parameters["threshold"]).to(log_q.dtype)


class HeadTail(Gate):
    """γ = g_head/(g_head + g_tail), g = ∑|P − Q| over the teacher's head and over its tail; ½ at P = Q.

    The head is the smallest set of the teacher's likeliest tokens that holds `mass`. AKL (Wu et al.,
    arXiv:2404.02657) with forward and reverse KL and mass ½.

    Args:
        mass: of the head, in (0, 1).
    """

    name = "head_tail"

    def __init__(self, mass: float) -> None:
        self.parameters = MappingProxyType({"mass": _number("head_tail", "mass", mass, above=0.0, below=1.0)})

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        ordered, order = log_q.sort(dim=-1, descending=True, stable=True)
        q = ordered.exp()
        gap = (log_p.gather(-1, order).exp() - q).abs()
        head = (gap * (q.cumsum(-1) - q < self.parameters["mass"])).sum(-1)
        whole = gap.sum(-1)
        return torch.where(whole > 0, head / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.5).clamp(0.0, 1.0)


def _entropy(log_p: Tensor) -> Tensor:
    """Entropy over the last axis, nats."""
    return -(log_p.exp() * log_p).nan_to_num_(0.0).sum(-1)


def _number(
    gate: str, parameter: str, value: Any, *, above: float | None = None, least: float | None = None,
    below: float = math.inf,
) -> float:  # fmt: skip
    low = above if above is not None else least if least is not None else -math.inf
    ok = isinstance(value, int | float) and not isinstance(value, bool) and value < below and value >= low
    if not ok or (above is not None and value == above):
        bounds = f"{'above' if above is not None else 'at least'} {low:g}" + (
            "" if math.isinf(below) else f" and below {below:g}"
        )
        raise ValueError(f"gate {gate}: {parameter} must be a number {bounds}, got {value!r}")
    return float(value)


_MUST_BE = "a Gate, or a function of its parameters that returns one"

#: Name → class; `module:attribute` names one of the user's own.
GATES: Table[type[Gate]] = Table(
    "gate", _MUST_BE, lambda found: isinstance(found, Gate) or callable(found),
    {gate.name: gate for gate in (EntropyGap, TeacherEntropy, HeadTail)},
)  # fmt: skip


def get_gate(spec: Any) -> Gate:
    """The gate of a spec: a mapping with `name` and its parameters, or a `Gate`.

    Raises:
        ValueError: an unknown name, a parameter missing, unknown or outside its domain.
    """
    if isinstance(spec, Gate):
        return spec
    keys = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = keys.pop("name", None)
    example = "{name: entropy_gap, width: 1.0}, {name: teacher_entropy, threshold: 1.0}, {name: head_tail, mass: 0.5}"
    if not isinstance(name, str):
        raise ValueError(f"gate: a mapping is due, one of {example}; got {shown(spec)}")
    if is_path(name):
        return build_own(own_object(name, "gate", _MUST_BE, GATES.is_one), keys, f"gate {name!r}", _MUST_BE, Gate)
    found = GATES.find(name)
    bind_arguments(found, keys, f"gate {name} (write {example})")
    return found(**keys)
