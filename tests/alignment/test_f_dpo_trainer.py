"""FDPOTrainer: parity with TRL's DPOTrainer, invariances, references, data types."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from fdiv.alignment import FDPOConfig, FDPOTrainer
from fdiv.errors import DataError
from tests.support.runs.f_dpo import (
    COMPARABLE,
    LORA,
    assert_same_run,
    history,
    make_trainer,
    preference_rows,
    run,
)
from tests.support.same_run import assert_same_weights, weights


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return Dataset.from_list(preference_rows())


# ------------------------------------------------------------------------------------------------ parity with TRL


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.processor
def test_reverse_kl_is_trl_dpo_step_for_step(tiny_model_dir, rows, tmp_path, lora):
    extra = COMPARABLE | ({"peft_config": LoraConfig(**LORA), "learning_rate": 0.5} if lora else {})
    ours = run(tiny_model_dir, rows, tmp_path, **extra)
    theirs = run(tiny_model_dir, rows, tmp_path, trainer=DPOTrainer, config=DPOConfig, **extra)
    assert_same_run(ours, theirs)
    shared = [f"rewards/{name}" for name in ("chosen", "rejected", "margins")]
    shared += [f"{kind}/{half}" for kind in ("logps", "logits") for half in ("chosen", "rejected")]
    shared += ["entropy", "num_tokens", "mean_token_accuracy"]
    for key in shared:
        torch.testing.assert_close(history(ours, key), history(theirs, key), atol=5e-5, rtol=1e-5, msg=key)
    accuracies = [history(made, "rewards/accuracies")[1:] for made in (ours, theirs)]
    assert accuracies[0].tolist() == accuracies[1].tolist()  # but for the first step, where every margin is 0
    assert set(theirs.state.log_history[0]) <= set(ours.state.log_history[0])


@pytest.mark.parametrize(
    ("divergence", "theirs"),
    [
        ("jensen_shannon", {"f_divergence_type": "js_divergence"}),
        ("forward_kl", {"f_divergence_type": "forward_kl"}),
        (
            {"name": "alpha", "alpha": 0.3},
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        ),
    ],
    ids=["js", "forward_kl", "alpha"],
)
@pytest.mark.processor
def test_equals_trls_own_divergences(tiny_model_dir, rows, tmp_path, divergence, theirs):
    steps = COMPARABLE | {"learning_rate": 0.02}
    ours = run(tiny_model_dir, rows, tmp_path, divergence=divergence, **steps)
    trl = run(tiny_model_dir, rows, tmp_path, trainer=DPOTrainer, config=DPOConfig, **steps, **theirs)
    assert_same_run(ours, trl, tolerance=2e-5)  # exp, written in two ways
    # TRL logs the raw reward under the name we give to what is optimised.
    for half in ("chosen", "rejected"):
        torch.testing.assert_close(
            history(ours, f"rewards_raw/{half}"), history(trl, f"rewards/{half}"), atol=1e-5, rtol=0
        )
    assert (history(ours, "rewards/chosen")[4:] - history(ours, "rewards_raw/chosen")[4:]).abs().max() > 1e-3


def test_normalized_gives_every_divergence_the_first_step_of_dpo(tiny_model_dir, rows, tmp_path):
    first = {}
    for divergence in ("reverse_kl", "jensen_shannon", "chi2_kl"):
        for normalized in (False, True):
            made = run(tiny_model_dir, rows, tmp_path, divergence=divergence, normalized=normalized, max_steps=1)
            first[divergence, normalized] = history(made, "grad_norm")[0].item()
    dpo = first["reverse_kl", False]
    assert first["jensen_shannon", False] == pytest.approx(dpo / 2, rel=1e-5)
    assert first["chi2_kl", False] == pytest.approx(dpo * 2, rel=1e-5)
    for divergence in ("reverse_kl", "jensen_shannon", "chi2_kl"):
        assert first[divergence, True] == pytest.approx(dpo, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5},
        {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2},
    ],
    ids=["checkpointing", "moving_reference", "accumulation"],
)
@pytest.mark.processor
def test_trl_options_work_as_in_trl(tiny_model_dir, rows, tmp_path, options):
    ours = run(tiny_model_dir, rows, tmp_path, **COMPARABLE, **options)
    theirs = run(tiny_model_dir, rows, tmp_path, trainer=DPOTrainer, config=DPOConfig, **COMPARABLE, **options)
    assert_same_run(ours, theirs)


@pytest.mark.processor
def test_mixture_of_experts_keeps_the_auxiliary_loss(tiny_model_dir, rows, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            output_router_logits=True,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")  # fmt: skip
    runs = [
        run(
            tmp_path / "moe", rows, tmp_path, trainer=trainer, config=config, processing_class=tokenizer,
            router_aux_loss_coef=0.1, max_steps=10, **COMPARABLE,
        )
        for trainer, config in ((FDPOTrainer, FDPOConfig), (DPOTrainer, DPOConfig))
    ]  # fmt: skip
    for key in ("loss", "grad_norm", "aux_loss"):
        torch.testing.assert_close(history(runs[0], key), history(runs[1], key), atol=1e-5, rtol=1e-6)
    assert history(runs[0], "loss")[0] > math.log(2) + 0.1 * 0.9  # log 2 plus the weighted auxiliary loss


def test_compute_metrics_gets_the_logits_as_in_trl(tiny_model_dir, rows, tmp_path):
    logits = []

    def compute_metrics(prediction):
        logits.append(prediction.predictions)
        return {"mine": 1.0}

    for trainer, config in ((FDPOTrainer, FDPOConfig), (DPOTrainer, DPOConfig)):
        options = {"eval_dataset": rows.select(range(4)), "compute_metrics": compute_metrics}
        made = make_trainer(tiny_model_dir, rows, tmp_path, trainer=trainer, config=config, **options)
        assert made.evaluate()["eval_mine"] == 1.0
    assert logits[0].shape[-1] == made.model.config.vocab_size
    mask = made.data_collator(list(made.eval_dataset))["attention_mask"][:4].bool()  # the chosen rows
    # on padding the position ids differ
    torch.testing.assert_close(*(torch.from_numpy(values)[mask] for values in logits), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ invariances


@pytest.mark.processor
def test_accumulation_equals_one_large_batch(tiny_model_dir, rows, tmp_path):
    options = {"divergence": "forward_kl", **COMPARABLE, "learning_rate": 0.02}
    large = run(tiny_model_dir, rows, tmp_path, per_device_train_batch_size=8, **options)
    small = run(
        tiny_model_dir, rows, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, **options
    )
    start = torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(tiny_model_dir).parameters()])
    assert (weights(large) - start).abs().max() > 1e-2
    assert_same_weights(large, small, 1e-5)
    for key in ("loss", "grad_norm", "entropy", "rewards/margins", "log_ratio/chosen_p05", "mean_f/forward_kl",
                "mean_f/forward_kl_se", "clamped_fraction", "num_tokens"):  # fmt: skip
        torch.testing.assert_close(history(large, key), history(small, key), atol=5e-5, rtol=1e-4, msg=key)


def test_resuming_is_bit_for_bit(tiny_model_dir, rows, tmp_path):
    options = {"divergence": "jensen_shannon", "max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    straight = run(tiny_model_dir, rows, tmp_path / "a", **options)
    resumed = make_trainer(tiny_model_dir, rows, tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert torch.equal(weights(straight), weights(resumed))
    assert torch.equal(history(straight, "loss"), history(resumed, "loss"))
    assert (tmp_path / "a" / "checkpoint-4" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------ references


@pytest.mark.processor
def test_precomputed_reference_equals_live(tiny_model_dir, rows, tmp_path):
    # The slope of forward KL is exp(−log u): what a log-ratio is off by, the gradient is off by as a share of itself. A sum of
    # log-probabilities below −128 is rounded to 1.5e-5; rows this short have sums near −16, so that the bound has room.
    options = {"divergence": "forward_kl", **COMPARABLE, "learning_rate": 0.02, "max_length": 20}
    live = run(tiny_model_dir, rows, tmp_path, **options)
    cached = run(tiny_model_dir, rows, tmp_path, precompute_ref_log_probs=True, **options)
    assert cached.ref_model is None
    assert_same_run(live, cached)


def test_precomputed_values_are_checked_before_they_are_used_again(tiny_model_dir, rows, tmp_path):
    """A file whose bytes changed is refused; rows cut elsewhere have values of their own."""
    rows.save_to_disk(tmp_path / "rows")

    def make(**options):
        loaded = Dataset.load_from_disk(str(tmp_path / "rows"))
        return make_trainer(tiny_model_dir, loaded, tmp_path, precompute_ref_log_probs=True, **options)

    def values():
        return {file.with_name(file.name.removesuffix(".digests.json")) for file in tmp_path.rglob("*.digests.json")}

    expected = make().train_dataset["ref_chosen_logps"][:]
    (path,) = values()
    assert make().train_dataset["ref_chosen_logps"][:] == expected  # read back
    shorter = make(max_length=30).train_dataset["ref_chosen_logps"][:]
    assert len(values()) == 2 and shorter != expected
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}: its content does not agree .*remove it, so that the reference"):
        make()
    path.unlink()
    assert make().train_dataset["ref_chosen_logps"][:] == expected


def test_explicit_reference_is_used(tiny_model_dir, rows, tmp_path):
    """Reference = another model: the first logged log-ratio is the difference of the two, not 0."""
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        other.lm_head.weight.mul_(2.0)
    trainer = run(tiny_model_dir, rows, tmp_path, ref_model=other, max_steps=1)
    assert trainer.accelerator.unwrap_model(trainer.ref_model) is other
    assert abs(history(trainer, "rewards_raw/chosen")[0].item()) > 1e-3


def test_model_object_without_a_path_gets_a_frozen_copy(tiny_model_dir, rows, tmp_path):
    source = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    in_memory = type(source)(source.config)
    in_memory.load_state_dict(source.state_dict())
    in_memory.config._name_or_path = ""
    ours = run(tiny_model_dir, rows, tmp_path, model=in_memory, divergence="jensen_shannon", **COMPARABLE)
    named = run(tiny_model_dir, rows, tmp_path, divergence="jensen_shannon", **COMPARABLE)
    assert_same_run(ours, named)
    assert not any(p.requires_grad for p in ours.ref_model.parameters())
    assert torch.equal(
        ours.accelerator.unwrap_model(ours.ref_model).lm_head.weight, source.lm_head.weight
    )  # still the start


def test_model_object_changed_after_loading_is_its_own_reference(tiny_model_dir, rows, tmp_path):
    """TRL would reload the files and start away from the policy; π_ref is the policy as passed."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    trainer = run(tiny_model_dir, rows, tmp_path, model=model, max_steps=1)
    assert history(trainer, "loss")[0].item() == pytest.approx(math.log(2), abs=1e-5)


