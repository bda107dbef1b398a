"""The tests' side: run a dataset's tests, with the functions of the program behind proxies.

The process has one socket to the program's sandbox and one to the worker. What it sends the worker is the verdict.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import socket
import sys
from types import CodeType, ModuleType
from typing import Any

from .confine import limit
from .peer import Peer
from .wire import Channel, ClosedError, WireError

__all__ = ["serve"]

TESTS = "__tests__"


class _ProgramEnded(BaseException):
    """The program's process is gone. No `except` of a test is meant to catch it."""


class _TestsPeer(Peer):
    """Lets the program hold what the tests pass to it, and use only that."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self.used = False
        self.ended = False

    def check_export(self, value: Any) -> None:
        if isinstance(value, ModuleType) or not (callable(value) or hasattr(value, "__next__") or _is_own(value)):
            raise TypeError(f"a {type(value).__name__} of the tests cannot be passed to the program")

    def check_request(self, do: str, target: Any, name: str) -> None:
        own = _is_own(target) and not isinstance(target, type)
        if do == "call" or (do == "special" and (own or name in ("__next__", "__iter__"))):
            return
        if not own or do not in ("get", "set") or name.startswith("_"):
            raise AttributeError(f"{type(target).__name__!r} object has no attribute {name!r}")

    def show(self, text: str) -> None:
        if text:
            sys.stdout.write(text)

    def request(self, do: str, on: int, *rest: Any) -> Any:
        self.used = self.used or do != "get"
        try:
            return super().request(do, on, *rest)
        except ClosedError:
            self.ended = True
            raise _ProgramEnded from None


def _is_own(value: Any) -> bool:
    return type(value).__module__ == TESTS


def _names(code: CodeType) -> set[str]:
    """The names that a piece of code, or a function in it, may take from its module."""
    nested = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, nested))


def _is_stub(node: ast.stmt) -> bool:
    """Whether a function is only announced: a docstring, `pass`, `...` or NotImplementedError."""
    for part in node.body:
        literal = isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
        if not (literal or isinstance(part, ast.Pass | ast.Raise)):
            return False
    return True


def _given(codes: list[str], tested: list[str]) -> list[ast.stmt]:
    """The prompt's imports and finished functions, but for those under test: the dataset's own, which the program may
    not redefine for it."""
    statements = []
    for code in codes:
        with contextlib.suppress(SyntaxError, ValueError, RecursionError):
            statements += ast.parse(code).body
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    return [
        node
        for node in statements
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, functions) and node.name not in tested and not _is_stub(node))
    ]


def _examine(program: Channel, task: dict[str, Any]) -> dict[str, Any]:
    """The verdict on one program."""
    program.send(task["program"])
    tests = task["tests"] + (f"\ncheck({task['entry_point']})\n" if task["entry_point"] else "")
    given = [ast.Module([node], []) for node in _given(task["given"], task["names"])]
    pieces = [compile(node, "<prompt>", "exec", dont_inherit=True) for node in given]
    try:
        sources = (("<setup>", task["setup"]), ("<tests>", tests))
        code = [compile(source, name, "exec", dont_inherit=True) for name, source in sources]
    except (SyntaxError, ValueError) as error:
        return {"verdict": "unusable_gold", "detail": f"the tests do not compile: {error}"}

    peer = _TestsPeer(program)
    wanted = set().union(*map(_names, [*pieces, *code])) - set(dir(builtins))
    module = sys.modules[TESTS] = ModuleType(TESTS)
    loaded = peer.request("call", 0, "", (sorted(wanted),))
    peer.used = False
    if type(loaded) is not dict:
        raise WireError("no names")
    names = {name: value for name, value in loaded.items() if name in wanted and not name.startswith("__")}
    module.__dict__.update(names)
    for piece in pieces:
        with contextlib.suppress(Exception):  # an import that is missing here: the tests may not need it
            exec(piece, module.__dict__)  # noqa: S102
    data = any(isinstance(value, str | int | float | list | dict | tuple | set) for value in names.values())
    for piece in code:
        try:
            exec(piece, module.__dict__)  # noqa: S102
        except (ImportError, MemoryError) as error:
            if peer.used or data:
                raise
            said = f"{type(error).__name__}: {error}".rstrip(": ")
            return {"verdict": "unusable_gold", "detail": f"the tests fail before they call the program: {said}"[:200]}
    if peer.ended:  # and a test caught what said so
        raise _ProgramEnded
    if not peer.used and not data:
        return {"verdict": "unusable_gold", "detail": "the tests call nothing of the program"}
    return {"verdict": "correct"}


def serve(worker: int, program: int) -> None:
    """Run the tests that the worker sends, and send it the verdict.

    Args:
        worker: Descriptor of the socket to the worker.
        program: Descriptor of the socket to the program.
    """
    channel = Channel(socket.socket(fileno=worker))
    task = channel.receive()
    limit(task["memory"], task["seconds"], task["file_bytes"])
    try:
        verdict = _examine(Channel(socket.socket(fileno=program)), task)
    except (_ProgramEnded, ClosedError):
        verdict = {"verdict": "ended"}
    except BaseException as error:  # a failed test, SystemExit and MemoryError alike
        verdict = {"verdict": "wrong", "detail": f"{type(error).__name__}: {error}"[:200]}
    channel.send(verdict)
