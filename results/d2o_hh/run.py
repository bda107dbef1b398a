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
    from fdiv.recipe import load_recipe
    from fdiv.run import run_recipe

    folder = work / recipe / f"lr-{rate:g}_seed-{seed}"
    if not (folder / "result.json").is_file():
        settings = {"learning_rate": rate, "seed": seed, "output_dir": str(folder), "overwrite_output_dir": True}
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

    screening, final = {}, {}
    for method, recipe in METHODS.items():
        if only not in (None, method):
            continue
        screening[method] = {f"{rate:g}": run(work, recipe, rate, 0) for rate in RATES}
        selected = max(RATES, key=lambda rate: screening[method][f"{rate:g}"][CRITERION])
        final[method] = {"learning_rate": selected, "seeds": [run(work, recipe, selected, seed) for seed in SEEDS]}
    if only is not None:
        return
    builds = [json.loads(path.read_text()) for path in sorted(work.glob("prepared/*/prepare.json"))]
    content = {
        "criterion": CRITERION, "screening": screening, "final": final, "prepare": builds,
        "environment": environment("python results/d2o_hh/run.py", 0),
    }  # fmt: skip
    (HERE / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (HERE / "table.md").write_text(tables(screening, final), encoding="utf-8")
    plot(screening, final, HERE / "d2o_hh.png")


def tables(screening: dict, final: dict) -> str:
    """The final table and that of the screening, in Markdown."""
    names = [name.removeprefix("after/") for name in METRICS]
    lines = ["Test split, mean ± s.e. over 3 seeds; changes in nats per answer.", ""]
    lines += ["| method | learning rate | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for method, group in final.items():
        cells = [mean_and_error([seed[name] for seed in group["seeds"]]) for name in METRICS]
        row = " | ".join(f"{mean:.3f} ± {error:.3f}" for mean, error in cells)
        lines.append(f"| {method} | {group['learning_rate']:g} | {row} |")
    start = next(iter(final.values()))["seeds"][0]
    row = " | ".join(_start(start, name) for name in METRICS)
    lines += [f"| start model | – | {row} |", "", "Screening, seed 0 (validation margin is the criterion):", ""]
    columns = (CRITERION, *METRICS[:3], METRICS[4])
    lines += ["| method | learning rate | " + " | ".join(name.removeprefix("after/") for name in columns) + " |"]
    lines += ["|---|---|" + "---|" * len(columns)]
    for method, runs in screening.items():
        for rate, values in runs.items():
            lines.append(f"| {method} | {rate} | " + " | ".join(f"{values[name]:.3f}" for name in columns) + " |")
    return "\n".join(lines) + "\n"


def _start(values: dict[str, float], name: str) -> str:
    found = values.get(name.replace("after/", "before/"))
    return "–" if found is None else f"{found:.3f}"


def plot(screening: dict, final: dict, path: Path) -> None:
    """Chosen against rejected change on the test split: screening as lines, the three seeds as crosses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rejected, chosen = METRICS[:2]
    figure, axes = pyplot.subplots(figsize=(6, 5))
    for method, runs in screening.items():
        ordered = [runs[f"{rate:g}"] for rate in RATES]
        line = axes.plot([r[rejected] for r in ordered], [r[chosen] for r in ordered], "o-", label=method, ms=4)[0]
        points = [(seed[rejected], seed[chosen]) for seed in final[method]["seeds"]]
        axes.plot(*zip(*points, strict=True), "x", color=line.get_color(), ms=9, mew=2)
    axes.axline((0, 0), slope=1, color="grey", lw=0.8, ls=":")
    axes.axhline(0, color="grey", lw=0.8)
    axes.set(xscale="symlog", yscale="symlog")
    axes.set_xlabel("change of held-out rejected answers (nats per answer)")
    axes.set_ylabel("change of held-out chosen answers (nats per answer)")
    axes.set_title("Training on negatives alone; dotted: both sides fall alike")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/d2o_hh"), *sys.argv[2:3])
