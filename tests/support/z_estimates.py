"""The error of f-DPG's estimates of Z on the enumerable world, along a training whose gradient knows Z.

`python -m tests.support.z_estimates` prints the table of docs/f_dpg.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv.alignment import f_dpg_loss
from fdiv.alignment.f_dpg.partition import PartitionEstimates
from tests.support.sequence_model import SequenceModel

#: Shown in the table: steps whose error is, and columns. `moving` and `true spread` are for comparison only.
STEPS = (5, 20, 60)
COLUMNS = ("group", "loo", "moving", "history", "pooled", "true spread")
_EMA = 0.1  # of `moving`, u ← (1 − γ)u + γ·mean P/q


class World(NamedTuple):
    """A line of the table: the target, samples per prompt and step, prompts, and how often it is run."""

    target: str
    samples: int
    prompts: int
    runs: int


WORLDS = tuple(
    World(target, samples, prompts, runs)
    for target in ("soft, β = 1", "soft, β = ½", "hard")
    for samples, prompts, runs in ((4, 1, 24), (16, 1, 24), (64, 1, 24), (4, 16, 6), (16, 16, 6))
)


def _prompt(seed: int, target: str) -> tuple[SequenceModel, Tensor, float]:
    """A policy at its base, log P of every sequence, and log Z."""
    model = SequenceModel().randomize(seed)
    base = model.log_probs().detach()
    generator = torch.Generator().manual_seed(1000 + seed)
    reward = torch.randn(len(base), generator=generator, dtype=torch.float64)
    if target == "hard":
        allowed = torch.rand(len(base), generator=generator) < 0.4
        allowed[base.argmin()] = True
        log_p = base.masked_fill(~allowed, -math.inf)
    else:
        log_p = base + reward / (1.0 if target == "soft, β = 1" else 0.5)
    return model, log_p, log_p.logsumexp(0).item()


def _generations(world: World, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(prompts, log P/q, true log Z, true Var(P/q)/Z²) of the rows of each step; the policy learns with the true Z."""
    generator = torch.Generator().manual_seed(seed)
    made = [_prompt(100 * seed + number, world.target) for number in range(world.prompts)]
    optimizer = torch.optim.Adam([model.logits for model, _, _ in made], lr=0.05)
    prompts = torch.arange(world.prompts).repeat_interleave(world.samples)
    for _ in range(steps):
        importance, loss, spreads = [], torch.zeros((), dtype=torch.float64), []
        for model, log_p, log_z in made:
            log_pi = model.log_probs()
            now = log_pi.detach()
            drawn = torch.multinomial(now.exp(), world.samples, replacement=True, generator=generator)
            importance.append((log_p - now)[drawn])
            spreads.append((2 * (log_p - log_z) - now).logsumexp(0).exp() - 1.0)
            loss = loss + f_dpg_loss(log_pi[drawn], (now - log_p + log_z)[drawn], "jensen_shannon").mean()
        exact = torch.tensor([log_z for _, _, log_z in made], dtype=torch.float64)
        yield prompts, torch.cat(importance), exact[prompts], torch.stack(spreads).clamp(min=1e-9)[prompts]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class _Comparison:
    """What the package does not offer: an exponential moving average, and weights from the true spread."""

    def __init__(self, prompts: int) -> None:
        self.moving: Tensor | None = None
        self.sums = torch.zeros(2, prompts, dtype=torch.float64)

    def update(self, prompts: Tensor, importance: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        count = len(self.sums[0])
        mean = torch.zeros(count, dtype=torch.float64).scatter_reduce(
            0, prompts, importance.exp(), "mean", include_self=False
        )
        self.moving = mean if self.moving is None else (1 - _EMA) * self.moving + _EMA * mean
        weight = 1.0 / torch.zeros(count, dtype=torch.float64).scatter(0, prompts, spread)
        self.sums += torch.stack([weight * mean, weight])
        return self.moving.log()[prompts], (self.sums[0] / self.sums[1]).log()[prompts]


def errors(world: World) -> dict[str, list[float]]:
    """Root mean square of log Ẑ − log Z after each of `STEPS`, over runs and prompts; Ẑ = 0 is left out."""
    squares: dict[str, list[list[Tensor]]] = {name: [[] for _ in STEPS] for name in COLUMNS}
    for run in range(world.runs):
        estimates = {name: PartitionEstimates(name) for name in ("group", "loo", "history", "pooled")}
        other = _Comparison(world.prompts)
        for step, (prompts, importance, exact, spread) in enumerate(_generations(world, run, STEPS[-1]), 1):
            found = {name: estimate.update(prompts, importance) for name, estimate in estimates.items()}
            found["moving"], found["true spread"] = other.update(prompts, importance, spread)
            if step in STEPS:
                for name, log_z in found.items():
                    gap = (log_z - exact)[torch.isfinite(log_z)]
                    squares[name][STEPS.index(step)].append(gap.square())
    return {name: [torch.cat(part).mean().sqrt().item() for part in parts] for name, parts in squares.items()}


def row(world: World) -> str:
    """A line of the table."""
    cells = [" / ".join(f"{value:.2g}" for value in values) for values in errors(world).values()]
    return f"| {world.target} | {world.samples} | {world.prompts} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in WORLDS:
        sys.stdout.write(f"{row(line)}\n")
        sys.stdout.flush()
