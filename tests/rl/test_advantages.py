"""Advantages against enumeration: the expected gradient over every group of samples is that of the stated objective."""

import itertools
import math

import pytest
import torch

from fdiv.rl import list_advantages, resolve_advantage
from fdiv.rl.advantages import ADVANTAGES, dr_grpo, grpo, maxrl, nsr, passk_analytic, pkpo, pkpo_loo, rloo

BINARY = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
GENERAL = torch.tensor([-0.5, 2.0, 0.3, 2.0], dtype=torch.float64)
SPECS = [
    "grpo",
    "dr_grpo",
    "rloo",
    {"name": "pkpo", "k": 2},
    {"name": "pkpo_loo", "k": 2},
    {"name": "passk_analytic", "k": 2},
    "maxrl",
    {"name": "nsr", "weight": 0.1},
]


def policy():
    """A policy over four outcomes, as logits with gradient."""
    return torch.tensor([0.4, -0.9, 0.1, -0.2], dtype=torch.float64, requires_grad=True)


def groups(logits, n):
    """Every n-tuple of outcomes: `[G, n]` and the probability of drawing it."""
    index = torch.tensor(list(itertools.product(range(len(logits)), repeat=n)))
    return index, logits.log_softmax(-1).detach()[index].sum(-1).exp()


def expected_gradient(rewards, n, advantage):
    """E[(1/n) Σ_i A_i ∇log π(y_i)] over all groups of n samples; `advantage` maps rewards `[G, n]` to `[G, n]`."""
    logits = policy()
    index, probability = groups(logits, n)
    surrogate = (advantage(rewards[index]) * logits.log_softmax(-1)[index]).mean(-1)
    return torch.autograd.grad((probability * surrogate).sum(), logits)[0]


def gradient_of(objective):
    """∇ of `objective(π)`, π the vector of probabilities."""
    logits = policy()
    return torch.autograd.grad(objective(logits.softmax(-1)), logits)[0]


def expected_reward(rewards):
    return lambda pi: (pi * rewards).sum()


def expected_maximum(rewards, k):
    """E[max of k rewards], by enumerating the k-tuples."""
    index = torch.tensor(list(itertools.product(range(4), repeat=k)))
    return lambda pi: (pi[index].prod(-1) * rewards[index].amax(-1)).sum()


def pass_at(k):
    """1 − (1 − p)^k."""
    return lambda pi: 1 - (1 - (pi * BINARY).sum()) ** k


