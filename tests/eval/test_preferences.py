"""The preference evaluation against exact enumeration, and its independence of batch size and padding."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.divergences import get_divergence
from fdiv.errors import DataError
from fdiv.eval.preferences.command import command
from fdiv.eval.preferences.evaluation import PreferencesEvalConfig
from fdiv.evaluation import EvalContext
from fdiv.inference.sampling import SamplingRequest, sample_completions
from fdiv.models.logprobs import mean_log_prob, sequence_log_prob, token_scores


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def _model(directory, noise: float = 0.0, seed: int = 3):
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return _model(tiny_model_dir, 0.05)


@pytest.fixture(scope="module")
def reference(tiny_model_dir):
    return _model(tiny_model_dir)


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": f"Count {i}:", "chosen": f" {i + 1}, then {i + 2}", "rejected": " no" * (1 + 4 * (i % 4))}
            for i in range(9)
        ]
    )


def _context(tmp_path, reference=None, divergence="jensen_shannon", stage="after", **options) -> EvalContext:
    settings = {"beta": 0.2, "max_exponent": None, "max_length": None} | options
    args = SimpleNamespace(divergence=divergence, resolve_divergence=lambda: get_divergence(divergence), **settings)
    return EvalContext(args, tmp_path, reference_model=reference, seed=7, stage=stage)


def test_pair_metrics_by_independent_calculation(tmp_path, tokenizer, policy, reference, pairs):
    config = PreferencesEvalConfig(num_samples=0, batch_size=4)
    found = config.evaluate(policy, tokenizer, {"test": pairs}, _context(tmp_path, reference))

    def score(model, row, half):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(row["prompt"] + row[half] + tokenizer.eos_token)["input_ids"]])
        mask = torch.ones_like(ids)
        completion = mask.clone()
        completion[:, : len(prompt)] = 0
        with torch.no_grad():
            return token_scores(model, ids, mask, completion, fused=False)

    own = {half: [score(policy, row, half) for row in pairs] for half in ("chosen", "rejected")}
    start = {half: [score(reference, row, half) for row in pairs] for half in own}
    sums = {half: torch.cat([sequence_log_prob(s) for s in own[half]]).double() for half in own}
    means = {half: torch.cat([mean_log_prob(s) for s in own[half]]).double() for half in own}
    ratio = {half: sums[half] - torch.cat([sequence_log_prob(s) for s in start[half]]) for half in own}
    score_of = get_divergence("jensen_shannon").score
    margin = 0.2 * (score_of(ratio["chosen"]) - score_of(ratio["rejected"]))
    expected = {
        "preference_accuracy": (means["chosen"] > means["rejected"]).double().mean(),
        "preference_accuracy_sum": (sums["chosen"] > sums["rejected"]).double().mean(),
        "reward_accuracy": (margin > 0).double().mean(),
        "reward_margin": margin.mean(),
        "reward_margin_raw": 0.2 * (ratio["chosen"] - ratio["rejected"]).mean(),
        "chosen_log_ratio": ratio["chosen"].mean(),
        "rejected_log_ratio": ratio["rejected"].mean(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value.item(), abs=1e-4), name
    # All confidences of a random model lie in the first bin, so the ECE is the gap between accuracy and confidence.
    gap = abs(expected["preference_accuracy"] - means["chosen"].exp().mean()).item()
    assert found["ece_length_normalised"] == pytest.approx(gap, abs=1e-5)
    assert 0.0 < found["preference_accuracy_sum"] < 1.0
    assert "entropy" not in found


@pytest.mark.smoke
def test_start_of_training_is_exactly_neutral(tmp_path, tokenizer, reference, pairs):
    config = PreferencesEvalConfig(num_samples=2, max_new_tokens=4)
    found = config.evaluate(reference, tokenizer, {"test": pairs}, _context(tmp_path, stage="before"))
    assert found["reward_accuracy"] == 0.5 and found["reward_margin"] == 0.0 and found["ece_margin"] == 0.0
    for name in ("divergence", "forward_kl", "reverse_kl"):
        assert found[name] == 0.0 and found[f"{name}_se"] == 0.0
    assert found["reference_ess"] == pytest.approx(1.0)
    shown = [json.loads(line) for line in (tmp_path / "examples_preferences.jsonl").read_text().splitlines()]
    assert {row["group"] for row in shown} == {"preferences"}
    assert [row["prompt"] for row in shown] == list(dict.fromkeys(row["prompt"] for row in pairs))[:12]


def _exact(policy, reference, tokenizer, prompts) -> dict[str, float]:
    """Divergences and entropy of the first completion token, over the whole vocabulary, averaged over prompts."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            log_p, log_q = (torch.log_softmax(m(ids).logits[0, -1].double(), -1) for m in (policy, reference))
        kinds = {"divergence": "jensen_shannon", "forward_kl": "forward_kl", "reverse_kl": "reverse_kl"}
        values = {name: get_divergence(kind).exact(log_p, log_q).item() for name, kind in kinds.items()}
        rows.append(values | {"entropy": -(log_p.exp() * log_p).sum().item()})
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def test_sampled_divergences_agree_with_exact_enumeration(tmp_path, tokenizer, policy, reference, pairs):
    """One-token completions can be enumerated: the estimates must lie within four standard errors of the truth."""
    config = PreferencesEvalConfig(num_samples=150, max_new_tokens=1, batch_size=256)
    found = config.evaluate(policy, tokenizer, {"test": pairs}, _context(tmp_path, reference))
    exact = _exact(policy, reference, tokenizer, pairs["prompt"])
    for name in ("divergence", "forward_kl", "reverse_kl"):
        # nine prompts times 150 samples; the standard error over nine prompts alone includes their spread
        assert abs(found[name] - exact[name]) < max(4 * found[f"{name}_se"], 0.1 * exact[name]), name
        assert found[f"{name}_se"] < 0.5 * exact[name] and exact[name] > 1e-3
    assert found["entropy"] == pytest.approx(exact["entropy"], abs=1e-4)  # first token: no sampling error
    assert 0 < found["reference_ess"] <= 1


