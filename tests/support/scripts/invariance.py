"""How far runs of the five trainers drift apart that should be one and the same run. Minutes on one core.

    python -m tests.support.scripts.invariance [--output benchmarks/results/invariance.json]

Thirty optimizer steps in float32 on a CPU for each pair of runs that `tests/support/invariance.py` describes: 8
examples at once or one by one, gradient checkpointing, the tokenizer's padding side, padding on either side, one or two
processes, the fused LM head or plain logits. Written and printed: maximum and mean drift of the loss, and how far the
final weights are apart, beside how far training moved them. The tests hold the same numbers to tolerances.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it: one process and two then sum in the same order


def main() -> int:
    """Every pair of runs, once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    from fdiv.provenance import environment
    from tests.support.invariance import AXES, BATCH, STEPS, Invariance, measured, table

    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere):  # the trainers print their logs
            drifts = measured(Invariance(Path(folder)))
    found = [drift for trainers in drifts.values() for drift in trainers.values()]
    report = {
        "steps": STEPS,
        "examples_per_step": BATCH,
        "axes": {axis: list(pair) for axis, pair in AXES.items()},
        "drift": drifts,
        "largest_weight_drift": max(drift["weights_max"] for drift in found),
        "least_weight_movement": min(drift["weights_moved"] for drift in found),
        "environment": environment(shlex.join(["python", "-m", "tests.support.scripts.invariance", *sys.argv[1:]])),
    }
    print(table(drifts))
    print(json.dumps({key: value for key, value in report.items() if key != "drift"}, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
