"""Where a replay would not be exact it says why, and trains nothing. And what a batch log tells."""

import json
import os
import shutil
import stat
from fnmatch import fnmatch

import pytest
import yaml

from fdiv.cli import main
from fdiv.run.batch_log import EXCLUDED, KEY, LOG, BatchLog, changes, read_key
from fdiv.sealed import forget_listed, sealed_line
from tests.replay.conftest import Bench, begins_late, write_rows
from tests.support.runs.d2o import negative_rows
from tests.support.runs.f_dpo import preference_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory, start_model):
    """A finished run with a batch log, and a row that it met late."""
    bench = Bench(tmp_path_factory.mktemp("made"), start_model).use("f_dpo", preference_rows(12))
    run = bench.run("run", batch_log=True, num_train_epochs=2)
    return bench, run, begins_late(run, bench.rows)[0]


@pytest.fixture
def copied(made, tmp_path):
    """A copy of that run, to be damaged; the rows to leave out."""
    _, run, row = made
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run", write_rows(tmp_path / "without.jsonl", [row])


def change_log(run, **made_with):
    """Write the log again as another machine would have."""
    lines = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
    for line in lines:
        del line["digest"]
        if "part" in line:
            line["made_with"] |= made_with
    forget_listed(run / LOG)
    (run / LOG).write_text("".join(map(sealed_line, lines)))


def change_recipe(run, **keys):
    """Write the resolved recipe again with other keys."""
    path = run / "recipe_resolved.yaml"
    values = yaml.safe_load(path.read_text()) | keys
    forget_listed(path)
    path.write_text(yaml.safe_dump(values))


def test_a_folder_in_use_is_said_with_the_options_of_the_command(made, copied, refused, tmp_path):
    run, without = copied
    line = refused("replay", run, "--without", without, "--output", run)
    assert line == f"fdiv: {run} holds a finished run, which is left alone; choose another --output"
    other = tmp_path / "other"  # a replay that was killed
    shutil.copytree(run, other)
    (other / "result.json").unlink()
    everything = write_rows(tmp_path / "everything.jsonl", made[0].rows)
    line = refused("replay", run, "--without", everything, "--output", other)
    assert line == (f"fdiv: {other} holds checkpoints of an unfinished run; remove it, or choose another --output")
    for checkpoint in other.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    line = refused("replay", run, "--without", everything, "--output", other)
    assert line.endswith("not finished; remove it, or choose another --output")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"device": "NVIDIA H200"}, "it was trained on NVIDIA H200"),
        ({"processes": 2}, "several processes made it"),
        ({"code": "0" * 24}, "code is .* and was 000000000000000000000000; check out the code of that run"),
        ({"threads": 93}, "threads is .* and was 93; set OMP_NUM_THREADS to that"),
        ({"processor": "abacus"}, "processor is .* and was abacus"),
        ({"versions": {}}, "torch is .* and was None"),
    ],
)
def test_another_machine_or_code_is_refused(copied, refused, changed, said, tmp_path):
    import re

    run, without = copied
    change_log(run, **changed)
    line = refused("replay", run, "--without", without, "--output", tmp_path / "out")
    assert line.startswith(f"fdiv: cannot replay {run} exactly: ")
    assert re.search(said, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ignore_data_skip": True}, "ignore_data_skip: true resumes with other batches"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: true"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length orders the rows by the lengths of all"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs: true scores the rows in batches"),
        ({"learning_rate": 0.5}, "written under other settings: learning_rate is 0.5 and was 0.01"),
        ({"per_device_train_batch_size": 4}, "was written by another run: per_device_train_batch_size is 4 and was 2"),
    ],
)
def test_options_that_are_not_exact_or_not_the_runs_are_refused(copied, refused, changed, said, tmp_path):
    run, without = copied
    change_recipe(run, **changed)
    assert said in refused("replay", run, "--without", without, "--output", tmp_path / "out")


def test_a_teacher_behind_a_server_is_refused():
    """By its options alone: no server is asked."""
    from types import SimpleNamespace

    from fdiv.distillation import FDistillTrainer
    from fdiv.run.replay import _option_reasons

    def reasons(**options):
        recipe = SimpleNamespace(method=FDistillTrainer)
        return _option_reasons(
            SimpleNamespace(recipe=recipe, configs=SimpleNamespace(training=SimpleNamespace(**options)))
        )

    assert reasons() == reasons(teacher="ema") == []
    assert reasons(teacher={"name": "server", "url": "http://localhost:1"}) == [
        "its teacher answered from a server, which need not say the same again"
    ]
    assert "an inference server sampled" in reasons(rollout_server_url="http://localhost:1")[0]


