"""The text of a completion, whichever of TRL's two forms it has: what scorers and rewards look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["completion_text"]


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion, plain or conversational (the contents of its messages, joined by newlines).

    A message without content (a tool call) counts as empty.
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] or "" for message in completion)
