"""DPH-RL: verifiable rewards with rehearsal of reference samples (arXiv:2509.07430)."""

from fdiv.lazy import attach

__all__ = ["DPHConfig", "DPHTrainer"]

__getattr__, __dir__ = attach(__name__, {"DPHConfig": "fdiv.rl.dph.trainer", "DPHTrainer": "fdiv.rl.dph.trainer"})
