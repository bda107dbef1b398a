"""Unlearning objectives: FLAT and the methods it is compared with.

The losses are pure functions and imported with the package; configs and trainers are imported on first use.
"""

from importlib import import_module

if __name__ != "fdiv.unlearning":
    raise ImportError(
        "this folder is installed as fdiv.unlearning: use `import fdiv.unlearning`, not `import unlearning`"
    )

from fdiv.unlearning.losses import (
    answer_score,
    flat_loss,
    grad_ascent,
    grad_diff,
    idk_dpo,
    jensun,
    nll,
    npo,
    padded_batch_mean,
    rmu,
    sampled_divergence,
    sat_imp,
    simnpo,
    wga,
)
from fdiv.unlearning.vocabulary_losses import ce_u, pdu, undial, vocabulary_divergence

__all__ = [
    "answer_score",
    "ce_u",
    "flat_loss",
    "grad_ascent",
    "grad_diff",
    "idk_dpo",
    "jensun",
    "nll",
    "npo",
    "padded_batch_mean",
    "pdu",
    "rmu",
    "sampled_divergence",
    "sat_imp",
    "simnpo",
    "undial",
    "vocabulary_divergence",
    "wga",
]
