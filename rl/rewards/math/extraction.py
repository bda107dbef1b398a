r"""Where the answer stands in a completion, and in a text that serves as gold.

math-verify finds answers by regular expressions that take time quadratic in the length of hostile text, and takes a
box that an unfinished answer has left behind for the answer; so the places are found here, in one pass each.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

__all__ = ["boxed", "final_answer", "gold_answer"]

_completions = runpy.run_path(str(Path(__file__).parent.with_name("completions.py")))
after_reasoning, last_answer = _completions["after_reasoning"], _completions["last_answer"]

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])[ \t\n]*")
_CUT_OFF = re.compile(r"\\(?:b(?:o(?:x(?:e(?:d[ \t\n]*)?)?)?)?|f(?:b(?:o(?:x[ \t\n]*)?)?)?)\Z")
_UNBRACED = re.compile(r"[-+]?(?:\d[\d.,/:]*|\\[A-Za-z]|[A-Za-z](?![A-Za-z])|\.\d)")
_BETWEEN = re.compile(
    r"(?:\s|\$|\\[()\[\],;:! ]|\\q?quad|\\text\{\s*(?:and|or|,)\s*\}|\*\*|\b(?:and|or)\b|[,;&]|[A-Za-z]_?\w?\s*=)*"
)
_DELIMITER = re.compile(r"\\[()\[\]]|\\\$|\\\\|\$\$?|\n")
_ANSWER_WORD = re.compile(r"answer", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:\\?%|percent\b)")
_AND = re.compile(r"\s*(?:,|,?\s*\b(?:and|or)\b)\s*")
_NUMBER = r"[-+−]?[$€£]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_EXPRESSION = re.compile(rf"(?<![\w.]){_NUMBER}(?:[ ]?(?:[-+−*/^×÷:]|\*\*)[ ]?\(?{_NUMBER}\)?)*\s?(?:\\?%)?")

LONGEST = 5000  # characters of an answer
NEAR = 60  # characters between the word "answer" and what it announces
LINE = 300  # characters of a line that are searched for a number
LAST = 2000  # characters at the end of a completion that are searched for a number


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` (or `\fbox`), with those right before it that belong to one answer, as in
    `\boxed{1} and \boxed{2}`; "" where the last one is cut off; None: there is none. Empty boxes do not count."""
    if _CUT_OFF.search(text, max(0, len(text) - 20)):
        return ""
    contents: list[str] = []
    next_start = None
    for match in reversed(list(_BOX.finditer(text))):
        found = _box_content(text, match.end())
        if found is None:
            if text[match.end() : match.end() + 1] == "{" and not contents:
                return ""
            continue
        content, end = found
        if next_start is not None and end > next_start:  # the box around this one
            break
        if not content:
            continue
        if next_start is not None:
            between = text[end:next_start]
            if len(between) > 40 or not _BETWEEN.fullmatch(between):
                break
        if content not in contents:
            contents.append(content)
        next_start = match.start()
    return ", ".join(reversed(contents)) if contents else None


def _box_content(text: str, start: int) -> tuple[str, int] | None:
    if text[start : start + 1] == "{":
        end = closing_brace(text, start)
        return None if end is None else (text[start + 1 : end].strip(), end + 1)
    if not _UNBRACED.match(text, start):
        return None
    end = start
    most = min(len(text), start + 200)
    while end < most and not text[end].isspace() and text[end] != "$" and text[end : end + 2] not in (r"\)", r"\]"):
        group = closing_brace(text, end) if text[end] == "{" else None
        end = end + 1 if group is None else group + 1
    return text[start:end].rstrip(".,;:*"), end


