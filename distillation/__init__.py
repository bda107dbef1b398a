"""Distillation: a student towards a teacher under any divergence over the whole vocabulary."""

if __name__ != "fdiv.distillation":
    raise ImportError("this folder is installed as fdiv.distillation: use `import fdiv.distillation`")


from fdiv import lazy, versions
from fdiv.distillation.f_distill.loss import f_distill_loss
from fdiv.distillation.transport import sinkhorn_plan, transport_costs
from fdiv.models.vocabulary import topk_divergence, topk_vocabulary_divergence, vocabulary_divergence

# The trainer imports trl (seconds), so it is loaded on first use.
_LAZY = {
    "FDistillConfig": "fdiv.distillation.f_distill.config",
    "FDistillTrainer": "fdiv.distillation.f_distill.trainer",
}

__all__ = [
    "FDistillConfig",
    "FDistillTrainer",
    "f_distill_loss",
    "sinkhorn_plan",
    "topk_divergence",
    "topk_vocabulary_divergence",
    "transport_costs",
    "vocabulary_divergence",
]


__getattr__, __dir__ = lazy.attach(__name__, _LAZY, before=versions.warn_if_untested)
