"""A build is used again while its settings and the files that they name are the same."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fdiv.recipe import prepared
from fdiv.recipe.prepared import build_once, is_built


@dataclass
class Copies:
    """Copies the first file that it names."""

    rows: str
    split: str = "test"
    task: dict[str, Any] = field(default_factory=dict)

    def build(self, folder: Path) -> dict[str, Any]:
        named = Path(self.rows)
        source = next(path for path in (named, *sorted(named.glob("*"))) if path.is_file())
        (folder / "copy.jsonl").write_text(source.read_text())
        return {"dataset_name": str(folder / "copy.jsonl")}


def built(builder, root):
    return Path(build_once("copies", builder, root)[1]["dataset_name"]).read_text()


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "data" / "rows.jsonl"
    path.parent.mkdir()
    path.write_text("one\n")
    return path


def test_an_edited_file_is_built_again_and_the_old_build_stays(rows, tmp_path):
    root = tmp_path / "prepared"
    assert not is_built("copies", Copies(str(rows)), root)
    assert built(Copies(str(rows)), root) == "one\n" and is_built("copies", Copies(str(rows)), root)
    rows.write_text("two\n")  # as long as before
    assert not is_built("copies", Copies(str(rows)), root)
    assert built(Copies(str(rows)), root) == "two\n"
    rows.write_text("one\n")
    assert built(Copies(str(rows)), root) == "one\n" and len(list(root.iterdir())) == 2


def test_the_same_content_is_built_once_whatever_its_time(rows, tmp_path, capsys):
    root = tmp_path / "prepared"
    built(Copies(str(rows)), root)
    os.utime(rows, (1, 1))
    built(Copies(str(rows)), root)
    assert "was built before" in capsys.readouterr().err and len(list(root.iterdir())) == 1


def test_files_in_a_named_folder_and_in_a_task_inside_count(rows, tmp_path):
    root = tmp_path / "prepared"
    assert built(Copies(str(rows.parent)), root) == "one\n"
    rows.write_text("longer\n")
    assert built(Copies(str(rows.parent)), root) == "longer\n"
    other = tmp_path / "other.jsonl"
    for text in ("a\n", "b\n"):
        other.write_text(text)
        built(Copies(str(rows), task={"name": "inner", "files": [str(other)]}), root)
    assert len(list(root.iterdir())) == 4


def test_of_a_large_file_size_and_time(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "_LARGE", 1)
    monkeypatch.setattr(prepared, "file_digest", None)  # not read
    root = tmp_path / "prepared"
    built(Copies(str(rows)), root)
    os.utime(rows, (1, 1))
    built(Copies(str(rows)), root)
    assert len(list(root.iterdir())) == 2


def test_the_name_of_a_split_is_no_file(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test").write_text("1")
    root = tmp_path / "prepared"
    built(Copies(str(rows)), root)
    (tmp_path / "test").write_text("2")
    built(Copies(str(rows)), root)
    assert len(list(root.iterdir())) == 1
