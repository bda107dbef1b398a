"""`python -m fdiv`, `accelerate launch -m fdiv`, `torchrun -m fdiv`."""

from fdiv.cli import main
from fdiv.cli.ending import exit_after

if __name__ == "__main__":
    exit_after(main)
