"""Stamps: what a result was made with, compared key by key before it is used beside another.

A stamp is a flat mapping of plain values: that of the encoding (`fdiv.inference.encoding.encoding_stamp`), the number
type, the settings of the sampling. What makes two results incomparable is refused; what may be fine is said.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fdiv.errors import DataError
from fdiv.named import shown

__all__ = ["NOTED", "compare_stamps"]

NOTED = ("dtype", "backend", "tokenizer", "end_tokens", "seed")
"""Keys whose difference is said and not refused: rounding, random streams, other models' vocabularies and ends."""

_WHOLE = "template"  # every stamp of an encoding has it since 0.3; one without it says only a part


def compare_stamps(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any] | None,
    what: str,
    remedy: str,
    *,
    noted: Collection[str] = NOTED,
) -> list[str]:
    """Compare what a record was made with to what it is used with.

    A key that one of them lacks is a difference, unless a stamp is of a release before stamps were whole (it has no
    `template`): then what it lacks was not compared, and that is said.

    Args:
        ours: the stamp of what is measured now. theirs: that of the record; None or empty where it has none.
        what: the record, for messages. remedy: what to do where they differ.
        noted: keys of which a difference is a note.

    Returns:
        Notes, to be printed and recorded; empty where everything was compared and is equal.

    Raises:
        DataError: a key differs that is not in `noted`; the message has the key, both values and the remedy.
    """
    if not theirs:
        return [f"{what} does not say how its prompts were encoded: prompts, template and number type not compared"]
    whole = _WHOLE in ours and _WHOLE in theirs
    notes, unknown = [], []
    for key in dict.fromkeys((*ours, *theirs)):
        known = key in ours and key in theirs
        if known and ours[key] == theirs[key]:
            continue
        if not known and (not whole or key in noted):
            unknown += [key] if key not in noted else []
            continue
        differs = f"{what} was made with {key}={_shown(theirs, key)}, now it is {_shown(ours, key)}"
        if key not in noted:
            raise DataError(f"{differs}: {remedy}")
        notes.append(differs)
    if unknown and not whole:
        notes.append(f"{what} says nothing of {', '.join(unknown)}: not compared")
    return notes


def _shown(stamp: Mapping[str, Any], key: str) -> str:
    return shown(stamp[key], 160) if key in stamp else "(not set)"
