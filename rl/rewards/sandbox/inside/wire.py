"""Python values as tagged JSON, and lines of JSON over a socket.

None, booleans, strings, finite floats and integers of 63 bits are themselves. Everything else is a list that begins
with its tag: `["tuple", 1, 2]`, `["bytes", "00ff"]`, `["float", "nan"]`. Containers that can change stand in a table
of nodes, `["node", 3]`, so that shared and circular references, identity and changes in place survive the journey.

What is decoded is an instance of a built-in type, or of one of a fixed list of value types of the standard library,
whatever class it had where it was encoded: its comparisons are Python's own.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import json
import math
import re
import socket
import sys
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["LONGEST", "Channel", "ClosedError", "Decoder", "Encoder", "WireError"]

LONGEST = 16 << 20
"""Bytes of the longest message."""

SMALL = 1 << 62
TYPES = {
    name: getattr(builtins, name)
    for name in (
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
        "str", "tuple", "type",
    )
}  # fmt: skip
TYPES["NoneType"] = type(None)
FACTORIES = {"": None, **TYPES}
MUTABLE = (list, dict, set, bytearray, collections.deque)
VIEWS = {type({}.keys()): "dict_keys", type({}.items()): "dict_items", type({}.values()): "dict_values"}
ARRAYS = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248]|c(?:8|16)|[US]\d{1,6}|O)")
"""Element types of numpy that can be sent."""
to_json = json.JSONEncoder(separators=(",", ":")).encode


def numpy_of(value: Any) -> Any:
    """numpy, where it is loaded and the value is an array or a scalar of it that can be sent; else None."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.ndarray | numpy.generic) or not ARRAYS.fullmatch(value.dtype.str):
        return None
    return numpy


class WireError(ValueError):
    """A message that is too long, no JSON, or not of this form."""


class ClosedError(Exception):
    """The other side is gone."""


