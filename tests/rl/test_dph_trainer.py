"""DPHTrainer: parity with TRL's GRPOTrainer, the rehearsal gradient by hand, invariances, references, resuming."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import GRPOTrainer

from fdiv.models.logprobs import token_scores
from fdiv.rl.dph.loss import js_on_policy, js_on_reference, rehearsal_loss
from fdiv.rl.dph.rehearsal import RehearsalCache
from fdiv.training.rollouts import RecordedRollouts, model_inputs
from tests.support.runs.dph import cache, correct, flat, load, recorded, reward, sgd, trainer, trl_trainer

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def records(tiny_model_dir):
    return recorded(tiny_model_dir, 24)


def weights_after(make, model_dir, output, records, **settings):
    """A trainer that was run on recorded rollouts, and its weights."""
    model = load(model_dir)
    # SGD: Adam would turn rounding of gradients near 0 into whole steps.
    optimizers = sgd(model, settings["learning_rate"])
    made = make(model, output, rollout_func=RecordedRollouts(records), optimizers=optimizers, **settings)
    made.train()
    return made, flat(made.model)


def gradient(model_dir, output, records, **settings):
    """One SGD step of learning rate 1: the change of the weights is minus the gradient."""
    model = load(model_dir)
    before = flat(model)
    made = trainer(
        model, output, rollout_func=RecordedRollouts(records), optimizers=sgd(model), **{"max_steps": 1, **settings}
    )
    made.train()
    return made, before - flat(made.model)


def log_ratios(model, rows):
    """log π − log π_ref of each row's tokens by the plain path, one row at a time: no padding, no fused head."""
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        mask = torch.zeros_like(ids)
        mask[:, len(row.prompt_ids) :] = 1
        scores = token_scores(model, ids, torch.ones_like(ids), mask, fused=False)
        yield scores.log_probs[:, len(row.prompt_ids) - 1 :] - torch.tensor([row.reference_log_probs])


def rehearsal_gradient(model_dir, rows, weight, term):
    """∇ of weight · (mean over rows of `term(log_ratio, mask)`)."""
    model = load(model_dir)
    losses = [term(x, torch.ones_like(x)) for x in log_ratios(model, rows)]
    (weight * torch.cat(losses).mean()).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


# ---------------------------------------------------------------- parity with TRL
ADAPTIVE = {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 5.0, "entropy_coef_delta": 0.02}


@pytest.mark.parametrize(
    ("loss_type", "entropy"),
    [("grpo", {}), ("dapo", {}), ("dr_grpo", {}), ("bnpo", {}), ("dapo", {"entropy_coef": 0.3}), ("dapo", ADAPTIVE)],
)
@pytest.mark.processor
def test_without_rehearsal_it_is_grpo_step_for_step(tiny_model_dir, tmp_path, records, loss_type, entropy):
    settings = {
        "loss_type": loss_type, "max_steps": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
        "num_iterations": 2, "learning_rate": 0.05, "disable_dropout": True, **entropy,
    }  # fmt: skip
    theirs, expected = weights_after(trl_trainer, tiny_model_dir, tmp_path / "trl", records, **settings)
    ours, weights = weights_after(trainer, tiny_model_dir, tmp_path / "dph", records, **settings)
    assert (weights - expected).abs().max() < 1e-6 and (weights - flat(load(tiny_model_dir))).abs().max() > 1e-4
    for mine, other in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        shared = [key for key in other if key not in ("step_time", "epoch")]
        assert len(shared) >= 10
        for key in shared:
            assert mine[key] == pytest.approx(other[key], abs=1e-6, rel=1e-5), key
    assert type(theirs) is GRPOTrainer


