"""Bad logs: each gives an error that names the file and the fault, or a null that says why."""

import json

import pytest

from fdiv.eval.eval_log import EvalLog, read_eval_log
from fdiv.eval.muse_aggregate import utility_curve
from fdiv.eval.presets import get_preset
from fdiv.eval.tofu_aggregate import aggregate_tofu

OPEN = get_preset("open_unlearning")


def make_log(losses=(1.0, 2.0, 3.0), wrong=2.0, **stamp):
    rows = range(len(losses))
    probability = {str(i): {"prob": 0.5, "avg_loss": losses[i]} for i in rows}
    perturbed = {str(i): {"prob": [0.1, 0.2], "avg_loss": [wrong, wrong + i]} for i in rows}
    scores = {str(i): {"score": float(i)} for i in rows}
    metrics = {
        "forget_Q_A_PARA_Prob": {"value_by_index": probability},
        "forget_Q_A_PERT_Prob": {"value_by_index": perturbed},
        "mia_min_k": {"forget": {"value_by_index": scores}, "holdout": {"value_by_index": scores}},
    }
    return EvalLog(metrics, "tofu", stamp.pop("preset", "open_unlearning"), "memory", stamp)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"forget_quality": 0.1}', "aggregates only"),
        ('{"a": {"b": 1}}', "not an evaluation log"),
        ('{"eval_log_forget.json": {"avg_gt_loss": {}}}', "has no 'average_perturb_loss'"),
        ('{"forget_knowmem_ROUGE": {"value_by_index": {}}}', "a muse log; use `fdiv eval muse"),
    ],
)
def test_unusable_log_files(tmp_path, content, message):
    (tmp_path / "log.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_eval_log(tmp_path / "log.json", "tofu")


def test_nan_and_missing_fields_are_named():
    log = make_log(losses=(1.0, float("nan")))
    with pytest.raises(ValueError, match="forget_Q_A_PARA_Prob, row 1: avg_loss is NaN"):
        aggregate_tofu(log, OPEN)
    log = make_log()
    del log.metrics["forget_Q_A_PERT_Prob"]["value_by_index"]["2"]["avg_loss"]
    with pytest.raises(ValueError, match="forget_Q_A_PERT_Prob, row 2 has no 'avg_loss'"):
        aggregate_tofu(log, OPEN)


def test_rows_that_do_not_match_are_refused():
    log = make_log()
    del log.metrics["forget_Q_A_PERT_Prob"]["value_by_index"]["2"]
    with pytest.raises(ValueError, match="hold different rows"):
        aggregate_tofu(log, OPEN)


def test_one_row_has_no_forget_quality_and_says_so():
    result = aggregate_tofu(make_log(losses=(1.0,)), OPEN, make_log(losses=(2.0,)))
    assert result.values["forget_quality"] is None
    assert "at least two" in result.notes["forget_quality"]
    assert result.values["mia_min_k"] == 0.5  # one tie: counted, not assumed


def test_no_retain_log_never_passes_silently():
    result = aggregate_tofu(make_log(), OPEN)
    assert result.values["forget_quality"] is None
    assert "--retain_logs" in result.notes["forget_quality"]
    assert result.values["privleak_retain_auc"] == 0.5 and "ASSUMED" in result.notes["privleak"]
    authors = aggregate_tofu(make_log(preset="tofu_2024"), get_preset("tofu_2024"))
    assert authors.values["privleak"] is None and "no retain log" in authors.notes["privleak"]


def test_retain_log_without_the_needed_values_is_refused():
    retain = make_log()
    del retain.metrics["mia_min_k"]
    with pytest.raises(ValueError, match="no Min-K scores"):
        aggregate_tofu(make_log(), OPEN, retain)
    retain = make_log()
    del retain.metrics["forget_Q_A_PERT_Prob"]
    with pytest.raises(ValueError, match="no truth ratios"):
        aggregate_tofu(make_log(), OPEN, retain)


@pytest.mark.parametrize(
    "retain, message",
    [
        (make_log(losses=(1.0, 2.0)), "2 rows of forget_Q_A_PARA_Prob, the model's log has 3"),
        (make_log(split="forget05"), "made on split forget05"),
        (make_log(preset="tofu_paper"), "made with preset tofu_paper"),
        (make_log(split="forget10", forget_rows="aa"), "other forget rows"),
    ],
)
def test_retain_log_of_something_else(retain, message):
    with pytest.raises(ValueError, match=message):
        aggregate_tofu(make_log(split="forget10", forget_rows="bb"), OPEN, retain)


def test_underflow_is_counted_in_the_notes():
    result = aggregate_tofu(make_log(losses=(1.0, 900.0, 30.0), wrong=950.0), OPEN)
    assert result.values["forget_truth_ratio"] == 0.0
    assert "2 of 3 true answers have a probability below the 1e-10" in result.notes["forget_truth_ratio"]
    exact = aggregate_tofu(make_log(losses=(1.0, 900.0, 30.0), wrong=950.0), get_preset("tofu_paper"))
    assert exact.values["forget_truth_ratio"] == pytest.approx(0.0, abs=1e-15)


def test_everything_absent_is_null_with_a_reason():
    result = aggregate_tofu(make_log(), OPEN)
    for name, value in result.values.items():
        assert (value is None) <= bool(result.notes.get(name)), name
    assert json.dumps(result.values, allow_nan=False)


def test_utility_curve():
    curve = utility_curve([0.5, 0.4, 0.45], before=0.5)
    assert curve["fold_2"] == 0.4 and curve["kept"] == pytest.approx(0.9) and curve["worst"] == pytest.approx(0.8)
    with pytest.raises(ValueError, match="at least one fold"):
        utility_curve([], 0.5)
    with pytest.raises(ValueError, match="nothing to keep"):
        utility_curve([0.1], 0.0)
