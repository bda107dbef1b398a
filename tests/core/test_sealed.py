"""Damage to every kind of record and cache is named when it is read: flipped bits, cuts, additions, swapped lines."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from fdiv.alignment.d2o.anchors import Anchor, AnchorCache
from fdiv.errors import DataError, FdivError
from fdiv.eval.benchmark.log import EvalLog, read_eval_log, write_eval_log
from fdiv.eval.pass_at_k.evaluation import write_samples
from fdiv.eval.pass_at_k.records import read_counts
from fdiv.inference.cache import ItemCache
from fdiv.report.records import read_records
from fdiv.rl.dph.rehearsal import RehearsalCache, RehearsalHeader, RehearsalRow
from fdiv.rl.presample.output import check_outputs, write_rows
from fdiv.run.data import named_dataset
from fdiv.run.directory import RunDirectory
from fdiv.sealed import (
    DIGEST,
    LISTING,
    UNSEALED,
    SealedLines,
    check_listed,
    file_digest,
    forget_listed,
    listed,
    read_record,
    sealed,
    sealed_line,
    write_record,
)
from fdiv.training.rollouts import RecordedRollouts

ROWS = [
    RehearsalRow("What is 1 + 1?", [5, 6, 7], [8, 9], [-0.5, -0.25], 0),
    RehearsalRow([{"role": "user", "content": "Zwei · 二"}], [1], [300, 2, 301], [0.0, -1e-3, -20.0], 3),
]
HEADER = RehearsalHeader("vocabulary", "weights", 0.7, "a model", {"n": 4}, vocab_size=302)
SAMPLES = [
    {"task_id": task, "sample": number, "completion": f"{task} {number}", "correct": (task + number) % 2 == 0}
    for task in range(2)
    for number in range(2)
]


@dataclass(frozen=True)
class Kind:
    """One kind of file: `write` makes it in an empty folder and returns it, `read` reads it as its users do."""

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    lines: bool = False
    growing: bool = False
    """Whether a last line without its end is left out, as what a kill leaves."""


def rehearsal(folder: Path) -> Path:
    RehearsalCache(HEADER, ROWS).save(folder / "rehearsal.safetensors")
    return folder / "rehearsal.safetensors"


def anchors(folder: Path) -> Path:
    path = folder / "anchors.jsonl"
    AnchorCache(path, SETTINGS).add({"a": [Anchor([1, 2], -3.5, None)], "b": [Anchor([3], None, 0.5)]})
    return path


SETTINGS = {"temperature": 1.0, "start_model": "abc"}


def items(folder: Path) -> Path:
    ItemCache(folder, "scores", "x").add([{"key": str(i), "avg_loss": i / 3, "is_top1": [1, 0]} for i in range(3)])
    return folder / "scores-x" / "rank0.jsonl"


def read_items(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    try:
        return ItemCache(path.parents[1], "scores", "x").items
    finally:
        path.write_bytes(content)


def rollouts(folder: Path) -> Path:
    records = [
        {"prompt": "p", "sample": i, "prompt_ids": [1], "completion_ids": [2, i], "logprobs": [-1.0, -0.5]}
        for i in range(3)
    ]
    (folder / "r.jsonl").write_text("".join(map(sealed_line, records)))
    return folder / "r.jsonl"


def log(folder: Path) -> Path:
    rows = {"value_by_index": {str(i): {"prob": 0.5, "avg_loss": 0.69} for i in range(4)}}
    stamp = {"split": "forget10", "dtype": "torch.float32"}
    write_eval_log(
        folder / "TOFU_EVAL.json", EvalLog({"forget_Q_A_PARA_Prob": rows}, "tofu", "open_unlearning", "x", stamp)
    )
    return folder / "TOFU_EVAL.json"


def samples(folder: Path) -> Path:
    write_samples(folder / "samples.jsonl", SAMPLES, {"temperature": 1.0})
    return folder / "samples.jsonl"


def run(folder: Path) -> Path:
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "loss": 1 / (i + 1)}) + "\n" for i in range(3))
    )
    (folder / "recipe_resolved.yaml").write_text("beta: 0.1\n")
    write_record(folder / "environment.json", {"seed": 0})
    settings = {"recipe": "r", "method": "f_dpo", "divergence": "reverse_kl", "seed": 0}
    RunDirectory(folder).finish({**settings, "steps": 3, "train_seconds": 0.5, "after/loss": 0.25})
    return folder / "result.json"


def sweep(folder: Path) -> Path:
    cells = [{"name": "a", "settings": {"beta": 0.1}, "status": "failed"}]
    rest = {"recipe": "r", "command": "fdiv sweep r", "aggregate": [], "seeds": [], "columns": []}
    write_record(folder / "results.json", {"cells": cells, **rest})
    return folder / "results.json"


def read_run(path: Path) -> Any:
    runs, _ = read_records([path.parent])
    return runs[0].result, runs[0].history, runs[0].recipe, runs[0].environment


def beside(name: str) -> Callable[[Path], Path]:
    return lambda folder: run(folder).with_name(name)


def presampled(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        with listed(*(folder / n for n in ("samples.jsonl", "verification.jsonl", "explore.parquet"))):
            for lines in ("samples.jsonl", "verification.jsonl"):
                (folder / lines).write_text("".join(json.dumps(row) + "\n" for row in SAMPLES))
            write_rows(folder / "explore.parquet", datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}]))
        rehearsal(folder)
        return folder / name

    return write


def read_presampled(path: Path) -> Any:
    return check_outputs(path.parent)


KINDS = {
    "record": Kind(sweep, lambda path: read_record(path, "do it again")),
    "sweep": Kind(sweep, lambda path: read_records([path])[1][0].results),
    "run": Kind(run, read_run),
    "environment": Kind(beside("environment.json"), read_run),
    "metrics": Kind(beside("metrics.jsonl"), read_run, lines=True),
    "recipe": Kind(beside("recipe_resolved.yaml"), read_run),
    "listing": Kind(beside(LISTING), read_run),
    "log": Kind(log, lambda path: read_eval_log(path).metrics),
    "rehearsal": Kind(rehearsal, lambda path: (RehearsalCache.load(path).rows, RehearsalCache.load(path).header)),
    "anchors": Kind(anchors, lambda path: AnchorCache(path, SETTINGS)._groups, lines=True),
    "items": Kind(items, read_items, lines=True, growing=True),
    "rollouts": Kind(rollouts, lambda path: dict(RecordedRollouts(path)._samples), lines=True, growing=True),
    "samples": Kind(samples, lambda path: read_counts(path).correct or read_counts(path).num_correct.tolist(), True),
    "presampled samples": Kind(presampled("samples.jsonl"), read_presampled, lines=True),
    "verification": Kind(presampled("verification.jsonl"), read_presampled, lines=True),
    "explore": Kind(presampled("explore.parquet"), read_presampled),
    "rehearsed": Kind(presampled("rehearsal.safetensors"), read_presampled),
}


def outcome(kind: Kind, path: Path) -> Any:
    """What reading gives; the message of an error that names the file (or the file that lists it)."""
    try:
        return kind.read(path)
    except FdivError as error:
        message = str(error)
        assert str(path) in message or str(path.with_name(LISTING)) in message, message
        assert len(message.splitlines()) == 1 and len(message) < 600
        return message


def without_effect(kind: Kind, found: Any, whole: Any) -> bool:
    """Of a file that grows, fewer entries may be left, each as it was written: the rest is computed again."""
    if found == whole:
        return True
    if not kind.growing or isinstance(found, str):
        return False
    if "p" in whole:  # rollouts, by prompt and number
        found, whole = found.get("p", {}), whole["p"]
    return found.items() <= whole.items()


@pytest.mark.parametrize("name", KINDS)
def test_single_flipped_bits(name, tmp_path):
    """Positions over all bytes; either the file is refused by its name, or nothing comes of it."""
    kind = KINDS[name]
    path = kind.write(tmp_path)
    content, whole = path.read_bytes(), kind.read(path)
    bits = 8 * len(content)
    chosen = range(bits) if bits <= 300 else random.Random(0).sample(range(bits), 300)
    refused = 0
    for bit in chosen:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found = outcome(kind, path)
        assert isinstance(found, str) or without_effect(kind, found, whole), (bit, bytes(flipped))
        refused += isinstance(found, str)
    # Of a file that grows, the end of its last line may be lost: that item is computed again.
    assert refused >= len(chosen) - 8
    path.write_bytes(content)
    assert kind.read(path) == whole


@pytest.mark.parametrize("name", KINDS)
def test_cut_files(name, tmp_path):
    kind = KINDS[name]
    path = kind.write(tmp_path)
    content, whole = path.read_bytes(), kind.read(path)
    for size in {0, 1, len(content) // 3, len(content) // 2, len(content) - 40, len(content) - 2, len(content) - 1}:
        path.write_bytes(content[: max(size, 0)])
        found = outcome(kind, path)
        assert isinstance(found, str) or (kind.growing and without_effect(kind, found, whole)), size


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("added", [b"x", b"\n", b'{"key": "9"}\n', b'{"half": ', bytes(64)])
def test_additions(name, added, tmp_path):
    kind = KINDS[name]
    path = kind.write(tmp_path)
    content, whole = path.read_bytes(), kind.read(path)
    path.write_bytes(content + added)
    found = outcome(kind, path)
    assert isinstance(found, str) or (kind.growing and without_effect(kind, found, whole))


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.lines])
def test_swapped_repeated_and_missing_lines(name, tmp_path):
    """Lines that hold their own digests are one by one what they were: their order and number say nothing."""
    kind = KINDS[name]
    path = kind.write(tmp_path)
    lines, whole = path.read_bytes().splitlines(keepends=True), kind.read(path)
    for changed in ([*lines[:-2], lines[-1], lines[-2]], [*lines, lines[-1]], [*lines[:-2], lines[-1]]):
        path.write_bytes(b"".join(changed))
        found = outcome(kind, path)
        assert isinstance(found, str) or (kind.growing and without_effect(kind, found, whole))


# ---------------------------------------------------------------- token ids
@pytest.mark.parametrize("wrong", [-1, 302, 2_000_000_000])
@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids"])
def test_token_ids_of_a_rehearsal_cache_lie_in_the_vocabulary(wrong, column, tmp_path):
    ids = list(getattr(ROWS[1], column))
    ids[-1] = wrong
    rows = [ROWS[0], ROWS[1]._replace(**{column: ids})]
    with pytest.raises(DataError, match=f"row 1, {column}: token {len(ids) - 1} is {wrong}, .* from 0 to 301"):
        RehearsalCache(HEADER, rows)
    path, tensors = rehearsal(tmp_path), load_file(rehearsal(tmp_path))
    tensors[column][-1] = wrong
    header = json.dumps({"format": 1, "tokenizer": "t", "model": "m", "temperature": 0.7, "vocab_size": 302})
    save_file(tensors, path, metadata={"fdiv_rehearsal": header})  # a cache of before, without a digest
    with pytest.raises(DataError, match=f"{path}.*token {len(ids) - 1} is {wrong}"):
        RehearsalCache.load(path)


def test_token_ids_are_compared_with_the_model_that_is_trained(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    size = model.config.vocab_size
    header = RehearsalHeader("t", "m", 1.0)  # of before: it does not say how many ids there are
    cache = RehearsalCache(header, [RehearsalRow("p", [1], [size], [-1.0], 0)])
    with pytest.raises(DataError, match=f"token 0 is {size}, .* from 0 to {size - 1}"):
        cache.check(model=model)


@pytest.mark.parametrize("wrong", [-1, 10, True, 1.5, "1", None])
def test_token_ids_of_anchors_lie_in_the_vocabulary(wrong, tmp_path):
    path = tmp_path / "anchors.jsonl"
    AnchorCache(path, SETTINGS).add({"a": [Anchor([1, wrong])]})
    with pytest.raises(DataError, match=f"{path}, prompt a: token 1 is {wrong}, .* from 0 to 9"):
        AnchorCache(path, SETTINGS, vocab_size=10)


# ---------------------------------------------------------------- files of before, and files that are written again
def test_files_without_a_digest_are_read_and_it_is_said(tmp_path, capsys):
    for write, read in ((log, read_eval_log), (run, read_run), (sweep, read_run)):
        folder = tmp_path / write.__name__
        folder.mkdir()
        path = write(folder)
        content = json.loads(path.read_text())
        content.get("fdiv", content).pop(DIGEST)
        path.write_text(json.dumps(content))
        (folder / LISTING).unlink(missing_ok=True)
        if write is log:
            assert read(path).checked is False
        elif write is run:
            assert read(path)[0]["after/loss"] == 0.25
            said = capsys.readouterr().err.splitlines()
            names = ("result.json", "recipe_resolved.yaml", "metrics.jsonl")
            assert said == [f"{folder / name}: no digest: not checked" for name in names]
        else:
            assert read_records([path])[1][0].results["aggregate"] == []
            assert f"{path}: no digest: not checked" in capsys.readouterr().err


def test_a_rehearsal_cache_without_a_digest_is_read_and_it_is_said(tmp_path, capsys):
    path, tensors = rehearsal(tmp_path), load_file(rehearsal(tmp_path))
    header = json.dumps({"format": 1, "tokenizer": "vocabulary", "model": "weights", "temperature": 0.7})
    save_file(tensors, path, metadata={"fdiv_rehearsal": header})
    assert RehearsalCache.load(path)[0].completion_ids == [8, 9]
    assert f"{path}: no digest: not checked" in capsys.readouterr().err
    save_file({**tensors, "index": torch.tensor([0])}, path, metadata={"fdiv_rehearsal": header, DIGEST: UNSEALED})
    with pytest.raises(DataError, match="does not agree with its digest"):
        RehearsalCache.load(path)


def test_items_without_digests_are_computed_again(tmp_path, capsys):
    path = items(tmp_path)
    path.write_text("".join(json.dumps({"key": str(i), "avg_loss": 0.5}) + "\n" for i in range(2)))
    cache = ItemCache(tmp_path, "scores", "x")
    assert cache.items == {} and "its 2 items are evaluated again" in capsys.readouterr().err
    cache.add([{"key": "0", "avg_loss": 0.25}])
    assert ItemCache(tmp_path, "scores", "x").items == {"0": {"key": "0", "avg_loss": 0.25}}


def test_anchors_of_the_format_before_are_read_and_it_is_said(tmp_path):
    path = tmp_path / "anchors.jsonl"
    group = {"prompt": "a", "anchors": [{"completion_ids": [1, 2], "log_prob": -1.0, "harmfulness": None}]}
    path.write_text(json.dumps({"fdiv_anchors": 2, **SETTINGS}) + "\n" + json.dumps(group) + "\n")
    cache = AnchorCache(path, SETTINGS)
    assert cache._groups == {"a": [Anchor([1, 2], -1.0, None)]}
    assert cache.notes == [f"{path}: no digest: not checked"]
    cache.add({})
    assert json.loads(path.read_text().splitlines()[0])["fdiv_anchors"] == 3


def test_a_line_cut_by_a_kill_is_left_out_and_said(tmp_path, capsys):
    path = items(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "9", "avg')
    cache = ItemCache(tmp_path, "scores", "x")
    assert set(cache.items) == {"0", "1", "2"} and "its last line was cut off" in capsys.readouterr().err
    cache.add([{"key": "9"}])
    assert path.read_bytes() == whole + sealed_line({"key": "9"}).encode()


def test_the_log_of_an_unfinished_run_may_end_within_a_line(tmp_path, capsys):
    run(tmp_path)
    (tmp_path / "result.json").unlink()
    forget_listed(tmp_path / "metrics.jsonl")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    (found,), _ = read_records([tmp_path])
    assert [entry["step"] for entry in found.history] == [0, 1, 2]
    assert "its last line was cut off" in capsys.readouterr().err


def test_a_file_that_is_written_again_is_listed_again(tmp_path):
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    other.write_text("b")
    with listed(other):
        pass
    with listed(path, made_with={"x": 1}):
        path.write_text("one")
    assert check_listed(path) == {"x": 1} and check_listed(other) == {}
    with pytest.raises(KeyboardInterrupt), listed(path):
        path.write_text("tw")
        raise KeyboardInterrupt  # a kill within: the file is not listed, so its remains are no damage
    assert check_listed(path) is None and check_listed(other) == {}
    with listed(path):
        path.write_text("three")
    assert read_record(tmp_path / LISTING, "")["files"][path.name] == file_digest(path)
    forget_listed(path, other)
    assert not (tmp_path / LISTING).exists()
    # printf one | sha256sum
    path.write_text("one")
    assert file_digest(path)["sha256"] == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"


def test_a_dataset_that_presampling_wrote_is_checked(tmp_path):
    path = presampled("explore.parquet")(tmp_path)
    assert named_dataset(str(path))["train"]["prompt"][:] == ["a", "b"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}: its content does not agree with {LISTING}"):
        named_dataset(str(path))


@pytest.mark.parametrize("content", ["[]", "5", '"x"', "null", "{", "\xff", "[" * 3000, "1" * 5000])
@pytest.mark.parametrize("name", ["result.json", "environment.json", "results.json", "metrics.jsonl"])
def test_records_of_another_kind_are_named(name, content, tmp_path):
    run(tmp_path)
    if name == "results.json":
        sweep(tmp_path)
    (tmp_path / LISTING).unlink()
    (tmp_path / name).write_text(content + "\n", encoding="latin-1")
    with pytest.raises(FdivError, match=str(tmp_path / name)) as caught:
        read_records([tmp_path])
    assert len(str(caught.value)) < 400


def test_the_place_for_a_digest_is_one():
    with pytest.raises(ValueError, match="once"):
        sealed(b"no place")
    assert SealedLines().items == []
