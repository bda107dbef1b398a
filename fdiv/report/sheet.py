"""The HTML of a page: its style, light, dark and on paper, and its elements. No scripts, nothing from outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from fdiv.report.drawing import DARK, LIGHT
from fdiv.report.examples import Question

__all__ = ["bullets", "details", "document", "legend", "paragraph", "questions", "table"]

_LONGEST = 1_500  # characters of an answer that are shown


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def _style() -> str:
    """The style sheet, with the colours of plots as variables."""
    text = Path(__file__).with_name("sheet.css").read_text(encoding="utf-8")
    return text.replace("/* light */", _variables(LIGHT)).replace("/* dark */", _variables(DARK))


def document(title: str, parts: Iterable[str], sections: Mapping[str, str]) -> str:
    """The whole page; `sections` are the anchors and names of its headings."""
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name in sections.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_style()}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n<nav>{links}</nav>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """A line of text; `kind` is `sub`, `note` or `failed`."""
    return f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text)}</p>"


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], hovers: Mapping[str, str],
    best: Iterable[tuple[int, int]] = (), kinds: Mapping[tuple[int, int], str] | None = None,
) -> str:  # fmt: skip
    """A table; the first column is text.

    Args:
        header: Of the columns. rows: their cells.
        hovers: A heading or a first cell in it shows that text on hover.
        best: (row, column) of cells that are marked as the best.
        kinds: (row, column) → `better` or `worse`.
    """
    best, kinds = set(best), kinds or {}

    def cell(tag: str, text: str, row: int, column: int) -> str:
        title = hovers.get(text) if tag == "th" or column == 0 else None
        kind = "best" if (row, column) in best else kinds.get((row, column), "")
        title = title or {"best": "the best of these"}.get(kind, "")
        attributes = (f' class="{kind}"' if kind else "") + (f' title="{escape(title)}"' if title else "")
        return f"<{tag}{attributes}>{escape(text)}</{tag}>"

    head = "".join(cell("th", text, -1, column) for column, text in enumerate(header))
    body = "\n".join(
        f"<tr>{''.join(cell('td', text, place, column) for column, text in enumerate(row))}</tr>"
        for place, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def details(summary: str, content: str) -> str:
    """HTML folded away."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def bullets(lines: Iterable[tuple[str, str]]) -> str:
    """(text, kind) of each line."""
    found = "".join(f'<li class="{kind}">{escape(text)}</li>' for text, kind in lines)
    return f"<ul>{found}</ul>" if found else ""


def legend(colours: Mapping[str, str], key: str) -> str:
    """What the lines of all panels are; a box that is unticked hides its lines, by style rules alone.

    Args:
        colours: Label → colour.
        key: What `inline_svg` put before the names of the lines.
    """
    rules, entries = "", ""
    variables = {colour: name for name, colour in reversed(LIGHT.items())}
    for place, (label, colour) in enumerate(colours.items()):
        box = f'<input type="checkbox" id="{key}show-{place}" checked/>'
        rules += f'body:has(#{key}show-{place}:not(:checked)) [id^="{key}s{place}-"] {{ display: none; }}\n'
        entries += f'<label style="--colour: var(--{variables[colour]})">{box}<i></i>{escape(label)}</label>'
    return f'<style>{rules}</style><div class="legend">{entries}</div>' if entries else ""


def questions(found: Sequence[Question]) -> str:
    """Prompts, each with its answers side by side."""
    return "".join(map(_question, found))


def _question(question: Question) -> str:
    answers = "".join(
        f"<div><b>{escape(answer.heading)}{_score(answer.score)}</b>"
        f'<div class="text">{escape(_cut(answer.text)) or "<i>(empty)</i>"}</div></div>'
        for answer in question.answers
    )
    truth = f'<div class="truth text">right answer: {escape(_cut(question.truth))}</div>' if question.truth else ""
    return (
        f'<div class="question"><div class="text">{escape(_cut(question.prompt))}</div>{truth}'
        f'<div class="answers">{answers}</div></div>'
    )


def _score(score: float | bool | None) -> str:
    if score is None:
        return ""
    return f" · {('right' if score else 'wrong') if isinstance(score, bool) else f'{score:.3g}'}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text) - _LONGEST} more characters)"
