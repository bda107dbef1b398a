"""D²O: distributional dispreference optimisation (arXiv:2403.03419)."""

from fdiv import lazy

__all__ = ["D2OConfig", "D2OTrainer"]

__getattr__, __dir__ = lazy.attach(
    __name__, {"D2OConfig": "fdiv.alignment.d2o.trainer", "D2OTrainer": "fdiv.alignment.d2o.trainer"}
)
