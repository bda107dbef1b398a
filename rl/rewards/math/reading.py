r"""How the text of an answer is read: one reader for golds and for answers.

math-verify reads golds with a normalisation that it does not apply to answers, and misreads some LaTeX: `\frac12` in
an answer, `\frac\pi2`, `10\,000` (as 10 · 0), `21_3` (as 21), `0.\overline{3}`, `1.2e5`, `2t` (as 2,
with t for a unit). What is rewritten here is what its parser would get wrong; the rest is its own.
"""

from __future__ import annotations

import contextlib
import functools
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from .extraction import closing_brace, formulas

__all__ = ["Answer", "read"]

_UNICODE = str.maketrans({
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": "/",
    "⁄": "/", "∕": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "∪": r"\cup ",
    "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "±": r"\pm ", "°": r"^\circ ", "√": r"\sqrt ", "θ": r"\theta ",
    "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}", "⅛": r"\frac{1}{8}", "\u200b": "", "\ufeff": "",
    **{sign: f"^{{{digit}}}" for digit, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **{sign: f"_{{{digit}}}" for digit, sign in enumerate("₀₁₂₃₄₅₆₇₈₉")},
})  # fmt: skip
_ARGUMENTS = {"frac": 2, "dfrac": 2, "tfrac": 2, "cfrac": 2, "binom": 2, "dbinom": 2, "tbinom": 2, "sqrt": 1}
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_SPACED_FRACTION = re.compile(r"\\([dtc]?frac)\s+(\d+)\s+(\d+)")
_SCRIPT = re.compile(r"\s*(-?\d+(?:\.\d+)?|\\[A-Za-z]+|[^\s{}\\])")
_IN_PARENTHESES = re.compile(r"\^\s*\(([^()]*)\)")
_PLAIN_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)")
_SPACES = re.compile(
    r"(?<!\\)\\(?:[,;:!> ]|q?quad\b|hspace\{[^{}]*\}|displaystyle\b|textstyle\b|limits\b)|~|[\u00a0\u2009\u202f]"
)
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?=[\s()\[\]|.]|\\[{}|A-Za-z])")
_COMMAS = re.compile(r"(?<![\d.,])(\d{1,3})((?:\s?(?:,|\{,\})\d{3})+)(?![\d]|,\d)")
_GROUPS = re.compile(r"(?<![\d.,])(\d{1,3})((?:\s\d{3})+)(?![\d]|\s\d)")
_MIXED = re.compile(r"(-?\d+)\s+(\d+)\s*/\s*(\d+)")
_SCIENTIFIC = re.compile(r"(-?\d+(?:\.\d+)?)[eE]([-+]?\d+)")
_RECURRING = re.compile(r"(-?)(\d*)\.(\d*)\\(?:overline|bar|dot)\{?(\d+)\}?")
_BASE = re.compile(
    r"\(?\s*(?:\\text\{)?([0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?)\}?\s*\)?_\{(?:\\text\{)?\s*([A-Za-z]+|\d+)\s*\}?\}"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|mbox|hbox|bf|rm)\s*\{([^{}]*)\}")
_BOLD = re.compile(r"^\*\*(.*)\*\*$", re.DOTALL)
_WORDS = re.compile(r"[A-Za-z][A-Za-z'’-]*(?:[\s,]+[A-Za-z][A-Za-z'’-]*)*")
_SENTENCE = re.compile(r"[^\W\d_]{2,}\s+[^\W\d_]{2,}")
_TIME = re.compile(r"\d{1,2}:\d{2}\s*[ap]\.?\s*m?\.*", re.IGNORECASE)
_CHOICE = re.compile(r"\(?([A-Z])(?:\)|[.:])\s*(.*)", re.DOTALL)
_BASES = {name: str(number) for number, name in enumerate(
    "two three four five six seven eight nine ten eleven twelve".split(), start=2)}  # fmt: skip
_MISSING = frozenset(("", "nan", "n/a", "<na>", "[]", "null"))

