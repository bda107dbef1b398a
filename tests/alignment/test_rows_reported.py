"""What became of the rows is printed: dropped, cut, without signal; pairs that all say the same twice are refused."""

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from fdiv.errors import DataError
from fdiv.rows.report import RowReport, faults_of, records_of
from fdiv.training.data_checks import preference_report, tokenize_preferences

LONG = {"prompt": "word " * 50, "chosen": " good", "rejected": " bad"}
SHORT = {"prompt": "hi", "chosen": " good", "rejected": " bad"}
SAME = {"prompt": "hi", "chosen": " x" * 60 + " good", "rejected": " x" * 60 + " bad"}


def report(rows, tiny_model_dir, max_length, min_used_fraction=0.5):
    given = Dataset.from_list(rows)
    used = tokenize_preferences(given, AutoTokenizer.from_pretrained(tiny_model_dir), max_length=max_length)
    found = preference_report(len(given), used, max_length, "training rows")
    found.check(min_used_fraction)
    return found


@pytest.mark.parametrize("kept", [1, 7, 10, 20])
def test_dropped_rows_are_counted(kept, tiny_model_dir):
    rows = [LONG] * (20 - kept) + [SHORT] * kept
    found = report(rows, tiny_model_dir, 32, min_used_fraction=0)
    assert (found.read, found.used, found.cut) == (20, kept, 0)
    why = {"prompt fills max_length=32": 20 - kept} if kept < 20 else {}
    assert found.record()["dropped"] == why
    if kept < 10:
        with pytest.raises(
            DataError, match=f"{20 - kept} of 20 rows dropped: prompt fills max_length=32.*lower min_used"
        ):
            report(rows, tiny_model_dir, 32)
    else:
        report(rows, tiny_model_dir, 32)


def test_pairs_without_signal_are_counted_and_refused_where_all_are(tiny_model_dir):
    found = report([SAME] * 3 + [SHORT] * 3, tiny_model_dir, 32)
    said = found.line()
    assert "3 of 6 rows cut at max_length=32" in said and "3 of 6 pairs are identical after truncation" in said
    assert found.left == 3 and found.longest > 100
    with pytest.raises(DataError, match="3 of 4 pairs are identical after truncation"):
        report([SAME] * 3 + [SHORT], tiny_model_dir, 32)
    with pytest.raises(DataError, match="8 of 8 pairs are identical after truncation"):
        report([SAME] * 8, tiny_model_dir, 32, min_used_fraction=0)
    report([SAME] * 8, tiny_model_dir, None)  # whole, they differ


def test_an_answer_that_is_no_more_than_its_end_is_counted(tiny_model_dir):
    rows = [SHORT] * 3 + [{**SHORT, "chosen": ""}]
    assert report(rows, tiny_model_dir, 32).record()["without_signal"] == {"without a chosen or a rejected answer": 1}


@pytest.mark.parametrize("keep_end", [False, True])
def test_what_every_row_loses_is_said(keep_end, tiny_model_dir):
    rows = Dataset.from_list([LONG | {"prompt": "word " * 20}] * 3)
    used = tokenize_preferences(rows, AutoTokenizer.from_pretrained(tiny_model_dir))
    found = preference_report(3, used, 16, "rows", keep_end=keep_end)
    lost = "every row loses its beginning" if keep_end else "every answer loses its end, so none teaches where to stop"
    assert found.cut == 3 and lost in found.line()


def test_nothing_is_said_of_rows_that_are_used_whole():
    report = RowReport("rows", 5, max_length=10, longest=10)
    assert report.faults() == [] and report.line() == "rows: 5 read, 5 used, longest 10 tokens"
    report.check(1.0)


def test_rows_left_out_on_request_are_no_fault():
    report = RowReport("rows", 100, left_out=90, dropped={"bad": 5})
    assert (report.used, report.left) == (5, 5)
    report.check(0.5)
    with pytest.raises(DataError, match="rows: 5 of 10 rows are left"):
        report.check(0.6)
    assert RowReport.of_record("rows", report.record()) == report
    whole = RowReport("whole", 3)
    assert faults_of(records_of([report, whole])) == [("rows", "5 of 100 rows dropped: bad")]
    for damaged in (5, [], None, {"rows": 5}, {"rows": {"read": "x", "cut": 3}}, {"rows": {"dropped": 1}}):
        assert faults_of(damaged)
