"""Unlearning methods on SmolLM2-135M-Instruct that has memorised TOFU authors: the cells of `results/tofu_smollm2`.

    FDIV_SHARED=DIR python -m benchmarks.smollm2_tofu --build DIR --runs DIR --minutes 120

`--build` is what `prepare` of `recipes/tofu/smollm2_base.yaml` made. Cells run in the order of the protocol (see
`results/tofu_smollm2/README.md`): of four arms every rate with seed 0, then the chosen rate with the other seeds; then
the same for the other three. A finished cell (its `cell.json`) is never run again; none starts after `--minutes`. One
process runs them all, because starting one costs as much as a small cell.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import statistics
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FIRST = {
    "FLAT TV": ("flat", "--divergence", "total_variation"),
    "NPO": ("npo",),
    "GradDiff": ("grad_diff",),
    "FLAT TV + retain": ("flat", "--divergence", "total_variation", "--retain_term", "nll"),
}
"""Run to the end before the others are begun."""
REST = {
    "SimNPO": ("simnpo",),
    "FLAT KL": ("flat", "--divergence", "reverse_kl"),
    "FLAT KL + retain": ("flat", "--divergence", "reverse_kl", "--retain_term", "nll"),
}
ARMS = {**FIRST, **REST}
RATES = ("5e-4", "2e-3")
SEEDS = (0, 1, 2)
UTILITY_FLOOR = 0.9
HALVES = {"validation": 0, "test": 1}
"""Rows of even index choose the rate, rows of odd index are reported."""


def values(log: Mapping[str, Any], metric: str, half: int | None, key: str = "score") -> list[float]:
    """Per-item values of a log, of one half of the rows or of all (None)."""
    items = (
        log[metric]["value_by_index"] if "value_by_index" in log[metric] else log[metric]["forget"]["value_by_index"]
    )
    return [row[key] for index, row in items.items() if half is None or int(index) % 2 == half]


def utility(log: Mapping[str, Any], half: int | None) -> float:
    """Harmonic mean of the six parts of TOFU's model utility that need no generation."""
    parts = [statistics.fmean(values(log, "retain_Q_A_Prob", half, "prob"))]
    parts += [statistics.fmean(values(log, f"{name}_Q_A_Prob_normalised", half, "prob")) for name in ("ra", "wf")]
    # A truth ratio counts for utility as max(0, 1 - ratio), as in TOFU.
    for name in ("retain", "ra", "wf"):
        parts.append(statistics.fmean(max(0.0, 1 - r) for r in values(log, f"{name}_Truth_Ratio", half)))
    return statistics.harmonic_mean(parts)


def measures(log: Mapping[str, Any], half: int | None) -> dict[str, float]:
    """What the comparison looks at, on one half of the rows."""
    return {
        "extraction_strength": statistics.fmean(values(log, "extraction_strength", half)),
        "min_k": statistics.fmean(values(log, "mia_min_k", half)),
        "forget_prob": statistics.fmean(values(log, "forget_Q_A_Prob", half, "prob")),
        "retain_prob": statistics.fmean(values(log, "retain_Q_A_Prob", half, "prob")),
        "utility": utility(log, half),
    }


