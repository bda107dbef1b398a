"""Families of bad rows in every data path: the message names the file, the line and the column.

A path is a way from a JSON-lines file to rows that a trainer or an evaluation uses, a fault what one cell may hold.
"""

import json
from functools import partial

import pytest
from datasets import Dataset

from fdiv.alignment.d2o.data import check_negatives
from fdiv.errors import DataError
from fdiv.eval.muse.data import load_muse_rows
from fdiv.eval.pass_at_k.data import load_tasks
from fdiv.eval.tofu.data import load_tofu_rows
from fdiv.rl.presample.config import PresampleConfig
from fdiv.rl.presample.data import load_prompts
from fdiv.rows.loading import named_dataset, read_file
from fdiv.training.data_checks import check_preference_dataset, check_prompts
from fdiv.unlearning.data import load_rows
from fdiv.unlearning.data.rows import read_answers

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
PAIR = {"prompt": "hi", "chosen": " good", "rejected": " bad"}
CHAT_PAIR = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{**ASSISTANT, "content": "no"}]}
TOFU = {"question": "Who?", "answer": "Ada.", "paraphrased_answer": "It is Ada.", "perturbed_answer": ["Bob.", "Eve."]}


def read_tofu(path):
    folder = path.parent / "tofu"
    folder.mkdir()
    other = {**TOFU, "question": "Whom?"}
    for name in ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        (folder / f"{name}.json").write_text(json.dumps(other) + "\n")
    path.rename(folder / "forget01_perturbed.jsonl")
    load_tofu_rows("forget01", str(folder))


def read_muse(path):
    folder = path.parent / "muse" / "knowmem"
    folder.mkdir(parents=True)
    path.rename(folder / "forget_qa.jsonl")
    load_muse_rows("mine", str(folder.parent))


def read_presample(path):
    return load_prompts(PresampleConfig(model="m", dataset=str(path), reward="exact"))


def read_unlearning(path):
    read_answers(load_rows(str(path)), prompt_format="Q: {question}", has_chat_template=True, what="forget")


def in_folder(path):
    folder = path.parent / "folder"
    folder.mkdir()
    path.rename(folder / "train.jsonl")
    check_preference_dataset(named_dataset(str(folder))["train"], "train_dataset")


PROMPTS = partial(check_prompts, name="train_dataset", method="DPH")
PATHS = {
    "f_dpo": (lambda path: check_preference_dataset(read_file(path), "train_dataset"), PAIR, ("chosen", "rejected")),
    "f_dpo chat": (lambda path: check_preference_dataset(read_file(path), "x"), CHAT_PAIR, tuple(CHAT_PAIR)),
    "f_dpo folder": (in_folder, PAIR, ("chosen", "rejected")),
    "d2o": (
        lambda path: check_negatives(read_file(path), "train_dataset", 2),
        {"prompt": "hi", "rejected": " bad"},
        ("prompt", "rejected"),
    ),
    "prompts": (lambda path: PROMPTS(read_file(path)), {"prompt": "hi", "answer": "4"}, ("prompt",)),
    "prompts chat": (lambda path: PROMPTS(read_file(path)), {"prompt": [USER]}, ("prompt",)),
    "presample": (read_presample, {"prompt": "hi", "answer": "4"}, ("prompt",)),
    "unlearning questions": (read_unlearning, {"question": "Who?", "answer": "Ada."}, ("question", "answer")),
    "unlearning pairs": (read_unlearning, {"prompt": "Who?", "completion": " Ada."}, ("prompt", "completion")),
    "unlearning chat": (read_unlearning, {"prompt": [USER], "completion": [ASSISTANT]}, ("prompt", "completion")),
    "tofu": (read_tofu, TOFU, ("question", "answer", "paraphrased_answer")),
    "muse": (read_muse, {"question": "Who?", "answer": "Ada."}, ("question", "answer")),
    "passk": (lambda path: load_tasks(str(path)), {"prompt": "2+2", "answer": "4"}, ("prompt",)),
}
CELLS = [(path, column) for path, (_, _, columns) in PATHS.items() for column in columns]
FAULTS = {
    "null": None,
    "number": 3,
    "bool": True,
    "object": {"text": "hi"},
    "empty list": [],
    "list of texts": ["hi"],
    "unknown role": [{"role": "human", "content": "hi"}],
    "no role": [{"content": "hi"}],
    "no content": [{"role": "user"}],
    "number as content": [{"role": "user", "content": 3}],
}
BLANKS = {"empty": "", "blank": " \n\t"}


def write(path, rows):
    """With a blank line after the second row: lines and rows are counted apart."""
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")


def refused(tmp_path, path, column, value, line=7):
    read, good, _ = PATHS[path]
    rows = [{**good, "task_id": number} if path == "passk" else dict(good) for number in range(8)]
    rows[line - 2][column] = value
    file = tmp_path / "rows.jsonl"
    write(file, rows)
    with pytest.raises(ValueError) as caught:
        read(file)
    return str(caught.value)


