"""DPH-RL: verifiable rewards with rehearsal of reference samples (arXiv:2509.07430)."""

from fdiv import lazy

__all__ = ["DPHConfig", "DPHTrainer"]

__getattr__, __dir__ = lazy.attach(__name__, {"DPHConfig": "fdiv.rl.dph.trainer", "DPHTrainer": "fdiv.rl.dph.trainer"})
