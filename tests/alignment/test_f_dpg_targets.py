"""Targets, scorers, moment matching, Z bookkeeping and quasi-rejection against enumeration and hand-calculated values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fdiv.alignment.f_dpg.moments import fit_moments
from fdiv.alignment.f_dpg.partition import PartitionEstimates
from fdiv.alignment.f_dpg.quasi_rejection import (
    log_beta_for_rate,
    quasi_rejection,
    quasi_rejection_statistics,
    sample_target,
)
from fdiv.alignment.f_dpg.targets import as_scores, build_target
from fdiv.alignment.scorers import (
    SCORERS,
    build_scorer,
    checked_scorer,
    classifier,
    compiles,
    contains_words,
    lexicon_sentiment,
    prepare_scorer,
    read_lexicon,
)
from fdiv.errors import FdivError, MomentError, ScorerError
from tests.support.runs.f_dpg import load
from tests.support.sequence_model import SequenceModel


def score_of(scorer, *texts, prompts=None):
    return scorer(prompts=prompts or [""] * len(texts), completions=list(texts))


# ---------------------------------------------------------------- targets
def constant(name):
    def scorer(completions, **_):
        return [0.0] * len(completions)

    scorer.__name__ = name
    return scorer


def test_potentials_by_hand():
    a, b = constant("a"), constant("b")
    scores = torch.tensor([[1.0, 2.0], [0.0, 3.0], [0.5, -1.0]], dtype=torch.float64)
    one = scores[:, :1]
    log2 = math.log(2)
    pointwise = build_target({"name": "pointwise", "scorers": [a]})
    assert pointwise.log_potential(one).tolist() == [0.0, -math.inf, -log2]
    smoothed = build_target({"name": "pointwise", "scorers": a, "smoothing": 0.1})
    assert smoothed.log_potential(one).exp().tolist() == pytest.approx([1.0, 0.1, 0.55])
    reward = build_target({"name": "reward", "scorers": [a, b], "beta": 0.5})
    assert reward.log_potential(scores).tolist() == [6.0, 6.0, -1.0]
    distributional = build_target(
        {"name": "distributional", "features": [a, b], "moments": [0.5, 0.5], "coefficients": [2.0, -1.0]}
    )
    assert distributional.log_potential(scores).tolist() == [0.0, -3.0, 2.0]
    hybrid = build_target({"name": "hybrid", "scorers": [a], "features": [b], "moments": [0.5], "coefficients": [3.0]})
    assert hybrid.log_potential(scores).tolist() == [6.0, -math.inf, pytest.approx(-3.0 - log2)]
    assert hybrid.log_potential(scores, without_features=True).tolist() == [0.0, -math.inf, pytest.approx(-log2)]


def test_which_targets_are_hard():
    a = constant("a")
    hard = {
        "pointwise": {}, "filter": {}, "hybrid": {"features": [a], "moments": [0.5]},
        "reward": {"beta": 1.0}, "distributional": {"features": [a], "moments": [0.5]},
    }  # fmt: skip
    for name, extra in hard.items():
        settings = {"name": name, **({} if name == "distributional" else {"scorers": [a]}), **extra}
        assert build_target(settings).hard == (name in ("pointwise", "filter", "hybrid")), name
        if name in ("pointwise", "filter", "hybrid"):
            assert not build_target({**settings, "smoothing": 0.01}).hard
    assert not build_target({"name": "pointwise", "scorers": [a], "positive": True}).hard
    assert build_target({"name": "distributional", "features": [a], "moments": [0.5]}).needs_fit


def test_scores_a_target_refuses():
    a = constant("a")
    with pytest.raises(ScorerError, match="scorer 'a' gave -2"):
        build_target({"name": "pointwise", "scorers": [a]}).log_potential(torch.tensor([[-2.0]]))
    with pytest.raises(ScorerError, match="scorer 'a' gave 0.5: a filter target's verifier must give 0 or 1"):
        build_target({"name": "filter", "scorers": [a]}).log_potential(torch.tensor([[0.5]]))
    with pytest.raises(ScorerError, match="positive: true"):
        build_target({"name": "pointwise", "scorers": [a], "positive": True}).log_potential(torch.tensor([[0.0]]))
    target = build_target({"name": "distributional", "features": [a], "moments": [0.5]})
    with pytest.raises(ValueError, match="not fitted yet"):
        target.log_potential(torch.tensor([[1.0]]))
    with pytest.raises(ValueError, match=r"shape \(1, 2\): \[B, 1\] is due"):
        target.log_potential(torch.tensor([[1.0, 2.0]]))
    assert target.with_coefficients([2.0]).log_potential(torch.tensor([[1.0]])).tolist() == [2.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "pointwize", "scorers": []}, "unknown target 'pointwize'; did you mean 'pointwise'"),
        ({"scorers": []}, "unknown target None; there are: distributional, filter"),
        ({"name": "filter", "scorers": []}, "scorers is empty"),
        ({"name": "reward", "scorers": ["compiles"]}, "target 'reward' needs beta"),
        ({"name": "reward", "scorers": ["compiles"], "beta": 0}, "beta=0 must be a number above 0"),
        ({"name": "pointwise", "scorers": ["compiles"], "smoothing": 1.0}, "strictly between 0 and 1"),
        ({"name": "pointwise", "scorers": ["compiles"], "positive": "no"}, "positive='no' must be true or false"),
        (
            {"name": "pointwise", "scorers": ["compiles"], "smoothin": 0.1},
            "no key 'smoothin'; did you mean 'smoothing'",
        ),
        ({"name": "distributional", "features": ["compiles"], "moments": [0.1, 0.2]}, "must be 1 finite numbers"),
        ({"name": "pointwise", "scorers": ["compile"]}, "unknown scorer 'compile'; did you mean 'compiles'"),
        ({"name": "pointwise", "scorers": [{"name": "contains_words"}]}, "missing a required argument: 'words'"),
        ({"name": "pointwise", "scorers": [{"name": "contains_words", "word": "a"}]}, "did you mean 'words'"),
        ({"name": "pointwise", "scorers": [{"name": "contains_words", "words": []}]}, "at least one word"),
    ],
)
def test_specs_that_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        build_target(spec)


# ---------------------------------------------------------------- scorers
def test_contains_words():
    scorer = contains_words(["amazing", "great deal"])
    assert score_of(scorer, "It was Amazing!", "amazingly", "a great  deal", "a great deal.") == [1.0, 0.0, 0.0, 1.0]
    both = contains_words(["a", "b"], all_of_them=True, case_sensitive=True)
    assert score_of(both, "a b", "A b", "a") == [1.0, 0.0, 0.0]
    chat = [[{"role": "assistant", "content": "amazing"}]]
    assert scorer(prompts=["x"], completions=chat) == [1.0]
    assert build_scorer({"name": "contains_words", "words": "she", "as": "female"}).__name__ == "female"


def test_lexicon_sentiment_by_hand(tmp_path, monkeypatch):
    (tmp_path / "lexicon.txt").write_text("good\t1.9\t0.9\t[1]\nbad\t-2.5\t0.6\t[1]\n:)\t2.0\t1\t[]\n\n")
    monkeypatch.setenv("LEXICONS", str(tmp_path))
    scorer = lexicon_sentiment("$LEXICONS/lexicon.txt")
    texts = ["Good, good!", "not seen", "bad :)", ""]
    expected = [3.8 / math.sqrt(3.8**2 + 15), 0.0, -0.5 / math.sqrt(0.25 + 15), 0.0]
    assert score_of(scorer, *texts) == pytest.approx(expected)
    assert score_of(lexicon_sentiment(tmp_path / "lexicon.txt", threshold=0.05), *texts) == [1.0, 0.0, 0.0, 0.0]
    prepare_scorer(scorer)
    with pytest.raises(FileNotFoundError, match="no such file"):
        prepare_scorer(lexicon_sentiment(tmp_path / "none.txt"))
    with pytest.raises(FileNotFoundError, match=r"\$NOT_SET/x.txt: no such file \(an environment variable"):
        read_lexicon("$NOT_SET/x.txt")
    (tmp_path / "broken.txt").write_text("good\tvery\n")
    with pytest.raises(ValueError, match="line 1: token, tab, number are due"):
        read_lexicon(tmp_path / "broken.txt")


def test_sentiment_agrees_with_people(shared_data):
    """The lexicon's sign against human ratings of movie-review sentences that people found clearly polar."""
    folder = shared_data / "data" / "vader_sentiment"
    scorer = lexicon_sentiment(folder / "vader_lexicon.txt")
    rows = [line.split("\t") for line in (folder / "movieReviewSnippets_GroundTruth.txt").read_text().splitlines()]
    polar = [(float(rating), text) for _, rating, text in rows if abs(float(rating)) >= 2]
    scores = score_of(scorer, *(text for _, text in polar))
    judged = [(rating > 0) == (score > 0) for (rating, _), score in zip(polar, scores, strict=True) if score != 0]
    assert len(judged) > 2000
    assert sum(judged) / len(judged) == pytest.approx(0.7, abs=0.06)


