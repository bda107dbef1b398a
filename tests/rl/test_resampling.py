"""Dynamic sampling: which groups are sampled again, what takes their place, and what it does to the gradient."""

from __future__ import annotations

import itertools
import math
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from fdiv.rl import DPHConfig
from fdiv.rl.advantages import resolve_advantage
from fdiv.rl.dph.resampling import has_signal, merge_rows, resample_groups
from tests.support.runs.dph import correct, load, settings_of, trainer

NAN = math.nan


def test_signal_is_two_different_rewards():
    rewards = torch.tensor([0.0, 0, 0, 1, 1, 1, 0, NAN, 1, NAN, NAN, NAN, 1, NAN, NAN, 0.5, 0.5, 0.5])
    assert has_signal(rewards, 3).tolist() == [False, False, True, False, False, False]
    assert has_signal(torch.tensor([0.0, 0.0]), 2).tolist() == [False]
    assert has_signal(torch.tensor([0.0, 1.0]), 2).tolist() == [True]
    assert has_signal(torch.tensor([1.0, NAN]), 2).tolist() == [False]
    assert has_signal(torch.tensor([NAN, NAN]), 2).tolist() == [False]
    assert has_signal(torch.tensor([0.2, NAN, 0.3]), 3).tolist() == [True]


def test_rows_are_merged_with_their_padding():
    batch = {
        "prompt_ids": torch.tensor([[9, 1, 2], [3, 4, 5]]), "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[6, 7], [8, 9]]), "completion_mask": torch.tensor([[1, 1], [1, 0]]),
        "advantages": torch.tensor([0.5, -0.5]), "num_items_in_batch": torch.tensor(3),
        "old_per_token_logps": torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
    }  # fmt: skip
    other = {
        "prompt_ids": torch.tensor([[1, 2]]), "prompt_mask": torch.tensor([[1, 1]]),
        "completion_ids": torch.tensor([[4, 4, 4]]), "completion_mask": torch.tensor([[1, 1, 1]]),
        "advantages": torch.tensor([2.0]), "num_items_in_batch": torch.tensor(3),
        "old_per_token_logps": torch.tensor([[-4.0, -5.0, -6.0]]),
    }  # fmt: skip
    merged = merge_rows(batch, other, torch.tensor([0]), pad_token_id=9)
    assert merged["prompt_ids"].tolist() == [[9, 1, 2], [3, 4, 5]]
    assert merged["prompt_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert merged["completion_ids"].tolist() == [[4, 4, 4], [8, 9, 9]]
    assert merged["completion_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert merged["advantages"].tolist() == [2.0, -0.5]
    assert merged["old_per_token_logps"].tolist() == [[-4.0, -5.0, -6.0], [-3.0, 0.0, 0.0]]
    assert batch["completion_ids"].tolist() == [[6, 7], [8, 9]]  # the first batch is left alone


EVEN, ODD = [2, 4], [3, 5]


class Script:
    """A rollout back end that reads completions from a list of calls; it notes the prompts of each call."""

    def __init__(self, *calls):
        self.calls, self.seen = list(calls), []

    def __call__(self, prompts, trainer):
        completions = self.calls.pop(0)
        assert len(completions) == len(prompts)
        self.seen.append(list(prompts))
        ids = trainer._tokenize_prompts(prompts)[0]
        return {
            "prompt_ids": ids, "completion_ids": completions,
            "logprobs": [[-1.0] * len(completion) for completion in completions],
        }  # fmt: skip


def test_groups_without_signal_are_sampled_again(tiny_model_dir, tmp_path):
    """Four groups of four: none right, mixed, all right, mixed. The first gets signal at the second try, the third
    never does."""
    mixed = [EVEN, ODD, ODD, ODD]
    longer = [[2, 4, 6], ODD, ODD, [7, 7, 7]]
    script = Script([ODD] * 4 + mixed + [EVEN] * 4 + mixed, longer + [EVEN] * 4, [EVEN] * 4)
    made = trainer(load(tiny_model_dir), tmp_path, rewards=correct, rollout_func=script, resample_groups=2)
    made.model.train()
    prompts = [row["prompt"] for row in made.train_dataset.select(range(4))]
    inputs = [{"prompt": prompt} for prompt in prompts for _ in range(4)]
    batch = made._generate_and_score_completions(inputs)
    assert script.seen[1] == [prompts[0]] * 4 + [prompts[2]] * 4 and script.seen[2] == [prompts[2]] * 4
    mask = batch["completion_mask"].bool()
    found = [ids[kept].tolist() for ids, kept in zip(batch["completion_ids"], mask, strict=True)]
    assert found == [*longer, *mixed, *[EVEN] * 4, *mixed]
    groups = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    assert torch.allclose(batch["advantages"].view(4, 4), resolve_advantage("grpo")(groups).float(), atol=1e-4)
    assert batch["num_items_in_batch"] == mask.sum()
    logged = {name: values[-1] for name, values in made._metrics["train"].items()}
    assert logged["groups/without_signal"] == 0.5 and logged["groups/left_without_signal"] == 0.25
    assert logged["groups/sampled_again"] == 3.0
    # What is logged of rewards is the first try: 1, 2 and 4 of 16 right.
    assert logged["reward"] == pytest.approx(6 / 16) and logged["group/pass@1"] == pytest.approx(6 / 16)
    assert len(made._metrics["train"]["reward"]) == 1


def test_nothing_is_sampled_again_where_all_have_signal(tiny_model_dir, tmp_path):
    script = Script([EVEN, ODD, ODD, ODD] * 4)
    made = trainer(load(tiny_model_dir), tmp_path, rewards=correct, rollout_func=script, resample_groups=3)
    made.model.train()
    inputs = [{"prompt": row["prompt"]} for row in made.train_dataset.select(range(4)) for _ in range(4)]
    made._generate_and_score_completions(inputs)
    assert len(script.seen) == 1 and made._metrics["train"]["groups/sampled_again"] == [0.0]


def test_it_trains(tiny_model_dir, tmp_path):
    made = trainer(load(tiny_model_dir), tmp_path, rewards=correct, resample_groups=2, max_steps=2, bank="policy")
    made.train()
    logs = [entry for entry in made.state.log_history if "groups/sampled_again" in entry]
    assert len(logs) == 2
    assert all(entry["groups/left_without_signal"] <= entry["groups/without_signal"] for entry in logs)


class Enumerated:
    """As much of a trainer as `resample_groups` needs, for one group whose tries are given."""

    num_generations = 3

    def __init__(self, tries, outcomes):
        self.args, self.outcomes = SimpleNamespace(resample_groups=tries), iter(outcomes)
        self.accelerator = SimpleNamespace(gather=lambda values: values)
        self._tokenizer = SimpleNamespace(pad_token_id=0)
        self._metrics, self._logs, self.drawn = {"train": defaultdict(list)}, {}, 0

    def my_part(self, gathered, count):
        return gathered[:count]

    def generate(self, inputs):
        """The next try: a completion is its reward."""
        self.drawn += 1
        self._rewards = torch.tensor(next(self.outcomes))
        ids = self._rewards.long()[:, None]
        advantages = resolve_advantage("dr_grpo")(self._rewards[None])[0]
        return {"completion_ids": ids, "completion_mask": torch.ones_like(ids), "advantages": advantages}


@pytest.mark.parametrize("tries", [0, 1, 2])
def test_the_expected_gradient_is_that_of_one_try_times_a_factor(tries):
    """By enumeration of all sequences of tries; three answers to a prompt, each right with chance 0.8."""
    p, groups = 0.8, list(itertools.product([0.0, 1.0], repeat=3))
    chance = {group: math.prod(p if right else 1 - p for right in group) for group in groups}

    def expected(more):
        total = 0.0
        for sequence in itertools.product(groups, repeat=more + 1):
            trainer = Enumerated(more, sequence)
            batch = resample_groups(trainer, [{}] * 3, trainer.generate([{}] * 3), trainer.generate)
            right = batch["completion_ids"][:, 0] == 1
            score = torch.where(right, 1 / p, -1 / (1 - p))  # d log P / dp
            total += math.prod(chance[group] for group in sequence) * (batch["advantages"] * score).mean().item()
            assert trainer._metrics["train"]["groups/sampled_again"] == [trainer.drawn - 1]
        return total

    dull = p**3 + (1 - p) ** 3
    assert expected(tries) == pytest.approx(expected(0) * (1 - dull ** (tries + 1)) / (1 - dull))


class OfTwo(Enumerated):
    """One of two processes, which are threads here: `gather` waits for the other, and sees that it gathers the like."""

    def __init__(self, rank, meeting, parts, outcomes):
        super().__init__(1, outcomes)
        self.rank, self.meeting, self.parts = rank, meeting, parts
        self.accelerator = SimpleNamespace(gather=self.gather)

    def gather(self, values):
        self.parts[self.rank] = values
        self.meeting.wait(timeout=20)
        both = [part.reshape(-1) for part in self.parts]
        assert len(both[0]) == len(both[1]) and both[0].dtype == both[1].dtype
        self.meeting.wait(timeout=20)
        return torch.cat(both)

    def generate(self, inputs):
        batch = super().generate(inputs)
        batch["completion_mask"] = 1 + batch["completion_ids"]  # right answers have two tokens
        return batch | {"num_items_in_batch": self.gather(batch["completion_mask"].sum()).sum()}


@pytest.mark.parametrize("first", [0, 1])
def test_one_process_samples_again_and_the_other_has_nothing_to(first):
    """Both gather as often, so that none waits for the other for ever, and count the tokens of both."""
    meeting, parts = threading.Barrier(2), [None, None]
    mixed, dull, better = [1.0, 0.0, 0.0], [0.0] * 3, [1.0, 1.0, 0.0]
    outcomes = [(dull, better), (mixed, mixed)]
    made = [OfTwo(rank, meeting, parts, outcomes[rank ^ first]) for rank in (0, 1)]

    def run(trainer):
        return resample_groups(trainer, [{}] * 3, trainer.generate([{}] * 3), trainer.generate)

    with ThreadPoolExecutor(2) as pool:
        batches = list(pool.map(run, made))
    assert [batch["num_items_in_batch"].item() for batch in batches] == [5 + 4] * 2
    for one in made:
        logged = one._metrics["train"]
        assert logged["groups/sampled_again"] == [1.0] and logged["groups/without_signal"] == [0.5]


def test_what_is_refused(tiny_model_dir, tmp_path):
    made = trainer(load(tiny_model_dir), tmp_path, resample_groups=1)
    made.args.per_device_train_batch_size = 2  # one of eight processes: half a group on each
    with pytest.raises(
        ValueError, match="resample_groups=1 needs whole groups on every process: .* = 2 is no multiple"
    ):
        made.args._check_resampling()
    with pytest.raises(ValueError, match="resample_groups=1 and scale_rewards=batch exclude each other"):
        trainer(load(tiny_model_dir), tmp_path, resample_groups=1, scale_rewards="batch")


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"advantage": {"name": "pkpo", "k": 2}}, "advantage 'pkpo'"),
        ({"advantage": {"name": "pkpo_loo", "k": 1}}, "advantage 'pkpo_loo'"),
        ({"advantage": {"name": "nsr", "weight": 0.1}}, "advantage 'nsr'"),
        ({"kl": "k1_reward"}, "kl: k1_reward"),
    ],
)
def test_advantages_that_learn_from_alike_rewards_are_refused(tiny_model_dir, tmp_path, more, what):
    with pytest.raises(ValueError, match=f"resample_groups=1 and {what} exclude each other: .* pkpo_loo"):
        trainer(load(tiny_model_dir), tmp_path, resample_groups=1, **more)


