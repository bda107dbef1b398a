"""What a completion says: the SQL in it, the Python in it."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["extract_python", "extract_sql"]

FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def _fenced(text: str, languages: Sequence[str]) -> str | None:
    """The last closed block of one of these languages, else the last one without a language; None: none."""
    blocks = FENCE.findall(text)
    for wanted in (languages, ("",)):
        for language, content in reversed(blocks):
            if language.lower() in wanted:
                return content.strip()
    return None


def extract_sql(completion: str) -> str:
    """The query a completion ends with; "" where there is none.

    What follows the last `</think>` counts. In it, in this order: the last `<answer>…</answer>`; the last closed
    ```` ```sql ```` (or `sqlite`, or unnamed) block, inside the answer where there is one; otherwise the whole text. A
    block or an `<answer>` that is opened and never closed was cut off: there is no query.
    """
    text = completion.rpartition("</think>")[2]
    if answers := ANSWER.findall(text):
        text = answers[-1]
    elif "<answer>" in text.lower():
        return ""
    block = _fenced(text, ("sql", "sqlite"))
    if block is not None:
        return block
    return "" if "```" in text else text.strip()


def extract_python(completion: str) -> str:
    """The last closed ```` ```python ```` (or `py`, or unnamed) block after `</think>`, else the whole text.

    A block that is opened and never closed was cut off: there is no program. Indentation is kept where the whole text
    is the program, so that it may be the body of a function that the prompt began.
    """
    text = completion.rpartition("</think>")[2]
    block = _fenced(text, ("python", "py", "python3"))
    if block is not None:
        return block
    return "" if "```" in text else text.rstrip()
