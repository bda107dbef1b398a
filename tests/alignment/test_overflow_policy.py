"""The default cap of the training configs: every valid f trains on log-ratios of −500 … +500 in float32."""

import dataclasses
import importlib
import math

import pytest
import torch

from fdiv.alignment import d2o_loss, f_dpg_loss, f_dpo_loss
from fdiv.divergences import get_divergence, list_divergences
from fdiv.rl import rehearsal_loss
from fdiv.training.trainer import overflow_note
from fdiv.unlearning.losses import idk_dpo

PARAMETERS = {"alpha": [0.01, 0.5, 0.99], "skew_jensen_shannon": [0.05, 0.5, 0.95]}
KEYS = {"alpha": "alpha", "skew_jensen_shannon": "weight"}
SPECS = [
    spec
    for name in list_divergences()
    for spec in ([{"name": name, KEYS[name]: value} for value in PARAMETERS[name]] if name in PARAMETERS else [name])
]
LOG_RATIOS = torch.tensor([-500.0, -200.0, -100.0, -43.0, -22.0, -10.0, -1.0, 0.0, 1.0, 22.0, 43.0, 100.0, 500.0])
CHOSEN, REJECTED = (grid.flatten() for grid in torch.meshgrid(LOG_RATIOS, LOG_RATIOS, indexing="ij"))
CONFIGS = {
    "f_dpo": "fdiv.alignment.f_dpo.config:FDPOConfig",
    "d2o": "fdiv.alignment.d2o.config:D2OConfig",
    "f_dpg": "fdiv.alignment.f_dpg.config:FDPGConfig",
    "dph": "fdiv.rl.dph.config:DPHConfig",
    "idk_dpo": "fdiv.unlearning.methods.idk_dpo:IdkDPOConfig",
}


def losses(chosen, rejected, spec, cap):
    """Every objective that has `max_exponent`, on the same pairs; None where f is not valid for it."""
    mask = torch.ones(len(chosen), 1)
    for name, loss in {
        "f_dpo": lambda: f_dpo_loss(chosen, rejected, spec, 0.1, max_exponent=cap),
        "d2o": lambda: d2o_loss(chosen[:, None], rejected, 0.1, 0.1, spec, max_exponent=cap),
        "idk_dpo": lambda: idk_dpo(chosen, rejected, spec, 0.1, max_exponent=cap),
        "f_dpg": lambda: f_dpg_loss(chosen, chosen.detach(), spec, max_exponent=cap),
        "dph token": lambda: rehearsal_loss(chosen[:, None], mask, spec, "token", max_exponent=cap),
        "dph sequence": lambda: rehearsal_loss(chosen[:, None], mask, spec, "sequence", max_exponent=cap),
    }.items():
        try:
            yield name, loss()
        except ValueError:
            yield name, None


@pytest.mark.parametrize("name", CONFIGS)
def test_the_default_is_ten(name):
    module, attribute = CONFIGS[name].split(":")
    fields = {f.name: f for f in dataclasses.fields(getattr(importlib.import_module(module), attribute))}
    assert fields["max_exponent"].default == 10.0


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradient_norms_fit_float32_and_no_pair_owns_them(spec):
    """The log-ratios are sums of 300 token terms whose derivative by 1,000 shared weights has norm 30 each."""
    directions = 30.0 * torch.nn.functional.normalize(torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)))
    valid = 0
    for which in range(6):
        pair = [CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()]
        name, value = list(losses(*pair, spec, 10.0))[which]
        if value is None:
            continue
        valid += 1
        assert torch.isfinite(value).all(), name
        grads = torch.autograd.grad(value.sum(), pair, allow_unused=True, materialize_grads=True)
        per_pair = grads[0][:, None] * directions[0] + grads[1][:, None] * directions[1]
        norm = per_pair.sum(0).norm()
        assert norm.dtype == torch.float32 and math.isfinite(norm) and norm < 1e13, name
        assert torch.isfinite(per_pair.norm(dim=1)).all(), name
    assert valid >= 3


def test_the_registrys_own_cap_overflows_the_norm():
    """What the default is for: at −100 with forward KL an element is e^60·β, and its square is no float32."""
    chosen = torch.full((8,), -100.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(f_dpo_loss(chosen, torch.zeros(8), "forward_kl", 0.1).sum(), chosen)
    assert torch.isfinite(gradient).all() and torch.isinf((30.0 * gradient).norm())


def test_the_line_at_the_start():
    forward_kl, chi = get_divergence("forward_kl"), get_divergence("neyman_chi2")
    assert overflow_note(forward_kl, forward_kl.exponents, 10.0) == (
        "max_exponent=10: the exponentials of forward_kl go on as logarithms at log u below -10; "
        "clamped_fraction in the log says how often"
    )
    assert "log u below -5;" in overflow_note(chi, chi.exponents, 10.0)
    assert "max_exponent=60" in overflow_note(chi, chi.exponents, None)
    assert "gradient norms can overflow float32 with it: 10 is known to train" in overflow_note(
        chi, chi.exponents, None
    )
    assert overflow_note(get_divergence("reverse_kl"), (), 10.0) is None
    assert "log u above 10 and log u below -5" in overflow_note(chi, (1.0, -2.0), 10.0)


@pytest.mark.parametrize(
    "divergence", ["neyman_chi2", "forward_kl", "jeffreys", {"name": "alpha", "alpha": 0.5}], ids=str
)
def test_a_run_far_from_its_reference_trains(tiny_model_dir, tmp_path, divergence, capsys):
    """A policy whose log-ratios are hundreds of nats from the reference: with the cap of 60 its first step ends the run."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from fdiv.errors import NonFiniteLossError
    from tests.support.runs.f_dpo import make_trainer, preference_rows

    def trainer(folder, **options):
        policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        with torch.no_grad():
            policy.get_output_embeddings().weight.mul_(300.0)
        reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        rows = Dataset.from_list(preference_rows())
        options |= {"model": policy, "ref_model": reference, "divergence": divergence, "max_steps": 2}
        return make_trainer(tiny_model_dir, rows, tmp_path / folder, **options)

    made = trainer("capped")
    made.train()
    first = made.state.log_history[0]
    assert min(first["log_ratio/chosen_p05"], first["log_ratio/rejected_p05"]) < -100, first
    assert math.isfinite(first["grad_norm"]) and first["clamped_fraction"] > 0.5
    assert "max_exponent=10: the exponentials of" in capsys.readouterr().err
    with pytest.raises(NonFiniteLossError):
        trainer("uncapped", max_exponent=None).train()
