"""A recipe: one YAML document that describes one run, checked key by key before anything heavy happens.

    recipe = load_recipe("tiny/f_dpo", ["--learning_rate", "1e-5"])
    configs = recipe.configs()

Keys at the top level are those of the method's config (TRL's names), of TRL's `ModelConfig`, `ScriptArguments` and
`DatasetMixtureConfig`, and of `RunKeys` below; the blocks are `prepare:`, `eval:`, `report:` and `sweep:`. A value
comes from, in rising order of authority, the dataclass default, the base that the recipe `extends:`, the recipe, the
command line. A value that begins
with `${NAME}` is a path below that environment variable; `${prepare}` is the directory the `prepare:` block built.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fdiv.errors import RecipeError
from fdiv.methods import METHODS, Method, lookup
from fdiv.recipe_overrides import KeyPath, parse_overrides, set_value
from fdiv.recipe_schema import CommandLineValue
from fdiv.recipe_yaml import Document, packaged_files, read_document

__all__ = [
    "Block",
    "Configs",
    "Recipe",
    "ReportKeys",
    "RunKeys",
    "find_recipe",
    "is_base",
    "load_recipe",
    "packaged_recipes",
]

_VARIABLE = re.compile(r"^\$\{(\w+)\}")


@dataclass
class RunKeys:
    """Top-level keys that belong to the run and not to TRL."""

    method: str = field(metadata={"help": "The training method; `fdiv recipes --keys METHOD` lists its keys."})
    extends: str | None = field(
        default=None, metadata={"help": "A base recipe (file or packaged name) whose keys hold unless stated here."}
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Padding token, for a tokenizer that has none. Must be in its vocabulary."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the files of an earlier run in output_dir."}
    )
    resume_from_checkpoint: bool | str | None = field(
        default=None, metadata={"help": "true: the newest complete checkpoint in output_dir; or the path of one."}
    )
    force_resume: bool = field(
        default=False,
        metadata={"help": "Resume although divergence, data, batch or number of processes have changed."},
    )
    env: dict | None = field(
        default=None, metadata={"help": "Environment variables to set before anything is imported."}
    )


@dataclass
class ReportKeys:
    """`report:` block: with it, the run ends by writing `report.html` and its plots."""

    title: str | None = field(default=None, metadata={"help": "Heading of the page; the recipe's name when null."})


class Configs(NamedTuple):
    """What TRL's parser made of the top-level keys."""

    script: Any
    training: Any
    model: Any
    mixture: Any


@dataclass
class Block:
    """One `prepare:` or `eval:` block: the dataclass that `name` selects and its stated values."""

    title: str
    name: str
    config: type
    values: dict[str, Any]
    where: str
    require: dict[str, str] = field(default_factory=dict)
    summary: list[str] = field(default_factory=list)

    def instance(self, variables: Mapping[str, str] | None = None) -> Any:
        """The dataclass, with `${NAME}` replaced. A `ValueError` of its own checks becomes a `RecipeError`."""
        values = interpolate(self.values, variables or {}, f"{self.title}.", self.where)
        try:
            return self.config(**values)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{self.where}: {self.title}: {one_line(error)}") from error


@dataclass
class Recipe:
    """A checked recipe. `stated` holds what the recipe and the command line say, coerced; defaults are not in it."""

    name: str
    source: str
    method_name: str
    stated: dict[str, Any]
    origins: dict[KeyPath, str]
    prepare: Block | None = None
    evaluations: list[Block] = field(default_factory=list)
    report: ReportKeys | None = None
    sweep: dict[str, Any] | None = None
    filled: dict[str, Any] = field(default_factory=dict)
    """Top-level keys that the `prepare:` block settled; a stated key wins over them."""
    machine: dict[str, Any] = field(default_factory=dict)
    """Top-level keys that this machine settles: no bf16 where there is no accelerator."""
    variables: dict[str, str] = field(default_factory=dict)
    """`${NAME}` that are not environment variables (`prepare`)."""

    @property
    def method(self) -> Method:
        """The entry of the table of methods."""
        return METHODS[self.method_name]

    @property
    def output_dir(self) -> Path:
        """Where the run writes: `output_dir`, or `runs/NAME` where the recipe does not say."""
        stated = interpolate({"output_dir": self.stated.get("output_dir")}, self.variables, "", self.source)
        return Path(stated["output_dir"] or Path("runs") / self.name)

    def unset_variables(self) -> list[str]:
        """The environment variables that the recipe uses and that are not set."""
        blocks = [block.values for block in (self.prepare, *self.evaluations) if block]
        found = [_VARIABLE.match(text) for text in _texts([self.stated, *blocks])]
        used = {match.group(1) for match in found if match}
        return sorted(name for name in used if name not in os.environ and name not in ("prepare", *self.variables))

    def value(self, key: str, default: Any = None) -> Any:
        """A top-level key as stated, else as filled in, else `default`."""
        return self.stated.get(key, self.filled.get(key, default))

    def configs(self) -> Configs:
        """Construct the dataclasses with TRL's parser.

        Raises:
            RecipeError: a config refuses its values (an unlawful divergence, α outside its domain).
        """
        from trl import TrlParser

        from fdiv.recipe_check import method_config, trl_configs

        values = {**self.machine, **self.filled, **self.stated, "output_dir": str(self.output_dir)}
        values = {key: value for key, value in values.items() if key not in RunKeys.__dataclass_fields__}
        # Before the `prepare:` block has run, its directory is not known: what is checked here does not look into it.
        variables = self.variables or ({"prepare": "prepared"} if self.prepare else {})
        values = interpolate(values, variables, "", self.source)
        script, model, mixture = trl_configs()
        parser = TrlParser((script, method_config(self.method), model, mixture))
        try:
            return Configs(*parser.parse_dict(values))
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{self.source}: {one_line(error)}") from error


