"""Unlearning objectives: FLAT and the methods it is compared with.

The losses are pure functions and imported with the package; configs and trainers are imported on first use.
"""

if __name__ != "fdiv.unlearning":
    raise ImportError(
        "this folder is installed as fdiv.unlearning: use `import fdiv.unlearning`, not `import unlearning`"
    )

from fdiv import lazy, versions
from fdiv.catalog import METHODS
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
from fdiv.unlearning.vocabulary_losses import ce_u, pdu, shred, undial, vocabulary_divergence

# A method's line in the catalog is the only one: `npo.py` there gives `NPOConfig` and `NPOTrainer` here.
_METHODS = dict(
    reversed(path.removesuffix("Trainer").split(":")) for path in METHODS.values() if path.startswith(f"{__name__}.")
)
_HOMES = {f"{stem}{kind}": home for stem, home in sorted(_METHODS.items()) for kind in ("Config", "Trainer")}
__getattr__, __dir__ = lazy.attach(__name__, _HOMES, before=versions.warn_if_untested)

__all__ = [
    *_HOMES,
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
    "shred",
    "simnpo",
    "undial",
    "vocabulary_divergence",
    "wga",
]