def closing_brace(text: str, start: int) -> int | None:
    """The position of the brace that closes the one at `start`, escaped ones apart; None: none within the longest
    answer."""
    depth, position = 0, start
    most = min(len(text), start + LONGEST)
    while position < most:
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def formulas(text: str) -> Iterator[tuple[int, int, str]]:
    r"""Begin, end and content of what stands between `$…$`, `$$…$$`, `\(…\)` and `\[…\]`."""
    closers = {"$": "$", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}
    opened: tuple[str, int, int] | None = None
    for match in _DELIMITER.finditer(text):
        mark = match[0]
        if mark in (r"\$", r"\\"):
            continue
        if opened is not None and (mark == closers[opened[0]] or {mark, opened[0]} == {"$", "$$"}):
            if content := text[opened[2] : match.start()].strip():
                yield opened[1], match.end(), content
            opened = None
        elif mark == "\n":
            if opened is not None and opened[0] in ("$", r"\("):  # a lone dollar sign
                opened = None
        elif mark in closers and (opened is None or opened[0] == "$"):
            opened = (mark, match.start(), match.end())


def _joined(text: str, found: list[tuple[int, int, str]], first: int) -> str:
    """The formula of this number with those that follow it by "," and "and"; a percent sign behind belongs to it."""
    parts, end = [], None
    for start, stop, content in found[first : first + 6]:
        if end is not None and not (start - end <= 12 and _AND.fullmatch(text[end:start])):
            break
        percent = _PERCENT.match(text, stop)
        parts.append(content + (r"\%" if percent else ""))
        end = percent.end() if percent else stop
    return ", ".join(parts)


def _announced(text: str, found: list[tuple[int, int, str]]) -> str | None:
    """The formula after the last "answer" that has one near it."""
    answer, number = None, 0
    for word in _ANSWER_WORD.finditer(text):
        while number < len(found) and found[number][0] < word.end():
            number += 1
        if number == len(found):
            break
        if found[number][0] - word.end() <= NEAR:
            answer = _joined(text, found, number)
    return answer


def _plain(text: str) -> str | None:
    """The number or arithmetic expression that a line announces or ends with."""
    numbers = [match[0].strip().rstrip(",:") for match in _EXPRESSION.finditer(text)]
    return numbers[-1] if numbers else None


def _line_answer(line: str) -> str | None:
    """The answer in a line that holds nothing else, or some words around a number."""
    line = line.strip().strip("*").strip()[:LINE]
    if not line:
        return None
    if "$" in line or "\\(" in line:  # the reader sees to the words around formulas
        return line
    return line if not re.search(r"[^\W\d_]{2,}\s+[^\W\d_]{2,}", line) else _plain(line) or line


def final_answer(completion: str, *, plain: bool = False, opened: bool = False) -> str | None:
    r"""The answer that a completion ends with; None where there is none.

    What follows the reasoning counts. In it, in this order: the last `\boxed{…}`; a formula after the word "answer";
    with `plain` also what follows the last `####`, the last `<answer>…</answer>`, a number after the word "answer",
    the last formula or number. Reasoning that never ends, or a last box that is cut off, leaves no answer.

    Args:
        completion: The text, hostile by assumption.
        plain: Accept answers that are neither boxed nor announced formulas.
        opened: The prompt has opened the reasoning.
    """
    text = after_reasoning(completion, opened=opened)
    if text is None:
        return None
    box = boxed(text)
    if box is not None:
        return box or None
    found = list(formulas(text))
    announced = _announced(text, found)
    if announced is not None or not plain:
        return announced
    _, mark, after = text.rpartition("####")
    if mark and after.strip():
        return _line_answer(after.strip().split("\n", 1)[0])
    tagged = last_answer(text)
    if tagged is not None:
        return _line_answer(tagged)
    return _last_plain(text, found)


def _last_plain(text: str, found: list[tuple[int, int, str]]) -> str | None:
    words = list(_ANSWER_WORD.finditer(text))
    if words:
        line = text[words[-1].end() : words[-1].end() + LINE].split("\n", 1)[0]
        numbers = list(_EXPRESSION.finditer(line[: NEAR + 40]))
        if numbers:
            return numbers[0][0].strip().rstrip(",:")
    begin = max(0, len(text) - LAST)
    last = next(reversed(list(_EXPRESSION.finditer(text, begin))), None)
    if found and (last is None or found[-1][1] > last.start()):
        return found[-1][2]
    return None if last is None else last[0].strip().rstrip(",:")


def gold_answer(gold: str) -> str:
    r"""The answer in a gold text: what follows the last `####` (GSM8K), and in it the last box, if there is one."""
    text = gold.rpartition("####")[2].strip()
    return boxed(text) or text