def test_code_that_compiles():
    scorer = compiles()
    heads = ["def f(x):\n"] * 5
    tails = ["    return x\n", "    return (x\n", "return x", "    x\0", ""]
    assert score_of(scorer, *tails, prompts=heads) == [1.0, 0.0, 0.0, 0.0, 0.0]
    alone = compiles(with_prompt=False)
    assert score_of(alone, "x = 1", "", "return 1", "(" * 5000, prompts=["("] * 4) == [1.0, 0.0, 0.0, 0.0]
    marker = "fdiv_compiles_executed_this"
    assert score_of(alone, f"import builtins; builtins.{marker} = 1") == [1.0]
    import builtins

    assert not hasattr(builtins, marker), "a scorer must never run what it scores"


def test_classifier(tmp_path, tiny_model_dir):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model_dir, num_labels=2, id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1}
    ).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(tmp_path / "c")
    tokenizer.save_pretrained(tmp_path / "c")
    scorer = build_scorer({"name": "classifier", "model": str(tmp_path / "c"), "label": "pos", "batch_size": 2})
    texts = ["I do not know", "four", "The capital of France is Paris"]
    expected = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 1].item() for text in texts]
    assert score_of(scorer, *texts) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="no label 'joy'; it has neg, pos"):
        score_of(classifier(str(tmp_path / "c"), "joy"), "x")


