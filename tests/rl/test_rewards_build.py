"""What a recipe's `reward:` can name."""

import pytest

from fdiv.rl.rewards import REWARDS, MathReward, PooledReward, build_reward


def own_reward(prompts, completions, **columns):
    return [0.5] * len(completions)


def test_names_and_mappings():
    reward = build_reward({"name": "math", "gold": "answer", "time_limit": 2.5, "as": "sums"})
    assert isinstance(reward, MathReward)
    assert (reward.gold, reward.pool.time_limit, reward.__name__) == ("answer", 2.5, "sums")
    assert build_reward("math").__name__ == "math"
    assert build_reward(own_reward) is own_reward
    assert all(issubclass(REWARDS.find(name), PooledReward) for name in ("math", "sql", "code"))


def make_reward(score):
    return lambda completions, **columns: [score] * len(completions)


def make_number(score):
    return score


def test_ones_own():
    assert build_reward(f"{__name__}:own_reward")([], ["a"]) == [0.5]
    assert build_reward({"name": f"{__name__}:make_reward", "score": 0.25})(completions=["a", "b"]) == [0.25, 0.25]
    renamed = build_reward({"name": f"{__name__}:own_reward", "as": "half"})
    assert renamed.__name__ == "half" and renamed(prompts=[], completions=["a"]) == [0.5]
    reward = build_reward({"name": "fdiv.rl.rewards:MathReward", "gold": "answer"})
    assert isinstance(reward, MathReward) and reward.gold == "answer"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("maths", "unknown reward 'maths'; did you mean 'math'"),
        ({"gold": "x"}, "unknown reward None"),
        (3, "a name or a mapping"),
        ({"name": "math", "time_limt": 3}, "reward 'math' has no argument 'time_limt'; did you mean 'time_limit'"),
        ("sql", "reward 'sql': missing a required argument: 'database'"),
        ("no_such_module:x", "No module named"),
        ("fdiv.rl.rewards:nothing", "has no attribute 'nothing'"),
        ({"name": f"{__name__}:own_reward", "gold": "x"}, "takes no gold here"),
        ({"name": f"{__name__}:make_reward", "scor": 1}, "has no argument 'scor'; did you mean 'score'?"),
        ({"name": f"{__name__}:make_number", "score": 1}, "made a int: it must make a function with TRL's signature"),
        ("fdiv.rl.rewards:REWARDS", "of type Table: it must be a reward function"),
        ("os:system", "os is a module of Python itself"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        build_reward(spec)
