"""QLoRA with all five trainers, through recipes: the base in 4 bits (bitsandbytes on the CPU), an adapter on top."""

import json

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import fdiv.run.run
from fdiv.cli import main
from fdiv.errors import DataError, RolloutError
from fdiv.inference.vllm_server import merged_state_dict
from fdiv.models.loading import keep_trainable_layout, load_model
from fdiv.models.logprobs import token_scores
from tests.robustness.test_lora import ONE_QUICKLY, Gradients, adapter_weights, reference_scores
from tests.robustness.test_memory_plan import planned_and_counted
from tests.support.runs.all_trainers import TRAINERS, losses
from tests.support.runs.d2o import negative_rows
from tests.support.runs.dph import cache
from tests.support.runs.f_dpg import PROMPTS
from tests.support.runs.f_dpo import preference_rows
from tests.support.runs.unlearning import disturb, forget_rows, retain_rows

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'fdiv[qlora]'")

ROWS = {
    "f_dpo": preference_rows(12),
    "f_dpg": [{"prompt": prompt} for prompt in PROMPTS],
    "d2o": negative_rows(8, anchors=3).to_list(),
    "flat": forget_rows(12).to_list(),
    "dph": [{"prompt": prompt} for prompt in PROMPTS],
}
ROLLOUTS = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 5}
# Each with a reference. FLAT's losses are differences of probabilities near 1/384 here, hence the weights.
METHODS = {
    "f_dpo": {"divergence": "jensen_shannon", "beta": 0.5},
    "f_dpg": {
        **ROLLOUTS,
        "divergence": "jensen_shannon",
        "target": {"name": "reward", "beta": 0.2, "scorers": ["tests.support.runs.f_dpg:length_reward"]},
    },
    "d2o": {"num_generations": 3, "max_completion_length": 5, "alpha": 0.5, "beta": 0.5},
    "flat": {"retain_term": "divergence", "forget_weight": 1000.0, "max_length": 64},
    "dph": {**ROLLOUTS, "reward": "tests.support.runs.dph:reward", "kl": "k3_loss"},
}


@pytest.fixture
def run(tiny_model_dir, tmp_path, monkeypatch):
    """Run a recipe of a method with `load_in_4bit` and some keys changed; what the command line made of it."""
    made = []
    original = fdiv.run.run._trainer

    def remember(*arguments):
        found = original(*arguments)
        made.append(found[0])
        return found

    monkeypatch.setattr(fdiv.run.run, "_trainer", remember)

    def write_and_run(name, output="out", code=0, **changes):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
        recipe = {
            "method": name, "model_name_or_path": str(tiny_model_dir), "dataset_name": str(data),
            "output_dir": str(tmp_path / output), "load_in_4bit": True, "use_peft": True, "lora_r": 4, "lora_alpha": 8,
            "lora_target_modules": "all-linear", "max_steps": 4, "per_device_train_batch_size": 4,
            "learning_rate": 5e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "steps",
            "save_steps": 2, "report_to": "none", **METHODS[name], **changes,
        }  # fmt: skip
        recipe = {key: value for key, value in recipe.items() if value is not None}
        if name == "flat":
            retain = tmp_path / "retain.jsonl"
            retain.write_text("".join(json.dumps(row) + "\n" for row in retain_rows().to_list()))
            recipe |= {"retain_dataset_name": str(retain)}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        assert main(["run", str(path)]) == code
        return made[-1] if code == 0 else None

    return write_and_run


def four_bit_base(model_dir, **more):
    """The base alone, loaded as `load_in_4bit: true` has it loaded, in the layout for training."""
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32, **more}
    loading = BitsAndBytesConfig(load_in_4bit=True, **settings)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, quantization_config=loading)
    keep_trainable_layout(model)
    return model.eval()


def quantised(model):
    """The packed weights by the name they have without PEFT."""
    named = ((n.removeprefix("base_model.model."), p) for n, p in model.named_parameters() if p.dtype == torch.uint8)
    return {name.replace(".base_layer.", "."): p.detach().clone() for name, p in named}


