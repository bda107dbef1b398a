"""Every row of every data path is read and checked alike: JSON lines, empty cells, ambiguous and repeated rows."""

import gzip
import json

import pytest
from datasets import Dataset

from fdiv.errors import DataError
from fdiv.eval.pass_at_k.data import load_tasks
from fdiv.eval.pass_at_k.records import read_counts
from fdiv.eval.preferences.command import _read as read_preferences
from fdiv.eval.tofu.data import load_rows, load_tofu_rows
from fdiv.files import folded, numbered_json_lines, read_json_lines
from fdiv.rows.loading import named_dataset
from fdiv.training.data_checks import check_preference_dataset
from fdiv.unlearning.data import load_rows as load_unlearning_rows
from fdiv.unlearning.data.rows import read_answers

TEXTS = ["Rosa\u2028Lima", "Rosa\u2029Lima", "Rosa\x85Lima", "Rosa\x0bLima", "Rosa\x0cLima", "Rosa\x1cLima", "王小明"]
READERS = {
    "files": read_json_lines,
    "tofu": lambda path: load_rows(str(path.parent), path.stem),
    "passk": lambda path: [{"prompt": t.prompt, "answer": t.answer} for t in load_tasks(str(path)).tasks],
    "training": lambda path: named_dataset(str(path))["train"].to_list(),
    "preferences": lambda path: read_preferences(path).to_list(),
    "unlearning": lambda path: load_unlearning_rows(str(path)).to_list(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_reader_takes_every_valid_file(reader, encoding, end, tmp_path):
    """Raw Unicode line ends in values, blank lines, a byte order mark, either line end: the rows come back."""
    rows = [{"prompt": f"{text}?", "answer": text} for text in TEXTS]
    # JSON forbids raw control characters below U+0020: these alone are escaped.
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "x.jsonl").write_bytes((end + end.join(lines) + end + end).encode(encoding))
    assert READERS[reader](tmp_path / "x.jsonl") == rows


@pytest.mark.parametrize("reader", READERS)
def test_a_broken_line_is_named(reader, tmp_path):
    """By its number, blank lines counted; nothing is said of a connection."""
    good = json.dumps({"prompt": "a", "answer": "b"})
    (tmp_path / "x.jsonl").write_text(f"{good}\n\n{good}\n{good[:-3]}\n{good}\n")
    with pytest.raises(DataError, match=r"x\.jsonl, line 4 is no JSON") as caught:
        READERS[reader](tmp_path / "x.jsonl")
    assert "connection" not in str(caught.value)


def test_arrays_compressed_files_and_wrong_encodings(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf\n[1,\n 2]")
    assert read_json_lines(tmp_path / "a.json") == [1, 2]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"a": 1}\n\n{"a": 2}\n')
    assert list(numbered_json_lines(tmp_path / "b.jsonl.gz")) == [(1, {"a": 1}), (3, {"a": 2})]
    (tmp_path / "c.jsonl").write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"c\.jsonl is not UTF-8 text"):
        named_dataset(str(tmp_path / "c.jsonl"))  # Arrow's reader takes such bytes, and fails where they become text
    with pytest.raises(DataError, match=r"c\.jsonl is not UTF-8 text"):
        read_json_lines(tmp_path / "c.jsonl")


def test_samples_with_a_byte_order_mark(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"task_id": "a", "num_samples": 4, "num_correct": 1}\n', encoding="utf-8-sig")
    assert read_counts(tmp_path / "s.jsonl").num_correct.tolist() == [1]


PAIR = {"prompt": "hi", "chosen": " good", "rejected": " bad"}


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("row", [0, 1, 6])
def test_an_empty_cell_is_named_wherever_it_stands(column, row):
    rows = [dict(PAIR) for _ in range(7)]
    rows[row][column] = None
    with pytest.raises(DataError, match=f"^the rows, row {row}: column '{column}' is null"):
        check_preference_dataset(Dataset.from_list(rows), "the rows")
    check_preference_dataset(Dataset.from_list([PAIR] * 7), "the rows")


@pytest.mark.parametrize("pair", [("question", "answer"), ("prompt", "completion")])
@pytest.mark.parametrize("side", [0, 1])
def test_an_empty_cell_of_unlearning_rows(pair, side):
    rows = [dict.fromkeys(pair, "text") for _ in range(4)]
    rows[3][pair[side]] = None
    with pytest.raises(ValueError, match=f"the forget rows, row 3: column '{pair[side]}' is null"):
        read_answers(Dataset.from_list(rows), prompt_format="Q: {question}", has_chat_template=True, what="forget")


def tofu_row(question, answer):
    return {"question": question, "answer": answer, "paraphrased_answer": "p", "perturbed_answer": ["x", "y"]}


SAME = [
    ("Who is José?", "A  poet."), ("who is josé?", "a poet."), ("Who is Jose\u0301?", "A poet."),
    ("Ｗho is José?", "A poet."), (" Who\u00a0is\tJosé?", "A poet.\n"), ("WHO IS JOSÉ?", "A POET."),
]  # fmt: skip


@pytest.mark.parametrize(("question", "answer"), SAME)
def test_a_forget_row_among_the_retain_rows_is_found(question, answer, tmp_path):
    """However its Unicode form, case and white space differ; another answer is another row."""

    def write(name, *rows):
        (tmp_path / f"{name}.json").write_text("".join(json.dumps(tofu_row(*row)) + "\n" for row in rows))

    write("forget01_perturbed", ("Who is José?", "A poet."))
    write("retain_perturbed", ("Another?", "Yes."), (question, answer))
    with pytest.raises(DataError, match="1 forget rows of forget01 stand in the retain set too"):
        load_tofu_rows("forget01", str(tmp_path))
    write("retain_perturbed", (question, answer + " No."))
    assert len(load_tofu_rows("forget01", str(tmp_path)).retain) == 1


def test_folded_is_stable():
    assert folded("Straße\u2003 ﬁn") == folded("STRASSE fin") == "strasse fin"