def test_anchors_that_were_sampled_together_are_refused(bench, refused):
    """With the removed prompts in the batches that all were sampled in, the kept steps would not be those without."""
    bench.use("d2o", list(negative_rows(12)), num_generations=2, max_completion_length=4, max_steps=2)
    run = bench.run("run", batch_log=True)
    without = bench.without(bench.rows[0])
    line = refused("replay", run, "--without", without)
    assert "its offline anchors were sampled 32 prompts at a time (anchor_batch_size=64)" in line
    assert "anchor_batch_size of at most 3, with a column `anchors`, or with anchor_source: online" in line
    bench.run("never", exclude_rows=str(without))  # the run itself can be made
    lines = (bench.folder / "never" / "anchors.jsonl").read_text().splitlines()
    assert len(lines) - 1 == 11


def test_a_recipe_or_log_that_was_edited_is_refused(copied, refused):
    run, without = copied
    with (run / LOG).open("a") as file:
        file.write(sealed_line({"step": 99, "batches": []}))
    assert f"{run / LOG}: " in refused("replay", run, "--without", without)
    forget_listed(run / LOG)
    assert "step 7 is missing" in refused("replay", run, "--without", without)
    (run / "recipe_resolved.yaml").write_text("method: f_dpo\n")
    assert "recipe_resolved.yaml: " in refused("replay", run, "--without", without)


def test_other_data_are_refused(made, copied, refused):
    bench, _, _ = made
    run, without = copied
    try:
        write_rows(bench.folder / "data.jsonl", [*bench.rows[1:], bench.rows[0]])
        assert "the train rows are not those of the run any more" in refused("replay", run, "--without", without)
        write_rows(bench.folder / "data.jsonl", [{**row, "chosen": row["chosen"] + " "} for row in bench.rows])
        assert "the train rows are not those of the run any more" in refused("replay", run, "--without", without)
    finally:
        write_rows(bench.folder / "data.jsonl", bench.rows)


def test_another_start_model_is_refused(made, copied, refused, tmp_path):
    from fdiv.models.tiny import build_tiny_model

    run, without = copied
    change_recipe(run, model_name_or_path=str(build_tiny_model(tmp_path / "other", seed=9)))
    line = refused("replay", run, "--without", without, "--output", tmp_path / "out")
    assert "the start model is not the one that it began with; restore it" in line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (LOG, "the run was made without batch_log: true, so no step is known"),
        (KEY, "the key of its batch log"),
        ("result.json", "is not finished: go on with --resume_from_checkpoint true"),
        ("recipe_resolved.yaml", "is no run of fdiv"),
    ],
)
def test_a_run_without_its_records_is_refused(copied, refused, name, said):
    run, without = copied
    (run / name).unlink()
    assert said in refused("replay", run, "--without", without)


def test_a_damaged_key_is_named(copied, refused):
    run, without = copied
    (run / KEY).write_text("abc\n")
    assert f"{run / KEY} is damaged: a key has 64 hex digits" in refused("replay", run, "--without", without)


def test_rows_that_are_not_there_are_named_and_counted(made, copied, refused, tmp_path, capsys):
    _, _, row = made
    run, _ = copied
    none = write_rows(tmp_path / "none.jsonl", [{**row, "prompt": row["prompt"].lower()}])
    assert "none of the 1 rows of" in refused("replay", run, "--without", none)
    some = write_rows(tmp_path / "some.jsonl", [{**row, "prompt": str(n)} for n in range(5)] + [row])
    assert main(["replay", str(run), "--without", str(some), "--output", str(tmp_path / "out"), "--dry_run"]) == 0
    said = capsys.readouterr().err
    places = ", ".join(f"{some}, line {n}" for n in (1, 2, 3))
    assert f"1 of 6 rows found in the data; not found: {places} and 2 more" in said
    assert not (tmp_path / "out").exists()
    assert f"no such file of rows: {tmp_path / 'x.jsonl'}" in refused("replay", run, "--without", tmp_path / "x.jsonl")


