"""What teachers have in common of which only the top k of each distribution is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fdiv.distillation.cache import Said
from fdiv.distillation.teachers.vocabularies import shared_tokens, teacher_tokenizer
from fdiv.divergences import Divergence, get_divergence
from fdiv.errors import DataError, OptionError
from fdiv.models.fingerprints import tokenizer_fingerprint
from fdiv.models.vocabulary import Head, TopK, VocabularyScores, score_topk

__all__ = ["check_is_f", "check_student_tokens", "score_said", "share_note"]


def check_is_f(args: Any, title: str) -> None:
    """Refuse a distance that is no f-divergence: joining cells bounds those alone.

    Raises:
        OptionError: it is none.
    """
    divergence = args.resolve_divergence()
    if not isinstance(divergence, Divergence):
        raise OptionError(
            f"divergence={args.divergence!r}: {title} gives the top k of each distribution, and over those and the "
            "rest only an f-divergence bounds the whole: take one (`fdiv divergences`), or a teacher in memory",
            key="divergence",
        )


def score_said(
    trainer: Any, said: Said, hidden: Tensor, head: Head, token_ids: Tensor, uniform: bool
) -> VocabularyScores:
    """The student over the k cells and the rest, with the teacher's own numbers beside."""
    device = hidden.device
    top = TopK(*(None if part is None else part.to(device) for part in said.top))
    scores = score_topk(
        hidden, head, top, token_ids, trainer.divergence, temperature=trainer.temperature, uniform=uniform
    )
    entropy = None if said.entropy is None else said.entropy.to(device)
    return scores._replace(log_q=said.log_probs.to(device), entropy_q=entropy)


def check_student_tokens(
    trainer: Any, tokenizer: str, fingerprint: str | None, vocabulary: int, name: str
) -> int | None:
    """How many tokens the student's head is cut to, so that it speaks of the teacher's `vocabulary` tokens; None: all.

    Args:
        tokenizer: path or name of the teacher's. fingerprint: of it, where it is known; equal ones need no look.
        name: the teacher, for messages.

    Raises:
        DataError: another vocabulary, with the first token that differs; no tokenizer to compare with; a student that
            lacks tokens of the teacher.
    """
    width = trainer.model.config.get_text_config().vocab_size
    ours = trainer._tokenizer
    if fingerprint is None or tokenizer_fingerprint(ours) != fingerprint:
        theirs = teacher_tokenizer(tokenizer)
        if theirs is None:
            raise DataError(f"{name}: there is no tokenizer to compare at {tokenizer}")
        try:
            shared_tokens(ours, theirs, width, vocabulary)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
    if width < vocabulary:
        raise DataError(
            f"{name} speaks of {vocabulary} tokens and the student of {width}: resize the student's embeddings "
            "(model.resize_token_embeddings), or take a teacher of the student's vocabulary"
        )
    return None if width == vocabulary else vocabulary


def share_note(share: Mapping[str, Any] | None, divergence: Divergence, k: int) -> Sequence[str]:
    """What a run says of how much of the divergence its top k holds, by the sample that `fdiv teach` took."""
    if share is None:
        return [f"top {k}: the share of the divergence that it holds was not measured (`fdiv teach --student`)"]
    found = {get_divergence(entry["divergence"]).label: entry["share"] for entry in share["table"]}
    values = found.get(divergence.label, {})
    rows = f"a sample of {share['rows']} rows, before training"
    if str(k) in values and values[str(k)] is not None:
        return [f"top {k} holds {values[str(k)]:.3f} of {divergence.label} ({rows})"]
    return [f"top {k}: its share of {divergence.label} is not among those measured"]
