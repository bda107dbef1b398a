"""TOFU's aggregates from per-item values: the same arithmetic for our own runs and for published logs."""

from __future__ import annotations

import numpy as np

from fdiv.errors import DataError
from fdiv.eval.benchmark.aggregation import Aggregates, check_retain_log, fresh
from fdiv.eval.benchmark.attacked.values import put_attacks
from fdiv.eval.benchmark.log import EvalLog
from fdiv.eval.benchmark.presets import Preset
from fdiv.eval.metrics import truth

__all__ = ["ATTACKED", "SETS", "UTILITY_PARTS", "aggregate_tofu"]

SETS = ("forget", "retain", "ra", "wf")
"""Row sets of a TOFU log: forget, retain, real authors, world facts."""

UTILITY_PARTS = tuple(
    f"{s}_{part}"
    for s in ("retain", "ra", "wf")
    for part in ("Q_A_Prob" if s == "retain" else "Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")
)
"""The nine parts of model utility."""

ATTACKED = (
    *("forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_truth_ratio", "forget_quality"),
    *("extraction_strength", "exact_memorization", "retain_Q_A_Prob"),
)
"""What is shown of an attack."""


def _truth_name(row_set: str) -> str:
    return "forget_truth_ratio" if row_set == "forget" else f"{row_set}_Truth_Ratio"


def _true_answers(log: EvalLog, row_set: str) -> str:
    """The metric whose losses stand for the true answer: the paraphrase, which RA and WF have in the authors' logs
    only (their plain answer, scored a second time in another batch)."""
    paraphrase = f"{row_set}_Q_A_PARA_Prob"
    return paraphrase if row_set in ("forget", "retain") or paraphrase in log.metrics else f"{row_set}_Q_A_Prob"


def _truth_ratios(
    log: EvalLog, row_set: str, preset: Preset, max_rows: int | None
) -> tuple[list[int], np.ndarray | None]:
    """Per-item truth ratios from the losses of the true (paraphrased where there is one) and perturbed answers."""
    true_name = _true_answers(log, row_set)
    correct = log.column(true_name, "avg_loss", max_rows=max_rows)
    wrong = log.column(f"{row_set}_Q_A_PERT_Prob", "avg_loss", max_rows=max_rows)
    if not correct or not wrong:
        return [], None
    if correct.keys() != wrong.keys():
        raise DataError(f"{log.source}: {true_name} and {row_set}_Q_A_PERT_Prob hold different rows")
    ratios = truth.truth_ratio(
        np.array(list(correct.values())),
        np.array(list(wrong.values())),
        mean=preset.truth_ratio_mean,
        epsilon=preset.epsilon,
    )
    return list(correct), ratios


def _put_truth_ratio(result: Aggregates, row_set: str, max_rows: int | None) -> np.ndarray | None:
    name, preset = _truth_name(row_set), result.preset
    rows, ratios = _truth_ratios(result.log, row_set, preset, max_rows)
    if ratios is None:
        stored = result.log.column(name, "score", max_rows=max_rows)
        if not stored or preset.name != result.log.preset:
            result.missing(name, f"the losses behind {name}")
            return None
        rows, ratios = list(stored), np.array(list(stored.values()))
    result.log.metrics[name] = {
        "value_by_index": {str(i): {"score": float(r)} for i, r in zip(rows, ratios, strict=True)}
    }
    value = truth.closer_to_one(ratios, preset.epsilon) if row_set == "forget" else truth.true_better(ratios)
    true_name = _true_answers(result.log, row_set)
    losses = result.log.column(true_name, "avg_loss", max_rows=max_rows)
    result.put(name, value, _underflow_note([float(truth.sequence_probability(x)) for x in losses.values()], preset))
    return ratios


def _underflow_note(probabilities: list[float], preset: Preset) -> str | None:
    """What became of true answers whose probability is too small to divide by."""
    tiny = sum(p == 0.0 or p < preset.epsilon for p in probabilities)
    if not tiny:
        return None
    answers = f"{tiny} of {len(probabilities)} true answers have a probability"
    if preset.epsilon:
        return f"{answers} below the {preset.epsilon:g} in the denominator, which then decides their ratio"
    return f"{answers} that underflows to 0; their ratio is formed from the losses, and bounded by e^709"


def _put_option_probability(result: Aggregates, row_set: str) -> None:
    name = f"{row_set}_Q_A_Prob_normalised"
    correct = result.log.column(f"{row_set}_Q_A_Prob", "prob")
    wrong = result.log.column(f"{row_set}_Q_A_PERT_Prob", "prob")
    if not correct or correct.keys() != wrong.keys():
        result.missing(name, f"{row_set}_Q_A_Prob and {row_set}_Q_A_PERT_Prob over the same rows")
        return
    true, false = np.array(list(correct.values())), np.array(list(wrong.values()))
    try:
        shares = truth.option_probability(true, false, result.preset.epsilon)
    except ValueError as error:  # 0/0
        result.put(name, None, str(error))
        return
    result.log.metrics[name] = {
        "value_by_index": {str(i): {"prob": float(s)} for i, s in zip(correct, shares, strict=True)}
    }
    result.put(name, float(shares.mean()))


