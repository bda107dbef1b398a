"""accelerate configurations: where they are, what they say, how many processes they ask for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from fdiv.errors import RecipeError
from fdiv.named import lookup
from fdiv.recipe.yaml_text import load_yaml

__all__ = ["accelerate_config", "process_count", "read_accelerate_config"]


def accelerate_config(name: str) -> Path:
    """The file of an accelerate configuration: a path, or the name of a packaged one.

    Raises:
        RecipeError: neither; the message lists the packaged names.
    """
    if os.path.isfile(name):
        return Path(name)
    folder = Path(str(resources.files("fdiv.recipes"))) / "accelerate"
    packaged = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    return lookup(packaged, name, "accelerate configuration", "--accelerate (neither a file nor packaged)")


def read_accelerate_config(name: str) -> tuple[Path, dict[str, Any]]:
    """The file of an accelerate configuration, and what it says.

    Raises:
        RecipeError: no such configuration, a file that cannot be read or is not YAML, or no mapping, at the top or in
            the blocks for DeepSpeed and FSDP.
    """
    import yaml

    config = accelerate_config(name)
    remedy = "give a file that `accelerate config` wrote, or the name of a packaged configuration"
    try:
        content: Any = load_yaml(config.read_text(encoding="utf-8"), str(config), yaml.SafeLoader)[1]
    except RecipeError as error:
        raise RecipeError(f"--accelerate {error}; {remedy}") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a date that is none
        raise RecipeError(f"--accelerate {config}: cannot be read: {error}; {remedy}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"--accelerate {config}: not an accelerate configuration (a mapping); {remedy}")
    for key in ("deepspeed_config", "fsdp_config"):
        if not isinstance(content.get(key) or {}, dict):
            raise RecipeError(f"--accelerate {config}: {key}: {content[key]!r} is not a mapping; {remedy}")
    return config, content


def process_count(content: Mapping[str, Any], origin: object, num_processes: int | None = None) -> int:
    """How many processes a configuration asks for, one where it does not say; `num_processes` wins.

    Args:
        content: of the configuration. origin: its file or name, for the message.

    Raises:
        RecipeError: not a whole number from 1 on.
    """
    count = content.get("num_processes", 1) if num_processes is None else num_processes
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        stated = f"--accelerate {origin}: num_processes: {count!r}"
        what = stated if num_processes is None else f"--num_processes {count}"
        raise RecipeError(f"{what}: must be a whole number, 1 or more")
    return count
