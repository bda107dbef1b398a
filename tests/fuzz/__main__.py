"""`python -m tests.fuzz`: exit code 1 where there is a fault."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Before anything imports torch, transformers or datasets, which read these once. One thread: a run is forked.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)

from tests.fuzz.case import FAULTS, Kind
from tests.fuzz.driver import Report, fuzz, print_report, write_report
from tests.fuzz.kinds import KINDS

__all__ = ["main"]


def main(words: Sequence[str] | None = None, kinds: Sequence[type[Kind]] = KINDS) -> int:
    """Fuzz as the command line says; 1 where there is a fault, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="how long; every kind has the same time (a few cases of each)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (0)")
    parser.add_argument("--only", nargs="+", metavar="KIND", choices=[kind.name for kind in kinds], help="these kinds")
    parser.add_argument("--case", type=int, nargs="+", metavar="N", help="these cases, in place of a time")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the counts and faults as JSON")
    args = parser.parse_args(words)
    if kinds is KINDS:  # what importing the trainers takes is no kind's time
        importlib.import_module("tests.support.preload")
    chosen = [kind for kind in kinds if args.only is None or kind.name in args.only]

    from tqdm import tqdm

    length = sum(kind.few for kind in chosen) if args.case is None else len(chosen) * len(args.case)
    bar = tqdm(
        total=None if args.minutes else length, unit="case", file=sys.stderr, mininterval=1, disable=None, leave=False
    )

    def step(report: Report) -> None:
        found = sum(counts[verdict] for counts in report.counts.values() for verdict in FAULTS)
        bar.set_postfix_str(f"{found} faults", refresh=False)
        bar.update()

    with bar:
        report = fuzz(
            chosen,
            args.seed,
            minutes=None if args.case else args.minutes,
            cases=args.case,
            say=lambda line: bar.write(line, file=sys.stdout),
            progress=step,
        )
    print_report(report, chosen)
    if args.output:
        write_report(report, args.output)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
