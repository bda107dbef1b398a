"""One warning where a package lies outside the tested releases: by whom, when, how often, and without heavy imports."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from fdiv import versions
from fdiv.versions import TABLE, outside_tested, untested_message

NEWEST = versions.tested_sets()["newest"]


def test_tested_releases_and_those_between_are_quiet():
    for pins in versions.tested_sets().values():
        assert outside_tested(pins) == []
    assert outside_tested({**NEWEST, "torch": f"{NEWEST['torch']}+cpu", "transformers": "5.18.0"}) == []
    assert outside_tested({**NEWEST, "transformers": "5.24.9"}) == []
    assert outside_tested({"rich": "0.1", "transformers": "5.18.0.dev0"}) == []


@pytest.mark.parametrize(
    ("package", "release", "span"),
    [
        ("transformers", "5.9.0", "5.10.4 to 5.24.0"),
        ("transformers", "5.10.3", "5.10.4 to 5.24.0"),
        ("transformers", "5.99.0", "5.10.4 to 5.24.0"),
        ("transformers", "6.0.0rc1", "5.10.4 to 5.24.0"),
        ("trl", "1.17.0", "1.16.0"),
        ("trl", "1.15.0", "1.16.0"),
        ("torch", "2.14.0+cu130", "2.13.0"),
        ("vllm", "0.33.0", "0.31.0"),
        ("vllm", "0.32.0rc1", "0.31.0"),
        ("peft", "0.17.1", "0.18.0 to "),
    ],
)
def test_what_lies_outside_is_named_with_the_range(package, release, span):
    (found,) = outside_tested({**NEWEST, package: release})
    assert found.startswith(f"{package} {release} (tested: {span}")


def test_numbers_are_compared_as_numbers():
    """5.9 is older than 5.10."""
    assert outside_tested({"transformers": "5.9.9"}) and not outside_tested({"transformers": "5.10.4"})


@pytest.fixture
def other_versions(monkeypatch):
    """As if another transformers were installed, and nothing had been said."""
    monkeypatch.delenv("FDIV_VERSIONS_SAID", raising=False)
    monkeypatch.delenv("RANK", raising=False)

    def version(package):
        if package not in NEWEST:
            raise PackageNotFoundError(package)
        return "6.1.0" if package == "transformers" else NEWEST[package]

    monkeypatch.setattr(versions, "version", version)


def test_it_is_said_once_with_the_address_of_the_table(other_versions, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    message = untested_message()
    assert "transformers 6.1.0 (tested: 5.10.4 to" in message and TABLE in message and "versions.json" in message
    assert untested_message() is None


def test_only_the_first_process_of_a_launch_speaks(other_versions, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert untested_message() is None


# A process in which importlib.metadata gives another release of transformers, as it would be installed.
_PATCH = """
import importlib.metadata as metadata, sys, warnings
true = metadata.version
metadata.version = lambda name: "6.1.0" if name == "transformers" else true(name)
heavy = ("torch", "transformers", "trl", "numpy")
"""


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", _PATCH + code], capture_output=True, text=True,
        env={**{k: v for k, v in os.environ.items() if k != "FDIV_VERSIONS_SAID"}, **environment},
    )  # fmt: skip


def test_the_command_line_says_it_in_one_line_before_anything_heavy():
    code = """
from fdiv.cli import main
code = main(["divergences"])
print("heavy:", *[name for name in heavy if name in sys.modules])
sys.exit(code)
"""
    result = _python(code)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "not tested" in line]
    assert line.startswith("fdiv: not tested with transformers 6.1.0") and TABLE in line
    assert result.stdout.splitlines()[-1] == "heavy:"
    assert "not tested" not in _python(code, FDIV_VERSIONS_SAID="1").stderr  # what a launcher's processes inherit


def test_the_trainers_say_it_before_they_are_imported():
    """Even where the import itself fails on what has changed."""
    code = """
sys.modules["trl"] = None  # as if its names were gone
import fdiv.alignment, fdiv.unlearning
print("losses are quiet")
for package, name in ((fdiv.alignment, "FDPOTrainer"), (fdiv.unlearning, "NPOTrainer")):
    try:
        getattr(package, name)
    except ImportError as error:
        print("failed:", error)
"""
    result = _python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "losses are quiet" and result.stdout.count("failed:") == 2
    assert result.stderr.count("UserWarning: not tested with transformers 6.1.0") == 1
