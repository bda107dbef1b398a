"""From names and parameters to attacks, and through a list of them one after the other."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from fdiv.catalog import ATTACKS
from fdiv.errors import DataError, FdivError
from fdiv.eval.unlearning.attacks.attacked import Attack, Attacked, NotApplicable, Row
from fdiv.models.fingerprints import weights_fingerprint
from fdiv.named import bind_arguments, is_path, split_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["AttackSpec", "NamedAttack", "attack_all", "build_attack", "build_attacks"]

AttackSpec = str | Mapping[str, Any] | Attack


class NamedAttack(NamedTuple):
    """An attack, and what its results are called.

    `settings` are its name and the parameters that were stated, for the record; `max_items` is how many rows are
    measured after it, evenly spaced (None: all). `resolved` are all parameters but defaults, those that the evaluation
    filled in among them, and a digest of the file that an attack of one's own stands in: what a cache of results has
    to tell apart. `own`: it is no attack of fdiv's, so that what it does is checked.
    """

    name: str
    attack: Attack
    settings: Mapping[str, Any] = MappingProxyType({})
    max_items: int | None = None
    resolved: Mapping[str, Any] = MappingProxyType({})
    own: bool = False


def _attacks(found: Callable[..., Any]) -> bool:
    """Whether it is an attack itself, and not what makes one: it takes `model` and `rows`."""
    if inspect.isclass(found):
        return False
    return {"model", "rows"} <= set(inspect.signature(found).parameters)


def build_attack(spec: AttackSpec, what: str = "attack", **context: Any) -> NamedAttack:
    """An attack from a callable, a name, or a mapping `{name: …, parameter: value, …, as: …, max_items: …}`.

    A name is one of `fdiv.catalog.ATTACKS` or `module:attribute` of your own: a function `(model, tokenizer, rows, *,
    seed) -> Attacked`, which has no parameters, or a class or function that makes one of them. `as` renames its
    results; `max_items` rows are measured after it.

    Args:
        spec: see above. what: the word for it in errors.
        context: what an evaluation knows and an attack may ask for by the name of a parameter that the spec does not
            state: `prompt` (the `PromptFormat` of its questions), `neighbours` and `unrelated` (rows).

    Raises:
        DataError: an unknown name, an unknown or missing parameter, a value outside its bounds.
    """
    if not isinstance(spec, str | Mapping) and callable(spec):
        name = getattr(spec, "__name__", type(spec).__name__).lower()
        settings = {"name": f"{getattr(spec, '__module__', '')}:{name}"}
        # The text of a dataclass is its fields, that of a function its address in memory.
        resolved = {**settings, "fields": repr(spec)} if is_dataclass(spec) else settings
        return NamedAttack(name, spec, settings, resolved=resolved | _code_of(spec), own=_is_own(spec))
    name, keys = split_spec(spec, what, error=DataError)
    made = ATTACKS.find(name, what=what, error=DataError)
    title, shown, count = f"{what} {name!r}", keys.pop("as", None), keys.pop("max_items", None)
    label = shown or (name.partition(":")[2] if is_path(name) else name)
    if not isinstance(label, str) or not label.isidentifier():
        raise DataError(f"{title}: as={shown!r} is no name: letters, digits and _ only")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise DataError(f"{title}: max_items={count!r}: must be at least 1")
    settings = {"name": name, **keys}
    code, own = _code_of(made), _is_own(made)
    if _attacks(made):
        if keys:
            raise DataError(f"{title} takes no {', '.join(keys)}: it is an attack, which has no parameters")
        return NamedAttack(label, made, settings, count, settings | code, own)
    parameters = inspect.signature(made).parameters
    keys = {key: value for key, value in context.items() if key in parameters} | keys
    bind_arguments(made, keys, title, error=DataError)
    try:
        attack = made(**keys)
    except (TypeError, ValueError) as error:
        raise DataError(f"{title}: {error}") from error
    if not callable(attack):
        raise DataError(
            f"{title} made a {type(attack).__name__}: it must make a function (model, tokenizer, rows, *, seed)"
        )
    return NamedAttack(label, attack, settings, count, {"name": name, **keys} | code, own)


def _is_own(found: Any) -> bool:
    """Whether a class, function or object is not of fdiv's."""
    module = found.__module__ if hasattr(found, "__module__") else type(found).__module__
    return str(module).partition(".")[0] != "fdiv"


