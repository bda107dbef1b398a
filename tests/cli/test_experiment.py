"""Experiments: the `method` axis, screening, budgets, measured models, what is shown, and drawing it again.

Cells are not trained here (`test_sweep.py` does that): a stand-in writes the result that the cell's own keys determine.
"""

import json
import math
import shutil
from pathlib import Path

import pytest

from fdiv.cli import main
from fdiv.errors import FdivError, RecipeError
from fdiv.files import write_json
from fdiv.recipe.dump import resolved_yaml
from fdiv.recipe.load import read_sweep
from fdiv.report.table import markdown, short
from fdiv.run.cells import plan_sweep
from fdiv.run.sweep import collect, run_sweep

EXPERIMENT = """
extends: base.yaml
warmup_steps: 1

sweep:
  method:
    KL: {divergence: reverse_kl}
    JS: {divergence: jensen_shannon, beta: 0.3}
    other: {extends: other.yaml, seed: [0]}
  seed: [0, 1, 2]
  screen: {key: learning_rate, values: [1.0e-3, 1.0e-2], metric: train/best_metric}
  models: {reference: {model_name_or_path: elsewhere}}
  start: before
  table:
    score: {title: S, better: higher, format: .2f}
    train/best_metric: {title: epochs, format: each}
  plots:
    points.png: {x: score, y: cost, level: reference}
    path.svg: {kind: path, x: eval_a, y: eval_b}
"""


def result_of(plan, stage="after") -> dict:
    """score = 100·lr + seed² (+10 for JS); the best metric prefers 1e-2 for KL and 1e-3 for the others."""
    args = plan.configs.training
    js = args.divergence == "jensen_shannon"
    rate = args.learning_rate
    sign = 1 if args.divergence == "reverse_kl" else -1
    return {
        "recipe": plan.recipe.name, "method": "f_dpo", "divergence": args.divergence, "beta": args.beta,
        "seed": args.seed, "steps": 1, "unmet_requirements": [], "summary_metrics": ["score"], "notes": {},
        "before/score": -1.0 - args.seed, f"{stage}/score": 100 * rate + args.seed**2 + 10 * js,
        f"{stage}/cost": float(args.seed), "train/best_metric": sign * rate, "late/kept": 1 - 50 * rate,
        "train_seconds": 60.0, "wall_seconds": 120.0,
    }  # fmt: skip


