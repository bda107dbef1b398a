"""Every metric that this package produces has an entry in the glossary, and the docs page is the glossary."""

import ast
import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from fdiv.catalog import EVALUATIONS
from fdiv.named import Table
from fdiv.report.metrics import GLOSSARY, better, describe, documentation, hover, marked, meanings, plain_name
from fdiv.report.table import method_of

ROOT = Path(__file__).resolve().parents[2]
# What `result.json` holds beside metrics.
SETTINGS = {"seed", "beta"}
# Where metrics are made: our trainers, objectives and evaluations.
FOLDERS = ("alignment", "rl", "unlearning", "distillation", "fdiv/training", "eval", "recipes/tasks/tiny")
# Functions whose dictionaries are metrics (or columns that `reduce_examples` turns into metrics of the same name).
MAKERS = {
    "decide", "diversity", "dph_metrics", "f_dpg_metrics", "method_columns", "partition_metrics",
    "reduce_examples", "reduce_groups", "summarise", "_pair_metrics", "_sample_metrics", "_split_metrics",
}  # fmt: skip


def unknown(names, method=None):
    return sorted({name for name in names if describe(name, method) is None})


def text_of(node: ast.expr) -> str | None:
    """A string in the code, with `x` for what a format string fills in; None for one that begins with such a part."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
        return "".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values)
    return None


def written_metrics(source: str) -> set[str]:
    """The names in `…metrics…["NAME"]` and in the dictionaries of the functions that make metrics."""
    found: set[str | None] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and "metrics" in ast.unparse(node.value):
            found.add(text_of(node.slice))
        if isinstance(node, ast.FunctionDef) and node.name in MAKERS:
            for inner in ast.walk(node):
                kept = isinstance(inner, ast.AugAssign | ast.Return | ast.Assign)
                target = getattr(inner, "target", None) or (getattr(inner, "targets", None) or [None])[0]
                if kept and (target is None or ast.unparse(target) == "metrics"):
                    dictionaries = [part for part in ast.walk(inner) if isinstance(part, ast.Dict)]
                    found |= {text_of(key) for part in dictionaries for key in part.keys if key is not None}
    return {name for name in found if name is not None and name not in ("train", "eval")}


def test_the_scan_finds_names():
    code = "def decide():\n    metrics = {'a/b': 1}\n    self._metrics[mode][f'kl/{x}'].append(1)\n    return metrics | {'c': 2}"
    assert written_metrics(code) == {"a/b", "kl/x", "c"}


# Keys of an evaluation's rows and of `{"value", "se"}`, and format strings whose filled-in names are checked elsewhere.
ITEMS = {"value_by_index", "score", "prob", "avg_loss", "auc", "agg_value", "forget", "holdout", "value", "se"}
ITEMS |= {"rewards/x", "eval_x"}


def test_every_metric_in_our_code_is_known():
    names = set()
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            names |= written_metrics(file.read_text(encoding="utf-8"))
    assert len(names) > 80
    assert {"z/log_mean", "rehearsal/loss", "anchors/online", "log_ratio/x", "moments/effective_samples"} & names
    by_method = {name for name in names if describe(name, "f_dpg") or describe(name, "flat")}
    assert unknown(names - by_method - ITEMS) == []


def test_every_metric_of_trl_is_known():
    folder = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "trainer"
    names = set()
    for file in ("dpo_trainer.py", "grpo_trainer.py"):
        source = (folder / file).read_text(encoding="utf-8")
        names |= {re.sub(r"{.*?}", "x", name) for name in re.findall(r'_metrics\[mode\]\[f?"([^"]+)"\]', source)}
    assert {"rewards/margins", "completions/mean_length", "frac_reward_zero_std"} <= names
    assert unknown(names) == []


def test_every_metric_of_the_committed_results_is_known():
    """A name by the method of its cell, which may give it a meaning of its own."""
    names = {None: set()}
    for file in sorted((ROOT / "results").glob("*/results.json")):
        results = json.loads(file.read_text(encoding="utf-8"))
        # An experiment of one method has that method's columns.
        names.setdefault(method_of(results), set()).update(results["columns"], results.get("table", {}))
        for record in results["cells"]:
            values = record.get("values") or {}
            of_method = names.setdefault(values.get("method"), set())
            of_method |= {name for name, value in values.items() if isinstance(value, int | float)}
            of_method |= {*(record.get("series") or {})}
    assert len(set().union(*names.values())) > 200
    for method, found in names.items():
        assert unknown(found - SETTINGS, method) == [], method


def test_tables_of_experiments_agree_with_the_glossary():
    for file in sorted((ROOT / "results").glob("*/results.json")):
        for name, column in json.loads(file.read_text(encoding="utf-8")).get("table", {}).items():
            assert column["better"] in (None, better(name)), f"{file.parent.name}: {name}"


def test_every_metric_that_an_evaluation_puts_forward_is_known():
    seen = 0
    for name in EVALUATIONS:
        config = EVALUATIONS.find(name)
        given = {
            "tiny_world": {"world": "x"}, "answer_likelihood": {"data": "x"}, "benchmark": {"data": "tofu"},
            "lm_eval": {"tasks": ["x"]},
        }.get(name, {})  # fmt: skip
        names = {*config(**given).summary_metrics, *getattr(config, "frontier", ())}
        method = "f_dpg" if name == "target" else None
        assert unknown(names, method) == [], name
        seen += len(names)
    assert seen > 30


def test_every_aggregate_of_the_benchmarks_is_known():
    from fdiv.eval.benchmark.log import EvalLog
    from fdiv.eval.benchmark.presets import PRESETS, get_preset
    from fdiv.eval.muse.aggregate import aggregate_muse, utility_curve
    from fdiv.eval.tofu.aggregate import aggregate_tofu

    assert isinstance(PRESETS, Table)
    for preset in PRESETS:
        tofu = aggregate_tofu(EvalLog({}, "tofu", preset, "empty"), get_preset(preset))
        muse = aggregate_muse(EvalLog({}, "muse", preset, "empty"), get_preset(preset))
        assert len(tofu.values) > 30 and len(muse.values) > 10
        assert unknown({*tofu.values, *muse.values}) == []
    curve = utility_curve([0.5], 1.0)
    assert unknown("scalability" if name == "kept" else f"scalability_{name}" for name in curve) == []


def test_every_pass_at_k_metric_is_known():
    from fdiv.eval.pass_at_k.aggregate import summarise
    from fdiv.eval.pass_at_k.records import TaskCounts

    counts = TaskCounts(["a"], np.array([2]), np.array([1]), [["1", "2"]], [[True, False]])
    found = summarise(counts, [1, 2], source="test", resamples=2)
    assert {"maj@n", "g_pass@2_0.5", "mg_pass@2"} <= set(found)
    assert unknown(found) == []
    assert unknown(f"sql/{name}" for name in found) == []  # an evaluation with a label


def test_entries_are_whole():
    for metrics in GLOSSARY.values():
        for metric in metrics:
            assert "\n" not in metric.meaning and metric.meaning and metric.range, metric
            plain = metric.name.replace("*", "x").replace("K", "8")
            assert describe(plain, metric.method) == metric, f"{metric.name} is hidden by another entry"
    for title, metrics in GLOSSARY.items():
        names = [(metric.name, metric.method) for metric in metrics]
        assert len(set(names)) == len(names), title


@pytest.mark.parametrize(
    ("name", "method", "entry", "direction"),
    [
        ("after/pass@64", None, "pass@K", "higher"),
        ("late/reward", "dph", "reward", "higher"),
        ("train/eval_loss", None, "loss", None),
        ("divergence/alpha(0.5)", "f_dpo", "divergence/*", None),
        ("divergence/alpha(0.5)", "f_dpg", "divergence/*", "lower"),
        ("divergence/alpha(0.5)_se", "f_dpg", "divergence/*_se", None),
        ("forward_kl", "f_dpg", "forward_kl", "lower"),
        ("forward_kl", "f_dpo", "forward_kl", None),
        ("log_ratio/chosen_p50", None, "log_ratio/*_pK", None),
        ("privleak", None, "privleak", "zero"),
        ("arc_easy/acc_norm", None, "acc_norm", "higher"),
        ("moments/x/lambda", "f_dpg", "moments/*/lambda", None),
    ],
)
def test_a_name_finds_its_entry(name, method, entry, direction):
    found = describe(name, method)
    assert (found.name, found.better) == (entry, direction)


def test_an_unknown_metric_is_shown_as_it_is():
    assert describe("mine/score_of_mine") is None and describe("mine/loss") is None
    assert marked("mine/loss") == "mine/loss" and hover("mine/loss") == ""
    assert meanings(["mine/loss"]) == []


def test_marks_and_meanings():
    assert marked("pass@1") == "pass@1 ↑" and marked("privleak") == "privleak → 0" and marked("entropy") == "entropy"
    assert marked("pass@1", title="P1") == "P1 ↑" and marked("mine", towards="lower") == "mine ↓"
    lines = meanings(["pass@1", "pass@8", "pass@8_se", "mine", "extraction_strength"])
    assert [line.split(": ")[0] for line in lines] == ["pass@1, pass@8 ↑", "extraction_strength ↓"]
    assert lines[0].endswith("mean over tasks (0 to 1)")
    assert meanings(["pass@1"], titles={"pass@1": "P1"})[0].startswith("P1 ↑: chance")
    assert hover("pass@8").endswith("; 0 to 1; higher is better")
    assert plain_name("before/sql/pass@1") == "sql/pass@1"


def test_the_page_of_the_docs_is_the_glossary():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == documentation(), "run `make metrics`"
    assert all(dataclasses.asdict(metric)["meaning"] in page for metrics in GLOSSARY.values() for metric in metrics)


def test_the_terminal_table_and_the_report_explain_what_they_show(capsys, tmp_path):
    from fdiv.report.page import _hovers
    from fdiv.report.sheet import table
    from fdiv.report.table import run_table

    result = {
        "summary_metrics": ["forward_kl", "mine"], "method": "f_dpg", "divergence": "forward_kl", "recipe": "r",
        "seed": 0, "steps": 1, "train_seconds": 1.0, "notes": {}, "before/forward_kl": 2.0, "after/forward_kl": 1.0,
        "before/mine": 1.0, "after/mine": 1.0,
    }  # fmt: skip
    run_table(result, tmp_path)
    shown = capsys.readouterr().out
    assert "forward_kl ↓" in shown and "mine ↓" not in shown
    assert "forward_kl ↓: KL(p‖π) of the target from the policy (≥ 0 nats)" in shown

    hovers = _hovers(["pass@8", "mine"], None, {"pass@8": ("P8", None)})
    wide = table(["setting", "P8 ↑", "mine"], [["a", "0.5", "1"]], hovers)
    turned = table(["metric", "before"], [["P8 ↑", "0.5"]], hovers)
    assert '<th title="chance that at least one of K samples is right, mean over tasks; 0 to 1;' in wide
    assert "<th>mine</th>" in wide and '<td title="chance that' in turned


@pytest.mark.parametrize(
    ("metric", "method", "before", "after", "met"),
    [
        ("forward_kl", "f_dpg", 2.0, 1.0, True),  # distance from the target: down
        ("forward_kl", "f_dpo", 2.0, 1.0, False),  # neither way is better: up, as ever
        ("privleak", "flat", -90.0, -5.0, True),
        ("privleak", "flat", -5.0, 6.0, False),  # towards 0, from either side
        ("privleak", "flat", 6.0, -5.0, True),
        ("pass@1", "dph", 0.5, 0.4, False),
    ],
)
def test_improved_follows_the_glossary(metric, method, before, after, met):
    from types import SimpleNamespace

    from fdiv.run.evaluation import unmet_requirements

    evaluations = [(SimpleNamespace(require={metric: "improved"}), object())]
    assert (unmet_requirements(evaluations, {metric: before}, {metric: after}, method) == []) == met