class Channel:
    """Messages over a stream socket: one JSON object per line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.incoming = bytearray()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message.

        Raises:
            WireError: it is longer than `LONGEST`.
            ClosedError: the other side is gone.
            TimeoutError: the connection has a limit of time, and it is over.
        """
        line = to_json(message).encode() + b"\n"
        if len(line) > LONGEST:
            raise WireError(f"a message of {len(line)} bytes; at most {LONGEST} can be sent")
        try:
            self.connection.sendall(line)
        except TimeoutError:
            raise
        except OSError as error:
            raise ClosedError from error

    def receive(self) -> dict[str, Any]:
        """The next message.

        Raises:
            ClosedError: the other side is gone.
            WireError: it is too long, or no JSON object.
        """
        searched = 0
        while (end := self.incoming.find(b"\n", searched)) < 0:
            searched = len(self.incoming)
            if searched > LONGEST:
                raise WireError(f"a message of more than {LONGEST} bytes")
            try:
                data = self.connection.recv(1 << 16)
            except ConnectionError as error:
                raise ClosedError from error
            if not data:
                raise ClosedError
            self.incoming += data
        line = bytes(self.incoming[:end])
        del self.incoming[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise WireError(f"no JSON: {error}") from None
        if not isinstance(message, dict):
            raise WireError("no JSON object")
        return message


class Encoder:
    """Values to tagged JSON, with one table of nodes for all values of a message.

    Args:
        export: Gives the tagged form of a value that has no form of its own: a function, an iterator, an object.
        known: Containers that have numbers already, from 0 on: those of the request that is being answered.
    """

    def __init__(self, export: Callable[[Any], list[Any]], known: Iterable[Any] = ()) -> None:
        self.export = export
        self.containers = list(known)  # kept alive, so that no other object gets the identity of one
        self.numbers = {id(container): number for number, container in enumerate(self.containers)}
        self.nodes: dict[str, list[Any]] = {}

    def value(self, value: Any) -> Any:
        """The tagged form of a value; a container enters the table of nodes, once."""
        if value is None or value is True or value is False:
            return value
        if type(value) in (str, int, float) or numpy_of(value) is None:
            return self._plain(value)
        if value.ndim:
            return ["node", self._number(value)]
        return ["scalar", value.dtype.str, self.value(value.item())]

    def _plain(self, value: Any) -> Any:
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int):
            number = int.__pos__(value)
            return number if -SMALL < number < SMALL else ["int", hex(number)]
        if isinstance(value, float):
            number = float.__pos__(value)
            return number if math.isfinite(number) else ["float", repr(number)]
        if isinstance(value, MUTABLE):
            return ["node", self._number(value)]
        if isinstance(value, tuple | frozenset):
            return ["tuple" if isinstance(value, tuple) else "frozenset", *map(self.value, value)]
        return self._rarer(value)

    def _rarer(self, value: Any) -> list[Any]:
        if isinstance(value, bytes):
            return ["bytes", value.hex()]
        if isinstance(value, complex):
            return ["complex", self.value(value.real), self.value(value.imag)]
        if isinstance(value, range | slice):
            return [type(value).__name__, *map(self.value, (value.start, value.stop, value.step))]
        if value is Ellipsis or value is NotImplemented:
            return ["constant", repr(value)]
        if isinstance(value, fractions.Fraction):
            return ["Fraction", self.value(value.numerator), self.value(value.denominator)]
        if isinstance(value, decimal.Decimal):
            return ["Decimal", str(value)]
        if isinstance(value, datetime.timedelta):
            return ["timedelta", value.days, value.seconds, value.microseconds]
        if isinstance(value, datetime.date | datetime.time) and getattr(value, "tzinfo", None) is None:
            kinds = (datetime.datetime, datetime.date, datetime.time)
            return [next(kind for kind in kinds if isinstance(value, kind)).__name__, value.isoformat()]
        if isinstance(value, type) and TYPES.get(value.__name__) is value:
            return ["type", value.__name__]
        if type(value) in VIEWS:
            return [VIEWS[type(value)], *map(self.value, value)]
        return self.export(value)

    def _number(self, container: Any) -> int:
        number = self.numbers.get(id(container))
        if number is None:
            number = self.numbers[id(container)] = len(self.containers)
            self.containers.append(container)
            self.nodes[str(number)] = []  # it may contain itself
            self.nodes[str(number)] = self.content(container)
        return number

    def content(self, container: Any) -> list[Any]:
        """The node of a container: its kind and what is in it."""
        if numpy_of(container) is not None:
            flat = container.ravel().tolist()
            return ["array", container.dtype.str, list(container.shape), *map(self.value, flat)]
        if isinstance(container, bytearray):
            return ["bytearray", container.hex()]
        if isinstance(container, dict):
            pairs = [[self.value(key), self.value(item)] for key, item in dict.items(container)]
            if isinstance(container, collections.defaultdict):
                name = getattr(container.default_factory, "__name__", "")
                if FACTORIES.get(name) is container.default_factory:
                    return ["defaultdict", name, *pairs]
            for kind in (collections.Counter, collections.OrderedDict):
                if isinstance(container, kind):
                    return [kind.__name__, *pairs]
            return ["dict", *pairs]
        if isinstance(container, collections.deque):
            return ["deque", container.maxlen, *map(self.value, container)]
        kind = list if isinstance(container, list) else set
        return [kind.__name__, *map(self.value, kind.__iter__(container))]


