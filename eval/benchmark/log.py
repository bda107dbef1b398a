"""Evaluation logs: per-item values of one model, read from and written to open-unlearning's `*_EVAL.json`.

Two published formats are recognised: open-unlearning's `TOFU_EVAL.json` / `MUSE_EVAL.json`, which `fdiv eval` writes
too (with a stamp of its own under the key `fdiv`, which open-unlearning ignores), and the TOFU authors'
`eval_log_aggregated.json`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.files import write_bytes
from fdiv.sealed import DIGEST, UNSEALED, check_sealed, sealed

__all__ = ["STAMP", "EvalLog", "read_eval_log", "write_eval_log"]

STAMP = "fdiv"
"""Top-level key of our own metadata in a log."""

_REMEDY = "make the log again, or take `digest` out of its stamp where it was edited on purpose"

_AUTHORS_PARTS = {
    "eval_log_forget.json": "forget",
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "ra",
    "eval_real_world_wo_options.json": "wf",
}
_SPLIT_ROWS = {40: "forget01", 200: "forget05", 400: "forget10"}


@dataclass
class EvalLog:
    """Per-item values of one model on one benchmark.

    Attributes:
        metrics: metric name → `{"value_by_index": {"0": {...}}}`, for attacks one level deeper by `forget` /
            `holdout`; the layout of open-unlearning.
        benchmark: `tofu` or `muse`.
        preset: the definitions the per-item values were made with.
        source: where the log comes from, for messages.
        stamp: what `fdiv` wrote about the run; empty for published logs.
        checked: whether it is what was written; False for a log that was read and holds no digest.
    """

    metrics: dict[str, dict[str, Any]]
    benchmark: str
    preset: str
    source: str
    stamp: dict[str, Any] = field(default_factory=dict)
    checked: bool = True

    def items(self, metric: str, part: str | None = None, max_rows: int | None = None) -> dict[int, dict[str, Any]]:
        """Rows of one metric by index, in order; empty when the log has none. `part` is `forget` or `holdout` of an
        attack."""
        node = self.metrics.get(metric) or {}
        if part is not None:
            node = self._object(node.get(part) or {}, f"{metric}, {part}")
        rows = self._object(node.get("value_by_index") or {}, f"{metric}, value_by_index")
        wrong = next((index for index in rows if not str(index).isdecimal()), None)
        if wrong is not None:
            raise DataError(f"{self.source}: {metric}: the row {wrong!r} is not numbered")
        rows = {int(index): self._object(row, f"{metric}, row {index}") for index, row in rows.items()}
        for index, row in rows.items():
            for name in ("input", "ground_truth", "generation"):
                if not isinstance(row.get(name, ""), str):
                    raise DataError(
                        f"{self.source}: {metric}, row {index}: {name} is {str(row[name])[:40]!r}, not text"
                    )
        return {i: rows[i] for i in sorted(rows) if max_rows is None or i < max_rows}

    def _object(self, value: Any, where: str) -> Any:
        if not isinstance(value, Mapping):
            raise DataError(f"{self.source}: {where} is {str(value)[:40]!r}, not an object of named values")
        return value

    def column(
        self, metric: str, name: str, part: str | None = None, max_rows: int | None = None
    ) -> dict[int, float | list[float]]:
        """One field of a metric by index, rows where it is null left out. ValueError for a row without the field or
        a NaN."""
        column: dict[int, float | list[float]] = {}
        first = None  # the first row and how many values it holds: all hold as many
        for index, row in self.items(metric, part, max_rows).items():
            where = f"{self.source}: {metric}, row {index}"
            if name not in row:
                raise DataError(f"{where} has no {name!r}, only {', '.join(row)}")
            value = row[name]
            if value is None:
                continue
            for number in value if isinstance(value, list) else [value]:
                _check_number(where, metric, name, number)
            shape = f"a list of {len(value)}" if isinstance(value, list) else "a number"
            first = first or (index, shape)
            if shape != first[1]:
                raise DataError(
                    f"{where}: {name} is {shape}, that of row {first[0]} is {first[1]}; make the log again"
                )
            column[index] = value
        return column

    def made_with(self) -> dict[str, Any]:
        """The stamp of the encoding, number type, tokenizer and back end; empty for a log without a stamp."""
        prompt = self.stamp.get("prompt")
        stamp = dict(prompt) if isinstance(prompt, Mapping) else {}
        return stamp | {name: self.stamp[name] for name in ("dtype", "tokenizer", "backend") if name in self.stamp}

    def split(self) -> str | None:
        """The forget split: as stamped, else by TOFU's row counts (40, 200, 400), else None."""
        if "split" in self.stamp:
            return self.stamp["split"]
        if self.benchmark != "tofu" or self.preset == "tofu_2024":
            return None
        return _SPLIT_ROWS.get(len(self.items("forget_Q_A_PARA_Prob") or self.items("forget_Q_A_Prob")))

    def restricted_to(self, other: EvalLog) -> EvalLog:
        """This log with only the rows `other` has, metric by metric: for a run on a subset of the rows."""

        def keep(node: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
            rows = node.get("value_by_index", {})
            return node | {"value_by_index": {i: row for i, row in rows.items() if i in wanted["value_by_index"]}}

        metrics = {}
        for name, node in self.metrics.items():
            wanted = other.metrics.get(name, {})
            if "value_by_index" in node and "value_by_index" in wanted:
                metrics[name] = keep(node, wanted)
            elif {"forget", "holdout"} <= node.keys() and {"forget", "holdout"} <= wanted.keys():
                metrics[name] = node | {side: keep(node[side], wanted[side]) for side in ("forget", "holdout")}
        return replace(self, metrics=metrics)

    def truths(self) -> list[str]:
        """True answers of the forget rows where the log keeps text, white space collapsed; else an empty list."""
        rows = self.items("forget_Q_A_ROUGE") or self.items("forget_knowmem_ROUGE")
        return [" ".join(row["ground_truth"].split()) for row in rows.values() if "ground_truth" in row]


_ROUNDING = 1e-4  # a probability of 1 may be a little more in a log that was made in bfloat16


def _check_number(where: str, metric: str, name: str, number: Any) -> None:
    """Refuse a value that its metric cannot have.

    Raises:
        DataError: no number, NaN, infinite or beyond float; a probability or share outside [0, 1], a loss below 0.
    """
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise DataError(f"{where}: {name} is {str(number)[:40]!r}, not a number")
    if number != number or abs(number) > sys.float_info.max:
        raise DataError(f"{where}: {name} is {'NaN' if number != number else 'infinite'}")
    share = name == "prob" or name.startswith("rouge") or metric in ("extraction_strength", "exact_memorization")
    if share and not -_ROUNDING <= number <= 1 + _ROUNDING:
        what = "a probability" if name == "prob" else "a share"
        raise DataError(f"{where}: {name} is {number!r}, {what} outside [0, 1]; make the log again")
    if name == "avg_loss" and number < -_ROUNDING:
        raise DataError(f"{where}: avg_loss is {number!r}, below 0: a probability above 1; make the log again")


def _from_authors(parts: Mapping[str, Mapping[str, Any]], source: str) -> EvalLog:
    """The TOFU authors' log in open-unlearning's layout: same per-item values under other names."""
    metrics: dict[str, dict[str, Any]] = {}

    def put(name: str, rows: dict[str, dict[str, Any]]) -> None:
        metrics[name] = {"value_by_index": rows}

    for part_name, part in _AUTHORS_PARTS.items():
        if part_name not in parts:
            continue
        log = parts[part_name]
        for key in ("avg_gt_loss", "average_perturb_loss", "avg_paraphrased_loss", "rougeL_recall"):
            if key not in log:
                raise DataError(f"{source}: {part_name} has no {key!r}, only {', '.join(log)}")

        def probability(losses: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
            rows = {}
            for index, loss in losses.items():
                prob = [math.exp(-x) for x in loss] if isinstance(loss, list) else math.exp(-loss)
                rows[index] = {"prob": prob, "avg_loss": loss}
            return rows

        put(f"{part}_Q_A_Prob", probability(log["avg_gt_loss"]))
        put(f"{part}_Q_A_PERT_Prob", probability(log["average_perturb_loss"]))
        put(f"{part}_Q_A_PARA_Prob", probability(log["avg_paraphrased_loss"]))
        rouge: dict[str, dict[str, Any]] = {}
        for index, recall in log["rougeL_recall"].items():
            rouge[index] = {"rougeL_recall": recall, "rouge1_recall": log.get("rouge1_recall", {}).get(index)}
            if index in log.get("generated_text", {}):
                prompt, generation, truth = log["generated_text"][index]
                rouge[index] |= {"input": prompt, "generation": generation, "ground_truth": truth}
        put(f"{part}_Q_A_ROUGE", rouge)
    return EvalLog(metrics, "tofu", "tofu_2024", source)


def read_eval_log(path: str | Path, benchmark: str | None = None) -> EvalLog:
    """Read a log of either format; the format is recognised from its keys.

    Args:
        path: a JSON file.
        benchmark: `tofu` or `muse` refuses a log of the other one.
    Raises:
        FileNotFoundError: no such file.
        DataError: not JSON, not an evaluation log, one that does not agree with its digest, a summary without
            per-item values, or another benchmark's log.
    """
    source = str(path)
    try:
        raw = Path(path).read_bytes()
        content = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise DataError(f"{source}: not JSON ({error})") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}; give the *_EVAL.json itself") from None
    if not isinstance(content, dict) or not content:
        raise DataError(f"{source}: expected a JSON object of metrics")
    stamp = content.get(STAMP, {})
    if not isinstance(stamp, dict):
        raise DataError(f"{source}: {STAMP!r} is {str(stamp)[:40]!r}, not an object")
    checked = check_sealed(Path(path), raw, stamp, _REMEDY)
    stamp = {name: value for name, value in stamp.items() if name != DIGEST}
    if "eval_log_forget.json" in content:
        log = _from_authors(content, source)
    elif not any(isinstance(value, dict) for value in content.values()):
        raise DataError(
            f"{source}: aggregates only (a *_SUMMARY.json?); re-aggregation needs the per-item values of *_EVAL.json"
        )
    else:
        metrics = {k: v for k, v in content.items() if k != STAMP and isinstance(v, dict)}
        muse, tofu = (any(mark in name for name in metrics) for mark in ("mem_ROUGE", "_Q_A_"))
        found = stamp.get("benchmark") or ("tofu" if tofu else "muse" if muse else None)
        if found is None:
            raise DataError(
                f"{source}: not an evaluation log of open-unlearning or the TOFU authors; its keys are "
                f"{', '.join(list(content)[:8])}"
            )
        log = EvalLog(metrics, found, stamp.get("preset", "open_unlearning"), source, stamp)
    if benchmark is not None and log.benchmark != benchmark:
        raise DataError(f"{source}: a {log.benchmark} log; use `fdiv eval {log.benchmark} --from_logs`")
    return replace(log, checked=checked)


def write_eval_log(path: str | Path, log: EvalLog) -> None:
    """Write open-unlearning's `*_EVAL.json`, metrics in alphabetical order, with our stamp under `fdiv`, and in that
    the digest of the file.

    Args:
        path: of the file; its folder is made. log: what it is to hold.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = log.stamp | {"benchmark": log.benchmark, "preset": log.preset, DIGEST: UNSEALED}
    content = dict(sorted(log.metrics.items())) | {STAMP: stamp}
    write_bytes(path, sealed(json.dumps(content, indent=1).encode()))
