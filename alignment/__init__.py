"""Alignment objectives: f-DPO, f-DPG and D²O."""

if __name__ != "fdiv.alignment":
    raise ImportError("this folder is installed as fdiv.alignment: use `import fdiv.alignment`")

from importlib import import_module
from typing import Any

from fdiv.alignment.f_dpg_objective import f_dpg_coefficient, f_dpg_loss
from fdiv.alignment.losses import d2o_loss, f_dpo_loss, f_dpo_rewards

# The trainers import trl (seconds), so they are loaded on first use.
_LAZY = {
    "D2OConfig": "fdiv.alignment.d2o",
    "D2OTrainer": "fdiv.alignment.d2o",
    "FDPGConfig": "fdiv.alignment.f_dpg",
    "FDPGTrainer": "fdiv.alignment.f_dpg",
    "FDPOConfig": "fdiv.alignment.f_dpo",
    "FDPOTrainer": "fdiv.alignment.f_dpo",
}

__all__ = [
    "D2OConfig",
    "D2OTrainer",
    "FDPGConfig",
    "FDPGTrainer",
    "FDPOConfig",
    "FDPOTrainer",
    "d2o_loss",
    "f_dpg_coefficient",
    "f_dpg_loss",
    "f_dpo_loss",
    "f_dpo_rewards",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