def distance(found: Mapping[str, float], full: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """Mean over extraction strength and Min-K of |model - retrained| / |memorised - retrained|: 0 as retrained, 1 as
    before unlearning."""
    return statistics.fmean(
        abs(found[name] - retrained[name]) / abs(full[name] - retrained[name])
        for name in ("extraction_strength", "min_k")
    )


@functools.cache
def passages() -> list[str]:
    """The middle of 12 novels of `FDIV_SHARED/data`, in the order of the archive."""
    texts: list[str] = []
    with tarfile.open(Path(os.environ["FDIV_SHARED"]) / "data" / "english_novels_pd.tar.xz") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".txt"):
                text = archive.extractfile(member).read().decode("utf-8")
                texts.append(text[len(text) // 2 :][:2000])
            if len(texts) == 12:
                break
    return texts


COLUMNS = {
    "distance": "distance ↓",
    "extraction_strength": "ES",
    "min_k": "Min-K",
    "forget_prob": "P(forget)",
    "retain_prob": "P(retain)",
    "utility": "utility",
    "forget_quality_ks_statistic": "KS",
    "forget_quality": "FQ",
    "perplexity": "perplexity",
}
"""Metric → heading. The first six are of the test half, the others of all rows and of the novels."""


def reported(cell: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a cell by column."""
    numbers = {**cell["all"], **cell["test"], "perplexity": cell["perplexity"]}
    return {name: numbers.get(name) for name in COLUMNS}


def shown(values: list[float | None]) -> str:
    """Mean ± standard error over seeds; the number alone where there is one."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    digits = 0 if statistics.fmean(found) >= 100 else 3
    mean = f"{statistics.fmean(found):.{digits}f}"
    if len(found) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(found) / math.sqrt(len(found)):.{digits}f}"


class Queue:
    """The cells, in order, and what they measured."""

    def __init__(self, build: Path, runs: Path) -> None:
        self.build, self.runs = build, runs

    def folder(self, label: str, rate: str, seed: int) -> Path:
        return self.runs / label.replace(" ", "_") / f"lr{rate}-seed{seed}"

    def run(self, minutes: float) -> None:
        """Every cell that is not finished, as long as there is time."""
        stop = time.monotonic() + 60 * minutes
        for name, path in self.models().items():
            self.measured(self.runs / f"model_{name}", path, None)
        for label, rate, seed in self.cells():
            folder = self.folder(label, rate, seed)
            if not (folder / "cell.json").is_file() and time.monotonic() < stop:
                self.cell(label, rate, seed)

    def models(self) -> dict[str, str]:
        base = json.loads((self.build / "prepare.json").read_text())["model"]
        return {"retrained": str(self.build / "retain_model"), "memorised": str(self.build / "model"), "base": base}

    def cells(self) -> Iterator[tuple[str, str, int]]:
        for arms in (FIRST, REST):
            for label in arms:
                yield from ((label, rate, SEEDS[0]) for rate in RATES)
            for seed in SEEDS[1:]:
                for label in arms:
                    rate = self.chosen_rate(label)
                    if rate is not None:
                        yield label, rate, seed

    def chosen_rate(self, label: str) -> str | None:
        """On the validation half, the nearest to the retrained model of the rates that keep 90 % of the utility; where
        none does, the one that keeps most; None while a rate was not run."""
        found = {rate: self.read(self.folder(label, rate, SEEDS[0]) / "cell.json") for rate in RATES}
        if not all(found.values()):
            return None
        half = {rate: cell["validation"] for rate, cell in found.items()}
        floor = UTILITY_FLOOR * self.read(self.runs / "model_memorised" / "cell.json")["validation"]["utility"]
        kept = [rate for rate in RATES if half[rate]["utility"] >= floor]
        if kept:
            return min(kept, key=lambda rate: half[rate]["distance"])
        return max(RATES, key=lambda rate: half[rate]["utility"])

    # ---------------------------------------------------------------- results
    def collect(self) -> dict[str, Any]:
        """Everything measured: the models, every arm at every rate with seed 0, the chosen rate with all seeds."""
        models = {name: self.read(self.runs / f"model_{name}" / "cell.json") for name in self.models()}
        arms = {}
        for label in ARMS:
            chosen = self.chosen_rate(label)
            found = {rate: self.read(self.folder(label, rate, SEEDS[0]) / "cell.json") for rate in RATES}
            seeds = {str(seed): self.read(self.folder(label, chosen, seed) / "cell.json") for seed in SEEDS if chosen}
            arms[label] = {
                "learning_rate": chosen,
                "screened": {rate: cell for rate, cell in found.items() if cell},
                "seeds": {seed: cell for seed, cell in seeds.items() if cell},
            }
        prepare = json.loads((self.build / "prepare.json").read_text())
        return {"prepare": {**prepare, "model": "smollm2-135m-instruct"}, "models": models, "arms": arms}

    @staticmethod
    def read(path: Path) -> dict[str, Any] | None:
        return json.loads(path.read_text()) if path.is_file() else None

    def cell(self, label: str, rate: str, seed: int) -> None:
        """Train one adapter and evaluate it."""
        from fdiv.recipe.load import load_recipe
        from fdiv.run.run import run_recipe

        recipe, *overrides = ARMS[label]
        folder, data = self.folder(label, rate, seed), self.build / "data"
        options = ["--prepare", "null", "--eval", "null", "--model_name_or_path", str(self.build / "model")]
        options += ["--dataset_name", str(data / "forget01.json"), "--retain_dataset_name", str(data / "retain.json")]
        options += [
            "--learning_rate",
            rate,
            "--seed",
            str(seed),
            "--output_dir",
            str(folder),
            "--overwrite_output_dir",
        ]
        started = time.process_time()
        result = run_recipe(load_recipe(f"tofu/smollm2/{recipe}", [*options, *overrides]))
        gc.collect()
        self.measured(folder, str(self.build / "model"), str(folder), train=result, since=started)

    def measured(self, folder: Path, model: str, adapter: str | None, train: Any = None, since: float | None = None):
        """Evaluate a model on all rows and write `TOFU_EVAL.json` and `cell.json` into `folder`."""
        if (folder / "cell.json").is_file():
            return
        from fdiv.eval.benchmark.log import write_eval_log
        from fdiv.eval.tofu.evaluation import TofuEvalConfig, TofuEvaluation
        from fdiv.models.loading import load_model, load_tokenizer

        since = time.process_time() if since is None else since
        folder.mkdir(parents=True, exist_ok=True)
        retain_log = self.runs / "model_retrained" / "TOFU_EVAL.json"
        config = TofuEvalConfig(
            data=str(self.build / "data"), split="forget01", chat_template="never", generate=False, gradnorm=False,
            fluency_classifier="none", retain_logs=str(retain_log) if retain_log.is_file() else None,
        )  # fmt: skip
        evaluation = TofuEvaluation(config, load_tokenizer(model))
        loaded = load_model(model, adapter)
        aggregates = evaluation.aggregate(evaluation.run(loaded))
        write_eval_log(folder / "TOFU_EVAL.json", aggregates.log)
        log = aggregates.log.metrics
        cell: dict[str, Any] = {"all": dict(aggregates.values) | measures(log, None)}
        cell["perplexity"] = self.perplexity(loaded, model)
        for name, half in HALVES.items():
            cell[name] = measures(log, half)
            full, retrained = (self.read(self.runs / f"model_{m}" / "cell.json") for m in ("memorised", "retrained"))
            if full and retrained:
                cell[name]["distance"] = distance(cell[name], full[name], retrained[name])
        cell["cpu_seconds"] = time.process_time() - since
        if train is not None:
            cell["train"] = {k: v for k, v in train.items() if k.startswith("train")}
        (folder / "cell.json").write_text(json.dumps(cell, indent=1) + "\n")
        print(folder, json.dumps(cell["validation"]), f"{cell['cpu_seconds']:.0f} s", flush=True)

    @staticmethod
    def perplexity(model: Any, name: str) -> float:
        """Of 12 passages of 64 tokens of public-domain novels, one each: knowledge from before TOFU."""
        import torch
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name)
        ids = torch.tensor([tokenizer(text)["input_ids"][:64] for text in passages()])
        with torch.no_grad():
            return math.exp(model(input_ids=ids, labels=ids).loss.item())


def table(results: Mapping[str, Any]) -> str:
    """Two Markdown tables: the chosen rates over seeds, and every screened rate with seed 0."""
    rule = "|---" * (3 + len(COLUMNS)) + "|"
    header = f"| | rate | seeds | {' | '.join(COLUMNS.values())} |"
    missing = " | ".join(["not run"] * len(COLUMNS))
    lines = [header, rule]
    for name, cell in results["models"].items():
        lines.append(f"| {name} model | | | {' | '.join(shown([reported(cell)[c]]) for c in COLUMNS)} |")
    for label, arm in results["arms"].items():
        cells = [reported(cell) for cell in arm["seeds"].values()]
        numbers = " | ".join(shown([cell[c] for cell in cells]) for c in COLUMNS) if cells else missing
        lines.append(f"| {label} | {arm['learning_rate'] or ''} | {len(cells) or ''} | {numbers} |")
    lines += ["", "Every rate, seed 0:", "", header, rule]
    for label, arm in results["arms"].items():
        for rate in RATES:
            cell = arm["screened"].get(rate)
            numbers = " | ".join(shown([reported(cell)[c]]) for c in COLUMNS) if cell else missing
            lines.append(f"| {label} | {rate} | {1 if cell else ''} | {numbers} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", required=True, type=Path)
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument(
        "--output", type=Path, help="write results.json and table.md of what is finished here, run nothing"
    )
    args = parser.parse_args()
    queue = Queue(args.build, args.runs)
    if args.output is None:
        queue.run(args.minutes)
    else:
        results = queue.collect()
        (args.output / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        (args.output / "table.md").write_text(table(results))
