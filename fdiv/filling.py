"""Format strings: `{name}` is filled in, `{{` and `}}` are braces, and nothing else is read into them.

One rule for every template that a recipe or the command line takes (`prompt_format`, `question_format`,
`answer_format`, `template_instruction`, `anchor_instruction_templates`, …). Values are put in as they are: braces in
them are text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from fdiv.errors import DataError

__all__ = ["check_template", "fill"]

_PIECE = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]|[^{}]+")


@lru_cache(maxsize=256)
def _pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """(text, None) and ("", field), in order; a brace that is neither stands as ("{", "")."""
    pieces: list[tuple[str, str | None]] = []
    for match in _PIECE.finditer(template):
        whole = match.group()
        if match.group(1) is not None:
            pieces.append(("", match.group(1)))
        elif whole in ("{{", "}}"):
            pieces.append((whole[0], None))
        else:
            pieces.append((whole, "" if whole in "{}" else None))
    return tuple(pieces)


def check_template(template: object, fields: Sequence[str], *, needs: Sequence[str] = (), what: str) -> None:
    """Refuse a template that `fill` cannot fill with these fields.

    Args:
        template: the format string. fields: the names it may hold. needs: those it must hold.
        what: the option's name, for messages.

    Raises:
        DataError: (a ValueError) no text; a field that is not there, with those that are; a brace alone; a needed
            field that is missing.
    """
    there = ", ".join(f"{{{name}}}" for name in fields)
    if not isinstance(template, str):
        raise DataError(f"{what}={template!r}: give a text with {there} in it")
    pieces = _pieces(template)
    if any(field == "" for _, field in pieces):
        raise DataError(
            f"{what}={template!r}: a brace stands alone, or around something that is no name; write {{{{ and }}}} for "
            f"braces in the text (fields are {there})"
        )
    held = [field for _, field in pieces if field is not None]
    unknown = [field for field in held if field not in fields]
    if unknown:
        raise DataError(
            f"{what}={template!r} has the field {{{unknown[0]}}}, which is not there: fields are {there}; write {{{{ "
            "and }} for braces in the text"
        )
    for name in needs:
        if name not in held:
            raise DataError(f"{what}={template!r} does not contain {{{name}}}")


def fill(template: str, **values: str) -> str:
    """`template` with its fields replaced by `values`, and `{{`, `}}` by braces.

    Raises:
        DataError: (a ValueError) see `check_template`.
    """
    check_template(template, tuple(values), what="the template")
    return "".join(text if field is None else values[field] for text, field in _pieces(template))
