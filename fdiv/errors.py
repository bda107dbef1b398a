"""Errors that the command line turns into one line and an exit code; everything else keeps its traceback."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DataError",
    "FdivError",
    "MomentError",
    "NonFiniteLossError",
    "OptionError",
    "RecipeError",
    "RequirementError",
    "RewardError",
    "RolloutError",
    "SandboxError",
    "ScorerError",
    "TerminatedError",
    "WorkerError",
]


class FdivError(Exception):
    """Base of the errors with a remedy in their message. `exit_code` is what the command line returns."""

    exit_code = 1


class RecipeError(FdivError):
    """The recipe or the command line is wrong: an unknown key, a value of the wrong type, an invalid divergence."""

    exit_code = 2


class OptionError(RecipeError, ValueError):
    """An option of a config has a value that it cannot have. `key` names the option."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class DataError(FdivError, ValueError):
    """A dataset, model or tokenizer cannot be used: missing file, split or column, no rows, no pad token."""


class NonFiniteLossError(FdivError):
    """The loss, a gradient or a weight became NaN or infinite. The message says which, and what is saved."""


class RequirementError(FdivError):
    """A `require:` of the `eval:` block does not hold after training."""


class CheckpointError(FdivError):
    """A checkpoint cannot be written, is not complete, or belongs to another run."""


class TerminatedError(FdivError):
    """SIGTERM ended the run; the exit code is the shell's for it, 128 + 15."""

    exit_code = 143


class RolloutError(FdivError):
    """A back end gave no completion for a prompt, an empty one, or one without its log-probabilities."""


class ScorerError(FdivError, ValueError):
    """A scorer raised, or returned the wrong number of scores, or something that is not a finite number."""


class MomentError(FdivError, ValueError):
    """No λ gives the wanted moments on these samples, or too few samples carry it."""


class RewardError(FdivError):
    """Rewards are missing for too many answers: training on what is left would not be what was asked for."""


class WorkerError(FdivError):
    """The workers cannot be started: a package is missing, or the machine has no memory or processes left."""


class SandboxError(FdivError, ValueError):
    """The sandbox of programs is unknown, not installed, or does not work on this machine."""