def test_coefficient_zero_measures_and_changes_nothing(tiny_model_dir, tmp_path, records):
    """The rows ride along in the forward; nothing of them reaches the weights."""
    settings = {"max_steps": 2, "learning_rate": 0.05}
    _, expected = weights_after(trl_trainer, tiny_model_dir, tmp_path / "trl", records, **settings)
    made, weights = weights_after(
        trainer, tiny_model_dir, tmp_path / "dph", records, rehearsal=cache(tiny_model_dir, shift=0.3),
        rehearsal_coefficient=0.0, **settings,
    )  # fmt: skip
    assert (weights - expected).abs().max() < 1e-5
    assert made.state.log_history[0]["divergence/jensen_shannon"] > 1e-3


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize(("kl", "corrected"), [("k3_loss", False), ("k3_ratio_corrected", True)])
@pytest.mark.processor
def test_k3_is_trls_beta_step_for_step(tiny_model_dir, tmp_path, records, loss_type, kl, corrected):
    settings = {
        "loss_type": loss_type, "max_steps": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
        "learning_rate": 0.1, "disable_dropout": True,
    }  # fmt: skip
    theirs, expected = weights_after(
        trl_trainer, tiny_model_dir, tmp_path / "trl", records, beta=0.5, use_bias_correction_kl=corrected, **settings
    )
    ours, weights = weights_after(
        trainer, tiny_model_dir, tmp_path / "dph", records, kl=kl, kl_coefficient=0.5, **settings
    )
    assert (weights - expected).abs().max() < 1e-6
    for mine, other in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        assert mine[f"kl/{kl}"] == pytest.approx(other["kl"], abs=1e-7, rel=1e-5)
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-6)
    assert ours.state.log_history[2][f"kl/{kl}"] > 1e-3


def test_advantage_grpo_is_trls_own(tiny_model_dir, tmp_path, records):
    _, expected = weights_after(trl_trainer, tiny_model_dir, tmp_path / "trl", records, learning_rate=0.05)
    _, weights = weights_after(
        trainer, tiny_model_dir, tmp_path / "dph", records, learning_rate=0.05, advantage="grpo"
    )
    assert (weights - expected).abs().max() < 1e-6


# ---------------------------------------------------------------- the rehearsal term
@pytest.mark.parametrize(
    ("divergence", "settings"),
    [
        ("forward_kl", {}),
        ("jensen_shannon", {"level": "sequence"}),
        ({"name": "alpha", "alpha": 0.2}, {"max_exponent": 0.2}),
        ("forward_kl", {"coefficient_clip": 0.1}),
    ],
    ids=["forward_kl", "js-sequence", "alpha-capped", "clipped"],
)
def test_rehearsal_gradient_is_that_of_the_rows(tiny_model_dir, tmp_path, records, divergence, settings):
    """What rehearsal adds to the gradient, against the rows scored one by one without padding."""
    rows = cache(tiny_model_dir, shift=0.6)
    shared = {"divergence": divergence, "rehearsal": rows, "rehearsal_batch_size": 6, **settings}
    made, with_rows = gradient(tiny_model_dir, tmp_path / "a", records, rehearsal_coefficient=0.7, **shared)
    _, without = gradient(tiny_model_dir, tmp_path / "b", records, rehearsal_coefficient=0.0, **shared)
    level = settings.get("level", "token")
    options = {key: settings[key] for key in ("max_exponent", "coefficient_clip") if key in settings}
    exact = rehearsal_gradient(
        tiny_model_dir, rows, 0.7, lambda x, mask: rehearsal_loss(x, mask, divergence, level, **options)
    )
    assert exact.norm() > 0.01
    torch.testing.assert_close(with_rows - without, exact, rtol=0, atol=1e-4 * exact.norm().item() + 2e-6)
    entry = made.state.log_history[0]
    each = [rehearsal_loss(x, torch.ones_like(x), divergence, level, **options) for x in
            log_ratios(load(tiny_model_dir), rows)]  # fmt: skip
    assert entry["rehearsal/loss"] == pytest.approx(torch.cat(each).mean().item(), rel=1e-4)
    assert entry["rehearsal/rows"] == 6
    if "coefficient_clip" in settings:
        # Every second token is off by 0.6 (u = e^0.6, |c| = 0.82), the others by 0.
        off = torch.cat([x.flatten() for x in log_ratios(load(tiny_model_dir), rows)]) > 0.3
        assert entry["rehearsal/clipped_fraction"] == pytest.approx(off.double().mean().item())