def _code_of(found: Any) -> dict[str, str]:
    """A digest of the file that an attack of one's own stands in, which may change between two runs; {} where there
    is no such file, and for those of fdiv."""
    if not _is_own(found):
        return {}
    try:
        thing = found if inspect.isclass(found) or inspect.isfunction(found) else type(found)
        content = Path(inspect.getsourcefile(thing) or "").read_bytes()
    except (OSError, TypeError):  # typed into an interpreter, or compiled
        return {}
    return {"code": hashlib.sha256(content).hexdigest()}


def build_attacks(specs: Sequence[AttackSpec], what: str = "attacks", **context: Any) -> list[NamedAttack]:
    """`build_attack` of each.

    Raises:
        DataError: see `build_attack`; two of one name.
    """
    if isinstance(specs, str | Mapping) or not isinstance(specs, Sequence):
        raise DataError(f"{what} is a list of names and mappings, not {specs!r:.60}")
    found = [build_attack(spec, what.removesuffix("s"), **context) for spec in specs]
    names = [attack.name for attack in found]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise DataError(f"{what}: two are called {double!r}; rename one with `as`")
    return found


def attack_all(
    attacks: Sequence[NamedAttack],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    seed: int,
) -> Iterator[tuple[str, Attacked | NotApplicable]]:
    """(name, what is to be measured) of every attack; an attack of several stages gives `NAME_STAGE` for each.

    Measure each before you ask for the next: the weights of a stage are those that the next one goes on from, and the
    memory of a model is free again when you let go of it. An attack that cannot be made here gives the reason, a
    `NotApplicable`, instead.

    Args:
        attacks: by name. model: the one under attack. tokenizer: encodes the rows.
        rows: what was to be forgotten. seed: of everything random in an attack.

    Raises:
        DataError: an attack of one's own raised something, gave what is no `Attacked` of these rows, or changed the
            weights of the model.
    """
    for named in attacks:
        name, attack = named.name, named.attack
        before = weights_fingerprint(model) if named.own else ""
        try:
            stages = getattr(attack, "stages", None)
            if stages is None:
                yield name, _checked(named, attack(model, tokenizer, rows, seed=seed), rows, model, before)
                continue
            for stage, attacked in stages(model, tokenizer, rows, seed=seed):
                yield f"{name}_{stage}", _checked(named, attacked, rows, model, before)
        except NotApplicable as reason:
            yield name, reason
        except FdivError:
            raise
        except Exception as error:  # an attack of one's own may raise anything, and is named
            if not named.own:
                raise
            raise DataError(f"attack {name!r} raised {type(error).__name__}: {error}") from error


def _checked(
    named: NamedAttack, attacked: Any, rows: Sequence[Row], model: PreTrainedModel, before: str
) -> Attacked | NotApplicable:
    """What an attack gave.

    Raises:
        DataError: it is no `Attacked`, has rows missing or of another kind, or numbers of rows that there are not; an
            attack of one's own changed the weights that it was given.
    """
    title = f"attack {named.name!r}"
    if isinstance(attacked, NotApplicable):
        return attacked
    if not isinstance(attacked, Attacked):
        raise DataError(f"{title} gave {type(attacked).__name__}: it must give Attacked(model, rows)")
    if len(attacked.rows) != len(rows):
        raise DataError(f"{title} gave {len(attacked.rows)} rows for {len(rows)}: as many are due, in their order")
    wrong = next((row for row in attacked.rows if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise DataError(f"{title} gave a row that is {wrong!r:.60}: a row is a mapping of columns")
    outside = [number for number in attacked.trained_on if not 0 <= number < len(rows)]
    if outside:
        raise DataError(f"{title}: trained_on names row {outside[0]} of {len(rows)} (from 0)")
    if named.own and weights_fingerprint(model) != before:
        raise DataError(
            f"{title} changed the weights of the model that it was given, which is measured again after it: change a "
            "copy (copy.deepcopy(model))"
        )
    return attacked
