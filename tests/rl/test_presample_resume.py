"""Pre-sampling that is killed, or shared by two processes, gives what one undisturbed process gives."""

from __future__ import annotations

import json
import signal

import pytest

from fdiv.rl.dph.rehearsal import RehearsalCache
from fdiv.rl.presample.run import presample
from tests.support.processes import run, run_well
from tests.support.runs.presample import config, read_lines, settings, write_rows
from tests.support.scripts import presample as script


@pytest.fixture(scope="module")
def undisturbed(tiny_model_dir, tmp_path_factory):
    rows = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    presample(config(tiny_model_dir, rows), output)
    return rows, output


def same(one, other) -> None:
    for name in ("samples.jsonl", "verification.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    first, second = (RehearsalCache.load(folder / "rehearsal.safetensors") for folder in (one, other))
    assert first.rows == second.rows and first.header == second.header
    contents = [json.loads((folder / "partition.json").read_text()) for folder in (one, other)]
    assert contents[0]["counts"] == contents[1]["counts"] and contents[0]["prompts"] == contents[1]["prompts"]


def test_killed_in_the_middle_of_a_line_and_continued(tiny_model_dir, undisturbed, tmp_path):
    rows, expected = undisturbed
    output = tmp_path / "out"
    # 40 samples in 5 batches, then as many of rewards: killed while it writes the third, then the seventh.
    for kill_after, stored in ((2, {"samples": 16}), (4, {"samples": 40, "rewards": 8})):
        ended = run(script.main, settings(tiny_model_dir, rows), output, kill_after)
        assert ended.codes == [-signal.SIGKILL], ended.stderr[0][-2000:]
        for kind, count in stored.items():
            (file,) = output.glob(f"cache/{kind}-*/rank0.jsonl")
            whole, _, rest = file.read_text().rpartition("\n")
            assert len(whole.splitlines()) == count
        assert rest == '{"key": "0/0", "id'
        assert not (output / "partition.json").exists()
    presample(config(tiny_model_dir, rows), output)
    same(output, expected)
    assert len(read_lines(output / "samples.jsonl")) == 40


def test_two_processes_give_the_same(tiny_model_dir, undisturbed, tmp_path):
    rows, expected = undisturbed
    run_well(script.main, settings(tiny_model_dir, rows), tmp_path / "out", None, processes=2)
    same(tmp_path / "out", expected)
    assert {file.name for file in tmp_path.glob("out/cache/samples-*/*")} == {"rank0.jsonl", "rank1.jsonl"}
