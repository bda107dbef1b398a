"""Sampling instead of greedy decoding: the most likely answer may be harmless and the second is not.

Greedy answers overstate forgetting; of many samples one often holds the secret (leak@k, arXiv:2511.04934).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fdiv.eval.unlearning.attacks.attacked import Attacked, Row, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SampledAnswers"]


@dataclass(frozen=True)
class SampledAnswers(Sampling):
    """`samples` answers to every row at `temperature`, cut to the `top_p` nucleus (1: everything)."""

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, seed: int
    ) -> Attacked:
        """The model and the rows as they are, to be sampled from."""
        return Attacked(model, rows, sampling=Sampling(self.samples, self.temperature, self.top_p))
