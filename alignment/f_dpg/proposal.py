"""The adaptive proposal of f-DPG: sample from a frozen q, and let π replace it once π is measurably closer to p.

Both are compared on the same samples of q: D(π‖p) − D(q‖p) = E_q[w f(t_π)/t_π − f(t_q)/t_q], w = π/q, so the standard
error is that of the paired difference (GDC's and DPG's KL-adaptive proposal, arXiv:2012.11635, with an error bar).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdiv.alignment.f_dpg.loss import target_divergence_terms
from fdiv.divergences import Divergence, get_divergence
from fdiv.statistics.estimates import clustered_mean

__all__ = ["AdaptiveProposal"]


class AdaptiveProposal:
    """The frozen weights of q and the evidence for replacing them.

    Args:
        parameters: the policy's trainable parameters by name; None when a generation engine holds q's weights.
        metric: the divergence to p that is compared.
        margin: π replaces q when it is closer by more than this many standard errors.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter] | None,
        metric: str | Mapping[str, Any] | Divergence,
        margin: float,
    ) -> None:
        self._policy = None if parameters is None else dict(parameters)
        self._frozen = None if parameters is None else {name: p.detach().clone() for name, p in parameters.items()}
        self.metric, self.margin = get_divergence(metric), margin
        self.version = 0
        self._terms: list[float] = []
        self._prompts: list[int] = []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the policy's parameters hold q's values (the tensors are exchanged, nothing is copied)."""
        if self._policy is None:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self._policy.items():
            parameter.data, self._frozen[name] = self._frozen[name], parameter.data

    def observe(self, log_t_policy: Tensor, log_t_proposal: Tensor, log_weight: Tensor, prompts: Tensor) -> None:
        """Take in samples of q over all processes: `[N]` each, log π/p, log q/p, log π/q and the prompt's key."""
        policy = target_divergence_terms(log_t_policy, self.metric, log_weight=log_weight)
        proposal = target_divergence_terms(log_t_proposal, self.metric)
        self._terms += (policy - proposal).double().cpu().tolist()
        self._prompts += prompts.cpu().tolist()

    def decide(self) -> dict[str, float]:
        """Compare on what was observed since the last decision, and let π replace q if it is measurably closer.

        Returns:
            `proposal/improvement` = D(q‖p) − D(π‖p), `proposal/improvement_se` over prompts, `proposal/replaced` (0 or
            1). With fewer than two observations nothing is decided: an empty dict.
        """
        if len(self._terms) < 2:
            return {}
        gain = -torch.tensor(self._terms, dtype=torch.float64)
        improvement, error = clustered_mean(gain, torch.ones_like(gain), torch.tensor(self._prompts))
        self._terms, self._prompts = [], []
        replaced = improvement > self.margin * error
        if replaced:
            self.version += 1
            if self._policy is not None:
                for name, parameter in self._policy.items():
                    self._frozen[name].copy_(parameter.detach())
        return {
            "proposal/improvement": improvement,
            "proposal/improvement_se": error,
            "proposal/replaced": float(replaced),
        }

    # ---------------------------------------------------------------- checkpoints
    def state_dict(self) -> dict[str, Any]:
        """Version and observations; the weights are saved by `save_weights`."""
        return {"version": self.version, "terms": self._terms, "prompts": self._prompts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.version, self._terms = state["version"], list(state["terms"])
        self._prompts = list(state.get("prompts", range(len(self._terms))))

    def save_weights(self, path: Path) -> None:
        """Write q's weights, unless an engine holds them."""
        if self._frozen is not None:
            from safetensors.torch import save_file

            save_file({name: tensor.contiguous() for name, tensor in self._frozen.items()}, str(path))

    def load_weights(self, path: Path) -> None:
        """Read what `save_weights` wrote.

        Raises:
            ValueError: the file holds other parameters.
        """
        if self._frozen is None:
            return
        from safetensors.torch import load_file

        loaded = load_file(str(path))
        if loaded.keys() != self._frozen.keys():
            raise ValueError(f"{path} holds other parameters than the policy trains: it is from another run")
        for name, tensor in loaded.items():
            self._frozen[name].copy_(tensor)
