"""Rewards that can face hostile text: mathematics, SQL and Python, verified in killable worker processes.

Each is a reward function of TRL. A recipe names one: `{name: math}`, `{name: sql, database: chinook.sqlite}`, or
`package.module:function` for one of your own.
"""

from __future__ import annotations

from fdiv.catalog import REWARDS, build_reward
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