def test_rows_count_with_their_weights(tiny_model_dir, tmp_path, records):
    """A row of weight 3 beside two of weight 0.5 …: the gradient is that of the weighted mean."""
    rows = cache(tiny_model_dir, shift=0.6)
    weights = [3.0, 0.5, 0.5, 1.0, 0.25, 0.75]
    weighed = RehearsalCache(rows.header, [row._replace(weight=w) for row, w in zip(rows, weights, strict=True)])
    shared = {"divergence": "forward_kl", "rehearsal": weighed, "rehearsal_batch_size": 6}
    made, with_rows = gradient(tiny_model_dir, tmp_path / "a", records, rehearsal_coefficient=0.7, **shared)
    _, without = gradient(tiny_model_dir, tmp_path / "b", records, rehearsal_coefficient=0.0, **shared)
    factors = iter(weights)
    exact = rehearsal_gradient(
        tiny_model_dir, rows, 0.7, lambda x, mask: next(factors) * rehearsal_loss(x, mask, "forward_kl")
    )
    torch.testing.assert_close(with_rows - without, exact, rtol=0, atol=1e-4 * exact.norm().item() + 2e-6)
    each = [rehearsal_loss(x, torch.ones_like(x), "forward_kl") for x in log_ratios(load(tiny_model_dir), rows)]
    expected = (torch.cat(each) * torch.tensor(weights)).mean().item()
    assert made.state.log_history[0]["rehearsal/loss"] == pytest.approx(expected, rel=1e-4)


def test_logged_divergence_and_quantiles(tiny_model_dir, tmp_path, records):
    rows = cache(tiny_model_dir, shift=0.6)
    made, _ = gradient(tiny_model_dir, tmp_path, records, rehearsal=rows, rehearsal_batch_size=6)
    entry = made.state.log_history[0]
    ratios = [x.detach().flatten().double() for x in log_ratios(load(tiny_model_dir), rows)]
    terms = torch.stack([(x.exp() - 1 - x).mean() for x in ratios])
    assert entry["divergence/forward_kl"] == pytest.approx(terms.mean().item(), rel=1e-4)
    assert entry["divergence/forward_kl_se"] == pytest.approx(terms.std().item() / math.sqrt(6), rel=1e-3)
    tokens = torch.cat(ratios)
    for name, share in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
        expected = torch.quantile(tokens, share).item()
        assert entry[f"log_ratio/rehearsal_{name}"] == pytest.approx(expected, abs=1e-5)
    assert entry["rehearsal/mean_tokens"] == pytest.approx(len(tokens) / 6)
    assert entry["clamped_fraction"] == 0.0 and entry["explore_loss"] == pytest.approx(0.0, abs=1e-5)


def test_own_samples_give_no_gradient_at_the_start(tiny_model_dir, tmp_path, records):
    """u = 1: value and gradient of every centred generator vanish, unlike those of plain likelihood."""
    shared = {"rehearsal": cache(tiny_model_dir), "rehearsal_batch_size": 6, "divergence": "forward_kl"}
    made, with_rows = gradient(tiny_model_dir, tmp_path / "a", records, rehearsal_coefficient=100.0, **shared)
    _, without = gradient(tiny_model_dir, tmp_path / "b", records, rehearsal_coefficient=0.0, **shared)
    assert (with_rows - without).abs().max() < 1e-4
    assert made.state.log_history[0]["rehearsal/loss"] == pytest.approx(0.0, abs=1e-9)


def test_pooled_is_literal_times_rows_over_completions(tiny_model_dir, tmp_path, records):
    """η pooled with R rows beside N completions is η·R/N literal: 0.8 · 4/16 = 0.2."""
    shared = {"rehearsal": cache(tiny_model_dir, shift=0.6), "rehearsal_batch_size": 4, "divergence": "forward_kl"}
    _, pooled = gradient(
        tiny_model_dir, tmp_path / "a", records, rehearsal_coefficient=0.8, rehearsal_weighting="pooled", **shared
    )
    _, literal = gradient(tiny_model_dir, tmp_path / "b", records, rehearsal_coefficient=0.2, **shared)
    _, without = gradient(tiny_model_dir, tmp_path / "c", records, rehearsal_coefficient=0.0, **shared)
    torch.testing.assert_close(pooled, literal, rtol=0, atol=1e-6)
    assert (pooled - without).norm() > 1e-3


@pytest.mark.parametrize("batch", [8, 4, 2])
@pytest.mark.processor
def test_accumulation_changes_nothing(tiny_model_dir, tmp_path, records, batch):
    """6 rehearsal rows over 1, 2, 4 or 8 micro-steps: the last leaves two of them without a row."""
    shared = {"rehearsal": cache(tiny_model_dir, shift=0.6), "rehearsal_batch_size": 6, "rehearsal_coefficient": 0.7}
    _, whole = gradient(tiny_model_dir, tmp_path / "whole", records, **shared)
    made, parts = gradient(
        tiny_model_dir, tmp_path / "parts", records, per_device_train_batch_size=batch,
        gradient_accumulation_steps=16 // batch, **shared,
    )  # fmt: skip
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4 * whole.norm().item())
    assert made.state.log_history[0]["rehearsal/rows"] == 6