def test_model_named_by_a_string(tiny_model_dir, rows, tmp_path):
    options = {"max_steps": 10, **COMPARABLE}
    named = run(tiny_model_dir, rows, tmp_path, model=str(tiny_model_dir), processing_class=None, **options)
    assert_same_run(named, run(tiny_model_dir, rows, tmp_path, **options))


def test_continuing_an_adapter_uses_its_starting_copy(tiny_model_dir, rows, tmp_path):
    def adapted() -> PeftModel:
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(**LORA))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    trainer = run(tiny_model_dir, rows, tmp_path, model=adapted(), learning_rate=2e-2, divergence="jensen_shannon")
    # log 2 at the start: the reference is the adapter as it was, not the base model.
    assert history(trainer, "loss")[0].item() == pytest.approx(math.log(2), abs=1e-5)
    assert history(trainer, "loss")[-1] < 0.6
    start = {name: p for name, p in adapted().named_parameters() if "lora_" in name}
    reference = {n.replace(".ref.", ".default."): p for n, p in trainer.model.named_parameters() if ".ref." in n}
    assert reference and all(torch.equal(start[name], parameter) for name, parameter in reference.items())


# ------------------------------------------------------------------------------------------------ data


def test_conversational_rows_equal_plain_rows_with_the_same_tokens(tiny_model_dir, rows, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk, plain = [], []
    for row in rows:
        prompt = [{"role": "user", "content": row["prompt"]}]
        talk.append(
            {"prompt": prompt} | {k: [{"role": "assistant", "content": row[k]}] for k in ("chosen", "rejected")}
        )
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        plain.append({"prompt": text, "chosen": row["chosen"], "rejected": row["rejected"]})
    runs = [
        run(
            tiny_model_dir, Dataset.from_list(data), tmp_path, processing_class=tokenizer, divergence="jeffreys",
            **COMPARABLE | {"learning_rate": 0.02},
        )
        for data in (talk, plain)
    ]  # fmt: skip
    for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert list(runs[0].train_dataset[key]) == list(runs[1].train_dataset[key])
    assert_same_run(*runs)


def test_long_padding_never_gives_nan(tiny_model_dir, tmp_path):
    uneven = [
        {"prompt": "A", "chosen": " b", "rejected": " c" * 90},
        {"prompt": "A " * 90, "chosen": "", "rejected": "d"},
    ]
    trainer = run(tiny_model_dir, Dataset.from_list(uneven * 4), tmp_path, divergence="neyman_chi2", max_steps=3)
    assert torch.isfinite(weights(trainer)).all() and torch.isfinite(history(trainer, "grad_norm")).all()