def test_scorers_are_trl_rewards_and_keep_their_names():
    assert {"classifier", "compiles", "contains_words", "sentiment", "math", "sql", "code", "exact", "vader"} == set(
        SCORERS
    )
    assert build_scorer("compiles").__name__ == "compiles"
    checked = checked_scorer(build_scorer("compiles"))
    assert checked.__name__ == "compiles"
    assert checked(prompts=["a"], completions=["=1"], completion_ids=[[1]], trainer_state=None) == [1.0]


def test_any_reward_function_by_its_path():
    from trl.rewards import think_format_reward

    scorer = build_scorer("trl.rewards:think_format_reward")
    assert scorer is think_format_reward
    renamed = build_scorer({"name": "trl.rewards:think_format_reward", "as": "thinks"})
    chat = [[{"role": "assistant", "content": "<think>\nhm\n</think>\nyes"}]]
    assert renamed.__name__ == "thinks" and checked_scorer(renamed)(prompts=["x"], completions=chat) == [1.0]
    for spec, message in (
        ("trl.rewards:no_such_reward", "no_such_reward"),
        ("no_such_module:f", "No module named"),
        ({"name": "trl.rewards:think_format_reward", "x": 1}, "takes no x here"),
        ("math:floor", "math is a module of Python itself"),
    ):
        with pytest.raises(ValueError, match=message):
            build_scorer(spec)


