"""From a name to what it names: the entry of a table, or `module:attribute` of the user's own.

Every name that a recipe or the command line can hold is looked up here, so that all tables take names of the user's
own, and every mistake is one line that says what is wrong and what is nearest to it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from fdiv.errors import RecipeError

__all__ = [
    "Table",
    "bind_arguments",
    "check_keys",
    "hint",
    "is_path",
    "load",
    "lookup",
    "nearest",
    "own_object",
    "shown",
    "split_spec",
]

Entry = TypeVar("Entry")
_LONGEST_NAME, _MOST_NAMES = 200, 25  # in errors


def nearest(word: object, known: Iterable[str], *, count: int = 1, cutoff: float = 0.6) -> list[str]:
    """The up to `count` names most like `word`, the nearest first; none below the similarity `cutoff` in [0, 1]."""
    return difflib.get_close_matches(str(word)[:_LONGEST_NAME], known, n=count, cutoff=cutoff)


def hint(word: object, known: Iterable[str], otherwise: str = "there are") -> str:
    """`did you mean 'npo'?`; where none is near the known names after `otherwise`, of many the five nearest."""
    known = list(known)
    near = nearest(word, known)
    if near:
        return f"did you mean {near[0]!r}?"
    if len(known) > _MOST_NAMES:
        return f"the nearest of {len(known)} are: {', '.join(nearest(word, known, count=5, cutoff=0))}"
    return f"{otherwise}: {', '.join(sorted(known)) or 'none'}"


def shown(value: object, most: int = 80) -> str:
    """`repr` of a value for an error: at most `most` characters, the middle left out."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 23]} … {text[-20:]}"


