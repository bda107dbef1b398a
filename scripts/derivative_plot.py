"""Draw docs/derivatives.png: f' and t·f'' of six divergences over log t, each divided by f''(1).

.venv/bin/python scripts/derivative_plot.py [OUTPUT]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fdiv.divergences import get_divergence

NAMES = ("reverse_kl", "forward_kl", "jensen_shannon", "squared_hellinger", "pearson_chi2", "total_variation")
ROOT = Path(__file__).resolve().parent.parent


def draw(output: Path) -> None:
    """Write the picture; the slope is the derivative of f' in log t, by autograd."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for name in NAMES:
        divergence = get_divergence(name)
        if name != "total_variation":  # the only one without a curvature at 1
            divergence = divergence.normalized()
        log_t = torch.linspace(-4, 4, 801, dtype=torch.float64, requires_grad=True)
        derivative = divergence.derivative(log_t)
        (slope,) = torch.autograd.grad(derivative.sum(), log_t)
        left.plot(log_t.detach(), derivative.detach(), label=name)
        right.plot(log_t.detach(), slope)
    left.set(title="f′(t): the price of a little more mass", xlabel="log t", ylim=(-6, 4))
    right.set(title="t·f″(t): which samples move it", xlabel="log t", ylim=(-0.1, 4))
    for axes in (left, right):
        axes.axvline(0, color="grey", linewidth=0.5)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(output, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "derivatives.png")