def test_checked_scorer_names_the_fault():
    def broken(completions, **_):
        return [math.inf]

    with pytest.raises(ScorerError, match="scorer 'broken' returned inf for the completion 'text'"):
        checked_scorer(broken)(prompts=["p"], completions=["text"])


# ---------------------------------------------------------------- moments
def test_moments_of_an_enumerated_model():
    """λ from the exact base (every sequence once, weighted by its probability) gives the exact moments."""
    model = SequenceModel().randomize(3)
    log_a = model.log_probs().detach()
    features = np.array([[float(2 in s), len(s) / 3] for s in model.sequences])
    fit = fit_moments(features, [0.4, 0.8], log_a.numpy(), min_effective_samples=1)
    assert fit.moments == pytest.approx([0.4, 0.8], abs=1e-5)
    target = build_target(
        {"name": "distributional", "features": [constant("a"), constant("b")], "moments": [0.4, 0.8]}
    ).with_coefficients(fit.coefficients)
    log_p = log_a + target.log_potential(torch.from_numpy(features))
    log_p = log_p - log_p.logsumexp(0)
    assert (log_p.exp() @ torch.from_numpy(features)).tolist() == pytest.approx([0.4, 0.8], abs=1e-5)
    assert fit.proposal_moments == pytest.approx((log_a.exp() @ torch.from_numpy(features)).tolist(), abs=1e-12)


def test_one_boolean_moment_has_a_closed_form():
    features = np.array([[1.0]] * 20 + [[0.0]] * 80)
    fit = fit_moments(features, [0.5])
    assert fit.coefficients[0] == pytest.approx(math.log(4), abs=1e-4)
    assert fit.effective_samples == pytest.approx(1 / (20 * (0.5 / 20) ** 2 + 80 * (0.5 / 80) ** 2), rel=1e-3)
    # Off-policy: the same samples with the 1s twice too likely.
    weight = np.where(features[:, 0] == 1, math.log(0.5), 0.0)
    assert fit_moments(features, [0.5], weight).coefficients[0] == pytest.approx(math.log(8), abs=1e-4)


def test_moments_are_means_over_prompts():
    """Base rates 5 % and 50 %, asked for 50 %: σ(logit .05 + λ) + σ(λ) = 1 at λ = −½·logit .05, whatever Z each has.

    Pooled, the second prompt would count more by its larger Z and the mean would be 42 %.
    """
    features, prompts = [[1.0], [0.0], [1.0], [0.0]], [7, 7, 3, 3]
    rates = torch.tensor([0.05, 0.95, 0.5, 0.5])
    for scale in (torch.zeros(4), torch.tensor([3.0, 3.0, -2.0, -2.0])):
        log_weight = (rates.log() + scale).numpy()
        fit = fit_moments(features, [0.5], log_weight, prompts=prompts, min_effective_samples=1)
        assert fit.coefficients[0] == pytest.approx(0.5 * math.log(19), abs=1e-3)
        assert fit.moments[0] == pytest.approx(0.5, abs=1e-5)
        assert fit.proposal_moments[0] == pytest.approx(0.275, abs=1e-6)
    pooled = fit_moments(features, [0.5], rates.log().numpy(), min_effective_samples=1)
    odds = math.exp(pooled.coefficients[0]) * torch.tensor([1 / 19, 1.0])
    assert (odds / (1 + odds)).mean().item() == pytest.approx(0.42, abs=0.01)
    # a prompt counts by its samples: three rows of one prompt against one of the other
    fit = fit_moments([[1.0], [0.0]] * 4, [0.4], prompts=[1] * 6 + [2] * 2, min_effective_samples=1)
    assert fit.coefficients[0] == pytest.approx(math.log(0.4 / 0.6), abs=1e-3)
    with pytest.raises(ValueError, match="prompts .* one entry for each of the 4 samples"):
        fit_moments(features, [0.5], prompts=[1, 2])


