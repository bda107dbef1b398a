"""`fdiv eval passk --from_samples`, the benchmarks' readers, and parity with recorded samples."""

from __future__ import annotations

import json
import sys

import pytest

from fdiv.cli import main
from fdiv.errors import DataError
from fdiv.eval.pass_at_k.aggregate import compare_with_base, parse_k, summarise
from fdiv.eval.pass_at_k.data import load_tasks
from fdiv.eval.pass_at_k.evaluation import PassKEvalConfig
from fdiv.eval.pass_at_k.records import read_counts
from fdiv.eval.pass_at_k.scoring import make_scorer, math_answer, score_completions
from tests.support.dated import asks_for_the_day


def _file(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def _samples(**tasks):
    return [{"task_id": task, "correct": value} for task, values in tasks.items() for value in values]


def test_command_on_samples_and_on_counts(tmp_path):
    per_sample = _file(tmp_path / "s.jsonl", *_samples(a=[True, False, False, False], b=[False] * 3, c=[True] * 5))
    per_task = _file(
        tmp_path / "t.jsonl",
        *({"task_id": t, "num_samples": n, "num_correct": c} for t, n, c in (("a", 4, 1), ("b", 3, 0), ("c", 5, 5))),
    )
    results = []
    for file in (per_sample, per_task):
        out = tmp_path / f"{file.stem}.json"
        assert main(["eval", "passk", "--from_samples", str(file), "--k", "1,2", "--output", str(out)]) == 0
        results.append(json.loads(out.read_text()))
    for result in results:
        assert result["pass@1"]["value"] == pytest.approx((0.25 + 0 + 1) / 3)
        assert result["pass@2"]["value"] == pytest.approx((0.5 + 0 + 1) / 3)
        assert result["pass^2"]["value"] == pytest.approx(1 / 3)
        assert result["pass@2"]["se"] == pytest.approx(0.2357, rel=0.1)  # std(0.5, 0, 1)/√3
        assert result["samples_per_task"] == {"min": 3, "max": 5}
    assert results[0]["pass@2"] == results[1]["pass@2"]


def test_too_few_samples_name_the_task(tmp_path, capsys):
    file = _file(tmp_path / "s.jsonl", *_samples(a=[True] * 10, short=[False] * 3))
    assert (
        main(["eval", "passk", "--from_samples", str(file), "--k", "1,10", "--output", str(tmp_path / "o.json")]) == 1
    )
    message = capsys.readouterr().err
    assert "'short' has 3" in message and "lower k" in message and not (tmp_path / "o.json").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        (["nonsense"], "line 1 is no JSON"),
        (["[1]"], "holds list, not an object"),
        ([{"task_id": "a", "correct": 1}], "line 1: correct is 1: write true or false"),
        ([{"task_id": "a", "passed": True}], "no 'correct'; it has passed, task_id; did you mean 'passed'"),
        ([{"correct": True}], "no 'task_id'"),
        ([{"task_id": None, "correct": True}], "task_id is None"),
        ([{"task_id": "a", "num_samples": 2, "num_corect": 1}], "num_corect"),
        ([{"task_id": "a", "num_samples": 2, "num_correct": 3}], "3 correct of 2"),
        ([{"task_id": "a", "num_samples": 2.0, "num_correct": 1}], "num_samples is 2.0"),
        ([{"task_id": "a", "num_samples": 2, "num_correct": 1}] * 2, "line 2: task 'a' stands in the file twice"),
        ([{"task_id": "a", "correct": True}, {"task_id": "b", "num_samples": 2, "num_correct": 1}], "line 2: mixes"),
        ([{"task_id": "b", "num_samples": 2, "num_correct": 1}, {"task_id": "a", "correct": True}], "line 2"),
        ([{"task_id": "a", "sample": 0, "correct": True}] * 2, "sample 0 of task 'a' stands in the file twice"),
        ([{"task_id": "a", "correct": True, "answer": 3}], "answer is 3"),
    ],
)
def test_bad_files(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_counts(_file(tmp_path / "s.jsonl", *rows))


def test_unscored_samples_are_counted_and_treated_as_asked(tmp_path):
    file = _file(tmp_path / "s.jsonl", *_samples(a=[True, None, False, False], b=[False, True, True, True]))
    reduced, wrong, left = (read_counts(file, mode) for mode in ("reduce", "wrong", "leave_out"))
    assert reduced.num_samples.tolist() == [3, 4] and reduced.num_correct.tolist() == [1, 3]
    assert wrong.num_samples.tolist() == [4, 4] and wrong.num_correct.tolist() == [1, 3]
    assert left.task_ids == ["b"] and left.left_out == ["a"]
    assert all(counts.unscored == {"a": 1} for counts in (reduced, wrong, left))
    with pytest.raises(DataError, match=r"task 'a' has 3 \(1 more could not be scored\)"):
        summarise(reduced, [4], source="s")
    assert summarise(wrong, [4], source="s")["pass@4"]["value"] == 1.0


def test_base_must_hold_the_same_tasks(tmp_path):
    own = read_counts(_file(tmp_path / "a.jsonl", *_samples(a=[True], b=[False])))
    base = read_counts(_file(tmp_path / "b.jsonl", *_samples(b=[True], a=[True])))
    rates = compare_with_base(own, base, [1], source="own", base_source="base")
    assert rates["keep_rate@1"]["value"] == 0.5 and rates["explore_rate@1"]["value"] is None
    other = read_counts(_file(tmp_path / "c.jsonl", *_samples(a=[True])))
    with pytest.raises(DataError, match=r"task 'b' .* is not in base"):
        compare_with_base(own, other, [1], source="own", base_source="base")


@pytest.mark.parametrize("text", ["1,x", "0", "", "1.5"])
def test_bad_k(text):
    with pytest.raises(DataError):
        parse_k(text)


def test_boxed_answers():
    """The vote is on what the scorer reads: parts of one answer together, other forms of one number alike."""
    assert (
        math_answer(r"so \boxed{1} and \boxed{\frac12}") == math_answer(r"\boxed{1,\frac{1}{2}}") == r"1,\frac{1}{2}"
    )
    assert math_answer("so\n#### 1,234 ") == math_answer(r"\boxed{1{,}234}") == math_answer("It is $1234$.") == "1234"
    assert (
        math_answer(r"\boxed{1") is None and math_answer("no number") is None and math_answer(r"\boxed{N/A}") is None
    )
    assert math_answer(r"<think>\boxed{1}</think> \boxed{2}") == "2" and math_answer(r"<think>\boxed{1}") is None
    assert math_answer(r"\boxed{1}</think> \boxed{2}", opened=True) == "2" and math_answer("7", opened=True) is None
    assert math_answer(r"\boxed{" + r"\frac" * 900 + "}") is not None  # nested too deeply to be rewritten


def test_recorded_qwen_samples(shared_data):
    """100 problems × 8 samples with recorded scores: pass@1 is their mean, pass@8 the share of problems ever solved."""
    path = shared_data / "data" / "passk_artifacts" / "qwen_math_cot_100.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    from fdiv.eval.pass_at_k.records import counts_of_samples

    samples = [
        {"task_id": row["idx"], "correct": score, "answer": answer or None}
        for row in rows
        for score, answer in zip(row["score"], row["pred"], strict=True)
    ]
    counts = counts_of_samples(samples, "reduce", str(path))
    found = summarise(counts, [1, 8], source=str(path))
    assert len(counts.task_ids) == 100 and set(counts.num_samples) == {8}
    assert found["pass@1"]["value"] == pytest.approx(sum(sum(row["score"]) for row in rows) / 800, abs=1e-12)
    assert found["pass@8"]["value"] == pytest.approx(sum(any(row["score"]) for row in rows) / 100, abs=1e-12)
    assert found["pass^8"]["value"] == pytest.approx(sum(all(row["score"]) for row in rows) / 100, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "folder", "tasks", "gold"),
    [
        ("gsm8k", "gsm8k", 1319, "18"),
        ("aime24", "math_eval_sets", 30, "204"),
        ("aime25", "math_eval_sets", 30, "70"),
        ("amc23", "math_eval_sets", 40, "27"),
        ("olympiadbench", "math_eval_sets", 675, "2"),
        ("svamp", "math_eval_sets", 1000, "145"),
        ("humaneval", "humaneval", 164, None),
        ("sql_defog", "sql_defog", 314, None),
    ],
)
def test_benchmarks_from_local_files(shared_data, name, folder, tasks, gold):
    loaded = load_tasks(name, str(shared_data / "data" / folder))
    assert len(loaded.tasks) == tasks
    assert gold is None or loaded.tasks[0].answer == gold


