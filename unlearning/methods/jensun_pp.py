"""JensUn++ (in SUITE, 2026): D_f to a refusal, perhaps behind a prefix of the answer; both halves' gradients alike.

With s = ‖∇R‖/‖∇F‖ over the logits of a micro-batch, γ·s·F + α·R; F = D_f(p_θ‖onehot) on the refusal's tokens and R =
D_f(p_θ‖p_ref) on the retain answer, the first token of each counting half. The paper takes Jensen–Shannon for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fdiv.divergences import get_divergence
from fdiv.errors import OptionError
from fdiv.training.config import DivergenceOptions, divergence_option, option
from fdiv.unlearning.config import TemplateConfig, retain_option
from fdiv.unlearning.data import EncodedAnswer, UnlearningCollator
from fdiv.unlearning.data.pairing import draw_prefix
from fdiv.unlearning.losses import balance_scale, check_one_hot_divergence, jensun
from fdiv.unlearning.methods.jensun import target_log_probs
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer
from fdiv.unlearning.vocabulary_losses import vocabulary_divergence


@dataclass
class JensUnPPConfig(DivergenceOptions, TemplateConfig):
    """Configuration of `JensUnPPTrainer`: the shared keys, where the refusal comes from, and those below.

    Published for Llama-3.2-3B: rate 3e-6, γ = 0.33, α = 1, 20 epochs. The scale of the forget half is a statistic of
    the micro-batch, so with it the run depends on how the global batch is split.
    """

    divergence: dict[str, Any] | str | None = divergence_option(
        "jensen_shannon", "f of the forget half, with f'(∞) < ∞, since the target is one-hot"
    )
    first_token_share: float = option(
        0.5, "Weight of the first token of an answer in its mean; the others share the rest", above=0, most=1
    )
    prefix_share: float = option(
        0.5, "Share of rows in which a prefix of the answer stands before the refusal (length k with weight 1/k)",
        least=0, most=1,
    )  # fmt: skip
    balance_gradients: bool = option(
        True, "Multiply the forget half by s, so that its gradient has the norm of the retain half's"
    )
    forget_weight: float = option(0.33, "γ, the weight of the forget term", least=0)
    retain_term: str = retain_option("divergence", "none")
    retain_divergence: dict[str, Any] | str | None = divergence_option(
        "jensen_shannon", "f of the retain half, policy against reference"
    )
    check_divergence = staticmethod(check_one_hot_divergence)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retain_term == "divergence" and self.retain_level != "vocabulary":
            raise OptionError(
                "retain_level='tokens': the balance of the gradients looks at logits; use vocabulary", "retain_level"
            )
        if self.retain_term == "none" and self.balance_gradients:
            raise OptionError(
                "balance_gradients: true needs a retain term to balance with; set it to false", "balance_gradients"
            )


@dataclass
class RefusalCollator(UnlearningCollator):
    """Rows `refusal`: the prompt, perhaps a prefix of the forget answer, and the refusal; and `retain`.

    `target_ids` are the refusal's own tokens; at the places of a prefix its first token, so that the model turns to
    the refusal wherever it is in the answer.

    Args:
        tokenizer: of the rows. seed: of the prefixes. share: of rows with a prefix. max_length: of a row.
    """

    tokenizer: Any = None
    seed: int = 0
    share: float = 0.5
    max_length: int | None = None

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """As of `UnlearningCollator`, with `target_ids[R, T]`."""
        made = [self.refusal_row(item) for item in items]
        parts = ({"retain": item["retain"]} if "retain" in item else {} for item in items)
        rows = [{"index": item["index"], "refusal": row, **part} for item, (row, _), part in
                zip(items, made, parts, strict=True)]  # fmt: skip
        batch = super().__call__(rows)
        targets = batch["input_ids"].clone()
        for position, (row, target) in enumerate(made):
            start = len(row.prompt_ids)
            targets[position, start : start + len(target)] = torch.tensor(target)
        return batch | {"target_ids": targets}

    def refusal_row(self, item: dict[str, Any]) -> tuple[EncodedAnswer, list[int]]:
        """The row of one item, and the target at each of its answer tokens."""
        prompt, answer = item["forget"]
        _, refusal = item["template"]
        words = self._words(answer)
        prefix = answer[: draw_prefix(self.seed, item["epoch"], item["index"], len(words), self.share)]
        if not prefix:
            return EncodedAnswer(prompt, refusal), list(refusal)
        # Behind a prefix the refusal begins in the middle of a sentence, with a space.
        own = self._words(refusal)
        text = self.tokenizer.decode(own, skip_special_tokens=True).strip()
        behind = self.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        answer_ids = [*prefix, *behind, *refusal[len(own) :]]
        targets = [refusal[0], *[behind[0]] * (len(prefix) - 1), *answer_ids[len(prefix) :]]
        room = None if self.max_length is None else max(1, self.max_length - len(prompt))
        return EncodedAnswer(prompt, answer_ids[:room]), targets[:room]

    def _words(self, ids: Sequence[int]) -> Sequence[int]:
        """An answer without its end."""
        end = next((place for place, token in enumerate(ids) if token in self._special), len(ids))
        return ids[:end]


class JensUnPPTrainer(UnlearningTrainer):
    """Trains `jensun` on refusals and `vocabulary_divergence` on retain answers, their gradients balanced.

    Logged as `prob/refusal`, `log_ratio/refusal_*`: of the targets. `forget_scale`: s, 1 in evaluation.
    """

    config_class = JensUnPPConfig
    title = "refusals behind prefixes of the answer, gradients of both halves balanced"
    paper = "arXiv:2607.09236"
    check_divergence = staticmethod(check_one_hot_divergence)
    forget_needs_logits = True
    roles = ("refusal", "retain")

    def make_collator(self) -> UnlearningCollator:
        """One that puts the refusals together."""
        args, rows = self.args, self.train_dataset
        return RefusalCollator(
            self._tokenizer.pad_token_id, self.roles, pad_to_multiple_of=args.pad_to_multiple_of,
            tokenizer=self._tokenizer, seed=rows.seed, share=args.prefix_share, max_length=args.max_length,
        )  # fmt: skip

    def score_roles(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, RoleScores]:
        """As of every method; the refusal rows are scored at their targets."""
        scores = super().score_roles(model, inputs)
        rows = scores["refusal"]
        reference = rows.reference
        if reference is not None:
            reference = replace(reference, log_probs=target_log_probs(replace(reference, target_ids=rows.target_ids)))
        scores["refusal"] = replace(rows, log_probs=target_log_probs(rows), reference=reference)
        return scores

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        refusal = scores["refusal"]
        return jensun(refusal.log_probs, refusal.mask, self.divergence, first_share=self.args.first_token_share)

    def retain_loss(self, retain: RoleScores) -> Tensor:
        """D_f(p_θ‖p_ref), the first token of the answer counting `first_token_share`."""
        divergence, share = get_divergence(self.args.retain_divergence), self.args.first_token_share
        return vocabulary_divergence(
            retain.logits, retain.reference.logits, retain.mask, divergence, first_share=share
        )  # fmt: skip

    def example_loss(
        self, scores: dict[str, RoleScores], forget_term: Tensor, retain_term: Tensor | None = None
    ) -> Tensor:
        self._scale = torch.ones((), device=forget_term.device)
        if self.args.balance_gradients and retain_term is not None and forget_term.requires_grad:
            self._scale = self._balance(scores, forget_term.mean(), retain_term.mean())
        return super().example_loss(scores, self._scale * forget_term, retain_term)

    def _balance(self, scores: dict[str, RoleScores], forget: Tensor, retain: Tensor) -> Tensor:
        """s; 1 where one of the halves is as good as 0, and has no direction."""
        if min(forget.item(), retain.item()) <= 1e-5:
            return torch.ones_like(forget.detach())
        norms = [
            torch.autograd.grad(term, scores[role].logits, retain_graph=True)[0].norm()
            for term, role in ((retain, "retain"), (forget, "refusal"))
        ]
        return balance_scale(*norms)

    def method_columns(self, scores: dict[str, RoleScores]) -> dict[str, Tensor]:
        """s, for the log."""
        return {"forget_scale": self._scale.reshape(1)}
