"""The registry: names, aliases and refusals; `get_divergence`, the one way a name becomes a `Divergence`, and
`get_distance`, which also gives the members without an f."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fdiv.divergences.base import Divergence
from fdiv.divergences.distances import CauchySchwarz, Distance, Gated
from fdiv.divergences.entries import ENTRIES
from fdiv.divergences.gates import Gate, get_gate
from fdiv.divergences.powers import Alpha
from fdiv.named import build_own, is_path, nearest, own_object

#: What `get_divergence` accepts.
DivergenceSpec = str | Mapping[str, Any] | Divergence

#: What `get_distance` accepts.
DistanceSpec = DivergenceSpec | Distance

_factories: dict[str, Callable[..., Divergence]] = {}
_aliases: dict[str, str] = {}

#: Names that mean two things, with the two candidates.
_AMBIGUOUS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("kl", "kld", "kl_divergence"),
        ("reverse_kl (KL(policy‖reference))", "forward_kl (KL(reference‖policy))"),
    ),
    **dict.fromkeys(
        ("chi2", "chi_square", "chi_squared"),
        ("pearson_chi2 (∑(P−Q)²/Q)", "neyman_chi2 (∑(P−Q)²/P)"),
    ),
    **dict.fromkeys(
        ("alpha_divergence", "amari_alpha"),
        (
            "{name: alpha, alpha: a} (f-DPO, DPH-RL: a→0 is reverse KL)",
            "{name: alpha_trl, alpha: a} (TRL ≥ 0.29, α-DPG: a→1 is reverse KL)",
        ),
    ),
}


def list_divergences() -> list[str]:
    """The registered names, sorted; aliases are not listed."""
    return sorted(_factories)


def register_divergence(
    name: str | Divergence,
    factory: Divergence | Callable[..., Divergence] | None = None,
    *,
    aliases: tuple[str, ...] = (),
) -> None:
    """Add a divergence under a name.

    Args:
        name: the registry name (lower case, underscores), or a `Divergence`, which is registered under its own name.
        factory: a `Divergence`, or a callable whose keyword parameters are the divergence's parameters, returning one.
        aliases: further names for it.

    Raises:
        ValueError: a name or alias that is taken, ambiguous or not lower_case_with_underscores.
        TypeError: a factory that is neither a `Divergence` nor callable.
    """
    if isinstance(name, Divergence):
        factory = name
        name = name.name
    if isinstance(factory, Divergence):
        instance = factory
        factory = lambda: instance  # noqa: E731
    if not callable(factory):
        raise TypeError(
            f"register_divergence({name!r}): give a Divergence or a function that returns one, got {factory!r}"
        )
    for new in (name, *aliases):
        if new != _normalise(new) or not new.isidentifier():
            raise ValueError(f"{new!r} is not a valid divergence name: use lower case letters, digits and underscores")
        if new in _AMBIGUOUS:
            raise ValueError(f"{new!r} is ambiguous and stays refused: choose a name that says the argument order")
        if new in _factories or new in _aliases or new in _DISTANCES:
            raise ValueError(f"a divergence called {new!r} is already registered: choose another name")
    _factories[name] = factory
    _aliases.update(dict.fromkeys(aliases, name))


def get_divergence(spec: DivergenceSpec) -> Divergence:
    """The divergence of a spec: a name, a mapping with `name` and the parameters, or a `Divergence` (returned as is).

    A name is registered, or says `module:attribute`: a `Divergence` of your own, or a function of its parameters.

    Names are case-insensitive, and "-" or " " count as "_". Nothing has a default parameter.

    Raises:
        ValueError: unknown name (with the nearest ones), ambiguous name (with both candidates), a parameter missing,
            unknown or outside its domain.
        TypeError: a spec of another type.
    """
    if isinstance(spec, Divergence):
        return spec
    if isinstance(spec, Distance):
        raise ValueError(_no_f(spec.label))
    name, parameters = _name_and_parameters(spec)
    if _normalise(name) in _DISTANCES:
        raise ValueError(_no_f(_normalise(name)))
    return _build(name, parameters)


def get_distance(spec: DistanceSpec) -> Divergence | Distance:
    """As `get_divergence`, where a value for whole distributions is enough: also `cauchy_schwarz`, `{name: gated,
    forward: …, reverse: …, gate: …}`, and a `Distance` (returned as is).

    Raises:
        ValueError, TypeError: as `get_divergence`; for `gated` also as `get_gate`.
    """
    if isinstance(spec, Divergence | Distance):
        return spec
    name, parameters = _name_and_parameters(spec)
    if is_path(name):
        found = own_object(name, "divergence", _OWN, lambda found: isinstance(found, Distance) or _is_own(found))
        return build_own(found, parameters, f"divergence {name!r}", _OWN, Divergence | Distance)
    factory = _DISTANCES.get(_normalise(name))
    if factory is None:
        return _build(name, parameters)
    _check_parameters(name, factory, parameters, str(EXAMPLES[_normalise(name)]).replace("'", ""))
    return factory(**parameters)


def list_distances() -> list[str]:
    """The names that `get_distance` takes and `get_divergence` does not, sorted."""
    return sorted(_DISTANCES)


def distance_parameters(name: str) -> list[str]:
    """The parameters that a name of `list_distances` needs, in order."""
    return list(inspect.signature(_DISTANCES[name]).parameters)


def gated(forward: DistanceSpec, reverse: DistanceSpec, gate: Mapping[str, Any] | Gate) -> Gated:
    """γ·D_forward + (1 − γ)·D_reverse, γ by a gate per token: see `fdiv.divergences.distances.Gated`.

    Args:
        forward, reverse: any members: f-divergences, other distances. gate: a spec of `get_gate`, such as
            `{"name": "teacher_entropy", "threshold": 1.0}`.
    """
    return Gated(get_distance(forward), get_distance(reverse), get_gate(gate))


def _name_and_parameters(spec: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping):
        raise TypeError(
            f"a divergence is given by its name, a mapping or a Divergence, got {type(spec).__name__}: {spec!r}"
        )
    parameters = dict(spec)
    name = parameters.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"a divergence mapping needs a `name`, got {dict(spec)!r}: e.g. {{name: alpha, alpha: 0.3}}")
    return name, parameters


def _no_f(name: str) -> str:
    return (
        f"{name} is no f-divergence: it has no f(t), only a value for whole next-token distributions (method "
        "f_distill, evaluation to_teacher), and an f is needed here. `fdiv divergences` lists those with one"
    )


def aliases_of(name: str) -> list[str]:
    """The aliases of a registered name, sorted."""
    return sorted(alias for alias, target in _aliases.items() if target == name)


def parameters_of(name: str) -> list[str]:
    """The parameters a registered name needs, in order."""
    return list(inspect.signature(_factories[name]).parameters)


def _build(name: str, parameters: dict[str, Any]) -> Divergence:
    if is_path(name):
        found = own_object(name, "divergence", _OWN, _is_own)
        return build_own(found, parameters, f"divergence {name!r}", _OWN, Divergence)
    key = _normalise(name)
    if key in _AMBIGUOUS:
        first, second = _AMBIGUOUS[key]
        raise ValueError(f"divergence {name!r} is ambiguous: say {first} or {second}")
    key = _aliases.get(key, key)
    factory = _factories.get(key) or _CONVENTIONS.get(key)
    if factory is None:
        raise ValueError(f"unknown divergence {name!r}{_did_you_mean(key)}; known: {', '.join(list_divergences())}")
    wanted = inspect.signature(factory).parameters
    example = ", ".join([f"name: {key}", *(f"{parameter}: 0.3" for parameter in wanted)])
    _check_parameters(name, factory, parameters, f"{{{example}}}")
    return factory(**parameters)


def _check_parameters(name: str, factory: Callable[..., Any], parameters: dict[str, Any], example: str) -> None:
    wanted = list(inspect.signature(factory).parameters)
    for parameter in parameters:
        if parameter not in wanted:
            takes = f"it takes {', '.join(wanted)}" if wanted else "it takes none"
            raise ValueError(f"divergence {name!r} has no parameter {parameter!r}: {takes}")
    missing = [parameter for parameter in wanted if parameter not in parameters]
    if missing:
        raise ValueError(f"divergence {name!r} needs the parameter {missing[0]!r}: write {example}")


_OWN = "a Divergence, or a function of its parameters that returns one"


def _is_own(found: Any) -> bool:
    """Whether a user's object is a `Divergence`, or may make one."""
    if inspect.isclass(found):
        return issubclass(found, Divergence | Distance)
    return isinstance(found, Divergence) or callable(found)


