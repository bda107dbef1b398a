"""The table of built-in divergences the registry starts from."""

from __future__ import annotations

from fdiv.divergences.base import Divergence
from fdiv.divergences.bounded import LeCam, TotalVariation
from fdiv.divergences.logarithmic import ForwardKL, Jeffreys, JensenShannon, ReverseKL, SkewJensenShannon
from fdiv.divergences.powers import Alpha, Chi2KL, NeymanChi2, PearsonChi2, SquaredHellinger

#: Name → class, the table the registry starts from.
ENTRIES: dict[str, type[Divergence]] = {
    entry.name: entry
    for entry in (
        ReverseKL,
        ForwardKL,
        JensenShannon,
        SkewJensenShannon,
        Jeffreys,
        Alpha,
        SquaredHellinger,
        NeymanChi2,
        PearsonChi2,
        Chi2KL,
        LeCam,
        TotalVariation,
    )
}
