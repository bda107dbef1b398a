"""MUSE's six aggregates from per-item values (Shi et al. 2024, arXiv:2407.06460)."""

from __future__ import annotations

from collections.abc import Sequence

from fdiv.eval.benchmark.aggregation import REQUIRED_KEYS, Aggregates, check_retain_log, fresh
from fdiv.eval.benchmark.attacked.values import put_attacks
from fdiv.eval.benchmark.log import EvalLog
from fdiv.eval.benchmark.presets import Preset

__all__ = ["ATTACKED", "aggregate_muse", "utility_curve"]

ATTACKED = (
    *("forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "extraction_strength", "exact_memorization"),
    *("memory_gap", "retain_knowmem_ROUGE"),
)
"""What is shown of an attack."""


def utility_curve(values: Sequence[float], before: float) -> dict[str, float]:
    """How retain KnowMem holds over folds of unlearning: growing forget sets (scalability) or requests in a row
    (sustainability).

    Args:
        values: retain KnowMem after fold 1, 2, …; MUSE plots exactly these.
        before: retain KnowMem of the model before unlearning, > 0.
    Returns:
        `fold_1`, `fold_2`, …: the values; `kept`: the last value / before; `worst`: the lowest value / before.
    """
    if not values:
        raise ValueError("a utility curve needs at least one fold")
    if not before > 0:
        raise ValueError(f"retain KnowMem before unlearning is {before}: nothing to keep")
    folds = {f"fold_{i}": float(v) for i, v in enumerate(values, start=1)}
    return folds | {"kept": values[-1] / before, "worst": min(values) / before}


def aggregate_muse(log: EvalLog, preset: Preset, retain: EvalLog | None = None, *, corpus: str = "") -> Aggregates:
    """All MUSE aggregates of one model: VerbMem, KnowMem, PrivLeak, ES, EM, the attacks' AUCs.

    Args:
        log: per-item values, from `read_eval_log` or from an evaluation.
        preset: the definitions.
        retain: the retrained model's log, for PrivLeak.
        corpus: `News` or `Books`: chooses the preset's published retain AUC when no retain log is given.
    Returns:
        `Aggregates` with open-unlearning's metric names; what the log cannot give is None, with its reason in `notes`.
    """
    said: list[str] = []
    if retain is not None:
        said = check_retain_log(log, retain, "forget_knowmem_ROUGE")
        if log.stamp.get("max_items") is not None:
            retain = retain.restricted_to(log)
    result = Aggregates(preset, fresh(log))
    result.compare_retain(said)
    for name in ("forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "retain_knowmem_ROUGE"):
        result.rouge(name, "rougeL_f1")
    for name in ("extraction_strength", "exact_memorization"):
        everything, column = result.log.items(name), result.log.column(name, "score")
        result.mean(name, column, len(everything) - len(column))
    result.attacks()
    result.fluency("forget_ngram_entropy", "forget_verbmem_ROUGE")
    result.classifier("forget_gibberish")
    reference = aggregate_muse(retain, preset, corpus=corpus) if retain is not None else None
    result.privleak(reference, corpus)
    _put_memory_gap(result, reference)
    for name in ("sustainability", "scalability"):
        result.put(name, None, f"needs the models of every fold (--{name} MODEL …)")
    put_attacks(
        result,
        retain,
        lambda own, other: aggregate_muse(own, preset, other, corpus=corpus),
        ATTACKED,
        ("retain_knowmem_ROUGE",),
    )
    for name in REQUIRED_KEYS:
        if name not in result.values:
            result.put(name, None, "a TOFU metric; MUSE has no perturbed answers")
    return result


def _put_memory_gap(result: Aggregates, reference: Aggregates | None) -> None:
    """`memory_gap`: how far VerbMem and KnowMem of the forget set lie above the retrained model's, the mean of the two
    (0 for one that does not), in [0, 1].

    Not a metric of MUSE: MUSE stops unlearning at the first epoch at which KnowMem is no longer above the retrained
    model's, and 0 says that of both. The mean rather than the larger one, so that an epoch that moves one of them
    counts. Epochs are selected by it (`fdiv.unlearning.selection`).
    """
    if reference is None:
        result.put("memory_gap", None, "needs the retrained model's log (--retain_logs)")
        return
    gaps = []
    for name in ("forget_verbmem_ROUGE", "forget_knowmem_ROUGE"):
        own, other = result.values[name], reference.values[name]
        if own is None or other is None:
            whose = result.notes[name] if own is None else f"the retain log: {reference.notes[name]}"
            result.put("memory_gap", None, f"needs {name}: {whose}")
            return
        gaps.append(max(0.0, own - other) / result.preset.rouge_scale)
    result.put("memory_gap", sum(gaps) / len(gaps))
