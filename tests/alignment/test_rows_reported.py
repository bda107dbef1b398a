"""What became of the rows is printed: dropped, cut, without signal; pairs that all say the same twice are refused."""

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from fdiv.alignment.f_dpo.config import FDPOConfig
from fdiv.alignment.f_dpo.trainer import _report_rows
from fdiv.errors import DataError
from fdiv.training.data_checks import tokenize_preferences
from fdiv.training.row_report import RowReport

LONG = {"prompt": "word " * 50, "chosen": " good", "rejected": " bad"}
SHORT = {"prompt": "hi", "chosen": " good", "rejected": " bad"}
SAME = {"prompt": "hi", "chosen": " x" * 60 + " good", "rejected": " x" * 60 + " bad"}


def report(rows, tiny_model_dir, tmp_path, max_length):
    given = Dataset.from_list(rows)
    used = tokenize_preferences(given, AutoTokenizer.from_pretrained(tiny_model_dir), max_length=max_length)
    args = FDPOConfig(str(tmp_path), max_length=max_length, report_to="none", use_cpu=True, bf16=False)
    _report_rows(given, used, args)


@pytest.mark.parametrize("kept", [1, 7, 20])
def test_dropped_rows_are_counted(kept, tiny_model_dir, tmp_path, capsys):
    report([LONG] * (20 - kept) + [SHORT] * kept, tiny_model_dir, tmp_path, 32)
    said = "".join(capsys.readouterr())
    assert (f"{20 - kept} of 20 rows dropped: prompt fills max_length=32" in said) == (kept < 20)
    assert "cut" not in said and "identical" not in said


def test_pairs_without_signal_are_counted_and_refused_where_all_are(tiny_model_dir, tmp_path, capsys):
    report([SAME] * 3 + [SHORT], tiny_model_dir, tmp_path, 32)
    said = "".join(capsys.readouterr())
    assert "3 of 4 rows cut at max_length=32" in said and "3 of 4 pairs are identical after truncation" in said
    with pytest.raises(DataError, match="8 of 8 pairs are identical after truncation"):
        report([SAME] * 8, tiny_model_dir, tmp_path, 32)
    report([SAME] * 8, tiny_model_dir, tmp_path, None)  # whole, they differ


def test_nothing_is_said_of_rows_that_are_used_whole():
    assert RowReport("rows", 5, 5, max_length=10, longest=10).faults() == []
