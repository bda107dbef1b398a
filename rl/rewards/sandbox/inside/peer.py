"""Calls between the two sides: each asks the other for what cannot be sent as a value.

A function, an iterator, an object of a class stays where it is; the other side holds a `Proxy` of it. Whatever a proxy
answers is a value of `wire`, or another proxy. A proxy passes no operand that is a value: `proxy == 4` is False
without asking, `proxy - 4` a TypeError. Otherwise an object that agrees with everything would hear what is expected of
it. Operators between two proxies are asked for: the two could as well have been equal values.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

from .wire import Channel, ClosedError, Decoder, Encoder, WireError

__all__ = ["Peer", "Proxy"]

SPECIAL = (
    "__len__", "__iter__", "__next__", "__getitem__", "__setitem__", "__delitem__", "__reversed__", "__enter__",
    "__exit__", "__str__", "__repr__",
)  # fmt: skip
"""Methods that a proxy has where its object's class defines them. Not `__contains__`: membership is by iteration."""

OPERATORS = (
    "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__add__", "__sub__", "__mul__", "__truediv__",
    "__floordiv__", "__mod__", "__matmul__", "__and__", "__or__", "__xor__",
)  # fmt: skip
"""Methods that are asked for where both operands are proxies."""

PLAIN_NAMES = ("__name__", "__qualname__")


class Proxy:
    """An object of the other side."""

    __slots__ = ("__weakref__", "_number", "_peer")

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name not in PLAIN_NAMES:
            raise AttributeError(name)
        return self._peer.request("get", self._number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.request("set", self._number, name, (value,))

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, Proxy) and self._peer.request("isinstance", self._number, "", (instance,)) is True

    def __hash__(self) -> int:
        return id(self)


def _operator(name: str) -> Callable[[Proxy, Any], Any]:
    def method(self: Proxy, other: Any) -> Any:
        if not isinstance(other, Proxy):
            return NotImplemented
        return self._peer.request("special", self._number, name, (other,))

    return method


def _special(name: str) -> Callable[..., Any]:
    def method(self: Proxy, *args: Any) -> Any:
        if name == "__exit__":
            args = (None, None, None)
        return self._peer.request("special", self._number, name, args)

    return method


def _call(self: Proxy, *args: Any, **kwargs: Any) -> Any:
    return self._peer.request("call", self._number, "", args, kwargs)


for _name in OPERATORS:
    setattr(Proxy, _name, _operator(_name))

_classes: dict[tuple[str, ...], type[Proxy]] = {}


def _proxy_class(abilities: tuple[str, ...]) -> type[Proxy]:
    if abilities not in _classes:
        body: dict[str, Any] = {name: _special(name) for name in abilities if name in SPECIAL}
        if "__call__" in abilities:
            body["__call__"] = _call
        _classes[abilities] = type("Proxy", (Proxy,), {"__slots__": (), **body})
    return _classes[abilities]


