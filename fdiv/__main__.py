"""`python -m fdiv`, `accelerate launch -m fdiv`, `torchrun -m fdiv`."""

import sys

from fdiv.cli import main

if __name__ == "__main__":
    sys.exit(main())
