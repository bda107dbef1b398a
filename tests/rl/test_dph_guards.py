"""DPH's refusals: caches that do not fit, options that exclude each other, broken log-probabilities, dead servers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from trl import GRPOConfig

from fdiv.errors import DataError, FdivError, NonFiniteLossError, RolloutError
from fdiv.rl import DPHConfig, DPHTrainer
from fdiv.rl.dph.batches import join, rows_of_slot, rows_of_step
from fdiv.rl.dph.loss import rehearsal_weight
from fdiv.rl.dph.rehearsal import RehearsalCache
from fdiv.training.rollouts import RecordedRollouts
from tests.support.runs.dph import PROMPTS, cache, flat, load, recorded, settings_of, trainer


@pytest.fixture(scope="module")
def rehearsal(tiny_model_dir):
    return cache(tiny_model_dir)


def config(output, **settings):
    return DPHConfig(str(output), **settings_of(**settings))


# ---------------------------------------------------------------- which rows, in which batch
def test_rows_of_a_step():
    """Every row once per pass over the cache; the same for every caller; steps that span two passes."""
    steps = [rows_of_step(7, 3, step, seed=5) for step in range(7)]
    assert steps == [rows_of_step(7, 3, step, seed=5) for step in range(7)]
    assert all(len(rows) == 3 for rows in steps)
    drawn = [row for rows in steps for row in rows]
    walks = [drawn[start : start + 7] for start in range(0, 21, 7)]
    assert all(sorted(walk) == list(range(7)) for walk in walks) and walks[0] != walks[1]
    assert rows_of_step(7, 3, 0, seed=6) != steps[0] or rows_of_step(7, 3, 1, seed=6) != steps[1]
    assert sorted(rows_of_step(4, 4, 9, seed=0)) == [0, 1, 2, 3]


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_slots_share_the_rows(slots):
    rows = list(range(10, 15))
    parts = [rows_of_slot(rows, slot, slots) for slot in range(slots)]
    assert sorted(row for part in parts for row in part) == rows
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("multiple_of", [None, 4])
def test_joint_batch(rehearsal, multiple_of):
    """Prompts end in one column, completions begin in the next; split gives the parts back."""
    rows = rehearsal.batch([0, 3], pad_token_id=9)
    ids = torch.tensor([[9, 1, 2, 3], [4, 5, 6, 9]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    joint = join(ids, mask, 2, rows, 9, multiple_of)
    width = joint.input_ids.size(1) - joint.completion_length
    assert joint.attention_mask.sum() == 6 + rows.prompt_mask.sum() + rows.completion_mask.sum()
    assert joint.input_ids[0, width - 2 : width + 2].tolist() == [9, 1, 2, 3]
    assert (joint.input_ids[joint.attention_mask == 0] == 9).all()
    for number, row in enumerate((rehearsal[0], rehearsal[3])):
        kept = joint.input_ids[2 + number][joint.attention_mask[2 + number].bool()].tolist()
        assert kept == row.prompt_ids + row.completion_ids
    explore, rehearsed = joint.split(joint.input_ids[:, width:])
    assert torch.equal(explore, ids[:, 2:]) and torch.equal(rehearsed, rows.completion_ids)
    if multiple_of:
        assert width % 4 == 0 and joint.completion_length % 4 == 0


def test_weighting():
    """The release: η = 0.2 over 256 rows beside 2,048 completions is 0.025 literal."""
    assert rehearsal_weight(0.2, "pooled", 256, 2048) == pytest.approx(0.025)
    assert rehearsal_weight(0.2, "literal", 256, 2048) == 0.2


def test_default_number_of_rows(tmp_path):
    assert config(tmp_path).rehearsal_rows(1000, 2048) == 256
    assert config(tmp_path).rehearsal_rows(10, 2048) == 10 and config(tmp_path).rehearsal_rows(10, 4) == 1
    with pytest.raises(ValueError, match="rehearsal_batch_size=11, but the rehearsal cache holds 10 rows"):
        config(tmp_path, rehearsal_batch_size=11).rehearsal_rows(10, 4)


# ---------------------------------------------------------------- caches that do not fit
@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"temperature": 0.6}, "at temperature 0.6, the training temperature is 1.0"),
        ({"tokenizer": "0" * 24}, "made with another tokenizer"),
        ({"model": "0" * 24}, "log-probabilities of another model"),
        (
            {"settings": {"encoding": {"template": None, "end_token": "appended"}}},
            "was made with end_token='appended', now it is 'turn'",
        ),
    ],
    ids=["temperature", "tokenizer", "model", "encoding"],
)
def test_foreign_cache_refused(tiny_model_dir, tmp_path, rehearsal, header, message):
    foreign = RehearsalCache(replace(rehearsal.header, **header), rehearsal.rows)
    with pytest.raises(DataError, match=message):
        trainer(load(tiny_model_dir), tmp_path, rehearsal=foreign, rehearsal_batch_size=2)


def test_cache_from_its_file(tiny_model_dir, tmp_path, rehearsal):
    rehearsal.save(tmp_path / "rows.safetensors")
    made = trainer(load(tiny_model_dir), tmp_path, rehearsal_cache=str(tmp_path / "rows.safetensors"))
    assert len(made.rehearsal) == 6 and made._rows_per_step == 2
    with pytest.raises(DataError, match="no such file: .*missing.safetensors; `fdiv presample` makes one"):
        trainer(load(tiny_model_dir), tmp_path, rehearsal_cache=str(tmp_path / "missing.safetensors"))


def test_no_near_perfect_prompt(tiny_model_dir, tmp_path, rehearsal):
    with pytest.raises(DataError, match="no near-perfect prompt.*lower threshold"):
        trainer(load(tiny_model_dir), tmp_path, rehearsal=RehearsalCache(rehearsal.header, []))


# ---------------------------------------------------------------- during training
def test_prompts_that_fill_no_generation(tiny_model_dir, tmp_path, capsys):
    """TRL ends such a training after no step; and an epoch of five prompts in fours leaves one out."""
    few = trainer(load(tiny_model_dir), tmp_path, num_generations=2)
    with pytest.raises(
        DataError, match=r"4 training prompts, and a generation takes 8, with 2 completions of each: no"
    ):
        few.train()
    five = trainer(load(tiny_model_dir), tmp_path, prompts=[*PROMPTS, "one more"], max_steps=1, shuffle_dataset=True)
    five.train()
    assert "1 of 5 prompts are left out of each epoch (other ones each time): a generation takes 4" in (
        capsys.readouterr().err
    )


def test_broken_log_probabilities(tiny_model_dir, tmp_path):
    """NaN, or none at all, for a token: refused before any weight moves."""
    for broken in (math.nan, None):

        def rollouts(prompts, trainer, broken=broken):
            count = len(prompts)
            return {
                "prompt_ids": [[5]] * count, "completion_ids": [[7, 8]] * count, "logprobs": [[-1.0, broken]] * count,
            }  # fmt: skip

        model = load(tiny_model_dir)
        before = flat(model)
        with pytest.raises(RolloutError, match=r"log-probability (that is not finite|for a token of completion 0)"):
            trainer(model, tmp_path, rollout_func=rollouts).train()
        assert torch.equal(flat(model), before)


def test_server_that_is_not_there(tiny_model_dir, tmp_path):
    with pytest.raises(RolloutError, match=r"no vLLM server answers at http://127\.0\.0\.1:9/"):
        trainer(load(tiny_model_dir), tmp_path, rollout_server_url="http://127.0.0.1:9").train()


def test_non_finite_loss_stops_before_the_step(tiny_model_dir, tmp_path, rehearsal):
    made = trainer(load(tiny_model_dir), tmp_path, rehearsal=rehearsal, rehearsal_batch_size=2)
    before = flat(made.model)
    made._row_losses = lambda log_ratio, mask: log_ratio.sum(-1) * math.nan
    with pytest.raises(
        NonFiniteLossError, match=r"step 1: the loss is nan \(.*divergence=jensen_shannon.*explore_loss"
    ):
        made.train()
    assert torch.equal(flat(made.model), before)


def test_infinite_reward_refused(tiny_model_dir, tmp_path):
    def endless(completions, **_):
        return [math.inf] * len(completions)

    with pytest.raises(FdivError, match="reward 'endless' is infinite"):
        trainer(load(tiny_model_dir), tmp_path, rewards=endless).train()


def test_nothing_scored_moves_nothing(tiny_model_dir, tmp_path):
    def silent(completions, **_):
        return [None] * len(completions)

    records = recorded(tiny_model_dir, 4)
    for advantage in (None, "rloo"):
        made = trainer(
            load(tiny_model_dir), tmp_path, rewards=silent, advantage=advantage, max_steps=1,
            rollout_func=RecordedRollouts(records),
        )  # fmt: skip
        before = flat(made.model)
        made.train()
        entry = made.state.log_history[0]
        assert entry["reward/unscored_fraction"] == 1.0 and entry["loss"] == 0.0
        if advantage:
            assert entry["advantage/skipped_fraction"] == 1.0
        torch.testing.assert_close(flat(made.model), before, rtol=0, atol=0)


# ---------------------------------------------------------------- before anything is loaded
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.1}, "set kl: k3_loss and kl_coefficient"),
        ({"divergence": "kl"}, "reverse_kl"),
        ({"divergence": {"name": "alpha"}}, "alpha"),
        ({"divergence": None}, "divergence=None: give the name"),
        ({"level": "word"}, "level='word': must be one of token, sequence"),
        ({"rehearsal_weighting": "mean"}, "rehearsal_weighting='mean': must be one of literal, pooled"),
        ({"rehearsal_batch_size": 0}, "rehearsal_batch_size=0: must be at least 1"),
        ({"coefficient_clip": -1.0}, "coefficient_clip=-1.0: must be above 0"),
        ({"rehearsal_coefficient": -0.1}, "rehearsal_coefficient=-0.1"),
        ({"rehearsal_coefficient": math.nan}, "rehearsal_coefficient=nan"),
        ({"max_exponent": 200.0}, "max_exponent"),
        ({"kl": "k4_loss"}, "unknown KL estimator 'k4_loss'"),
        ({"advantage": "pkpo"}, "needs the parameter 'k'"),
        ({"advantage": {"name": "pkpo", "k": 8}}, "at least 8 completions per prompt: raise num_generations=4"),
        ({"advantage": "rloo", "scale_rewards": "none"}, "leave scale_rewards='none' out"),
        ({"kl": "k1_reward", "scale_rewards": "batch"}, "cannot be honoured"),
        ({"rehearsal_form": "definition", "divergence": "forward_kl"}, "definition is that of jensen_shannon"),
        ({"rehearsal_form": "definition", "normalized": True}, "normalized=True"),
        ({"rehearsal_form": "definition", "coefficient_clip": 1.0}, "without normalized, coefficient_clip"),
    ],
)  # fmt: skip
def test_config_refuses(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_trainer_needs_reward_config_and_prompts(tiny_model_dir, tmp_path):
    from datasets import Dataset

    rows = Dataset.from_dict({"prompt": ["The"]})
    with pytest.raises(ValueError, match="no reward: set `reward:"):
        DPHTrainer(str(tiny_model_dir), config(tmp_path), rows)
    with pytest.raises(TypeError, match="needs a DPHConfig"):
        DPHTrainer(str(tiny_model_dir), GRPOConfig(str(tmp_path), bf16=False, use_cpu=True), rows)
    with pytest.raises(ValueError, match="no column 'prompt'; it has: text"):
        DPHTrainer(str(tiny_model_dir), config(tmp_path), Dataset.from_dict({"text": ["a"]}), reward_funcs=len)


def test_own_keys_have_help():
    own = set(DPHConfig.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__)
    assert all(DPHConfig.__dataclass_fields__[name].metadata.get("help") for name in own)
    for name in ("divergence", "reward", "advantage"):
        assert name in DPHConfig._VALID_DICT_FIELDS
