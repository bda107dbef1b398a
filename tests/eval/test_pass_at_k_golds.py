"""Golds of one's own rows, and `fdiv eval passk --check_golds`: every gold scores 1 against itself, no wrong answer does."""

import json

import pytest

from fdiv.cli import main
from fdiv.errors import DataError
from fdiv.eval.pass_at_k.data import load_tasks, tasks_of_rows
from fdiv.eval.pass_at_k.gold_check import check_golds
from fdiv.eval.pass_at_k.scoring import make_scorer
from tests.support.dated import asks_for_the_day


@pytest.mark.parametrize(
    ("answer", "gold"), [("two", "two"), (4, "4"), (4.0, "4"), (0.5, "0.5"), ("", ""), (-3, "-3")]
)
def test_golds_that_are_text_or_numbers(answer, gold):
    assert tasks_of_rows([{"prompt": "Q", "answer": answer}], "f")[0].answer == gold


@pytest.mark.parametrize("answer", [None, ["2", "two"], ["2"], {"x": 1}, True, float("nan"), []])
def test_golds_that_are_neither_are_refused_by_row(answer):
    rows = [{"prompt": "Q", "answer": "1"}, {"prompt": "Q", "answer": answer}]
    with pytest.raises(DataError, match=r"f, row 1 cannot be read as a task: answer is .*give text or a number"):
        tasks_of_rows(rows, "f")


def check(loaded, **options):
    scorer = make_scorer(loaded.scorer, databases=loaded.databases, **options)
    try:
        return check_golds(loaded, scorer)
    finally:
        scorer.close()


def clean(found, tasks, may_be_unscored=()):
    """No fault; but a gold that may have no rows on some days may be unscored, which it says, and never wrong."""
    assert [fault for fault in found.faults if fault[2] is not None or fault[0] not in may_be_unscored] == []
    assert found.tasks == tasks
    unscored = len({task for task, *_ in found.faults})
    assert len(found.right) >= 5 and all(right == number - unscored > 0 for right, number in found.right.values())
    assert len(found.wrong) >= 3 and all(right == 0 for right, _ in found.wrong.values())


@pytest.mark.parametrize(
    ("name", "folder", "tasks"),
    [
        ("aime24", "math_eval_sets", 30), ("aime25", "math_eval_sets", 30), ("amc23", "math_eval_sets", 40),
        ("olympiadbench", "math_eval_sets", 675), ("svamp", "math_eval_sets", 1000), ("gsm8k", "gsm8k", 1319),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_every_gold_of_mathematics(shared_data, name, folder, tasks):
    clean(check(load_tasks(name, str(shared_data / "data" / folder))), tasks)


def test_every_gold_of_amc(shared_data):
    clean(check(load_tasks("amc23", str(shared_data / "data" / "math_eval_sets"))), 40)


@pytest.mark.slow
def test_every_gold_of_sql_defog(shared_data):
    loaded = load_tasks("sql_defog", str(shared_data / "data" / "sql_defog"))
    dated = {task.task_id for task in loaded.tasks if asks_for_the_day(task.answer)}
    assert len(dated) == 37
    found = check(loaded)
    clean(found, 314, dated)
    assert len({task for task, *_ in found.faults}) < len(dated)


@pytest.mark.slow
def test_every_program_of_humaneval(shared_data):
    loaded = load_tasks("humaneval", str(shared_data / "data" / "humaneval"))
    clean(check(loaded, allow_code_execution=True), 164)


def test_the_command(tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    rows = [
        {"prompt": "Q", "answer": "1/2"},
        {"prompt": "Q", "answer": "the one in the middle"},
        {"prompt": "Q", "answer": "N/A"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "golds.json"
    command = ["eval", "passk", "--check_golds", "--dataset", str(path), "--scorer", "math", "--output", str(out)]
    assert main(command) == 1
    found = json.loads(out.read_text())
    assert found["tasks"] == 3
    assert {fault["task_id"] for fault in found["faults"]} == {"2"}  # a missing gold is not scored
    assert {fault["score"] for fault in found["faults"]} == {None}
    assert "task 2, boxed: not scored" in " ".join(capsys.readouterr().out.split())
    path.write_text(json.dumps(rows[0]) + "\n")
    assert main(command) == 0
    capsys.readouterr()
    for options, message in {
        ("--check_golds",): "--check_golds needs --dataset",
        (*command[2:], "--model", "m"): "--model does not go with --check_golds",
        ("--model", "m", "--dataset", str(path)): "--output is missing",
    }.items():
        assert main(["eval", "passk", *options]) == 1
        assert message in " ".join(capsys.readouterr().err.split())
