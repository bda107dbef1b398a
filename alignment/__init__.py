"""Alignment objectives: f-DPO, f-DPG and D²O."""

if __name__ != "fdiv.alignment":
    raise ImportError("this folder is installed as fdiv.alignment: use `import fdiv.alignment`")


from fdiv import lazy, versions
from fdiv.alignment.d2o.loss import d2o_loss
from fdiv.alignment.f_dpg.estimate import estimate_to_target
from fdiv.alignment.f_dpg.loss import f_dpg_coefficient, f_dpg_loss
from fdiv.alignment.f_dpo.loss import f_dpo_loss, f_dpo_rewards

# The trainers import trl (seconds), so they are loaded on first use.
_LAZY = {
    "D2OConfig": "fdiv.alignment.d2o.trainer",
    "D2OTrainer": "fdiv.alignment.d2o.trainer",
    "FDPGConfig": "fdiv.alignment.f_dpg.trainer",
    "FDPGTrainer": "fdiv.alignment.f_dpg.trainer",
    "FDPOConfig": "fdiv.alignment.f_dpo.trainer",
    "FDPOTrainer": "fdiv.alignment.f_dpo.trainer",
}

__all__ = [
    "D2OConfig",
    "D2OTrainer",
    "FDPGConfig",
    "FDPGTrainer",
    "FDPOConfig",
    "FDPOTrainer",
    "d2o_loss",
    "estimate_to_target",
    "f_dpg_coefficient",
    "f_dpg_loss",
    "f_dpo_loss",
    "f_dpo_rewards",
]


__getattr__, __dir__ = lazy.attach(__name__, _LAZY, before=versions.warn_if_untested)