@pytest.mark.parametrize(
    ("features", "moments", "message"),
    [
        ([[0.0], [1.0]] * 20, [1.2], "moment 1.2 of 'female' is out of reach: the 40 samples show values from 0 to 1"),
        ([[0.0], [1.0]] * 20, [1.0], "at the edge of what is possible"),
        ([[0.0]] * 40, [0.5], "is out of reach"),
        ([[0.0, 1.0], [1.0, 0.0]] * 20, [0.5, 0.8], "moments out of reach: .* No reweighting of the 40 samples"),
        ([[1.0]] + [[0.0]] * 2000, [0.9], "rests on 1.2 effective samples of 2001"),
    ],
    ids=["beyond", "edge", "constant", "jointly", "rare"],
)
def test_moments_that_cannot_be_had(features, moments, message):
    names = ["female"] if len(moments) == 1 else ["a", "b"]
    with pytest.raises(MomentError, match=message):
        fit_moments(features, moments, names=names)


def test_moment_arguments():
    with pytest.raises(ValueError, match=r"features \(2,\)"):
        fit_moments([0.0, 1.0], [0.5])
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_moments([[0.0], [math.nan]], [0.5])
    with pytest.raises(MomentError, match="no sample has a positive weight"):
        fit_moments([[0.0], [1.0]], [0.5], [-math.inf, -math.inf])


# ---------------------------------------------------------------- Z
def test_partition_modes_by_hand():
    prompts = torch.tensor([7, 7, 9, 9])
    first = torch.log(torch.tensor([1.0, 3.0, 0.0, 0.0]))
    second = torch.log(torch.tensor([0.0, 0.0, 4.0, 0.0]))
    history, group = PartitionEstimates("history"), PartitionEstimates("group")
    assert history.update(prompts, first).exp().tolist() == pytest.approx([2, 2, 0, 0])
    assert history.update(prompts, second, store=False).exp().tolist() == pytest.approx([1, 1, 1, 1])
    assert history.update(prompts, second).exp().tolist() == pytest.approx([1, 1, 1, 1])
    assert group.update(prompts, first).exp().tolist() == pytest.approx([2, 2, 0, 0])
    assert group.update(prompts, second).exp().tolist() == pytest.approx([0, 0, 2, 2])
    bounded = PartitionEstimates("group", z_max=1.0, z_floor=1e-4)
    assert bounded.update(prompts, first).exp().tolist() == pytest.approx([1, 1, 1e-4, 1e-4])
    given = PartitionEstimates("given")
    assert given.update(prompts, first, given=torch.tensor([1.0, 1.0, 2.0, 2.0])).tolist() == [1, 1, 2, 2]


def test_pooled_weights_by_hand():
    """A step weighs (16 + samples)/(16 + Σ squared deviations) of the steps before it; the first weighs 1."""
    prompts = torch.tensor([7, 7, 9, 9])
    estimates = PartitionEstimates("pooled")
    first = torch.log(torch.tensor([1.0, 3.0, 0.0, 0.0], dtype=torch.float64))
    assert estimates.update(prompts, first).exp().tolist() == pytest.approx([2, 2, 0, 0])
    # (½ − 1)² + (3/2 − 1)² of prompt 7, and 1 of each sample of prompt 9, whose Ẑ is 0; 16 of 16 + 4 are kept.
    spread = 0.8 * (0.25 + 0.25 + 1 + 1)
    weight = (16 + 0.8 * 4) / (16 + spread)
    second = torch.log(torch.tensor([4.0, 4.0, 4.0, 2.0], dtype=torch.float64))
    expected = (4 + weight * 8) / (2 + weight * 2)
    looked = estimates.update(prompts, second, store=False).exp().tolist()
    assert looked == pytest.approx([expected, expected, *[6 * weight / (2 + weight * 2)] * 2])
    assert estimates.update(prompts, second).exp().tolist() == pytest.approx(looked)
    # As `history` where no step is nearer to the target: the running spread is 1.
    history, pooled = PartitionEstimates("history"), PartitionEstimates("pooled")
    even = torch.log(torch.tensor([0.0, 2.0], dtype=torch.float64))
    for _ in range(5):
        both = [made.update(torch.tensor([1, 1]), even) for made in (history, pooled)]
    torch.testing.assert_close(*both)