def test_a_checkpoint_that_is_damaged_is_passed_over_with_its_name(made, copied, tmp_path, capsys):
    run, without = copied
    main(["replay", str(run), "--without", str(without), "--output", str(tmp_path / "out"), "--dry_run"])
    said = capsys.readouterr().err
    step = int(said.partition("from checkpoint-")[2].partition(":")[0])
    (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
    main(["replay", str(run), "--without", str(without), "--output", str(tmp_path / "out"), "--dry_run"])
    said = capsys.readouterr().err
    assert f"checkpoint-{step} cannot be used: optimizer.pt is missing" in said
    assert f"from checkpoint-{step - 1}: {step - 1} of 6 steps" in said


def test_rows_that_no_step_held_need_no_replay(bench, capsys):
    bench.use("f_dpo", preference_rows(12), max_steps=1)
    run = bench.run("run", batch_log=True)
    log, key = BatchLog.read(run / LOG), read_key(run)
    from fdiv.rows.digests import row_digest

    row = next(row for row in bench.rows if row_digest(row, key) not in log.first_steps())
    replayed = bench.replay(run, bench.without(row))
    assert "its weights are those of a run without" in capsys.readouterr().err
    assert not replayed.exists()


@pytest.mark.parametrize(
    "keys",
    [
        {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_steps": 1, "eval_steps": 1},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "eval_loss", "eval_steps": 1},
    ],
)
def test_a_choice_that_followed_an_evaluation_on_the_rows_is_refused(bench, refused, keys, capsys):
    rows = preference_rows(12)
    bench.use("f_dpo", rows[:8], max_steps=3, eval_strategy="steps", **keys)
    data = bench.folder / "data"
    write_rows(data / "train.jsonl", rows[:8])
    write_rows(data / "test.jsonl", rows[6:])
    run = bench.run("run", batch_log=True, dataset_name=str(data))
    line = refused("replay", run, "--without", bench.without(rows[7]))
    assert "followed an evaluation on the rows" in line
    # Of a row that was not evaluated on, the choice says nothing.
    line = bench.replay(run, bench.without(rows[1]), "out", "--dry_run")
    assert "first held in step" in capsys.readouterr().err


# ---------------------------------------------------------------- exclude_rows
def test_methods_that_cannot_leave_places_empty_say_so_in_a_dry_run(bench, refused):
    def fails(*words):
        return refused(*words, code=2)

    rows = [{"prompt": "a"}]
    why = "DPHTrainer cannot leave the place of a row empty: the completions of a generation are shuffled into"
    bench.use("dph", rows, num_generations=2)
    path = bench.recipe("dph", exclude_rows=str(bench.without(*rows)))
    assert f"exclude_rows: {why}" in fails("run", path, "--dry_run")
    bench.use("f_dpo", preference_rows(4), precompute_ref_log_probs=True)
    path = bench.recipe("f_dpo", exclude_rows=str(bench.without(bench.rows[0])))
    assert "line 3: exclude_rows: precompute_ref_log_probs: true" in fails("run", path, "--dry_run")
    bench.use("f_dpo", preference_rows(4))
    assert "exclude_rows: no such file: x.jsonl" in fails(
        "run", bench.recipe("x", exclude_rows="x.jsonl"), "--dry_run"
    )


def test_evaluations_do_not_see_the_rows(bench, monkeypatch):
    from fdiv import catalog
    from tests.cli.test_run import WeightEval

    monkeypatch.setitem(catalog.EVALUATIONS, "weights", f"{WeightEval.__module__}:WeightEval")
    bench.use("f_dpo", preference_rows(6), max_steps=1, eval={"name": "weights"})
    run = bench.run("run", exclude_rows=str(bench.without(*bench.rows[:2])))
    assert json.loads((run / "eval_before.json").read_text())["metrics"]["rows"] == 4.0


# ---------------------------------------------------------------- what the log tells
def test_the_log_holds_no_text_and_its_key_is_the_owners(made):
    _, run, row = made
    text = (run / LOG).read_text()
    assert row["chosen"].strip() not in text
    assert not any(word in text for word in row["prompt"].split() if len(word) > 3)
    assert stat.S_IMODE(os.stat(run / KEY).st_mode) == 0o600
    assert (run / KEY).read_text().strip() not in text
    # What TRL's upload to the hub leaves out.
    assert all(fnmatch(name, "_*") for name in (KEY, EXCLUDED))


def test_a_run_without_the_keys_writes_none_of_it(bench):
    bench.use("f_dpo", preference_rows(4), max_steps=1)
    run = bench.run("run")
    assert not any((run / name).exists() for name in (LOG, KEY, EXCLUDED))
    again = bench.run("run", overwrite_output_dir=True, batch_log=True)
    assert (again / LOG).is_file()
    bench.run("run", overwrite_output_dir=True)
    assert not any((run / name).exists() for name in (LOG, KEY))


def test_a_log_that_begins_late_says_so(bench, refused):
    bench.use("f_dpo", preference_rows(12), max_steps=4)
    run = bench.run("run", max_steps=2)
    (run / "result.json").unlink()
    bench.run("run", resume_from_checkpoint=True, batch_log=True)
    line = refused("replay", run, "--without", bench.without(bench.rows[0]))
    assert "it begins at step 2: the first part of the run was made without batch_log" in line


def test_changes_name_packages_and_remedies():
    before = {"versions": {"torch": "1", "trl": "2"}, "threads": 1, "device": "cpu"}
    now = {"versions": {"torch": "1", "trl": "3"}, "threads": 2, "device": "cpu"}
    assert changes(before, before) == []
    assert changes(before, now) == ["threads is 2 and was 1; set OMP_NUM_THREADS to that", "trl is 3 and was 2"]