def test_definition_form(tiny_model_dir, tmp_path, records):
    """KL(π_ref‖m) on the rows and KL(π‖m) on the rollouts; the latter against a direct computation after a step."""
    rows = cache(tiny_model_dir, shift=0.6)
    shared = {"rehearsal": rows, "rehearsal_batch_size": 6, "rehearsal_form": "definition"}
    made, with_rows = gradient(tiny_model_dir, tmp_path / "a", records, rehearsal_coefficient=0.7, **shared)
    assert made.ref_model is not None
    _, without = gradient(tiny_model_dir, tmp_path / "b", records, rehearsal_coefficient=0.0, **shared)
    # π = π_ref on the rollouts, where the on-policy half has coefficient log 1 + ½ − ½ = 0.
    exact = rehearsal_gradient(tiny_model_dir, rows, 0.7, js_on_reference)
    torch.testing.assert_close(with_rows - without, exact, rtol=0, atol=1e-4 * exact.norm().item() + 2e-6)


@pytest.mark.parametrize("form", ["score", "pathwise"])
def test_definition_form_on_rollouts(tiny_model_dir, tmp_path, records, form):
    """The second step's on-policy half: the reference is the start, the policy has moved."""
    settings = {
        "rehearsal": cache(tiny_model_dir), "rehearsal_batch_size": 1, "rehearsal_form": "definition",
        "rehearsal_coefficient": 2.0, "definition_gradient": form,
    }  # fmt: skip
    made, _ = gradient(tiny_model_dir, tmp_path, records, **settings)
    made.model.train()
    inputs = made._generate_and_score_completions([{"prompt": records[0]["prompt"]}] * 4)
    made.current_gradient_accumulation_steps = 1
    made._next_rows = lambda: None  # a micro-step without cached rows

    def moved(coefficient):
        made.args.rehearsal_coefficient = coefficient
        made.model.zero_grad()
        made._compute_loss(made.model, inputs).backward()
        return torch.cat([parameter.grad.flatten() for parameter in made.model.parameters()])

    with_the_half = moved(2.0) - moved(0.0)
    made.model.zero_grad()
    log_policy, _, _ = made._get_per_token_logps_and_entropies(made.model, *model_inputs(inputs))
    log_ratio = log_policy - inputs["ref_per_token_logps"]
    (2.0 * js_on_policy(log_ratio, inputs["completion_mask"], gradient=form).mean()).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in made.model.parameters()])
    assert expected.norm() > 1e-4
    torch.testing.assert_close(with_the_half, expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- no reference in memory
def test_no_reference_model_is_held(tiny_model_dir, tmp_path, records):
    made, _ = gradient(tiny_model_dir, tmp_path, records, rehearsal=cache(tiny_model_dir), rehearsal_batch_size=2)
    assert made.ref_model is None and made.reference is None
    assert parameters_reached_from(made) == sum(p.numel() for p in load(tiny_model_dir).parameters())


def test_a_live_reference_is_held_where_asked_for(tiny_model_dir, tmp_path):
    made = trainer(load(tiny_model_dir), tmp_path, kl="k2_loss")
    assert parameters_reached_from(made) == 2 * sum(p.numel() for p in load(tiny_model_dir).parameters())


def parameters_reached_from(made) -> int:
    """Numbers in the parameters of every module a trainer's attributes hold, each storage once."""
    held = [made.reference] if made.reference is not None else []
    modules = [
        value for owner in (made, *held) for value in vars(owner).values() if isinstance(value, torch.nn.Module)
    ]
    storages = {p.untyped_storage().data_ptr(): p.numel() for module in modules for p in module.parameters()}
    return sum(storages.values())


# ---------------------------------------------------------------- adapters, checkpointing, positions
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_lora(tiny_model_dir, tmp_path, checkpointing):
    """The base stays; the adapter starts at the reference (log-ratio 0) and moves away from it."""
    rows = cache(tiny_model_dir)
    made = trainer(
        str(tiny_model_dir), tmp_path, rehearsal=rows, rehearsal_batch_size=6, peft_config=LoraConfig(**LORA),
        max_steps=3, learning_rate=0.1, gradient_checkpointing=checkpointing, kl="k3_loss", temperature=1.0,
    )  # fmt: skip
    assert made.ref_model is None, "under PEFT the reference is the policy with the adapter off"
    made.train()
    first, *_, last = made.state.log_history[:-1]
    assert first["divergence/forward_kl"] == pytest.approx(0.0, abs=1e-8)
    assert first["kl/k3_loss"] == pytest.approx(0.0, abs=1e-8)
    assert last["divergence/forward_kl"] > 1e-5 and last["kl/k3_loss"] > 1e-5
    base = {name: p for name, p in made.model.named_parameters() if "lora_" not in name}
    start = load(tiny_model_dir).state_dict()
    for name, parameter in base.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        assert torch.equal(parameter, start[plain]), name


def test_trained_adapter_has_its_own_reference(tiny_model_dir, tmp_path):
    """Training that continues an adapter: the reference is its starting copy, not the bare base."""
    model = get_peft_model(load(tiny_model_dir), LoraConfig(**LORA, init_lora_weights=False))
    from transformers import AutoTokenizer

    made = trainer(
        model, tmp_path, kl="k2_loss", processing_class=AutoTokenizer.from_pretrained(tiny_model_dir), max_steps=2,
        learning_rate=0.1,
    )  # fmt: skip
    made.train()
    first, second = made.state.log_history[:-1]
    assert first["kl/k2_loss"] == pytest.approx(0.0, abs=1e-8) and second["kl/k2_loss"] > 1e-6


@pytest.mark.processor
def test_gradient_checkpointing_changes_nothing(tiny_model_dir, tmp_path, records):
    shared = {"rehearsal": cache(tiny_model_dir, shift=0.6), "rehearsal_batch_size": 6, "rehearsal_coefficient": 0.7}
    _, plain = gradient(tiny_model_dir, tmp_path / "a", records, **shared)
    _, checkpointed = gradient(tiny_model_dir, tmp_path / "b", records, gradient_checkpointing=True, **shared)
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-5 * plain.norm().item())


