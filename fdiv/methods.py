"""What a recipe can name: training methods, builders of data, evaluations, and the kinds of `fdiv eval`.

Each table maps a name to a `module:attribute` path, imported only when a recipe asks for it. Adding a method, a
builder or an evaluation is one line here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fdiv.errors import RecipeError

__all__ = ["EVALUATIONS", "EVAL_COMMANDS", "METHODS", "PREPARE", "Method", "load", "lookup"]


@dataclass(frozen=True)
class Method:
    """One training method.

    Args:
        config: `module:Class` of the config dataclass, a subclass of `transformers.TrainingArguments`.
        trainer: `module:Class` of the trainer, constructed as TRL's: `(model, args=, train_dataset=, eval_dataset=,
            processing_class=, quantization_config=, peft_config=, callbacks=)`.
        family: `alignment`, `unlearning` or `rl`.
        title: A line for listings.
        paper: Where the method comes from, as `arXiv:NUMBER`.
        columns: Columns the training rows must have.
        optional_columns: Columns that are used when they are there.
        check_divergence: `module:function` that raises ValueError, with the reason, for an unlawful divergence.
    """

    config: str
    trainer: str
    family: str
    title: str
    paper: str
    columns: tuple[str, ...] = ()
    optional_columns: tuple[str, ...] = ()
    check_divergence: str | None = None


METHODS: dict[str, Method] = {
    "f_dpo": Method(
        config="fdiv.alignment.f_dpo:FDPOConfig",
        trainer="fdiv.alignment.f_dpo:FDPOTrainer",
        family="alignment",
        title="direct preference optimisation under any f-divergence",
        paper="arXiv:2309.16240",
        columns=("chosen", "rejected"),
        optional_columns=("prompt",),
        check_divergence="fdiv.alignment.losses:check_f_dpo_divergence",
    ),
}
"""`method:` of a recipe."""

PREPARE: dict[str, str] = {
    "tiny_preferences": "fdiv.alignment.tiny_world:TinyPreferencesConfig",
    "tofu_preferences": "fdiv.alignment.tofu_preferences:TofuPreferencesConfig",
}
"""`prepare: {name: …}`: a dataclass with `build(output_dir) -> dict` of the recipe keys it settles."""

EVALUATIONS: dict[str, str] = {
    "preferences": "fdiv.eval.preferences:PreferencesEvalConfig",
    "tiny_world": "fdiv.alignment.tiny_world_eval:TinyWorldEvalConfig",
}
"""`eval: {name: …}`: a dataclass with `evaluate(model, tokenizer, datasets, context) -> dict[str, float | None]`.

Class attributes it may carry: `summary_metrics` (names for the end-of-run table, in order; all when absent),
`lower_is_better` (names for which smaller is an improvement), `frontier` ((divergence metric, reward metric)).
"""

EVAL_COMMANDS: dict[str, str] = {
    "preferences": "fdiv.eval.preferences:command",
}
"""`fdiv eval KIND`: an object with `add_arguments(parser)` and `run(args) -> int`."""


def load(path: str) -> Any:
    """Import `module:attribute`."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def lookup(table: Mapping[str, Any], name: object, what: str, origin: str) -> Any:
    """`table[name]`; a `RecipeError` that lists the names and the nearest one when it is not there."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(table))}"
    raise RecipeError(f"{origin}: unknown {what} {name!r}; {hint}")
