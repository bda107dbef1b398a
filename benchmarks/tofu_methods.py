"""Unlearning methods side by side on TOFU rows and the small TOFU model, into `results/`.

    FDIV_SHARED=DIR python benchmarks/tofu_methods.py --output results/tofu_forget10 --runs runs/tofu --minutes 120

Protocol: every method is trained at each learning rate with the first seed; its better rate is the one whose best
epoch has the larger selection score (`fdiv.unlearning.selection`, 40 rows of each set); that rate is trained with the
other seeds; the best epoch of each of those runs is evaluated on all rows. Cells are run in that order, a finished one
is never run again, and none is started after `--minutes`: what is missing is marked "not run".
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

# label → recipe and overrides; the first eight are the comparison, the others follow with one seed
MAIN = {
    "FLAT TV": ("flat", "--divergence", "total_variation"),
    "FLAT KL": ("flat", "--divergence", "reverse_kl"),
    "FLAT JS": ("flat", "--divergence", "jensen_shannon"),
    "FLAT Pearson": ("flat", "--divergence", "pearson_chi2"),
    "GradDiff": ("grad_diff",),
    "NPO": ("npo",),
    "SimNPO": ("simnpo",),
    "IdkDPO": ("idk_dpo",),
}
REST = {
    "GradAscent": ("grad_ascent",),
    "KL-retain": ("kl_retain",),
    "AltPO": ("alt_po",),
    "RMU": ("rmu",),
    "UNDIAL": ("undial",),
    "CE-U": ("ce_u",),
    "WGA": ("wga",),
    "SatImp": ("sat_imp",),
    "PDU": ("pdu",),
    "JensUn": ("jensun",),
}
COLUMNS = {
    "forget_quality": "FQ", "model_utility": "MU", "forget_Q_A_ROUGE": "F-RL", "retain_Q_A_ROUGE": "R-RL",
    "extraction_strength": "ES", "privleak": "PrivLeak", "forget_ngram_entropy": "fluency",
}  # fmt: skip


def folder_of(args: argparse.Namespace, label: str, rate: str, seed: int) -> Path:
    return Path(args.runs) / label.replace(" ", "_") / f"lr{rate}-seed{seed}"


def read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None


def train(args: argparse.Namespace, label: str, rate: str, seed: int) -> None:
    """One run of the recipe, without its full evaluation; its prepared retain logs are shared by all runs."""
    recipe, *overrides = {**MAIN, **REST}[label]
    folder = folder_of(args, label, rate, seed)
    code = (
        "import sys; from pathlib import Path; from fdiv.recipe import load_recipe; from fdiv.run import run_recipe; "
        "run_recipe(load_recipe(sys.argv[1], sys.argv[3:]), prepared=Path(sys.argv[2]))"
    )
    options = ["--output_dir", str(folder), "--overwrite_output_dir", "--eval", "null", "--prepare.split", args.split]
    options += ["--epoch_evaluation.split", args.split, "--num_train_epochs", str(args.epochs)]
    options += ["--learning_rate", rate, "--seed", str(seed), *overrides]
    launch(args, folder, "train.log", [sys.executable, "-c", code, f"tofu/mini/{recipe}", prepared(args), *options])


def prepared(args: argparse.Namespace) -> str:
    return str(Path(args.runs) / "prepared")


def evaluate(args: argparse.Namespace, label: str, rate: str, seed: int) -> None:
    """All rows, once, of the best epoch, which is what the run saved."""
    folder = folder_of(args, label, rate, seed)
    evaluate_model(args, str(folder), folder / "full")


def evaluate_model(args: argparse.Namespace, model: str, output: Path) -> None:
    logs = sorted(Path(prepared(args)).glob("tofu_unlearning-*/full/TOFU_EVAL.json"))
    command = [sys.executable, "-m", "fdiv", "eval", "tofu", "--model", model, "--split", args.split, "--no_gradnorm"]
    command += ["--data", f"{os.environ['FDIV_SHARED']}/data/tofu", "--fluency_classifier", "none"]
    command += ["--retain_logs", str(logs[0]), "--output", str(output)]
    launch(args, output.parent, "full.log", command)


def launch(args: argparse.Namespace, folder: Path, log: str, command: list[str]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    # beside the folder, since a run refuses a folder that holds something else
    with (folder.parent / f"{folder.name}.{log}").open("w") as file:
        subprocess.run(command, stdout=file, stderr=file, check=True, env=environment)
    print(f"{folder} {log.removesuffix('.log')}: {time.perf_counter() - started:.0f} s", flush=True)


def epochs(folder: Path) -> list[dict[str, float]]:
    """The per-epoch evaluations of a run, the start first."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [row for row in rows if "eval_selection" in row]


def best_score(args: argparse.Namespace, label: str, rate: str) -> float:
    """The selection score of the first seed's best epoch; −inf when it was not run."""
    folder = folder_of(args, label, rate, args.seeds[0])
    return max((row["eval_selection"] for row in epochs(folder)[1:]), default=-math.inf)


def chosen_rate(args: argparse.Namespace, label: str) -> str | None:
    """The better learning rate, once all were tried; the smaller one when they tie."""
    if not all(done(folder_of(args, label, rate, args.seeds[0])) for rate in args.rates):
        return None
    return max(sorted(args.rates, key=float), key=lambda rate: best_score(args, label, rate))


def done(folder: Path) -> bool:
    return (folder / "result.json").is_file()


