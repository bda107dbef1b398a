"""Preferences: accuracy, calibration and divergences on preference pairs."""

from fdiv.lazy import attach

__all__ = ["PreferencesEvalConfig", "command"]

__getattr__, __dir__ = attach(
    __name__,
    {"PreferencesEvalConfig": "fdiv.eval.preferences.evaluation", "command": "fdiv.eval.preferences.command"},
)
