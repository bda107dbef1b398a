"""A replay is the run that never had the rows, bit for bit: trainers, accumulation, adapters, several epochs."""

import json
from dataclasses import dataclass

import pytest

from fdiv.rows.digests import row_digest
from fdiv.run.batch_log import LOG, BatchLog, read_key
from tests.replay.conftest import (
    LORA,
    assert_same_run,
    begins_late,
    differs,
    forget_rows,
    retain_rows,
    weights_of,
    write_rows,
)
from tests.support.runs import d2o, f_distill
from tests.support.runs.f_dpo import preference_rows


def case(name, bench, teacher):
    """The bench, set to a recipe."""
    retain = write_rows(bench.folder / "retain.jsonl", retain_rows())
    unlearning = {"retain_dataset_name": str(retain), "max_length": 64}
    sampled = {"max_completion_length": 5, "num_generations": 2}
    distill = {"max_completion_length": 16, "teacher_model_name_or_path": str(teacher)}
    return {
        "f_dpo": lambda: bench.use("f_dpo", preference_rows(14)),
        "f_dpo, dropout": lambda: bench.use(
            "f_dpo", preference_rows(14), disable_dropout=False, **LORA, lora_dropout=0.3
        ),
        "npo, lora": lambda: bench.use("npo", forget_rows(), **unlearning, **LORA),
        "flat": lambda: bench.use("flat", forget_rows(), **unlearning, retain_term="nll", divergence="jensen_shannon"),
        "pdu": lambda: bench.use("pdu", forget_rows(), **unlearning, retain_epsilon=0.3, dual_warmup_epochs=0),
        "given completions": lambda: bench.use("f_distill", f_distill.rows(12), **distill, on_policy_share=0.0),
        "own completions": lambda: bench.use("f_distill", f_distill.rows(12), **distill, on_policy_share=0.5),
        "d2o, online": lambda: bench.use(
            "d2o", negatives(), **sampled, anchor_source="online", harmfulness_scorer=SCORER
        ),
        "d2o, given": lambda: bench.use("d2o", negatives(2), **sampled),
        "d2o, offline": lambda: bench.use("d2o", negatives(), **sampled, anchor_batch_size=3, refresh_every=2),
    }[name]()


NAMES = ("f_dpo", "f_dpo, dropout", "npo, lora", "flat", "pdu", "given completions", "own completions")
NAMES += ("d2o, online", "d2o, given", "d2o, offline")
SCORER = {"name": "contains_words", "words": ["no", "is"]}


def negatives(anchors=0):
    return list(d2o.negative_rows(12, anchors))


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_is_the_run_that_never_had_the_rows(name, bench, teacher, capsys):
    case(name, bench, teacher)
    run = bench.run("run", batch_log=True)
    gone = begins_late(run, bench.rows, 2)
    without = bench.without(*gone)
    capsys.readouterr()
    replayed = bench.replay(run, without)
    said = capsys.readouterr().err
    never = bench.run("never", exclude_rows=str(without), batch_log=True)
    assert_same_run(replayed, never)
    assert differs(replayed, run)
    # It went on from a checkpoint, and says what that saves.
    key, log = read_key(run), BatchLog.read(run / LOG)
    step = min(log.first_steps()[row_digest(row, key)] for row in gone)
    total = max(log.steps)
    assert 1 < step < total
    assert "2 of 2 rows found in the data" in said
    assert f"first held in step {step}; from checkpoint-{step - 1}: {step - 1} of {total} steps" in said
    assert f"{total - step + 1} are made without the rows" in said
    # The rows had been in several epochs; the logs of both runs hold empty places instead, and the same others.
    digests = {row_digest(row, key) for row in gone}
    held = [step for step, batches in log.steps.items() if any(digests & set(batch) for batch in batches)]
    assert len(held) >= 3
    replayed_log, never_log = BatchLog.read(replayed / LOG), BatchLog.read(never / LOG)
    assert not digests & replayed_log.first_steps().keys()
    shape = {step: [[digest is None for digest in batch] for batch in rows] for step, rows in never_log.steps.items()}
    assert shape == {s: [[d is None for d in batch] for batch in rows] for s, rows in replayed_log.steps.items()}
    assert {step for step in shape if any(any(batch) for batch in shape[step])} == set(held)
    # What is logged after the checkpoint is the same, but for times.
    assert _measured(replayed) == _measured(never)


def _measured(run):
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    times = ("runtime", "per_second", "step_time", "flos")
    return [{name: value for name, value in entry.items() if not name.endswith(times)} for entry in entries]


