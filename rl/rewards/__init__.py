"""Rewards that can face hostile text."""

from fdiv.rl.rewards.math_reward import MathReward

__all__ = ["MathReward"]
