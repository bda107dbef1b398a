"""Bounds of the keys that builders of data and evaluations have in common, whichever of them has the key."""

from __future__ import annotations

from fdiv.bounds import Declaration, declare

__all__ = ["SHARED"]

_COUNT = declare(least=1, most=2**31 - 1)
_POSITIVE = declare(above=0, most=1e6)

SHARED: dict[str, Declaration] = {
    "seed": declare(least=0, most=2**32 - 1, why="NumPy takes no other seed"),
    "attack_seed": declare(least=0, most=2**32 - 1),
    "learning_rate": _POSITIVE,
    "epochs": _POSITIVE,
    "temperature": declare(least=0, most=1e6),
    "base_scale": declare(least=0, most=1e3),
    "reward_scale": declare(least=0, most=1e3),
    "malformed_reward": declare(least=-1e3, most=1e3),
    "vllm_memory": declare(above=0, most=1),
    **dict.fromkeys(("limit", "max_items", "max_tasks", "max_rows", "resamples"), _COUNT),
    **dict.fromkeys(("batch_size", "generation_batch_size", "max_length", "max_new_tokens", "layers"), _COUNT),
    **dict.fromkeys(("hidden_size", "vocab_size", "context", "steps", "rows"), _COUNT),
}
