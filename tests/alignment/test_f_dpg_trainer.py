"""FDPGTrainer: the gradient by hand, invariances, references, resuming, the adaptive proposal."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from fdiv.alignment.f_dpg.loss import f_dpg_coefficient, log_partition
from fdiv.errors import CheckpointError
from fdiv.models.logprobs import sequence_log_prob, token_scores
from fdiv.training.rollouts import RecordedRollouts
from tests.support.runs.f_dpg import HARD, PROMPTS, SOFT, even, flat, length_reward, load, recorded, trainer

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def records(tiny_model_dir):
    return recorded(tiny_model_dir, 16)


def sgd(model, lr=1.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def one_step(model_dir, tmp_path, records, target=None, **settings):
    """One SGD step of learning rate 1: the change of the weights is minus the gradient."""
    model = load(model_dir)
    before = flat(model)
    made = trainer(
        model, tmp_path, target, rollout_func=RecordedRollouts(records), optimizers=sgd(model), max_steps=1, **settings
    )
    made.train()
    return made, before - flat(made.model)


def score(model, rows, tokenizer):
    """log π of the completions by the plain path, one row at a time: no padding, no fused head."""
    values = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        mask = torch.zeros_like(ids)
        mask[:, len(row["prompt_ids"]) :] = 1
        values.append(sequence_log_prob(token_scores(model, ids, torch.ones_like(ids), mask, fused=False)))
    return torch.cat(values)


# ---------------------------------------------------------------- the gradient, by hand
@pytest.mark.parametrize(
    ("target", "divergence", "settings"),
    [
        (HARD, "jensen_shannon", {}),
        (HARD, "forward_kl", {"z_estimate": "group", "pseudo_reward_clip": 0.2}),
        (SOFT, "reverse_kl", {"baseline": "none"}),
        ({**HARD, "smoothing": 0.01}, {"name": "alpha", "alpha": 0.75}, {"divergence_scale": 0.75}),
        (SOFT, "jensen_shannon", {"z_estimate": "given", "log_z": 2.0, "length_normalizer": 5.0}),
    ],
    ids=["js-hard", "fkl-group-clip", "rkl-reward", "alpha-smoothed", "given-z"],
)
@pytest.mark.processor
def test_one_step_is_the_gradient_by_hand(tiny_model_dir, tmp_path, records, target, divergence, settings):
    made, gradient = one_step(
        tiny_model_dir, tmp_path, records, target, divergence=divergence, per_device_train_batch_size=16, **settings
    )
    used = [row for row in records if row["sample"] < 4]  # 4 samples for each of the 4 prompts
    policy, tokenizer = load(tiny_model_dir), AutoTokenizer.from_pretrained(tiny_model_dir)
    log_policy = score(policy, used, tokenizer)
    log_base = log_policy.detach()
    ids = [row["completion_ids"] for row in used]
    if target is SOFT:
        log_potential = torch.tensor(length_reward(ids)) / 0.2
    else:
        factor = torch.tensor(even(ids))
        smoothing = target.get("smoothing")
        log_potential = (factor if smoothing is None else smoothing + (1 - smoothing) * factor).log()
    groups = torch.arange(4).repeat_interleave(4)
    log_z = log_partition(log_potential.view(4, 4)).repeat_interleave(4)  # the base is the proposal: P/q is P/a
    if settings.get("z_estimate") == "given":
        log_z = torch.full_like(log_z, 2.0)
    assert torch.isfinite(log_z).all(), "the test's samples should satisfy every prompt at least once"
    from fdiv.divergences import get_divergence

    coefficient = f_dpg_coefficient(
        log_policy - log_base - log_potential + log_z,
        get_divergence(divergence).scaled(settings.get("divergence_scale", 1.0)),
        group_ids=groups,
        baseline=settings.get("baseline", "loo"),
        clip=settings.get("pseudo_reward_clip"),
    )
    loss = (coefficient * log_policy).mean() / settings.get("length_normalizer", 1.0)
    loss.backward()
    exact = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    assert exact.norm() > 0.1
    torch.testing.assert_close(gradient, exact, rtol=0, atol=2e-4 * exact.norm().item())
    logged = made.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert logged["z/mean"] == pytest.approx(log_z.exp().mean().item(), rel=1e-5)


def test_one_step_with_z_of_the_other_samples(tiny_model_dir, tmp_path, records):
    """Ẑ and the baseline of each row by hand, from the other three samples of its prompt; `z/mean` is the group's."""
    made, gradient = one_step(
        tiny_model_dir, tmp_path, records, SOFT, divergence="forward_kl", per_device_train_batch_size=16,
        z_estimate="loo",
    )  # fmt: skip
    used = [row for row in records if row["sample"] < 4]
    policy, tokenizer = load(tiny_model_dir), AutoTokenizer.from_pretrained(tiny_model_dir)
    log_policy = score(policy, used, tokenizer)
    log_potential = (torch.tensor(length_reward([row["completion_ids"] for row in used])) / 0.2).view(4, 4)
    weight = torch.zeros(4, 4)
    for prompt in range(4):
        for i in range(4):
            others = [j for j in range(4) if j != i]
            log_z = log_potential[prompt, others].exp().mean().log()
            slope = 1 - torch.exp(log_potential[prompt] - log_z)  # f' = 1 − 1/t, t = Ẑ_i·a/P of every sample
            weight[prompt, i] = slope[i] - slope[others].mean()
    (weight.flatten() * log_policy).mean().backward()
    exact = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    assert exact.norm() > 0.1
    torch.testing.assert_close(gradient, exact, rtol=0, atol=2e-4 * exact.norm().item())
    expected = log_potential.exp().mean().item()
    assert made.state.log_history[0]["z/mean"] == pytest.approx(expected, rel=1e-5)


