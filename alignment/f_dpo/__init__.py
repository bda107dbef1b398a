"""f-DPO: direct preference optimisation under any f-divergence (arXiv:2309.16240)."""

from fdiv.lazy import attach

__all__ = ["FDPOConfig", "FDPOTrainer"]

__getattr__, __dir__ = attach(
    __name__, {"FDPOConfig": "fdiv.alignment.f_dpo.config", "FDPOTrainer": "fdiv.alignment.f_dpo.trainer"}
)
