"""The registry: names, aliases and refusals, and `get_divergence`, the one way a name becomes a `Divergence`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fdiv.divergences.base import Divergence
from fdiv.divergences.entries import ENTRIES
from fdiv.divergences.powers import Alpha
from fdiv.named import build_own, is_path, nearest, own_object

#: What `get_divergence` accepts.
DivergenceSpec = str | Mapping[str, Any] | Divergence

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
        if new in _factories or new in _aliases:
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
    if isinstance(spec, str):
        return _build(spec, {})
    if isinstance(spec, Mapping):
        parameters = dict(spec)
        name = parameters.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(
                f"a divergence mapping needs a `name`, got {dict(spec)!r}: e.g. {{name: alpha, alpha: 0.3}}"
            )
        return _build(name, parameters)
    raise TypeError(
        f"a divergence is given by its name, a mapping or a Divergence, got {type(spec).__name__}: {spec!r}"
    )


def aliases_of(name: str) -> list[str]:
    """The aliases of a registered name, sorted."""
    return sorted(alias for alias, target in _aliases.items() if target == name)


def parameters_of(name: str) -> list[str]:
    """The parameters a registered name needs, in order."""
    return list(inspect.signature(_factories[name]).parameters)


def _build(name: str, parameters: dict[str, Any]) -> Divergence:
    if is_path(name):
        found = own_object(name, "divergence", _OWN, lambda found: isinstance(found, Divergence) or _is_factory(found))
        return build_own(found, parameters, f"divergence {name!r}", _OWN, Divergence)
    key = _normalise(name)
    if key in _AMBIGUOUS:
        first, second = _AMBIGUOUS[key]
        raise ValueError(f"divergence {name!r} is ambiguous: say {first} or {second}")
    key = _aliases.get(key, key)
    factory = _factories.get(key) or _CONVENTIONS.get(key)
    if factory is None:
        raise ValueError(f"unknown divergence {name!r}{_did_you_mean(key)}; known: {', '.join(list_divergences())}")
    wanted = list(inspect.signature(factory).parameters)
    for parameter in parameters:
        if parameter not in wanted:
            takes = f"it takes {', '.join(wanted)}" if wanted else "it takes none"
            raise ValueError(f"divergence {name!r} has no parameter {parameter!r}: {takes}")
    missing = [parameter for parameter in wanted if parameter not in parameters]
    if missing:
        example = ", ".join([f"name: {key}", *(f"{parameter}: 0.3" for parameter in wanted)])
        raise ValueError(f"divergence {name!r} needs the parameter {missing[0]!r}: write {{{example}}}")
    return factory(**parameters)


_OWN = "a Divergence, or a function of its parameters that returns one"


def _is_factory(found: Any) -> bool:
    return callable(found) and not (inspect.isclass(found) and not issubclass(found, Divergence))


def _did_you_mean(key: str) -> str:
    near = nearest(key, [*_factories, *_aliases, *_CONVENTIONS], count=3)
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

for _name, _entry in ENTRIES.items():
    register_divergence(_name, _entry, aliases=_entry.aliases)
