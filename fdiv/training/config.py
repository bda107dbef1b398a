r"""Options of a training config, declared once: default, help and bounds stand in one line, and the rest follows.

    @dataclass
    class MyConfig(DivergenceOptions, SFTConfig):
        "Configuration of `MyTrainer`."

        beta: float = option(0.1, "Inverse temperature β", above=0)

`--help` of TRL's parser, `fdiv recipes --keys` and the docstring of the class print that line with its bounds; a value
outside them (always: NaN and infinities) is refused when the config is made. Rules between options go into
`__post_init__`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from fdiv.bounds import Declaration, check_fields, declare
from fdiv.bounds.inherited import INHERITED
from fdiv.divergences import Divergence, get_divergence
from fdiv.divergences.saturation import LARGEST_MAX_EXPONENT, TRAINING_MAX_EXPONENT
from fdiv.errors import OptionError
from fdiv.inference.encoding import ENCODING_HELP, END_TOKENS, Encoding
from fdiv.named import shown
from fdiv.rows.report import MIN_USED_FRACTION
from fdiv.secrets import without_secrets

__all__ = [
    "CappedDivergenceOptions",
    "ChatTemplateOptions",
    "DivergenceOptions",
    "EncodingOptions",
    "Options",
    "RowOptions",
    "add_min_used_fraction",
    "check_options",
    "divergence_option",
    "named_divergence",
    "option",
    "refuse",
]


def option(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    choices: Sequence[Any] | None = None,
    why: str = "",
    keyword: bool = False,
) -> Any:
    """A dataclass field for one key of a config.

    Args:
        default: its value where none is given; a list is copied for every instance.
        help: what it is, in a line, without a full stop; the bounds are added.
        above, least, below, most: bounds on a number: > above, ≥ least, < below, ≤ most. NaN and infinities are
            refused without any.
        choices: the values it may have.
        why: a sentence for the error: why a value outside is refused, or what to do instead.
        keyword: it is no positional argument of the class, so that classes with required keys can derive from it.
    """
    declared = declare(help, above=above, least=least, below=below, most=most, choices=choices, why=why)
    metadata = {"help": declared} | ({"choices": list(choices)} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata, kw_only=keyword)
    return field(default=default, metadata=metadata, kw_only=keyword)


def check_options(config: Any) -> None:
    """Refuse every value of a config outside its bounds: those of our `option`s, and those of the keys that it takes
    from transformers and TRL (`fdiv.bounds.inherited`).

    Raises:
        OptionError: `beta=-1.0: must be above 0`, for the first such key.
    """
    is_training = hasattr(config, "per_device_train_batch_size")  # the same names mean other things elsewhere
    check_fields(config, INHERITED if is_training else None)


def refuse(config: Any, reasons: Mapping[str, str]) -> None:
    """Refuse keys of TRL's config that have no meaning for the method and would be silent or change its objective.

    Call it before TRL fills in what depends on them.

    Args:
        config: a dataclass; a key is set where its value is not the default of the class.
        reasons: key → why it is refused, and what to set instead.

    Raises:
        OptionError: a key is set.
        KeyError: the config has no such key, as after a TRL release that renames it.
    """
    defaults = {entry.name: default_of(entry) for entry in fields(config)}
    for name, reason in reasons.items():
        default, value = defaults[name], getattr(config, name)
        if value != default:
            raise OptionError(f"{name}={shown(value)} cannot be honoured: {reason}. Leave it at {default!r}", key=name)


def default_of(entry: Field) -> Any:
    """The default of a dataclass field, made where it has a factory."""
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


class Options:
    """Put it before the TRL class in the bases of a config: its options are checked, and listed in the docstring."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        kinds = vars(cls).get("__annotations__", {})
        own = {name: vars(cls)[name] for name in kinds if isinstance(vars(cls).get(name), Field)}
        own = {name: entry for name, entry in own.items() if isinstance(entry.metadata.get("help"), Declaration)}
        # Transformers reads a mapping from the command line's JSON for the keys listed here.
        inherited = [name for base in cls.__mro__ for name in vars(base).get("_VALID_DICT_FIELDS", ())]
        mappings = [name for name in own if "dict[" in str(kinds[name])]
        cls._VALID_DICT_FIELDS = list(dict.fromkeys([*inherited, *mappings]))
        cls.__doc__ = _with_options(cls.__doc__, own)

    def __post_init__(self) -> None:
        check_options(self)
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    def to_dict(self) -> dict[str, Any]:
        """As transformers', which trackers (`report_to`) publish; without secrets of any key."""
        return without_secrets(super().to_dict())


def _with_options(text: str | None, own: Mapping[str, Field]) -> str | None:
    """The docstring of a config with its own options as arguments, before what it raises."""
    if not text or not own:
        return text
    lines = [
        f"    {name}: {entry.metadata['help'].replace('%%', '%')} Default: {default_of(entry)!r}."
        for name, entry in own.items()
    ]
    head, raises, tail = inspect.cleandoc(text).partition("Raises:")
    return head.rstrip() + "\n\nArgs:\n" + "\n".join(lines) + (f"\n\n{raises}{tail}" if raises else "")


