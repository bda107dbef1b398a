"""The small preference world: what it writes, that its table is the model's, and exact metrics against hand calculation."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fdiv.divergences import get_divergence
from fdiv.recipes.tasks.tiny.closed_form import optimal_policy
from fdiv.recipes.tasks.tiny.optimum import TinyWorldEvalConfig, policy_metrics
from fdiv.recipes.tasks.tiny.preferences import (
    PROMPTS,
    RESPONSES,
    TinyPreferencesConfig,
    TinyWorld,
    response_log_probs,
)

CONFIG = TinyPreferencesConfig(sft_steps=200, train_pairs_per_prompt=20, test_pairs_per_prompt=10)
QUICK = {"sft_steps": 10, "train_pairs_per_prompt": 2, "test_pairs_per_prompt": 1}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, CONFIG.build(folder)


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _load(keys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = keys["model_name_or_path"]
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def test_splits_share_no_prompt_and_hold_out_every_tone_and_topic_equally(built):
    folder, keys = built
    data = Path(keys["dataset_name"])
    train, test = _rows(data / "train.jsonl"), _rows(data / "test.jsonl")
    world = TinyWorld.load(folder / "world.json")
    train_prompts, test_prompts = {row["prompt"] for row in train}, {row["prompt"] for row in test}
    assert (len(train), len(test)) == (24 * 20, 12 * 10)
    assert train_prompts.isdisjoint(test_prompts)
    assert test_prompts == {PROMPTS[row] for row in world.held_out.nonzero().flatten().tolist()}
    square = world.held_out.reshape(6, 6)
    assert square.sum(dim=0).tolist() == [2] * 6
    assert square.sum(dim=1).tolist() == [2] * 6
    assert all(row["chosen"] != row["rejected"] for row in train + test)


def test_reward_is_additive_in_tone_word_and_topic_noun(built):
    reward = TinyWorld.load(built[0] / "world.json").reward.reshape(6, 6, 8, 8)
    # u[tone, adjective] + v[topic, noun]: every mixed difference over (tone, noun) and over (topic, adjective) is 0
    for first, second in ((0, 3), (1, 2)):
        mixed = reward.diff(dim=first).diff(dim=second)
        assert mixed.abs().max().item() < 1e-12
    assert reward.std().item() == pytest.approx(math.sqrt(2), rel=0.25)


def test_labels_follow_bradley_terry():
    # A flat reference; reward 1.5 for half of the responses, 0 for the others, −3 for malformed ones: gaps 1.5, 3, 4.5.
    config = TinyPreferencesConfig(reward_scale=1.0)
    generator = torch.Generator().manual_seed(0)
    reward = torch.zeros(36, 64, dtype=torch.float64)
    reward[:, :32] = 1.5
    world = TinyWorld(torch.zeros(36, dtype=torch.bool), reward, -3.0, torch.zeros(36, 64, dtype=torch.float64))
    pairs = config._pairs(world, torch.zeros(4000, dtype=torch.long), generator)
    column = {response: index for index, response in enumerate(RESPONSES)}
    values = [
        [-3.0 if pair[side] not in column else reward[0, column[pair[side]]].item() for side in ("chosen", "rejected")]
        for pair in pairs
    ]
    for gap in (1.5, 3.0, 4.5):
        wins = sum(chosen - rejected == gap for chosen, rejected in values)
        losses = sum(rejected - chosen == gap for chosen, rejected in values)
        expected = 1 / (1 + math.exp(-gap))
        error = math.sqrt(expected * (1 - expected) / (wins + losses))
        assert wins + losses > 200
        assert abs(wins / (wins + losses) - expected) < 4 * error
    malformed = sum(pair[side] not in column for pair in pairs for side in ("chosen", "rejected")) / 8000
    assert malformed == pytest.approx(0.1, abs=0.015)


def test_the_table_holds_the_models_own_log_probabilities(built):
    folder, keys = built
    model, tokenizer = _load(keys)
    world = TinyWorld.load(folder / "world.json")
    torch.testing.assert_close(response_log_probs(model, tokenizer), world.reference_log_probs, atol=1e-5, rtol=0)
    # one entry by the plain definition: log-softmax of the logits, token by token, end-of-sequence included
    prompt, response = PROMPTS[7], RESPONSES[13]
    ids = [*tokenizer(prompt + response)["input_ids"], tokenizer.eos_token_id]
    start = len(tokenizer(prompt)["input_ids"])
    assert len(ids) == start + 3
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    by_hand = sum(log_probs[position - 1, ids[position]].item() for position in range(start, len(ids)))
    assert world.reference_log_probs[7, 13].item() == pytest.approx(by_hand, abs=1e-5)
    assert (world.reference_log_probs.exp().sum(dim=-1) < 1).all()


def test_the_reference_learns_the_base_distribution(built):
    world = TinyWorld.load(built[0] / "world.json")
    malformed = 1 - world.reference_log_probs.exp().sum(dim=-1)
    assert malformed.mean().item() == pytest.approx(CONFIG.malformed_share, abs=0.03)
    entropy = -(torch.softmax(world.reference_log_probs, -1) * torch.log_softmax(world.reference_log_probs, -1)).sum(
        -1
    )
    assert 2.0 < entropy.min().item() and entropy.max().item() < math.log(64)  # broad, but not uniform


@pytest.fixture(scope="module")
def quickly_built(tmp_path_factory):
    """A world of a model that has hardly learnt, and the next random numbers of a caller who had them seeded with 5."""
    folder = tmp_path_factory.mktemp("quick")
    torch.manual_seed(5)
    TinyPreferencesConfig(**QUICK).build(folder)
    return folder, torch.rand(3)


def test_the_same_seed_builds_the_same_world_and_another_seed_another(quickly_built, tmp_path):
    folder, _ = quickly_built
    TinyPreferencesConfig(**QUICK).build(tmp_path / "again")
    TinyPreferencesConfig(**QUICK, seed=1).build(tmp_path / "other")
    for name in ("world.json", "data/train.jsonl", "data/test.jsonl", "model/model.safetensors"):
        content = (folder / name).read_bytes()
        assert content == (tmp_path / "again" / name).read_bytes(), name
        assert content != (tmp_path / "other" / name).read_bytes(), name


def test_building_leaves_the_callers_random_state_alone(quickly_built):
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), quickly_built[1])


def _hand_world() -> tuple[TinyWorld, torch.Tensor]:
    """One prompt, two well-formed responses: π_ref = (0.5, 0.4), 0.1 malformed; π = (0.72, 0.18), 0.1 malformed."""
    reference = torch.tensor([[0.5, 0.4]], dtype=torch.float64).log()
    policy = torch.tensor([[0.72, 0.18]], dtype=torch.float64).log()
    reward = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    return TinyWorld(torch.tensor([True]), reward, -1.0, reference), policy


def test_policy_metrics_by_hand():
    world, policy = _hand_world()
    metrics = {
        name: value.item() for name, value in policy_metrics(policy, world, get_divergence("reverse_kl"), 1.0).items()
    }
    log = math.log
    kl = 0.72 * log(0.72 / 0.5) + 0.18 * log(0.18 / 0.4)
    reverse = 0.5 * log(0.5 / 0.72) + 0.4 * log(0.4 / 0.18)
    weights = [0.5 * math.e**2, 0.4, 0.1 / math.e]
    optimum = [weight / sum(weights) for weight in weights]
    expected = {
        "preference_accuracy": 1.0,  # the one well-formed pair, ordered rightly
        # π draws: best 0.72 beats 0.5 of π_ref and ties 0.5; middle 0.18 beats 0.1, ties 0.4; malformed ties 0.1
        "win_rate": 0.72 * (0.5 + 0.25) + 0.18 * (0.1 + 0.2) + 0.1 * 0.05,
        "expected_reward": 0.72 * 2.0 - 0.1,
        "divergence": kl,
        "reverse_kl": kl,
        "forward_kl": reverse,
        "entropy": -(0.72 * log(0.72) + 0.18 * log(0.18) + 0.1 * log(0.1)),
        "malformed_mass": 0.1,
        "optimum_tv": 0.5 * sum(abs(p - q) for p, q in zip((0.72, 0.18, 0.1), optimum, strict=True)),
        "optimum_divergence": sum(p * log(p / q) for p, q in zip((0.72, 0.18, 0.1), optimum, strict=True)),
        # the optimal value of E[r] − KL is log Σ π_ref e^r
        "objective_gap": log(sum(weights)) - (0.72 * 2.0 - 0.1 - kl),
    }
    assert metrics == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("spec", ["reverse_kl", "forward_kl", "jensen_shannon", {"name": "alpha", "alpha": 0.5}])
def test_the_optimum_scores_as_the_optimum_and_the_reference_as_the_start(spec):
    world, _ = _hand_world()
    divergence = get_divergence(spec)
    reference = torch.tensor([[0.5, 0.4, 0.1]], dtype=torch.float64).log()
    optimum = optimal_policy(reference, torch.tensor([[2.0, 0.0, -1.0]]), divergence, 0.7)
    at_optimum = policy_metrics(optimum[:, :2], world, divergence, 0.7)
    for name in ("optimum_tv", "optimum_divergence", "objective_gap"):
        assert at_optimum[name].item() == pytest.approx(0.0, abs=1e-6)
    at_reference = policy_metrics(world.reference_log_probs, world, divergence, 0.7)
    assert at_reference["preference_accuracy"].item() == 0.5
    assert at_reference["win_rate"].item() == pytest.approx(0.5)
    assert at_reference["divergence"].item() == pytest.approx(0.0, abs=1e-12)
    assert at_reference["objective_gap"].item() > 0.1


def test_evaluation_averages_over_each_split_with_the_runs_divergence(built):
    folder, keys = built
    model, tokenizer = _load(keys)
    with torch.no_grad():  # a policy that is not the reference
        model.lm_head.weight.mul_(1.2)
    arguments = SimpleNamespace(beta=0.4, resolve_divergence=lambda: get_divergence("jensen_shannon").normalized())
    found = TinyWorldEvalConfig(str(folder)).evaluate(model, tokenizer, {}, SimpleNamespace(training_args=arguments))
    world = TinyWorld.load(folder / "world.json")
    table = policy_metrics(response_log_probs(model, tokenizer), world, arguments.resolve_divergence(), 0.4)
    assert len(found) == 2 * len(table)
    for name, values in table.items():
        assert found[f"held_out_{name}"] == pytest.approx(values[world.held_out].mean().item())
        assert found[f"train_{name}"] == pytest.approx(values[~world.held_out].mean().item())
    assert found["held_out_divergence"] > 1e-3
    assert set(TinyWorldEvalConfig.summary_metrics) <= set(found)


def test_refusals_name_the_key_and_the_remedy(tmp_path):
    for key, value in (
        ("held_out_per_tone", 6),
        ("train_pairs_per_prompt", 0),
        ("sft_steps", 0),
        ("base_scale", -1.0),
        ("malformed_share", 0.0),
    ):
        with pytest.raises(ValueError, match=key):
            TinyPreferencesConfig(**{key: value})
    with pytest.raises(FileNotFoundError, match="tiny_preferences"):
        TinyWorld.load(tmp_path / "world.json")
    (tmp_path / "world.json").write_text(json.dumps({"prompts": ["x"], "responses": ["y"]}))
    with pytest.raises(ValueError, match="build it again"):
        TinyWorld.load(tmp_path / "world.json")


@pytest.mark.slow
@pytest.mark.parametrize(("divergence", "largest_tv"), [("reverse_kl", 0.3), ("jensen_shannon", 0.6)])
def test_the_recipe_reaches_towards_the_optimum_on_held_out_prompts(tmp_path, divergence, largest_tv):
    from fdiv.recipe.load import load_recipe
    from fdiv.run.run import run_recipe

    recipe = load_recipe("tiny/f_dpo", ["--divergence", divergence, "--output_dir", str(tmp_path / "run")])
    result = run_recipe(recipe, prepared=tmp_path / "prepared")
    assert result["unmet_requirements"] == []
    assert result["before/held_out_preference_accuracy"] == 0.5
    assert result["after/held_out_preference_accuracy"] > 0.85
    assert result["after/held_out_expected_reward"] > result["before/held_out_expected_reward"] + 0.8
    assert result["after/held_out_optimum_tv"] < min(largest_tv, result["before/held_out_optimum_tv"] - 0.1)