UNITS: dict[str, tuple[str, str]] = {}
"""Name of a unit → (what it measures, how many of the first unit of its kind it is)."""
for _kind, _names in {
    "length": "mm millimeter millimetre 1|cm centimeter centimetre 10|dm decimeter decimetre 100|m meter metre 1000|"
    "km kilometer kilometre 1000000|in inch inche 25.4|ft foot feet 304.8|yd yard 914.4|mi mile 1609344",
    "mass": "mg milligram 1|g gm gram 1000|kg kilogram 1000000|oz ounce 28349.523125|lb pound 453592.37",
    "time": "s sec second 1|min minute 60|h hr hour 3600|day 86400|week 604800|year yr 31557600|month 2629800",
    "money": "cent ¢ 1|dollar usd buck 100",
    "volume": "ml milliliter millilitre 1|l liter litre 1000|gallon gal 3785.411784|cup 236.5882365",
    "angle": "degree deg 1|radian rad 57.29577951308232",
    "": "mph 1|unit 1|inches 1|cubic 1|square 1|sq 1|cu 1|people 1|person 1|student 1|apple 1|piece 1|times 1|point 1|"
    "percent 1|way 1|ways 1|coin 1|book 1|ticket 1|mark 1|page 1|item 1|child 1|children 1|kmh 1|kmph 1",
}.items():
    for _group in _names.split("|"):
        *_aliases, _size = _group.split()
        UNITS.update(dict.fromkeys(_aliases, (_kind, _size)))
_UNIT_WORDS = r"[A-Za-z¢$]+\.?(?:[\s./-]+[A-Za-z]+\.?)*"
_UNIT_AT_END = re.compile(
    rf"^(.*[\d}})!])\s*(?:\\(?:text|mathrm|mbox|hbox|textrm|textbf|rm)\s*\{{\s*({_UNIT_WORDS})\s*\}}|({_UNIT_WORDS}))"
    r"\s*(?:\^\{?([-\d]+)\}?)?\s*$",
    re.DOTALL,
)
_DEGREES = re.compile(
    r"^(.*?)\s*(?:\^\{?\\circ\}?|\\degree\b|\\deg\b)\s*(?:\\(?:text|mathrm)\{\s*[CFK]\s*\}|[CFK])?\s*$", re.DOTALL
)
_CURRENCY = re.compile(r"^(-?)\s*(?:\\?\$|[€£¥])\s*(?=[-\d.])")
_RELATION_HEAD = re.compile(
    r"^(?:=|[A-Za-z]\s*\\in(?![A-Za-z])|\\(?:approx|therefore|implies|Rightarrow)(?![A-Za-z]))\s*"
)


@dataclass(frozen=True)
class Answer:
    """An answer as read.

    Args:
        text: Its LaTeX, in the form math-verify's parser understands.
        key: `text` without white space; answers of one key are equal.
        raw_key: The text without white space, before anything else is rewritten.
        plain: The text without commands around words, in small letters.
        words: `plain`, where it is words rather than a product of letters.
        sentence: It is a sentence in plain text.
        base: Of a numeral with a base: digits and base.
        choice: Of one capital letter, or "C) five": the letter.
        unit: What it is counted in: the unit's name, with its power.
    """

    text: str
    key: str
    raw_key: str
    plain: str = ""
    words: str | None = None
    sentence: bool = False
    base: tuple[str, str] | None = None
    choice: str | None = None
    unit: str = ""
    missing: bool = False

    @property
    def readings(self) -> tuple[Any, ...]:
        """What math-verify's parser makes of it; () where it makes nothing."""
        return _parsed(self.text)


@functools.lru_cache(maxsize=256)
def _parsed(latex: str) -> tuple[Any, ...]:
    from latex2sympy2_extended import NormalizationConfig
    from latex2sympy2_extended.latex2sympy2 import normalize_latex
    from math_verify.parser import parse_latex_cached
    from sympy import Basic, MatrixBase

    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=False, nits=True, boxed="none")
    try:
        reading = parse_latex_cached(normalize_latex(latex, config=config))
    except Exception:  # whatever the parser raises: there is no reading
        return ()
    return (reading,) if isinstance(reading, Basic | MatrixBase) else ()


