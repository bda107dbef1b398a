"""f-DPG: distributional policy gradient to a target density (arXiv:2302.08215)."""

from fdiv import lazy

__all__ = ["FDPGConfig", "FDPGTrainer"]

__getattr__, __dir__ = lazy.attach(
    __name__, {"FDPGConfig": "fdiv.alignment.f_dpg.trainer", "FDPGTrainer": "fdiv.alignment.f_dpg.trainer"}
)
