"""`fdiv` with f-DPO whose steps after the third take a quarter of a second each: a signal finds the training under way."""

from __future__ import annotations

import time

from fdiv.alignment import FDPOTrainer
from fdiv.cli import main
from fdiv.cli.ending import exit_after

training_step = FDPOTrainer.training_step


def slowly(trainer, *arguments, **options):
    if trainer.state.global_step >= 3:
        time.sleep(0.25)
    return training_step(trainer, *arguments, **options)


if __name__ == "__main__":
    FDPOTrainer.training_step = slowly
    exit_after(main)
