"""Checkpoints on disk: whole or absent, whatever happens while they are written."""

import hashlib
import json
import os
import shutil

import pytest

from fdiv.errors import CheckpointError
from fdiv.training import checkpoints
from fdiv.training.checkpoints import (
    MARKER,
    STAGING,
    checkpoint_fault,
    checkpoint_folders,
    newest_checkpoint,
    publish,
    read_marker,
    recover,
)


def rewrite(folder, **parts):
    """Other parts in the marker; a function makes the new part from the old."""
    marker = json.loads((folder / MARKER).read_text())
    marker |= {name: part(marker[name]) if callable(part) else part for name, part in parts.items()}
    marker.pop("digest", None)  # an edit on purpose
    (folder / MARKER).write_text(json.dumps(marker))


def staged(output_dir, step, content="weights"):
    folder = output_dir / STAGING / f"checkpoint-{step}"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_text(content)
    (folder / "sub" / "state.json").write_text("{}")
    return folder


def published(output_dir, step, content="weights"):
    return publish(staged(output_dir, step, content), output_dir, {"divergence": "reverse_kl"})


def test_a_published_checkpoint_is_complete_and_says_what_it_is(tmp_path):
    folder = published(tmp_path, 5)
    assert folder == tmp_path / "checkpoint-5"
    assert checkpoint_fault(folder) is None
    marker = read_marker(folder)
    assert marker["identity"] == {"divergence": "reverse_kl"}
    assert sorted(marker["files"]) == ["model.safetensors", "sub/state.json"]
    assert marker["files"]["sub/state.json"]["bytes"] == 2
    # printf weights | sha256sum
    assert marker["files"]["model.safetensors"]["sha256"] == (
        "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    )


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").write_text("weigh"), "5 bytes instead of 7"),
        (lambda folder: (folder / "model.safetensors").write_text("Weights"), "the content of model.safetensors has"),
        (lambda folder: (folder / MARKER).unlink(), f"no {MARKER}"),
        (lambda folder: (folder / MARKER).write_text('{"files": '), f"no {MARKER}"),
        (lambda folder: (folder / MARKER).write_text("[]"), f"no {MARKER}"),
        (lambda folder: rewrite(folder, files=[]), f"no {MARKER} that can be read"),
        (lambda folder: rewrite(folder, identity=None), f"no {MARKER} that can be read"),
        (lambda folder: rewrite(folder, files={}), "lists no files"),
        (lambda folder: rewrite(folder, files=lambda files: dict.fromkeys(files, 3)), "gives no size of model"),
        (lambda folder: rewrite(folder, files=lambda files: {name: {} for name in files}), "gives no size of model"),
        (
            lambda folder: rewrite(folder, files=lambda files: files | {"../checkpoint-5/model.safetensors": {}}),
            "../checkpoint-5/model.safetensors is missing",
        ),
        (lambda folder: (folder / "optimizer.pt").write_bytes(b"pickle"), "optimizer.pt was not saved with it"),
        (lambda folder: (folder / "sub" / "more.pt").write_bytes(b"pickle"), "sub/more.pt was not saved with it"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path, damage, reason):
    published(tmp_path, 5)
    newest = published(tmp_path, 10)
    damage(newest)
    assert reason in checkpoint_fault(newest)
    folder, passed_over = newest_checkpoint(tmp_path)
    assert folder.name == "checkpoint-5"
    assert len(passed_over) == 1
    assert passed_over[0].startswith("checkpoint-10 is incomplete") and reason in passed_over[0]


def test_hidden_files_that_a_file_system_leaves_do_not_count(tmp_path):
    folder = published(tmp_path, 5)
    (folder / "sub" / ".nfs0001").write_text("")
    assert checkpoint_fault(folder) is None


def test_steps_are_compared_as_numbers(tmp_path):
    for step in (9, 100, 20):
        published(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-20",
        "checkpoint-100",
    ]
    assert newest_checkpoint(tmp_path)[0].name == "checkpoint-100"


def test_no_complete_checkpoint_is_an_error_that_lists_the_incomplete_ones(tmp_path):
    shutil.copytree(staged(tmp_path, 5), tmp_path / "checkpoint-5")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*checkpoint-5 is incomplete"):
        newest_checkpoint(tmp_path)


def test_every_byte_of_a_long_file_counts(tmp_path, monkeypatch):
    """Also the middle, which markers of before left out; those still count by the ends they hold."""
    monkeypatch.setattr(checkpoints, "_EDGE", 4)
    folder, content = published(tmp_path, 1, "abcdefghijkl"), "abcdefghijkl"
    path = folder / "model.safetensors"
    for position in range(len(content)):
        path.write_text(content[:position] + "X" + content[position + 1 :])
        assert checkpoint_fault(folder) == "the content of model.safetensors has changed"
    marker = read_marker(folder)
    ends = hashlib.sha256(b"abcdijkl").hexdigest()
    marker["files"]["model.safetensors"] = {"bytes": 12, "sha256_of_ends": ends}
    (folder / MARKER).write_text(json.dumps(marker))
    for content, whole in (("abcdefghijkl", True), ("abcdXfghijkl", True), ("Xbcdefghijkl", False)):
        path.write_text(content)
        assert (checkpoint_fault(folder) is None) is whole


def test_a_changed_bit_of_the_marker_is_noticed(tmp_path):
    folder = published(tmp_path, 1)
    content = (folder / MARKER).read_bytes()
    for bit in range(0, 8 * len(content), 7):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / MARKER).write_bytes(flipped)
        assert "or is damaged" in checkpoint_fault(folder)
    (folder / MARKER).write_bytes(content)
    assert checkpoint_fault(folder) is None


@pytest.mark.parametrize("killed_before_rename", [1, 2])
def test_a_kill_while_replacing_never_loses_the_finished_checkpoint(tmp_path, monkeypatch, killed_before_rename):
    """Replacing checkpoint-5 takes two renames; die before the first or before the second."""
    published(tmp_path, 5, "first")
    rename, done = os.replace, []

    def dying_rename(source, target):
        done.append(source)
        if len(done) == killed_before_rename:
            raise KeyboardInterrupt
        rename(source, target)

    again = staged(tmp_path, 5, "second")
    monkeypatch.setattr(checkpoints.os, "replace", dying_rename)
    with pytest.raises(KeyboardInterrupt):
        publish(again, tmp_path, {})
    monkeypatch.setattr(checkpoints.os, "replace", rename)
    recover(tmp_path)
    folder, _ = newest_checkpoint(tmp_path)
    assert (folder / "model.safetensors").read_text() == "first"
    assert not (tmp_path / STAGING).exists()


def test_what_an_interrupted_save_left_is_removed(tmp_path):
    published(tmp_path, 5)
    staged(tmp_path, 10)
    recover(tmp_path)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["checkpoint-5"]
    assert not (tmp_path / STAGING).exists()
    assert json.loads((tmp_path / "checkpoint-5" / MARKER).read_text())["files"]