@pytest.mark.parametrize(("path", "column"), CELLS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_cell_is_named_by_file_line_and_column(path, column, fault, tmp_path):
    message = refused(tmp_path, path, column, FAULTS[fault])
    assert ".jsonl, line 7" in message and repr(column) in message, message
    assert "\n" not in message and "connection" not in message


@pytest.mark.parametrize(("path", "column"), [cell for cell in CELLS if not cell[0].startswith("f_dpo")])
@pytest.mark.parametrize("blank", BLANKS)
def test_an_empty_cell_is_named(path, column, blank, tmp_path):
    text = BLANKS[blank]
    value = [{"role": ("user" if column == "prompt" else "assistant"), "content": text}] if "chat" in path else text
    message = refused(tmp_path, path, column, value)
    assert ".jsonl, line 7" in message and repr(column) in message and "is empty" in message, message


@pytest.mark.parametrize(("path", "column"), CELLS)
@pytest.mark.parametrize("line", [1, 4])
def test_a_missing_cell_is_named(path, column, line, tmp_path):
    """The first row is where columns are read off, so it is one case more."""
    read, good, _ = PATHS[path]
    rows = [{**good, "task_id": number} if path == "passk" else dict(good) for number in range(5)]
    del rows[{1: 0, 4: 2}[line]][column]
    file = tmp_path / "rows.jsonl"
    write(file, rows)
    with pytest.raises(ValueError) as caught:
        read(file)
    assert f".jsonl, line {line}" in str(caught.value) and repr(column) in str(caught.value)


@pytest.mark.parametrize("path", PATHS)
def test_good_rows_pass(path, tmp_path):
    read, good, _ = PATHS[path]
    write(tmp_path / "rows.jsonl", [{**good, "task_id": n} if path == "passk" else good for n in range(8)])
    read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("end", ["assistant", "model"])
def test_a_prompt_that_ends_with_an_answer_is_refused(end, tmp_path):
    rows = Dataset.from_list([{"prompt": [USER]}, {"prompt": [USER, {"role": end, "content": "hello"}]}])
    with pytest.raises(DataError, match=f"train_dataset, row 1: column 'prompt' ends with a message of the {end}"):
        PROMPTS(rows)


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_an_answer_that_ends_with_a_question_is_refused(column):
    rows = [dict(CHAT_PAIR), {**CHAT_PAIR, column: [ASSISTANT, USER]}]
    with pytest.raises(DataError, match=f"row 1: column '{column}' ends with a message of the user"):
        check_preference_dataset(Dataset.from_list(rows), "train_dataset")


AMBIGUOUS = [
    ("f_dpo", {"text": "x"}), ("f_dpo", {"messages": [USER]}), ("f_dpo", {"completion": "x"}),
    ("d2o", {"text": "x"}), ("d2o", {"messages": [USER]}),
    ("prompts", {"text": "x"}), ("prompts", {"messages": [USER]}),
    ("presample", {"messages": [USER]}),
    ("unlearning questions", {"text": "x"}), ("unlearning questions", {"prompt": "x", "completion": "y"}),
    ("unlearning questions", {"messages": [USER]}),
    ("unlearning pairs", {"text": "x"}), ("unlearning pairs", {"messages": [USER]}),
    ("unlearning pairs", {"question": "x", "answer": "y"}),
    ("tofu", {"text": "x"}), ("tofu", {"messages": [USER]}), ("tofu", {"prompt": "x", "completion": "y"}),
    ("muse", {"text": "x"}), ("muse", {"prompt": "x", "completion": "y"}),
    ("passk", {"messages": [USER]}), ("passk", {"text": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "beside"), AMBIGUOUS)
def test_rows_in_two_formats_are_refused(path, beside, tmp_path):
    read, good, _ = PATHS[path]
    rows = [{**good, **beside} | ({"task_id": n} if path == "passk" else {}) for n in range(3)]
    write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match="beside .*unclear which is meant") as caught:
        read(tmp_path / "rows.jsonl")
    assert ".jsonl" in str(caught.value) and f"`{next(iter(beside))}`" in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_other_files_name_their_rows(suffix, tmp_path):
    """CSV by its lines (the header is the first, a quoted cell may span two), the others by the row's number."""
    path = tmp_path / f"rows.{suffix}"
    rows = [dict(PAIR) for _ in range(4)]
    rows[1]["chosen"] = "two\nlines"
    rows[3]["rejected"] = None
    if suffix == "csv":
        Dataset.from_list(rows).to_csv(str(path))
    elif suffix == "parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text(json.dumps(rows, indent=1))
    place = "line 6" if suffix == "csv" else "row 3"
    with pytest.raises(DataError, match=rf"rows\.{suffix}, {place}: column 'rejected' is null"):
        check_preference_dataset(read_file(path), "train_dataset")


def test_a_log_z_that_is_no_number_is_named(tmp_path):
    from fdiv.alignment.f_dpg.data import _log_z_fault

    for value in (None, "3", float("nan"), float("inf"), True):
        assert _log_z_fault(value)
    assert _log_z_fault(-3) is None and _log_z_fault(0.5) is None


@pytest.mark.parametrize("gold", [None, "", " "])
def test_missing_golds_are_named(gold, tmp_path):
    class Reward:
        gold_columns = ("answer",)

        def __call__(self, prompts, completions, **columns):
            return [0.0] * len(completions)

    config = PresampleConfig(model="m", dataset=str(tmp_path / "rows.jsonl"), reward="exact")
    write(tmp_path / "rows.jsonl", [{"prompt": "2+2", "answer": "4"}] * 3 + [{"prompt": "3", "answer": gold}])
    with pytest.raises(DataError, match=r"rows\.jsonl, line 5: column 'answer' is (null|empty)"):
        load_prompts(config, Reward())
    write(tmp_path / "rows.jsonl", [{"prompt": "2+2", "gold": "4"}] * 3)
    with pytest.raises(DataError, match=r"has no column 'answer'; it has: prompt, gold"):
        load_prompts(config, Reward())

    def named(prompts, completions, answer, **columns):
        return [0.0]

    with pytest.raises(DataError, match="has no column 'answer'"):
        load_prompts(config, named)


@pytest.mark.parametrize("value", [None, 3, ["a"], [USER]])
def test_raw_texts_are_texts(value, tmp_path, tiny_model_dir):
    from transformers import AutoTokenizer

    from fdiv.unlearning import GradAscentConfig
    from fdiv.unlearning.data.assembly import build_forget_dataset

    write(tmp_path / "rows.jsonl", [{"text": "one two three"}] * 4 + [{"text": value}])
    args = GradAscentConfig(str(tmp_path), max_length=16, report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 6: column 'text' is "):
        rows = load_rows(str(tmp_path / "rows.jsonl"))
        build_forget_dataset(rows, [], args, AutoTokenizer.from_pretrained(tiny_model_dir))


@pytest.mark.parametrize("nested", [False, True])
def test_a_broken_line_inside_a_folder_is_named(nested, tmp_path):
    folder = tmp_path / "folder" / "data" if nested else tmp_path / "folder"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR)[:-4] + "\n")
    with pytest.raises(DataError, match=r"train\.jsonl, line 2 is no JSON") as caught:
        named_dataset(str(tmp_path / "folder"))
    assert "connection" not in str(caught.value)


