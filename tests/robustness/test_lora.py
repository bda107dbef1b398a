"""LoRA with all five trainers: the reference is the base with the adapter off, checkpoints hold the adapter alone."""

import gc
import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from fdiv.models.logprobs import token_scores
from tests.support.runs.all_trainers import EVERY, ROUNDING, TRAINERS, build, losses
from tests.support.runs.d2o import negative_rows
from tests.support.runs.dph import cache
from tests.support.runs.f_distill import make_distant_teacher
from tests.support.runs.f_dpg import PROMPTS, recorded
from tests.support.runs.f_dpo import preference_rows
from tests.support.runs.unlearning import disturb, forget_rows
from tests.support.scripts.all_trainers import STEPS, options

# The slow tests run all five, the quick ones f-DPO.
ONE_QUICKLY = ["f_dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in TRAINERS if name != "f_dpo")]
SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.0}
# Settings under which the method scores a reference; f-DPO, f-DPG and D²O always do. FLAT's losses are differences of
# probabilities near 1/384 here, hence the weights.
WITH_REFERENCE = {
    "flat": {"retain_term": "divergence", "forget_weight": 100.0, "retain_weight": 100.0},
    "dph": {"kl": "k3_loss"},
}
# Adam's first steps are signs of gradients, which would enlarge differences in the last digit.
PLAIN_STEPS = {"optim": "sgd", "learning_rate": 0.1}


def lora(name, model_dir, output, **more):
    """The trainer with a fresh adapter and, where the method can have one, a reference."""
    settings = {"peft_config": LoraConfig(**SETTINGS), **WITH_REFERENCE.get(name, {}), **more}
    return build(name, model_dir, output, **settings)


@pytest.fixture(scope="module")
def given(tiny_model_dir, tmp_path_factory):
    """Trainer → the options under which it samples nothing: recorded rollouts, rows, anchors and a teacher."""
    folder = tmp_path_factory.mktemp("recorded")
    make_distant_teacher(folder / "teacher")
    cache(tiny_model_dir, shift=0.5).save(folder / "rehearsal.safetensors")
    records = recorded(tiny_model_dir, 4 * STEPS)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return lambda name, steps, **more: {**options(name, folder, 1), "max_steps": steps, **more}


def base_weights(trainer):
    """The weights outside the adapters, under the names they have without PEFT, as they are now."""
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    plain = {name.removeprefix("base_model.model.").replace(".base_layer.", "."): p for name, p in named}
    return {name: p.detach().clone() for name, p in plain.items() if "lora_" not in name}


def adapter_weights(trainer):
    return torch.cat([p.detach().flatten().float() for n, p in trainer.model.named_parameters() if "lora_" in n])


class Gradients(TrainerCallback):
    """Which parameters had a gradient before each optimizer step, and its norm over the adapter."""

    def __init__(self):
        self.names, self.norms = set(), []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.names |= set(found)
        self.norms.append(sum(float(g.float().norm()) ** 2 for g in found.values()) ** 0.5)


# ---------------------------------------------------------------- the reference
def reference_scores(name, trainer):
    """What the trainer takes for log π_ref of one training batch: (ids, attention, completion mask, `[rows]` sums)."""
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    if name == "f_dpo":
        rows = [batch[key] for key in ("input_ids", "attention_mask", "completion_mask")]
        return *rows, torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    if name == "flat":
        rows = [batch[key] for key in ("input_ids", "attention_mask", "completion_mask")]
        scores = trainer.score_roles(trainer.model, batch)
        return *rows, torch.cat([part.reference.log_probs.sum(-1) for part in scores.values()])
    batch = trainer._generate_and_score_completions(batch)
    if name == "d2o":
        rows = {key: batch[key].flatten(0, 1) for key in ("input_ids", "attention_mask", "completion_mask")}
        return *rows.values(), trainer.start_reference.score(**rows).log_probs.sum(-1)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    completion = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1)
    return ids, attention, completion, (batch["ref_per_token_logps"] * batch["completion_mask"]).sum(-1)


def models():
    return [thing for thing in gc.get_objects() if type(thing) is LlamaForCausalLM]


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.processor
def test_the_reference_is_the_base_and_no_second_model_is_held(name, tiny_model_dir, tmp_path, given):
    before = models()
    trainer = lora(name, tiny_model_dir, tmp_path, **given(name, 2))
    gc.collect()
    made = [model for model in models() if not any(model is earlier for earlier in before)]
    assert len(made) == 1 and getattr(trainer, "ref_model", None) is None
    disturb(trainer.model, scale=0.2)  # the adapter: nothing else is trained
    ids, attention, completion, found = reference_scores(name, trainer)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = token_scores(base, ids, attention, completion, fused=False).log_probs.sum(-1)
        policy = token_scores(trainer.model.eval(), ids, attention, completion, fused=False).log_probs.sum(-1)
    assert (completion.sum(-1) > 0).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # sums of up to 30 log-probabilities in float32
    assert (policy - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", EVERY)
def test_only_the_adapter_is_trained(name, tiny_model_dir, tmp_path):
    """As each is run: with rollouts of its own, Z, anchors sampled online, rehearsal rows."""
    gradients = Gradients()
    trainer = lora(name, tiny_model_dir, tmp_path, max_steps=3, callbacks=[gradients])
    adapter = {n for n, p in trainer.model.named_parameters() if "lora_" in n}
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).state_dict()
    first = adapter_weights(trainer)
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == adapter
    trainer.train()
    assert gradients.names == adapter and min(gradients.norms) > 0
    assert not torch.equal(adapter_weights(trainer), first)
    base = base_weights(trainer)
    assert len(base) >= 19
    assert all(torch.equal(weight, start[key]) for key, weight in base.items())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.processor
