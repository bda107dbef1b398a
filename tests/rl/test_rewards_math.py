"""MathReward: equality by math-verify, golds that cannot be read, hanging answers, and recorded verifier rewards."""

import json
import logging
import sys
from collections import Counter
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from fdiv.errors import DataError
from fdiv.rl.rewards import MathReward, Outcome, RewardError
from fdiv.rl.rewards.math.reward import gold_text

HANGING = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def reward():
    reward = MathReward(workers=2, time_limit=30.0, failure_limit=None)
    yield reward
    reward.close()


def score(reward, completion, gold):
    return reward(["?"], [completion], solution=[gold])[0]


@pytest.mark.parametrize(
    ("gold", "completion", "expected"),
    [
        ("4", r"so it is \boxed{4}.", 1.0),
        ("4", r"\boxed{2^2}", 1.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        ("x+1", r"\boxed{1+x}", 1.0),
        ("x+1", r"\boxed{1}", 0.0),  # math-verify alone reads a bare x+1 as 1
        ("12,000", r"\boxed{12000}", 1.0),
        ("5", r"\boxed{x = 5}", 1.0),
        ("x = 5", r"\boxed{5}", 1.0),
        ("1, 2, 3", r"\boxed{3,2,1}", 1.0),
        (r"We add up. \boxed{18}", r"The final answer is $18$.", 1.0),
        ("She sells 9 * 2 = <<9*2=18>>18.\n#### 18", r"\boxed{18}", 1.0),
        ("C", r"\boxed{\text{C}}", 1.0),
        ("4", r"\boxed{5}", 0.0),
        ("4", r"\boxed{1,2,3,4}", 0.0),  # naming every candidate
        ("4", r"\boxed{4} and \boxed{2}", 0.0),
        ("4", "4", 0.0),  # not boxed
        ("4", "", 0.0),
        ("4", r"then \boxed{4", 0.0),  # cut off
    ],
)
def test_scores(reward, gold, completion, expected):
    assert score(reward, completion, gold) == expected


def test_answers_any_reads_plain_numbers():
    with MathReward(answers="any", workers=1, time_limit=30.0).pool as pool:
        reward = MathReward(answers="any")
        reward.pool = pool
        completions = [
            "9 * 2 = 18\n#### 18",
            "It makes 18 dollars",
            r"17, or rather \boxed{18}",
            r"18, no: \boxed{17}",
            "",
        ]
        assert reward(["?"] * 5, completions, solution=["#### 18"] * 5) == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_conversational_completions(reward):
    said = [{"role": "assistant", "content": r"It is \boxed{7}."}]
    assert reward(["?", "?"], [said, said], solution=["7", "8"]) == [1.0, 0.0]


def test_a_gold_that_cannot_be_read_is_not_scored_and_is_named(reward, caplog):
    before = Counter(reward.summary())
    golds = ["", None, "the one in the middle", r"\frac{1}{", float("nan")]
    with caplog.at_level(logging.WARNING):
        assert reward(["?"] * 6, [r"\boxed{1}"] * 6, solution=[*golds, "1"]) == [None] * 5 + [1.0]
    after = Counter(reward.summary())
    assert after["unusable_gold"] - before["unusable_gold"] == 5
    assert after["scored"] - before["scored"] == 1
    assert {"None", "the one in the middle", r"\frac{1}{", "nan"} <= set(reward.unusable_golds)
    assert "the one in the middle" in caplog.text


def test_the_wrong_gold_column_stops_the_run():
    reward = MathReward("question", workers=1, time_limit=30.0)
    with pytest.raises(RewardError, match=r"all 64 gold answers so far are unusable.*'What is it\?'.*right column"):
        reward(["?"] * 64, [r"\boxed{1}"] * 64, question=["What is it?"] * 64)
    reward.close()


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        (["1", "3"], "1, 3"), (["1,3"], "1,3"), ([5, 6], "5, 6"), ((5,), "5"), (18.0, "18"), (0.1, "0.1"), (7, "7"),
        (float("nan"), ""), (None, ""), ([], ""), (["1", None], ""), ({"x": 1}, ""), (" 5 ", "5"), (True, "True"),
        (np.array(["1", "3"]), "1, 3"), (np.float64("nan"), ""), (np.int64(5), "5"),
        (Fraction(1, 2), "1/2"), (Decimal("0.10"), "0.10"),
    ],
)  # fmt: skip
def test_golds_of_every_type(gold, text):
    assert gold_text(gold) == text


def test_lists_and_missing_values_as_golds(reward):
    golds = [["1", "3"], ["1,3"], [5, 6], float("nan"), "N/A", r"\$18", "5."]
    answers = ["1,3", "1,3", "5,6", "5", "5", "18", "5"]
    scores = reward(["?"] * 7, [rf"\boxed{{{answer}}}" for answer in answers], solution=golds)
    assert scores == [1.0, 1.0, 1.0, None, None, 1.0, 1.0]