@pytest.mark.parametrize("name", TRAINERS)
def test_an_adapter_is_trained_on_a_base_in_four_bits(name, run, tiny_model_dir, tmp_path):
    """With gradient checkpointing, as recipes have it unless they say otherwise."""
    trainer = run(name)
    base, stored = four_bit_base(tiny_model_dir), quantised(four_bit_base(tiny_model_dir))
    now = quantised(trainer.model)
    assert len(stored) == 14 and now.keys() == stored.keys()  # all linear layers but the head
    assert all(torch.equal(now[key], stored[key]) for key in stored)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    assert all((p != 0).any() for n, p in trainer.model.named_parameters() if "lora_B" in n)
    assert len(losses(trainer)) == 4 and max(losses(trainer)) - min(losses(trainer)) > 1e-6
    if name in ("f_dpo", "d2o", "flat"):
        assert losses(trainer)[-1] < losses(trainer)[0] - 1e-3
    assert trainer.model.is_gradient_checkpointing
    assert getattr(trainer, "ref_model", None) is None

    # the reference is the base in 4 bits, not the one on disk, and not the policy
    disturb(trainer.model, scale=0.1)
    ids, attention, completion, found = reference_scores(name, trainer)
    full = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        rows = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}
        expected, on_disk, policy = (
            token_scores(model, **rows, fused=False).log_probs.sum(-1) for model in (base, full, trainer.model.eval())
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (on_disk - expected).abs().max() > 1e-2 < (policy - expected).abs().max()

    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert {path.name for path in checkpoint.glob("*model*")} == {"adapter_model.safetensors"}
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_model_dir
    )


@pytest.mark.parametrize("name", ONE_QUICKLY)
def test_a_resumed_run_is_the_uninterrupted_one(name, run, tmp_path):
    import shutil

    whole = run(name)
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    for path in ("checkpoint-4", "result.json"):
        target = tmp_path / "cut" / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    cut = run(name, "cut", resume_from_checkpoint=True)
    assert losses(cut) == losses(whole)
    assert torch.equal(adapter_weights(cut), adapter_weights(whole))


def test_an_evaluation_leaves_the_gradients_right(run, tmp_path):
    """bitsandbytes rearranges 4-bit weights for inference on some CPUs, into a layout without a backward pass."""
    with_evaluation, without = Gradients(), Gradients()
    rows = tmp_path / "f_dpo.jsonl"
    for name, gradients in (("without", without), ("with", with_evaluation)):
        evaluations = {"eval_strategy": "steps", "eval_steps": 1} if name == "with" else {}
        add = fdiv.run.run._trainer

        def observed(*arguments, gradients=gradients, add=add):
            found = add(*arguments)
            found[0].add_callback(gradients)
            return found

        fdiv.run.run._trainer = observed
        try:
            run("f_dpo", name, dataset_test_split="train", **evaluations)
        finally:
            fdiv.run.run._trainer = add
    assert rows.exists() and len(without.norms) == 4
    assert with_evaluation.norms == without.norms


@pytest.mark.slow
@pytest.mark.processor
def test_reference_scores_computed_beforehand_give_the_same_run(run):
    steps = {"optim": "sgd", "learning_rate": 0.1}
    live, table = run("f_dpo", "live", **steps), run("f_dpo", "table", precompute_ref_log_probs=True, **steps)
    assert table.precompute_ref_logps
    assert losses(table) == pytest.approx(losses(live), abs=1e-4)
    assert losses(live)[0] - losses(live)[-1] > 1e-2


def test_a_model_that_was_used_on_a_cpu_before_is_refused(tiny_model_dir):
    """Where the CPU has AVX512-BF16: there the weights were rearranged, and gradients would be wrong."""
    loading = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, quantization_config=loading)
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        model.eval()(torch.arange(5, 45).view(2, 20))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes rearranges 4-bit weights on CPUs with AVX512-BF16 only")
    with pytest.raises(DataError, match=r"used for inference on the CPU.*q_proj.*load it again"):
        keep_trainable_layout(model)


@pytest.mark.slow
@pytest.mark.processor
def test_references_of_their_own_are_loaded_as_the_policy(run, tiny_model_dir):
    """D²O's two reference paths: in 4 bits too, and equal to the adapter switched off."""
    steps = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    off = run("d2o", "off", **steps)
    own = run("d2o", "own", ref_pos=str(tiny_model_dir), ref_neg=str(tiny_model_dir), **steps)
    assert len(quantised(own.reference_pos.model)) == 14
    assert losses(own) == pytest.approx(losses(off), abs=1e-5)