@functools.lru_cache(maxsize=1024)
def read(text: str) -> Answer:
    """Read the text of an answer: see the module for what is rewritten."""
    text = _mathematics(text.strip())
    raw_key = _key(text)
    if raw_key.lower() in _MISSING:
        return Answer(text, raw_key, raw_key, missing=True)
    text = unicodedata.normalize("NFKC", text.translate(_UNICODE))
    plain, wrapped = _words_alone(text)
    sentence = not wrapped and "\\" not in text and _SENTENCE.search(plain) is not None
    words = _folded(plain) if _is_text(plain, wrapped) else None
    text, unit = _without_unit(text)
    with contextlib.suppress(RecursionError):  # nested too deeply to rewrite, and so for the parser
        text = _rewritten(text)
    return Answer(
        text, _key(text), raw_key, plain=_folded(plain), words=words,
        sentence=sentence or _TIME.fullmatch(plain) is not None,
        base=_numeral(text), choice=_choice(plain), unit=unit,
    )  # fmt: skip


def _mathematics(text: str) -> str:
    """The formulas of a text without their delimiters, where what stands between them is no prose."""
    text = _BOLD.sub(r"\1", text.strip()).strip()
    found = list(formulas(text))
    if not found:
        return text
    pieces, end = [], 0
    for start, stop, _ in found:
        pieces.append(text[end:start])
        end = stop
    pieces.append(text[end:])
    words = {word.lower().removesuffix("s") for piece in pieces for word in re.findall(r"[^\W\d_]{2,}", piece)}
    if words - {"and", "or"} - UNITS.keys():
        return found[-1][2]
    contents = [content for _, _, content in found]
    return "".join(part for pair in zip(pieces, [*contents, ""], strict=True) for part in pair).strip()


def _key(text: str) -> str:
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", text).rstrip(".")


def _words_alone(text: str) -> tuple[str, bool]:
    r"""The text without `\text{…}` and the like around words, and whether there were some."""
    plain, count = _TEXT.subn(r"\1", _SPACES.sub(" ", text).replace(r"\$", "$"))
    return re.sub(r"\s+", " ", plain).strip().strip("$*").strip().rstrip(".,;"), count > 0


def _is_text(plain: str, wrapped: bool) -> bool:
    """Words rather than a product of letters: two letters in a text command, or four letters in a word."""
    if not _WORDS.fullmatch(plain):
        return False
    return len(plain) >= 2 and (wrapped or any(len(word) >= 4 for word in re.findall(r"[A-Za-z]+", plain)))


def _folded(plain: str) -> str:
    return re.sub(r"[\s,.'’-]+", " ", plain.casefold()).strip()


def _choice(plain: str) -> str | None:
    """The capital letter that an answer to a choice consists of, or begins with (`(C) 5`)."""
    if re.fullmatch(r"\(?[A-Z]\)?", plain):
        return plain.strip("()")
    match = _CHOICE.fullmatch(plain)
    if match is None or re.search(r"(?<![A-Za-z\\])[A-Z](?![A-Za-z])", match[2]):
        return None
    return match[1]


def _rewritten(text: str) -> str:
    text = _SIZES.sub("", _SPACES.sub(" ", text.replace(r"\!", "")))
    text = _RELATION_HEAD.sub("", text.strip()).strip().rstrip(".,;:").strip()
    text = _PLAIN_ROOT.sub(r"\\sqrt{\1}", _IN_PARENTHESES.sub(r"^{\1}", text))
    text = _with_braces(_SPACED_FRACTION.sub(r"\\\1{\2}{\3}", text))
    text = _COMMAS.sub(_joined, text)
    text = _GROUPS.sub(lambda match: match[1] + re.sub(r"\s", "", match[2]), text)
    if match := _MIXED.fullmatch(text):
        return rf"{match[1]}\frac{{{match[2]}}}{{{match[3]}}}"
    if match := _SCIENTIFIC.fullmatch(text):
        return rf"{match[1]}\times 10^{{{int(match[2])}}}"
    text = _RECURRING.sub(_fraction, text)
    # A product sign before a bracket of numbers and a bare point in front of digits are read wrongly.
    return re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)


