"""Plots of an evaluation: truth-ratio distributions and membership scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fdiv.eval.benchmark.aggregation import Aggregates
from fdiv.eval.benchmark.log import EvalLog

__all__ = ["plot_evaluation", "save_figure"]


def _cumulative(axes, values: np.ndarray, label: str) -> None:
    ordered = np.sort(values)
    axes.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", label=label)


def plot_evaluation(folder: Path, result: Aggregates, retain: EvalLog | None) -> list[Path]:
    """Write the plots the values allow and return their paths.

    `truth_ratio_cdf.png`: cumulative distribution of the forget rows' truth ratio for the model and the retain
    model; their largest vertical distance is the Kolmogorov-Smirnov statistic behind forget quality.
    `membership_scores.png`: Min-K scores of forget and holdout texts.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    written = []
    ratios = result.log.column("forget_truth_ratio", "score")
    if ratios:
        figure, axes = plt.subplots(figsize=(6, 4))
        _cumulative(axes, np.array(list(ratios.values())), "model")
        theirs = _retain_ratios(result, retain)
        if theirs is not None:
            _cumulative(axes, theirs, "retain model")
        axes.set(xscale="symlog", xlabel="truth ratio of forget rows", ylabel="share of rows")
        quality = result.values.get("forget_quality")
        if quality is not None:
            distance = result.values["forget_quality_ks_statistic"]
            axes.set_title(f"KS distance {distance:.3f}, forget quality {quality:.3g}")
        axes.legend()
        written.append(save_figure(figure, folder / "truth_ratio_cdf.png"))
    sides = {side: result.log.column("mia_min_k", "score", side) for side in ("forget", "holdout")}
    if all(sides.values()):
        figure, axes = plt.subplots(figsize=(6, 4))
        edges = np.histogram_bin_edges(np.concatenate([list(s.values()) for s in sides.values()]), bins=40)
        for side, scores in sides.items():
            axes.hist(list(scores.values()), bins=edges, alpha=0.6, label=f"{side} ({len(scores)})")
        axes.set(xlabel="Min-40% score (higher: less likely a member)", ylabel="texts")
        axes.set_title(f"AUC {result.values['mia_min_k']:.3f}")
        axes.legend()
        written.append(save_figure(figure, folder / "membership_scores.png"))
    return written


def _retain_ratios(result: Aggregates, retain: EvalLog | None) -> np.ndarray | None:
    if retain is None or result.log.benchmark != "tofu":
        return None
    from fdiv.eval.tofu.aggregate import aggregate_tofu

    column = aggregate_tofu(retain, result.preset).log.column("forget_truth_ratio", "score")
    return np.array(list(column.values())) if column else None


def save_figure(figure, path: Path) -> Path:
    """Write a figure, close it and return its path."""
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
