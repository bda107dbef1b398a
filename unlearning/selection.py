"""Evaluation after every epoch on a cheap subset, and the rule that picks the best epoch from it.

With `epoch_evaluation: {name: tofu, max_items: 40, …}`, `eval_strategy: epoch`, `eval_on_start: true`,
`save_strategy: best`, `metric_for_best_model: selection` and `load_best_model_at_end: true`, Trainer's own mechanism
keeps the checkpoint of the best epoch, and a resumed run goes on selecting.
"""

from __future__ import annotations

from typing import Any

from fdiv.errors import DataError
from fdiv.training.evaluation import build_evaluation, evaluated

__all__ = ["MUSE_TERMS", "OWN_TERMS", "TOFU_TERMS", "build_evaluation", "evaluate_epoch", "selection_score"]

TOFU_TERMS = ("forget_quality", "model_utility")
MUSE_TERMS = ("memory_gap", "retain_knowmem_ROUGE")
OWN_TERMS = ("forgotten", "kept")
"""What the evaluations give for the choice of an epoch: how well the forget set is forgotten, and what is left."""


def selection_score(
    forget_quality: float, model_utility: float, utility_at_start: float, utility_floor: float
) -> float:
    """The number whose largest value marks the best epoch.

    Forget quality (in [0, 1]) where model utility is at least `utility_floor` times what it was before training;
    elsewhere utility's ratio to that floor minus 1, which is negative, so that no epoch below the floor beats one
    above it, and among those below the most useful wins. Between equals, the earlier epoch. A model without any
    utility scores -1, also where there was none at the start and the floor is 0.

    On TOFU the two are its forget quality (a p-value) and model utility; with `selection_by: retrained_distance` 1 −
    that distance and model utility. On MUSE they are 1 − `memory_gap` and
    KnowMem of the retain set: 1 where neither VerbMem nor KnowMem of the forget set is above the retrained model's, so
    that the first such epoch wins, at which MUSE's own runs stop. On rows of one's own (`unlearning`) they are
    `forgotten`, 1 where nothing is left above chance, and `kept`, the probability of neighbours and general text.
    """
    floor = utility_floor * utility_at_start
    if model_utility <= 0:
        return -1.0
    return forget_quality if model_utility >= floor else model_utility / floor - 1.0


def evaluate_epoch(trainer: Any, evaluation: Any) -> dict[str, float]:
    """Run `evaluation` on the trainer's model → metrics with the prefix `eval_`, `eval_selection` among them.

    Metrics that are not defined are left out; so is `eval_selection` where one of the two it needs is.

    Raises:
        DataError: (a ValueError) `metric_for_best_model: selection` needs a metric that the evaluation does not give.
    """
    args, values = trainer.args, evaluated(trainer, evaluation)
    notes = values.get("notes", {})
    metrics = {f"eval_{name}": float(value) for name, value in values.items() if isinstance(value, (int, float))}
    needed = (args.selection_by or TOFU_TERMS[0], TOFU_TERMS[1])
    needed = MUSE_TERMS if "memory_gap" in values else OWN_TERMS if "forgotten" in values else needed
    if all(f"eval_{name}" in metrics for name in needed):
        forgotten, useful = (metrics[f"eval_{name}"] for name in needed)
        forgotten = forgotten if needed in (TOFU_TERMS, OWN_TERMS) else 1.0 - forgotten
        start = _at_start(trainer, f"eval_{needed[1]}", useful)
        metrics["eval_selection"] = selection_score(forgotten, useful, start, args.utility_floor)
    elif args.metric_for_best_model in ("selection", "eval_selection"):
        missing = [name for name in needed if f"eval_{name}" not in metrics]
        reasons = [f"{name}: {notes[name]}" for name in missing if name in notes]
        raise DataError(
            f"metric_for_best_model=selection needs {' and '.join(missing)}, which epoch_evaluation does not give"
            f"{' (' + '; '.join(reasons) + ')' if reasons else ''}: set its "
            "retain_logs (made with the same max_items) and leave generate on; for rows "
            "without paraphrases choose another of its metrics, for example eval_retrained_distance with "
            "greater_is_better: false"
        )
    return metrics


def _at_start(trainer: Any, name: str, now: float) -> float:
    """The metric as first logged, which with `eval_on_start` is before training; `now` when this is the first."""
    return next((entry[name] for entry in trainer.state.log_history if name in entry), now)