def test_the_first_loss_is_that_of_full_training(name, tiny_model_dir, tmp_path, given):
    settings = {**WITH_REFERENCE.get(name, {}), **given(name, 1)}
    full = build(name, tiny_model_dir, tmp_path / "full", **settings)
    adapter = lora(name, tiny_model_dir, tmp_path / "lora", **given(name, 1))
    full.train(), adapter.train()
    assert losses(adapter) == pytest.approx(losses(full), abs=ROUNDING[name], rel=0)
    assert len(losses(full)) == 1


@pytest.mark.parametrize(
    ("name", "argument"),
    [("f_dpo", "ref_model"), ("f_dpg", "base_model"), ("d2o", "ref_model_pos"), ("flat", "ref_model")],
)
@pytest.mark.processor
def test_a_reference_of_its_own_gives_the_same_run(name, argument, tiny_model_dir, tmp_path, given):
    """DPH-RL takes no reference model: its reference is checked against the base above."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    explicit = {argument: base}
    if name == "d2o":
        explicit["ref_model_neg"] = base
    own = lora(name, tiny_model_dir, tmp_path / "own", **given(name, 4, **PLAIN_STEPS), **explicit)
    off = lora(name, tiny_model_dir, tmp_path / "off", **given(name, 4, **PLAIN_STEPS))
    own.train(), off.train()
    assert losses(off) == pytest.approx(losses(own), abs=ROUNDING[name], rel=0)
    assert max(losses(off)) - min(losses(off)) > 10 * ROUNDING[name]
    torch.testing.assert_close(adapter_weights(off), adapter_weights(own), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- gradient checkpointing
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ONE_QUICKLY)
@pytest.mark.processor
def test_gradient_checkpointing_changes_nothing(name, reentrant, tiny_model_dir, tmp_path, given):
    """Without gradients to the inputs, re-entrant checkpointing would leave the adapter without any."""
    plain, checkpointed = Gradients(), Gradients()
    runs = [
        lora(name, tiny_model_dir, tmp_path / "off", **given(name, 3, **PLAIN_STEPS), callbacks=[plain]),
        lora(
            name, tiny_model_dir, tmp_path / "on", **given(name, 3, **PLAIN_STEPS), callbacks=[checkpointed],
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        ),
    ]  # fmt: skip
    for trainer in runs:
        trainer.train()
    assert runs[1].model.is_gradient_checkpointing
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=ROUNDING[name], rel=0)
    assert checkpointed.norms == pytest.approx(plain.norms, rel=1e-4)
    assert min(checkpointed.norms) > 0 and checkpointed.names == plain.names


# ---------------------------------------------------------------- checkpoints
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.mark.parametrize("name", EVERY)
def test_checkpoints_hold_the_adapter_alone_and_resume_exactly(name, tiny_model_dir, tmp_path):
    whole = lora(name, tiny_model_dir, tmp_path / "whole", **SAVING)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    weights = {path.name for pattern in ("*model*.safetensors", "*.bin") for path in checkpoint.glob(pattern)}
    assert weights == {"adapter_model.safetensors", "training_args.bin"}
    numbers = adapter_weights(whole).numel()
    size = (checkpoint / "adapter_model.safetensors").stat().st_size
    assert 4 * numbers < size < 4 * numbers + 8192  # float32 and the header
    assert numbers < sum(p.numel() for p in whole.model.parameters()) / 10
    # AdamW's two moments of the adapter
    assert 8 * numbers < (checkpoint / "optimizer.pt").stat().st_size < 8 * numbers + 40_000

    cut = lora(name, tiny_model_dir, tmp_path / "cut", **SAVING)
    shutil.copytree(checkpoint, tmp_path / "cut" / "checkpoint-2")
    cut.train(resume_from_checkpoint=True)
    assert losses(cut) == losses(whole) and len(losses(cut)) == 4
    assert torch.equal(adapter_weights(cut), adapter_weights(whole))


@pytest.mark.parametrize("name", ONE_QUICKLY)
def test_the_saved_model_is_an_adapter_that_peft_loads(name, tiny_model_dir, tmp_path):
    trainer = lora(name, tiny_model_dir, tmp_path, max_steps=2, learning_rate=0.05)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / "model.safetensors").exists()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32).eval()
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        found, expected = loaded(ids).logits, trainer.model.eval()(ids).logits
        with trainer.model.disable_adapter():
            base = trainer.model(ids).logits
    assert torch.equal(found, expected)
    assert (expected - base).abs().max() > 1e-3


EVALUATION_ROWS = {
    "f_dpo": preference_rows(4),
    "f_dpg": [{"prompt": prompt} for prompt in PROMPTS],
    "d2o": negative_rows(4).to_list(),
    "flat": forget_rows(4).to_list(),
    "dph": [{"prompt": prompt} for prompt in PROMPTS],
}


@pytest.mark.parametrize("name", ONE_QUICKLY)
def test_the_best_adapter_is_loaded_at_the_end(name, tiny_model_dir, tmp_path, monkeypatch):
    trainer = lora(
        name, tiny_model_dir, tmp_path, max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, eval_dataset=Dataset.from_list(EVALUATION_ROWS[name]), load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    measured = {1: 0.5, 2: 0.25, 3: 0.75}
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: {"eval_loss": measured[trainer.state.global_step]})
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    now = get_peft_model_state_dict(trainer.model)
    for step in (2, 3):
        stored = load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors")
        assert stored.keys() == now.keys()
        assert all(torch.equal(stored[key], now[key]) for key in now) == (step == 2)
