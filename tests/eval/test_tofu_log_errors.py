"""Bad logs: each gives an error that names the file and the fault, or a null that says why."""

import json
import math

import pytest

from fdiv.errors import DataError
from fdiv.eval.benchmark.log import EvalLog, read_eval_log, write_eval_log
from fdiv.eval.benchmark.presets import get_preset
from fdiv.eval.muse.aggregate import utility_curve
from fdiv.eval.tofu.aggregate import aggregate_tofu

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


def test_a_folder_in_place_of_a_log(tmp_path):
    with pytest.raises(DataError, match="cannot be read: Is a directory; give the "):
        read_eval_log(tmp_path, "tofu")


@pytest.mark.parametrize(
    "node, message",
    [
        ({"value_by_index": {"0": 3}}, "forget_Q_A_Prob, row 0 is '3', not an object"),
        ({"value_by_index": [1]}, "forget_Q_A_Prob, value_by_index is .* not an object"),
        ({"value_by_index": {"first": {"prob": 1}}}, "the row 'first' is not numbered"),
        ({"value_by_index": {"0": {"prob": "high"}}}, "row 0: prob is 'high', not a number"),
    ],
)
def test_rows_of_another_shape_are_named(tmp_path, node, message):
    (tmp_path / "log.json").write_text(json.dumps({"forget_Q_A_Prob": node}))
    with pytest.raises(DataError, match=message):
        aggregate_tofu(read_eval_log(tmp_path / "log.json", "tofu"), OPEN)


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
    assert "1 of 3 true answers have a probability that underflows to 0" in exact.notes["forget_truth_ratio"]


def test_a_ratio_beyond_float64_can_be_written_and_is_said_beside_forget_quality(tmp_path):
    """log R = 2000 − 1 > 709 for the second row: bounded, so that the log is JSON and serves as a retain log."""
    paper = get_preset("tofu_paper")
    log = make_log(losses=(1.0, 2000.0, 3.0), wrong=1.0, preset="tofu_paper")
    result = aggregate_tofu(log, paper, log)
    scores = result.log.column("forget_truth_ratio", "score")
    assert scores[1] == pytest.approx(math.exp(709.0)) and scores[0] == pytest.approx(1.0)
    assert result.values["forget_quality"] == 1.0
    assert "1 of 3 true answers have a probability that underflows" in result.notes["forget_quality"]
    write_eval_log(tmp_path / "log.json", result.log)
    assert "Infinity" not in (tmp_path / "log.json").read_text()


def test_options_that_all_underflow_are_null_with_the_reason():
    rows = {"0": {"prob": 0.0, "avg_loss": 900.0}}
    wrong = {"0": {"prob": [0.0, 0.0], "avg_loss": [900.0, 900.0]}}
    metrics = {"ra_Q_A_Prob": {"value_by_index": rows}, "ra_Q_A_PERT_Prob": {"value_by_index": wrong}}
    for preset, value in (("tofu_paper", None), ("open_unlearning", 0.0)):
        result = aggregate_tofu(EvalLog(metrics, "tofu", preset, "memory", {}), get_preset(preset))
        assert result.values["ra_Q_A_Prob_normalised"] == value
        assert (value is None) == ("underflows to 0" in result.notes.get("ra_Q_A_Prob_normalised", ""))


def test_attacks_on_single_texts_say_how_few_they_are():
    one = {"value_by_index": {"0": {"score": 1.0}}}
    log = EvalLog({"mia_min_k": {"forget": one, "holdout": one}}, "tofu", "open_unlearning", "memory", {})
    result = aggregate_tofu(log, OPEN)
    assert result.values["mia_min_k"] == 0.5
    assert result.notes["mia_min_k"] == "an AUC of 1 forget and 1 holdout text says next to nothing"
    assert result.notes["mia_min_k"] in result.notes["privleak"]


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


RAGGED = ([0.1], [0.1, 0.2, 0.3], [], 0.1, None)


@pytest.mark.parametrize("value", RAGGED, ids=str)
@pytest.mark.parametrize("row", ["0", "2"])
def test_rows_of_different_lengths_are_named(value, row):
    log = make_log()
    for node in ("forget_Q_A_PERT_Prob", "forget_Q_A_PARA_Prob"):
        log.metrics[node]["value_by_index"] = {str(i): {"prob": 0.5, "avg_loss": [0.1, 0.2]} for i in range(3)}
    log.metrics["forget_Q_A_PERT_Prob"]["value_by_index"][row]["avg_loss"] = value
    message = "hold different rows" if value is None else "row (1|2): avg_loss is .*, that of row 0 is "
    with pytest.raises(DataError, match=message):
        aggregate_tofu(log, OPEN)


@pytest.mark.parametrize("value", [True, "0.5", 10**400, float("inf"), {}, [None]], ids=lambda value: str(value)[:9])
def test_what_is_no_number_is_named(value):
    log = make_log()
    log.metrics["forget_Q_A_PARA_Prob"]["value_by_index"]["1"]["avg_loss"] = value
    with pytest.raises(DataError, match="forget_Q_A_PARA_Prob, row 1: avg_loss is "):
        aggregate_tofu(log, OPEN)