def test_left_padding_on_learned_positions(tiny_gpt2_dir, tmp_path):
    """GPT-2: rows of many lengths in one padded batch score as they do alone, so the log-ratio starts at 0."""
    made = trainer(
        load(tiny_gpt2_dir), tmp_path, rehearsal=cache(tiny_gpt2_dir), rehearsal_batch_size=6, max_steps=1,
        max_completion_length=9,
    )  # fmt: skip
    made.train()
    entry = made.state.log_history[0]
    for name in ("p05", "p50", "p95"):
        assert entry[f"log_ratio/rehearsal_{name}"] == pytest.approx(0.0, abs=1e-5)
    assert entry["sampling/sampling_logp_difference/max"] < 1e-4


def test_temperature_is_that_of_the_cache(tiny_model_dir, tmp_path):
    rows = cache(tiny_model_dir, temperature=0.7)
    made = trainer(
        load(tiny_model_dir), tmp_path, rehearsal=rows, rehearsal_batch_size=6, temperature=0.7, max_steps=1,
        kl="k3_loss",
    )  # fmt: skip
    made.train()
    entry = made.state.log_history[0]
    assert entry["divergence/forward_kl"] == pytest.approx(0.0, abs=1e-9)
    assert entry["kl/k3_loss"] == pytest.approx(0.0, abs=1e-9), "the live reference scores at the temperature too"


# ---------------------------------------------------------------- rewards
def test_unscored_completions_are_counted_and_left_out(tiny_model_dir, tmp_path, records):
    """Every fourth completion has no reward: advantage 0, as if it were not in its group."""

    def partly(completion_ids, **_):
        return [None if number % 4 == 3 else value for number, value in enumerate(correct(completion_ids))]

    for name, advantage in (("default", None), ("rloo", "rloo"), ("pkpo", {"name": "pkpo", "k": 2})):
        made = trainer(
            load(tiny_model_dir), tmp_path / name, rewards=partly, rollout_func=RecordedRollouts(records),
            advantage=advantage, max_steps=1,
        )  # fmt: skip
        made.train()
        assert made.state.log_history[0]["reward/unscored_fraction"] == 0.25
        shown = torch.tensor(list(made._logs["advantages"])).view(4, 4)
        assert (shown[:, 3] == 0).all() and shown[:, :3].abs().max() > 0.1
        if name == "rloo":
            rewards = torch.tensor(correct([row["completion_ids"] for row in records])).view(4, -1)[:, :4]
            scored = rewards[:, :3]
            expected = scored - (scored.sum(1, keepdim=True) - scored) / 2
            order = [list(dict.fromkeys(made._logs["prompt"])).index(p) for p in ("The quick brown",)]
            torch.testing.assert_close(shown[order[0], :3], expected[0])


