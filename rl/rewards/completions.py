"""What a completion says: what follows its reasoning, its fenced blocks, the SQL and the Python in it.

The text is hostile by assumption: every function here takes time linear in its length, and the rewards call them in
their workers. This file needs the standard library alone, so that a worker can load it by path.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "Block", "after_reasoning", "blocks", "extract_python", "extract_sql", "find_program", "last_answer",
    "prompt_code", "tested_names",
]  # fmt: skip

_REASONING = re.compile(
    r"<(/?)(?:think|thinking|thought|reasoning|seed:think)>|\[(/?)THINK\]|<\|(begin|end)_of_thought\|>"
)
_ANSWER = re.compile(r"<(/?)answer>", re.IGNORECASE)
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_FENCE = re.compile(r"([ \t]*(?:[-*+>][ \t]+|\d+[.)][ \t]+)?)(`{3,}|~{3,})([^\n]*)")
_FENCE_IN_LINE = re.compile(r"()(`{3,})([^\n]*)")
_FUTURE = re.compile(r"^from __future__ import [^\n]*\n?", re.MULTILINE)
_CODE_BEGINS = re.compile(r"^(?:import |from \w|def |async def |class |@)", re.MULTILINE)

PYTHON_TAGS = frozenset("python py python3 py3 python2 ipython ipython3 cpython sage pycon".split())
SQL_TAGS = frozenset("sql sqlite sqlite3 mysql postgres postgresql psql pgsql tsql plsql ansi-sql".split())
PLAIN_TAGS = frozenset(("", "text", "txt", "plain", "plaintext", "code", "answer", "solution"))


def after_reasoning(text: str, *, opened: bool = False) -> str | None:
    """What follows the reasoning; None where the reasoning never ends.

    Args:
        text: A completion.
        opened: The prompt has opened the reasoning (as the chat templates of R1 and QwQ do): until it is closed,
            everything is reasoning.
    """
    start, inside = 0, opened
    for tag in _REASONING.finditer(text):
        closing = "/" in (tag[1], tag[2]) or tag[3] == "end"
        inside = not closing
        if closing:
            start = tag.end()
    return None if inside else text[start:]


def last_answer(text: str) -> str | None:
    """The content of the last `<answer>…</answer>`; "" where one is opened and never closed; None: there is none."""
    begin, content = None, None
    for tag in _ANSWER.finditer(text):
        if not tag[1]:
            begin = tag.end()
        elif begin is not None:
            content, begin = text[begin : tag.start()], None
    return "" if begin is not None else content


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        tag: Its language in small letters: the first word after the fence, without braces and dots.
        text: Its content. Indentation is kept, apart from the fence's own.
        closed: False: the text ends inside it.
    """

    tag: str
    text: str
    closed: bool = True


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a text, in order.

    Fences are three or more backticks or tildes at the beginning of a line, indented or in a list or not; a block ends
    with a fence as long, on a line of its own or, where there is none, at the end of its last line of code. Line ends
    may be those of Windows.
    """
    lines = _LINE.findall(_unix(text))
    # The first line from each on that begins with a fence: found once, so that no block has to search for it.
    fenced = [len(lines)] * (len(lines) + 1)
    for number in range(len(lines) - 1, -1, -1):
        fenced[number] = number if _FENCE.match(lines[number]) else fenced[number + 1]
    found, number = [], 0
    while number < len(lines):
        fence = _FENCE.match(lines[number]) or _FENCE_IN_LINE.search(lines[number])
        if fence is None:
            number += 1
            continue
        # Pairs on one line (```SELECT 1```) are blocks; what an unpaired fence opens goes on in the next lines.
        *pairs, info = fence[3].rstrip().split(fence[2])
        found += [_inline(pair) for pair in pairs[::2]]
        number += 1
        if len(pairs) % 2 == 0:
            content, closed, number = _content(lines, fenced, number, fence[2])
            found.append(Block(_tag(info), _dedented(content, len(fence[1].expandtabs())), closed))
    return found


def _content(lines: list[str], fenced: list[int], first: int, mark: str) -> tuple[list[str], bool, int]:
    """The lines of the block that begins with line `first`, whether it is closed, and the line after it."""
    for number in range(first, len(lines)):
        line = lines[number].strip()
        if mark not in line:
            continue
        if _closes(line, mark):
            return lines[first:number], True, number + 1
        if line.startswith(mark) and not line.endswith(mark):  # the next block opens: this one has been left open
            return lines[first:number], False, number
        if line.endswith(mark):
            # A fence at the end of a line of code closes the block, unless a fence on a line of its own follows.
            end = fenced[number + 1]
            if end < len(lines) and _closes(lines[end].strip(), mark):
                return lines[first:end], True, end + 1
            return [*lines[first:number], lines[number].rstrip().rstrip(mark[0])], True, number + 1
    return lines[first:], False, len(lines)


def _closes(line: str, mark: str) -> bool:
    return line.startswith(mark) and not line.strip(mark[0])


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _tag(info: str) -> str:
    words = info.lower().split()
    return words[0].strip("{}.:") if words else ""


def _inline(text: str) -> Block:
    tag, _, rest = text.strip().partition(" ")
    named = tag.lower() in PYTHON_TAGS | SQL_TAGS
    return Block(tag.lower(), rest.strip()) if named else Block("", text.strip())


def _dedented(lines: list[str], indent: int) -> str:
    text = "".join(line[_margin(line, indent) :] if indent else line for line in lines)
    return text.rstrip().lstrip("\n")


def _margin(line: str, most: int) -> int:
    """How many of the first characters are indentation to take away: a block in a list is indented like its fence."""
    margin = 0
    while margin < min(most, len(line)) and line[margin] in " \t":
        margin += 1
    return margin


def _answers(text: str, tags: Collection[str]) -> list[str]:
    """The blocks that may hold the answer, in order: those of the language; without one, those without a language;
    without one, all. Empty where the last of these was cut off."""
    found = blocks(text)
    for wanted in (tags, PLAIN_TAGS, {block.tag for block in found}):
        chosen = [block for block in found if block.tag in wanted]
        if chosen:
            return [block.text for block in chosen] if chosen[-1].closed else []
    return []


def extract_sql(completion: str, *, opened: bool = False) -> str:
    """The query a completion ends with; "" where there is none.

    What follows the reasoning (`</think>`) counts. In it, in this order: the last `<answer>…</answer>`; the last
    ```` ```sql ```` block (or `sqlite`, `postgresql` …; without one, the last unnamed one; without one, the last),
    inside the answer where there is one; otherwise the whole text. Reasoning, a block or an `<answer>` that is opened
    and never closed was cut off: there is no query. `opened`: see `after_reasoning`.
    """
    text = after_reasoning(completion, opened=opened)
    answer = None if text is None else last_answer(text)
    text = text if answer is None else answer
    if not text:
        return ""
    if "```" in text or "~~~" in text:
        return (_answers(text, SQL_TAGS) or [""])[-1].strip()
    return text.strip()


