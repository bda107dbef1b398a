"""Preferences: accuracy, calibration and divergences on preference pairs."""

from fdiv import lazy

__all__ = ["PreferencesEvalConfig", "command"]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {"PreferencesEvalConfig": "fdiv.eval.preferences.evaluation", "command": "fdiv.eval.preferences.command"},
)
