"""Preferences: accuracy, calibration and divergences on preference pairs."""

from fdiv.lazy import attach

__all__ = ["PreferencesEvalConfig"]

__getattr__, __dir__ = attach(
    __name__,
    {"PreferencesEvalConfig": "fdiv.eval.preferences.evaluation"},
)
