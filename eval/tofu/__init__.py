"""TOFU: fictitious authors (arXiv:2401.06121)."""

from fdiv.lazy import attach

__all__ = ["TofuEvalConfig", "TofuEvaluation"]

__getattr__, __dir__ = attach(
    __name__, {"TofuEvalConfig": "fdiv.eval.tofu.evaluation", "TofuEvaluation": "fdiv.eval.tofu.evaluation"}
)
