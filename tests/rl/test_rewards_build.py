"""What a recipe's `reward:` can name."""

import pytest

import fdiv.rl.rewards
from fdiv.catalog import load
from fdiv.rl.rewards import REWARDS, MathReward, PooledReward, build_reward


def own_reward(prompts, completions, **columns):
    return [0.5] * len(completions)


def test_names_and_mappings():
    reward = build_reward({"name": "math", "gold": "answer", "time_limit": 2.5, "as": "sums"})
    assert isinstance(reward, MathReward)
    assert (reward.gold, reward.pool.time_limit, reward.__name__) == ("answer", 2.5, "sums")
    assert build_reward("math").__name__ == "math"
    assert build_reward(own_reward) is own_reward
    assert all(issubclass(load(path), PooledReward) for path in REWARDS.values())


def test_ones_own():
    assert build_reward("fdiv.rl.rewards:build_reward") is fdiv.rl.rewards.build_reward
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
        ({"name": "fdiv.rl.rewards:build_reward", "gold": "x"}, "takes no gold here"),
        ("fdiv.rl.rewards:REWARDS", "is not callable"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        build_reward(spec)
