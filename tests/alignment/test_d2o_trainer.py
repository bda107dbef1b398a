"""D2OTrainer: parity with TRL's DPO, values against logits, references, anchors, invariances, resumption."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOTrainer

from fdiv.alignment import d2o_loss
from fdiv.alignment.d2o.anchors import prompt_key
from fdiv.unlearning import npo
from tests.support.runs.d2o import (
    SETTINGS,
    history,
    ids_log_prob,
    make_trainer,
    negative_rows,
    start_model,
    text_log_prob,
)
from tests.support.same_run import PLAIN_STEPS, assert_same_weights, weights

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def _lora() -> LoraConfig:
    return LoraConfig(**LORA)


# ---------------------------------------------------------------------------------------------------- parity and values
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.processor
def test_one_given_anchor_is_trl_dpo_step_for_step(tiny_model_dir, tmp_path, lora):
    rows = negative_rows(8, anchors=1)
    peft = _lora() if lora else None
    # one batch: order is no matter
    options = {**PLAIN_STEPS, "per_device_train_batch_size": 8, "learning_rate": 0.5 if lora else 0.05}
    ours = make_trainer(
        tiny_model_dir, rows, tmp_path / "d2o", num_generations=1, alpha=0.3, beta=0.3, peft_config=peft, **options
    )
    ours.train()
    shared = {key: value for key, value in {**SETTINGS, **options}.items() if key in DPOConfig.__dataclass_fields__}
    pairs = [{"prompt": r["prompt"], "chosen": r["anchors"][0], "rejected": r["rejected"]} for r in rows]
    theirs = DPOTrainer(
        str(tiny_model_dir), args=DPOConfig(str(tmp_path / "dpo"), beta=0.3, **shared),
        train_dataset=Dataset.from_list(pairs), peft_config=_lora() if lora else None,
    )  # fmt: skip
    theirs.train()
    for key, other in (
        ("loss", "loss"), ("grad_norm", "grad_norm"), ("rewards/anchors", "rewards/chosen"),
        ("rewards/rejected", "rewards/rejected"), ("logps/anchors", "logps/chosen"),
        ("logps/rejected", "logps/rejected"),
    ):  # fmt: skip
        torch.testing.assert_close(history(ours, key), history(theirs, other), atol=5e-5, rtol=1e-5, msg=key)
    accuracies = [history(made, "rewards/accuracies")[1:] for made in (ours, theirs)]
    assert accuracies[0].tolist() == accuracies[1].tolist()  # but for the first step, where every margin is 0
    assert history(ours, "loss")[-1] < 0.6


@pytest.mark.parametrize("architecture", ["tiny_model_dir", "tiny_gpt2_dir"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_evaluation_loss_is_the_formula_on_plain_logits(request, tmp_path, architecture, divergence):
    model_dir = request.getfixturevalue(architecture)
    rows = negative_rows(5, anchors=3)
    trainer = make_trainer(model_dir, rows, tmp_path, eval_dataset=rows, divergence=divergence, alpha=0.5, beta=0.5)
    trainer.train()
    found = trainer.evaluate()
    start, policy = start_model(model_dir), trainer.model.eval()

    def log_ratio(prompt: str, answer: str) -> float:
        return text_log_prob(policy, model_dir, prompt, answer) - text_log_prob(start, model_dir, prompt, answer)

    anchors = torch.tensor([[log_ratio(row["prompt"], answer) for answer in row["anchors"]] for row in rows])
    rejected = torch.tensor([log_ratio(row["prompt"], row["rejected"]) for row in rows])
    assert anchors.abs().max() > 0.5  # it has moved
    expected = d2o_loss(anchors, rejected, 0.5, 0.5, divergence)
    assert found["eval_rewards_raw/rejected"] == pytest.approx(0.5 * rejected.mean().item(), rel=1e-4)
    assert found["eval_rewards_raw/anchors"] == pytest.approx(0.5 * anchors.mean().item(), rel=1e-4)
    assert found["eval_loss"] == pytest.approx(expected.view(-1).mean().item(), rel=2e-4)


def test_without_anchors_it_trains_npo(tiny_model_dir, tmp_path):
    rows = negative_rows(4)
    trainer = make_trainer(tiny_model_dir, rows, tmp_path, eval_dataset=rows, num_generations=0, alpha=0.2)
    trainer.train()
    start = start_model(tiny_model_dir)
    log_ratio = torch.tensor([
        text_log_prob(trainer.model.eval(), tiny_model_dir, row["prompt"], row["rejected"])
        - text_log_prob(start, tiny_model_dir, row["prompt"], row["rejected"])
        for row in rows
    ])  # fmt: skip
    expected = 0.1 * npo(log_ratio, beta=0.2).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert not (tmp_path / "anchors.jsonl").exists()


def test_two_references_each_in_its_place(tiny_model_dir, tmp_path):
    torch.manual_seed(5)
    pos, neg = start_model(tiny_model_dir), start_model(tiny_model_dir)
    for model in (pos, neg):
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    pos.save_pretrained(tmp_path / "pos")
    row = negative_rows(1, anchors=2)
    trainer = make_trainer(
        tiny_model_dir, row, tmp_path / "run", eval_dataset=row, num_generations=2, ref_pos=str(tmp_path / "pos"),
        ref_model_neg=neg,
    )  # fmt: skip
    found = trainer.evaluate()
    start, prompt = start_model(tiny_model_dir), row[0]["prompt"]

    def log_ratio(reference: torch.nn.Module, answer: str) -> float:
        return text_log_prob(start, tiny_model_dir, prompt, answer) - text_log_prob(
            reference, tiny_model_dir, prompt, answer
        )

    anchors = [log_ratio(neg, answer) for answer in row[0]["anchors"]]
    rejected = log_ratio(pos, row[0]["rejected"])
    margin = torch.tensor(0.1 * sum(anchors) / 2 - 0.1 * rejected)
    assert abs(rejected - log_ratio(neg, row[0]["rejected"])) > 1e-2  # else the test could not tell them apart
    assert found["eval_loss"] == pytest.approx(-F.logsigmoid(margin).item(), rel=1e-4)
    assert {"eval_divergence/jeffreys_to_pos", "eval_divergence/jeffreys_to_neg"} <= set(found)
    assert trainer.start_reference is None  # no third model is kept


# --------------------------------------------------------------------------------------------------------------- anchors
def test_anchors_are_drawn_once_and_read_back(tiny_model_dir, tmp_path, monkeypatch):
    rows = negative_rows(8)
    first = make_trainer(tiny_model_dir, rows, tmp_path, eval_dataset=rows.select([0, 1]))
    first.train()
    lines = [json.loads(line) for line in (tmp_path / "anchors.jsonl").read_text().splitlines()]
    assert len(lines) == 9 and lines[0]["max_completion_length"] == 5
    start, tokenizer = start_model(tiny_model_dir), AutoTokenizer.from_pretrained(tiny_model_dir)
    prompts = {prompt_key(ids): ids for ids in (tokenizer(row["prompt"])["input_ids"] for row in rows)}
    for line in lines[1:]:
        assert len(line["anchors"]) == 3
        for anchor in line["anchors"]:  # log q as recorded while sampling
            expected = ids_log_prob(start, prompts[line["prompt"]], anchor["completion_ids"])
            assert anchor["log_prob"] == pytest.approx(expected, abs=1e-4)
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", None)  # drawing again would fail
    second = make_trainer(tiny_model_dir, rows, tmp_path)
    second.train()
    assert torch.equal(weights(first), weights(second))


def test_instruction_is_for_sampling_only(tiny_model_dir, tmp_path):
    asked = []

    def rollouts(prompts, trainer):
        asked.extend(prompts)
        return {"prompt_ids": [[5]] * len(prompts), "completion_ids": [[7, 8]] * len(prompts), "logprobs": None}

    rows = negative_rows(2)
    templates = ["Be kind. {prompt}", "{prompt} (harmless)"]
    trainer = make_trainer(
        tiny_model_dir, rows, tmp_path, anchor_instruction_templates=templates, rollout_func=rollouts, max_steps=1,
        per_device_train_batch_size=2,
    )  # fmt: skip
    batches = []
    score = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: batches.append(inputs) or score(model, inputs)
    trainer.train()
    prompt = rows[0]["prompt"]
    assert asked[:3] == [
        f"Be kind. {prompt}",
        f"{prompt} (harmless)",
        f"Be kind. {prompt}",
    ]  # sample k: template k mod 2
    bare = {tuple(trainer._tokenizer(row["prompt"])["input_ids"]) for row in rows}
    ids, completion = batches[0]["input_ids"], batches[0]["completion_mask"]
    assert ids.shape[:2] == (2, 4)
    for group, masks in zip(ids, completion, strict=True):
        for row, mask in zip(group, masks, strict=True):
            assert tuple(row[: mask.argmax()].tolist()) in bare
        assert all(row[mask.bool()].tolist() == [7, 8] for row, mask in zip(group[:3], masks[:3], strict=True))


def test_conversations_put_the_instruction_into_the_last_user_message(tiny_model_dir, tmp_path):
    rows = Dataset.from_list([
        {
            "prompt": [{"role": "user", "content": f"What is {i}?"}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for i in range(4)
    ])  # fmt: skip
    asked = []

    def rollouts(prompts, trainer):
        asked.extend(prompts)
        return {"prompt_ids": [[5]] * len(prompts), "completion_ids": [[7, 8]] * len(prompts), "logprobs": None}

    trainer = make_trainer(
        tiny_model_dir, rows, tmp_path, anchor_instruction_templates=["Kindly: {prompt}"], rollout_func=rollouts,
        harmfulness_func=lambda completions, **_: [float(c[0]["role"] == "assistant") for c in completions],
    )  # fmt: skip
    trainer.train()
    assert asked[0] == [{"role": "user", "content": "Kindly: What is 0?"}]
    assert history(trainer, "harmfulness/harmful_share").tolist() == [1.0] * 4
    assert history(trainer, "loss")[-1] < history(trainer, "loss")[0]


def test_scores_are_at_temperature_one_whatever_anchors_are_sampled_at(tiny_model_dir, tmp_path):
    rows = negative_rows(4)
    trainer = make_trainer(tiny_model_dir, rows, tmp_path, eval_dataset=rows, temperature=0.5, num_generations=2)
    found = trainer.evaluate()
    start = start_model(tiny_model_dir)
    expected = [text_log_prob(start, tiny_model_dir, row["prompt"], row["rejected"]) for row in rows]
    assert found["eval_logps/rejected"] == pytest.approx(sum(expected) / 4, rel=1e-4)
    group = trainer.anchors.anchors(trainer.eval_dataset[0]["prompt_ids"], 2)
    at_half = ids_log_prob(start, trainer.eval_dataset[0]["prompt_ids"], group[0].completion_ids, temperature=0.5)
    assert group[0].log_prob == pytest.approx(at_half, abs=1e-4)
    assert trainer.args.temperature == 0.5 and trainer.args.beta == 0.1


def test_online_anchors_and_refreshed_references(tiny_model_dir, tmp_path):
    trainer = make_trainer(
        tiny_model_dir, negative_rows(8), tmp_path, anchor_source="online", online_start_step=2, refresh_every=3,
        max_steps=6,
    )  # fmt: skip
    trainer.train()
    assert history(trainer, "anchors/online").tolist() == [0, 0, 1, 1, 1, 1]
    ratio = history(trainer, "log_ratio/rejected_p50")
    assert ratio[[0, 3]].abs().max() < 1e-4  # the start, and right after the refresh at step 3
    assert (ratio[[1, 2, 4, 5]] < -0.01).all()


# ------------------------------------------------------------------------------------------------------------ invariances
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.processor
def test_accumulation_changes_nothing(tiny_model_dir, tmp_path, lora):
    ends = []
    cache = str(tmp_path / "anchors.jsonl")
    for size, steps in ((8, 1), (1, 8)):
        trainer = make_trainer(
            tiny_model_dir, negative_rows(16), tmp_path / str(size), per_device_train_batch_size=size, optim="sgd",
            gradient_accumulation_steps=steps, anchor_cache=cache, learning_rate=0.05,
            peft_config=_lora() if lora else None,
        )  # fmt: skip
        trainer.train()
        ends.append(trainer)
    assert_same_weights(*ends, 1e-5)
    for key in ("rewards/margins", "loss"):
        torch.testing.assert_close(*(history(trainer, key) for trainer in ends), atol=1e-5, rtol=1e-4)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "options",
    [{}, {"anchor_source": "online", "refresh_every": 2}, {"anchor_source": "online", "refresh_every": 2, "lora": 1}],
    ids=["offline", "online_refreshed", "lora_refreshed"],
)
def test_resumed_run_is_the_uninterrupted_one(tiny_model_dir, tmp_path, options):
    options = dict(options)
    lora = options.pop("lora", False)
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, **options}

    def made(folder: str, **more):
        peft = _lora() if lora else None
        return make_trainer(tiny_model_dir, negative_rows(8), tmp_path / folder, peft_config=peft, **settings, **more)

    whole = made("whole")
    whole.train()
    made("halves", callbacks=[_StopAt(3)]).train()
    resumed = made("halves")
    resumed.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-3"))
    assert torch.equal(weights(whole), weights(resumed))
    assert history(whole, "loss").tolist() == history(resumed, "loss").tolist()


def _StopAt(step: int):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= step

    return Stop()


def test_one_forward_with_gradient_per_micro_step(tiny_model_dir, tmp_path):
    trainer = make_trainer(
        tiny_model_dir, negative_rows(8), tmp_path, gradient_accumulation_steps=2, max_steps=2, anchor_source="online",
        peft_config=_lora(), gradient_checkpointing=True,
    )  # fmt: skip
    calls = []
    base = trainer.model.get_base_model().model
    base.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.train()
    assert sum(calls) == 4  # two steps of two micro-batches; sampling and the reference run without gradient
    assert {name.split(".")[-2] for name, p in trainer.model.named_parameters() if p.requires_grad} == {"default"}


def test_lora_reference_is_the_base_and_refreshing_copies_the_adapter(tiny_model_dir, tmp_path):
    rows = negative_rows(4, anchors=2)
    trainer = make_trainer(
        tiny_model_dir, rows, tmp_path, eval_dataset=rows, peft_config=_lora(), num_generations=2, learning_rate=5e-2
    )
    trainer.train()
    start = start_model(tiny_model_dir)
    expected = sum(
        text_log_prob(trainer.model.eval(), tiny_model_dir, row["prompt"], row["rejected"])
        - text_log_prob(start, tiny_model_dir, row["prompt"], row["rejected"])
        for row in rows
    )
    assert abs(expected) > 0.5
    assert trainer.evaluate()["eval_rewards_raw/rejected"] == pytest.approx(0.1 * expected / 4, rel=1e-3)
    continued = make_trainer(trainer.model, rows, tmp_path / "more", eval_dataset=rows, num_generations=2)
    assert continued.evaluate()["eval_loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    continued.train()
    assert continued.evaluate()["eval_rewards_raw/rejected"] < -0.01
    continued.start_reference.refresh()
    assert continued.evaluate()["eval_rewards_raw/rejected"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.smoke
def test_private_hooks_of_trl_have_the_signatures_relied_on():
    expected = {
        "_generate_and_score_completions": ["self", "inputs"],
        "_generate_single_turn": [
            "self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images",
        ],
        "_tokenize_prompts": ["self", "prompts"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_compute_loss": ["self", "model", "inputs"],
        "_save_checkpoint": ["self", "model", "trial"],
    }  # fmt: skip
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == parameters, name