def test_off_policy_step_uses_the_weights_of_the_rollouts(tiny_model_dir, tmp_path, records):
    """Rollouts whose recorded log q is δ below log π: every weight is e^δ, and with Z given nothing else changes."""
    shift = 0.3
    shifted = [
        {**row, "logprobs": [value - shift / len(row["logprobs"]) for value in row["logprobs"]]} for row in records
    ]
    settings = {
        "divergence": "reverse_kl", "per_device_train_batch_size": 16, "z_estimate": "given", "log_z": 2.0,
        "baseline": "none",
    }  # fmt: skip
    made, gradient = one_step(tiny_model_dir, tmp_path / "a", shifted, SOFT, **settings)
    _, plain = one_step(tiny_model_dir, tmp_path / "b", records, SOFT, **settings)
    torch.testing.assert_close(gradient, math.exp(shift) * plain, rtol=0, atol=1e-3 * plain.norm().item())
    assert made.state.log_history[0]["importance_weight/mean"] == pytest.approx(math.exp(shift), rel=1e-4)
    capped, gradient = one_step(tiny_model_dir, tmp_path / "c", shifted, SOFT, importance_weight_cap=1.1, **settings)
    torch.testing.assert_close(gradient, 1.1 * plain, rtol=0, atol=1e-3 * plain.norm().item())
    assert capped.state.log_history[0]["importance_weight/capped_fraction"] == 1.0


def test_rollouts_without_log_probs_are_scored(tiny_model_dir, tmp_path, records):
    bare = [{**row, "logprobs": None} for row in records]
    _, with_log_probs = one_step(tiny_model_dir, tmp_path / "a", records)
    _, without = one_step(tiny_model_dir, tmp_path / "b", bare)
    torch.testing.assert_close(without, with_log_probs, rtol=0, atol=1e-3 * with_log_probs.norm().item())


@pytest.mark.parametrize("batch", [8, 2, 1])
@pytest.mark.processor
def test_accumulation_changes_nothing(tiny_model_dir, tmp_path, records, batch):
    """Groups of 4 are split over micro-batches; Ẑ and baselines belong to the generation."""
    _, whole = one_step(tiny_model_dir, tmp_path / "whole", records, per_device_train_batch_size=16)
    made, parts = one_step(
        tiny_model_dir,
        tmp_path / "parts",
        records,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=16 // batch,
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4 * whole.norm().item())
    assert made.state.log_history[0]["z/skipped_fraction"] == 0.0


