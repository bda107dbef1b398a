"""Z of each prompt: estimated over all of training, per step, or given. The state is plain numbers, saved as JSON."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fdiv.alignment.f_dpg.loss import grouped_logsumexp

__all__ = ["Z_MODES", "PartitionEstimates"]

Z_MODES = ("history", "pooled", "group", "loo", "given")
#: Samples behind the running spread of P/q, and the weight of its start at 1 beside them: half of it stays 1.
_MEMORY = 16.0


class PartitionEstimates:
    """log Ẑ(x) per prompt x; Ẑ is a mean of P/q over samples, so it is unbiased (log Ẑ is not).

    Args:
        mode: `"history"`: the mean over every sample of the prompt so far (this step's among them); `"pooled"`: the
            same, where the samples of a step weigh 1/ρ, ρ about Var(P/q)/Z² of the proposal that they came from (see
            `_weight`); `"group"`: over this step's samples (α-DPG); `"loo"`: for each sample over the others of its
            prompt in this step, so that Ẑ does not depend on the sample it is used for; `"given"`: known, passed to
            `update`.
        z_max: upper bound on Ẑ; 1 for a filter target, where Z is a probability. None: none.
        z_floor: what an estimate below it becomes. None: prompts with Ẑ = 0 are skipped.
    """

    def __init__(self, mode: str = "history", *, z_max: float | None = None, z_floor: float | None = None) -> None:
        self.mode, self.z_max, self.z_floor = mode, z_max, z_floor
        self._history: dict[int, tuple[float, float]] = {}  # prompt → (log Σ w·P/q, Σ w); w = 1 of "history"
        self._spread = (0.0, 0.0)  # running Σ (P/q/Ẑ − 1)² over prompts, and its number of samples

    def update(
        self, prompts: Tensor, log_importance: Tensor, *, given: Tensor | None = None, store: bool = True
    ) -> Tensor:
        """log Ẑ of each row's prompt, after taking the rows in.

        Args:
            prompts: `[N]` integers that stand for prompts, over all processes.
            log_importance: `[N]`, log P − log q of the samples.
            given: `[N]` log Z, for mode `"given"`.
            store: keep the rows in the history (not in evaluation).

        Returns:
            `[N]` float64; −inf where the estimate is 0, and the row must be skipped.
        """
        if self.mode == "given":
            return self._bounded(given.double())
        if self.mode == "loo":
            return self._bounded(_leave_one_out(prompts, log_importance.double()))
        distinct, inverse = prompts.unique(return_inverse=True)
        counts = torch.bincount(inverse).cpu()
        log_sums = grouped_logsumexp(log_importance.double(), inverse, len(distinct)).cpu()
        if self.mode in ("history", "pooled"):
            keys = distinct.tolist()
            if self.mode == "pooled":
                weight = self._weight()
                log_sums, counts = log_sums + math.log(weight), counts * weight
            before = [self._history.get(key, (-math.inf, 0)) for key in keys]
            log_sums = torch.logaddexp(log_sums, torch.tensor([log_sum for log_sum, _ in before], dtype=torch.float64))
            counts = counts + torch.tensor([count for _, count in before])
            if store:
                entries = zip(log_sums.tolist(), counts.tolist(), strict=True)
                self._history.update(zip(keys, entries, strict=True))
        log_z = (log_sums - counts.double().log()).to(log_importance.device)[inverse]
        if self.mode == "pooled" and store:
            self._observe(log_importance.double() - log_z)
        return self._bounded(log_z)

    def _weight(self) -> float:
        """1/ρ̂ of this step's samples, from the samples before it: ρ̂ is half the running spread and half 1.

        The step's own samples have no say in their weight. Those that miss what P/q is largest at show little spread,
        so that weights from themselves take Ẑ down, by more than pooling gains.
        """
        total, samples = self._spread
        return (_MEMORY + samples) / (_MEMORY + total)

    def _observe(self, log_ratio: Tensor) -> None:
        """Take log (P/q)/Ẑ of a step's samples, of all prompts, into the running spread."""
        relative = torch.where(torch.isfinite(log_ratio), log_ratio, -math.inf).exp() - 1.0
        samples = self._spread[1] + len(log_ratio)
        kept = _MEMORY / (_MEMORY + len(log_ratio))
        self._spread = (kept * (self._spread[0] + relative.square().sum().item()), kept * samples)

    def _bounded(self, log_z: Tensor) -> Tensor:
        if self.z_floor is not None:
            log_z = log_z.clamp(min=math.log(self.z_floor))
        return log_z if self.z_max is None else log_z.clamp(max=math.log(self.z_max))

    def state_dict(self) -> dict[str, Any]:
        """The history as JSON-ready numbers; −inf is None."""
        state: dict[str, Any] = {
            str(prompt): [None if log_sum == -math.inf else log_sum, count]
            for prompt, (log_sum, count) in self._history.items()
        }
        return state | {"spread": list(self._spread)} if self.mode == "pooled" else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, to the last bit."""
        state = dict(state)
        total, samples = state.pop("spread", (0.0, 0.0))
        self._spread = (total, samples)
        self._history = {
            int(prompt): (-math.inf if log_sum is None else log_sum, count)
            for prompt, (log_sum, count) in state.items()
        }


def _leave_one_out(prompts: Tensor, log_importance: Tensor) -> Tensor:
    """`[N]`: log of the mean P/q over the OTHER samples of each row's prompt; −inf where there is none."""
    log_z = torch.full_like(log_importance, -math.inf)
    for prompt in prompts.unique():
        rows = torch.nonzero(prompts == prompt).squeeze(1)
        if len(rows) > 1:
            table = log_importance[rows].repeat(len(rows), 1).fill_diagonal_(-math.inf)
            log_z[rows] = torch.logsumexp(table, 1) - math.log(len(rows) - 1)
    return log_z
