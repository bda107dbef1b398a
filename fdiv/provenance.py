"""Where a result came from: package versions, git revision, command line, seed, device."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fdiv
from fdiv.secrets import REDACTED, is_secret_name, redacted, without_secrets

__all__ = ["command_line", "environment", "git_revision", "package_versions"]

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed", "bitsandbytes", "vllm")


def package_versions() -> dict[str, str | None]:
    """Version of `fdiv` and of every package that shapes a result; None where one is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "fdiv": fdiv.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def git_revision() -> dict[str, Any] | None:
    """`{"revision": hash, "dirty": bool}` of the checkout `fdiv` is imported from; None for an installed package.

    `dirty`: a tracked file differs from the revision.
    """
    folder = Path(fdiv.__file__).parent
    # An installed package may lie inside somebody else's repository (a virtual environment in it): ask for our file.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no", ":/")
    return {"revision": revision, "dirty": bool(changes)} if revision else None


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of one git command, None where git is missing or refuses."""
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def command_line(words: Sequence[str] | None = None) -> str:
    """The command as one would type it again, `fdiv run …`, without secrets and values of `--env`."""
    words = list(sys.argv[1:] if words is None else words)
    shown, secret = [], False
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            secret = _holds_secret(flag)
            hidden = equals and (secret or _mapping_with_secret(value))
            shown.append(f"{flag}={REDACTED}" if hidden else redacted(word))
        else:
            shown.append(REDACTED if secret or _mapping_with_secret(word) else redacted(word))
    return redacted(shlex.join(["fdiv", *shown]))


def _holds_secret(flag: str) -> bool:
    """`--hub_token`, `--model_init_kwargs.token`, `--env`, `--env.NAME`."""
    name = flag.removeprefix("--").replace("-", "_")
    return name == "env" or name.startswith("env.") or is_secret_name(name)


def _mapping_with_secret(value: str) -> bool:
    """Whether a value written as YAML holds a secret under a name: `{name: r, api_key: X}`."""
    import yaml

    if not value.lstrip().startswith(("{", "[")):
        return False
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return False
    return without_secrets(parsed) != parsed


def _distributed(state: Any) -> str:
    """Accelerate's word. Before a trainer is made, only its launcher's variables tell of DeepSpeed and FSDP."""
    for name in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            return name
    return state.distributed_type.value


def environment(command: str, seed: int | None = None) -> dict[str, Any]:
    """The content of `environment.json`. The host's name is left out: a result may be published."""
    import torch
    from accelerate import PartialState

    state = PartialState()
    accelerated = state.device.type != "cpu"
    return {
        "command": command,
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "git": git_revision(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.get_device_module(state.device).get_device_name(state.device) if accelerated else "cpu",
        "processes": state.num_processes,
        "distributed": _distributed(state),
        "threads": torch.get_num_threads(),
    }