def extract_python(completion: str, defines: Collection[str] = (), *, opened: bool = False) -> str:
    """The program in a completion; "" where there is none.

    What follows the reasoning (`</think>`) counts. In it the last ```` ```python ```` block (or `py`, `python3` …;
    without one, the last unnamed one; without one, the last) that defines one of `defines`, if one does; without
    blocks the last `<answer>…</answer>`, or the whole text. Reasoning or a block that is opened and never closed was
    cut off: there is no program. Indentation is kept: the text may be the body of a function that the prompt began.
    `opened`: see `after_reasoning`.
    """
    return (_programs(completion, defines, opened) or [""])[-1]


def _programs(completion: str, defines: Collection[str], opened: bool) -> list[str]:
    """The program in a completion, after the blocks that stand before it."""
    text = after_reasoning(completion, opened=opened)
    if text is None:
        return []
    if "```" not in text and "~~~" not in text:
        answer = last_answer(text)
        return [_unix(text if answer is None else answer.strip("\r\n")).rstrip()]
    found = _answers(text, PYTHON_TAGS)
    last = max((number for number, block in enumerate(found) if _defined(block, defines)), default=len(found) - 1)
    return found[: last + 1]


def _defined(program: str, names: Collection[str]) -> bool:
    """Whether a program defines one of `names` at its top level: a function, a class, an assignment or an import."""
    if not names:
        return False
    either = "|".join(map(re.escape, sorted(names)))
    pattern = (
        rf"^(?:(?:async[ \t]+)?def|class)[ \t]+(?:{either})\b|^(?:{either})[ \t]*(?::[^=\n]*)?=(?!=)"
        rf"|^(?:from|import)\b[^\n]*\b(?:{either})[ \t]*(?:,|$)"
    )
    return re.search(pattern, program, re.MULTILINE) is not None


