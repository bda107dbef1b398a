"""Running recipes: one run, its directory and records, and sweeps over runs."""

from fdiv.lazy import attach

__all__ = ["check_blocks", "prepare", "run_recipe"]

__getattr__, __dir__ = attach(
    __name__, {"check_blocks": "fdiv.run.run", "prepare": "fdiv.run.run", "run_recipe": "fdiv.run.run"}
)
