"""What every trainer shares: recording and logging, rollouts, checkpoints, resuming, data checks."""

from fdiv import lazy

__all__ = ["ObjectiveTrainerMixin", "divergence_estimate", "frozen_copy", "log_ratio_quantiles"]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "ObjectiveTrainerMixin": "fdiv.training.trainer",
        "divergence_estimate": "fdiv.statistics.estimates",
        "frozen_copy": "fdiv.models.reference",
        "log_ratio_quantiles": "fdiv.statistics.estimates",
    },
)
