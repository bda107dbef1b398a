"""Sweeps: the cells, resuming, failures, and mean ± s.e. over seeds against hand calculation."""

import dataclasses
import json
import math
from dataclasses import dataclass

import pytest

from fdiv import catalog as methods
from fdiv.cli import main
from fdiv.report.table import aggregate, cell_label, table
from fdiv.run.cells import cell_name, plan_sweep
from fdiv.run.sweep import run_sweep


@dataclass
class ScoreEval:
    """reward and divergence as known functions of the run's settings, so that the table can be checked by hand."""

    summary_metrics = ("reward",)
    frontier = ("kl", "reward")

    def evaluate(self, model, tokenizer, datasets, context):
        args = context.training_args
        trained = context.stage == "after"
        bonus = 10.0 if args.divergence == "forward_kl" else 0.0
        return {
            "reward": bonus + args.seed**2 if trained else -1.0,
            "kl": 0.5 * trained * (1 + args.seed),
            "none": None,
        }


@pytest.fixture(autouse=True)
def score_eval(monkeypatch):
    monkeypatch.setitem(methods.EVALUATIONS, "score", f"{__name__}:ScoreEval")


SWEEP = "eval: {name: score}\nsweep:\n  divergence: [reverse_kl, forward_kl]\n  seed: [1, 2, 4]\n"


@pytest.fixture
def plan(write_recipe):
    return plan_sweep(str(write_recipe(SWEEP + "report: {}\n", max_steps=1)))


def test_cells_are_all_combinations_seeds_fastest(plan):
    cells = list(plan.cells())
    assert [cell.name for cell in cells] == [
        f"{name}_seed-{seed}" for name in ("reverse_kl", "forward_kl") for seed in (1, 2, 4)
    ]
    training = plan.plan(cells[4]).configs.training
    assert (training.divergence, training.seed) == ("forward_kl", 2)
    assert plan.axes == {"divergence": "kl", "reward": "reward"}


def test_names_and_labels():
    settings = {"divergence": {"name": "alpha", "alpha": 0.3}, "eval.batch_size": 8, "seed": 0}
    assert cell_name(settings) == "alpha-0.3_batch_size-8_seed-0"
    assert cell_label(settings) == "alpha(alpha=0.3), eval.batch_size 8"
    assert (
        cell_name({"learning_rate": 1e-5, "model_name_or_path": "a/b c"})
        == "learning_rate-1e-05_model_name_or_path-a-b-c"
    )


def test_a_sweep_runs_resumes_and_aggregates(plan, capsys, monkeypatch):
    import fdiv.run.run

    runs = []
    original = fdiv.run.run.run_plan
    monkeypatch.setattr(fdiv.run.run, "run_plan", lambda plan, *rest: runs.append(plan) or original(plan, *rest))
    assert run_sweep(plan, "fdiv sweep x") == []
    assert len(runs) == 6
    root = plan.root
    results = json.loads((root / "results.json").read_text())
    assert results["command"] == "fdiv sweep x"
    assert results["seeds"] == [1, 2, 4]
    assert results["versions"]["trl"].startswith("1.16")
    assert [cell["status"] for cell in results["cells"]] == ["finished"] * 6
    reverse, forward = results["aggregate"]
    # Seeds 1, 2, 4: squares 1, 4, 16, mean 7, sample variance (36 + 9 + 81) / 2 = 63, s.e. sqrt(63 / 3).
    assert reverse["metrics"]["after/reward"] == {"mean": 7.0, "se": pytest.approx(math.sqrt(21)), "n": 3}
    assert forward["metrics"]["after/reward"]["mean"] == 17.0
    assert reverse["metrics"]["before/reward"] == {"mean": -1.0, "se": 0.0, "n": 3}
    assert reverse["metrics"]["after/none"] == {"mean": None, "se": None, "n": 0}
    text = (root / "table.md").read_text().splitlines()
    assert text[0] == "| setting | n | reward ↑ |"
    assert text[2] == "| reverse_kl | 3 | -1.0 → 7.0 ± 4.583 |"
    assert text[3] == "| forward_kl | 3 | -1.0 → 17.0 ± 4.583 |"
    assert (root / "frontier.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (root / "report.html").is_file()
    seeds_differ = [
        json.loads((root / c.name / "metrics.jsonl").read_text().splitlines()[0]) for c in list(plan.cells())[:2]
    ]
    assert seeds_differ[0]["logps/chosen"] != seeds_differ[1]["logps/chosen"]  # each cell draws its own order

    (root / "forward_kl_seed-2" / "result.json").unlink()
    capsys.readouterr()
    assert main(["sweep", plan.source, "--max_steps", "1"]) == 0
    assert len(runs) == 7
    assert runs[-1].output_dir.name == "forward_kl_seed-2"
    assert "5 cells finished before" in capsys.readouterr().err


def test_a_finished_cell_with_other_settings_is_not_taken_for_the_new_one(plan, fails, write_recipe):
    first = dataclasses.replace(plan.rows[0], seeds=(1,))
    run_sweep(dataclasses.replace(plan, rows=(first,)), "fdiv sweep x")
    message = fails("sweep", plan.source, "--learning_rate", "1e-3", code=1)
    assert "holds a finished cell with learning_rate=0.01, the recipe now says 0.001" in message


def test_a_failed_cell_is_reported_and_the_others_go_on(plan, monkeypatch, capsys):
    original = ScoreEval.evaluate

    def evaluate(self, model, tokenizer, datasets, context):
        if context.training_args.seed == 2 and context.stage == "after":
            raise RuntimeError("out of\nmemory")
        return original(self, model, tokenizer, datasets, context)

    monkeypatch.setattr(ScoreEval, "evaluate", evaluate)
    words = ["sweep", plan.source, "--divergences", "reverse_kl", "--report", "null"]
    assert main(words) == 1
    folder = plan.root / "reverse_kl_seed-2"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"fdiv: sweep cell reverse_kl_seed-2 failed: RuntimeError: out of memory (traceback in {folder / 'error.txt'})"
    )
    assert "Traceback" in (folder / "error.txt").read_text()
    results = json.loads((plan.root / "results.json").read_text())
    assert [cell["status"] for cell in results["cells"]] == ["finished", "failed", "finished"]
    assert (results["aggregate"][0]["n"], results["aggregate"][0]["failed"]) == (2, 1)
    monkeypatch.setattr(ScoreEval, "evaluate", original)
    assert main(words) == 0
    assert not (folder / "error.txt").exists()