def test_pooled_follows_the_steps_that_are_nearer():
    """P/q of mean Z = 1 that spread at first (ρ = e − 1) and not at all later: early steps lose their say faster."""
    generator = torch.Generator().manual_seed(0)
    history, pooled = PartitionEstimates("history"), PartitionEstimates("pooled")
    prompts = torch.zeros(64, dtype=torch.long)
    gaps = []
    for step in range(12):
        wide = torch.randn(64, generator=generator, dtype=torch.float64) - 0.5
        importance = wide if step < 4 else torch.zeros(64, dtype=torch.float64)
        gaps.append([abs(made.update(prompts, importance)[0].item()) for made in (history, pooled)])
    assert gaps[-1][1] < 0.7 * gaps[-1][0]


def test_outliers_leave_the_pooled_estimate_finite():
    estimates = PartitionEstimates("pooled")
    for importance in ([0.0, 500.0], [-math.inf, -math.inf], [-500.0, 700.0]):
        log_z = estimates.update(torch.tensor([3, 3]), torch.tensor(importance, dtype=torch.float64))
        assert torch.isfinite(log_z).all()
    assert all(math.isfinite(number) for number in estimates.state_dict()["spread"])


@pytest.mark.parametrize("mode", ["history", "pooled"])
def test_partition_state_survives_json(mode):
    import json

    estimates = PartitionEstimates(mode)
    estimates.update(torch.tensor([-5, 2**62]), torch.tensor([0.1, -math.inf], dtype=torch.float64))
    estimates.update(torch.tensor([-5, 2**62]), torch.tensor([0.4, 0.2], dtype=torch.float64))
    again = PartitionEstimates(mode)
    again.load_state_dict(json.loads(json.dumps(estimates.state_dict())))
    assert again.state_dict() == estimates.state_dict()
    more = torch.tensor([0.3, 0.7], dtype=torch.float64)
    ids = torch.tensor([-5, 2**62])
    assert torch.equal(again.update(ids, more), estimates.update(ids, more))


# ---------------------------------------------------------------- quasi-rejection
def enumerated():
    """A proposal, an unnormalised target that excludes some sequences, and its log importance on every sequence."""
    model = SequenceModel().randomize(1)
    log_q = model.log_probs().detach()
    allowed = torch.tensor([2 in sequence for sequence in model.sequences])
    log_big_p = (SequenceModel().randomize(4).log_probs().detach() - 0.4).masked_fill(~allowed, -math.inf)
    return log_q, log_big_p


@pytest.mark.parametrize("log_beta", [-3.0, 0.0, 5.0])
def test_quasi_rejection_against_enumeration(log_beta):
    log_q, log_big_p = enumerated()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(log_q.exp(), 200_000, replacement=True, generator=generator)
    log_importance = (log_big_p - log_q)[drawn]
    accepted = quasi_rejection(log_importance, log_beta, generator=generator)
    kept = torch.minimum(log_big_p, log_beta + log_q).exp()
    rate = kept.sum().item() / math.exp(log_beta)
    assert accepted.double().mean().item() == pytest.approx(rate, abs=5 * math.sqrt(rate / 200_000))
    counts = torch.bincount(drawn[accepted], minlength=len(log_q)).double()
    p_beta = kept / kept.sum()
    assert (counts / counts.sum() - p_beta).abs().sum() < 5 * math.sqrt(len(log_q) / counts.sum())

    found = quasi_rejection_statistics(log_importance, log_beta)
    assert found.acceptance_rate == pytest.approx(rate, abs=5 * found.acceptance_rate_se)
    assert math.exp(found.log_z) == pytest.approx(log_big_p.exp().sum().item(), rel=0.02)
    p = log_big_p.exp() / log_big_p.exp().sum()
    distance = 0.5 * (p - p_beta).abs().sum().item()
    exact_bound = 1 - kept.sum().item() / log_big_p.exp().sum().item()
    assert distance <= exact_bound + 1e-12
    assert found.total_variation_bound == pytest.approx(exact_bound, abs=0.01)
    if log_beta == 5.0:
        assert exact_bound == 0.0 and distance == pytest.approx(0.0, abs=1e-12), "β above every P/q is exact"