def close(actual, expected):
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- what each is an unbiased estimate of
@pytest.mark.parametrize("rewards", [BINARY, GENERAL], ids=["binary", "general"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_rloo_and_dr_grpo(rewards, n):
    exact = gradient_of(expected_reward(rewards))
    close(expected_gradient(rewards, n, rloo), exact)
    close(expected_gradient(rewards, n, dr_grpo), (1 - 1 / n) * exact)


@pytest.mark.parametrize("rewards", [BINARY, GENERAL], ids=["binary", "general"])
@pytest.mark.parametrize("function", [pkpo, pkpo_loo])
@pytest.mark.parametrize(("n", "k"), [(n, k) for n in (1, 3, 4) for k in range(1, n + 1)])
def test_pkpo_is_the_gradient_of_the_maximum_of_k(rewards, function, n, k):
    close(expected_gradient(rewards, n, lambda r: function(r, k)), gradient_of(expected_maximum(rewards, k)))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_maximum_of_k_of_binary_rewards_is_pass_at_k(k):
    close(expected_gradient(BINARY, 4, lambda r: pkpo(r, k)), gradient_of(pass_at(k)))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_maxrl_is_the_series_cut_off_at_n_minus_one(n):
    exact = sum(gradient_of(pass_at(j)) / j for j in range(1, n))
    close(expected_gradient(BINARY, n, maxrl), exact)


def test_the_series_tends_to_the_gradient_of_log_p():
    whole = gradient_of(lambda pi: (pi * BINARY).sum().log())
    series = sum(gradient_of(pass_at(j)) / j for j in range(1, 200))
    torch.testing.assert_close(series, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("weight", [0, 0.1, 1.0, 3.0])
def test_nsr_has_the_same_direction_for_every_weight(weight):
    exact = (1 + weight) * gradient_of(expected_reward(BINARY))
    for n in (1, 3):
        close(expected_gradient(BINARY, n, lambda r: nsr(r, weight)), exact)


def sigma_of(rewards, k):
    """`[G, 1]`, √(R̄(1 − R̄)) with R̄ = 1 − C(n − c, k)/C(n, k), by integers."""
    n = rewards.size(1)
    fails = [math.comb(n - int(c), k) / math.comb(n, k) for c in rewards.sum(-1)]
    return torch.tensor([[math.sqrt(share * (1 - share))] for share in fails], dtype=torch.float64)


@pytest.mark.parametrize(("n", "k"), [(3, 1), (4, 1), (4, 2), (4, 3)])
def test_passk_analytic_without_its_sigma(n, k):
    def without_sigma(rewards):
        return passk_analytic(rewards, k) * sigma_of(rewards, k)

    close(expected_gradient(BINARY, n, without_sigma), (1 / k - 1 / n) * gradient_of(pass_at(k)))


def test_passk_analytic_with_k_equal_n_is_nothing():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    assert passk_analytic(rewards, 3).tolist() == [[0.0] * 3] * 2


def grpo_weight(p, n):
    """The factor of ∇p in E[ĝ]: E[score | correct] = ∇p/p and E[score | wrong] = −∇p/(1 − p)."""
    table = grpo(torch.tensor([[1.0] * c + [0.0] * (n - c) for c in range(1, n)], dtype=torch.float64))
    weight = 0.0
    for c in range(1, n):
        chance = math.comb(n, c) * p**c * (1 - p) ** (n - c)
        up, down = table[c - 1, 0].item(), table[c - 1, -1].item()
        weight += chance * (c * up / p - (n - c) * down / (1 - p)) / n
    return weight


def test_grpo_weighs_prompts_by_one_over_the_standard_deviation():
    p = (policy().softmax(-1) * BINARY).sum().item()
    for n in (2, 4):
        exact = grpo_weight(p, n) * gradient_of(expected_reward(BINARY))
        close(expected_gradient(BINARY, n, grpo), exact)
    for p in (0.1, 0.5, 0.8):
        limit = 1 / math.sqrt(p * (1 - p))  # d/dp 2 arcsin √p
        assert grpo_weight(p, 400) == pytest.approx(limit, rel=0.015)
        assert abs(grpo_weight(p, 400) - limit) < abs(grpo_weight(p, 50) - limit)


def test_leave_one_out_lowers_the_variance_of_pkpo():
    """Second moment of ĝ: the trace of E[ĝ ĝᵀ], by enumeration."""
    moments = {}
    logits = policy()
    index, probability = groups(logits, 4)
    score = torch.autograd.functional.jacobian(lambda x: x.log_softmax(-1), logits)
    for function in (pkpo, pkpo_loo):
        gradients = (function(BINARY[index], 2)[..., None] * score[index]).mean(1)
        moments[function] = (probability * gradients.square().sum(-1)).sum().item()
    assert moments[pkpo_loo] < 0.6 * moments[pkpo]


# ---------------------------------------------------------------- values
def test_by_hand():
    """One correct of four, k = 2: pass@2 = 1 − 3/6; ρ(3, 1, 1) = 1/3; C(2,1)/C(3,1) = 2/3."""
    one = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    expected = {
        "grpo": [-0.25 / 0.5001, 0.75 / 0.5001],
        "dr_grpo": [-0.25, 0.75],
        "rloo": [-1 / 3, 1.0],
        "pkpo": [2 / 3, 2.0],
        "pkpo_loo": [0.0, 2.0],
        "passk_analytic": [-1 / 3, 1.0],
        "maxrl": [-1.0, 3.0],
        "nsr": [-1.0, 0.1],
    }
    for spec in SPECS:
        advantage = resolve_advantage(spec)
        assert advantage(one)[0, :2].tolist() == pytest.approx(expected[advantage.name], abs=1e-12)


@pytest.mark.parametrize("n", [4, 8, 64])
def test_pkpo_has_the_papers_closed_form(n):
    def rho(total, correct, k):
        return 1 - math.comb(total - correct, k) / math.comb(total, k)

    for k in {1, 2, n // 2, n}:
        for c in {0, 1, n // 2, n - 1, n}:
            rewards = torch.tensor([[1.0] * c + [0.0] * (n - c)], dtype=torch.float64)
            paper = [k / n] * c + [k / n * rho(n - 1, c, k - 1) if c < n else 0.0] * (n - c)
            assert (pkpo(rewards, k) / n)[0].tolist() == pytest.approx(paper, abs=1e-12)
            with_baseline = [k / n * (1 - rho(n - 1, c - 1, k - 1)) if c else 0.0] * c + [0.0] * (n - c)
            assert (pkpo_loo(rewards, k) / n)[0].tolist() == pytest.approx(with_baseline, abs=1e-12)


@pytest.mark.parametrize("n", [2, 5, 32])
def test_passk_analytic_sums_to_zero_and_is_centred_pkpo(n):
    rewards = torch.tensor([[1.0] * c + [0.0] * (n - c) for c in range(n + 1)], dtype=torch.float64)
    for k in {1, 2, n // 2 or 1}:
        advantage = passk_analytic(rewards, k)
        assert advantage.sum(-1).abs().max() < 1e-11
        centred = pkpo(rewards, k) - pkpo(rewards, k).mean(-1, keepdim=True)
        torch.testing.assert_close(centred, k * sigma_of(rewards, k) * advantage, rtol=0, atol=1e-11)
        assert (advantage.abs().amax(-1) > 0).tolist() == [0 < c and n - c >= k for c in range(n + 1)]


def test_grpo_is_trls():
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([[0.3, 1.0, -2.0, 0.1], [1.0, math.nan, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]]).double()
    trl = (rewards - rewards.nanmean(1, keepdim=True)) / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(
        grpo(rewards), torch.nan_to_num(trl, nan=0.0), rtol=0, atol=1e-7
    )  # TRL's n/(n − 1) is float32


def test_order_does_not_matter_and_equal_rewards_get_equal_advantages():
    rewards = torch.tensor([[0.3, 1.0, 0.3, -2.0, 1.0]], dtype=torch.float64)
    shuffle = torch.tensor([4, 2, 0, 3, 1])
    for spec in ("grpo", "dr_grpo", "rloo", {"name": "pkpo", "k": 3}, {"name": "pkpo_loo", "k": 3}):
        advantage = resolve_advantage(spec)(rewards)
        torch.testing.assert_close(resolve_advantage(spec)(rewards[:, shuffle]), advantage[:, shuffle])
        assert advantage[0, 0].item() == pytest.approx(advantage[0, 2].item(), abs=1e-12)
        assert advantage[0, 1].item() == pytest.approx(advantage[0, 4].item(), abs=1e-12)


# ---------------------------------------------------------------- samples that are not scored
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_an_unscored_sample_is_as_if_it_were_not_there(spec):
    advantage = resolve_advantage(spec)
    with_gap = advantage(torch.tensor([[1.0, math.nan, 0.0, 0.0, math.nan, 1.0]]))
    without = advantage(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    assert with_gap[0, [1, 4]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(with_gap[:, [0, 2, 3, 5]], without, rtol=0, atol=1e-6)
    assert without.abs().max() > 0


def test_groups_with_too_few_scored_samples_are_skipped_and_counted():
    nan = math.nan
    rewards = torch.tensor([[1.0, nan, nan], [1.0, 0.0, nan], [1.0, 0.0, 0.0], [nan, nan, nan]])
    expected = {"nsr": [0, 0, 0, 1], "pkpo": [1, 1, 0, 1], "pkpo_loo": [1, 1, 0, 1], "passk_analytic": [1, 1, 0, 1]}
    for name in list_advantages():
        parameters = {"k": 3} if "k" in ADVANTAGES[name].parameters else {}
        parameters |= {"weight": 0.5} if name == "nsr" else {}
        advantage = resolve_advantage({"name": name, **parameters})
        skipped = advantage.skipped(rewards)
        assert skipped.int().tolist() == expected.get(name, [1, 0, 0, 1])
        values = advantage(rewards)
        assert values.isfinite().all()
        assert values[skipped].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_computed_in_float64(dtype):
    """Rewards of 1e6 that differ by 4: the variance in float32 would lose its digits."""
    rewards = torch.tensor([[1048576.0, 1048580.0]]).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    assert grpo(rewards)[0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-4)
    assert rloo(torch.tensor([[1.0, 0.0]], dtype=dtype)).dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("pkp", "unknown advantage 'pkp'; did you mean 'pkpo'"),
        ({"k": 3}, "unknown advantage None"),
        ("pkpo", r"advantage 'pkpo' needs the parameter 'k': write \{name: pkpo, k: 4\}"),
        ("nsr", r"needs the parameter 'weight': write \{name: nsr, weight: 0.1\}"),
        ({"name": "pkpo", "k": 0}, "pkpo: k=0 must be an integer >= 1"),
        ({"name": "pkpo", "k": 2.0}, "k=2.0 must be an integer"),
        ({"name": "nsr", "weight": -1}, "nsr: weight=-1 must be a finite number >= 0"),
        ({"name": "grpo", "k": 2}, "advantage 'grpo' has no parameter 'k'; it takes none"),
    ],
)
def test_bad_specs(spec, words):
    with pytest.raises(ValueError, match=words):
        resolve_advantage(spec)


def test_bad_rewards():
    with pytest.raises(ValueError, match="groups of 2 samples: this advantage needs at least 4"):
        pkpo(torch.zeros(1, 2), 4)
    with pytest.raises(ValueError, match="maxrl counts correct and wrong samples: .* got 0.5"):
        maxrl(torch.tensor([[1.0, 0.5]]))
    with pytest.raises(ValueError, match="a reward is infinite"):
        rloo(torch.tensor([[1.0, math.inf]]))
    with pytest.raises(ValueError, match=r"rewards have shape \(2,\)"):
        rloo(torch.tensor([1.0, 0.0]))
    with pytest.raises(TypeError, match="advantage: a name or a mapping with a `name` is due, got 3"):
        resolve_advantage(3)


def test_every_row_is_tested_here():
    assert {resolve_advantage(spec).name for spec in SPECS} == set(list_advantages())
    assert resolve_advantage({"name": "pkpo", "k": 4}).label == "pkpo(4)"
    built = resolve_advantage("grpo")
    assert resolve_advantage(built) is built