def divergence_option(default: str, what: str) -> Any:
    """The option `divergence` of a method: `what` says which f it is and what it needs."""
    return option(
        default,
        f"{what}: a registry name, or a mapping with its parameters (JSON on the command line), for instance "
        '{"name": "alpha", "alpha": 0.3}; `fdiv divergences` lists them',
    )


def named_divergence(spec: Any, key: str, find: Callable[[Any], Any] = get_divergence) -> Any:
    """The divergence that a config names.

    Args:
        find: `get_divergence`, or `get_distance` where members without an f will do.

    Raises:
        ValueError: `spec` is None or an object (a config holds names, so that it can be written beside the result), or
            `find` refuses it.
    """
    if not isinstance(spec, (str, Mapping)):
        raise OptionError(
            f"{key}={shown(spec)}: give the name of a registered divergence, or a mapping with its parameters; "
            "register your own with `register_divergence` first",
            key=key,
        )
    return find(spec)


@dataclass
class RowOptions(Options):
    """`min_used_fraction`, for whatever reads rows: trainers and evaluations."""

    min_used_fraction: float = option(
        MIN_USED_FRACTION,
        "Smallest share of the rows that must be left, neither dropped nor without signal; less is an error",
        least=0,
        most=1,
        keyword=True,
    )


def add_min_used_fraction(parser: Any) -> None:
    """The flag `--min_used_fraction` of a command that reads rows."""
    parser.add_argument(
        "--min_used_fraction",
        type=float,
        default=MIN_USED_FRACTION,
        help=f"smallest share of the rows that must be left; less is an error ({MIN_USED_FRACTION:g})",
    )


@dataclass
class DivergenceOptions(RowOptions):
    """`divergence` and `normalized`, with one meaning in every method that has them."""

    #: What a name of this method is looked up with; `get_distance` where members without an f will do.
    find_divergence = staticmethod(get_divergence)  # without a type, so that it is no field

    # `| None` is what makes HfArgumentParser pass the command line's string on unparsed; None itself is refused.
    divergence: dict[str, Any] | str | None = divergence_option("reverse_kl", "The f of D_f(policy‖reference)")
    normalized: bool = option(
        False, "Divide f by f''(1), so that one weight means the same first step for every divergence"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.resolve_divergence()

    def check_divergence(self, divergence: Divergence) -> Divergence:
        """`divergence`, where the method can use it; ValueError with the reason elsewhere."""
        return divergence

    def resolve_divergence(self) -> Divergence:
        """The `Divergence` of the loss: `divergence`, scaled to f″(1) = 1 where `normalized` is set.

        Raises:
            ValueError: none that is registered, one that the method cannot use, or one without f″(1) (total
                variation) with `normalized`.
        """
        divergence = self.check_divergence(named_divergence(self.divergence, "divergence", self.find_divergence))
        return divergence.normalized() if self.normalized else divergence


@dataclass
class CappedDivergenceOptions(DivergenceOptions):
    """Adds `max_exponent`, for a loss that takes f or f′ of a log-ratio without bound."""

    max_exponent: float | None = option(
        TRAINING_MAX_EXPONENT,
        "Overflow cap on the exponents in f and f'; above it they continue logarithmically. null: the registry's own, "
        "60, at which gradient norms overflow float32",
        above=0,
        most=LARGEST_MAX_EXPONENT,
    )


@dataclass
class ChatTemplateOptions(Options):
    """What chat templates are given, with one meaning in training, evaluation, pre-sampling and rollouts."""

    system_prompt: str | None = option(None, ENCODING_HELP["system_prompt"])
    date_string: str | None = option(None, ENCODING_HELP["date_string"])
    chat_template_kwargs: dict[str, Any] | str | None = option(None, ENCODING_HELP["chat_template_kwargs"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.chat_template_kwargs, Mapping | None):
            raise ValueError(
                f"chat_template_kwargs={self.chat_template_kwargs!r}: give a mapping, {{enable_thinking: false}}"
            )
        self.encoding()

    def encoding(self) -> Encoding:
        """How rows are encoded."""
        return Encoding(self.system_prompt, self.date_string, self.chat_template_kwargs)

    def evaluation_keys(self) -> dict[str, Any]:
        """What an evaluation of the trained model takes over where its own block does not say."""
        return {name: getattr(self, name) for name in ENCODING_HELP if hasattr(self, name)}


@dataclass
class EncodingOptions(ChatTemplateOptions):
    """Adds `end_token`, for rows with answers."""

    end_token: str = option("turn", ENCODING_HELP["end_token"], choices=END_TOKENS)

    def encoding(self) -> Encoding:
        """How rows are encoded."""
        return Encoding(self.system_prompt, self.date_string, self.chat_template_kwargs, self.end_token)