def test_beta_for_a_rate():
    log_q, log_big_p = enumerated()
    drawn = torch.multinomial(log_q.exp(), 5000, replacement=True, generator=torch.Generator().manual_seed(0))
    log_importance = (log_big_p - log_q)[drawn]
    for rate in (0.3, 0.01, 1e-6):
        log_beta = log_beta_for_rate(log_importance, rate)
        assert quasi_rejection_statistics(log_importance, log_beta).acceptance_rate == pytest.approx(rate, rel=1e-6)
    with pytest.raises(ValueError, match="of the proposal samples have P > 0"):
        log_beta_for_rate(log_importance, 0.99)
    with pytest.raises(ValueError, match="every one of the 4 proposal samples has P = 0, so no beta"):
        log_beta_for_rate(torch.full((4,), -math.inf), 0.1)
    with pytest.raises(ValueError, match="rate=1.5"):
        log_beta_for_rate(log_importance, 1.5)
    with pytest.raises(ValueError, match="every one of the 3 proposal samples has P = 0"):
        quasi_rejection_statistics(torch.full((3,), -math.inf), 0.0)


def test_sampling_texts_from_a_target(tiny_model_dir):
    from transformers import AutoTokenizer

    model, tokenizer = load(tiny_model_dir).eval(), AutoTokenizer.from_pretrained(tiny_model_dir)

    def vowel(completions, **_):
        return [float(any(letter in text.lower() for letter in "aeiou")) for text in completions]

    target = build_target({"name": "pointwise", "scorers": [vowel]})
    texts, found = sample_target(model, tokenizer, "The", target, 30, log_beta=0.0, max_new_tokens=3, batch_size=64)
    assert len(texts) == 30 and all(vowel(texts)), "β = 1 is exact rejection here: P/q is 0 or 1"
    assert found.total_variation_bound == pytest.approx(0.0, abs=1e-6)
    assert found.acceptance_rate == pytest.approx(math.exp(found.log_z), rel=1e-5)
    _, other = sample_target(
        model, tokenizer, "", target, 5, acceptance_rate=0.2, max_new_tokens=3, base_model=load(tiny_model_dir).eval()
    )
    assert other.acceptance_rate == pytest.approx(0.2, abs=0.1)
    with pytest.raises(ValueError, match="exactly one of acceptance_rate and log_beta"):
        sample_target(model, tokenizer, "", target, 5)
    with pytest.raises(FdivError, match="of 5 texts accepted after 64 proposals"):
        sample_target(model, tokenizer, "", target, 5, log_beta=30.0, max_new_tokens=3, max_proposals=64)


def test_proposals_ignore_the_models_own_generation_settings(tiny_model_dir):
    """With every even token forbidden there, log q of the samples would be that of another distribution."""
    from transformers import AutoTokenizer

    model, tokenizer = load(tiny_model_dir).eval(), AutoTokenizer.from_pretrained(tiny_model_dir)
    texts = []

    def watching(prompts, completions):
        texts.extend(completions)
        return torch.ones(len(completions), 1)

    target = build_target({"name": "pointwise", "scorers": [constant("a")]})
    model.generation_config.suppress_tokens = list(range(len(tokenizer)))[::2]
    torch.manual_seed(0)
    sample_target(model, tokenizer, "The", target, 60, log_beta=0.0, max_new_tokens=3, score=watching)
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert sum(token % 2 == 0 for token in ids) > 0.2 * len(ids)
    assert model.generation_config.suppress_tokens


def test_scores_as_columns():
    assert as_scores([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).tolist() == [[1, 4], [2, 5], [3, 6]]
