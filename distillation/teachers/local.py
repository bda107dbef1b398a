"""A teacher in memory: another model, its weights frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fdiv.distillation.teachers.base import Teacher, teacher_inputs
from fdiv.distillation.teachers.vocabularies import shared_tokens, teacher_tokenizer
from fdiv.errors import DataError
from fdiv.models.fingerprints import weights_fingerprint
from fdiv.models.reference import placed
from fdiv.models.vocabulary import (
    Head,
    VocabularyScores,
    check_head,
    last_hidden_states,
    model_head,
    score_vocabulary,
)

__all__ = ["HiddenStates", "LocalTeacher", "cut_head", "load_teacher"]


class HiddenStates(NamedTuple):
    """What a model in memory says of the tokens: `hidden[N, H]`, and its head, made when it is needed."""

    hidden: Tensor
    head: Callable[[], Head]


@dataclass
class LocalTeacher(Teacher):
    """`teacher: local`: the model `teacher_model_name_or_path`, or the `teacher_model` of the trainer, in memory."""

    title: ClassVar[str] = "a model in memory"
    in_memory: ClassVar[bool] = True

    def copies(self, peft: bool) -> int | None:
        """A model of another size."""
        return None

    def attach(self, trainer: Any, model: Any) -> None:
        """Load the teacher, compare vocabularies and heads, and place it as the backend wants it."""
        args = trainer.args
        if model is None:
            raise DataError(
                "there is no teacher: set teacher_model_name_or_path, pass teacher_model, or set `teacher` to another "
                "kind"
            )
        tokenizer = teacher_tokenizer(model, trust_remote_code=args.trust_remote_code)
        if isinstance(model, str):
            loading = {"trust_remote_code": args.trust_remote_code, **(args.teacher_model_init_kwargs or {})}
            self.name = model
            model = load_teacher(model, args.teacher_model_revision, **loading)
        elif args.teacher_model_init_kwargs is not None:
            raise DataError("teacher_model_init_kwargs load a teacher from its name, but teacher_model is a model")
        else:
            self.name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        widths = [part.config.get_text_config().vocab_size for part in (trainer.model, model)]
        self.shared = shared_tokens(trainer._tokenizer, tokenizer, *widths)
        check_head(trainer.model)
        check_head(model)
        self.fingerprint = weights_fingerprint(model)
        self.trainer = trainer
        trainer.teacher_model = placed(trainer, model.requires_grad_(False).eval())

    def identity(self) -> Any:
        """Its weights."""
        return self.fingerprint

    def settings(self) -> Any:
        """Its name."""
        return self.name

    def read(self, inputs: dict[str, Tensor], mask: Tensor) -> HiddenStates:
        """Its hidden states at the completion's tokens."""
        trainer = self.trainer
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        with torch.no_grad(), trainer.accelerator.autocast():
            hidden = trainer._forward_redirection(
                trainer.teacher_model, teacher, last_hidden_states, teacher, *teacher_inputs(inputs)
            )
        return HiddenStates(hidden[mask], lambda: cut_head(teacher, self.shared))

    def score(
        self, said: HiddenStates, hidden: Tensor, head: Head, token_ids: Tensor, uniform: bool
    ) -> VocabularyScores:
        """Over the whole vocabulary."""
        return score_vocabulary(
            hidden,
            head,
            said.hidden.to(hidden.device),
            said.head(),
            token_ids,
            self.trainer.divergence,
            temperature=self.trainer.temperature,
            uniform=uniform,
        )


def cut_head(model: nn.Module, tokens: int | None) -> Head:
    """The LM head, whole under FSDP, and cut to the first `tokens` tokens.

    Raises:
        DataError: it cannot be cut, for ZeRO-3 shards it.
    """
    head = model_head(model)
    if tokens is not None and hasattr(head.weight, "ds_status"):
        raise DataError(
            "heads of two widths cannot be cut while ZeRO-3 shards them: resize the student's embeddings to the "
            "teacher's (model.resize_token_embeddings), or use ZeRO-2"
        )
    weight, bias = (part.full_tensor() if hasattr(part, "full_tensor") else part for part in head[:2])
    return head._replace(weight=weight, bias=bias).cut(tokens)


def load_teacher(name: str, revision: str | None = None, **loading: Any) -> Any:
    """The teacher from its path or hub name, frozen, in evaluation mode.

    Args:
        name: path or hub name.
        revision: of the hub's repository; None: its newest.
        loading: what `from_pretrained` takes besides. Without a `dtype` it is float32 on a processor and the
            checkpoint's own type elsewhere.

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