def _joined(match: re.Match[str]) -> str:
    """A number without its commas, unless it is a pair or triple in brackets."""
    before, after = match.string[: match.start()].rstrip(), match.string[match.end() :].lstrip()
    enclosed = before.endswith(("(", "[", r"\{")) and after.startswith((")", "]", r"\}"))
    return match[0] if enclosed else match[1] + re.sub(r"\D", "", match[2])


def _fraction(match: re.Match[str]) -> str:
    sign, whole, fixed, period = match.groups()
    denominator = (10 ** len(period) - 1) * 10 ** len(fixed)
    numerator = int((whole or "0") + fixed + period) - int((whole or "0") + fixed)
    return rf"{sign}\frac{{{numerator}}}{{{denominator}}}"


def _with_braces(text: str) -> str:
    r"""The arguments of `\frac`, `\sqrt`, `\binom`, `^` and `_` in braces, as TeX takes them: the next group, command
    or character. Of numbers after `^` and `_` all digits are taken, as whoever writes `x^10` means it."""
    out, position = [], 0
    while position < len(text):
        command = _COMMAND.match(text, position)
        if command is not None and command[1] in _ARGUMENTS:
            rewritten, position = _command(text, command)
            out.append(rewritten)
        elif text[position] in "^_" and (script := _SCRIPT.match(text, position + 1)):
            if script[1] in (r"\frac", r"\sqrt", r"\text"):
                out.append(text[position])
                position += 1
            else:
                out.append(f"{text[position]}{{{script[1]}}}")
                position = script.end()
        elif command is not None:
            out.append(command[0])
            position = command.end()
        else:
            out.append(text[position])
            position += 1
    return "".join(out)


def _command(text: str, command: re.Match[str]) -> tuple[str, int]:
    name = re.sub(r"^[dtc](?=frac|binom)", "", command[1])
    out, position = [f"\\{name}"], command.end()
    if name == "sqrt" and (root := re.match(r"\s*\[([^\]]*)\]", text[position:])):
        out.append(f"[{_with_braces(root[1])}]")
        position += root.end()
    for _ in range(_ARGUMENTS[command[1]]):
        argument, position = _argument(text, position)
        if argument is None:
            break
        out.append(f"{{{argument}}}")
    return "".join(out), position


def _argument(text: str, position: int) -> tuple[str | None, int]:
    while position < len(text) and text[position].isspace():
        position += 1
    if position == len(text) or text[position] in "})":
        return None, position
    if text[position] == "{":
        end = closing_brace(text, position)
        return (None, position) if end is None else (_with_braces(text[position + 1 : end]).strip(), end + 1)
    command = _COMMAND.match(text, position)
    if command is None:
        return text[position], position + 1
    return _command(text, command) if command[1] in _ARGUMENTS else (command[0], command.end())


def _numeral(text: str) -> tuple[str, str] | None:
    match = _BASE.fullmatch(text)
    if match is None:
        return None
    base = _BASES.get(match[2].lower(), match[2])
    if not base.isdigit() or not any(character.isdigit() for character in match[1]):
        return None
    return match[1].upper().lstrip("0") or "0", base


def _without_unit(text: str) -> tuple[str, str]:
    r"""The text without its unit, and the unit: a currency sign, degrees, words in `\text{…}`, a known unit's name.

    Single letters that are not in a text command are variables.
    """
    if (money := _CURRENCY.match(text)) is not None:
        return money[1] + text[money.end() :], "dollar" if "$" in money[0] else ""
    if (degrees := _DEGREES.match(text)) is not None and degrees[1].strip():
        return degrees[1], "degree"
    match = _UNIT_AT_END.match(_SPACES.sub(" ", text).rstrip(" .")) if len(text) < 500 else None
    if match is None:
        return text, ""
    name = match[2] or match[3]
    words = [_singular(word) for word in re.split(r"[\s./-]+", name.lower()) if word]
    known = all(word in UNITS for word in words)
    bare = match[2] is None
    if words in (["and"], ["or"]) or (bare and (not known or len(name) == 1 or name in ("in",))):
        return text, ""
    power = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}.get(words[0], match[4] or "1")
    unit = words[-1] if known and len(words) <= 2 else ""
    return match[1], f"{unit}^{power}" if unit and power != "1" else unit


def _singular(word: str) -> str:
    return word if word in UNITS else word.removesuffix("s")
