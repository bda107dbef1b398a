"""A recipe: one YAML document that describes one run, checked key by key before anything heavy happens.

    recipe = load_recipe("tiny/f_dpo", ["--learning_rate", "1e-5"])
    configs = recipe.configs()

Keys at the top level are those of the method's config (TRL's names), of TRL's `ModelConfig`, `ScriptArguments` and
`DatasetMixtureConfig`, and of `RunKeys` below; the blocks are `prepare:`, `eval:`, `report:` and `sweep:`. A value
comes from, in rising order of authority, the dataclass default, the base that the recipe `extends:`, the recipe, the
command line. A value that begins with `${NAME}` is a path below that environment variable; `${prepare}` is the
directory the `prepare:` block built. A recipe does not change once it is read; what follows from it is in a `RunPlan`
(`fdiv.run.plan`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fdiv.bounds import check_fields
from fdiv.bounds.blocks import SHARED
from fdiv.bounds.inherited import INHERITED
from fdiv.catalog import METHODS
from fdiv.errors import RecipeError
from fdiv.files import one_line
from fdiv.recipe.document import place_of
from fdiv.recipe.overrides import KeyPath
from fdiv.recipe.variables import VARIABLE, interpolate, texts

__all__ = ["Block", "Configs", "Recipe", "ReportKeys", "RunKeys"]

# What TRL and transformers raise for a value that they cannot use, a file that a key names among them.
_REFUSALS = (ValueError, TypeError, OSError, AttributeError, KeyError, ImportError, ArithmeticError, RuntimeError)


@dataclass
class RunKeys:
    """Top-level keys that belong to the run and not to TRL."""

    method: str = field(metadata={"help": "The training method; `fdiv recipes --keys METHOD` lists its keys."})
    extends: str | None = field(
        default=None, metadata={"help": "A base recipe (file or packaged name) whose keys hold unless stated here."}
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A trained adapter on the model, to go on training it; its own settings are kept."},
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
    batch_log: bool = field(
        default=False,
        metadata={
            "help": "Write batch_log.jsonl: keyed digests of the rows in every step, no text. `fdiv replay` needs it."
        },
    )
    exclude_rows: str | None = field(
        default=None,
        metadata={"help": "File of rows of the data that are left out; their places in the batches stay empty."},
    )
    env: dict | None = field(
        default=None, metadata={"help": "Environment variables to set before anything is imported."}
    )


@dataclass
class ReportKeys:
    """`report:` block: with it, the run ends by writing `report.html` and its plots."""

    title: str | None = field(default=None, metadata={"help": "Heading of the page; the recipe's name when null."})


_MODULE = re.compile(r"(?!all-linear$)[\w.-]+")


class Configs(NamedTuple):
    """What TRL's parser made of the top-level keys."""

    script: Any
    training: Any
    model: Any
    mixture: Any


@dataclass(frozen=True)
class Block:
    """One `prepare:` or `eval:` block: the dataclass that `name` selects and its stated values."""

    title: str
    name: str
    config: type
    values: dict[str, Any]
    where: str
    require: dict[str, str] = field(default_factory=dict)
    summary: list[str] = field(default_factory=list)
    before: bool = True

    def instance(self, variables: Mapping[str, str] | None = None) -> Any:
        """The dataclass, with `${NAME}` replaced. A `ValueError` of its own checks becomes a `RecipeError`."""
        values = interpolate(self.values, variables or {}, f"{self.title}.", self.where)
        try:
            made = self.config(**values)
            check_fields(made, SHARED)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{self.where}: {self.title}: {one_line(error)}") from error
        return made


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `stated` holds what the recipe and the command line say, coerced; defaults are not in it.

    Args:
        name: Of a packaged recipe, or the file's.
        source: The file.
        method_name: `method:`.
        stated: Top-level keys that were stated.
        origins: Where each key stands.
        prepare: The `prepare:` block.
        evaluations: The `eval:` blocks.
        report: The `report:` block.
        sweep: The `sweep:` block.
        machine: Top-level keys that this machine sets: no bf16 where there is no accelerator.
    """

    name: str
    source: str
    method_name: str
    stated: Mapping[str, Any]
    origins: Mapping[KeyPath, str]
    prepare: Block | None = None
    evaluations: tuple[Block, ...] = ()
    report: ReportKeys | None = None
    sweep: dict[str, Any] | None = None
    machine: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def method(self) -> type:
        """The entry of the table of methods."""
        return METHODS.find(self.method_name)

    @property
    def output_dir(self) -> Path:
        """Where the run writes: `output_dir`, or `runs/NAME` where the recipe does not say."""
        return self.directory({})

    def directory(self, variables: Mapping[str, str]) -> Path:
        """`output_dir` with these values of `${NAME}`."""
        stated = interpolate({"output_dir": self.stated.get("output_dir")}, variables, "", self.source)
        return Path(stated["output_dir"] or Path("runs") / self.name)

    def unset_variables(self) -> list[str]:
        """The environment variables that the recipe uses and that are not set."""
        blocks = [block.values for block in (self.prepare, *self.evaluations) if block]
        found = [VARIABLE.match(text) for text in texts([self.stated, *blocks])]
        used = {match.group(1) for match in found if match}
        return sorted(name for name in used if name not in os.environ and name != "prepare")

    def configs(
        self,
        settled: Mapping[str, Any] | None = None,
        variables: Mapping[str, str] | None = None,
        keys: Mapping[str, Any] | None = None,
    ) -> Configs:
        """Construct the dataclasses with TRL's parser.

        Args:
            settled: Keys that the `prepare:` block decided; a stated key wins over them.
            variables: Values of `${NAME}` in place of the environment's.
            keys: Values that win over all others.

        Raises:
            RecipeError: a config refuses its values (an invalid divergence, α outside its domain).
        """
        from trl import TrlParser

        from fdiv.recipe.schema import method_config, trl_configs

        variables = {**({"prepare": "${prepare}"} if self.prepare else {}), **(variables or {})}
        values = {**self.machine, **(settled or {}), **self.stated, "output_dir": str(self.directory(variables))}
        values = {key: value for key, value in values.items() if key not in RunKeys.__dataclass_fields__}
        values = {**interpolate(values, variables, "", self.source), **(keys or {})}
        script, model, mixture = trl_configs()
        parser = TrlParser((script, method_config(self.method), model, mixture))
        try:
            configs = Configs(*parser.parse_dict(values))
            for part in (configs.script, configs.model, configs.mixture):
                check_fields(part, INHERITED)
        except _REFUSALS as error:
            raise RecipeError(f"{self.place_of(error, {**values, **self.stated})}: {one_line(error)}") from error
        modules = values.get("lora_target_modules")
        if isinstance(modules, list) and len(modules) == 1 and _MODULE.fullmatch(str(modules[0])):
            # TRL makes a pattern of a list of one, which has to match whole paths: it would fit nothing.
            configs.model.lora_target_modules = modules
        return configs

    def place_of(self, error: Exception, values: Mapping[str, Any]) -> str:
        """Where the key stands that an error is about: the one it carries, else the first that its message names."""
        key = getattr(error, "key", None)
        if key is None:
            words = re.findall(r"\w+", str(error))
            key = next((word for word in words if word in values), None)
        return place_of(tuple(key.split(".")), self.origins, self.source) if key else self.source
