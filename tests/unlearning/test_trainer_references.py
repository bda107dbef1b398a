"""Every trainer's reference: the base with the adapter off, a frozen copy, precomputed, or none."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.support.runs.unlearning import (
    disturb,
    forget_rows,
    history,
    load,
    load_tokenizer,
    make_trainer,
)
from tests.support.same_run import PLAIN_STEPS, assert_same_weights, weights

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.0}


def _first_batch_loss(trainer):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    return trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("name", ["NPO", "KLRetain", "UNDIAL", "RMU"])
@pytest.mark.processor
def test_lora_reference_is_the_base_with_the_adapter_off(name, tiny_model_dir, tmp_path):
    """The same disturbed policy as an adapter and merged, each with its own kind of reference."""
    lora = make_trainer(name, str(tiny_model_dir), tmp_path, peft_config=LoraConfig(**LORA))
    assert lora.reference.model is None
    disturb(lora.model)
    full = make_trainer(name, str(tiny_model_dir), tmp_path, ref_model=load(tiny_model_dir))
    with torch.no_grad():
        for layer, (own, adapted) in enumerate(
            zip(full.model.model.layers, lora.model.get_base_model().model.layers, strict=True)
        ):
            for target in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
                module = adapted.get_submodule(target)
                own.get_submodule(target).weight += module.get_delta_weight("default")
            assert layer < 2
    torch.testing.assert_close(_first_batch_loss(lora), _first_batch_loss(full), atol=1e-5, rtol=1e-4)
    assert _first_batch_loss(lora).item() != pytest.approx(_loss_at_start(name, tiny_model_dir, tmp_path), abs=1e-6)


def _loss_at_start(name, model_dir, tmp_path):
    return _first_batch_loss(make_trainer(name, str(model_dir), tmp_path)).item()


def test_lora_trains_the_adapter_only_also_with_checkpointing(tiny_model_dir, tmp_path):
    trainer = make_trainer(
        "IdkDPO", str(tiny_model_dir), tmp_path, peft_config=LoraConfig(**LORA), gradient_checkpointing=True,
        learning_rate=1e-2,
    )  # fmt: skip
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" not in name}
    trainer.train()
    assert all(torch.equal(p, base[name]) for name, p in trainer.model.named_parameters() if name in base)
    moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert moved and all((p != 0).any() for p in moved)
    assert history(trainer, "log_ratio/forget_p50")[-1] != 0


def test_continued_adapter_has_its_start_as_reference(tiny_model_dir, tmp_path):
    """The reference is the adapter as passed, not the bare base, and stays put while the policy trains."""
    peft = get_peft_model(load(tiny_model_dir), LoraConfig(**LORA))
    disturb(peft)
    trainer = make_trainer("NPO", peft, tmp_path, tokenizer=load_tokenizer(tiny_model_dir), learning_rate=1e-2)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".ref." in name}
    assert frozen and not any(p.requires_grad for n, p in trainer.model.named_parameters() if ".ref." in n)
    trainer.train()
    assert history(trainer, "log_ratio/forget_p50")[0] == pytest.approx(0, abs=1e-4)
    assert abs(history(trainer, "log_ratio/forget_p50")[-1]) > 1e-2
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)


@pytest.mark.parametrize("name", ["NPO", "IdkDPO"])
@pytest.mark.processor
def test_precomputed_reference_is_the_same_run(name, tiny_model_dir, tmp_path):
    options = {"max_steps": 7, "eval_dataset": forget_rows(5), **PLAIN_STEPS, "learning_rate": 0.05}
    live = make_trainer(name, str(tiny_model_dir), tmp_path, **options)
    table = make_trainer(name, str(tiny_model_dir), tmp_path, precompute_reference=True, **options)
    assert not hasattr(table.reference, "model")
    start = weights(live)
    live.train(), table.train()
    assert (weights(live) - start).abs().max() > 1e-2
    assert_same_weights(table, live, 1e-5)
    live_eval, table_eval = live.evaluate(), table.evaluate()
    assert table_eval["eval_loss"] == pytest.approx(live_eval["eval_loss"], rel=1e-5)
    with pytest.raises(ValueError, match="no precomputed reference score"):
        table.evaluate(forget_rows(30).select(range(25, 30)))


def test_reference_is_not_moved_by_training(tiny_model_dir, tmp_path):
    trainer = make_trainer("KLRetain", load(tiny_model_dir), tmp_path, tokenizer=load_tokenizer(tiny_model_dir))
    before = [p.clone() for p in trainer.reference.model.parameters()]
    trainer.train()
    assert all(torch.equal(p, b) for p, b in zip(trainer.reference.model.parameters(), before, strict=True))
    assert history(trainer, "divergence/forward_kl")[-1] > 0


def test_methods_without_a_reference_make_none(tiny_model_dir, tmp_path):
    for name in ("FLAT", "GradAscent", "GradDiff", "SimNPO", "WGA", "SatImp", "CEU", "PDU"):
        assert make_trainer(name, str(tiny_model_dir), tmp_path).reference is None
    with pytest.raises(ValueError, match="uses no reference"):
        make_trainer("WGA", str(tiny_model_dir), tmp_path, ref_model=load(tiny_model_dir))
