"""Distillation under any divergence, token by token (after GKD, arXiv:2306.13649)."""

from fdiv import lazy

__all__ = ["FDistillConfig", "FDistillTrainer"]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {"FDistillConfig": "fdiv.distillation.f_distill.config", "FDistillTrainer": "fdiv.distillation.f_distill.trainer"},
)
