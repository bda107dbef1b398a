"""The losses in a stock `SFTTrainer` (`examples/unlearning_in_sft_trainer.py`) are those of our trainers, number by number."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
from datasets import Dataset

from tests.support.runs.unlearning import make_trainer

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "unlearning_in_sft_trainer.py"

# Our trainer of each loss, with the weights and choices of the script where they are not its defaults.
OURS = {
    "flat": ("FLAT", {"divergence": "jensen_shannon", "reduction": "log_mean", "retain_term": "none"}),
    "grad_ascent": ("GradAscent", {"retain_term": "none"}),
    "grad_diff": ("GradDiff", {}),
    "kl_retain": ("KLRetain", {}),
    "npo": ("NPO", {"retain_term": "none"}),
    "simnpo": ("SimNPO", {"beta": 0.5, "forget_weight": 1.0, "retain_term": "none"}),
    "idk_dpo": ("IdkDPO", {"divergence": "jensen_shannon", "retain_term": "none"}),
    "undial": ("UNDIAL", {}),
    "ce_u": ("CEU", {}),
    "wga": ("WGA", {"retain_term": "none"}),
    "sat_imp": ("SatImp", {"beta1": 1.0, "retain_term": "none"}),
    "pdu": ("PDU", {"retain_weight": 2.0}),
    "jensun_pp": ("JensUnPP", {"prefix_share": 0.0, "forget_weight": 1.0}),  # the loss alone, no prefix, no balance
    "shred": ("SHRED", {}),
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("unlearning_in_sft_trainer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_loss_of_the_methods_is_in_the_script(script):
    from fdiv.catalog import METHODS

    methods = {name for name, path in METHODS.items() if path.startswith("fdiv.unlearning.")}
    assert set(script.LOSSES) == methods - {"alt_po"}  # idk_dpo's loss on other templates
    assert set(OURS) | {"rmu", "jensun"} == set(script.LOSSES)


@pytest.mark.parametrize("name", OURS)
def test_first_loss_is_that_of_our_trainer(script, name, tiny_model_dir, tmp_path, monkeypatch):
    """One batch holds all rows and there is one retain row, so that neither order nor pairing matters."""
    rows = Dataset.from_list(
        [script.rows()[2] if number % 3 == 2 else row for number, row in enumerate(script.rows())]
    )
    monkeypatch.setattr(script, "rows", lambda: rows)
    template, forget, retain = (rows.select(range(role, len(rows), 3)) for role in range(3))
    forget = forget.add_column("instead", template["completion"])
    method, options = OURS[name]
    if method in ("FLAT", "IdkDPO", "JensUnPP"):
        options = {"template_source": "column", "template_column": "instead", **options}
    ours = make_trainer(
        method, str(tiny_model_dir), tmp_path / "ours", rows=Dataset.from_list(list(forget)), retain=retain,
        per_device_train_batch_size=len(forget), max_steps=1, **options,
    )  # fmt: skip
    ours.train()
    expected = next(entry["loss"] for entry in ours.state.log_history if "loss" in entry)
    (found,) = script.train(name, str(tiny_model_dir), str(tmp_path / "stock"), steps=1)
    assert math.isfinite(found) and abs(found) > 1e-5
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["rmu", "jensun", "flat", "npo"])
def test_a_loss_falls(script, name, tiny_model_dir, tmp_path):
    losses = script.train(name, str(tiny_model_dir), str(tmp_path), steps=6)
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))
