"""Every module and public name of release 0.1 still imports, with a warning where it moved."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from fdiv.moved import MOVED

NAMES: dict[str, list[str]] = json.loads((Path(__file__).parent / "names_of_0_1.json").read_text(encoding="utf-8"))

OLD = "_".join(["fdiv.eval.tofu", "data"])  # in one piece, a tool that renames imports would rename it


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", sorted(NAMES))
def test_the_names_of_release_0_1_import(module):
    found = import_module(module)
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []


def test_the_table_names_old_modules_and_new_ones_that_exist():
    assert set(MOVED) <= set(NAMES)
    for homes in MOVED.values():
        for home in homes:
            assert home not in MOVED
            import_module(home)


def test_an_old_name_warns_with_the_new_one_and_the_importing_file(tmp_path):
    script = tmp_path / "old.py"
    script.write_text(f"from {OLD} import TofuRows\nprint(TofuRows.__module__)\n", encoding="utf-8")
    run = subprocess.run([sys.executable, "-W", "always", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "fdiv.eval.tofu.data"
    line = next(line for line in run.stderr.splitlines() if OLD in line)
    assert line.startswith(f"{script}:1: DeprecationWarning: {OLD} is now fdiv.eval.tofu.data;")


def test_an_unknown_name_of_an_old_module_says_where_the_module_went():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = import_module(OLD)
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'; it is now fdiv\.eval\.tofu\.data"):
        old.nothing  # noqa: B018
