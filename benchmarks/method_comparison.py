"""Unlearning methods side by side: what `tofu_methods.py` and `muse_methods.py` share.

Every method is trained at each learning rate with the first seed; its better rate is the one whose best epoch has the
larger selection score (`fdiv.unlearning.selection`, on a part of the rows); that rate is trained with the other seeds;
the best epoch of each of those runs is evaluated on all rows. Cells are run in that order, a finished one is never run
again, and none is started after `--minutes`: what is missing is marked "not run".
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
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

Cell = tuple[str, str, str, int]
"""(`train` or `evaluate`, label, learning rate, seed)."""


def read(path: Path) -> dict | None:
    """A JSON file; None when it is not there."""
    return json.loads(path.read_text()) if path.is_file() else None


def epochs(folder: Path) -> list[dict[str, float]]:
    """The per-epoch evaluations of a run, the start first."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [row for row in rows if "eval_selection" in row]


def done(folder: Path) -> bool:
    """Whether the run in `folder` came to its end."""
    return (folder / "result.json").is_file()


def shown(values: list[float | None], digits: int) -> str:
    """Mean ± standard error, the number alone when it is one; 0 digits is scientific notation."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    form = (lambda v: f"{v:.1e}") if digits == 0 else (lambda v: f"{v:.{digits}f}")
    if len(numbers) == 1:
        return form(numbers[0])
    return f"{form(statistics.mean(numbers))} ± {form(statistics.stdev(numbers) / math.sqrt(len(numbers)))}"


class Comparison(ABC):
    """One comparison; a benchmark says which recipes, which evaluation and which columns."""

    description: ClassVar[str]
    benchmark: ClassVar[str]
    """The verb of `fdiv eval`."""
    recipes: ClassVar[str]
    """Folder of the packaged recipes."""
    main: ClassVar[dict[str, tuple[str, ...]]]
    """Label → recipe and overrides: the comparison itself, with all seeds."""
    rest: ClassVar[dict[str, tuple[str, ...]]] = {}
    """The others follow with one seed."""
    columns: ClassVar[dict[str, str]]
    """Metric → heading of the table."""
    digits: ClassVar[dict[str, int]] = {}
    """Digits after the point, 3 where a metric is not named."""
    also_kept: ClassVar[tuple[str, ...]] = ()
    """Metrics kept in the JSON without a column."""
    rates: ClassVar[list[str]]
    epochs: ClassVar[int]
    """Defaults of `--rates` and `--epochs`."""
    figure: ClassVar[str]
    trajectory: ClassVar[tuple[str, str]]
    """Two metrics of the evaluation after each epoch: what is to be kept (x) and what is to be forgotten (y)."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.runs = Path(args.runs)
        self.prepared = self.runs / "prepared"

    # ---------------------------------------------------------------- what a benchmark gives
    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Options of its own, beside those of `compare`."""
        parser.set_defaults(split=None)

    def train_options(self) -> list[str]:
        """Overrides of every recipe."""
        return []

    @abstractmethod
    def evaluate_options(self) -> list[str]:
        """Options of `fdiv eval`, the retain log among them."""

    @abstractmethod
    def reference_models(self) -> dict[str, Path]:
        """Models to be evaluated beside the unlearnt ones, by name."""

    @abstractmethod
    def draw(self, axes: Any, results: dict[str, Any], points: dict[str, list[dict[str, Any]]]) -> None:
        """One marker per label on `axes`, a point per seed."""

    # ---------------------------------------------------------------- cells
    def folder(self, label: str, rate: str, seed: int) -> Path:
        """Where a run is."""
        return self.runs / label.replace(" ", "_") / f"lr{rate}-seed{seed}"

    def train(self, label: str, rate: str, seed: int) -> None:
        """One run of the recipe, without its full evaluation; what it prepares is shared by all runs."""
        recipe, *overrides = {**self.main, **self.rest}[label]
        folder = self.folder(label, rate, seed)
        code = (
            "import sys; from pathlib import Path; from fdiv.recipe.model import load_recipe; "
            "from fdiv.run.run import run_recipe; "
            "run_recipe(load_recipe(sys.argv[1], sys.argv[3:]), prepared=Path(sys.argv[2]))"
        )
        options = ["--output_dir", str(folder), "--overwrite_output_dir", "--eval", "null", *self.train_options()]
        options += ["--num_train_epochs", str(self.args.epochs), "--learning_rate", rate, "--seed", str(seed)]
        options += overrides
        command = [sys.executable, "-c", code, f"{self.recipes}/{recipe}", str(self.prepared), *options]
        self.launch(folder, "train.log", command)

    def evaluate(self, label: str, rate: str, seed: int) -> None:
        """All rows, once, of the best epoch, which is what the run saved."""
        folder = self.folder(label, rate, seed)
        self.evaluate_model(str(folder), folder / "full")

    def evaluate_model(self, model: str, output: Path) -> None:
        """`fdiv eval` of one model into `output`."""
        command = [sys.executable, "-m", "fdiv", "eval", self.benchmark, "--model", model, *self.evaluate_options()]
        command += ["--no_gradnorm", "--fluency_classifier", "none", "--output", str(output)]
        self.launch(output.parent, "full.log", command)

    def launch(self, folder: Path, log: str, command: list[str]) -> None:
        """Run a command; its output stands beside `folder`, since a run refuses a folder that holds something else."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.args.threads), "HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        with (folder.parent / f"{folder.name}.{log}").open("w") as file:
            subprocess.run(command, stdout=file, stderr=file, check=True, env=environment)
        print(f"{folder} {log.removesuffix('.log')}: {time.perf_counter() - started:.0f} s", flush=True)

    def best_score(self, label: str, rate: str) -> float:
        """The selection score of the first seed's best epoch; −inf when it was not run."""
        folder = self.folder(label, rate, self.args.seeds[0])
        return max((row["eval_selection"] for row in epochs(folder)[1:]), default=-math.inf)

    def chosen_rate(self, label: str) -> str | None:
        """The better learning rate, once all were tried; the smaller one when they tie."""
        if not all(done(self.folder(label, rate, self.args.seeds[0])) for rate in self.args.rates):
            return None
        return max(sorted(self.args.rates, key=float), key=lambda rate: self.best_score(label, rate))

    def cells(self) -> Iterator[Cell]:
        """In order; a later cell may depend on what an earlier one found."""
        for table, seeds in ((self.main, self.args.seeds), (self.rest, self.args.seeds[:1])):
            labels = [label for label in table if not self.args.methods or label in self.args.methods]
            for label in labels:
                yield from (("train", label, rate, self.args.seeds[0]) for rate in self.args.rates)
            for seed in seeds:
                for label in labels:
                    rate = self.chosen_rate(label)
                    if rate is not None:
                        yield "train", label, rate, seed
                        yield "evaluate", label, rate, seed

    def run(self) -> None:
        """Every cell that is not finished, as long as there is time."""
        stop = time.perf_counter() + 60 * self.args.minutes
        for what, label, rate, seed in self.cells():
            folder = self.folder(label, rate, seed)
            finished = done(folder) if what == "train" else (folder / "full" / "out.json").is_file()
            if not finished and time.perf_counter() <= stop:
                {"train": self.train, "evaluate": self.evaluate}[what](label, rate, seed)
        for name, path in self.reference_models().items():
            folder = self.runs / f"model_{name}"
            if not (folder / "full" / "out.json").is_file() and time.perf_counter() < stop:
                self.evaluate_model(str(path), folder / "full")

    # ---------------------------------------------------------------- results
    def collect(self) -> dict[str, Any]:
        """Everything measured, by method and seed."""
        from fdiv.provenance import git_revision, package_versions

        methods = {}
        for label in (*self.main, *self.rest):
            rate = self.chosen_rate(label)
            first = {r: self.folder(label, r, self.args.seeds[0]) for r in self.args.rates}
            screened = {r: self.best_score(label, r) for r, folder in first.items() if done(folder)}
            runs = {}
            for seed in self.args.seeds if rate is not None else ():
                folder = self.folder(label, rate, seed)
                full = read(folder / "full" / "out.json")
                if full is not None:
                    scores = [row["eval_selection"] for row in epochs(folder)[1:]]
                    runs[str(seed)] = {
                        "best_epoch": 1 + scores.index(max(scores)),
                        "selection_by_epoch": scores,
                        "train_seconds": read(folder / "result.json")["train_seconds"],
                        **{name: full.get(name) for name in (*self.columns, *self.also_kept)},
                    }
            paths = {
                r: [[row.get(f"eval_{m}") for m in self.trajectory] for row in epochs(first[r])] for r in screened
            }
            methods[label] = {"learning_rate": rate, "screened": screened, "trajectory": paths, "seeds": runs}
        models = {name: read(self.runs / f"model_{name}" / "full" / "out.json") for name in self.reference_models()}
        kept = (*self.columns, *self.also_kept)
        models = {name: {key: log.get(key) for key in kept} for name, log in models.items() if log}
        record: dict[str, Any] = {"command": " ".join(["python", *sys.argv])}
        record |= {name: getattr(self.args, name) for name in ("split", "epochs", "rates", "seeds")}
        record |= {"git_revision": git_revision(), "versions": package_versions()}
        return record | {"models": models, "methods": methods}

    def table(self, results: dict[str, Any]) -> str:
        """The comparison as Markdown."""
        headings, width = " | ".join(self.columns.values()), len(self.columns)
        lines = [f"| method | rate | epoch | seeds | {headings} |", "|---" * (4 + width) + "|"]
        for name, values in results["models"].items():
            numbers = " | ".join(shown([values[c]], self.digits.get(c, 3)) for c in self.columns)
            lines.append(f"| {name} model | | | | {numbers} |")
        for label, method in results["methods"].items():
            runs = list(method["seeds"].values())
            if not runs:
                lines.append(f"| {label} | | | | {' | '.join(['not run'] * width)} |")
                continue
            chosen = ", ".join(str(run["best_epoch"]) for run in runs)
            numbers = " | ".join(shown([run[c] for run in runs], self.digits.get(c, 3)) for c in self.columns)
            lines.append(f"| {label} | {method['learning_rate']} | {chosen} | {len(runs)} | {numbers} |")
        return "\n".join(lines) + "\n"

    def plot(self, results: dict[str, Any], path: Path) -> None:
        """The picture: one marker per label, one point per seed."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
        points = {f"{name} model": [values] for name, values in results["models"].items()}
        points |= {label: list(method["seeds"].values()) for label, method in results["methods"].items()}
        self.draw(axes, results, {label: runs for label, runs in points.items() if runs})
        axes.legend(fontsize=7)
        figure.savefig(path, dpi=150)
        plt.close(figure)

    def plot_trajectories(self, results: dict[str, Any], path: Path) -> None:
        """The path of each method from epoch to epoch (first seed, selection rows), a panel per learning rate."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        rates = results["rates"]
        figure, panels = plt.subplots(
            1, len(rates), figsize=(5 * len(rates), 4.5), layout="constrained", sharex=True, sharey=True, squeeze=False
        )
        for axes, rate in zip(panels[0], rates, strict=True):
            for number, (label, method) in enumerate(results["methods"].items()):
                if method["trajectory"].get(rate):
                    x, y = zip(*method["trajectory"][rate], strict=True)
                    axes.plot(x, y, marker=MARKERS[number % len(MARKERS)], label=label, alpha=0.8)
            axes.set(title=f"learning rate {rate}", xlabel=self.trajectory[0].replace("_", " "))
        panels[0][0].set_ylabel(self.trajectory[1].replace("_", " "))
        drawn = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels[0]]
        handles = {label: line for pairs in drawn for line, label in pairs}
        panels[0][-1].legend(handles.values(), handles, fontsize=7)
        figure.savefig(path, dpi=150)
        plt.close(figure)


MARKERS = "osD^v<>Ph*X"  # eleven, beside ten colours: together they repeat after 110 labels


def compare(kind: type[Comparison]) -> None:
    """The command line of a comparison."""
    parser = argparse.ArgumentParser(description=kind.description)
    parser.add_argument("--output", required=True, help="folder for results.json, table.md and the plot")
    parser.add_argument("--runs", required=True, help="folder for the runs themselves (not committed)")
    kind.add_arguments(parser)
    parser.add_argument("--rates", nargs="+", default=kind.rates)
    parser.add_argument("--epochs", type=int, default=kind.epochs)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=(*kind.main, *kind.rest), help="labels; all when absent")
    parser.add_argument("--minutes", type=float, default=120.0, help="start no further cell after so many")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if "FDIV_SHARED" not in os.environ:
        parser.error("the environment variable FDIV_SHARED is not set: it names the folder with the data")
    comparison, output = kind(args), Path(args.output)
    comparison.run()
    results = comparison.collect()
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (output / "table.md").write_text(comparison.table(results))
    comparison.plot(results, output / kind.figure)
    comparison.plot_trajectories(results, output / "trajectories.png")
    print(comparison.table(results))
