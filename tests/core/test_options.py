"""Options of a config: one declaration gives help, bounds and choices; the same for every family, found by walking them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib import import_module

import pytest
import torch

from fdiv.training.config import (
    CappedDivergenceOptions,
    DivergenceOptions,
    Options,
    check_options,
    named_divergence,
    option,
    refuse,
)

CONFIGS = [
    *((f"fdiv.alignment:{name}Config") for name in ("FDPO", "D2O", "FDPG")),
    "fdiv.rl:DPHConfig",
    "fdiv.rl.presample.config:PresampleConfig",
    *(
        f"fdiv.unlearning:{name}Config"
        for name in (
            "AltPO", "CEU", "FLAT", "GradAscent", "GradDiff", "IdkDPO", "JensUn", "JensUnPP", "KLRetain", "NPO", "PDU",
            "RMU", "SatImp", "SHRED", "SimNPO", "UNDIAL", "WGA",
        )
    ),
]  # fmt: skip
_NEEDED = {"PDUConfig": {"retain_epsilon": 0.3}, "PresampleConfig": {}}


@pytest.fixture(params=CONFIGS, ids=lambda path: path.rpartition(":")[2])
def config(request):
    module, _, name = request.param.partition(":")
    return getattr(import_module(module), name)


def make(config, tmp_path, **values):
    trl = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "report_to": []}
    trl = {} if config.__name__ == "PresampleConfig" else trl
    return config(**(trl | _NEEDED.get(config.__name__, {}) | values))


def declared(config):
    """(field, declaration) of every option that is declared with `option`."""
    return [
        (entry, entry.metadata["help"]) for entry in fields(config) if hasattr(entry.metadata.get("help"), "bounds")
    ]


def outside(entry, help_text):
    """Values that the declaration does not allow."""
    whole = entry.type in ("int", int, "int | None")
    step = 1 if whole else 1e-6
    beyond = {"above": 0, "least": -step, "below": 0, "most": step}
    yield from (limit + beyond[bound] for bound, limit in help_text.bounds.items())
    if help_text.choices:
        yield "no such choice"
    if help_text.bounds:
        yield from (float("nan"), float("inf"), float("-inf"), True, "fast")
        if whole:
            yield 2.5


def test_every_option_refuses_what_lies_outside_its_declaration(config, tmp_path):
    make(config, tmp_path)
    options = declared(config)
    assert options
    for entry, help_text in options:
        for value in outside(entry, help_text):
            with pytest.raises(ValueError, match=rf"^{entry.name}=.*: must be "):
                make(config, tmp_path, **{entry.name: value})


def test_help_states_the_bounds_and_every_own_key_is_declared(config):
    words = {"above": "above {:g}", "least": "at least {:g}", "below": "below {:g}", "most": "at most {:g}"}
    for entry, help_text in declared(config):
        assert help_text.endswith(".") and not help_text.endswith("..")
        for bound, limit in help_text.bounds.items():
            assert words[bound].format(limit) in help_text, entry.name
    trl = {name for base in config.__mro__ if base.__module__.startswith(("trl", "transformers"))
           for name in getattr(base, "__dataclass_fields__", {})}  # fmt: skip
    undeclared = {entry.name for entry in fields(config)} - trl - {entry.name for entry, _ in declared(config)}
    assert not undeclared


def test_own_options_stand_in_the_docstring(config):
    for name in vars(config).get("__annotations__", {}):
        if name in config.__dataclass_fields__:
            assert f"\n    {name}: " in config.__doc__, name


def test_mappings_are_read_from_the_command_line(config):
    from trl import TrlParser

    if config.__name__ == "PresampleConfig":
        pytest.skip("a command of its own")
    for name in ("divergence", "retain_divergence", "proposal_metric"):
        if name in config.__dataclass_fields__:
            assert name in config._VALID_DICT_FIELDS
    if issubclass(config, DivergenceOptions):
        words = ["--output_dir", "x", "--bf16", "false", "--use_cpu", "true"]
        words += ["--retain_epsilon", "0.3"] if config.__name__ == "PDUConfig" else []
        spec = '{"name": "jensen_shannon"}'
        (parsed,) = TrlParser((config,)).parse_args_and_config([*words, "--divergence", spec])
        assert parsed.divergence == {"name": "jensen_shannon"}


def test_divergence_normalized_and_cap_mean_the_same_everywhere(config, tmp_path):
    if not issubclass(config, DivergenceOptions):
        return
    for name in ("jensen_shannon", {"name": "alpha", "alpha": 0.3}):
        plain = make(config, tmp_path, divergence=name).resolve_divergence()
        assert plain == named_divergence(name, "divergence")
        scaled = make(config, tmp_path, divergence=name, normalized=True).resolve_divergence()
        assert scaled == plain.normalized() and scaled.curvature == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"^divergence=None: give the name of a registered divergence"):
        make(config, tmp_path, divergence=None)
    with pytest.raises(ValueError, match="register_divergence"):
        make(config, tmp_path, divergence=named_divergence("jensen_shannon", "divergence"))
    if issubclass(config, CappedDivergenceOptions):
        assert make(config, tmp_path, max_exponent=80).max_exponent == 80


# ------------------------------------------------------------------------------------------------ the pieces, by hand


@dataclass
class Toy(Options):
    """A toy.

    Raises:
        ValueError: outside.
    """

    rate: float = option(0.5, "Rate, 50% at first", above=0, most=1, why="Above it nothing is left")
    count: int = option(2, "Count", least=1)
    bound: float | None = option(None, "Bound", above=0)
    mode: str = option("fast", "Mode", choices=("fast", "slow"))
    share: str | float = option("7/8", "Share")
    spec: dict[str, int] | None = option(None, "Spec")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0}, "rate=0: must be above 0 and at most 1. Above it nothing is left"),
        ({"rate": 1.5}, "rate=1.5: must be above 0 and at most 1. Above it nothing is left"),
        ({"rate": float("nan")}, "rate=nan: must be a finite number above 0 and at most 1. Above it nothing is left"),
        ({"rate": None}, "rate=None: must be a finite number above 0 and at most 1. Above it nothing is left"),
        ({"count": 0}, "count=0: must be at least 1"),
        ({"count": 1.5}, "count=1.5: must be a whole number at least 1"),
        ({"count": True}, "count=True: must be a whole number at least 1"),
        ({"bound": -1.0}, "bound=-1.0: must be above 0"),
        ({"bound": float("inf")}, "bound=inf: must be a finite number above 0"),
        ({"bound": "1"}, "bound='1': must be a finite number above 0"),
        ({"mode": "slo"}, "mode='slo': must be one of fast, slow"),
        ({"mode": None}, "mode=None: must be one of fast, slow"),
        ({"share": float("nan")}, "share=nan: must be a finite number"),
    ],
)
def test_one_message_form(values, message):
    with pytest.raises(ValueError) as caught:
        Toy(**values)
    assert str(caught.value) == message


def test_what_lies_inside_passes():
    Toy(rate=1, count=10**9, bound=1e-300, mode="slow", share=0.5, spec={"a": 1})
    Toy(share="1/2")
    assert Toy.__doc__ == (
        "A toy.\n\nArgs:\n"
        "    rate: Rate, 50% at first; above 0 and at most 1. Default: 0.5.\n"
        "    count: Count; at least 1. Default: 2.\n"
        "    bound: Bound; above 0. Default: None.\n"
        "    mode: Mode. Default: 'fast'.\n"
        "    share: Share. Default: '7/8'.\n"
        "    spec: Spec. Default: None.\n\n"
        "Raises:\n    ValueError: outside."
    )
    assert Toy._VALID_DICT_FIELDS == ["spec"]


def test_values_set_later_can_be_checked_again():
    toy = Toy()
    toy.count = -1
    with pytest.raises(ValueError, match="count=-1"):
        check_options(toy)


def test_refuse_names_value_reason_and_default():
    toy = Toy(count=3)
    refuse(toy, {"rate": "no"})
    with pytest.raises(ValueError) as caught:
        refuse(toy, {"rate": "no", "count": "there is one of each"})
    assert str(caught.value) == "count=3 cannot be honoured: there is one of each. Leave it at 2"
    with pytest.raises(KeyError):
        refuse(toy, {"cuont": "a key that a TRL release renamed"})


def test_a_method_may_restrict_the_divergence(tmp_path):
    @dataclass
    class Finite(CappedDivergenceOptions):
        def check_divergence(self, divergence):
            if divergence.slope_at_infinity == float("inf"):
                raise ValueError(f"{divergence.name} has an infinite slope")
            return divergence

    with pytest.raises(ValueError, match="reverse_kl has an infinite slope"):
        Finite()
    divergence = Finite(divergence="jensen_shannon", normalized=True).resolve_divergence()
    log_t = torch.tensor([0.3], dtype=torch.float64)
    by_hand = (1 + log_t.exp()) / 2
    by_hand = log_t.exp() * (log_t - by_hand.log()) - by_hand.log()  # t log t − (1 + t) log((1 + t)/2), f''(1) = 1/2
    torch.testing.assert_close(divergence.generator(log_t), 2 * by_hand)
    with pytest.raises(ValueError, match="no curvature"):
        Finite(divergence="total_variation", normalized=True)