def find_program(
    completion: str,
    prompt: str | Sequence[Mapping[str, str]],
    names: Collection[str] = (),
    *,
    continues: bool = True,
    opened: bool = False,
) -> str:
    """The program that a completion stands for, with what it takes from its prompt; "" where it holds none.

    An answer that defines one of `names` is a program of its own: before it come the imports, functions, classes and
    constants of the prompt's code and of the answer's earlier blocks, so that a function may be restated without its
    header. Any other answer continues the prompt, if that is text.

    Args:
        completion: The answer, hostile by assumption.
        prompt: Text (code to be continued, or a question with code in it), or a conversation.
        names: What the program has to define.
        continues: False: an answer that defines none of `names` stands alone, too.
        opened: See `after_reasoning`.
    """
    *earlier, program = _programs(completion, names, opened) or [""]
    if not program.strip():
        return ""
    if names and continues and not _defined(program, names) and isinstance(prompt, str):
        return _unix(prompt) + program
    header = [_definitions(code, names) for code in (*prompt_code(prompt), *earlier)]
    # `from __future__` has to come first.
    program = "\n".join([*filter(None, header), program])
    return "".join(_FUTURE.findall(program)) + _FUTURE.sub("", program)


def prompt_code(prompt: str | Sequence[Mapping[str, str]]) -> list[str]:
    """The pieces of Python in a prompt, or in the last message of a conversation."""
    last = prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "") if prompt else ""
    return _code(_unix(last))


def _code(prompt: str) -> list[str]:
    """The Python in a prompt: the whole of it, its blocks, or what follows the first line that begins like code."""
    if _parsed(prompt) is not None:
        return [prompt]
    if "```" in prompt:
        return [block.text for block in blocks(prompt) if block.tag in PYTHON_TAGS | PLAIN_TAGS]
    begin = _CODE_BEGINS.search(prompt)
    return [] if begin is None else [prompt[begin.start() :]]


def _parsed(code: str) -> ast.Module | None:
    """The syntax tree; of a text that ends in something else, that of the lines before. None: there is none."""
    for _ in range(2):
        try:
            return ast.parse(code)
        except SyntaxError as error:
            code = "".join(code.splitlines(keepends=True)[: max(0, (error.lineno or 1) - 1)])
            if not code.strip():
                return None
        except (ValueError, RecursionError, MemoryError):
            return None
    return None


def _definitions(code: str, without: Collection[str]) -> str:
    """The imports, functions, classes and constants of `code`, but for the functions `without` and what uses them."""
    tree = _parsed(code)
    kept = []
    for node in tree.body if tree is not None else []:
        if not isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
                          | ast.Assign | ast.AnnAssign):  # fmt: skip
            continue
        if getattr(node, "name", None) in without:
            continue
        if isinstance(node, ast.Assign | ast.AnnAssign):
            used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            if used & set(without):
                continue
        kept.append(ast.unparse(node))
    return "\n".join(kept)


def tested_names(tests: str) -> set[str]:
    """The names that tests use and do not define: the functions that the program has to bring. Empty where the tests
    are no Python."""
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    used, known = set(), set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            used.add(node.func.id)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            known.add(node.name)
        elif isinstance(node, ast.alias):
            known.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.arg):
            known.add(node.arg)
    return used - known
