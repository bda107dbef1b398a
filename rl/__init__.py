"""Reinforcement learning with verifiable rewards: DPH-RL.

The losses, advantages and KL estimators are pure functions and imported with the package; config, trainer and the
rehearsal machinery are imported on first use.
"""

if __name__ != "fdiv.rl":
    raise ImportError("this folder is installed as fdiv.rl: use `import fdiv.rl`, not `import rl`")

from fdiv import lazy, versions
from fdiv.rl.advantages import list_advantages, resolve_advantage
from fdiv.rl.dph.loss import (
    check_rehearsal_divergence,
    js_on_policy,
    js_on_reference,
    rehearsal_coefficient,
    rehearsal_loss,
)
from fdiv.rl.kl_estimators import list_kl_estimators, resolve_kl

# These import transformers and trl (seconds), so they are loaded on first use.
_LAZY = {
    "DPHConfig": "fdiv.rl.dph.trainer",
    "DPHTrainer": "fdiv.rl.dph.trainer",
    "RehearsalCache": "fdiv.rl.dph.rehearsal",
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


__getattr__, __dir__ = lazy.attach(__name__, _LAZY, before=versions.warn_if_untested)