def test_k1_in_the_reward(tiny_model_dir, tmp_path, records):
    """rewards − β·Σ k1, then the group's advantage; at the start k1 is 0, later it is what the weights say."""
    plain, _ = gradient(tiny_model_dir, tmp_path / "a", records, advantage="grpo")
    made, _ = gradient(tiny_model_dir, tmp_path / "b", records, kl="k1_reward", kl_coefficient=0.3)
    assert made.state.log_history[0]["kl/k1_reward"] == pytest.approx(0.0, abs=1e-5)
    torch.testing.assert_close(
        torch.tensor(list(made._logs["advantages"])), torch.tensor(list(plain._logs["advantages"])), atol=1e-3, rtol=0
    )
    # One step of rate 1 has moved the policy; replayed completions keep their recorded log-probabilities, so ask for
    # bare ones, which are scored.
    bare = [{**row, "logprobs": None} for row in records]
    made.rollout_func = RecordedRollouts(bare)
    made.model.train()
    inputs = [{"prompt": row["prompt"]} for row in records if row["sample"] < 4]
    batch = made._generate_and_score_completions(inputs)
    mask = batch["completion_mask"]
    k1 = ((made._score(made.model, batch) - batch["ref_per_token_logps"]) * mask).sum(-1)
    assert k1.abs().max() > 1e-3
    ids = [row["completion_ids"] for row in records if row["sample"] < 4]
    total = (torch.tensor(reward(ids)) - 0.3 * k1).view(4, 4)
    expected = (total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantages"].view(4, 4), expected, atol=1e-3, rtol=0)


# ---------------------------------------------------------------- resuming, evaluation
def test_resuming_is_bit_for_bit(tiny_model_dir, tmp_path):
    """The rehearsal rows of a step follow from (seed, step): a resumed run takes the same ones."""
    settings = {
        "max_steps": 4, "save_steps": 2, "save_strategy": "steps", "rehearsal": cache(tiny_model_dir, shift=0.3),
        "rehearsal_batch_size": 4, "rehearsal_coefficient": 1.0, "shuffle_dataset": True,
    }  # fmt: skip
    whole = trainer(load(tiny_model_dir), tmp_path / "whole", **settings)
    whole.train()
    again = trainer(load(tiny_model_dir), tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(flat(whole.model), flat(again.model))
    for key in ("loss", "rehearsal/loss", "divergence/forward_kl", "log_ratio/rehearsal_p05", "reward"):
        assert whole.state.log_history[-2][key] == again.state.log_history[-2][key], key


def test_evaluation_scores_rollouts_only(tiny_model_dir, tmp_path):
    from datasets import Dataset

    rows = Dataset.from_dict({"prompt": ["The", "0 1 2 3"]})
    made = trainer(
        load(tiny_model_dir), tmp_path, eval_dataset=rows, per_device_eval_batch_size=8, kl="k2_loss",
        rehearsal=cache(tiny_model_dir), rehearsal_batch_size=2,
    )  # fmt: skip
    made.train()
    metrics = made.evaluate()
    assert 0 <= metrics["eval_reward"] <= 1 and metrics["eval_kl/k2_loss"] > 0
    assert not any(name.startswith("eval_rehearsal") for name in metrics)


def test_model_card(tiny_model_dir, tmp_path, records):
    made, _ = gradient(tiny_model_dir, tmp_path, records, rehearsal=cache(tiny_model_dir), rehearsal_batch_size=3)
    made.create_model_card(model_name="x")
    card = (tmp_path / "README.md").read_text()
    for line in (
        "| divergence | `jensen_shannon` |", "| rehearsal_rows_per_step | `3` |", "| rehearsal_coefficient | `0.025` |",
        "2509.07430",
    ):  # fmt: skip
        assert line in card, line
