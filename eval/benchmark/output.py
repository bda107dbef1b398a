"""What an evaluation leaves behind: `out.json`, the log, samples, plots and a table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.eval.benchmark.aggregation import Aggregates
from fdiv.eval.benchmark.log import EvalLog, write_eval_log
from fdiv.sealed import listed

if TYPE_CHECKING:
    from fdiv.evaluation import EvalContext

__all__ = ["keep_examples", "output_paths", "show_table", "write_evaluation", "write_result"]


def output_paths(output: str) -> tuple[Path | None, Path]:
    """(directory or None, result file): `--output X.json` writes that file alone, anything else is a directory."""
    path = Path(output)
    if path.suffix == ".json":
        if path.is_dir():
            raise DataError(f"--output {output} is a directory: name a file, or a directory without .json")
        return None, path
    if path.exists() and not path.is_dir():
        raise DataError(f"--output {output} is a file: name a directory, or a file ending in .json")
    return path, path / "out.json"


def write_result(path: Path, result: Aggregates, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write `out.json`: every value at the top level, the reasons of the nulls under `notes`, the run under
    `settings`.

    `about` may hold `model`, `split`, `settings`, `rows` and `environment`.
    """
    from fdiv.sealed import write_record

    log = result.log
    content: dict[str, Any] = {"benchmark": log.benchmark, "preset": result.preset.name, "split": log.split()}
    content |= {name: about[name] for name in ("model",) if name in about}
    content |= result.values
    content["notes"] = dict(result.notes)
    content["settings"] = {"definitions": result.preset.describe(), **about.get("settings", {})}
    content |= {name: about[name] for name in ("rows", "environment") if name in about}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, content)
    return content


def keep_examples(log: EvalLog, context: EvalContext) -> None:
    """Pass some generated answers of every set of rows to the report; their score is ROUGE-L."""
    for metric in sorted(log.metrics):
        rows = log.items(metric).values() if metric.endswith("_ROUGE") else ()
        context.keep_examples(
            metric.removesuffix("_ROUGE"),
            [
                {
                    "prompt": row["input"],
                    "completion": row["generation"],
                    "truth": row.get("ground_truth"),
                    "score": row.get("rougeL_recall"),
                }
                for row in rows
                if "generation" in row and "input" in row
            ],
        )


def _write_samples(path: Path, log: EvalLog) -> None:
    """One JSON line per generated answer: set, index, prompt, truth, generation, ROUGE, and probability where
    scored."""
    with path.open("w", encoding="utf-8") as file:
        for metric in sorted(log.metrics):
            if not metric.endswith("_ROUGE"):
                continue
            probabilities = log.items(metric.replace("_ROUGE", "_Prob"))
            for index, row in log.items(metric).items():
                line = {"metric": metric, "index": index, **row}
                if index in probabilities:
                    line["prob"] = probabilities[index]["prob"]
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_evaluation(
    folder: Path, result: Aggregates, retain: EvalLog | None, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write everything of a model's evaluation into `folder` and return the content of `out.json`.

    `out.json`, `TOFU_EVAL.json` / `MUSE_EVAL.json` and the matching `*_SUMMARY.json` in open-unlearning's format,
    `samples.jsonl`, plots, and `retain/*_EVAL.json` where a retain model was scored.
    """
    from fdiv.eval.benchmark.plots import plot_evaluation
    from fdiv.files import write_json

    folder.mkdir(parents=True, exist_ok=True)
    name = result.log.benchmark.upper()
    result.log.stamp["missing"] = {k: v for k, v in result.notes.items() if result.values.get(k) is None}
    write_eval_log(folder / f"{name}_EVAL.json", result.log)
    write_json(folder / f"{name}_SUMMARY.json", {k: v for k, v in sorted(result.values.items()) if v is not None})
    if retain is not None and retain.source == "retain model":
        (folder / "retain").mkdir(exist_ok=True)
        write_eval_log(folder / "retain" / f"{name}_EVAL.json", retain)
    with listed(folder / "samples.jsonl"):
        _write_samples(folder / "samples.jsonl", result.log)
    plot_evaluation(folder, result, retain)
    return write_result(folder / "out.json", result, about)


def show_table(title: str, result: Aggregates, first: Sequence[str] = ()) -> None:
    """The values as a table on the terminal, headline metrics first, then every note."""
    from fdiv.report.metrics import marked, meanings
    from fdiv.terminal import number, print_table

    names = [name for name in first if name in result.values]
    names += [name for name in result.values if name not in names]
    rows = [(marked(name), number(result.values[name])) for name in names]
    notes = meanings(names) + [f"{name}: {reason}" for name, reason in result.notes.items()]
    print_table(f"{title} · preset {result.preset.name}", ("metric", "value"), rows, notes)