def test_unknown_dataset_lists_the_names(tmp_path):
    with pytest.raises(DataError, match=r"gsm8k, math500, .* nor an existing file"):
        load_tasks("gsm9k")
    with pytest.raises(DataError, match="needs one of aime24/test.jsonl"):
        load_tasks("aime24", str(tmp_path))
    with pytest.raises(DataError, match="line 1: no column 'answer'; it has gold, prompt"):
        load_tasks(str(_file(tmp_path / "t.jsonl", {"prompt": "a", "gold": "b"})))


def test_code_needs_permission():
    with pytest.raises(DataError, match="--allow_code_execution"):
        make_scorer("code")
    for options in ({"sandbox": "none"}, {"numpy": True}):
        with pytest.raises(DataError, match=f"{next(iter(options))} goes with the scorer 'code', not with 'math'"):
            make_scorer("math", **options)


def test_sandbox_and_numpy_reach_the_reward(tmp_path, monkeypatch):
    """From the command line and from the keys of a recipe; without them, bubblewrap and the standard library."""
    asked = []

    def build(spec, where):
        asked.append((spec["name"], spec["sandbox"], spec["numpy"]))
        return lambda prompts, completions, **columns: [None] * len(completions)

    monkeypatch.setattr(sys.modules["fdiv.eval.pass_at_k.scoring"], "build_reward", build)
    path = str(_file(tmp_path / "t.jsonl", {"prompt": "Write f.", "answer": "f = abs", "test": "assert f(-1) == 1"}))
    command = ["eval", "passk", "--check_golds", "--dataset", path, "--scorer", "code", "--allow_code_execution"]
    for more in ((), ("--sandbox", "none"), ("--numpy",)):
        assert main([*command, *more]) == 1
    keys = {"sandbox": "none", "numpy": True, "allow_code_execution": True}
    config = PassKEvalConfig(dataset=path, scorer="code", k=[1], n=1, **keys)
    config.make_scorer(config.load())
    expected = [("bubblewrap", False), ("none", False), ("bubblewrap", True), ("none", True)]
    assert asked == [("code", *options) for options in expected]
    with pytest.raises(ValueError, match="sandbox='docker': choose bubblewrap or none"):
        PassKEvalConfig(sandbox="docker")