def test_left_padding_on_learned_positions(tiny_gpt2_dir, tmp_path):
    """GPT-2: what training scores equals what generation sampled with, under prompts of different lengths."""
    made = trainer(load(tiny_gpt2_dir), tmp_path, SOFT, per_device_train_batch_size=16)
    made.train()
    for entry in made.state.log_history[:-1]:
        assert entry["importance_weight/mean"] == pytest.approx(1.0, abs=1e-4)
        assert entry["importance_weight/max"] == pytest.approx(1.0, abs=1e-3)
    assert made.state.log_history[0]["kl_to_base"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_models_own_generation_settings_have_no_say(tiny_model_dir, tmp_path, lora):
    """A model whose generation config forbids tokens: samples would come from another distribution than log q says."""
    model = load(tiny_model_dir)
    kept = model.generation_config
    kept.suppress_tokens, kept.min_new_tokens, kept.no_repeat_ngram_size = list(range(0, 384, 2)), 5, 1
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    drawn = []

    def watching(completion_ids, **_):
        drawn.extend(token for ids in completion_ids for token in ids)
        return [0.5] * len(completion_ids)

    made = trainer(
        model, tmp_path, {"name": "reward", "scorers": [watching], "beta": 1.0}, max_steps=1,
        processing_class=tokenizer, peft_config=LoraConfig(**LORA) if lora else None,
        per_device_train_batch_size=64, num_generations=64,
    )  # fmt: skip
    made.train()
    assert 0.3 < sum(token % 2 == 0 for token in drawn) / len(drawn) < 0.7
    assert model.generation_config is kept


# ---------------------------------------------------------------- references
def test_base_is_the_policy_as_handed_over(tiny_model_dir, tmp_path):
    """A model in memory whose weights are no longer those of its path."""
    model = load(tiny_model_dir)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    start = flat(model)
    made = trainer(model, tmp_path, SOFT)
    made.train()
    torch.testing.assert_close(flat(made.ref_model), start, rtol=0, atol=0)
    assert made.state.log_history[0]["kl_to_base"] == pytest.approx(0.0, abs=1e-4)


def test_another_base_model(tiny_model_dir, tmp_path, records):
    base = load(tiny_model_dir)
    with torch.no_grad():
        base.lm_head.weight.mul_(0.5)
    made, _ = one_step(tiny_model_dir, tmp_path, records, SOFT, base_model=base, per_device_train_batch_size=16)
    used = [row for row in records if row["sample"] < 4]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        gap = score(load(tiny_model_dir), used, tokenizer) - score(base, used, tokenizer)
    assert made.state.log_history[0]["kl_to_base"] == pytest.approx(gap.mean().item(), abs=1e-4)


def test_adapter_off_is_the_base(tiny_model_dir, tmp_path):
    made = trainer(str(tiny_model_dir), tmp_path, SOFT, peft_config=LoraConfig(**LORA), learning_rate=0.1, max_steps=3)
    frozen = {n: p.detach().clone() for n, p in made.model.named_parameters() if "lora" not in n}
    assert made.ref_model is None
    made.train()
    for name, parameter in made.model.named_parameters():
        if name in frozen:
            torch.testing.assert_close(parameter, frozen[name], rtol=0, atol=0)
    drift = [abs(entry["kl_to_base"]) for entry in made.state.log_history[:-1]]
    assert drift[0] < 1e-4 < drift[-1]


def test_continued_adapter_keeps_its_start_as_the_base(tiny_model_dir, tmp_path):
    model = get_peft_model(load(tiny_model_dir), LoraConfig(**LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    made = trainer(model, tmp_path, SOFT, max_steps=1, processing_class=tokenizer)
    made.train()
    assert made.state.log_history[0]["kl_to_base"] == pytest.approx(0.0, abs=1e-4)


# ---------------------------------------------------------------- prompts or none
def test_without_prompts(tiny_model_dir, tmp_path):
    made = trainer(load(tiny_model_dir), tmp_path, SOFT, prompts=None)
    made.train()
    assert len(made.estimates.state_dict()) == 1, "one context, one Z"
    assert made.estimates.state_dict().popitem()[1][1] == 16, "over every sample of both steps"
    with pytest.raises(ValueError, match="without train_dataset .* set max_steps"):
        trainer(load(tiny_model_dir), tmp_path, SOFT, prompts=None, max_steps=-1)


def test_conversational_prompts(tiny_model_dir, tmp_path):
    seen = []

    def scorer(completions, **_):
        seen.extend(completions)
        return [0.5] * len(completions)

    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    target = {"name": "reward", "scorers": [scorer], "beta": 1.0}
    made = trainer(load(tiny_model_dir), tmp_path, target, prompts=chats, max_steps=1)
    made.train()
    assert seen[0][0]["role"] == "assistant"
    assert math.isfinite(made.state.log_history[0]["self_bleu_3"])


# ---------------------------------------------------------------- learning, end to end
BIG = {
    "prompts": None, "per_device_train_batch_size": 128, "num_generations": 128, "max_completion_length": 2,
    "learning_rate": 3e-3, "lr_scheduler_type": "linear", "logging_steps": 10, "max_grad_norm": 1.0,
}  # fmt: skip


def test_training_moves_the_policy_to_the_target(tiny_model_dir, tmp_path):
    made = trainer(load(tiny_model_dir), tmp_path, max_steps=60, **BIG)
    made.train()
    first, last = made.state.log_history[0], made.state.log_history[-2]
    assert last["score/even"] > 0.9 > first["score/even"]
    assert last["divergence/jensen_shannon"] < 0.7 * first["divergence/jensen_shannon"]
    assert 0 < last["divergence/jensen_shannon_se"] < 0.1 * last["divergence/jensen_shannon"]
    assert last["divergence/reverse_kl"] is None, "infinite: the target rules out samples the policy still produces"


def test_distributional_target_reaches_its_moment(tiny_model_dir, tmp_path):
    def rare(completion_ids, **_):
        return [float(ids[0] % 8 == 0) for ids in completion_ids]

    target = {"name": "distributional", "features": [rare], "moments": [0.5]}
    made = trainer(
        load(tiny_model_dir), tmp_path, target, max_steps=60, moment_samples=2048, divergence="reverse_kl", **BIG
    )
    made.train()
    first, last = made.state.log_history[0], made.state.log_history[-2]
    base = first["moments/rare/base"]
    assert 0.05 < base < 0.2
    # One boolean feature: λ = logit(wanted) − logit(base).
    assert first["moments/rare/lambda"] == pytest.approx(-math.log(base / (1 - base)), abs=1e-3)
    assert last["score/rare"] == pytest.approx(0.5, abs=4 * last["score/rare_se"])
    assert last["divergence/reverse_kl"] < 0.1 * first["divergence/reverse_kl"]


# ---------------------------------------------------------------- checkpoints
@pytest.mark.parametrize(
    "settings",
    [
        {"baseline": "history"},
        {"z_estimate": "pooled"},
        {"proposal": "adaptive", "proposal_check_every": 1, "proposal_margin": 0.0},
        {"target": {"name": "distributional", "features": [even], "moments": [0.6]}, "moment_samples": 64},
    ],
    ids=["history", "pooled", "adaptive", "moments"],
)
def test_resuming_is_bit_for_bit(tiny_model_dir, tmp_path, settings):
    settings = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", **settings}
    target = settings.pop("target", None)
    whole = trainer(load(tiny_model_dir), tmp_path / "whole", target, **settings)
    whole.train()
    again = trainer(load(tiny_model_dir), tmp_path / "again", target, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(flat(whole.model), flat(again.model))
    assert whole.estimates.state_dict() == again.estimates.state_dict()
    keep = ("loss", "z/mean", "divergence/forward_kl", "score/even")
    for key in keep:
        assert whole.state.log_history[-2][key] == again.state.log_history[-2][key], key


def test_foreign_checkpoint_refused(tiny_model_dir, tmp_path):
    made = trainer(load(tiny_model_dir), tmp_path, save_steps=1, save_strategy="steps", max_steps=1)
    made.train()
    (tmp_path / "checkpoint-1" / "f_dpg_state.json").unlink()
    again = trainer(load(tiny_model_dir), tmp_path, max_steps=2)
    with pytest.raises(CheckpointError, match="f_dpg_state.json is missing"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# ---------------------------------------------------------------- the adaptive proposal
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_adaptive_proposal(tiny_model_dir, tmp_path, lora):
    """Samples come from the frozen weights until π is measurably closer to p; then from π as it was at that moment."""
    settings = {**BIG, "logging_steps": 1}
    if lora:
        wide = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
        settings |= {"peft_config": wide, "learning_rate": 2e-2}
    made = trainer(
        str(tiny_model_dir), tmp_path, SOFT, proposal="adaptive", proposal_check_every=5, max_steps=18, **settings
    )
    start = flat(made.model)
    made.train()
    history = made.state.log_history[:-1]
    assert made._adaptive.version >= 1
    checks = [entry for entry in history if "proposal/replaced" in entry]
    assert len(checks) == 3
    for entry in checks:
        closer = entry["proposal/improvement"] > entry["proposal/improvement_se"]
        assert entry["proposal/replaced"] == float(closer)
    assert history[1]["importance_weight/max"] > 1.001, "the policy moved, the proposal did not"
    assert not torch.equal(flat(made.model), start)
    held = torch.cat([tensor.flatten() for tensor in made._adaptive._frozen.values()])
    trained = torch.cat([p.detach().flatten() for p in made.model.parameters() if p.requires_grad])
    assert held.shape == trained.shape and not torch.equal(held, trained)


def test_weights_are_exchanged_and_put_back(tiny_model_dir):
    from fdiv.alignment.f_dpg.proposal import AdaptiveProposal

    model = load(tiny_model_dir)
    frozen = flat(model)
    proposal = AdaptiveProposal(dict(model.named_parameters()), "forward_kl", 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    moved = flat(model)
    with pytest.raises(RuntimeError, match="generation failed"), proposal.in_place():
        torch.testing.assert_close(flat(model), frozen, rtol=0, atol=0)
        raise RuntimeError("generation failed")
    torch.testing.assert_close(flat(model), moved, rtol=0, atol=0)


def test_proposal_decides_by_standard_errors():
    from fdiv.alignment.f_dpg.proposal import AdaptiveProposal

    proposal = AdaptiveProposal(None, "reverse_kl", 2.0)
    assert proposal.decide() == {}
    # π = p on every sample (term 0); q is off by ±0.5: its terms are log t − 1 + 1/t.
    log_t_q = torch.tensor([0.5, -0.5] * 8, dtype=torch.float64)
    proposal.observe(torch.zeros(16).double(), log_t_q, -log_t_q, torch.arange(16))
    terms = log_t_q - 1 + torch.exp(-log_t_q)
    decided = proposal.decide()
    assert decided["proposal/improvement"] == pytest.approx(terms.mean().item())
    assert decided["proposal/improvement_se"] == pytest.approx(terms.std().item() / 4)
    assert decided["proposal/replaced"] == 1.0 and proposal.version == 1
    proposal.observe(log_t_q, torch.zeros(16).double(), log_t_q, torch.arange(16))
    assert proposal.decide()["proposal/replaced"] == 0.0 and proposal.version == 1
    # Eight prompts of two samples each: the standard error is that of the prompts' means.
    proposal.observe(torch.zeros(16).double(), log_t_q * torch.arange(16), -log_t_q, torch.arange(16) // 2)
    x = log_t_q * torch.arange(16)
    means = (x - 1 + torch.exp(-x)).reshape(8, 2).mean(1)
    assert proposal.decide()["proposal/improvement_se"] == pytest.approx(means.std().item() / 8**0.5)


# ---------------------------------------------------------------- evaluation
def test_evaluation_leaves_the_state_alone(tiny_model_dir, tmp_path):
    from datasets import Dataset

    rows = Dataset.from_dict({"prompt": list(PROMPTS)})
    made = trainer(load(tiny_model_dir), tmp_path, SOFT, eval_dataset=rows, per_device_eval_batch_size=8)
    made.train()
    state = made.estimates.state_dict()
    metrics = made.evaluate()
    assert made.estimates.state_dict() == state
    assert math.isfinite(metrics["eval_divergence/reverse_kl"]) and 0 <= metrics["eval_score/length_reward"] <= 1
