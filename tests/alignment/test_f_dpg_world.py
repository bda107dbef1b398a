"""The tiny text corpora and the evaluation against a target, on one recipe run small."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fdiv.alignment.f_dpg.evaluation import TargetEvalConfig, _average, _prompt_metrics
from fdiv.alignment.f_dpg.targets import build_target
from fdiv.alignment.scorers import compiles, contains_words
from fdiv.divergences import get_divergence
from fdiv.recipes.tasks.tiny.texts import _CORPORA, EmptyPromptsConfig, TinyTextsConfig
from tests.support.sequence_model import SequenceModel


@pytest.mark.parametrize(
    ("corpus", "scorer", "low", "high"),
    [
        ("reviews", contains_words(["amazing"]), 0.02, 0.06),
        ("biographies", contains_words(["she"]), 0.07, 0.13),
        ("code", compiles(), 0.4, 0.7),
    ],
)
def test_corpora_hold_what_the_targets_ask_for_but_rarely(corpus, scorer, low, high):
    import random

    draw = random.Random(0)
    pairs = [_CORPORA[corpus][0](draw) for _ in range(2000)]
    scores = scorer(prompts=[prompt for prompt, _ in pairs], completions=[f" {text}" for _, text in pairs])
    assert low < sum(scores) / 2000 < high
    assert {prompt for prompt, _ in pairs} == set(_CORPORA[corpus][1])


def test_builders(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    keys = TinyTextsConfig(corpus="code", steps=3).build(tmp_path / "code")
    tokenizer = AutoTokenizer.from_pretrained(keys["model_name_or_path"])
    model = AutoModelForCausalLM.from_pretrained(keys["model_name_or_path"])
    again = AutoModelForCausalLM.from_pretrained(
        TinyTextsConfig(corpus="code", steps=3).build(tmp_path / "again")["model_name_or_path"]
    )
    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)
    text = "def f ( a , b ) : return ( a + 1 )"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    rows = [json.loads(line) for line in (tmp_path / "code" / "data" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 64 and len({row["prompt"] for row in rows}) == 4
    keys = EmptyPromptsConfig(rows=3).build(tmp_path / "empty")
    assert (tmp_path / "empty" / "data" / "train.jsonl").read_text() == '{"prompt": ""}\n' * 3
    assert keys["dataset_train_split"] == "train"
    for wrong in ({"corpus": "poems"}, {"steps": 0}):
        with pytest.raises(ValueError, match=f"prepare.{next(iter(wrong))}"):
            TinyTextsConfig(**wrong)
    with pytest.raises(ValueError, match="prepare.rows"):
        EmptyPromptsConfig(rows=0)


def test_mixture_estimates_against_enumeration():
    """Policy and base samples together estimate every distance to a hard target that the policy half misses."""
    base, policy = (SequenceModel().randomize(seed).log_probs().detach() for seed in (1, 2))
    allowed = torch.tensor([float(2 in sequence) for sequence in SequenceModel().sequences], dtype=torch.float64)

    def unused(completions, **_):
        return [0.0] * len(completions)

    target = build_target({"name": "pointwise", "scorers": [unused]})
    generator = torch.Generator().manual_seed(0)
    count = 100_000
    drawn = torch.cat(
        [torch.multinomial(log.exp(), count, replacement=True, generator=generator) for log in (policy, base)]
    )
    found = _prompt_metrics(target, allowed[drawn][:, None], policy[drawn], base[drawn], count)
    log_p = base + allowed.log()
    log_z = log_p.logsumexp(0)
    assert found["z"][0] == pytest.approx(log_z.exp().item(), rel=0.01)
    for name in ("forward_kl", "total_variation", "jensen_shannon"):
        value, error = found[name]
        exact = get_divergence(name).exact(policy, log_p - log_z).item()
        assert value == pytest.approx(exact, abs=4 * error + 0.01 * exact) and error < 0.02 * exact + 0.01
    assert found["reverse_kl"][0] == math.inf
    assert found["score"][0] == pytest.approx((policy.exp() * allowed).sum().item(), abs=0.01)
    assert found["kl_to_base"][0] == pytest.approx((policy.exp() * (policy - base)).sum().item(), abs=0.02)
    assert found["sequence_entropy"][0] == pytest.approx(-(policy.exp() * policy).sum().item(), abs=0.02)


def test_average_over_prompts():
    averaged = _average([{"a": (1.0, 0.3), "z": (0.5, math.nan)}, {"a": (3.0, 0.4)}])
    assert averaged == {"a": 2.0, "a_se": pytest.approx(0.25), "z": 0.5}
    with pytest.raises(ValueError, match=r"eval.num_samples must be at least 1"):
        TargetEvalConfig(num_samples=0)


@pytest.mark.slow
def test_tiny_recipe_reaches_its_target(tmp_path):
    """The packaged recipe at half its steps: "amazing" in most reviews instead of one in twenty."""
    from fdiv.recipe.load import load_recipe
    from fdiv.run.run import run_recipe

    recipe = load_recipe("tiny/f_dpg", ["--output_dir", str(tmp_path), "--max_steps", "40"])
    result = run_recipe(recipe)
    assert not result["unmet_requirements"]
    assert result["before/score"] < 0.1 and result["after/score"] > 0.7
    assert result["after/jensen_shannon"] < 0.5 * result["before/jensen_shannon"]
