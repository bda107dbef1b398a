"""Pass@k and modes of training groups, the answer bank, and evaluation while training."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from fdiv.errors import CheckpointError, DataError, OptionError
from fdiv.eval.pass_at_k.metrics import pass_at_k
from fdiv.models.fingerprints import data_fingerprint
from fdiv.rl import DPHConfig
from fdiv.rl.dph.bank import AnswerBank
from fdiv.rl.dph.groups import correct_of, group_statistics, powers_of_two
from fdiv.rl.dph.rehearsal import RehearsalCache, RehearsalHeader, RehearsalRow
from tests.support.runs.dph import cache, correct, load, settings_of, sgd, trainer

NAN = math.nan


# ---------------------------------------------------------------- pure functions
def test_statistics_by_hand():
    """Groups of 4: two right of modes a, a; three scored, one right; none right; none scored."""
    rewards = torch.tensor([1, 0, 1, 0, NAN, 1, 0, 0, 0, 0, 0, 0, NAN, NAN, NAN, NAN])
    modes = ["a", None, "a", None, None, "b", None, None, *[None] * 8]
    found = group_statistics(correct_of(rewards, None), ~rewards.isnan(), 4, modes)
    assert found["group/pass@1"] == pytest.approx((2 / 4 + 1 / 3 + 0) / 3)
    assert found["group/pass@2"] == pytest.approx((5 / 6 + 2 / 3 + 0) / 3)
    assert found["group/pass@4"] == pytest.approx((1 + 0) / 2)  # the group of three scored has no pass@4
    assert found["group/modes"] == 1.0
    assert group_statistics(correct_of(rewards, None), ~rewards.isnan(), 4)["group/pass@1"] == found["group/pass@1"]


def test_statistics_are_those_of_the_evaluation():
    generator = torch.Generator().manual_seed(0)
    rewards = (torch.rand(24 * 16, generator=generator) < 0.3).float()
    found = group_statistics(rewards > 0, torch.ones_like(rewards).bool(), 16)
    counts = rewards.view(24, 16).sum(-1).long().numpy()
    for k in powers_of_two(16):
        assert found[f"group/pass@{k}"] == pytest.approx(pass_at_k(counts, np.full(24, 16), k).mean(), abs=1e-9)


@pytest.mark.parametrize(("size", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4]), (16, [1, 2, 4, 8, 16])])
def test_the_k_of_a_group(size, expected):
    assert powers_of_two(size) == expected


def test_correct_is_defined_for_01_rewards_or_with_a_threshold():
    rewards = torch.tensor([0.0, 0.5, 1.0, NAN])
    assert correct_of(rewards, None) is None
    assert correct_of(rewards, 0.5).tolist() == [False, True, True, False]
    assert correct_of(torch.tensor([0.0, 1.0, NAN]), None).tolist() == [False, True, False]


# ---------------------------------------------------------------- the bank
def row(prompt, completion, log_prob=-0.5, weight=1.0):
    return RehearsalRow("p", list(prompt), list(completion), [log_prob] * len(completion), 0, weight)


def bank_of(rows=(), limit=10, mode=lambda ids: ids[0]):
    return AnswerBank(RehearsalHeader("t", "m", 1.0), rows, mode, limit)


def test_one_row_for_each_mode_of_each_prompt(tmp_path):
    bank = bank_of([row([1], [5, 6]), row([1], [5, 7], weight=3.0), row([1], [8]), row([2], [5])], limit=4)
    assert bank.at_start == (3, 1, 0)
    assert [(r.prompt_ids, r.completion_ids) for r in bank] == [([1], [5, 6]), ([1], [8]), ([2], [5])]
    assert bank.add([row([2], [8]), row([2], [8, 8]), row([3], [1]), row([1], [5])]) == (1, 2, 1)
    assert len(bank) == 4  # nothing was dropped for what came later
    bank.save(tmp_path / "bank.safetensors")
    other = bank_of(limit=4)
    other.restore(tmp_path / "bank.safetensors")
    assert other.rows == bank.rows and other.add([row([2], [8])]) == (0, 1, 0)
    with pytest.raises(DataError, match="holds 4 rows, and bank_limit is 3"):
        bank_of(limit=3).restore(tmp_path / "bank.safetensors")
    with pytest.raises(DataError, match="2 of 4 rows are of a mode that another row has.*restore the setting `mode`"):
        bank_of(mode=lambda ids: 0).restore(tmp_path / "bank.safetensors")


def test_a_bad_row_is_named():
    with pytest.raises(DataError, match="the answer bank, row 0: 0.5 is no log-probability"):
        bank_of([row([1], [5], log_prob=0.5)])


def shape_of(text):
    """A mode with few values, so that slots are taken twice."""
    return len(text) % 3


def unhashable(text):
    return [text]


def same(text):
    """All answers are of one mode."""
    return 0


def partly(completion_ids, **_):
    """1, ½ or 0 by the first token: graded rewards."""
    return [(0.0, 0.5, 1.0)[ids[0] % 3] for ids in completion_ids]


def test_the_bank_takes_verified_answers_with_their_log_probabilities(tiny_model_dir, tmp_path):
    """Learning rate 0: the bank holds what the start model said, scored by it; each slot once."""
    model = load(tiny_model_dir)
    made = trainer(
        model, tmp_path, rewards=correct, optimizers=sgd(model, 0.0), bank="policy", mode=f"{__name__}:shape_of",
        rehearsal_batch_size=4, max_steps=3, divergence="forward_kl",
    )  # fmt: skip
    made.train()
    made._fill_bank()
    bank = made.rehearsal
    assert len(bank) > 0 and all(r.completion_ids[0] % 2 == 0 for r in bank)
    slots = [bank.slot(r) for r in bank]
    assert len(set(slots)) == len(slots)
    from fdiv.rl.presample.run import reference_log_probs

    pairs = {str(i): (r.prompt_ids, r.completion_ids) for i, r in enumerate(bank)}
    exact = reference_log_probs(load(tiny_model_dir), pairs, temperature=1.0, batch_size=4)
    for i, r in enumerate(bank):
        assert r.reference_log_probs == pytest.approx(exact[str(i)], abs=1e-4)
    logs = [entry for entry in made.state.log_history if "bank/rows" in entry]
    assert [entry["bank/rows"] for entry in logs] == list(itertools.accumulate(entry["bank/added"] for entry in logs))
    # The policy has not moved, so what it rehearses costs nothing.
    assert all(entry.get("rehearsal/loss", 0.0) == pytest.approx(0.0, abs=1e-6) for entry in made.state.log_history)
    assert all(0 <= entry["group/pass@1"] <= entry["group/pass@4"] <= 1 for entry in logs)
    assert all(1 <= entry.get("group/modes", 1) <= 3 for entry in logs)


def test_a_cache_becomes_a_bank(tiny_model_dir, tmp_path, capsys):
    rows = cache(tiny_model_dir, shift=0.6)
    twice = RehearsalCache(rows.header, [*rows, *rows])
    made = trainer(load(tiny_model_dir), tmp_path, rehearsal=twice, bank="cache", mode="text", rehearsal_batch_size=6)
    assert len(made.rehearsal) == 6 and made.rehearsal.at_start.known == 6
    said = capsys.readouterr().err
    assert (
        "6 rows, one for each mode of each prompt; 6 further rows of their modes" in said
        and "whatever its weight" not in said
    )
    # R rows a step are rows of the bank, not of the cache it was made of.
    few = {"bank": "cache", "mode": f"{__name__}:same"}
    weighed = RehearsalCache(rows.header, [r._replace(weight=0.5 + i / 5) for i, r in enumerate(rows)])
    made = trainer(load(tiny_model_dir), tmp_path, rehearsal=weighed, per_device_train_batch_size=48, **few)
    prompts = {tuple(r.prompt_ids) for r in rows}
    assert len(made.rehearsal) == len(prompts) == made._rows_per_step < 6
    assert {r.weight for r in made.rehearsal} == {1.0}
    assert "every row counts the same, whatever its weight in the cache" in capsys.readouterr().err
    with pytest.raises(ValueError, match="rehearsal_batch_size=6, but the answer bank, .* holds 4 rows"):
        trainer(load(tiny_model_dir), tmp_path, rehearsal=rows, rehearsal_batch_size=6, **few)


def test_a_run_with_a_bank_resumes_exactly(tiny_model_dir, tmp_path):
    settings = {
        "rewards": correct, "bank": "policy", "mode": "text", "rehearsal_batch_size": 4, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 2, "rehearsal_coefficient": 0.5, "divergence": "forward_kl",
    }  # fmt: skip
    whole = trainer(load(tiny_model_dir), tmp_path / "whole", **settings)
    whole.train()
    again = trainer(load(tiny_model_dir), tmp_path / "whole", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [r.completion_ids for r in again.rehearsal] == [r.completion_ids for r in whole.rehearsal]
    assert again.rehearsal.rows == whole.rehearsal.rows
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)

    def logged(run):
        names = ("rehearsal/loss", "bank/rows", "bank/added", "bank/refused", "group/pass@2")
        return [[entry.get(name) for name in names] for entry in run.state.log_history if "loss" in entry]

    # The log does not show where the run was cut, nor that checkpoints were written.
    never = trainer(load(tiny_model_dir), tmp_path / "never", **settings | {"save_strategy": "no"})
    never.train()
    assert logged(again) == logged(whole) == logged(never) and len(logged(never)) == 4
    assert again.run_settings() == again.run_settings() | {"bank": "policy", "mode": "text", "rehearsal_rows": 0}
    other = trainer(load(tiny_model_dir), tmp_path / "whole", **settings | {"mode": "answer"})
    with pytest.raises(CheckpointError, match="mode of the bank is 'answer' and was 'text'"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_a_checkpoint_of_release_0_2_goes_on(tiny_model_dir, tmp_path):
    """It had rows without weights and knew of no bank; a missing entry and None are alike when identities are compared."""
    rows = cache(tiny_model_dir)
    identity = trainer(load(tiny_model_dir), tmp_path, rehearsal=rows).run_identity()
    assert identity["rehearsal cache"] == data_fingerprint([tuple(r)[:5] for r in rows])
    assert identity["bank"] is None
    weighed = RehearsalCache(rows.header, [r._replace(weight=0.5 + i / 5) for i, r in enumerate(rows)])
    other = trainer(load(tiny_model_dir), tmp_path, rehearsal=weighed, bank="cache").run_identity()
    assert other["rehearsal cache"] != identity["rehearsal cache"] and other["bank"] == "cache"


def test_what_a_bank_refuses(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="bank: cache needs a rehearsal_cache"):
        trainer(load(tiny_model_dir), tmp_path, bank="cache")
    with pytest.raises(ValueError, match="rehearsal_form: definition and bank: policy exclude each other"):
        trainer(load(tiny_model_dir), tmp_path, bank="policy", rehearsal_form="definition", max_exponent=None)
    made = trainer(load(tiny_model_dir), tmp_path, rewards=correct, bank="policy")
    tools = {"correct": torch.ones(1, dtype=torch.bool), "tool_mask": torch.ones(1, 2)}
    with pytest.raises(DataError, match="hold tokens of tools .* take bank: cache or bank: none"):
        made._note_found(tools, torch.zeros(1, 2))
    made = trainer(load(tiny_model_dir), tmp_path, rewards=correct, mode=f"{__name__}:unhashable", max_steps=1)
    with pytest.raises(DataError, match="unhashable returned a list for a completion"):
        made.train()


def test_graded_rewards_need_a_threshold(tiny_model_dir, tmp_path, capsys):
    """Groups that happen to hold no graded reward are no fair sample of the groups: nothing is counted from then on."""
    made = trainer(load(tiny_model_dir), tmp_path / "a", max_steps=3, save_strategy="steps", save_steps=1)
    made.reward_funcs = [lambda completion_ids, **_: [0.0, 0.5] * 8 if made.state.global_step == 1 else [0.0, 1.0] * 8]
    made.reward_func_names = ["by step"]
    made.train()
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry.get("group/pass@1") for entry in logs] == [pytest.approx(0.5), None, None]
    assert (
        capsys.readouterr().err.count("neither 0 nor 1: group/pass@K and group/modes are not logged from now on") == 1
    )
    again = trainer(load(tiny_model_dir), tmp_path / "a", rewards=correct, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert "group/pass@1" not in next(entry for entry in again.state.log_history[::-1] if "loss" in entry)
    # With a threshold all is counted; a bank of correct answers is refused without one.
    counted = trainer(
        load(tiny_model_dir), tmp_path / "b", rewards=partly, reward_threshold=0.5, max_steps=1, bank="policy"
    )
    counted.train()
    counted._fill_bank()
    assert {r.completion_ids[0] % 3 for r in counted.rehearsal} <= {1, 2} and len(counted.rehearsal)
    assert any("group/pass@4" in entry for entry in counted.state.log_history)
    with pytest.raises(DataError, match="bank: policy takes correct completions, .* set reward_threshold"):
        trainer(load(tiny_model_dir), tmp_path / "c", rewards=partly, max_steps=1, bank="policy").train()


# ---------------------------------------------------------------- evaluation while training
@dataclass
class Scripted:
    """An evaluation that reads its values from a list, and one random number."""

    values: list[float]
    calls = 0

    def evaluate(self, model: Any, tokenizer: Any, datasets: Any, context: Any) -> dict[str, Any]:
        assert not model.training and {"train"} <= set(datasets)
        torch.rand(1)  # would change the training it looks at
        Scripted.calls += 1
        return {"pass@1": self.values[Scripted.calls - 1], "pass@8": None}


@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping_and_the_best_model(tiny_model_dir, tmp_path, patience):
    Scripted.calls = 0
    more = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6,
        "per_device_eval_batch_size": 4, "metric_for_best_model": "pass@1", "load_best_model_at_end": True,
        "early_stopping_patience": patience, "rewards": correct,
        "epoch_evaluation": {"name": f"{__name__}:Scripted", "values": [0.1, 0.5, 0.4, 0.3, 0.9, 0.8]},
    }  # fmt: skip
    made = trainer(load(tiny_model_dir), tmp_path / "a", **more)
    made.train()
    assert made.state.global_step == 2 + patience and made.state.best_metric == 0.5
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    shown = [entry["eval_pass@1"] for entry in made.state.log_history if "eval_pass@1" in entry]
    assert shown == [0.1, 0.5, 0.4, 0.3][: 2 + patience]


def test_an_evaluation_does_not_change_the_training(tiny_model_dir, tmp_path):
    def losses(name, **more):
        Scripted.calls = 0
        made = trainer(load(tiny_model_dir), tmp_path / name, rewards=correct, max_steps=3, **more)
        made.train()
        return [entry["loss"] for entry in made.state.log_history if "loss" in entry], torch.cat(
            [p.flatten() for p in made.model.parameters()]
        )

    spec = {"name": f"{__name__}:Scripted", "values": [0.0] * 9}
    watched = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "epoch_evaluation": spec}
    plain, seen = losses("a"), losses("b", **watched)
    assert plain[0] == seen[0] and torch.equal(plain[1], seen[1])


def test_models_are_chosen_by_what_training_logs(tiny_model_dir, tmp_path):
    """group/pass@2 of the last log before each evaluation; a number that is neither given nor logged is named."""
    Scripted.calls = 0
    rewards = iter([[1.0, 0.0, 0.0, 0.0] * 4, [1.0, 1.0, 0.0, 0.0] * 4, [1.0, 0.0, 0.0, 0.0] * 4, [0.0] * 16])

    def scripted(completion_ids, **_):
        return next(rewards)

    more = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6,
        "per_device_eval_batch_size": 4, "epoch_evaluation": {"name": f"{__name__}:Scripted", "values": [0.5] * 6},
    }  # fmt: skip
    chosen = {"metric_for_best_model": "group/pass@2", "load_best_model_at_end": True, "early_stopping_patience": 2}
    made = trainer(load(tiny_model_dir), tmp_path / "a", rewards=scripted, **more, **chosen)
    made.train()
    shown = [entry["eval_group/pass@2"] for entry in made.state.log_history if "eval_group/pass@2" in entry]
    assert shown == pytest.approx([1 / 2, 5 / 6, 1 / 2, 0.0])
    assert made.state.global_step == 4 and made.state.best_model_checkpoint.endswith("checkpoint-2")
    for name in ("group/pass@3", "loss"):
        Scripted.calls = 0
        made = trainer(
            load(tiny_model_dir), tmp_path / "b", rewards=correct, **more | {"save_strategy": "no"}, stop_at=0.9,
            metric_for_best_model=name,
        )  # fmt: skip
        with pytest.raises(OptionError, match=f"metric_for_best_model={name}: .* no such number, .* gives: pass@1;"):
            made.train()


def test_an_evaluation_of_its_own_needs_no_groups(tmp_path):
    """TRL wants the evaluation's batch (8 by default) to hold whole groups, which only its own evaluation samples."""
    settings = settings_of(num_generations=16, eval_strategy="steps", eval_steps=1)
    spec = {"name": "passk", "dataset": "rows.jsonl", "scorer": "math", "n": 8, "k": [1, 8]}
    assert DPHConfig(str(tmp_path), epoch_evaluation=spec, **settings).num_generations_eval == 1
    with pytest.raises(ValueError, match="must be divisible by the number of generations used for evaluation"):
        DPHConfig(str(tmp_path), **settings)


def test_early_stopping_needs_a_metric(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="early_stopping_patience=2 needs metric_for_best_model"):
        trainer(load(tiny_model_dir), tmp_path, early_stopping_patience=2)
