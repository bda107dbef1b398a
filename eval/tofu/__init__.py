"""TOFU: fictitious authors (arXiv:2401.06121)."""

from fdiv import lazy

__all__ = ["TofuEvalConfig", "TofuEvaluation"]

__getattr__, __dir__ = lazy.attach(
    __name__, {"TofuEvalConfig": "fdiv.eval.tofu.evaluation", "TofuEvaluation": "fdiv.eval.tofu.evaluation"}
)