def test_sampling_follows_the_model_distribution(tokenizer, policy):
    """Frequencies of 6000 draws of one token against the model's own probabilities (chi-square, p > 1e-3)."""
    from scipy.stats import chisquare

    ids = tuple(tokenizer("Count 3:")["input_ids"])
    requests = [SamplingRequest(f"{k:05d}", ids, 1, stream=(0, k)) for k in range(6000)]
    drawn = sample_completions(policy, tokenizer, requests, temperature=0.1, batch_size=1000, progress=False)
    with torch.no_grad():
        probs = torch.softmax(policy(torch.tensor([ids])).logits[0, -1].double() / 0.1, -1)
    counts = torch.bincount(torch.tensor([drawn[r.key][0] for r in requests]), minlength=len(probs)).double()
    common = probs * 6000 >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([probs[common], probs[~common].sum()[None]]) * 6000
    assert common.sum() > 5
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("architecture", ["tiny_model_dir", "tiny_gpt2_dir"])
def test_samples_do_not_depend_on_the_batch_or_the_padding(request, architecture):
    directory = request.getfixturevalue(architecture)
    model, tokenizer = _model(directory), AutoTokenizer.from_pretrained(directory)
    model.generation_config.repetition_penalty = 5.0  # a model's own generation settings must not distort the draws
    prompts = ["Count", "Count to three please:", "What is two plus two? Answer"]
    requests = [
        SamplingRequest(f"{i}-{k}", tuple(tokenizer(prompt)["input_ids"]), 8, stream=(i, k))
        for i, prompt in enumerate(prompts)
        for k in range(3)
    ]
    runs = [
        sample_completions(model, tokenizer, order, batch_size=size, seed=5, progress=False)
        for order, size in ((requests, 9), (requests, 1), (requests[::-1], 4))
    ]
    assert runs[0] == runs[1] == runs[2]
    assert len(set(runs[0].values())) == len(requests)
    assert model.generation_config.repetition_penalty == 5.0
    other = sample_completions(model, tokenizer, requests, seed=6, progress=False)
    assert other != runs[0]


def test_metrics_do_not_depend_on_batch_size_or_padding_side(tmp_path, tiny_gpt2_dir, pairs):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2_dir)
    policy, reference = _model(tiny_gpt2_dir, 0.05), _model(tiny_gpt2_dir)
    results = []
    for batch_size, side in ((1, "left"), (9, "right"), (4, "left")):
        tokenizer.padding_side = side
        config = PreferencesEvalConfig(batch_size=batch_size, num_samples=2, max_new_tokens=6)
        results.append(config.evaluate(policy, tokenizer, {"test": pairs}, _context(tmp_path, reference)))
    for other in results[1:]:
        assert other == pytest.approx(results[0], abs=1e-5)


def test_reference_from_the_first_stage_serves_a_run_that_keeps_none(tmp_path, tokenizer, policy, reference, pairs):
    """precompute_ref_log_probs: at `after` there is no reference model; what `before` measured is used."""
    kept = PreferencesEvalConfig(num_samples=1, max_new_tokens=4)
    kept.evaluate(reference, tokenizer, {"test": pairs}, _context(tmp_path, stage="before"))
    found = kept.evaluate(policy, tokenizer, {"test": pairs}, _context(tmp_path))
    fresh = PreferencesEvalConfig(num_samples=1, max_new_tokens=4)
    with_model = fresh.evaluate(policy, tokenizer, {"test": pairs}, _context(tmp_path, reference))
    assert found["reverse_kl"] is None and with_model["reverse_kl"] > 0  # needs the reference on new samples
    for name in set(found) - {"reverse_kl", "reverse_kl_se"}:
        assert found[name] == pytest.approx(with_model[name], abs=1e-6), name
    alone = PreferencesEvalConfig(num_samples=0).evaluate(policy, tokenizer, {"test": pairs}, _context(tmp_path))
    assert alone["reward_accuracy"] is None and alone["preference_accuracy"] is not None