def test_requirements_of_a_cell_decide_the_exit_code(write_recipe, capsys):
    text = "eval: {name: score, require: {reward: decreased}}\nsweep: {seed: [1]}\n"
    assert main(["sweep", str(write_recipe(text, max_steps=1))]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "fdiv: sweep cell seed-1: reward has not decreased: -1 before training, 1 after"


def test_a_wrong_cell_is_found_before_the_first_one_runs(write_recipe, fails, tmp_path):
    path = write_recipe("sweep: {divergence: [reverse_kl, total_variation], seed: [0]}\n")
    message = fails("sweep", path)
    assert "total_variation" in message
    assert message.endswith("(sweep cell total_variation_seed-0)")
    assert not (tmp_path / "out").exists()
    assert "nothing to sweep; give --divergences and --seeds" in fails("sweep", write_recipe())
    assert "a value of 'seed' is listed twice: [1, 1]" in fails("sweep", write_recipe(), "--seeds", "1", "1")


def test_dry_run_lists_the_cells(write_recipe, capsys, tmp_path):
    words = ["--divergences", "jeffreys", "{name: alpha, alpha: 0.3}", "--seeds", "5", "--dry_run"]
    assert main(["sweep", str(write_recipe()), *words]) == 0
    printed = capsys.readouterr().out
    assert "2 cells in" in printed
    assert "alpha-0.3_seed-5" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("pass@1", "after/pass@1"),
        ("to_teacher/agreement", "after/to_teacher/agreement"),  # the slash is of the metric, not of a stage
        ("privleak/forget", "after/privleak/forget"),
        ("before/pass@1", "before/pass@1"),
        ("late/group/modes", "late/group/modes"),
        ("train/best_epoch", "train/best_epoch"),
        ("when pass@1>=0.5/pass@64", "when pass@1>=0.5/pass@64"),
        ("train_seconds", "train_seconds"),
    ],
)
def test_the_stage_of_a_metric(metric, name):
    from fdiv.recipe.sweep import staged

    assert staged(metric) == name


def test_aggregate_and_table_without_seeds():
    records = [
        {"settings": {"beta": 0.1}, "status": "finished", "values": {"after/a": 1.0, "after/b": None, "seed": 3}},
        {"settings": {"beta": 0.2}, "status": "failed", "error": "x"},
    ]
    groups = aggregate(records)
    assert groups[0]["metrics"] == {
        "after/a": {"mean": 1.0, "se": None, "n": 1},
        "after/b": {"mean": None, "se": None, "n": 0},
    }
    assert table(groups, ["a", "b"]) == (
        ["setting", "n", "a", "b"],
        [["beta 0.1", "1", "1.0", "–"], ["beta 0.2", "0", "–", "–"]],
    )
    header, rows = table(groups, ["a", "b", "c"], wide=False)
    assert header == ["setting", "beta 0.1", "beta 0.2"]
    assert rows[1] == ["a", "1.0", "–"]


def test_rows_and_a_measured_model_for_real(write_recipe, tmp_path):
    """Two rows are trained, the model they start from is measured without training, and its weights are not written."""
    text = (
        "eval: {name: score}\nsweep:\n  method: {KL: {}, F: {divergence: forward_kl}}\n  seed: [3]\n"
        "  models: {untrained: {}}\n  table: {reward: {better: higher}, train/loss: {}}\n"
    )
    plan = plan_sweep(str(write_recipe(text, max_steps=1)))
    assert run_sweep(plan, "fdiv sweep x") == []
    lines = (plan.root / "table.md").read_text().splitlines()
    assert lines[0] == "| method | seeds | reward ↑ | train/loss |"
    assert lines[2] == "| untrained |  | -1.0 | – |"
    assert [line.split(" | ")[:3] for line in lines[3:]] == [["| KL", "1", "9.0"], ["| F", "1", "19.0"]]
    folder = plan.root / "model-untrained"
    assert {path.name for path in folder.iterdir()} == {
        "digests.json",
        "result.json",
        "recipe_resolved.yaml",
        "environment.json",
        "eval",
    }
    assert json.loads((folder / "result.json").read_text())["after/kl"] == 0.0
    results = json.loads((plan.root / "KL_seed-3" / "result.json").read_text())
    assert "late/loss" not in results  # one log has no late part