class Peer:
    """One side of the conversation.

    Args:
        channel: To the other side.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.exported: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.proxies: dict[int, Any] = {}

    # What a side decides for itself.

    def check_export(self, value: Any) -> None:
        """Raise TypeError for an object that the other side may not hold."""

    def check_request(self, do: str, target: Any, name: str) -> None:
        """Raise AttributeError or TypeError for a request that is not served."""

    def printed(self) -> str:
        """What was written to standard output since the last reply; it travels with the next one."""
        return ""

    def show(self, text: str) -> None:
        """Pass on what the other side wrote to its standard output."""

    def run(self, awaitable: Any) -> Any:
        """The result of a coroutine of this side."""
        import asyncio

        return asyncio.run(awaitable)

    # Requests to the other side.

    def request(
        self, do: str, on: int, name: str = "", args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Ask the other side, and serve what it asks in the meantime.

        Raises:
            ClosedError: it is gone.
            WireError: it said what is not of the form.
            Exception: what the request raised there, as the nearest built-in exception.
        """
        encoder = Encoder(self.export)
        message = {
            "do": do, "on": on, "name": name, "args": [encoder.value(value) for value in args],
            "kwargs": {key: encoder.value(value) for key, value in (kwargs or {}).items()},
        }  # fmt: skip
        self.channel.send({**message, "nodes": encoder.nodes})
        reply = self.channel.receive()
        while "do" in reply:
            self.answer(reply)
            reply = self.channel.receive()
        if isinstance(reply.get("printed"), str):
            self.show(reply["printed"])
        decoder = Decoder(reply.get("nodes"), self.resolve, encoder.containers)
        if "error" not in reply:
            return decoder.value(reply.get("value"))
        error = self._exception(reply["error"], decoder)
        if isinstance(error, StopIteration | StopAsyncIteration) and name != "__next__":
            # It would end a loop of the caller, which then looks as if it had come to its end.
            error = RuntimeError(f"the call raised {type(error).__name__}")
        raise error

    def _exception(self, error: Any, decoder: Decoder) -> BaseException:
        if not isinstance(error, list) or len(error) != 3:
            raise WireError("an exception is malformed")
        kind = getattr(builtins, str(error[0]), None)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            kind = Exception
        try:
            return kind(*map(decoder.value, error[1]))
        except (TypeError, ValueError):
            return Exception(str(error[2]))

    # Requests from the other side.

    def answer(self, message: dict[str, Any]) -> None:
        """Serve one request; what it raises is the reply."""
        known: list[Any] = []
        try:
            nodes = message.get("nodes")
            decoder = Decoder(nodes, self.resolve)
            known = [decoder.containers[number] for number in range(len(decoder.containers))]
            args = [decoder.value(form) for form in message["args"]]
            kwargs = {str(key): decoder.value(form) for key, form in message["kwargs"].items()}
            value = self._perform(str(message["do"]), message["on"], str(message["name"]), args, kwargs)
            reply = self._reply(known, nodes, lambda encoder: {"value": encoder.value(value)})
        except BaseException as error:  # SystemExit and KeyboardInterrupt are answers too
            if isinstance(error, WireError | ClosedError):
                raise
            reply = self._reply(known, {}, lambda encoder, error=error: {"error": _described(error, encoder)})
        try:
            self.channel.send(reply)
        except WireError as error:
            self.channel.send({"error": ["ValueError", [], str(error)], "nodes": {}, "printed": ""})

    def _reply(
        self, known: list[Any], nodes: dict[str, Any], content: Callable[[Encoder], dict[str, Any]]
    ) -> dict[str, Any]:
        encoder = Encoder(self.export, known)
        reply = content(encoder)
        # What the call changed in its arguments goes back; what it left alone does not.
        for number, container in enumerate(known):
            now = encoder.content(container)
            if now != nodes.get(str(number)):
                encoder.nodes[str(number)] = now
        return {**reply, "nodes": encoder.nodes, "printed": self.printed()}

    def _perform(self, do: str, on: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        target = self._exported(on)
        self.check_request(do, target, name)
        if do == "call":
            return target(*args, **kwargs)
        if do == "get":
            return getattr(target, name)
        if do == "set":
            return setattr(target, name, *args)
        if do == "isinstance":
            return isinstance(args[0], target)
        if do == "await":
            return self.run(target)
        if do == "special" and name in SPECIAL + OPERATORS:
            return getattr(type(target), name)(target, *args)
        raise TypeError(f"no such request: {do} {name}")

    # Objects that stay on their side.

    def export(self, value: Any) -> list[Any]:
        """The tagged form of an object that stays here, or that is a proxy of one of the other side's."""
        if isinstance(value, Proxy):
            return ["yours", value._number]
        self.check_export(value)
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.exported)
            self.exported.append(value)
        kind = type(value)
        if hasattr(kind, "__await__") and not hasattr(kind, "__next__"):
            return ["mine", number, "await"]
        # The methods of `object` itself are every proxy's own.
        abilities = [name for name in SPECIAL if getattr(kind, name, None) not in (None, getattr(object, name, None))]
        return ["mine", number, *abilities, *(["__call__"] if callable(value) else [])]

    def resolve(self, form: list[Any]) -> Any:
        """The proxy of an object of the other side, or the object of this side that it was given."""
        if form[0] == "yours" and len(form) == 2:
            return self._exported(form[1])
        if form[0] != "mine" or len(form) < 2 or type(form[1]) is not int:
            raise WireError(f"unknown tag {str(form[0])[:20]!r}")
        if "await" in form:
            return _awaited(self, form[1])
        if form[1] not in self.proxies:
            self.proxies[form[1]] = _proxy_class(tuple(str(name) for name in form[2:]))(self, form[1])
        return self.proxies[form[1]]

    def _exported(self, number: Any) -> Any:
        if type(number) is not int or not 0 <= number < len(self.exported):
            raise WireError("no such object")
        return self.exported[number]


async def _awaited(peer: Peer, number: int) -> Any:
    return peer.request("await", number)


def _described(error: BaseException, encoder: Encoder) -> list[Any]:
    """An exception as its nearest built-in class, its arguments where they are values, and its message."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    try:
        message = str(error)
    except Exception as second:
        message = f"an exception whose message raises {type(second).__name__}"
    plain = all(isinstance(value, str | int | float | bytes | None) for value in error.args)
    return [kind.__name__, [encoder.value(value) for value in (error.args if plain else (message,))], message]
