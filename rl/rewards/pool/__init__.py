"""Killable worker processes: an item that hangs or crashes its worker costs exactly one answer."""

from fdiv.rl.rewards.pool.workers import Outcome, WorkerPool, default_workers

__all__ = ["Outcome", "WorkerPool", "default_workers"]
