"""The Pass@k curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fdiv.eval.pass_at_k.metrics import bootstrap_standard_error, pass_at_k
from fdiv.eval.pass_at_k.records import TaskCounts

__all__ = ["plot_pass_at_k"]


def plot_pass_at_k(path: Path, curves: Mapping[str, TaskCounts], *, resamples: int = 1000, seed: int = 0) -> Path:
    """Write `path` (PNG): pass@k over k = 1, 2, 4 … up to the fewest samples of a task, with a band of ± one standard
    error over tasks; one curve per entry."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from fdiv.eval.benchmark.plots import save_figure

    figure, axes = plt.subplots(figsize=(6, 4))
    for label, counts in curves.items():
        most = int(counts.num_samples.min())
        ks = sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})
        table = pass_at_k(counts.num_correct, counts.num_samples, ks)
        mean = table.mean(axis=0)
        error = np.nan_to_num(bootstrap_standard_error(table, resamples=resamples, seed=seed))
        axes.plot(ks, mean, marker="o", markersize=3, label=label)
        axes.fill_between(ks, mean - error, mean + error, alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="k", ylabel="pass@k", ylim=(0, 1))
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_figure(figure, path)