@pytest.fixture
def runs(monkeypatch):
    """The names of the cells in the order they ran; a cell named in `fail` fails."""
    import fdiv.run.run

    ran: list[str] = []
    fail: set[str] = set()

    def stand_in(plan, command, prepared):
        ran.append(plan.output_dir.name)
        if plan.output_dir.name in fail:
            raise FdivError("out of\nmemory")
        plan.directory.open()
        plan.directory.write("recipe_resolved.yaml", resolved_yaml(plan.recipe))
        logs = [{"eval_a": 1.0, "eval_b": 0.5}, {"loss": 2.0}, {"eval_a": 0.5, "eval_b": 0.25}]
        plan.directory.write("metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in logs))
        write_json(plan.output_dir / "result.json", result_of(plan))
        (plan.output_dir / "error.txt").unlink(missing_ok=True)
        return result_of(plan)

    monkeypatch.setattr(fdiv.run.run, "run_plan", stand_in)
    monkeypatch.setattr(fdiv.run.run, "measure_plan", stand_in)
    stand_in.ran, stand_in.fail = ran, fail
    return stand_in


@pytest.fixture
def experiment(write_recipe, tmp_path):
    """Write `base.yaml`, `other.yaml` (an overlay of it) and an `experiment.yaml` in `study/`; its path."""

    def write(text: str = EXPERIMENT, **changes: str) -> str:
        folder = tmp_path / "study"
        folder.mkdir(exist_ok=True)
        write_recipe("sweep: {beta: [1.0, 2.0]}\n", learning_rate=None, seed=None, output_dir=None).rename(
            folder / "base.yaml"
        )
        (folder / "other.yaml").write_text("extends: base.yaml\ndivergence: forward_kl\nwarmup_steps: 5\n")
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        path = folder / "experiment.yaml"
        path.write_text("# A study.\n" + text)
        return str(path)

    return write


ROOT = ["--output_dir", "cells"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_row_lies_over_its_recipe_and_the_file_between(experiment, runs):
    plan = plan_sweep(experiment(), ROOT)
    first = {cell.row.label: plan.plan(cell) for cell in plan.cells()}
    assert plan.name == "study"
    kl, js, other = (first[name].configs.training for name in ("KL", "JS", "other"))
    assert (kl.divergence, js.divergence, other.divergence) == ("reverse_kl", "jensen_shannon", "forward_kl")
    assert (kl.beta, js.beta) == (0.1, 0.3)
    assert (kl.warmup_steps, other.warmup_steps) == (1, 1)  # the file's own key wins over the row's recipe
    assert "beta" not in plan.block.axes  # the base's own sweep is another design


def test_order_screening_choice_and_resumption(experiment, runs):
    plan = plan_sweep(experiment(), ROOT)
    assert run_sweep(plan, "fdiv sweep x") == []
    screens = [f"{row}_learning_rate-{rate}_seed-0" for row in ("KL", "JS") for rate in (0.001, 0.01)]
    seeds = [f"{row}_seed-{seed}" for seed in (1, 2) for row in ("KL_learning_rate-0.01", "JS_learning_rate-0.001")]
    other = [f"other_learning_rate-{rate}_seed-0" for rate in (0.001, 0.01)]
    # One seed of all rows before the next; the chosen screening run is the first seed's own; single seeds last.
    assert runs.ran == [*screens, *seeds, *other, "model-reference"]
    results = json.loads((Path("cells") / "results.json").read_text())
    chosen = {choice["settings"]["method"]: choice["value"] for choice in results["chosen"]}
    assert chosen == {"KL": 0.01, "JS": 0.001, "other": 0.001}
    assert results["chosen"][0]["scores"] == {"0.001": 0.001, "0.01": 0.01}
    stages = [cell["stage"] for cell in results["cells"]]
    assert stages.count("screen") == 3 and stages.count("run") == 7 and stages.count("model") == 1
    runs.ran.clear()
    (Path("cells") / "JS_learning_rate-0.001_seed-2" / "result.json").unlink()
    assert run_sweep(plan_sweep(experiment(), ROOT), "again") == []
    assert runs.ran == ["JS_learning_rate-0.001_seed-2"]


def test_table_start_models_and_errors_by_hand(experiment, runs):
    run_sweep(plan_sweep(experiment(), ROOT), "fdiv sweep x")
    lines = (Path("cells") / "table.md").read_text().splitlines()
    assert lines[0] == "| method | learning_rate | seeds | S ↑ | epochs |"
    # Starts: seeds 0, 1, 2 twice and 0 once: −1, −2, −3, −1, −2, −3, −1, mean −13/7.
    assert lines[2] == f"| before |  |  | {-13 / 7:.2f} | – |"
    assert lines[3].startswith("| reference |  |  | ")
    # KL at 1e-2: 1 + (0, 1, 4), mean 8/3, variance 13/3, s.e. sqrt(13/9).
    error = math.sqrt(13 / 9)
    assert lines[4] == f"| KL | 1e-2 | 3 | {8 / 3:.2f} ± {error:.2f} | 0.0100, 0.0100, 0.0100 |".replace(
        "1e-2", "0.01"
    )
    assert lines[5].startswith(f"| JS | 1e-3 | 3 | {10.1 + 5 / 3:.2f} ± {error:.2f} |")
    assert lines[6].startswith("| other | 1e-3 | 1 | 0.10 |")
    assert (Path("cells") / "points.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (Path("cells") / "path.svg").read_text()
    results = json.loads((Path("cells") / "results.json").read_text())
    assert results["cells"][0]["series"] == {"eval_a": [1.0, 0.5], "eval_b": [0.5, 0.25]}
    assert main(["report", "cells", "--output", "page.html"]) == 0
    page = Path("page.html").read_text()
    assert "S ↑" in page and f"{8 / 3:.2f} ± {error:.2f}" in page


def test_no_cell_starts_after_the_minutes(experiment, runs, capsys):
    plan = plan_sweep(experiment(), ROOT)
    run_sweep(plan, "x", minutes=0)
    assert runs.ran == []
    table = (Path("cells") / "table.md").read_text().splitlines()
    assert table[2:] == [f"| {row} | 0 | not run | not run |" for row in ("KL", "JS", "other")]
    assert "not run, the time was up: KL_learning_rate-0.001_seed-0" in capsys.readouterr().err
    run_sweep(plan, "x")
    results = json.loads((Path("cells") / "results.json").read_text())
    assert {cell["status"] for cell in results["cells"]} == {"finished"}


def test_a_failed_screening_run_is_no_candidate(experiment, runs):
    runs.fail.add("KL_learning_rate-0.01_seed-0")
    failures = run_sweep(plan_sweep(experiment(), ROOT), "x")
    assert len(failures) == 1 and "out of memory" in failures[0]
    results = json.loads((Path("cells") / "results.json").read_text())
    assert results["chosen"][0]["value"] == 0.001
    assert results["chosen"][0]["scores"] == {"0.001": 0.001, "0.01": None}
    runs.fail.clear()
    run_sweep(plan_sweep(experiment(), ROOT), "x")
    results = json.loads((Path("cells") / "results.json").read_text())
    assert results["chosen"][0]["value"] == 0.01  # run again, it wins


@pytest.mark.parametrize(
    ("least", "chosen"),
    [
        (0.4, {"KL": 0.01, "JS": 0.001}),  # both rates keep it (0.95 and 0.5): the metric decides
        (0.9, {"KL": 0.001, "JS": 0.001}),  # the better rate of KL does not
        (2.0, {"KL": 0.001, "JS": 0.001}),  # neither does: the one that keeps most
    ],
)
def test_a_candidate_keeps_what_is_asked_for(experiment, runs, capsys, least, chosen):
    asked = f"metric: train/best_metric, at_least: {{late/kept: {least}}}}}"
    plan = plan_sweep(experiment(EXPERIMENT.replace("metric: train/best_metric}", asked)), ROOT)
    run_sweep(plan, "x")
    assert {row.label: plan.choice(row).value for row in plan.rows if row.label in chosen} == chosen
    results = json.loads((Path("cells") / "results.json").read_text())
    assert results["screen"]["at_least"] == {"late/kept": least}
    assert [choice["at_least_reached"] for choice in results["chosen"]] == [least < 2] * 3
    said = (
        f"KL, learning_rate 0.001: no candidate reached screen.at_least (late/kept {least:g}); the nearest was chosen"
    )
    printed = capsys.readouterr()
    assert (said in printed.err) == (least == 2) and printed.err.count(said) <= 1
    assert ("no candidate reached" in printed.out) == (least == 2)


def test_what_is_to_be_kept_and_not_there_is_named(experiment, runs):
    asked = "metric: train/best_metric, at_least: {late/lost: 0.9}}"
    with pytest.raises(FdivError, match=r"screen\.at_least: 'late/lost' is not in .*late/kept"):
        run_sweep(plan_sweep(experiment(EXPERIMENT.replace("metric: train/best_metric}", asked)), ROOT), "x")

    assert runs.ran == ["KL_learning_rate-0.001_seed-0"]  # the first screening run shows it


def test_a_metric_that_a_log_does_not_have_ends_after_the_first_run(experiment, runs):
    """Also where every value is run with every seed, and nothing waits for the choice."""
    text = EXPERIMENT.replace("metric: train/best_metric}", "metric: late/lost, keep: all}")
    with pytest.raises(
        FdivError, match=r"screen\.metric: 'late/lost' is not in .*; correct the name and run the same"
    ):
        run_sweep(plan_sweep(experiment(text), ROOT), "x")
    assert runs.ran == ["KL_learning_rate-0.001_seed-0"]


def test_a_screened_metric_has_its_stage_as_in_the_table(experiment, runs):
    """`score` is `after/score`: 100·lr for KL's first seed, and 10 more for JS."""
    text = EXPERIMENT.replace("metric: train/best_metric}", "metric: score, better: lower, at_least: {score: 0.5}}")
    text = text.replace("    score: {title: S, better: higher, format: .2f}\n", "")
    text = text.replace("warmup_steps: 1", "warmup_steps: 1\neval: {name: preferences}")
    run_sweep(plan_sweep(experiment(text), ROOT), "x")
    chosen = json.loads((Path("cells") / "results.json").read_text())["chosen"]
    assert [(choice["value"], choice["at_least_reached"]) for choice in chosen] == [
        (0.01, True),
        (0.001, True),
        (0.01, True),
    ]
    assert chosen[0]["scores"] == {"0.001": pytest.approx(0.1), "0.01": pytest.approx(1.0)}


@pytest.mark.parametrize("key", ["metric", "at_least"])
def test_a_number_of_an_evaluation_is_checked_in_every_row(experiment, runs, key):
    """Before the first run: rows of a `method:` axis, each with its own evaluation."""
    wrong = {"metric": "after/reward_acuracy", "at_least": "train/best_metric, at_least: {after/reward_acuracy: 0.5}"}[
        key
    ]
    base = EXPERIMENT.replace("warmup_steps: 1", "warmup_steps: 1\neval: {name: preferences}")
    with pytest.raises(RecipeError, match=rf"`sweep\.screen\.{key}`: no metric 'reward_acuracy'.* 'reward_accuracy'"):
        plan_sweep(experiment(base.replace("metric: train/best_metric", f"metric: {wrong}")), ROOT)
    right = wrong.replace("reward_acuracy", "preferences_2_reward_accuracy")  # of a third evaluation of that name
    plan_sweep(experiment(base.replace("metric: train/best_metric", f"metric: {right}")), ROOT)


def test_a_number_of_an_evaluation_needs_one(experiment, runs):
    asked = "metric: train/best_metric, at_least: {reward_accuracy: 0.5}, settings: {eval: null}"
    text = EXPERIMENT.replace("warmup_steps: 1", "warmup_steps: 1\neval: {name: preferences}")
    with pytest.raises(
        RecipeError, match=r"'reward_accuracy' is a number of an evaluation, and the screening runs have"
    ):
        plan_sweep(experiment(text.replace("metric: train/best_metric", asked)), ROOT)


def test_a_bar_in_a_heading_stays_in_its_cell():
    assert markdown(["method", "KL(p||q)"], [["a|b", "1"]]) == (
        "| method | KL(p\\|\\|q) |\n|---|---|\n| a\\|b | 1 |\n"
    )


def test_one_row_decides_for_all(experiment, runs):
    text = EXPERIMENT.replace("metric: train/best_metric}", "metric: train/best_metric, better: lower, by: KL}")
    plan = plan_sweep(experiment(text), ROOT)
    run_sweep(plan, "x")
    assert [name for name in runs.ran if "0.01_" in name] == ["KL_learning_rate-0.01_seed-0"]
    assert {plan.choice(row).value for row in plan.rows} == {0.001}


def test_screening_apart_on_another_split(experiment, runs, tmp_path):
    screen = "metric: after/score, split: validation, settings: {max_steps: 9}}"
    text = EXPERIMENT.replace("warmup_steps: 1", "warmup_steps: 1\neval: {name: preferences}")
    path = experiment(text.replace("metric: train/best_metric}", screen))
    shutil.copyfile(tmp_path / "data" / "test.jsonl", tmp_path / "data" / "validation.jsonl")
    plan = plan_sweep(path, ROOT)
    cells = {cell.name: plan.plan(cell) for cell in plan.cells()}
    apart = cells["screen_KL_learning_rate-0.001_seed-0"].configs
    assert (apart.script.dataset_test_split, apart.training.max_steps) == ("validation", 9)
    run_sweep(plan, "x")
    assert "KL_learning_rate-0.01_seed-0" in runs.ran  # not the screening run, so it is run itself
    own = {cell.name: plan.plan(cell) for cell in plan.cells()}["KL_learning_rate-0.01_seed-0"].configs
    assert (own.script.dataset_test_split, own.training.max_steps) == ("test", 2)


def test_every_value_is_kept_and_the_chosen_one_marked(experiment, runs):
    text = EXPERIMENT.replace("metric: train/best_metric}", "metric: train/best_metric, keep: all}")
    run_sweep(plan_sweep(experiment(text), ROOT), "x")
    assert len(runs.ran) == 2 * (3 + 3 + 1) + 1
    rows = [line.split(" | ")[:2] for line in (Path("cells") / "table.md").read_text().splitlines()[4:]]
    assert rows == [
        ["| KL", "1e-3"], ["| KL", "0.01*"], ["| JS", "1e-3*"], ["| JS", "0.01"], ["| other", "1e-3*"], ["| other", "0.01"],
    ]  # fmt: skip


def test_collect_draws_again_and_leaves_the_numbers(experiment, runs):
    path = experiment()
    run_sweep(plan_sweep(path, ROOT), "x", results=Path("study"))
    assert not (Path("cells") / "results.json").exists()
    before = {name: (Path("study") / name).read_bytes() for name in ("results.json", "table.md", "points.png")}
    for name in ("table.md", "points.png"):
        (Path("study") / name).unlink()
    assert main(["sweep", path, "--collect"]) == 0
    assert {name: (Path("study") / name).read_bytes() for name in before} == before
    Path(path).write_text(Path(path).read_text().replace("title: S,", "title: T,"))
    assert collect(path).resolve() == Path("study").resolve()
    assert "| T ↑ |" in (Path("study") / "table.md").read_text()
    Path(path).write_text(Path(path).read_text().replace("    JS:", "    JSD:"))
    with pytest.raises(FdivError, match="has a row 'JS', and `sweep.method` of .* has not"):
        collect(path)


def test_dry_run_prints_cells_and_an_estimate(experiment, runs, capsys):
    path = experiment()
    assert main(["sweep", path, *ROOT, "--dry_run", "--minutes", "30"]) == 0
    printed = capsys.readouterr().out
    assert "7 cells in cells, 4 more after screening" in printed
    assert "11 cells to run; how long one takes is not known yet" in printed
    assert "no cell is started after 30 minutes" in printed
    assert runs.ran == []
    run_sweep(plan_sweep(path, ROOT), "x", results=Path("study"))
    capsys.readouterr()
    assert main(["sweep", path, "--output_dir", "elsewhere", "--dry_run"]) == 0
    assert (
        "11 cells to run, about 22.0 minutes at 120 s each (by study/results.json"
        in capsys.readouterr().out.replace(str(Path.cwd()) + "/", "")
    )


def test_methods_of_the_command_line(experiment, write_recipe, runs, capsys):
    assert main(["sweep", experiment(), *ROOT, "--methods", "JS", "--seeds", "5"]) == 0
    assert runs.ran[0] == "JS_learning_rate-0.001_seed-5" and not [name for name in runs.ran if name.startswith("KL")]
    with pytest.raises(RecipeError, match="--methods: no row 'JSS' in `sweep.method`; there are: KL, JS, other"):
        plan_sweep(experiment(), ROOT, methods=["JSS"])
    plan = plan_sweep(str(write_recipe()), ROOT, methods=["f_dpo"])
    assert [cell.name for cell in plan.cells()] == ["f_dpo"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("metric: train/best_metric}", "metrc: x}", "unknown key 'metrc' in `sweep.screen`; did you mean 'metric'?"),
        ("key: learning_rate, ", "", "`sweep.screen.key` is missing"),
        ("best_metric}", "best_metric, at_least: {after/score: 0.1}}", "'after/score' is reported in the table"),
        ("best_metric}", "best_metric, at_least: {score: 0.1}}", "'score' is reported in the table"),
        ("metric: train/best_metric}", "metric: when score>=1/cost}", "is read from a log for table and plots"),
        *(
            ("best_metric}", f"best_metric, at_least: {{late/kept: {value}}}}}", "of late/kept must be a number above 0, got")
            for value in ("0", "-0.5", "much", "null", "true", "[0.5]", "{a: 1}", ".nan", ".inf")
        ),
        ("key: learning_rate", "key: seed", "'seed' is an axis of the sweep; screen another key"),
        ("[1.0e-3, 1.0e-2]", "[]", "`sweep.screen.values` is empty"),
        ("metric: train/best_metric}", "metric: after/score}", "'after/score' is reported in the table, so choosing by it chooses on the test; give `split: validation`"),
        ("metric: train/best_metric}", "metric: train/best_metric, by: LK}", "`sweep.screen.by` must be a row (KL, JS, other), got 'LK'"),
        ("extends: other.yaml", "extends: othr.yaml", "unknown base of `extends` 'othr'"),
        ("beta: 0.3", "betta: 0.3", "line 9: unknown key 'betta'; did you mean 'beta'?"),
        ("seed: [0]}", "seed: 0}", "`seed` of one row must be a list of seeds, got 0"),
        ("better: higher, format: .2f", "better: up", "'better' must be higher or lower or zero"),
        ("format: .2f", "format: 2f", "`format` must be like .3f, .1e or .3g, or `each`, got '2f'"),
        ("points.png", "../points.png", "a plot is a file name such as curve.png"),
        ("kind: path, x: eval_a", "kind: path", "a plot of kind path needs `x`"),
        ("kind: path, x: eval_a, y: eval_b", "kind: curve, y: pass", "a curve needs `k`, and {k} in `y`"),
        ("  start: before", "  strat: before", "unknown key 'strat' in `sweep`; did you mean 'start'?"),
        ("  start: before", "  minutes: -1", "`sweep.minutes` must be a number from 0, got -1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(experiment, old, new, message):
    assert old in EXPERIMENT
    with pytest.raises(RecipeError) as error:
        plan_sweep(experiment(EXPERIMENT.replace(old, new)), ROOT)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_list_of_methods_is_an_axis(experiment):
    text = "extends: base.yaml\nsweep: {method: [f_dpo, npo], seed: [0]}\n"
    _, _, block = read_sweep(experiment(text))
    assert [(arm.label, dict(arm.keys)) for arm in block.arms] == [("f_dpo", {"method": "f_dpo"}), ("npo", {"method": "npo"})]  # fmt: skip


def test_short_settings():
    assert [short(value) for value in (3e-4, 1e-3, 0.01, 0.25, 1e5, 7, None, "x", {"name": "alpha", "alpha": 0.2})] == [
        "3e-4", "1e-3", "0.01", "0.25", "1e5", "7", "", "x", "alpha(alpha=0.2)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["tofu_forget10", "muse_novels", "dph_arithmetic", "dph_chinook", "d2o_hh", "f_dpo_tofu", "tofu_smollm2"]
)
def test_committed_tables_are_those_of_their_results(name, repository, tmp_path):
    """`--collect` on a copy gives the committed table; the aggregate in the file is that of its cells."""
    import shutil

    from fdiv.report.table import aggregate

    folder = shutil.copytree(repository / "results" / name, tmp_path / name)
    committed = (folder / "table.md").read_text()
    (folder / "table.md").unlink()
    collect(str(folder / "experiment.yaml"))
    assert (folder / "table.md").read_text() == committed
    results = json.loads((folder / "results.json").read_text())
    for group, again in zip(results["aggregate"], aggregate(results["cells"]), strict=True):
        assert group["label"] == again["label"] and group["n"] == again["n"]
        for metric, values in group["metrics"].items():
            for key, value in values.items():
                assert again["metrics"][metric][key] == (None if value is None else pytest.approx(value, rel=1e-12))
    assert not list((repository / "results").rglob("*.py"))
