"""Targets of f-DPG: unnormalised densities P(x) = a(x)·(what scorers say), a the base model.

| kind | P(x) | from |
|---|---|---|
| `pointwise` | a·∏ b_i, b ≥ 0 | GDC, arXiv:2012.11635 |
| `distributional` | a·exp(λ·φ), λ so that E_p φ = moments | GDC |
| `hybrid` | a·∏ b_i·exp(λ·φ) | GDC |
| `reward` | a·exp(Σ r/β), the optimum of E r − β KL(π‖a) | arXiv:2206.00761 |
| `filter` | a·∏ v_i, v ∈ {0, 1} a verifier | α-DPG, arXiv:2512.05962 |

A target is hard when P can be 0 where a is not (`pointwise`, `hybrid`, `filter`): f-DPG then needs f′(∞) < ∞, or
`smoothing: ε`, which replaces b by ε + (1 − ε)·b.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdiv.alignment.scorers import Scorer, build_scorer
from fdiv.errors import ScorerError
from fdiv.named import Table, build_own, check_keys, is_path, split_spec

__all__ = ["TARGET_KINDS", "Target", "build_target"]

TARGET_KINDS: Table[tuple[frozenset[str], frozenset[str]]] = Table(
    "target",
    "a Target, or a function of its parameters that returns one",
    lambda found: isinstance(found, Target) or callable(found),
    {
        "pointwise": (frozenset({"scorers"}), frozenset({"smoothing", "positive"})),
        "filter": (frozenset({"scorers"}), frozenset({"smoothing"})),
        "reward": (frozenset({"scorers", "beta"}), frozenset()),
        "distributional": (frozenset({"features", "moments"}), frozenset({"coefficients"})),
        "hybrid": (
            frozenset({"scorers", "features", "moments"}),
            frozenset({"coefficients", "smoothing", "positive"}),
        ),
    },
)
"""Kind → (keys it needs, keys it may have); `module:attribute` names a target of your own."""


@dataclass(frozen=True)
class Target:
    """P/a as a function of scores. Made by `build_target`.

    Attributes:
        kind: one of `TARGET_KINDS`.
        scorers: factors b (`pointwise`, `hybrid`), verifiers v (`filter`) or rewards r (`reward`).
        features: φ (`distributional`, `hybrid`).
        moments: wanted E_p φ, one per feature.
        coefficients: λ, one per feature; None until it is fitted.
        beta: β of `reward`.
        smoothing: ε in (0, 1); None leaves the target hard.
        positive: the factors are declared to be > 0 everywhere (a classifier's probability), so it is not hard.
    """

    kind: str
    scorers: tuple[Scorer, ...] = ()
    features: tuple[Scorer, ...] = ()
    moments: tuple[float, ...] = ()
    coefficients: tuple[float, ...] | None = None
    beta: float | None = None
    smoothing: float | None = None
    positive: bool = False

    @property
    def functions(self) -> tuple[Scorer, ...]:
        """All scorers in the order of the columns of `log_potential`'s scores: `scorers`, then `features`."""
        return (*self.scorers, *self.features)

    @property
    def hard(self) -> bool:
        """Whether P can be 0 where the base is not."""
        return self.kind in ("pointwise", "hybrid", "filter") and self.smoothing is None and not self.positive

    @property
    def needs_fit(self) -> bool:
        """Whether λ is still to be fitted (`fdiv.alignment.f_dpg.moments.fit_moments`)."""
        return bool(self.features) and self.coefficients is None

    def with_coefficients(self, coefficients: Sequence[float]) -> Target:
        """The same target with λ set."""
        return dataclasses.replace(self, coefficients=_floats("coefficients", coefficients, len(self.features)))

    def log_potential(self, scores: Tensor, *, without_features: bool = False) -> Tensor:
        """log(P/a) of samples.

        Args:
            scores: `[B, S]`, a column per function of `functions`, finite.
            without_features: leave exp(λ·φ) out, as when λ is being fitted.

        Returns:
            `[B]`, −inf where P = 0; in the type of `scores`.

        Raises:
            ScorerError: a factor below 0, a verifier's score that is neither 0 nor 1, a factor declared positive
                that is 0.
            ValueError: λ is not fitted yet; the wrong number of columns.
        """
        if scores.dim() != 2 or scores.size(1) != len(self.functions):
            raise ValueError(f"scores have shape {tuple(scores.shape)}: [B, {len(self.functions)}] is due")
        factors, features = scores.split([len(self.scorers), len(self.features)], dim=1)
        if self.kind == "reward":
            potential = factors.sum(1) / self.beta
        else:
            potential = self._smoothed(factors).log().sum(1)
        if self.features and not without_features:
            if self.coefficients is None:
                raise ValueError("the coefficients of the features are not fitted yet: fit_moments, or set them")
            potential = potential + features @ features.new_tensor(self.coefficients)
        return potential

    def _smoothed(self, factors: Tensor) -> Tensor:
        for column, scorer in zip(factors.unbind(1), self.scorers, strict=True):
            name = getattr(scorer, "__name__", type(scorer).__name__)
            if (column < 0).any():
                raise ScorerError(f"scorer {name!r} gave {column.min().item():g}: a factor of a density must be >= 0")
            if self.kind == "filter" and not ((column == 0) | (column == 1)).all():
                wrong = column[(column != 0) & (column != 1)][0].item()
                raise ScorerError(f"scorer {name!r} gave {wrong:g}: a filter target's verifier must give 0 or 1")
            if self.positive and (column == 0).any():
                raise ScorerError(f"scorer {name!r} gave 0, but the target says `positive: true`: drop that line")
        return factors if self.smoothing is None else self.smoothing + (1.0 - self.smoothing) * factors


def build_target(spec: Target | Mapping[str, Any]) -> Target:
    """A target from a mapping `{name: KIND, scorers: […], …}`; scorers are callables or specs of `build_scorer`.

    `{name: module:attribute, …}` is a `Target` of your own, or what a function there returns for the further keys.

    >>> build_target({"name": "pointwise", "scorers": [{"name": "contains_words", "words": ["amazing"]}]}).hard
    True

    Raises:
        ValueError: unknown kind or key, a missing key, a number outside its range, numbers that do not match the
            features; what a scorer's factory refuses.
    """
    if isinstance(spec, Target):
        return spec
    kind, settings = split_spec(spec, "target")
    found = TARGET_KINDS.find(kind)
    if is_path(kind):
        return build_own(found, settings, f"target {kind!r}", TARGET_KINDS.must_be, Target)
    needed, optional = found
    check_keys(settings, needed | optional, f"target {kind!r}", "key")
    missing = sorted(needed - settings.keys())
    if missing:
        raise ValueError(f"target {kind!r} needs {', '.join(missing)}")
    scorers = _scorers("scorers", settings, kind)
    features = _scorers("features", settings, kind)
    coefficients = settings.get("coefficients")
    return Target(
        kind=kind,
        scorers=scorers,
        features=features,
        moments=_floats("moments", settings.get("moments", ()), len(features)),
        coefficients=None if coefficients is None else _floats("coefficients", coefficients, len(features)),
        beta=_positive("beta", settings.get("beta")),
        smoothing=_fraction("smoothing", settings.get("smoothing")),
        positive=_flag("positive", settings.get("positive", False)),
    )


def _scorers(key: str, settings: Mapping[str, Any], kind: str) -> tuple[Scorer, ...]:
    if key not in settings:
        return ()
    given = settings[key]
    entries = list(given) if isinstance(given, (list, tuple)) else [given]
    if not entries:
        raise ValueError(f"target {kind!r}: {key} is empty, at least one is due")
    return tuple(build_scorer(entry) for entry in entries)


def _floats(key: str, values: Any, count: int) -> tuple[float, ...]:
    values = [values] if isinstance(values, (int, float)) else list(values)
    if len(values) != count or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        raise ValueError(f"target: {key}={values!r} must be {count} finite numbers, one per feature")
    return tuple(float(value) for value in values)


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"target: {key}={value!r} must be true or false")
    return value


def _positive(key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"target: {key}={value!r} must be a number above 0")
    return float(value)


def _fraction(key: str, value: Any) -> float | None:
    value = _positive(key, value)
    if value is not None and value >= 1:
        raise ValueError(f"target: {key}={value!r} must lie strictly between 0 and 1")
    return value


def as_scores(columns: Sequence[Sequence[float]]) -> Tensor:
    """Scores of several scorers, one list each, as the `[B, S]` tensor `Target.log_potential` takes."""
    return torch.tensor(columns, dtype=torch.float64).T
