"""FDPOConfig: what it accepts from YAML and the command line, and what it refuses before anything is loaded."""

from __future__ import annotations

import pytest
import yaml
from trl import TrlParser

from fdiv.alignment import FDPOConfig
from fdiv.divergences import get_divergence


def _config(tmp_path, **options) -> FDPOConfig:
    return FDPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to=[], **options)


def _parse(tmp_path, *arguments: str, recipe: dict | None = None) -> FDPOConfig:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path), "bf16": False, "use_cpu": True} | (recipe or {})))
    (config,) = TrlParser((FDPOConfig,)).parse_args_and_config(["--config", str(path), *arguments])
    return config


def test_divergence_from_yaml_and_from_the_command_line(tmp_path):
    wanted = get_divergence({"name": "alpha", "alpha": 0.3})
    from_yaml = _parse(tmp_path, recipe={"divergence": {"name": "alpha", "alpha": 0.3}})
    from_json = _parse(tmp_path, "--divergence", '{"name": "alpha", "alpha": 0.3}')
    assert from_yaml.resolve_divergence() == from_json.resolve_divergence() == wanted
    by_name = _parse(tmp_path, "--divergence", "jensen_shannon", "--max_exponent", "10", "--normalized", "true")
    assert by_name.resolve_divergence().curvature == 1.0 and by_name.max_exponent == 10.0
    assert by_name.resolve_divergence() == get_divergence("jensen_shannon").normalized()
    assert _parse(tmp_path).resolve_divergence() == get_divergence("reverse_kl")


def test_config_survives_a_round_trip_through_its_dict(tmp_path):
    config = _config(tmp_path, divergence={"name": "alpha", "alpha": 0.3}, max_exponent=5.0)
    again = FDPOConfig(**{k: v for k, v in config.to_dict().items() if k in ("output_dir", "divergence", "max_exponent",
                                                                             "bf16", "use_cpu")})  # fmt: skip
    assert again.divergence == config.divergence and again.max_exponent == 5.0
    assert "alpha" in config.to_json_string()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "total_variation"}, r"total_variation.*f'\(0\+\) = -inf"),
        ({"divergence": "pearson_chi2"}, r"pearson_chi2.*KKT"),
        ({"divergence": "le_cam"}, r"le_cam.*KKT"),
        ({"divergence": "reverse_lk"}, r"reverse_lk.*did you mean reverse_kl"),
        ({"divergence": "kl"}, r"ambiguous"),
        ({"divergence": "alpha"}, r"needs the parameter 'alpha'"),
        ({"divergence": {"name": "alpha", "alpha": 1.2}}, r"alpha.*1\.2"),
        ({"divergence": {"name": "alpha", "alhpa": 0.3}}, r"alpha"),
        ({"divergence": None}, r"divergence=None: give the name"),
        ({"divergence": get_divergence("reverse_kl")}, r"register_divergence"),
        ({"beta": 0.0}, r"beta=0\.0"),
        ({"max_exponent": 100.0}, r"max_exponent=100.0: must be above 0 and at most 80"),
        ({"max_exponent": 0.0}, r"max_exponent"),
        ({"ece_bins": 0}, r"ece_bins=0"),
        ({"loss_type": "ipo"}, r"loss_type=\['ipo'\] cannot be honoured"),
        ({"loss_type": ["sigmoid", "sft"]}, r"loss_type"),
        ({"loss_weights": [0.5]}, r"loss_weights=\[0\.5\]"),
        ({"f_divergence_type": "js_divergence"}, r"set `divergence` instead"),
        ({"f_alpha_divergence_coef": 0.7}, r"A = 1 - f_alpha_divergence_coef"),
        ({"label_smoothing": 0.1}, r"label_smoothing=0\.1"),
        ({"use_weighting": True}, r"WPO"),
        ({"ld_alpha": 0.5}, r"LD-DPO"),
        ({"padding_free": True}, r"padding_free"),
        ({"discopop_tau": 0.1}, r"discopop"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals_name_the_thing_and_the_remedy(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _config(tmp_path, **options)


def test_a_registered_divergence_of_ones_own_is_reached_by_name(tmp_path, monkeypatch):
    from fdiv.divergences import Divergence, register_divergence, registry

    monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    register_divergence(Divergence.from_generator("my_reverse_kl", lambda x: x.exp() * x - x.exp() + 1))
    assert _config(tmp_path, divergence="my_reverse_kl").resolve_divergence().name == "my_reverse_kl"
