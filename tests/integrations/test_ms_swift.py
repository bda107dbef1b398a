"""f-DPO and other losses of pairs in ms-swift, by value, against a stand-in of the interface that ms-swift 4.6.0 has."""

from __future__ import annotations

import importlib
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from fdiv.alignment import f_dpo_loss, f_dpo_rewards
from fdiv.integrations.ms_swift import Pairs, register_f_dpo, register_pair_loss
from fdiv.unlearning import flat_loss

ANSWERS = {
    "chosen_logps": torch.tensor([-4.0, -9.0]),
    "rejected_logps": torch.tensor([-6.0, -5.0]),
    "ref_chosen_logps": torch.tensor([-5.0, -8.5]),
    "ref_rejected_logps": torch.tensor([-5.5, -5.0]),
}
COUNTS = {
    "chosen_completion_token_counts": torch.tensor([4, 3]),
    "rejected_completion_token_counts": torch.tensor([2, 5]),
}


class DPOTrainer:
    """What `dpo_loss` reads of ms-swift's trainer, at its defaults."""

    def __init__(self, beta=0.1, **options):
        self.beta, self.label_smoothing, self.reference_free = beta, 0, False
        self.f_divergence_type = "reverse_kl"
        self.args = SimpleNamespace(ld_alpha=None)
        self.accelerator = SimpleNamespace(device=torch.device("cpu"))
        vars(self).update(options)

    def dpo_loss(self, *_):
        raise AssertionError("ms-swift's own loss")


@pytest.fixture
def swift(monkeypatch):
    mapping = {"dpo": "swift.rlhf_trainers.DPOTrainer", "grpo": "swift.rlhf_trainers.GRPOTrainer"}
    modules = {
        "swift": {},
        "swift.rlhf_trainers": {"DPOTrainer": DPOTrainer},
        "swift.trainers": {},
        "swift.trainers.trainer_factory": {"TrainerFactory": SimpleNamespace(TRAINER_MAPPING=mapping)},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return mapping


def named(mapping):
    """The class as ms-swift finds it: by the path in its mapping."""
    module, _, name = mapping["dpo"].rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon", {"name": "alpha", "alpha": 0.3}])
def test_f_dpo_by_value(swift, divergence):
    made = register_f_dpo(divergence)
    assert named(swift) is made and swift["grpo"] == "swift.rlhf_trainers.GRPOTrainer"
    losses, chosen, rejected = made(beta=0.2).dpo_loss(*ANSWERS.values(), "sigmoid", COUNTS)
    ratios = torch.tensor([1.0, -0.5]), torch.tensor([-0.5, 0.0])
    torch.testing.assert_close(losses, f_dpo_loss(*ratios, divergence, 0.2))
    torch.testing.assert_close(chosen, f_dpo_rewards(ratios[0], divergence, 0.2))
    torch.testing.assert_close(rejected, f_dpo_rewards(ratios[1], divergence, 0.2))


def test_reverse_kl_is_dpo(swift):
    """−log σ(β·(1 − (−½))) and −log σ(β·(−½ − 0)) at β = 0.1, by hand."""
    losses, *_ = register_f_dpo("reverse_kl")().dpo_loss(*ANSWERS.values(), "sigmoid", COUNTS)
    assert losses.tolist() == pytest.approx([0.6209570, 0.7184597], rel=1e-6)


def test_gradient_reaches_the_policy_alone(swift):
    answers = [tensor.clone().requires_grad_() for tensor in ANSWERS.values()]
    losses, chosen, _ = register_f_dpo("jensen_shannon")().dpo_loss(*answers, "sigmoid", COUNTS)
    assert not chosen.requires_grad
    losses.sum().backward()
    assert (answers[0].grad < 0).all() and (answers[1].grad > 0).all()


def test_flat_with_templates_as_chosen_answers(swift):
    def loss(pairs: Pairs):
        means = pairs.chosen_log_prob / pairs.chosen_tokens, pairs.rejected_log_prob / pairs.rejected_tokens
        return flat_loss(*(mean.exp() for mean in means), "jensen_shannon")

    losses, chosen, _ = register_pair_loss(loss)(beta=0.1).dpo_loss(*ANSWERS.values(), "sigmoid", COUNTS)
    template, forget = torch.tensor([-1.0, -3.0]).exp(), torch.tensor([-3.0, -1.0]).exp()
    torch.testing.assert_close(losses, flat_loss(template, forget, "jensen_shannon"))
    torch.testing.assert_close(chosen, 0.1 * torch.tensor([1.0, -0.5]))


@pytest.mark.parametrize(
    ("options", "loss_type", "message"),
    [
        ({}, "hinge", "loss_type='hinge'"),
        ({"label_smoothing": 0.1}, "sigmoid", "label_smoothing=0.1"),
        ({"reference_free": True}, "sigmoid", "reference_free=True"),
        ({"f_divergence_type": "js_divergence"}, "sigmoid", "f_divergence_type='js_divergence'"),
        ({"args": SimpleNamespace(ld_alpha=0.5)}, "sigmoid", "ld_alpha=0.5"),
    ],
)
def test_options_of_the_loss_that_is_replaced_are_refused(swift, options, loss_type, message):
    trainer = register_f_dpo("jensen_shannon")(**options)
    with pytest.raises(ValueError, match=message):
        trainer.dpo_loss(*ANSWERS.values(), loss_type, COUNTS)


def test_a_divergence_that_f_dpo_has_not_is_refused_before_training(swift):
    with pytest.raises(ValueError, match="f-DPO cannot use the divergence 'total_variation'"):
        register_f_dpo("total_variation")
    assert swift["dpo"] == "swift.rlhf_trainers.DPOTrainer"
