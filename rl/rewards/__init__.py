"""Rewards that can face hostile text: mathematics, SQL and Python, verified in killable worker processes.

Each is a reward function of TRL. A recipe names one: `{name: math}`, `{name: sql, database: chinook.sqlite}`, or
`package.module:function` for one of your own.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fdiv import catalog as methods
from fdiv.errors import RewardError, WorkerError
from fdiv.inference.prompting import completion_text
from fdiv.rl.rewards.code_reward import CodeReward
from fdiv.rl.rewards.completions import extract_python, extract_sql
from fdiv.rl.rewards.math.reward import MathReward
from fdiv.rl.rewards.pool import Outcome, WorkerPool
from fdiv.rl.rewards.pooled_reward import PooledReward
from fdiv.rl.rewards.sql.reward import SQLReward

__all__ = [
    "REWARDS",
    "CodeReward",
    "MathReward",
    "Outcome",
    "PooledReward",
    "RewardError",
    "SQLReward",
    "WorkerError",
    "WorkerPool",
    "build_reward",
    "completion_text",
    "extract_python",
    "extract_sql",
]

REWARDS: dict[str, str] = {
    "math": "fdiv.rl.rewards.math.reward:MathReward",
    "sql": "fdiv.rl.rewards.sql.reward:SQLReward",
    "code": "fdiv.rl.rewards.code_reward:CodeReward",
}
"""What a recipe can name under `reward:`; the class's arguments are its keys, `as` renames it in the logs."""


def build_reward(spec: str | Mapping[str, Any] | Callable[..., Any]) -> Callable[..., Sequence[float | None]]:
    """A reward function from a callable, a name, or a mapping `{name: …, argument: value, …}`.

    A name with a colon, `package.module:function`, is a reward function of your own; `package.module:Class` with
    further keys is that class, made with them.

    Raises:
        ValueError: unknown name, unknown or missing argument; what the reward's class refuses.
    """
    if callable(spec):
        return spec
    if not isinstance(spec, str | Mapping):
        raise ValueError(f"reward: a name or a mapping with a name is due, got {spec!r}")
    settings = {"name": spec} if isinstance(spec, str) else dict(spec)
    kind = settings.pop("name", None)
    if not isinstance(kind, str) or (":" not in kind and kind not in REWARDS):
        raise ValueError(f"unknown reward {kind!r}; {_nearest(str(kind), REWARDS)}, or package.module:function")
    if "as" in settings:
        settings["name"] = settings.pop("as")
    try:
        factory = methods.load(REWARDS.get(kind, kind))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {kind!r}: {error}") from error
    if not inspect.isclass(factory):
        if settings or not callable(factory):
            what = f"takes no {', '.join(settings)} here" if settings else "is not callable"
            raise ValueError(f"reward {kind!r} {what}: name a function with TRL's reward signature, or a class")
        return factory
    known = inspect.signature(factory).parameters
    for key in settings:
        if key not in known:
            raise ValueError(f"reward {kind!r} has no argument {key!r}; {_nearest(key, known)}")
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        raise ValueError(f"reward {kind!r}: {error}") from error
    return factory(**settings)


def _nearest(word: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