def test_adapter_is_its_own_reference(tmp_path, tiny_model_dir, tokenizer, reference, pairs):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_model(tiny_model_dir), LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    config = PreferencesEvalConfig(num_samples=1, max_new_tokens=4)
    found = config.evaluate(model, tokenizer, {"test": pairs}, _context(tmp_path))
    explicit = PreferencesEvalConfig(num_samples=1, max_new_tokens=4)
    expected = explicit.evaluate(model, tokenizer, {"test": pairs}, _context(tmp_path, reference))
    assert found == pytest.approx(expected, abs=1e-6)
    assert abs(found["chosen_log_ratio"]) > 1e-3


def test_hot_samples_change_the_entropy_only(tmp_path, tokenizer, policy, reference, pairs):
    def run(temperature):
        config = PreferencesEvalConfig(num_samples=1, max_new_tokens=6, temperature=temperature)
        return config.evaluate(policy, tokenizer, {"test": pairs}, _context(tmp_path, reference))

    plain, hot = run(1.0), run(3.0)
    assert plain["entropy"] != hot["entropy"]
    assert {k: v for k, v in plain.items() if k != "entropy"} == {k: v for k, v in hot.items() if k != "entropy"}


def test_max_length_cuts_as_in_training_and_limits_are_kept(tmp_path, tokenizer, policy, reference, pairs):
    config = PreferencesEvalConfig(num_samples=1, max_rows=4, max_prompts=2, max_new_tokens=3)
    rows = config._rows(tokenizer, {"test": pairs}, _context(tmp_path, max_length=12))
    assert len(rows) == 4
    assert all(len(row["prompt_ids"]) + len(row[f"{h}_ids"]) <= 12 for row in rows for h in ("chosen", "rejected"))
    context = _context(tmp_path, reference)
    samples = PreferencesEvalConfig(num_samples=2, max_prompts=2, max_new_tokens=3)
    samples.evaluate(policy, tokenizer, {"test": pairs}, context)
    assert len(samples._reference["samples"][0]) == 4


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"num_samples": -1}, {"max_new_tokens": 0}, {"temperature": 0.0}, {"max_rows": 0}],
    ids=str,
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PreferencesEvalConfig(**options)


def test_bad_data(tmp_path, tokenizer, policy, pairs):
    with pytest.raises(DataError, match=r"no split 'test' in the data; it has \['train'\]"):
        PreferencesEvalConfig().evaluate(policy, tokenizer, {"train": pairs}, _context(tmp_path))
    with pytest.raises(DataError, match="has no 'divergence'"):
        PreferencesEvalConfig().evaluate(
            policy, tokenizer, {"test": pairs}, EvalContext(SimpleNamespace(beta=0.1), tmp_path)
        )
    with pytest.raises(DataError, match="no column 'rejected'"):
        PreferencesEvalConfig().evaluate(
            policy, tokenizer, {"test": pairs.remove_columns("rejected")}, _context(tmp_path)
        )
    with pytest.raises(DataError, match="context of 512"):
        PreferencesEvalConfig(max_new_tokens=600).evaluate(policy, tokenizer, {"test": pairs}, _context(tmp_path))


def test_the_command(tmp_path, tiny_model_dir, policy, tokenizer, pairs, capsys):
    import argparse

    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    pairs.to_json(tmp_path / "pairs.jsonl")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = ["--model", str(tmp_path / "policy"), "--reference", str(tiny_model_dir), "--beta", "0.2"]
    words += ["--divergence", '{"name": "alpha", "alpha": 0.3}', "--dataset", str(tmp_path / "pairs.jsonl")]
    words += ["--output", str(tmp_path / "out"), "--num_samples", "1", "--max_new_tokens", "4", "--seed", "7"]
    assert command.run(parser.parse_args(words)) == 0
    result = json.loads((tmp_path / "out" / "preferences_eval.json").read_text())
    context = _context(tmp_path, _model(tiny_model_dir), divergence={"name": "alpha", "alpha": 0.3})
    expected = PreferencesEvalConfig(num_samples=1, max_new_tokens=4).evaluate(
        policy, tokenizer, {"test": pairs}, context
    )
    assert result["metrics"] == pytest.approx(expected, abs=1e-6)
    assert math.isfinite(result["metrics"]["divergence"]) and result["environment"]["seed"] == 7
    with pytest.raises(DataError, match=r"existing file ending in \.json"):
        command.run(parser.parse_args([*words, "--dataset", str(tmp_path / "missing.jsonl")]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--divergence", "kl"], "ambiguous"),
        (["--divergence", "pearson_chi2"], "f-DPO cannot use"),
        (["--divergence", "reverse_kl", "--temperature", "0"], "temperature"),
        (["--divergence", "reverse_kl", "--max_exponent", "200"], "max_exponent"),
    ],
)
def test_the_shell_command_refuses_in_one_line_before_loading(tmp_path, capsys, options, message):
    from fdiv.cli import main

    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    words = ["--model", "nowhere", "--dataset", str(pairs), "--output", str(tmp_path / "out"), "--beta", "0.1"]
    assert main(["eval", "preferences", *words, *options]) != 0
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