def _did_you_mean(key: str) -> str:
    near = nearest(key, [*_factories, *_aliases, *_CONVENTIONS, *_DISTANCES], count=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _normalise(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _alpha_counted_from_forward_kl(alpha: float) -> Divergence:
    """TRL ≥ 0.29 and α-DPG: α → 1 is reverse KL, so α here is one minus theirs."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0.0 < alpha < 1.0:
        raise ValueError(
            f"alpha must be a number strictly between 0 and 1, got {alpha!r} (1 is reverse_kl, 0 forward_kl)"
        )
    return Alpha(1.0 - alpha)


#: Other projects' parameterisations, by explicit name.
_CONVENTIONS: dict[str, Callable[..., Divergence]] = {
    "alpha_trl": _alpha_counted_from_forward_kl,
    "alpha_dpg": _alpha_counted_from_forward_kl,
}

#: Members without an f, for `get_distance` alone; and how each is written.
_DISTANCES: dict[str, Callable[..., Distance]] = {"cauchy_schwarz": CauchySchwarz, "gated": gated}
EXAMPLES: dict[str, dict[str, Any]] = {
    "cauchy_schwarz": {"name": "cauchy_schwarz"},
    "gated": {
        "name": "gated",
        "forward": "forward_kl",
        "reverse": "reverse_kl",
        "gate": {"name": "entropy_gap", "width": 1.0},
    },
}

for _name, _entry in ENTRIES.items():
    register_divergence(_name, _entry, aliases=_entry.aliases)