@pytest.mark.slow
def test_sql_gold_queries_score_one(shared_data):
    loaded = load_tasks("sql_defog", str(shared_data / "data" / "sql_defog"))
    scorer = make_scorer("sql", databases=loaded.databases)
    try:
        golds = {t.task_id: (t, t.answer.split(";")[0]) for t in loaded.tasks}
        scores = score_completions(scorer, golds, progress=False)
    finally:
        scorer.close()
    others = {key: row["correct"] for key, row in scores.items() if row["correct"] is not True}
    # A gold that asks for the day may have no rows today: it is not scored, and never wrong.
    assert all(correct is None and asks_for_the_day(golds[key][0].answer) for key, correct in others.items()), others


def test_a_file_has_a_validation_half_and_a_test_half(tmp_path):
    from fdiv.errors import DataError
    from fdiv.eval.pass_at_k.evaluation import PassKEvalConfig

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "p{i}", "answer": "{i}"}}\n' for i in range(10)), encoding="utf-8")

    def prompts(**cut):
        return [task.prompt for task in PassKEvalConfig(dataset=str(rows), n=1, k=[1], **cut).load().tasks]

    assert prompts(max_tasks=4) + prompts(skip_tasks=4) == prompts() == [f"p{i}" for i in range(10)]
    assert prompts(skip_tasks=4, max_tasks=3) == ["p4", "p5", "p6"]
    with pytest.raises(DataError, match="skip_tasks=10 leaves no task: .* has 10 of them"):
        prompts(skip_tasks=10)
    with pytest.raises(ValueError, match="skip_tasks=-1: must be at least 0"):
        prompts(skip_tasks=-1)
