"""What a person sees in the terminal: one-line messages and tables. Nothing is printed by any but the main process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fdiv import lazy
from fdiv.secrets import redacted

__all__ = ["binary_size", "error", "error_of_any", "info", "is_main_process", "number", "print_table"]

_ERRORS = "FDIV_EVAL_ERRORS"  # the folder for errors of processes that share an evaluation (fdiv.cli.shared_processes)
_LATE = 3.0  # seconds in which a launcher ends the other processes of one that has failed
_LONGEST = 1_000  # characters of an error: less than ten lines of a terminal


def is_main_process() -> bool:
    """Whether this is the process that prints and writes, of those a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def info(message: str) -> None:
    """A line of progress, on stderr, without secrets; a terminal that is closed or full stops no run."""
    if is_main_process():
        with suppress(OSError):
            sys.stderr.write(f"{redacted(message)}\n")
            sys.stderr.flush()


def error(message: str) -> None:
    """An error as exactly one line on stderr; of one that fills the screen the middle is left out."""
    line = _as_line(message)
    if _ERRORS in os.environ:  # whoever started this process shows one line for all of them
        with suppress(OSError), open(os.path.join(os.environ[_ERRORS], os.environ.get("RANK", "0")), "a") as file:
            file.write(f"{redacted(line)}\n")
            return
    info(f"fdiv: {line}")


def error_of_any(message: str) -> None:
    """`error` of whichever process: one other than the main one waits a little, then says its line and its number.

    What is wrong with data or options all find at about the same time. The main process says it, and its launcher ends
    the others while they wait; an error that one process has alone would go unsaid, and the launcher names its exit
    code only.
    """
    if is_main_process() or _ERRORS in os.environ:
        error(message)
        return
    time.sleep(_LATE)
    with suppress(OSError):
        sys.stderr.write(redacted(f"fdiv: process {os.environ['RANK']}: {_as_line(message)}\n"))
        sys.stderr.flush()


def _as_line(message: str) -> str:
    line = "".join(char if char.isprintable() else "�" for char in " ".join(message.split()))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 300]} … {line[-297:]}"


def number(value: Any) -> str:
    """A number to four significant digits, plain where that is readable; `–` for a missing one."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{int(value)}" if isinstance(value, int) else f"{value:.1f}"
    size = abs(value)
    if 1e-3 <= size < 1e5:
        digits = max(0, 3 - len(str(int(size))) + 1) if size >= 1 else 4
        return f"{value:.{digits}f}"
    return f"{value:.3g}"


def binary_size(size: int | None) -> str:
    """A number of bytes in KiB, MiB or GiB; `not modelled` for a missing one."""
    if size is None:
        return "not modelled"
    unit = next((unit for unit in (3, 2) if size >= 1024**unit), 1)
    return f"{size / 1024**unit:.2f} {('KiB', 'MiB', 'GiB')[unit - 1]}"


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
    text_columns: Sequence[int] = (0,),
    on_stderr: bool = False,
) -> None:
    """A table on stdout, with lines of notes below; `text_columns` are left-aligned, the others right-aligned.

    `on_stderr`: there instead, where stdout carries a document.
    """
    if not is_main_process():
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in text_columns else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(redacted, row))
    stream = sys.stderr if on_stderr else sys.stdout
    console = Console(width=None if stream.isatty() else 200, file=stream)
    console.print(table)
    for note in notes:
        console.print(redacted(note), markup=False, highlight=False, soft_wrap=True)


def divergence_label(spec: Any) -> str:
    """`reverse_kl`, `alpha(alpha=0.3)`, or `no divergence`."""
    if spec is None:
        return "no divergence"
    if not isinstance(spec, dict):
        return str(spec)
    parameters = ", ".join(f"{name}={value}" for name, value in spec.items() if name != "name")
    return f"{spec.get('name')}({parameters})" if parameters else str(spec.get("name"))


complain = error  # its name in release 0.1

# Names of release 0.1 that live elsewhere now.
__getattr__, __dir__ = lazy.attach(__name__, {"run_table": "fdiv.report.table"})
