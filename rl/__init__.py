"""Reinforcement learning with verifiable rewards: DPH-RL.

The losses, advantages and KL estimators are pure functions and imported with the package; config, trainer and the
rehearsal machinery are imported on first use.
"""

from importlib import import_module
from typing import Any

if __name__ != "fdiv.rl":
    raise ImportError("this folder is installed as fdiv.rl: use `import fdiv.rl`, not `import rl`")

from fdiv.rl.advantages import list_advantages, resolve_advantage
from fdiv.rl.kl_estimators import list_kl_estimators, resolve_kl
from fdiv.rl.losses import (
    check_rehearsal_divergence,
    js_on_policy,
    js_on_reference,
    rehearsal_coefficient,
    rehearsal_loss,
)

# These import transformers and trl (seconds), so they are loaded on first use.
_LAZY = {
    "DPHConfig": "fdiv.rl.dph",
    "DPHTrainer": "fdiv.rl.dph",
    "RehearsalCache": "fdiv.rl.rehearsal",
}

__all__ = [
    "DPHConfig",
    "DPHTrainer",
    "RehearsalCache",
    "check_rehearsal_divergence",
    "js_on_policy",
    "js_on_reference",
    "list_advantages",
    "list_kl_estimators",
    "rehearsal_coefficient",
    "rehearsal_loss",
    "resolve_advantage",
    "resolve_kl",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
