"""f-DPG's refusals: bad scorers, Z of 0, moments out of reach, empty completions, invalid pairs, refused options."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from trl import GRPOConfig

from fdiv.alignment import FDPGConfig, FDPGTrainer
from fdiv.alignment.f_dpg.config import _REFUSED
from fdiv.alignment.f_dpg.loss import f_dpg_coefficient
from fdiv.errors import MomentError, RolloutError, ScorerError
from tests.support.runs.f_dpg import HARD, SOFT, config, even, flat, load, trainer


def pointwise(scorer):
    return {"name": "pointwise", "scorers": [scorer]}


def never(completions, **_):
    return [0.0] * len(completions)


def raising(completions, **_):
    raise KeyError("gold")


def not_a_number(completions, **_):
    return [math.nan] * len(completions)


def nothing(completions, **_):
    return [None] * len(completions)


def short(completions, **_):
    return [1.0]


def negative(completions, **_):
    return [-1.0] * len(completions)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (raising, "scorer 'raising' raised KeyError: 'gold'"),
        (not_a_number, "scorer 'not_a_number' returned nan for the completion"),
        (nothing, "scorer 'nothing' returned None for the completion"),
        (short, "scorer 'short' returned 1 scores for 8 completions"),
        (negative, "scorer 'negative' gave -1: a factor of a density must be >= 0"),
    ],
    ids=["raises", "nan", "none", "length", "negative"],
)
def test_bad_scorers_stop_training_and_are_named(tiny_model_dir, tmp_path, scorer, message):
    made = trainer(load(tiny_model_dir), tmp_path, pointwise(scorer))
    before = flat(made.model)
    with pytest.raises(ScorerError, match=message):
        made.train()
    assert torch.equal(flat(made.model), before)


def test_asynchronous_scorer_is_checked_too(tiny_model_dir, tmp_path):
    async def later(completions, **_):
        return [math.inf] * len(completions)

    with pytest.raises(ScorerError, match="scorer 'later' returned inf"):
        trainer(load(tiny_model_dir), tmp_path, pointwise(later)).train()


def test_prompts_with_z_of_zero_are_skipped_and_counted(tiny_model_dir, tmp_path):
    made = trainer(load(tiny_model_dir), tmp_path, pointwise(never))
    before = flat(made.model)
    made.train()
    entry = made.state.log_history[0]
    assert entry["z/skipped_fraction"] == 1.0 and entry["z/skipped_prompts"] == 2 and entry["z/mean"] == 0.0
    assert entry["loss"] == 0.0 and "divergence/forward_kl" not in entry
    torch.testing.assert_close(flat(made.model), before, rtol=0, atol=0)


def test_some_prompts_skipped(tiny_model_dir, tmp_path):
    """The satisfied prompt trains, the other is left out of everything."""

    def only_the(prompts, completion_ids, **_):
        return [float(prompt == "The") * hit for prompt, hit in zip(prompts, even(completion_ids), strict=True)]

    made = trainer(load(tiny_model_dir), tmp_path, pointwise(only_the), prompts=["The", "0 1 2 3"], max_steps=1)
    made.train()
    entry = made.state.log_history[0]
    assert entry["z/skipped_fraction"] == 0.5 and entry["z/skipped_prompts"] == 1
    assert entry["loss"] != 0.0 and entry["grad_norm"] > 0
    # An estimate, or null where too few samples of the prompt that is left have P > 0 to correct it.
    value = entry["divergence/forward_kl"]
    assert (value is None) == (entry["divergence/uncorrected_fraction"] > 0.5) and (
        value is None or math.isfinite(value)
    )


def test_floor_trains_on_them_instead(tiny_model_dir, tmp_path):
    made = trainer(load(tiny_model_dir), tmp_path, pointwise(never), z_floor=1e-4, baseline="none", max_steps=1)
    made.train()
    entry = made.state.log_history[0]
    assert entry["z/skipped_fraction"] == 0.0 and entry["z/mean"] == pytest.approx(1e-4)
    assert entry["grad_norm"] > 0 and entry["off_support_fraction"] == 1.0


@pytest.mark.parametrize(
    ("moment", "message"),
    [(1.5, "moment 1.5 of 'even' is out of reach: the 64 samples show values from 0 to 1"), (1.0, "at the edge")],
)
def test_moments_out_of_reach(tiny_model_dir, tmp_path, moment, message):
    target = {"name": "distributional", "features": [even], "moments": [moment]}
    with pytest.raises(MomentError, match=message):
        trainer(load(tiny_model_dir), tmp_path, target, moment_samples=64).train()


def test_empty_completion(tiny_model_dir, tmp_path):
    def rollouts(prompts, trainer):
        count = len(prompts)
        return {"prompt_ids": [[5]] * count, "completion_ids": [[7]] * (count - 1) + [[]], "logprobs": None}

    with pytest.raises(RolloutError, match="rollout_func rollouts returned an empty completion for prompt 7"):
        trainer(load(tiny_model_dir), tmp_path, rollout_func=rollouts).train()


def test_log_probabilities_must_be_finite(tiny_model_dir, tmp_path):
    def rollouts(prompts, trainer):
        count = len(prompts)
        return {"prompt_ids": [[5]] * count, "completion_ids": [[7]] * count, "logprobs": [[math.nan]] * count}

    with pytest.raises(RolloutError, match="log-probability that is not finite"):
        trainer(load(tiny_model_dir), tmp_path, rollout_func=rollouts).train()


# ---------------------------------------------------------------- before anything is loaded
@pytest.mark.parametrize("name", ["reverse_kl", "pearson_chi2", "jeffreys", "chi2_kl"])
def test_invalid_pair_refused_by_the_config(tmp_path, name):
    words = {"name": "pointwise", "scorers": [{"name": "contains_words", "words": ["amazing"]}]}
    with pytest.raises(ValueError, match=rf"{name}.*hard target.*smooth"):
        config(tmp_path, divergence=name, target=words)
    config(tmp_path, divergence=name, target={**words, "smoothing": 1e-3})
    with pytest.raises(ValueError, match=rf"{name}.*hard target"):
        config(tmp_path, divergence="jensen_shannon", target=words, proposal="adaptive", proposal_metric=name)


def test_invalid_pair_refused_by_the_trainer(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="hard target"):
        trainer(str(tiny_model_dir), tmp_path, HARD, divergence="reverse_kl")
    trainer(str(tiny_model_dir), tmp_path, SOFT, divergence="reverse_kl")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("beta", 0.1), ("loss_type", "grpo"), ("temperature", 0.7), ("top_p", 0.9), ("top_k", 20),
        ("repetition_penalty", 1.1), ("entropy_coef", 0.1), ("scale_rewards", "none"), ("sync_ref_model", True),
        ("mask_truncated_completions", True), ("vllm_importance_sampling_correction", True), ("reward_weights", [2.0]),
        ("epsilon", 0.1), ("epsilon_high", 0.28), ("delta", 2.0), ("sapo_temperature_pos", 2.0), ("entropy_target", 0.5),
        ("vllm_importance_sampling_clip_max", 9.0), ("use_bias_correction_kl", False),
    ],
)  # fmt: skip
def test_options_that_cannot_be_honoured(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"{option}=.* cannot be honoured: "):
        config(tmp_path, **{option: value})


@pytest.mark.parametrize("key", ["temperature", "no_repeat_ngram_size", "min_new_tokens", "num_beams", "logit_bias"])
def test_generation_kwargs_may_not_change_the_proposal(tmp_path, key):
    with pytest.raises(ValueError, match=f"generation_kwargs: '{key}' cannot be honoured"):
        config(tmp_path, generation_kwargs={key: 2})
    config(tmp_path, generation_kwargs={"stop_strings": ["\n"]})


def test_every_key_of_grpo_is_honoured_or_refused():
    """A key that a TRL upgrade brings must be put into one list or the other."""
    from trl.trainer.base_config import _BaseConfig

    honoured = {
        "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "disable_dropout", "cast_lm_head_to_fp32",
        "num_generations", "num_generations_eval", "max_completion_length", "ds3_gather_for_generation",
        "shuffle_dataset", "pad_to_multiple_of", "generation_batch_size", "steps_per_generation", "generation_kwargs",
        "chat_template_kwargs", "cache_implementation", "num_iterations", "max_tool_calling_iterations",
        "log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts",
        "log_completions_hub_repo", "use_transformers_continuous_batching", "use_transformers_paged",
        "transformers_continuous_batching_config", "use_vllm", "vllm_mode", "vllm_model_impl",
        "vllm_enable_sleep_mode", "vllm_structured_outputs_regex", "vllm_server_base_url", "vllm_server_host",
        "vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization",
        "vllm_max_model_length", "vllm_tensor_parallel_size",
    }  # fmt: skip
    own = set(GRPOConfig.__dataclass_fields__) - set(_BaseConfig.__dataclass_fields__)
    refused = set(_REFUSED)
    assert own == honoured | refused and not honoured & refused


# ---------------------------------------------------------------- alpha-DPG
@pytest.mark.parametrize("alpha", [0.25, 0.999])
def test_alpha_dpg_preset_is_the_papers_reward(tmp_path, alpha):
    """min((p/π)^(1−α) − 1, 10), −1 on what the verifier rejects, for any α; Z of the group, in [1e-4, 1]."""
    args = config(tmp_path, alpha_dpg=alpha)
    ratio = torch.tensor([0.0, 0.5, 1.0, 8.0, 1e6, 1e300], dtype=torch.float64)  # p/π
    coefficient = f_dpg_coefficient(
        -ratio.log(), args.resolve_divergence(None), baseline="none", clip=args.pseudo_reward_clip
    )
    expected = [min(value ** (1 - alpha) - 1, 10.0) for value in ratio.tolist()]
    assert (-coefficient).tolist() == pytest.approx(expected, rel=1e-9)
    assert (args.z_estimate, args.z_max, args.z_floor, args.baseline) == ("group", 1.0, 1e-4, "loo")
    again = config(tmp_path, alpha_dpg=alpha, divergence=args.divergence, pseudo_reward_clip=10.0)
    assert again.divergence_scale == pytest.approx(1 - alpha)
    with pytest.raises(ValueError, match="pseudo_reward_clip=5.0 beside alpha_dpg"):
        config(tmp_path, alpha_dpg=alpha, pseudo_reward_clip=5.0)


def test_divergence_scale_still_works_and_warns(tmp_path):
    """One release more: D_f times the number, after `normalized`; the preset of α-DPG sets it without a warning."""
    log_t = torch.tensor([-0.7, 0.4], dtype=torch.float64)
    with pytest.warns(FutureWarning, match="divergence_scale=3.0 is deprecated"):
        scaled = config(tmp_path, divergence="reverse_kl", divergence_scale=3.0).resolve_divergence()
    torch.testing.assert_close(scaled.derivative(log_t), 3.0 * log_t)  # f = t log t − t + 1, f' = log t
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="divergence_scale")
        preset = config(tmp_path, alpha_dpg=0.25)
    assert preset.divergence_scale == 0.75
    normalized = config(tmp_path, divergence="jensen_shannon", normalized=True).resolve_divergence()
    by_hand = 2 * (log_t - torch.log((1 + log_t.exp()) / 2))  # f' of the registry's f is log(2t/(1 + t)), f''(1) = 1/2
    torch.testing.assert_close(normalized.derivative(log_t), by_hand)


def test_a_key_is_refused_unless_it_has_its_neutral_value():
    """The defaults, TRL's but for two, are what leaves the objective alone; a TRL upgrade that changes one shows here."""
    neutral = {"beta": 1.0, "vllm_importance_sampling_correction": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
               "min_p": None, "repetition_penalty": 1.0, "entropy_coef": 0.0, "sync_ref_model": False}  # fmt: skip
    own, trl = FDPGConfig.__dataclass_fields__, GRPOConfig.__dataclass_fields__
    assert {name: own[name].default for name in neutral} == neutral
    assert {name for name in _REFUSED if own[name].default != trl[name].default} == {
        "beta", "vllm_importance_sampling_correction"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"z_estimate": "batch"}, "z_estimate='batch': must be one of history, pooled, group, loo, given"),
        ({"baseline": "mean"}, "baseline='mean'"),
        ({"proposal": "frozen"}, "proposal='frozen'"),
        ({"z_max": 0.0}, "z_max=0.0: must be above 0"),
        ({"z_max": 0.5, "z_floor": 0.6}, "z_floor=0.6 is above z_max=0.5"),
        ({"alpha_dpg": 1.0}, "alpha_dpg=1.0: must be above 0 and below 1"),
        ({"pseudo_reward_clip": -1.0}, "pseudo_reward_clip=-1.0"),
        ({"log_z": 1.0}, "log_z=1.0 is only used with z_estimate: given"),
        ({"max_exponent": 200.0}, "max_exponent"),
        ({"divergence": "kl"}, "reverse_kl"),
        ({"divergence": None}, "divergence=None: give the name"),
        ({"target": "pointwise"}, "a mapping is due"),
        ({"target": {"name": "pointwise"}}, "target 'pointwise' needs scorers"),
        ({"rollout_server_url": "http://x", "use_vllm": True}, None),
    ],
)
def test_config_refuses(tmp_path, settings, message):
    if message is None:
        with pytest.raises(ValueError, match="two back ends"):
            config(tmp_path, **settings).server_rollouts()
        return
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_trainer_needs_a_target_and_its_config(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="no target"):
        FDPGTrainer(str(tiny_model_dir), config(tmp_path))
    with pytest.raises(TypeError, match="needs an FDPGConfig"):
        FDPGTrainer(str(tiny_model_dir), GRPOConfig(str(tmp_path), bf16=False, use_cpu=True), target=SOFT)
    from datasets import Dataset

    with pytest.raises(ValueError, match="no column 'prompt'; it has: text"):
        FDPGTrainer(str(tiny_model_dir), config(tmp_path), Dataset.from_dict({"text": ["a"]}), target=SOFT)


def test_given_z_must_be_there(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="needs a finite log Z for every prompt"):
        trainer(load(tiny_model_dir), tmp_path, z_estimate="given").train()


def test_adaptive_proposal_needs_a_back_end_that_can_hold_it(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="a rollout_func of one's own does not use"):
        trainer(load(tiny_model_dir), tmp_path, proposal="adaptive", rollout_func=lambda prompts, trainer: {})


def test_config_is_a_dataclass_for_the_command_line():
    """Every own key has a help text, and dict keys are known to TRL's parser as such."""
    for name in ("divergence", "target", "proposal_metric"):
        assert name in FDPGConfig._VALID_DICT_FIELDS
    own = set(FDPGConfig.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__)
    assert all(FDPGConfig.__dataclass_fields__[name].metadata.get("help") for name in own)
