"""Passages of novels for a MUSE-like unlearning task: forget, retain and holdout texts, and questions about names.

Everything is cut out mechanically: a passage is a run of whole sentences, a question a sentence of a passage with one
name taken out. It has MUSE's parts (arXiv:2407.06460) on other books; it is not MUSE, and no number of the one can be
compared with a number of the other.
"""

from __future__ import annotations

import random
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Passage", "cut_passages", "find_names", "name_question", "read_novels"]

GAP = "____"
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)[\"'”’]?\s+(?=[\"'“‘]?[A-Z])")
_WORD = re.compile(r"[A-Za-z]+")
_TITLES = {"Mr", "Mrs", "Dr", "St", "Messrs"}
_QUESTION_WORDS = (5, 30)  # shorter sentences say too little to tell the name, longer ones cost too much to ask


class Passage(NamedTuple):
    """Whole sentences of one novel; `words` of `text` are the prompt of the verbatim test, the others its truth."""

    title: str
    text: str

    def split(self, words: int) -> tuple[str, str]:
        """(the first `words` words, the rest), as they stand in the text; the rest begins with its space."""
        cut = [match.start() for match in re.finditer(r" ", self.text)][words - 1]
        return self.text[:cut], self.text[cut:]


def read_novels(source: str, titles: Sequence[str]) -> dict[str, str]:
    """The text of each novel, white space collapsed, from a folder or tar archive that holds `TITLE.txt`.

    Raises:
        FileNotFoundError: `source` is neither, or lacks one of the titles.
    """
    path, wanted = Path(source), {f"{title}.txt": title for title in titles}
    found: dict[str, str] = {}
    if path.is_dir():
        found = {title: (path / name).read_text("utf-8") for name, title in wanted.items() if (path / name).is_file()}
    elif path.is_file() and tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            for member in archive:
                title = wanted.get(Path(member.name).name)
                if title is not None and member.isfile():
                    found[title] = archive.extractfile(member).read().decode("utf-8")
                if len(found) == len(wanted):
                    break
    else:
        raise FileNotFoundError(f"{source} is neither a folder nor a tar archive of novels: set prepare.data")
    missing = [title for title in titles if title not in found]
    if missing:
        raise FileNotFoundError(f"{source} holds no {missing[0]}.txt: give the titles as the files are called")
    return {title: " ".join(found[title].removeprefix("\ufeff").split()) for title in titles}


def sentences(text: str) -> list[str]:
    """Sentences of running text; their concatenation with single spaces is the text."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return [text[a:b].strip() for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def cut_passages(title: str, text: str, count: int, words: int) -> list[Passage]:
    """`count` passages of at least `words` and at most 1.5·`words` words, evenly spread over the novel.

    They do not overlap. The first and the last twentieth of the novel are left out (title pages, notes).

    Raises:
        ValueError: the novel is too short for that many.
    """
    whole = sentences(text)
    whole = whole[len(whole) // 20 : len(whole) - len(whole) // 20]
    passages, run, length = [], [], 0
    for sentence in whole:
        run, length = [*run, sentence], length + len(sentence.split())
        if length >= words:
            if length <= 1.5 * words:
                passages.append(Passage(title, " ".join(run)))
            run, length = [], 0
    if len(passages) < count:
        raise ValueError(f"{title} gives {len(passages)} passages of {words} words, {count} are asked for")
    return [passages[i * len(passages) // count] for i in range(count)]


def find_names(text: str, occurrences: int = 5) -> set[str]:
    """Names of persons and places: capitalised words that follow a lower-case word or a comma at least `occurrences`
    times and never stand in lower case in the novel."""
    inside = Counter(re.findall(r"(?<=[a-z,] )([A-Z][a-z]{2,})\b", text))
    lower = set(re.findall(r"\b[a-z]+\b", text))
    return {
        name for name, n in inside.items() if n >= occurrences and name.lower() not in lower and name not in _TITLES
    }


def name_question(passage: Passage, names: set[str], draw: random.Random) -> dict[str, str] | None:
    """A question whose answer is a name: a sentence of the passage with that name as a gap; None where it has none.

    A sentence counts that has exactly one occurrence of the name taken out.
    """
    shortest, longest = _QUESTION_WORDS
    options = []
    for sentence in sentences(passage.text):
        found = Counter(word for word in _WORD.findall(sentence) if word in names)
        if shortest <= len(sentence.split()) <= longest:
            options += [(sentence, name) for name, times in sorted(found.items()) if times == 1]
    if not options:
        return None
    sentence, name = draw.choice(options)
    gapped = re.sub(rf"\b{name}\b", GAP, sentence)
    return {"question": f"Which name is missing? {gapped}", "answer": name}
