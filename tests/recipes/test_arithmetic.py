"""The arithmetic task: exact verification, enumeration of solutions against brute force, the parts, the base model."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from fdiv.recipes.tasks.arithmetic import (
    ArithmeticTaskConfig,
    ExpressionError,
    arithmetic_reward,
    evaluate_expression,
    solutions,
    verify_expression,
)

QUICK = {"counts": [2, 3], "largest_number": 6, "train_problems": 12, "test_problems": 8, "steps": 3, "batch_size": 4}


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7", 7, [7]),
        ("2+3*4", 14, [2, 3, 4]),
        ("(2+3)*4", 20, [2, 3, 4]),
        ("8-3-2", 3, [8, 3, 2]),
        ("8-(3-2)", 7, [8, 3, 2]),
        ("12/4/3", 1, [12, 4, 3]),
        ("12/(4/3)", 9, [12, 4, 3]),
        ("8/(3-8/3)", 24, [8, 3, 8, 3]),
        (" ( 1 0 ) ", 10, [10]),
        ("1/3", Fraction(1, 3), [1, 3]),
        ("2-5", -3, [2, 5]),
    ],
)
def test_exact_values(text, value, numbers):
    assert evaluate_expression(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        *("", "+", "-3", "2+", "2**3", "2 3 x", "(2+3", "2+3)", "4/(2-2)", "2//1", "1.5", "1e3", "__import__('os')"),
        *("٣+٤", "(" * 40 + "1" + ")" * 40, "1+" * 200 + "1"),
    ],
)
def test_what_is_no_expression_is_wrong_and_raises_only_in_the_evaluator(text):
    with pytest.raises(ExpressionError):
        evaluate_expression(text)
    assert not verify_expression(text, [2, 3], 5)


def test_verification_asks_for_value_and_for_every_number_once():
    assert verify_expression("8/(3-8/3)", [3, 3, 8, 8], 24)
    assert 8 / (3 - 8 / 3) != 24  # in floating point it is not
    assert not verify_expression("2*9+7", [2, 7, 9], 24)
    assert verify_expression("2*9+7", [9, 7, 2], 25)
    assert not verify_expression("9+9+7", [9, 7, 2], 25)  # 2 is missing, 9 is there twice
    assert not verify_expression("25", [9, 7, 2], 25)
    assert not verify_expression("2*9+7=25", [9, 7, 2], 25)
    scores = arithmetic_reward(
        ["2*9+7", [{"role": "assistant", "content": "7+9*2"}], "7"], numbers=[[2, 7, 9]] * 3, target=[25] * 3
    )
    assert scores == [1.0, 1.0, 0.0]


def _brute_force(numbers: tuple[int, ...], target: int) -> bool:
    """Whether any tree over natural intermediate results gives the target; trees of three leaves, both shapes."""

    def combine(a: int, b: int):
        yield a + b
        yield a * b
        if a >= b:
            yield a - b
        if b and a % b == 0:
            yield a // b

    for a, b, c in itertools.permutations(numbers):
        for x in combine(a, b):
            if target in combine(x, c):
                return True
        for x in combine(b, c):
            if target in combine(a, x):
                return True
    return False


@pytest.mark.parametrize("numbers", [(1, 2, 3), (2, 2, 6), (3, 7, 9), (1, 1, 1), (4, 8, 10)])
def test_solutions_are_right_and_complete(numbers):
    found = solutions(numbers)
    for target, texts in found.items():
        assert len(set(texts)) == len(texts)
        assert all(verify_expression(text, numbers, target) for text in texts)
    for target in range(0, 60):
        assert (target in found) == _brute_force(numbers, target)


def test_solutions_of_two_numbers_by_hand():
    assert solutions([6, 3]) == {2: ["6/3"], 3: ["6-3"], 9: ["3+6", "6+3"], 18: ["3*6", "6*3"]}


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_builder_writes_disjoint_solvable_problems_and_a_reproducible_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    keys = ArithmeticTaskConfig(**QUICK).build(tmp_path / "one")
    again = ArithmeticTaskConfig(**QUICK).build(tmp_path / "two")
    train, test = (_rows(Path(keys["dataset_name"]) / f"{split}.jsonl") for split in ("train", "test"))
    assert [len(train), len(test)] == [12, 8]
    assert sorted(len(row["numbers"]) for row in train) == [2] * 6 + [3] * 6
    problems = [(tuple(sorted(row["numbers"])), row["target"]) for row in train + test]
    assert len(set(problems)) == 20
    for row in train + test:
        known = solutions(row["numbers"])[row["target"]]
        assert row["num_solutions"] == len(known) >= 1
        assert row["prompt"] == f"{','.join(map(str, row['numbers']))}={row['target']}:"
    tokenizer = AutoTokenizer.from_pretrained(keys["model_name_or_path"])
    text = "12,3,4=60:(12+3)*4"
    assert len(tokenizer(text)["input_ids"]) == len(text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    first, second = (AutoModelForCausalLM.from_pretrained(k["model_name_or_path"]) for k in (keys, again))
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"counts": [1]}, "prepare.counts must be a list of numbers from 2 to 5"),
        ({"steps": 1}, "prepare.steps must be at least 2"),
        ({"train_problems": 13}, "prepare.train_problems must be a multiple of the 2 counts"),
        ({"layers": 0}, "prepare.layers must be at least 1"),
        ({"easy_problems": 5}, "easy_problems must be at least 0, and 0 where counts hold 2"),
        ({"counts": [3], "easy_problems": -1}, "easy_problems must be at least 0"),
        ({"counts": [3], "easy_share": 1.0}, "prepare.easy_share must lie between 0 and 1, got 1.0"),
    ],
)
def test_bad_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ArithmeticTaskConfig(**(QUICK | wrong))


def test_easy_problems_are_kept_apart_from_what_the_base_model_sees(tmp_path, monkeypatch):
    """Of 200 draws a quarter is easy (25 to 75: four standard errors), none of them kept for the cache."""
    seen = []

    def pretend(model, tokenizer, sampler, steps, **_):
        seen.extend(sampler() for _ in range(200))
        return model

    monkeypatch.setattr("fdiv.models.tiny.train_tiny_model", pretend)
    config = ArithmeticTaskConfig(
        **(QUICK | {"counts": [3], "train_problems": 6, "test_problems": 4, "easy_problems": 20, "easy_share": 0.25})
    )
    config.build(tmp_path)
    kept = [json.loads(line) for line in (tmp_path / "easy" / "train.jsonl").read_text().splitlines()]
    assert len(kept) == 20 and all(len(row["numbers"]) == 2 for row in kept)
    easy = [prompt for prompt, _ in seen if prompt.count(",") == 1]
    assert 25 <= len(easy) <= 75
    said = {(tuple(sorted(row["numbers"])), row["target"]) for row in kept}
    for prompt in easy:
        numbers, target = prompt.rstrip(":").split("=")
        assert (tuple(sorted(map(int, numbers.split(",")))), int(target)) not in said


def test_too_few_problems_are_refused(tmp_path):
    config = ArithmeticTaskConfig(**(QUICK | {"largest_number": 2}))
    with pytest.raises(ValueError, match="problems of 2 numbers do not suffice for 6 in the train and 4 in the test"):
        config.build(tmp_path)


@pytest.mark.slow
def test_tiny_recipe_raises_pass_at_1_and_draws_its_curve(tmp_path):
    """The packaged recipe, whole: build, pre-sample, train, Pass@k of held-out problems, report."""
    from fdiv.recipe.load import load_recipe
    from fdiv.run.run import run_recipe

    result = run_recipe(load_recipe("tiny/dph", ["--output_dir", str(tmp_path)]))
    assert not result["unmet_requirements"]
    assert 0.1 < result["before/pass@1"] < result["after/pass@1"] < 0.5
    assert result["before/pass@64"] > 0.9
    assert 0 < result["after/keep_rate@64"] <= 1
    assert (tmp_path / "plots" / "pass_at_k.png").is_file()