def test_rows_of_a_stream_are_checked_as_they_are_read(tmp_path):
    write(tmp_path / "rows.jsonl", [dict(PAIR) for _ in range(5)] + [{**PAIR, "chosen": None}])
    stream = check_preference_dataset(read_file(tmp_path / "rows.jsonl", streaming=True), "train_dataset")
    rows = iter(stream)
    assert [next(rows)["chosen"] for _ in range(5)] == [" good"] * 5
    with pytest.raises(DataError, match=r"rows\.jsonl, line 7: column 'chosen' is null"):
        next(rows)


BENCHMARKS = {
    "gsm8k": ("test.jsonl", {"question": "2+2?", "answer": "Add.\n#### 4"}, ("question", "answer")),
    "math500": ("test.jsonl", {"problem": "2+2?", "answer": "4", "unique_id": "a"}, ("problem", "answer")),
    "aime24": ("test.jsonl", {"problem": "2+2?", "answer": 4, "id": 3}, ("problem", "answer")),
    "olympiadbench": (
        "test.jsonl",
        {"question": "2+2?", "final_answer": ["4"], "id": 3},
        ("question", "final_answer"),
    ),
    "svamp": (
        "test.jsonl",
        {"Body": "Two.", "Question": "Plus two?", "Answer": 4.0, "ID": "x"},
        ("Body", "Question", "Answer"),
    ),
    "humaneval": (
        "HumanEval.jsonl",
        {
            "task_id": "H/1",
            "prompt": "def f():",
            "canonical_solution": " return 1",
            "test": "check",
            "entry_point": "f",
        },
        ("prompt", "canonical_solution", "test", "entry_point"),
    ),
}


@pytest.mark.parametrize(
    ("name", "column"), [(name, one) for name, (_, _, all_) in BENCHMARKS.items() for one in all_]
)
@pytest.mark.parametrize("value", [None, "  ", {"a": 1}, [], True])
def test_cells_of_benchmarks_are_named(name, column, value, tmp_path):
    file, row, _ = BENCHMARKS[name]
    names = ("unique_id", "id", "ID", "task_id")
    rows = [{**row, **{key: f"x{number}" for key in names if key in row}} for number in range(4)]
    write(tmp_path / file, rows)
    assert len(load_tasks(name, str(tmp_path)).tasks) == 4
    rows[3][column] = value
    write(tmp_path / file, rows)
    with pytest.raises(DataError, match=rf"{file}, line 5: (column|no column) '{column}'"):
        load_tasks(name, str(tmp_path))
