"""Does Pass@k collapse under GRPO, and does DPH-RL prevent it? Five methods from one start, into `results/`.

    python -m benchmarks.dph_collapse --task arithmetic --output results/dph_arithmetic --runs runs/dph_arithmetic

Protocol and budget, fixed before the runs:

* One core. Arithmetic: at most 50 core-minutes with the base model and all evaluations; Chinook: at most 25.
* One base model for everything, trained by the recipe's `prepare:` block, and one pre-sampling (8 samples, mastered
  from 7 on). A seed changes the prompts' order, the rollouts and the rehearsal order.
* GRPO is trained on all training prompts, DPH on those that are left to explore plus its cache, as in the paper; the
  same number of steps, rollouts per step, clipping (0.2, 0.28) and token-mean loss for all. GRPO + k3 adds GRPO's KL
  penalty (k3 as a loss, coefficient 0.01, the paper's baseline) with a live reference.
* Learning rate: chosen among `--rates` by GRPO's training reward alone (seed 0, mean of the last fifth of the logs);
  all methods use it.
* η: the middle of the range the paper publishes for each divergence (forward KL and α 0.03, Jensen-Shannon 0.125), in
  the objective as it writes it (`literal`; the release's pooled mean makes the same η eight times weaker). α = 0.2.
* Evaluation: held-out problems, n samples at temperature 1, the same random streams for all models; greedy, unbiased
  Pass@k, keep and explore rates against the base model, distinct correct completions per problem.
* Order: learning rates, then all methods with seed 0, then the other seeds, then the controls with one seed (GRPO on
  the explore prompts alone; DPH with ten times η). A finished cell is never run again; none is started after
  `--minutes`; what is missing is marked "not run".
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ALL_PROMPTS = ("--rehearsal_cache", "null", "--dataset_name", "${prepare}/task/data/train.jsonl")


def rehearse(divergence: str, coefficient: str) -> tuple[str, ...]:
    return ("--divergence", divergence, "--rehearsal_coefficient", coefficient)


ALPHA = "{name: alpha, alpha: 0.2}"
MAIN = {
    "GRPO": ALL_PROMPTS,
    "GRPO + k3": (*ALL_PROMPTS, "--kl", "k3_loss", "--kl_coefficient", "0.01"),
    "DPH-F": rehearse("forward_kl", "0.03"),
    "DPH-JS": rehearse("jensen_shannon", "0.125"),
    "DPH-alpha": rehearse(ALPHA, "0.03"),
}
CONTROLS = {
    "GRPO, explore prompts": ("--rehearsal_cache", "null"),
    "DPH-F, 10 eta": rehearse("forward_kl", "0.3"),
    "DPH-JS, 10 eta": rehearse("jensen_shannon", "1.25"),
}
METHODS = {**MAIN, **CONTROLS}
KS = (1, 2, 4, 8, 16, 32, 64)
COLUMNS = {
    "greedy_accuracy": "greedy",
    **{f"pass@{k}": f"pass@{k}" for k in KS},
    "keep_rate@64": "keep@64",
    "explore_rate@64": "explore@64",
    "distinct_correct": "distinct",
    "entropy": "entropy",
    "train_reward": "train reward",
    "train_seconds": "train s",
    "peak_mib": "peak MiB",
}
"""Measured per cell → heading of the table."""


# ---------------------------------------------------------------- one cell, in a process of its own
def load(args: argparse.Namespace, folder: Path, overrides: list[str]) -> Any:
    from fdiv.recipe.load import load_recipe

    common = ["--output_dir", str(folder), "--overwrite_output_dir", "--report", "null"]
    return load_recipe(args.recipe, [*common, *args.override, *overrides])


def run_cell(args: argparse.Namespace) -> None:
    """Train and evaluate one cell (or only evaluate the base model) and write `cell.json` last."""
    from fdiv.run.run import prepare, run_recipe

    folder = Path(args.cell)
    recipe = load(args, folder, args.method_options)
    evaluation = recipe.evaluations[0]
    recipe.evaluations = []
    found: dict[str, Any] = {}
    if folder.name == "base":
        folder.mkdir(parents=True, exist_ok=True)
        recipe, _ = prepare(recipe, Path(args.runs) / "prepared")
        found["prepare_cpu_seconds"] = time.process_time()
        model = recipe.filled["model_name_or_path"]
    else:
        result = run_recipe(recipe, "benchmarks/dph_collapse.py", Path(args.runs) / "prepared")
        found |= {"train_seconds": result["train_seconds"], **training_log(folder)}
        model = str(folder)
    # before the evaluation, whose batches are larger than those of the training
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found |= evaluate(evaluation.instance(recipe.variables), model, folder)
    found["cpu_seconds"] = time.process_time()
    (folder / "cell.json").write_text(json.dumps(found, indent=1) + "\n")


def training_log(folder: Path) -> dict[str, Any]:
    """Training reward (mean of the last fifth of the logs), entropy of the rollouts at the end, and their curves."""
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logs = [log for log in logs if "reward" in log]
    last = logs[-max(1, len(logs) // 5) :]
    return {
        "train_reward": statistics.mean(log["reward"] for log in last),
        "entropy": statistics.mean(log["entropy"] for log in last),
        "curve": {name: [log.get(name) for log in logs] for name in ("step", "reward", "entropy", "rehearsal/loss")},
    }


def evaluate(config: Any, model_path: str, folder: Path) -> dict[str, Any]:
    """Sample the test problems; every metric, counts per problem, and keep and explore rates against `base`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fdiv.eval.pass_at_k.evaluation import draw_with_transformers, write_samples
    from fdiv.inference.greedy import _stop_ids

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tokenizer, model = (kind.from_pretrained(model_path) for kind in (AutoTokenizer, AutoModelForCausalLM))
    draw = draw_with_transformers(model.eval(), tokenizer, config.batch_size)
    rows = config.samples(config.load({}), tokenizer, draw, _stop_ids(model, tokenizer), seed=0)
    write_samples(folder / "samples.jsonl", rows)
    counts = config.counts(rows, "samples")
    found = config.metrics(rows, counts, 0, "samples")
    if folder.name != "base":
        found |= compared(config, counts, folder.parent / "base" / "samples.jsonl")
    right: dict[str, set[str]] = {}
    for row in rows:
        if row["correct"] and row["sample"] >= 0:
            right.setdefault(row["task_id"], set()).add(row["completion"])
    return {
        **{name: entry["value"] for name, entry in found.items()},
        "standard_errors": {name: entry["se"] for name, entry in found.items()},
        "distinct_correct": sum(map(len, right.values())) / len(counts.task_ids),
        "num_correct": dict(zip(counts.task_ids, counts.num_correct.tolist(), strict=True)),
        "unscored": counts.unscored,
    }


