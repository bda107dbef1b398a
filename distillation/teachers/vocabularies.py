"""Whether teacher and student speak of the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fdiv.errors import DataError

__all__ = ["check_known_tokens", "shared_tokens", "teacher_tokenizer"]


def teacher_tokenizer(teacher: Any, **loading: Any) -> Any | None:
    """The tokenizer beside a teacher's weights; None where there is none to read (a model built in memory)."""
    from transformers import AutoTokenizer

    from fdiv.models.fetch import find_model

    name = teacher if isinstance(teacher, str) else getattr(teacher.config, "_name_or_path", "")
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(find_model(name), **loading)
    except (OSError, ValueError):
        return None


def shared_tokens(student: Any, teacher: Any | None, student_width: int, teacher_width: int) -> int | None:
    """How many tokens, from id 0 on, both heads speak of; None: all of both, which are equally wide.

    One tokenizer with heads padded to two widths shares those of the narrower head; a vocabulary that only adds tokens
    at the end of the other's shares the shorter one. What lies beyond is left out of both distributions.

    Args:
        student, teacher: the tokenizers; a teacher without one is trusted where the widths agree.
        student_width, teacher_width: rows of the LM heads.

    Raises:
        DataError: an id below that stands for two different tokens.
    """
    if teacher is None:
        if student_width != teacher_width:
            raise DataError(
                f"the teacher has {teacher_width} tokens and the student {student_width}, and the teacher has no "
                "tokenizer beside it to compare: save it with its tokenizer, and name its folder"
            )
        return None
    ours, theirs = ({id_: token for token, id_ in tokenizer.get_vocab().items()} for tokenizer in (student, teacher))
    both = min(max(ours, default=-1), max(theirs, default=-1)) + 1
    different = [number for number in range(both) if ours.get(number) != theirs.get(number)]
    if different:
        first = different[0]
        raise DataError(
            f"student and teacher have different vocabularies: token {first} is {ours.get(first)!r} and "
            f"{theirs.get(first)!r} ({len(different)} of {both} differ), so their distributions cannot be compared: "
            "take a teacher of the student's family"
        )
    if len(ours) == len(theirs) and student_width == teacher_width:
        return None
    return min(both if len(ours) != len(theirs) else student_width, student_width, teacher_width)


def check_known_tokens(
    rows: Iterable[Sequence[int]],
    tokenizer: Any,
    shared: int | None,
    where: str,
    names: Sequence[str] | None = None,
) -> None:
    """Refuse rows with a token that the teacher lacks: it can neither read it nor give it a probability.

    Args:
        rows: token ids of each, by the student's tokenizer. shared: what `shared_tokens` gave. where: all of them,
            names: each of them, for messages.

    Raises:
        DataError: with how many rows have one, and the first of them.
    """
    if shared is None:
        return
    foreign = [next((token for token in ids if token >= shared), None) for ids in rows]
    found = [(number, token) for number, token in enumerate(foreign) if token is not None]
    if found:
        number, token = found[0]
        raise DataError(
            f"{where}: {len(found)} of {len(foreign)} rows have a token that the teacher lacks, the first is "
            f"{f'row {number}' if names is None else names[number]} with token {token} "
            f"({tokenizer.convert_ids_to_tokens(token)!r}), and it knows {shared} tokens: leave the token out of "
            "rows, chat template and end tokens, or take a teacher that was trained with it"
        )