def test_hanging_answers_are_wrong_and_hanging_golds_are_unusable(caplog):
    """Each costs itself alone, is counted, and none ends the run under the default failure_limit."""
    # Processor time decides, however busy the machine is.
    reward = MathReward(workers=2, time_limit=2.0, wall_limit=400.0)
    reward._recent.extend([False] * 200)
    golds = [str(number) for number in range(12)]
    completions = [rf"\boxed{{{number}}}" for number in range(12)]
    completions[3] = completions[7] = HANGING
    golds[5] = HANGING.removeprefix(r"\boxed{").removesuffix("}")
    scores = reward(["?"] * 12, completions, solution=golds)
    assert scores == [{3: 0.0, 7: 0.0, 5: None}.get(number, 1.0) for number in range(12)]
    summary = reward.summary()
    assert (summary["answers"], summary["scored"], summary["correct"], summary["over_time"]) == (12, 11, 9, 2)
    assert (summary["timeout"], summary["unusable_gold"]) == (0, 1)
    assert "is unusable" in caplog.text and golds[5] in reward.unusable_golds
    reward.close()


class Lost:
    """A pool whose workers end without a word."""

    restarts = 0

    def map(self, items):
        return [Outcome("crash", detail="the worker process ended") for _ in items]


def test_failure_score_and_failure_limit():
    reward = MathReward(failure_score=-1.0, failure_limit=0.0)
    reward.pool = Lost()
    assert score(reward, "1", "1") == -1.0
    assert reward.summary()["scored"] == 1
    reward._recent.extend([False] * 199)
    with pytest.raises(RewardError, match=r"the last 201 answers could not be scored.*more than failure_limit=0.0"):
        score(reward, "1", "1")


def test_missing_column_and_bad_options():
    with pytest.raises(DataError, match=r"no column 'solution'; it has: answer"):
        MathReward()(["?"], ["1"], answer=["1"], trainer_state=None)
    with pytest.raises(DataError, match="1 values of 'solution' for 2 completions"):
        MathReward()(["?"] * 2, ["1"] * 2, solution=["1"])
    with pytest.raises(ValueError, match="answers='all' must be"):
        MathReward(answers="all")
    with pytest.raises(ValueError, match=r"failure_limit=5 must be a share in \[0, 1\]"):
        MathReward(failure_limit=5)


def test_log_metric_gets_the_share_without_a_score(reward):
    logged = {}
    reward(["?"] * 4, [r"\boxed{1}"] * 4, solution=["1", "", "1", "2"], log_metric=logged.__setitem__)
    assert logged == {"math/not_scored": 0.25}


def test_the_trainer_never_imports_math_verify(reward):
    import subprocess

    program = "import sys, fdiv.rl.rewards; assert not {'math_verify', 'sympy', 'trl'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_agrees_with_the_recorded_verifier_rewards(reward, shared_data):
    lines = (shared_data / "data/passk_artifacts/areal_math_answers_sample_cases.jsonl").read_text().splitlines()
    agree = 0
    for problem in map(json.loads, lines):
        completions = problem["generateds"]
        scores = reward(completions, completions, solution=problem["solutions"] * len(completions))
        assert scores == [{5.0: 1.0, -5.0: 0.0}[recorded] for recorded in problem["rewards"]]
        agree += len(scores)
    assert agree == 160


@pytest.mark.slow
def test_agrees_with_the_recorded_scores_of_qwen_math(reward, shared_data):
    lines = (shared_data / "data/passk_artifacts/qwen_math_cot_100.jsonl").read_text().splitlines()
    differ, rows = [], 0
    for problem in map(json.loads, lines):
        completions = problem["code"]
        scores = reward(completions, completions, solution=[problem["gt"]] * len(completions))
        rows += len(scores)
        differ += [
            (problem["gt"], score, recorded)
            for score, recorded in zip(scores, problem["score"], strict=True)
            if score != float(recorded)
        ]
    # Their comparison of strings misses 10000 = 10{,}000; the gold "4:30p.." is no mathematics, and is not scored.
    assert rows == 800
    assert Counter(differ) == {("10{,}000", 1.0, False): 1, ("4:30p..", None, False): 8}


NESTED = {
    "fractions": r"\frac" * 800, "roots": r"\sqrt{" * 900 + "2" + "}" * 900, "brackets": "(" * 1500 + "1" + ")" * 1500,
    "signs": "-" * 2000 + "1", "sums": "1+" * 2000 + "1", "factorials": "9" + "!" * 300, "lists": "[" * 1000,
}  # fmt: skip


def test_an_answer_that_the_verifier_cannot_read_is_wrong_and_never_lost(reward):
    """However deeply it is nested; a gold like that is unusable."""
    before = reward.summary()
    scores = reward(
        ["?"] * len(NESTED), [rf"\boxed{{{text}}}" for text in NESTED.values()], solution=["7"] * len(NESTED)
    )
    assert scores == [0.0] * len(NESTED)
    assert reward(["?"], [r"\boxed{7}"], solution=[NESTED["fractions"]]) == [None]
    assert [reward.summary()[name] - before[name] for name in ("crash", "timeout", "memory", "unusable_gold")] == [
        0,
        0,
        0,
        1,
    ]
