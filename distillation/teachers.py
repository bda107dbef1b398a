"""The teacher: loading it, and whether it speaks of the same tokens as the student."""

from __future__ import annotations

from typing import Any

import torch

from fdiv.errors import DataError

__all__ = ["load_teacher", "shared_tokens", "teacher_tokenizer"]


def load_teacher(name: str, revision: str | None = None, **loading: Any) -> Any:
    """The teacher from its path or hub name, frozen, in evaluation mode.

    Without a `dtype` it is float32 on a processor and the checkpoint's own type elsewhere.

    Raises:
        DataError: it cannot be loaded, or is an encoder-decoder model.
    """
    from trl.trainer.utils import create_model_from_path

    from fdiv.models.fetch import find_model
    from fdiv.models.loading import check_causal

    check_causal(name, revision)
    loading.setdefault("dtype", "auto" if torch.accelerator.is_available() else "float32")
    if revision is not None:
        loading.setdefault("revision", revision)
    try:
        model = create_model_from_path(find_model(name), **loading)
    except (OSError, ValueError) as error:
        raise DataError(f"the teacher {name!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    return model.requires_grad_(False).eval()


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
