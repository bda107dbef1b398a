"""D²O: distributional dispreference optimisation (arXiv:2403.03419)."""

from fdiv.lazy import attach

__all__ = ["D2OConfig", "D2OTrainer"]

__getattr__, __dir__ = attach(
    __name__, {"D2OConfig": "fdiv.alignment.d2o.trainer", "D2OTrainer": "fdiv.alignment.d2o.trainer"}
)
