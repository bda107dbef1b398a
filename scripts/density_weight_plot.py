"""Plot t·f''(t) of every entry into docs/density_weight.png: `python scripts/density_weight_plot.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

from fdiv.divergences import get_divergence, list_divergences, parameters_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    """Log-log, t from 0.01 to 100; entries with a parameter at 0.3."""
    log_t = torch.linspace(-4.6, 4.6, 231, dtype=torch.float64)
    figure, axes = plt.subplots(figsize=(7.0, 4.2), dpi=90)
    styles = ["-", "--", "-.", ":"]
    for number, name in enumerate(list_divergences()):
        parameters = dict.fromkeys(parameters_of(name), 0.3)
        entry = get_divergence({"name": name, **parameters})
        try:
            weight = entry.density_weight(log_t)
        except ValueError:
            continue
        axes.plot(log_t.exp(), weight, styles[number % 4], label=entry.label, linewidth=1.5)
    axes.set(xscale="log", yscale="log", ylim=(1e-3, 1e3), xlabel="t = P/Q", ylabel="t·f''(t)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(Path(__file__).parents[1] / "docs" / "density_weight.png")


if __name__ == "__main__":
    main()