def compared(config: Any, counts: Any, base: Path) -> dict[str, Any]:
    from fdiv.eval.pass_at_k.aggregate import compare_with_base
    from fdiv.eval.pass_at_k.records import counts_of_samples

    rows = [row for row in map(json.loads, base.read_text().splitlines()) if row["sample"] >= 0]
    start = counts_of_samples(rows, config.unscored, str(base))
    return compare_with_base(counts, start, config.k, source="this model", base_source="base")


# ---------------------------------------------------------------- all cells
def folder_of(args: argparse.Namespace, label: str, rate: str, seed: int) -> Path:
    return Path(args.runs) / f"{label.replace(' ', '_').replace(',', '')}-lr{rate}-seed{seed}"


def read(folder: Path) -> dict[str, Any] | None:
    path = folder / "cell.json"
    return json.loads(path.read_text()) if path.is_file() else None


def launch(args: argparse.Namespace, folder: Path, options: list[str]) -> None:
    """One cell as a process; its output beside its folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--task", args.task, "--runs", args.runs, "--cell", str(folder)]
    command += ["--override", *args.override] if args.override else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with Path(f"{folder}.log").open("w") as log:
        subprocess.run([*command, "--", *options], stdout=log, stderr=log, check=True, env=environment)
    cpu = read(folder)["cpu_seconds"]
    print(f"{folder.name}: {time.perf_counter() - started:.0f} s, {cpu:.0f} s of one core", flush=True)


def chosen_rate(args: argparse.Namespace) -> str | None:
    """The learning rate with the largest training reward of GRPO, once all were tried; the smaller one in a tie."""
    found = {rate: read(folder_of(args, "GRPO", rate, args.seeds[0])) for rate in args.rates}
    if None in found.values():
        return None
    return max(sorted(found, key=float), key=lambda rate: found[rate]["train_reward"])


def cells(args: argparse.Namespace):
    """(label, rate, seed) in order; a later cell may depend on what an earlier one found."""
    yield from (("GRPO", rate, args.seeds[0]) for rate in args.rates)
    rate = chosen_rate(args)
    if rate is not None:
        yield from ((label, rate, seed) for seed in args.seeds for label in MAIN)
        yield from ((label, rate, args.seeds[0]) for label in CONTROLS)


def run(args: argparse.Namespace) -> None:
    stop = time.perf_counter() + 60 * args.minutes
    base = Path(args.runs) / "base"
    if read(base) is None:
        launch(args, base, [])
    for label, rate, seed in cells(args):
        folder = folder_of(args, label, rate, seed)
        if read(folder) is None and time.perf_counter() < stop:
            launch(args, folder, ["--learning_rate", rate, "--seed", str(seed), *METHODS[label]])


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """Everything measured, by method and seed."""
    from fdiv.provenance import git_revision, package_versions

    rate = chosen_rate(args)
    seeds = {label: args.seeds if label in MAIN else args.seeds[:1] for label in METHODS}
    runs = {
        label: {
            str(seed): cell for seed in seeds[label] if rate and (cell := read(folder_of(args, label, rate, seed)))
        }
        for label in METHODS
    }
    screened = {r: cell for r in args.rates if (cell := read(folder_of(args, "GRPO", r, args.seeds[0])))}
    folders = [path.parent for path in Path(args.runs).glob("*/cell.json")]
    partition = sorted(Path(args.runs).glob("prepared/*/rehearsal/partition.json"))
    return {
        "command": " ".join(["python", *sys.argv]),
        "task": args.task,
        "override": args.override,
        "git_revision": git_revision(),
        "versions": package_versions(),
        "core_minutes": sum(read(folder)["cpu_seconds"] for folder in folders) / 60,
        "learning_rate": rate,
        "screening": {
            r: {name: cell.get(name) for name in ("train_reward", "pass@1", "pass@64")} for r, cell in screened.items()
        },
        "partition": _partition(partition[0]) if partition else None,
        "base": _compact(read(Path(args.runs) / "base")),
        "methods": {label: {seed: _compact(cell) for seed, cell in seeds.items()} for label, seeds in runs.items()},
    }


def _partition(path: Path) -> dict[str, Any]:
    """What pre-sampling found, without the prompts one by one and the paths."""
    content = json.loads(path.read_text())
    return {key: value for key, value in content.items() if key not in ("prompts", "environment", "drawing")}


def _compact(cell: dict[str, Any]) -> dict[str, Any]:
    """Without G-Pass@k; counts as a list in the order of the test problems (task ids are their numbers)."""
    kept = {key: value for key, value in cell.items() if "g_pass@" not in key}
    kept["standard_errors"] = {key: value for key, value in cell["standard_errors"].items() if "g_pass@" not in key}
    return kept | {"num_correct": [cell["num_correct"][key] for key in sorted(cell["num_correct"], key=int)]}


# ---------------------------------------------------------------- shown
def shown(name: str, values: list[float | None]) -> str:
    """Mean ± standard error over seeds; without the error for one seed."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    digits = 0 if name in ("train_seconds", "peak_mib") else 2 if name == "distinct_correct" else 3
    text = f"{statistics.mean(numbers):.{digits}f}"
    if len(numbers) > 1:
        text += f" ± {statistics.stdev(numbers) / math.sqrt(len(numbers)):.{digits}f}"
    return text