class Decoder:
    """Tagged JSON to values.

    Args:
        nodes: The table of nodes of the message.
        resolve: Gives the object of a tag that is not of this module; raises WireError for an unknown one.
        known: Containers by number that are here already: what the message says of them is written into them.
    """

    def __init__(self, nodes: Any, resolve: Callable[[list[Any]], Any], known: Iterable[Any] = ()) -> None:
        if not isinstance(nodes, dict):
            raise WireError("no table of nodes")
        self.resolve = resolve
        self.containers: dict[int, Any] = dict(enumerate(known))
        contents = {}
        for number, content in nodes.items():
            if not (number.isascii() and number.isdigit()) or not isinstance(content, list) or not content:
                raise WireError("a node is malformed")
            contents[int(number)] = content
        # Empty ones first: they may refer to each other.
        for number, content in contents.items():
            if number not in self.containers:
                self.containers[number] = self._empty(content)
        try:
            for number, content in contents.items():
                self._fill(self.containers[number], content)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise WireError(f"a node is malformed: {error}") from None

    def value(self, form: Any) -> Any:
        """The value of a tagged form.

        Raises:
            WireError: it is none.
        """
        if form is None or isinstance(form, bool | int | float | str):
            return form
        if not isinstance(form, list) or not form or not isinstance(form[0], str):
            raise WireError("a value is malformed")
        try:
            return self._tagged(form[0], form[1:], form)
        except (TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            raise error if isinstance(error, WireError) else WireError(f"a value is malformed: {error}") from None

    def _tagged(self, tag: str, rest: list[Any], form: list[Any]) -> Any:
        if tag == "node":
            return self.containers[rest[0]]
        if tag == "tuple":
            return tuple(map(self.value, rest))
        if tag == "scalar":
            return _empty_array(rest[0], []).dtype.type(self.value(rest[1]))
        if tag == "frozenset":
            return frozenset(map(self.value, rest))
        if tag == "int":
            return int(rest[0], 16)
        if tag == "float":
            return float(rest[0])
        if tag == "complex":
            return complex(*map(self.value, rest))
        if tag == "bytes":
            return bytes.fromhex(rest[0])
        if tag in ("range", "slice"):
            return (range if tag == "range" else slice)(*map(self.value, rest))
        if tag == "constant":
            return {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}[rest[0]]
        if tag == "Fraction":
            return fractions.Fraction(*map(self.value, rest))
        if tag == "Decimal":
            return decimal.Decimal(rest[0])
        if tag == "timedelta":
            return datetime.timedelta(*rest)
        if tag in ("datetime", "date", "time"):
            return getattr(datetime, tag).fromisoformat(rest[0])
        if tag == "type":
            return TYPES[rest[0]]
        if tag == "dict_keys":
            return dict.fromkeys(map(self.value, rest)).keys()
        if tag == "dict_items":
            return dict(map(self.value, rest)).items()
        if tag == "dict_values":
            return dict(enumerate(map(self.value, rest))).values()
        return self.resolve(form)

    def _empty(self, content: list[Any]) -> Any:
        kind = content[0]
        try:
            if kind == "array":
                return _empty_array(content[1], content[2])
            if kind == "defaultdict":
                return collections.defaultdict(FACTORIES[content[1]])
            if kind == "deque":
                return collections.deque(maxlen=content[1])
            return {
                "list": list, "dict": dict, "set": set, "bytearray": bytearray, "Counter": collections.Counter,
                "OrderedDict": collections.OrderedDict,
            }[kind]()  # fmt: skip
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise WireError(f"no such container: {error}") from None

    def _fill(self, container: Any, content: list[Any]) -> None:
        kind, rest = content[0], content[1:]
        if kind == "bytearray" and isinstance(container, bytearray):
            container[:] = bytes.fromhex(rest[0])
        elif kind == "array" and numpy_of(container) is not None:
            if [container.dtype.str, list(container.shape)] != rest[:2] or len(rest) - 2 != container.size:
                raise WireError("an array of another shape or type")
            for place, form in enumerate(rest[2:]):
                container.flat[place] = self.value(form)
        elif kind == "list" and isinstance(container, list):
            container[:] = list(map(self.value, rest))
        elif kind == "deque" and isinstance(container, collections.deque):
            items = list(map(self.value, rest[1:]))
            container.clear()
            container.extend(items)
        elif kind == "set" and isinstance(container, set):
            items = list(map(self.value, rest))
            container.clear()
            container.update(items)
        elif kind in ("dict", "Counter", "OrderedDict", "defaultdict") and isinstance(container, dict):
            pairs = [(self.value(key), self.value(item)) for key, item in rest[kind == "defaultdict" :]]
            container.clear()
            for key, item in pairs:
                container[key] = item
        else:
            raise WireError(f"{kind} is not what this container is")


def _empty_array(kind: Any, shape: Any) -> Any:
    """An array to fill.

    Raises:
        WireError: numpy is not here, or no such array can be sent.
    """
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(kind, str) or not ARRAYS.fullmatch(kind):
        raise WireError("no such array")
    return numpy.zeros(shape, dtype=kind)
