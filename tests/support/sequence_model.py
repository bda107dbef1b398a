"""An autoregressive model small enough to enumerate: every sequence, its exact probability, every gradient.

Sequences over `symbols` tokens end with token 0 (end of sequence) or at `length` tokens. `tabular` has one row of
logits per prefix and can represent every distribution; the unigram one shares a single row and cannot.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


class SequenceModel:
    """Float64 logits of shape `[prefixes, symbols]` (tabular) or `[1, symbols]` (unigram), and all sequences."""

    def __init__(self, symbols: int = 3, length: int = 3, *, tabular: bool = True, fixed_length: bool = False) -> None:
        prefixes: dict[tuple[int, ...], int] = {}
        self.sequences: list[tuple[int, ...]] = []
        for sequence in itertools.product(range(symbols), repeat=length):
            end = length if fixed_length or 0 not in sequence else sequence.index(0) + 1
            if sequence[:end] not in self.sequences:
                self.sequences.append(sequence[:end])
        self._rows = torch.zeros(len(self.sequences), length, dtype=torch.long)
        self._tokens = torch.zeros_like(self._rows)
        self._mask = torch.zeros(self._rows.shape, dtype=torch.float64)
        for number, sequence in enumerate(self.sequences):
            for position, token in enumerate(sequence):
                prefix = sequence[:position] if tabular else ()
                self._rows[number, position] = prefixes.setdefault(prefix, len(prefixes))
                self._tokens[number, position] = token
                self._mask[number, position] = 1.0
        self.logits = torch.zeros(len(prefixes), symbols, dtype=torch.float64, requires_grad=True)

    def randomize(self, seed: int, scale: float = 1.0) -> SequenceModel:
        """Draw the logits; returns self."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.logits.copy_(scale * torch.randn(self.logits.shape, generator=generator, dtype=torch.float64))
        return self

    @property
    def mask(self) -> Tensor:
        """`[sequences, length]`, 1 for the tokens of each sequence."""
        return self._mask

    def token_log_probs(self) -> Tensor:
        """`[sequences, length]`, log π of every token given its prefix, 0 after the end, with gradient."""
        return self.logits.log_softmax(-1)[self._rows, self._tokens] * self._mask

    def log_probs(self) -> Tensor:
        """`[sequences]`, log π of every sequence, with gradient to the logits."""
        return self.token_log_probs().sum(-1)

    def visits(self, probability: Tensor) -> Tensor:
        """`[prefixes]`, how often each prefix is reached under `probability` `[sequences]` (rows of `logits`)."""
        reached = (probability[:, None] * self._mask).flatten()
        return torch.zeros(len(self.logits), dtype=reached.dtype).index_add(0, self._rows.flatten(), reached)

    def gradient(self, value: Tensor) -> Tensor:
        """∂value/∂logits."""
        return torch.autograd.grad(value, self.logits, retain_graph=True)[0]
