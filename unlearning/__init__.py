"""Unlearning objectives: FLAT and the methods it is compared with.

The losses are pure functions and imported with the package; configs and trainers are imported on first use.
"""

from importlib import import_module
from typing import Any

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

_LAZY = {
    "AltPO": "fdiv.unlearning.methods.alt_po",
    "CEU": "fdiv.unlearning.methods.ce_u",
    "FLAT": "fdiv.unlearning.methods.flat",
    "GradAscent": "fdiv.unlearning.methods.grad_ascent",
    "GradDiff": "fdiv.unlearning.methods.grad_diff",
    "IdkDPO": "fdiv.unlearning.methods.idk_dpo",
    "JensUn": "fdiv.unlearning.methods.jensun",
    "KLRetain": "fdiv.unlearning.methods.kl_retain",
    "NPO": "fdiv.unlearning.methods.npo",
    "PDU": "fdiv.unlearning.methods.pdu",
    "RMU": "fdiv.unlearning.methods.rmu",
    "SatImp": "fdiv.unlearning.methods.sat_imp",
    "SimNPO": "fdiv.unlearning.methods.simnpo",
    "UNDIAL": "fdiv.unlearning.methods.undial",
    "WGA": "fdiv.unlearning.methods.wga",
}
"""Where `<key>Config` and `<key>Trainer` are."""


def __getattr__(name: str) -> Any:
    """Import a config or trainer on first use: both pull in transformers and TRL."""
    stem = name.removesuffix("Config").removesuffix("Trainer")
    if stem != name and stem in _LAZY:
        return getattr(import_module(_LAZY[stem]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    *(f"{stem}{kind}" for stem in _LAZY for kind in ("Config", "Trainer")),
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
