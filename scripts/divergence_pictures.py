"""The pictures of the registry: f, f′ and t·f″ of every divergence.

    .venv/bin/python scripts/divergence_pictures.py             writes docs/derivatives.png and docs/density_weight.png

`page()` is the page of the site that shows each divergence by itself; `make docs` builds it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fdiv.divergences import Divergence, get_divergence, list_divergences, parameters_of
from fdiv.report.drawing import inline_svg
from fdiv.report.style import AXIS, COLOURS, Panel, Plot, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent
SIX = ("reverse_kl", "forward_kl", "jensen_shannon", "squared_hellinger", "pearson_chi2", "total_variation")
PARAMETERS = (0.2, 0.5, 0.8)
HEAD = """# Pictures of the divergences

Every entry of the registry over log t, t = P/Q: the generator f(t), the derivative f′(t) that the objectives listen
to, and the weight t·f″(t), the slope of f′ in log t, which says how strongly a sample of that ratio moves an objective
([which samples an f listens to](divergences.md#which-samples-an-f-listens-to)). The curves are computed by the code
that the trainers use (`scripts/divergence_pictures.py`), in the scale of the registry. The dashed line at log t = 0 is
where policy and reference agree. Entries with a parameter are shown at three values of it; their limits at 0 and ∞
stand in [the table](divergences.md).
"""


def entries(name: str) -> dict[str, Divergence]:
    """Label → divergence: an entry, or one for each of `PARAMETERS`."""
    (parameter, *_), made = [*parameters_of(name), None], {}
    for value in PARAMETERS if parameter else (None,):
        spec = {"name": name} if parameter is None else {"name": name, **dict.fromkeys(parameters_of(name), value)}
        found = get_divergence(spec)
        made[found.label] = found
    return made


def _generator(divergence: Divergence, log_t: torch.Tensor) -> torch.Tensor:
    return divergence.generator(log_t)


def _derivative(divergence: Divergence, log_t: torch.Tensor) -> torch.Tensor:
    return divergence.derivative(log_t)


def _weight(divergence: Divergence, log_t: torch.Tensor) -> torch.Tensor | None:
    try:
        return divergence.density_weight(log_t)
    except ValueError:  # total variation: a corner, and no curvature beside it
        return None


VIEWS: dict[str, tuple[Callable, tuple[float, float]]] = {
    "f(t)": (_generator, (-0.1, 3.0)),
    "f′(t)": (_derivative, (-4.0, 4.0)),
    "t·f″(t)": (_weight, (-0.1, 4.0)),
}
"""Title → (values, the range of the axis)."""


def _draw(axis: Axes, title: str, found: dict[str, Divergence]) -> None:
    values, limits = VIEWS[title]
    log_t = torch.linspace(-3, 3, 241, dtype=torch.float64)
    axis.axvline(0, color=AXIS, linewidth=0.8, linestyle="--")
    axis.axhline(0, color=AXIS, linewidth=0.8)
    for index, (label, divergence) in enumerate(found.items()):
        curve = values(divergence, log_t)
        if curve is None:
            axis.text(0, sum(limits) / 2, "a corner at t = 1", ha="center", fontsize=9)
            continue
        axis.plot(log_t, curve, color=COLOURS[index % len(COLOURS)], label=label, linewidth=1.5)
    tidy(axis, title, "log t", legend=len(found) > 1)
    axis.set(ylim=limits, xlim=(-3, 3))


def page() -> str:
    """The Markdown page, plots inline; their colours follow the scheme of the site."""
    parts = [HEAD]
    for name in list_divergences():
        found = entries(name)
        summary = inspect.getdoc(type(next(iter(found.values())))).partition("\n\n")[0].replace("\n", " ")
        plot = Plot([Panel(title, partial(_draw, title=title, found=found)) for title in VIEWS], width=3.6, height=2.9)
        figures = "".join(
            f"<figure><figcaption>{panel.title}</figcaption>{inline_svg(figure, f'{panel.title} of {name}')}</figure>"
            for panel, figure in plot.single()
        )
        one_block = figures.replace("\n", " ")  # an empty line would end the HTML block
        parts.append(f'## `{name}`\n\n{summary}\n\n<div class="plots">{one_block}</div>\n')
    return "\n".join(parts)


def write_pictures(folder: Path) -> None:
    """`derivatives.png`: f′ and t·f″ of six, each divided by f″(1); `density_weight.png`: t·f″ of all, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    log_t = torch.linspace(-4, 4, 801, dtype=torch.float64, requires_grad=True)
    for name in SIX:
        divergence = get_divergence(name)
        if name != "total_variation":  # the only one without a curvature at 1
            divergence = divergence.normalized()
        derivative = divergence.derivative(log_t)
        (slope,) = torch.autograd.grad(derivative.sum(), log_t)
        left.plot(log_t.detach(), derivative.detach(), label=name)
        right.plot(log_t.detach(), slope)
    left.set(title="f′(t): the price of a little more mass", xlabel="log t", ylim=(-6, 4))
    right.set(title="t·f″(t): which samples move it", xlabel="log t", ylim=(-0.1, 4))
    for axes in (left, right):
        axes.axvline(0, color="grey", linewidth=0.5)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "derivatives.png", dpi=110, metadata={"Software": None})

    figure, axes = pyplot.subplots(figsize=(7.0, 4.2), dpi=90)
    log_t = torch.linspace(-4.6, 4.6, 231, dtype=torch.float64)
    for number, name in enumerate(list_divergences()):
        entry = get_divergence({"name": name, **dict.fromkeys(parameters_of(name), 0.3)})
        weight = _weight(entry, log_t)
        if weight is not None:
            axes.plot(log_t.exp(), weight, ("-", "--", "-.", ":")[number % 4], label=entry.label, linewidth=1.5)
    axes.set(xscale="log", yscale="log", ylim=(1e-3, 1e3), xlabel="t = P/Q", ylabel="t·f''(t)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(folder / "density_weight.png", metadata={"Software": None})


if __name__ == "__main__":
    write_pictures(ROOT / "docs")
