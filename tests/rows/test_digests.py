"""Digests of rows: equal content, equal digest, whatever file it stood in; without the key they say nothing."""

import hashlib
import hmac
import json

import pytest
from datasets import Dataset

from fdiv.errors import DataError
from fdiv.rows.digests import canonical, data_digest, new_key, row_digest, row_digests
from fdiv.rows.loading import read_file
from fdiv.rows.sources import Source

KEY = bytes(range(32))
ROW = {"prompt": "Wer?", "completion": " Ich.", "n": 1}


def test_a_digest_is_an_hmac_of_the_row_in_one_order():
    text = '{"completion": " Ich.", "n": 1, "prompt": "Wer?"}'
    assert canonical(ROW) == text
    assert row_digest(ROW, KEY) == hmac.new(KEY, text.encode(), hashlib.sha256).hexdigest()[:24]
    assert row_digest(dict(reversed(ROW.items())), KEY) == row_digest(ROW, KEY)


@pytest.mark.parametrize(
    "other",
    [
        {**ROW, "n": 1.0},
        {**ROW, "note": None},
        {**ROW, "n": 1, "meta": None},
    ],
)
def test_what_a_table_adds_does_not_count(other):
    assert row_digest(other, KEY) == row_digest(ROW, KEY)


@pytest.mark.parametrize(
    "other",
    [
        {**ROW, "prompt": "wer?"},
        {**ROW, "prompt": "Wer ?"},
        {**ROW, "prompt": "Wer?\n"},
        {**ROW, "prompt": "Wer\u037e"},
        {**ROW, "n": 2},
        {**ROW, "n": "1"},
        {**ROW, "n": True},
        {**ROW, "note": ""},
        {"prompt": "Wer?", "completion": " Ich."},
    ],
)
def test_nothing_is_folded(other):
    if other.get("n") is True:  # JSON tells true from 1
        assert canonical(other) != canonical(ROW)
    assert row_digest(other, KEY) != row_digest(ROW, KEY)


def test_another_key_gives_other_digests():
    assert row_digest(ROW, new_key()) != row_digest(ROW, new_key())
    assert len(new_key()) == 32


def test_lone_surrogates_and_nested_values_have_digests():
    row = {"prompt": "\ud800", "messages": [{"role": "user", "content": "x", "tool_calls": None}, [1.5, None]]}
    assert canonical(row) == '{"messages": [{"content": "x", "role": "user"}, [1.5, null]], "prompt": "\ud800"}'
    assert len(row_digest(row, KEY)) == 24


def test_a_line_copied_from_the_data_is_found_though_the_tables_differ(tmp_path):
    rows = [
        {"prompt": "a", "completion": "b", "score": 1},
        {"prompt": "c", "completion": "d", "score": 2.5, "note": "x"},
        {"prompt": "e", "completion": "f"},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = row_digests(read_file(tmp_path / "data.jsonl"), KEY, Source("data"))
    for number, row in enumerate(rows):
        (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
        assert row_digests(read_file(tmp_path / "one.jsonl"), KEY, Source("one")) == [table[number]]


def test_a_row_that_is_no_text_is_named():
    with pytest.raises(DataError, match="rows, row 1: .*bytes.* need rows of text and numbers"):
        row_digests([{"a": "x"}, {"a": b"x"}], KEY, Source("rows"))


def test_removed_rows_count_in_the_data_by_their_places_alone():
    digests = [row_digest({"n": n}, KEY) for n in range(4)]
    other = [*digests[:2], row_digest({"n": 99}, KEY), digests[3]]
    assert data_digest(digests, (), KEY) != data_digest(other, (), KEY)
    assert data_digest(digests, {2}, KEY) == data_digest(other, {2}, KEY)
    assert data_digest(digests, {2}, KEY) != data_digest(digests, {1}, KEY)
    assert data_digest(digests, {2}, KEY) != data_digest([*digests[:2], digests[3]], (), KEY)
    assert data_digest(digests, {2}, KEY) != data_digest(list(reversed(digests)), {2}, KEY)


def test_times_that_a_table_reads_from_text_have_digests():
    rows = Dataset.from_list([{"when": "2024-01-02T03:04:05"}]).cast_column("when", _timestamp())
    assert len(row_digests(rows, KEY, Source("rows"))[0]) == 24


def _timestamp():
    from datasets import Value

    return Value("timestamp[s]")
