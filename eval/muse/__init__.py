"""MUSE: six-way evaluation of unlearning (arXiv:2407.06460)."""

from fdiv import lazy

__all__ = ["MuseEvalConfig", "MuseEvaluation"]

__getattr__, __dir__ = lazy.attach(
    __name__, {"MuseEvalConfig": "fdiv.eval.muse.evaluation", "MuseEvaluation": "fdiv.eval.muse.evaluation"}
)