def load(path: str) -> Any:
    """Import `module:attribute`, or `module`, of this package: an entry of a table."""
    module, _, attribute = path.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def lookup(
    table: Mapping[str, Entry], name: object, what: str, where: str = "", error: type[Exception] = RecipeError
) -> Entry:
    """`table[name]`.

    Args:
        table: the names. name: as a recipe or the command line has it, of any type. what: what it is to name.
        where: file and line, or the flag, for errors. error: the class of the error.

    Raises:
        error: an unknown name; with the nearest one, or all there are.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    also = ", or module:attribute" if isinstance(table, Table) else ""
    said = hint(name, table)
    said = said if said.endswith("?") else said + also
    raise error(f"{where}: unknown {what} {shown(name)}; {said}" if where else f"unknown {what} {shown(name)}; {said}")


def is_path(name: object) -> bool:
    """Whether a name says `module:attribute`."""
    return isinstance(name, str) and ":" in name


def own_object(
    path: str,
    what: str,
    must_be: str,
    is_one: Callable[[Any], bool],
    *,
    where: str = "",
    error: type[Exception] = ValueError,
) -> Any:
    """Import `module:attribute` of the user's own; the attribute may be a submodule.

    The module is searched where Python searches (PYTHONPATH, installed packages) and then in the working directory.
    Python's own modules are refused: no function of theirs is an objective, and a recipe that names `os:system` means
    no good. Importing the module runs it, nothing else is run.

    Args:
        path: `module:attribute`. what: what it is to be (`divergence`), for errors. must_be: the same in full (`a
            Divergence, or a function of its parameters that returns one`). is_one: whether an object is that.
        where: file and line, or the flag, for errors. error: the class of the errors.

    Raises:
        error: malformed, no such module or attribute, an import that fails, an object of the wrong kind; in one line.
    """
    module, _, attribute = path.partition(":")
    title = f"{where}: {what} {path!r}" if where else f"{what} {path!r}"
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise error(f"{title}: write module:attribute, for example my_package.my_module:my_{what.split()[-1]}")
    if module.split(".")[0] in sys.stdlib_module_names:
        raise error(f"{title}: {module} is a module of Python itself: name one of yours, which has another name")
    found = _module(module, title, error)
    value = getattr(found, attribute, None)
    if value is None and hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{attribute}"):
        value = _module(f"{module}.{attribute}", title, error)
    if value is None:
        near = nearest(attribute, vars(found))
        raise error(
            f"{title}: module {module!r} has no attribute {attribute!r}"
            + (f"; {hint(attribute, near)}" if near else "")
        )
    if not is_one(value):
        raise error(f"{title} is {_description(value)}: it must be {must_be}")
    return value


def _module(name: str, title: str, error: type[Exception]) -> Any:
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)  # last, so that no file there stands in for an installed package
    importlib.invalidate_caches()  # the module may be younger than the last look into its folder
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as fault:
        if fault.name is not None and (name == fault.name or name.startswith(f"{fault.name}.")):
            raise error(
                f"{title}: No module named {fault.name!r} in {folder}, on PYTHONPATH or among the installed packages"
            ) from fault
        raise error(f"{title}: importing {name} failed: {fault}") from fault
    except Exception as fault:  # the user's module may raise anything
        reason = " ".join(str(fault).split())
        raise error(f"{title}: importing {name} failed: {type(fault).__name__}: {reason}") from fault


def _description(value: Any) -> str:
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    return f"of type {type(value).__name__}"


class Table(dict[str, Entry]):
    """Names and what they name: objects, or `module:attribute` paths that are imported when a name is looked up.

    Args:
        what: what the names are names of (`method`), for errors.
        must_be: what an object of the user's own must be (`a trainer class with a config_class`).
        is_one: whether an object is that.
        entries: name → object or path.
    """

    def __init__(self, what: str, must_be: str, is_one: Callable[[Any], bool], entries: Mapping[str, Entry]) -> None:
        super().__init__(entries)
        self.what, self.must_be, self.is_one = what, must_be, is_one

    def find(
        self, name: object, where: str = "", *, what: str | None = None, error: type[Exception] = ValueError
    ) -> Any:
        """What `name` names: an entry, or the object of `module:attribute`.

        Args:
            name: as a recipe or the command line has it, of any type.
            where: file and line, or the flag, for errors. what: instead of the table's own word. error: their class.

        Raises:
            error: an unknown name, with the nearest one or all of them; see `own_object` for `module:attribute`.
        """
        what = what or self.what
        if is_path(name) and name not in self:
            return own_object(str(name), what, self.must_be, self.is_one, where=where, error=error)
        entry = lookup(self, name, what, where, error)
        return load(entry) if isinstance(entry, str) else entry


def split_spec(spec: object, what: str, *, error: type[Exception] = ValueError) -> tuple[Any, dict[str, Any]]:
    """Name and further keys of a spec: a name, or a mapping `{name: …, key: value, …}`.

    Raises:
        error: neither text nor a mapping.
    """
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping):
        raise error(f"{what}: a name or a mapping with a `name` is due, got {shown(spec)}")
    keys = dict(spec)
    return keys.pop("name", None), keys


def build_own(
    found: Any, keys: Mapping[str, Any], title: str, must_be: str, kind: Any, error: type[Exception] = ValueError
) -> Any:
    """The object of the user's own: `found` itself where it is a `kind`, else what it returns for `keys`.

    Args:
        found: what `own_object` gave. keys: the further keys of the spec. title: for errors, with the path.
        must_be: what it must be, in full. kind: the class of what is due, or a union of classes.

    Raises:
        error: keys for an object that takes none, unknown or missing ones, a result of another class.
    """
    if isinstance(found, kind):
        if keys:
            word = getattr(kind, "__name__", "member")
            raise error(f"{title} takes no {', '.join(keys)}: it is a {word} already, not a function of them")
        return found
    bind_arguments(found, keys, title, error=error)
    made = found(**keys)
    if not isinstance(made, kind):
        raise error(f"{title} returned {_description(made)}: it must be {must_be}")
    return made


def check_keys(
    keys: Iterable[str],
    known: Iterable[str],
    title: str,
    word: str = "argument",
    *,
    error: type[Exception] = ValueError,
) -> None:
    """Refuse the first key that is not known, with the nearest one: `title` has no `word` 'x'; did you mean …?

    Raises:
        error: a key that is not known.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            said = hint(key, known, "it takes") if known else "it takes none"
            raise error(f"{title} has no {word} {key!r}; {said}")


def bind_arguments(
    factory: Callable[..., Any], keys: Mapping[str, Any], title: str, *, error: type[Exception] = ValueError
) -> None:
    """Refuse keys that are no arguments of `factory`, and missing ones, before it is called.

    Raises:
        error: an unknown or a missing argument.
    """
    parameters = inspect.signature(factory).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        check_keys(keys, parameters, title, error=error)
    try:
        inspect.signature(factory).bind(**keys)
    except TypeError as fault:
        raise error(f"{title}: {fault}") from fault
