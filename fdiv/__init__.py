"""fdiv: align and unlearn language models with divergence-parameterised objectives.

The registry of divergences is `fdiv.divergences`; the objectives live in `fdiv.alignment`, `fdiv.unlearning` and
`fdiv.rl`; the metrics in `fdiv.eval`; the command line is `fdiv` (or `python -m fdiv`). Importing this package imports
nothing heavy.
"""

from fdiv import moved

__version__ = "0.2.0"

__all__ = ["__version__"]

moved.install()
