"""f-DPO: direct preference optimisation under any f-divergence (arXiv:2309.16240)."""

from fdiv import lazy

__all__ = ["FDPOConfig", "FDPOTrainer"]

__getattr__, __dir__ = lazy.attach(
    __name__, {"FDPOConfig": "fdiv.alignment.f_dpo.config", "FDPOTrainer": "fdiv.alignment.f_dpo.trainer"}
)