def test_rehearsal_needs_a_cache_of_the_base_in_four_bits(run, tiny_model_dir, tmp_path, capsys):
    """A cache of the model on disk holds other log-probabilities, so it is refused; one of the 4-bit base is taken."""
    cache(tiny_model_dir).save(tmp_path / "full.safetensors")
    rehearsal = {"kl": None, "rehearsal_coefficient": 1.0, "divergence": "forward_kl", "max_steps": 2}
    run("dph", "refused", code=1, rehearsal_cache=str(tmp_path / "full.safetensors"), **rehearsal)
    assert "full.safetensors holds log-probabilities of another model" in capsys.readouterr().err

    four_bit_base(tiny_model_dir).save_pretrained(tmp_path / "base_4bit")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "base_4bit")
    cache(tmp_path / "base_4bit", model=load_model(str(tmp_path / "base_4bit"))).save(tmp_path / "rounded.safetensors")
    trainer = run("dph", "taken", rehearsal_cache=str(tmp_path / "rounded.safetensors"), **rehearsal)
    first, second = (entry["divergence/forward_kl"] for entry in trainer.state.log_history[:2])
    assert first == pytest.approx(0.0, abs=1e-8) and second > 1e-6
    # Stored in 4 bits, the base needs no `load_in_4bit`.
    stored = run(
        "dph", "stored", rehearsal_cache=str(tmp_path / "rounded.safetensors"), load_in_4bit=False,
        model_name_or_path=str(tmp_path / "base_4bit"), **rehearsal,
    )  # fmt: skip
    assert losses(stored) == losses(trainer)


def test_the_memory_plan_counts_what_is_held(tiny_model_dir, tmp_path):
    plan, counted = planned_and_counted(
        tiny_model_dir, tmp_path, preference_rows(12), method="f_dpo", divergence="jensen_shannon", beta=0.5,
        max_length=64, load_in_4bit=True, use_peft=True, lora_r=4, lora_target_modules="all-linear",
        trainer_options={"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")},
    )  # fmt: skip
    for part in ("gradients", "optimizer"):
        assert plan.device[part] == pytest.approx(counted[part], rel=0.01), part
    # a float32 scale for each 64 weights, which are two to a byte, is no parameter
    scales = sum(packed.numel() * 2 // 64 * 4 for packed in quantised(four_bit_base(tiny_model_dir)).values())
    assert plan.device["weights"] == pytest.approx(counted["weights"] + scales, rel=0.01)


# ---------------------------------------------------------------- merging
def test_merging_rounds_the_base_as_in_training_unless_told_otherwise(run, tiny_model_dir, tmp_path, capsys):
    run("f_dpo", use_bnb_nested_quant=True, learning_rate=0.05)
    ids = torch.arange(5, 45).view(2, 20)
    rounded = four_bit_base(tiny_model_dir, bnb_4bit_use_double_quant=True)
    full = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    expected = {}
    for name, base in (("as_trained", rounded), ("as_stored", full)):
        with torch.no_grad():
            expected[name] = PeftModel.from_pretrained(base, tmp_path / "out").eval()(ids).logits
    assert (expected["as_trained"] - expected["as_stored"]).abs().max() > 1e-2
    # the checkpoint of the last step is the saved model; its recipe stands one folder above
    for name, adapter in (("as_trained", "out"), ("as_trained", "out/checkpoint-4"), ("as_stored", "out")):
        output = tmp_path / f"{name}_{adapter.replace('/', '_')}"
        capsys.readouterr()
        words = [str(tmp_path / adapter), "--output", str(output), "--base_weights", name]
        assert main(["merge", *words]) == 0
        message = {"as_trained": "a base in 4 bits", "as_stored": "differs from it by rounding errors"}[name]
        assert message in capsys.readouterr().err
        merged = AutoModelForCausalLM.from_pretrained(output, dtype="auto").eval()
        assert merged.dtype == torch.float32 and not hasattr(merged.config, "quantization_config")
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, expected[name], rtol=0, atol=1e-5)


def test_a_base_stored_in_four_bits_is_written_out_before_merging(tiny_model_dir, tmp_path):
    base = four_bit_base(tiny_model_dir)
    base.save_pretrained(tmp_path / "base_4bit")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "base_4bit")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "base_4bit", dtype=torch.float32)
    keep_trainable_layout(stored)
    model = get_peft_model(stored, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert not quantised(merged)
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- what is refused
def test_a_base_in_four_bits_needs_an_adapter(run, capsys):
    run("f_dpo", code=2, use_peft=False)
    assert "load_in_4bit: true without an adapter" in capsys.readouterr().err


def test_a_base_in_four_bits_is_not_handed_to_a_server(run):
    trainer = run("f_dpo", max_steps=1)
    with pytest.raises(RolloutError, match="is quantised: the base of a QLoRA run cannot be passed"):
        merged_state_dict(trainer.model, trainer.model.state_dict())
