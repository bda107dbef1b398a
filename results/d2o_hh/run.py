"""Run the experiment of results/d2o_hh: screening, selection, three seeds; write results.json, table.md, d2o_hh.png.

FDIV_SHARED=/path/to/shared OMP_NUM_THREADS=1 python results/d2o_hh/run.py [WORK_DIRECTORY [METHOD]]

With a method (D²O, NPO, GA) only its runs are made, so that the three can go side by side. Finished runs in the work
directory are kept; the protocol is in README.md beside this file.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path

METHODS = {"D²O": "d2o_hh_negatives", "NPO": "d2o_hh_npo", "GA": "d2o_hh_grad_ascent"}
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
SEEDS = (0, 1, 2)
CRITERION = "after/validation_margin_change"
METRICS = (
    "after/test_rejected_change",
    "after/test_chosen_change",
    "after/test_margin_change",
    "after/test_preference_accuracy",
    "after/sample_start_log_prob",
    "after/sample_distinct_2",
)
HERE = Path(__file__).parent


def run(work: Path, recipe: str, rate: float, seed: int) -> dict[str, float]:
    """The result of one run, from an earlier one where it is there."""
    from fdiv.recipe.load import load_recipe
    from fdiv.run.run import run_recipe

    folder = work / recipe / f"lr-{rate:g}_seed-{seed}"
    if not (folder / "result.json").is_file():
        settings = {"learning_rate": rate, "seed": seed, "output_dir": str(folder), "overwrite_output_dir": True}
        if recipe == METHODS["D²O"]:  # drawn once from the start model, by the first run, for all rates and seeds
            settings["anchor_cache"] = str(work / "anchors.jsonl")
        recipe = load_recipe(f"alignment/{recipe}", (), settings)
        recipe.sweep = None
        started = time.process_time()
        run_recipe(recipe, " ".join(sys.argv), work / "prepared")
        (folder / "cpu_seconds.json").write_text(json.dumps(time.process_time() - started))
    result = json.loads((folder / "result.json").read_text())
    numbers = {name: value for name, value in result.items() if name.startswith(("before/", "after/", "train/"))}
    return {**numbers, "cpu_seconds": json.loads((folder / "cpu_seconds.json").read_text())}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def main(work: Path, only: str | None = None) -> None:
    """Run what is missing, of one method or of all; write the files when all is there."""
    from fdiv.provenance import environment

    grid: dict[str, dict[str, list[dict[str, float]]]] = {}
    for method, recipe in METHODS.items():
        if only in (None, method):
            runs = {(rate, seed): run(work, recipe, rate, seed) for seed in SEEDS for rate in RATES}
            grid[method] = {f"{rate:g}": [runs[rate, seed] for seed in SEEDS] for rate in RATES}
    if only is not None:
        return
    selected = {method: max(rates, key=lambda rate: rates[rate][0][CRITERION]) for method, rates in grid.items()}
    content = {
        "criterion": CRITERION,
        "selected_with_seed_0": selected,
        "seeds": SEEDS,
        "grid": grid,
        "prepare": [json.loads(path.read_text()) for path in sorted(work.glob("prepared/*/prepare.json"))],
        "environment": environment("python results/d2o_hh/run.py", 0),
    }
    (HERE / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (HERE / "table.md").write_text(table(grid, selected), encoding="utf-8")
    plot(grid, HERE / "d2o_hh.png")


def table(grid: dict, selected: dict[str, str]) -> str:
    """Every method and learning rate in Markdown; the rate the protocol selects is marked."""
    names = [name.removeprefix("after/") for name in METRICS]
    lines = ["Test split, mean ± s.e. over 3 seeds; changes in nats per answer. *: selected by the protocol.", ""]
    lines += ["| method | learning rate | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    start = grid["D²O"][f"{RATES[0]:g}"][0]
    lines.append("| start model | – | " + " | ".join(_start(start, name) for name in METRICS) + " |")
    for method, rates in grid.items():
        for rate, seeds in rates.items():
            cells = [mean_and_error([seed[name] for seed in seeds]) for name in METRICS]
            row = " | ".join(f"{mean:.3f} ± {error:.3f}" for mean, error in cells)
            lines.append(f"| {method} | {rate}{'*' * (selected[method] == rate)} | {row} |")
    return "\n".join(lines) + "\n"


def _start(values: dict[str, float], name: str) -> str:
    found = values.get(name.replace("after/", "before/"))
    return "–" if found is None else f"{found:.3f}"


def plot(grid: dict, path: Path) -> None:
    """Left: chosen against rejected change, a line through the rates. Right: margin against the chosen change."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for method, rates in grid.items():
        points = {
            name: [mean_and_error([seed[name] for seed in seeds]) for seeds in rates.values()] for name in METRICS
        }
        rejected, chosen, margin = (tuple(zip(*points[name], strict=True)) for name in METRICS[:3])
        style = {"fmt": "o-", "ms": 4, "capsize": 2, "label": method}
        left.errorbar(*(rejected[0], chosen[0]), xerr=rejected[1], yerr=chosen[1], **style)
        right.errorbar(*(chosen[0], margin[0]), xerr=chosen[1], yerr=margin[1], **style)
    left.axline((0, 0), slope=1, color="grey", lw=0.8, ls=":")
    left.set(xscale="symlog", yscale="symlog", ylabel="change of held-out chosen answers (nats)")
    left.set_xlabel("change of held-out rejected answers (nats)")
    left.set_title("dotted: both sides fall alike")
    right.set(xscale="symlog", yscale="symlog", ylabel="margin gained: chosen less rejected change (nats)")
    right.set_xlabel("change of held-out chosen answers (nats)")
    right.set_title("what the margin costs")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/d2o_hh"), *sys.argv[2:3])
