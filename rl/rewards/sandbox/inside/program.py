"""The program's side: run what a model wrote and serve calls of its functions; or run it as a script.

Of the tests it sees the arguments of the calls, nothing else.
"""

from __future__ import annotations

import io
import os
import socket
import sys
from types import ModuleType
from typing import Any

from .confine import limit
from .peer import Peer
from .wire import Channel, ClosedError

__all__ = ["serve"]

MOST_PRINTED = 1 << 20


class _ProgramPeer(Peer):
    """Serves everything: there is nothing on this side but the program."""

    def __init__(self, channel: Channel, output: io.StringIO) -> None:
        super().__init__(channel)
        self.output = output

    def printed(self) -> str:
        text = self.output.getvalue()[:MOST_PRINTED]
        self.output.seek(0)
        self.output.truncate()
        return text


def _module(name: str) -> ModuleType:
    module = ModuleType(name)
    sys.modules[name] = module  # dataclasses and typing look their module up
    return module


def _run(source: str, module: ModuleType) -> None:
    # The sandbox is what this is for.
    exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)  # noqa: S102


def _serve(channel: Channel, source: str) -> None:
    module = _module("__program__")
    output = sys.stdout = io.StringIO()
    peer = _ProgramPeer(channel, output)

    def load(names: list[str]) -> dict[str, Any]:
        _run(source, module)
        return {name: vars(module)[name] for name in names if name in vars(module)}

    peer.export(load)  # object 0: the first request
    try:
        while True:
            peer.answer(channel.receive())
    except ClosedError:
        os._exit(0)


def serve(connection: int, *standard: int) -> None:
    """Run the program that comes through the connection.

    Args:
        connection: Descriptor of the socket to the tests, or to the worker of a script.
        standard: Descriptors of the standard input and output of a script.
    """
    channel = Channel(socket.socket(fileno=connection))
    task = channel.receive()
    limit(task["memory"], task["seconds"], task["file_bytes"])
    if not standard:
        _serve(channel, task["source"])
    channel.connection.close()
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
        os.close(descriptor)
    _run(task["source"], _module("__main__"))