def packaged_recipes() -> dict[str, Path]:
    """Name → file of the recipes that are installed with the package (`tiny/f_dpo`), the bases left out."""
    return {name: file for name, file in packaged_files().items() if not is_base(name)}


def is_base(name: str) -> bool:
    """Whether a packaged file is a base, which recipes extend, and no run by itself: `tofu/base`, `tofu/mini_base`."""
    return name == "base" or name.endswith(("/base", "_base"))


def find_recipe(name: str) -> Path:
    """The file of a recipe given as a path or as the name of a packaged one.

    Raises:
        RecipeError: it is neither; the message names the nearest packaged recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    plain = name.removeprefix("recipes/").removesuffix(".yaml")
    origin = f"no recipe file {name!r} and no packaged recipe of that name"
    try:
        return lookup(packaged_files(), plain, "recipe", origin)
    except RecipeError as error:
        raise RecipeError(f"{error} (list them with `fdiv recipes`)") from None


def recipe_name(path: Path) -> str:
    """`tiny/f_dpo` for a packaged recipe, the file's stem for another."""
    for name, file in packaged_files().items():
        if file.resolve() == path.resolve():
            return name
    return path.stem


def load_recipe(
    source: str | Path, overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None
) -> Recipe:
    """Read and check a recipe.

    Args:
        source: A path, or the name of a packaged recipe.
        overrides: Command-line words, `["--learning_rate", "1e-5", "--eval.batch_size", "8"]`.
        settings: Values that win over both, by dotted key (a cell of a sweep).

    Raises:
        RecipeError: anything that is wrong with them, in one line that names the key, its place and the remedy.
    """
    path = find_recipe(str(source))
    document = read_document(path)
    values = copy.deepcopy(document.values)
    origins = dict(document.places)
    layers = [(override, value, "command line") for override, value in parse_overrides(overrides)]
    layers += [(tuple(key.split(".")), value, "sweep") for key, value in (settings or {}).items()]
    for key, value, where in layers:
        set_value(values, key, value, where)
        origins.update({key[: depth + 1]: where for depth in range(len(key))})
    return _checked(recipe_name(path), document, values, origins)


def _checked(name: str, document: Document, values: dict[str, Any], origins: dict[KeyPath, str]) -> Recipe:
    export_environment(values.get("env"), document.source)
    if "extends" in values:
        raise RecipeError(f"{origins[('extends',)]}: `extends` is a key of a recipe file; write it there")
    where = origins.get(("method",), document.source)
    if "method" not in values:
        raise RecipeError(
            f"{document.source}: no `method:`; it is one of {', '.join(sorted(METHODS))}; a base without one runs "
            "through a recipe that `extends:` it"
        )
    if isinstance(values["method"], CommandLineValue):
        values["method"] = values["method"].read()
    lookup(METHODS, values["method"], "method", where)

    from fdiv.recipe_check import check_recipe  # imports the method's config, hence TRL

    return check_recipe(name, document.source, values, origins)


def export_environment(variables: Any, source: str) -> None:
    """Set the `env:` mapping of a recipe, as TRL does; before TRL is imported, so that the libraries see it."""
    if variables is None:
        return
    if not isinstance(variables, dict):
        raise RecipeError(f"{source}: `env` must be a mapping of environment variables to values")
    for name, value in variables.items():
        os.environ[str(name)] = str(value.read() if isinstance(value, CommandLineValue) else value)


def interpolate(values: Any, variables: Mapping[str, str], prefix: str, source: str) -> Any:
    """Replace a leading `${NAME}` in every text of a nested value, by `variables` first, then by the environment.

    Raises:
        RecipeError: the variable is not set; the message names it and the flag that can be given instead.
    """
    if isinstance(values, dict):
        return {key: interpolate(value, variables, f"{prefix}{key}.", source) for key, value in values.items()}
    if isinstance(values, list):
        return [interpolate(value, variables, prefix, source) for value in values]
    match = _VARIABLE.match(values) if isinstance(values, str) else None
    if not match:
        return values
    name, key = match.group(1), prefix.rstrip(".")
    if name in variables:
        return variables[name] + values[match.end() :]
    if name == "prepare":
        raise RecipeError(f"{source}: {key!r} uses ${{prepare}}, but the recipe has no `prepare:` block")
    if name not in os.environ:
        raise RecipeError(
            f"{source}: {key!r} uses ${{{name}}}, an environment variable that is not set; export {name}=DIRECTORY, "
            f"or give --{key} PATH"
        )
    return os.environ[name] + values[match.end() :]


def _texts(values: Any) -> list[str]:
    """Every text inside a nested value."""
    if isinstance(values, str):
        return [values]
    inner = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return [text for value in inner for text in _texts(value)]


def one_line(error: BaseException | str) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())
