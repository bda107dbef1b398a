"""Each divergence wins its own column where optimisation is carried to the end: the counterpart of
`results/distill_matrix`, whose students stop after 160 steps, in a world small enough for that."""

from __future__ import annotations

import pytest
import torch

from fdiv.divergences import get_divergence
from fdiv.models.vocabulary import vocabulary_divergence

SIX = ("forward_kl", "squared_hellinger", "jensen_shannon", "total_variation", "jeffreys", "reverse_kl")
CONTEXTS, VOCABULARY, RANK = 12, 10, 2


@pytest.fixture(scope="module")
def teacher():
    """Logits of full rank, which a student of rank 2 cannot reach."""
    generator = torch.Generator().manual_seed(0)
    logits = 2.0 * torch.randn(CONTEXTS, VOCABULARY, generator=generator, dtype=torch.float64)
    return logits, torch.eye(VOCABULARY, dtype=torch.float64)


def mean_divergence(name, student, teacher):
    hidden, head = student
    return vocabulary_divergence(hidden, head, *teacher, get_divergence(name)).mean()


def descended(name, start, teacher):
    """The student after L-BFGS on the mean divergence `name`."""
    student = [part.clone().requires_grad_() for part in start]
    optimizer = torch.optim.LBFGS(student, max_iter=150, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = mean_divergence(name, student, teacher)
        loss.backward()
        return loss

    optimizer.step(closure)
    return [part.detach() for part in student]


def test_each_divergence_wins_its_own_column_at_its_optimum(teacher):
    """Each f descends from a common start, then twice from whichever of the six is nearest by f; that wins its column."""
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(n, RANK, generator=generator, dtype=torch.float64) for n in (CONTEXTS, VOCABULARY)]
    best = {name: descended(name, start, teacher) for name in SIX}
    for _ in range(2):
        near = {name: min(SIX, key=lambda other: mean_divergence(name, best[other], teacher).item()) for name in SIX}
        best = {name: descended(name, best[near[name]], teacher) for name in SIX}
    for column in SIX:
        by = {name: mean_divergence(column, best[name], teacher).item() for name in SIX}
        own = by.pop(column)
        assert own < min(by.values()) - 1e-4, (column, own, by)