def cells(args: argparse.Namespace):
    """(what, label, rate, seed) in order; a later cell may depend on what an earlier one found."""
    for labels, seeds in ((MAIN, args.seeds), (REST, args.seeds[:1])):
        labels = [label for label in labels if not args.methods or label in args.methods]
        for label in labels:
            yield from (("train", label, rate, args.seeds[0]) for rate in args.rates)
        for seed in seeds:
            for label in labels:
                rate = chosen_rate(args, label)
                if rate is not None:
                    yield "train", label, rate, seed
                    yield "evaluate", label, rate, seed


def run(args: argparse.Namespace) -> None:
    stop = time.perf_counter() + 60 * args.minutes
    for what, label, rate, seed in cells(args):
        folder = folder_of(args, label, rate, seed)
        finished = done(folder) if what == "train" else (folder / "full" / "out.json").is_file()
        if finished or time.perf_counter() > stop:
            continue
        {"train": train, "evaluate": evaluate}[what](args, label, rate, seed)
    shared = Path(os.environ["FDIV_SHARED"]) / "models"
    for name in ("full", "retain"):
        folder = Path(args.runs) / f"model_{name}"
        if not (folder / "full" / "out.json").is_file() and time.perf_counter() < stop:
            evaluate_model(args, str(shared / f"tofu-mini-{name}"), folder / "full")


def collect(args: argparse.Namespace) -> dict:
    """Everything measured, by method and seed."""
    from fdiv.provenance import git_revision, package_versions

    methods = {}
    for label in (*MAIN, *REST):
        rate = chosen_rate(args, label)
        screened = {
            r: best_score(args, label, r) for r in args.rates if epochs(folder_of(args, label, r, args.seeds[0]))
        }
        runs = {}
        for seed in args.seeds if rate is not None else ():
            folder = folder_of(args, label, rate, seed)
            full = read(folder / "full" / "out.json")
            if full is not None:
                scores = [row["eval_selection"] for row in epochs(folder)[1:]]
                runs[str(seed)] = {
                    "best_epoch": 1 + scores.index(max(scores)),
                    "selection_by_epoch": scores,
                    "train_seconds": read(folder / "result.json")["train_seconds"],
                    **{name: full.get(name) for name in (*COLUMNS, "forget_truth_ratio", "forget_Q_A_Prob")},
                }
        methods[label] = {"learning_rate": rate, "screened": screened, "seeds": runs}
    models = {name: read(Path(args.runs) / f"model_{name}" / "full" / "out.json") for name in ("full", "retain")}
    models = {name: {key: log.get(key) for key in COLUMNS} for name, log in models.items() if log}
    return {
        "command": " ".join(["python", *sys.argv]),
        "split": args.split,
        "epochs": args.epochs,
        "rates": args.rates,
        "seeds": args.seeds,
        "git_revision": git_revision(),
        "versions": package_versions(),
        "models": models,
        "methods": methods,
    }


def shown(values: list[float | None], digits: int) -> str:
    """Mean ± standard error, the number of seeds when it is one."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    form = (lambda v: f"{v:.1e}") if digits == 0 else (lambda v: f"{v:.{digits}f}")
    if len(numbers) == 1:
        return form(numbers[0])
    return f"{form(statistics.mean(numbers))} ± {form(statistics.stdev(numbers) / math.sqrt(len(numbers)))}"


def table(results: dict) -> str:
    """The comparison as Markdown."""
    digits = {name: 0 if name == "forget_quality" else 1 if name == "privleak" else 3 for name in COLUMNS}
    lines = [f"| method | rate | epoch | seeds | {' | '.join(COLUMNS.values())} |", "|---" * (4 + len(COLUMNS)) + "|"]
    for name, values in results["models"].items():
        lines.append(f"| {name} model | | | | {' | '.join(shown([values[c]], digits[c]) for c in COLUMNS)} |")
    for label, method in results["methods"].items():
        runs = list(method["seeds"].values())
        if not runs:
            lines.append(f"| {label} | | | | {' | '.join(['not run'] * len(COLUMNS))} |")
            continue
        chosen = ", ".join(str(run["best_epoch"]) for run in runs)
        numbers = " | ".join(shown([run[c] for run in runs], digits[c]) for c in COLUMNS)
        lines.append(f"| {label} | {method['learning_rate']} | {chosen} | {len(runs)} | {numbers} |")
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    """Forget quality (log scale) against model utility, one point per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    points = {f"{name} model": [values] for name, values in results["models"].items()}
    points |= {label: list(method["seeds"].values()) for label, method in results["methods"].items()}
    for number, (label, runs) in enumerate((label, runs) for label, runs in points.items() if runs):
        quality = [max(run["forget_quality"], 1e-30) for run in runs if run["forget_quality"] is not None]
        utility = [run["model_utility"] for run in runs if run["forget_quality"] is not None]
        axes.scatter(utility, quality, label=label, marker="osD^v<>Ph*"[number % 10], alpha=0.8)
    axes.axhline(0.05, color="grey", linewidth=0.8, linestyle="--")
    axes.set(yscale="log", xlabel="model utility", ylabel="forget quality (KS p-value)", title=results["split"])
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder for results.json, table.md and the plot")
    parser.add_argument("--runs", required=True, help="folder for the runs themselves (not committed)")
    parser.add_argument("--split", default="forget10")
    parser.add_argument("--rates", nargs="+", default=["1e-4", "3e-4"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=None, help="labels; all when absent")
    parser.add_argument("--minutes", type=float, default=120.0, help="start no further cell after so many")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    run(args)
    results, output = collect(args), Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "table.md").write_text(table(results))
    plot(results, output / "forget_quality_utility.png")
    print(table(results))


if __name__ == "__main__":
    main()
