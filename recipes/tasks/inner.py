"""A builder inside another: `prepare: {name: rehearsal, task: {name: …}}`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["built_task", "inner_builder"]


def inner_builder(task: Mapping[str, Any] | None, outer: type) -> Any:
    """The builder of the key `task`, its keys checked like those of a block.

    Args:
        task: `{name: …}` with its keys. outer: the class of the builder that has the key; it is refused inside.

    Raises:
        RecipeError: an unknown builder or key, or a value of the wrong type.
        ValueError: no name, a missing key, or a value the builder refuses.
    """
    from fdiv.catalog import TASKS
    from fdiv.errors import RecipeError
    from fdiv.recipe.schema import coerce, nearest_key, section_of

    where = "prepare.task"
    values = dict(task or {})
    if "name" not in values:
        raise ValueError(f"{where} needs a `name`: one of {', '.join(sorted(TASKS))}")
    name = values.pop("name")
    config = TASKS.find(name, where, what=f"`{where}.name`", error=RecipeError)
    if issubclass(config, outer):
        raise ValueError(f"{where} cannot be {name!r} itself")
    section = section_of(config, where)
    for key, value in values.items():
        if key not in section.keys:
            near = nearest_key(key, section, lambda: iter(()))
            hint = f"did you mean {near!r}?" if near else f"there are: {', '.join(section.keys)}"
            raise RecipeError(f"unknown key {key!r} in `{where}`; {hint}")
        values[key] = coerce(value, section.keys[key], where)
    missing = [key.name for key in section.keys.values() if key.required and key.name not in values]
    if missing:
        raise ValueError(f"`{where}.{missing[0]}` is missing")
    return config(**values)


def built_task(task: Mapping[str, Any] | None, builder: Any, output_dir: Path) -> dict[str, Any]:
    """The keys that the task sets; `output_dir/task` is a link to its build, which stands beside `output_dir`."""
    from fdiv.recipe.prepared import build_once, moved

    folder, keys = build_once((task or {})["name"], builder, output_dir.parent)
    output_dir.mkdir(parents=True, exist_ok=True)
    here = output_dir / "task"
    here.symlink_to(os.path.relpath(folder, output_dir), target_is_directory=True)
    return {key: moved(value, folder, here) for key, value in keys.items()}