@pytest.mark.parametrize(
    "spec", [None, "rloo", "maxrl", {"name": "pkpo_loo", "k": 2}, {"name": "passk_analytic", "k": 2}]
)
def test_those_that_do_not_are_accepted(tmp_path, spec):
    args = DPHConfig(str(tmp_path), **settings_of(resample_groups=1, advantage=spec))
    assert args.resample_groups == 1


def test_pkpo_would_be_biased():
    """Why: by enumeration the gradient under pkpo is another than the factor says, under pkpo_loo the same."""
    p, groups = 0.8, list(itertools.product([0.0, 1.0], repeat=3))
    chance = {group: math.prod(p if right else 1 - p for right in group) for group in groups}

    def gradient(name, among):
        rewards = torch.tensor(among)
        advantages = resolve_advantage({"name": name, "k": 2})(rewards)
        score = torch.where(rewards == 1, 1 / p, -1 / (1 - p))
        weights = torch.tensor([chance[group] for group in among])
        return (weights * (advantages * score).mean(-1)).sum().item()

    mixed = [group for group in groups if 0 < sum(group) < 3]
    true = 2 * (1 - p)  # d pass@2 / dp
    for name, unbiased in (("pkpo", False), ("pkpo_loo", True)):
        assert gradient(name, groups) == pytest.approx(true)
        assert (gradient(name, mixed) == pytest.approx(true, abs=1e-6)) == unbiased