def _put_utility(result: Aggregates) -> None:
    absent = [name for name in UTILITY_PARTS if result.values.get(name) is None]
    if absent:
        result.put("model_utility", None, f"needs {', '.join(absent)}: {result.notes[absent[0]]}")
    else:
        parts = {
            name: result.values[name] / (result.preset.rouge_scale if "ROUGE" in name else 1) for name in UTILITY_PARTS
        }
        result.put("model_utility", truth.model_utility(parts))


def _put_forget_quality(result: Aggregates, ratios: np.ndarray | None, retain: Aggregates | None) -> None:
    names = ("forget_quality", "forget_quality_ks_statistic")
    if ratios is None:
        reason = result.notes["forget_truth_ratio"]
    elif retain is None:
        reason = "no retain log was given (--retain_logs or --retain_model)"
    elif len(ratios) < 2:
        reason = "one forget row: a Kolmogorov-Smirnov test needs at least two"
    else:
        theirs = retain.log.column("forget_truth_ratio", "score")
        if not theirs:
            raise DataError(f"{retain.log.source}: the retain log has no truth ratios of the forget rows")
        quality = truth.forget_quality(ratios, np.array(list(theirs.values())))
        notes = [] if quality.method == "exact" else [f"p-value by scipy's method {quality.method}"]
        notes += [result.notes["forget_truth_ratio"]] if "forget_truth_ratio" in result.notes else []
        result.put(names[0], quality.p_value, "; ".join(notes) or None)
        result.values[names[1]] = quality.statistic
        return
    for name in names:
        result.put(name, None, reason)


def _put_retrained_distance(result: Aggregates, retain: Aggregates | None) -> None:
    """Mean over extraction strength and the Min-K AUC of |model − retain model|: ours, to select by where p-values
    are all alike."""
    if retain is None:
        result.put("retrained_distance", None, "no retain log was given (--retain_logs or --retain_model)")
        return
    names = ("extraction_strength", "mia_min_k")
    for side in (result, retain):
        for name in names:
            if side.values.get(name) is None:
                result.put("retrained_distance", None, f"needs {name}: {side.notes[name]}")
                return
    result.put("retrained_distance", sum(abs(result.values[name] - retain.values[name]) for name in names) / 2)


def aggregate_tofu(log: EvalLog, preset: Preset, retain: EvalLog | None = None) -> Aggregates:
    """All TOFU aggregates of one model.

    Args:
        log: per-item values, from `read_eval_log` or from an evaluation.
        preset: the definitions.
        retain: the retain model's log on the same rows, for forget quality and PrivLeak.
    Returns:
        `Aggregates` with open-unlearning's metric names; what the log cannot give is None, with its reason in `notes`.
    Raises:
        ValueError: the retain log is of another split or preset, or a per-item value is NaN or missing from its row.
    """
    said: list[str] = []
    if retain is not None:
        paraphrased = "forget_Q_A_PARA_Prob"
        said = check_retain_log(log, retain, paraphrased if paraphrased in log.metrics else "forget_Q_A_Prob")
        if log.stamp.get("max_items") is not None:
            retain = retain.restricted_to(log)
    result = Aggregates(preset, fresh(log))
    result.compare_retain(said)
    limit = preset.max_rows
    for row_set in SETS:
        rows = limit if row_set in ("forget", "retain") else None
        for kind in ("Prob", "PARA_Prob", "PERT_Prob"):
            name = f"{row_set}_Q_A_{kind}"
            if kind != "PARA_Prob" or row_set in ("forget", "retain") or name in log.metrics:
                result.mean(name, result.log.column(name, "prob", max_rows=rows))
        result.rouge(f"{row_set}_Q_A_ROUGE", "rougeL_recall", rows)
    for row_set in ("ra", "wf"):
        _put_option_probability(result, row_set)
        _put_truth_ratio(result, row_set, None)
    _put_truth_ratio(result, "retain", limit)
    ratios = _put_truth_ratio(result, "forget", limit)
    _put_utility(result)
    for name in ("extraction_strength", "exact_memorization"):
        everything, column = result.log.items(name, max_rows=limit), result.log.column(name, "score", max_rows=limit)
        result.mean(name, column, len(everything) - len(column))
    result.attacks(limit)
    for name in ("min_k", "min_k_plus_plus"):
        result.mean(f"forget_{name}", result.log.column(f"mia_{name}", "score", "forget", limit))
    result.fluency("forget_ngram_entropy", "forget_Q_A_ROUGE")
    result.classifier("forget_Q_A_gibberish")
    reference = aggregate_tofu(retain, preset) if retain is not None else None
    _put_forget_quality(result, ratios, reference)
    result.privleak(reference)
    _put_retrained_distance(result, reference)
    put_attacks(result, retain, lambda own, other: aggregate_tofu(own, preset, other), ATTACKED, ("retain_Q_A_Prob",))
    return result
