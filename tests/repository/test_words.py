"""Plain words: the list in CONTRIBUTING ("Words"), held like a linter over docs, comments, docstrings and messages."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Code is spelt as it must be: spans, fenced blocks, and the parameter names at the head of a docstring's lines.
_CODE = re.compile(r"```.*?```|``[^`]+``|`[^`\n]+`|^ *\w+(?: \([^)]*\))?:(?= )", re.DOTALL | re.MULTILINE)


def banned(text: str) -> dict[str, str]:
    """The table of CONTRIBUTING's "Words": what is not written → what is."""
    section = text.partition("\n## Words\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE)[1:]  # without its head
    return {word.strip(): plain for words, plain in rows for word in words.split(",")}


def without_code(text: str) -> str:
    """Prose with code blanked out, line for line."""
    return _CODE.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def prose_of_python(source: str, strings: bool) -> Iterator[tuple[int, str]]:
    """Line and text of every comment and docstring; with `strings`, of every string of several words too."""
    tree = ast.parse(source)
    documented = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) in documented or (strings and " " in node.value.strip()):
                yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def prose_of(file: str) -> Iterator[tuple[int, str]]:
    """Line and text of what a reader of `file` reads."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.endswith(".py"):
        yield from prose_of_python(text, strings=not file.startswith("tests/"))
    elif file.endswith(".md"):
        head, words, tail = text.partition("\n## Words\n")
        yield 1, head if file == "CONTRIBUTING.md" else text
        if words and file == "CONTRIBUTING.md":
            section, _, rest = tail.partition("\n## ")
            yield head.count("\n") + section.count("\n") + 3, rest
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if "#" in line:
                yield number, line.partition("#")[2]


def files() -> list[str]:
    """Every file of the repository that holds prose of ours; CHANGELOG is history, and stays."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    return [file for file in listed if file.endswith((".py", ".md", ".yaml")) and file != "CHANGELOG.md"]


def found(text: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    """Line offset and word of every hit in prose."""
    prose = without_code(text)
    for match in pattern.finditer(prose):
        yield prose.count("\n", 0, match.start()), match.group()


@pytest.fixture(scope="module")
def words():
    return banned((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pattern(words):
    return re.compile(r"\b(?:" + "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in words) + r")\b", re.I)


def test_no_word_of_the_list_is_written(words, pattern):
    assert len(words) >= 20
    plain = {word.lower(): instead for word, instead in words.items()}
    hits = [
        f"{file}:{line + offset}: {word!r}: write {plain[' '.join(word.lower().split())]}"
        for file in files()
        if pattern.search((ROOT / file).read_text(encoding="utf-8"))  # parsing takes longer
        for line, text in prose_of(file)
        for offset, word in found(text, pattern)
    ]
    assert not hits, "\n".join(hits)


def test_the_check_sees_prose_and_nothing_else(words, pattern):
    source = '"""Lawful\n`lawful` ones\n\n    nobody: a name\n    anew.\n"""\nlawful = "lawful"\nx = f"{lawful} nobody knows"  # drawn\n'
    hits = [(line + at, word) for line, text in prose_of_python(source, True) for at, word in found(text, pattern)]
    assert sorted(hits) == [(1, "Lawful"), (5, "anew"), (8, "drawn"), (8, "nobody")]
    hits = [word for _, text in prose_of_python(source, False) for _, word in found(text, pattern)]
    assert sorted(hits) == ["Lawful", "anew", "drawn"]
    assert [word for _, word in found("```\nanew\n```\nhanded\nover", pattern)] == ["handed\nover"]