@pytest.mark.parametrize("name", ["f_dpo", "flat", "own completions", "d2o, online", "d2o, offline"])
def test_the_content_of_a_removed_row_changes_nothing(name, bench, teacher):
    case(name, bench, teacher)
    gone = bench.rows[3]
    never = bench.run("never", exclude_rows=str(bench.without(gone)))
    # Another row in its place, longer and of other words, and left out in turn.
    column = next(name for name in ("answer", "chosen", "completion", "rejected") if name in gone)
    other = {**gone, column: gone[column] + " and so on" * 4}
    if "prompt" in other:
        other["prompt"] = "Something else altogether?"
    rows = [other if row == gone else row for row in bench.rows]
    values = {key: value for key, value in bench.values.items() if key not in ("method", "dataset_name")}
    bench.use(bench.values["method"], rows, **values)
    again = bench.run("again", exclude_rows=str(bench.without(other)))
    assert_same_run(never, again)


def test_a_retain_row_is_left_out_with_the_forget_rows_it_meets(bench, teacher):
    case("flat", bench, teacher)
    run = bench.run("run", batch_log=True)
    gone = begins_late(run, [row for row in retain_rows() if _was_met(run, row)])
    without = bench.without(*gone)
    replayed = bench.replay(run, without)
    assert_same_run(replayed, bench.run("never", exclude_rows=str(without)))
    assert differs(replayed, run)


def _was_met(run, row):
    return row_digest(row, read_key(run)) in BatchLog.read(run / LOG).first_steps()


def test_a_replay_can_be_replayed_and_keeps_the_first_rows_out(bench, teacher):
    case("f_dpo", bench, teacher)
    run = bench.run("run", batch_log=True)
    second, first = begins_late(run, bench.rows, 2)
    once = bench.replay(run, bench.without(first), "once")
    # The removed row may have become another in the data by now: its place alone counts.
    rows = [{**row, "chosen": " removed"} if row == first else row for row in bench.rows]
    write_rows(bench.folder / "data.jsonl", rows)
    twice = bench.replay(once, bench.without(second), "twice")
    write_rows(bench.folder / "data.jsonl", bench.rows)
    never = bench.run("never", exclude_rows=str(bench.without(first, second)))
    assert_same_run(twice, never)
    assert differs(once, never)


def test_a_row_of_the_first_step_means_all_steps_again(bench, teacher, capsys):
    case("f_dpo", bench, teacher)
    run = bench.run("run", batch_log=True, save_strategy="no")
    log, key = BatchLog.read(run / LOG), read_key(run)
    gone = next(row for row in bench.rows if log.first_steps()[row_digest(row, key)] == 1)
    without = bench.without(gone)
    replayed = bench.replay(run, without)
    assert (
        "first held in step 1; there is no checkpoint before it, so all steps are made again"
        in capsys.readouterr().err
    )
    never = bench.run("never", exclude_rows=str(without), save_strategy="no")
    ours, theirs = weights_of(replayed), weights_of(never)
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_a_run_that_was_cut_and_went_on_is_replayed(bench, teacher):
    case("f_dpo", bench, teacher)
    whole = bench.run("whole", batch_log=True)
    cut = bench.run("cut", batch_log=True, max_steps=4)
    (cut / "result.json").unlink()  # as if it had been killed in step 5
    bench.run("cut", batch_log=True, resume_from_checkpoint=True)
    log = BatchLog.read(cut / LOG)
    assert [part["from_step"] for part in log.parts] == [0, 4]
    assert sorted(log.steps) == list(range(1, max(log.steps) + 1))
    key = read_key(cut)
    same = {row_digest(row, key): row_digest(row, read_key(whole)) for row in bench.rows}
    translated = {s: [[same[d] for d in batch] for batch in batches] for s, batches in log.steps.items()}
    assert translated == BatchLog.read(whole / LOG).steps


@dataclass
class Pairs:
    """A builder of data, for the recipe's `prepare:` step."""

    rows: int = 12

    def build(self, output_dir):
        write_rows(output_dir / "train.jsonl", preference_rows(self.rows))
        return {"dataset_name": str(output_dir)}


def test_data_that_the_run_built_are_found_again(bench):
    bench.use("f_dpo", preference_rows(12), prepare={"name": f"{__name__}:Pairs"})
    del bench.values["dataset_name"]
    run = bench.run("run", batch_log=True)
    without = bench.without(*begins_late(run, bench.rows))
    replayed = bench.replay(run, without)
    assert not (replayed / "prepared").exists()
    assert_same_run(replayed, bench.run("never", exclude_rows=str(without)))


def test_the_anchors_of_a_replay_are_those_of_the_kept_prompts(bench, teacher):
    """Each prompt has a random stream of its own, so the others' anchors are those of a run without the rows."""
    case("d2o, offline", bench, teacher)
    run = bench.run("run", batch_log=True)
    without = bench.without(*begins_late(run, bench.rows, 2))
    replayed = bench.replay(run, without)
    never = bench.run("never", exclude_rows=str(without))
    whole, ours, theirs = (
        {line["prompt"]: line["anchors"] for line in map(json.loads, lines[1:])}
        for lines in ((folder / "anchors.jsonl").read_text().splitlines() for folder in (run, replayed, never))
    )
    assert ours == theirs and len(ours) == 10 and len(whole) == 12
    assert ours == {prompt: whole[prompt] for prompt in ours}
