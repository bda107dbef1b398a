"""Presampling: sample the reference, verify, and write the rehearsal cache that DPH-RL trains with."""

from fdiv import lazy

__all__ = ["presample", "reference_log_probs"]

__getattr__, __dir__ = lazy.attach(
    __name__, {"presample": "fdiv.rl.presample.run", "reference_log_probs": "fdiv.rl.presample.run"}
)