def table(results: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    lines = [f"| method | seeds | {' | '.join(COLUMNS.values())} |", "|---" * (2 + len(COLUMNS)) + "|"]
    base = results["base"]
    lines.append(f"| base model | | {' | '.join(shown(name, [base.get(name)]) for name in COLUMNS)} |")
    for label, seeds in results["methods"].items():
        runs = list(seeds.values())
        numbers = [shown(name, [run.get(name) for run in runs]) if runs else "not run" for name in COLUMNS]
        lines.append(f"| {label} | {len(runs)} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Left: Pass@k, mean over seeds with a band of ± one standard error. Right: the same less the base model's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    base = [results["base"][f"pass@{k}"] for k in KS]
    panels[0].plot(KS, base, "k--", label="base model")
    panels[1].axhline(0, color="black", linestyle="--", linewidth=1)
    for label in MAIN:
        runs = list(results["methods"][label].values())
        if not runs:
            continue
        for axes, start in zip(panels, ([0.0] * len(KS), base), strict=True):
            values = [[run[f"pass@{k}"] - zero for run in runs] for k, zero in zip(KS, start, strict=True)]
            mean = [statistics.mean(value) for value in values]
            error = [statistics.stdev(value) / math.sqrt(len(value)) if len(value) > 1 else 0.0 for value in values]
            (line,) = axes.plot(KS, mean, marker="o", markersize=3, label=label)
            low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
            axes.fill_between(KS, low, high, color=line.get_color(), alpha=0.15)
    for axes, title in zip(panels, ("pass@k", "pass@k less the base model's"), strict=True):
        axes.set(xlabel="k", ylabel=title)
        axes.set_xscale("log", base=2)
    panels[0].legend()
    figure.suptitle(f"{results['task']}: held-out problems, mean ± s.e. over seeds")
    figure.savefig(path, dpi=120)


def main() -> None:
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True, choices=["arithmetic", "chinook"])
    parser.add_argument("--output", help="folder for results.json, table.md and the plot")
    parser.add_argument("--runs", required=True, help="folder for the runs themselves (not committed)")
    parser.add_argument("--rates", nargs="+", default=["1e-4", "3e-4", "1e-3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=60.0, help="start no further cell after so many")
    parser.add_argument("--override", nargs=argparse.REMAINDER, default=[], help="recipe keys for all cells; last")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args(words[:split])
    args.method_options, args.recipe = words[split + 1 :], f"rl/mini/{args.task}"
    if args.cell:
        run_cell(args)
        return
    if not args.output:
        parser.error("--output is missing")
    run(args)
    results, output = collect(args), Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, separators=(",", ":")) + "\n")
    (output / "table.md").write_text(table(results))
    plot(results, output / "pass_at_k.png")
    print(table(results))


if __name__ == "__main__":
    main()
