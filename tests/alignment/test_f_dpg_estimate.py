"""`estimate_to_target`: by hand, by enumeration, by simulation; and the log entries that rest on it."""

import itertools
import math

import pytest
import torch

from fdiv.alignment import estimate_to_target
from fdiv.alignment.f_dpg.estimate import estimate_by_prompt
from fdiv.alignment.f_dpg.loss import leave_one_out_slopes
from fdiv.alignment.f_dpg.metrics import f_dpg_metrics, prompt_columns
from fdiv.alignment.f_dpg.partition import PartitionEstimates
from fdiv.divergences import get_divergence
from fdiv.statistics.estimates import clustered_mean

DIVERGENCES = ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "squared_hellinger", "jeffreys"]


def plug_in(log_ratio, f):
    """Mean of f(t)/t with Ẑ from the same samples."""
    log_z = torch.logsumexp(-log_ratio, 0) - math.log(len(log_ratio))
    return f.dual().generator(-(log_ratio + log_z)).mean()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_it_is_the_second_order_jackknife(name):
    """(n²·θ − 2(n−1)²·θ̄₁ + (n−2)²·θ̄₂)/2, written out over all subsets, of each prompt, in any order of rows."""
    f, generator = get_divergence(name), torch.Generator().manual_seed(0)
    values = []
    rows, ids = [], []
    for prompt, n in enumerate((3, 5, 5, 2, 8)):
        x = torch.randn(n, generator=generator, dtype=torch.float64) + prompt
        whole, one, two = (
            torch.stack([plug_in(x[list(s)], f) for s in itertools.combinations(range(n), n - k)]).mean()
            for k in (0, 1, 2) if n > k
        ) if n > 2 else (plug_in(x, f), plug_in(x[:1], f), None)  # fmt: skip
        values.append(
            2 * whole - one if n == 2 else 0.5 * (n**2 * whole - 2 * (n - 1) ** 2 * one + (n - 2) ** 2 * two)
        )
        rows.append(x)
        ids += [7 * prompt - 3] * n
    shuffled = torch.randperm(len(ids), generator=generator)
    got = estimate_to_target(torch.cat(rows)[shuffled], torch.tensor(ids)[shuffled], name)
    values = torch.stack(values)
    torch.testing.assert_close(got.value, values.mean(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.standard_error, values.std(correction=1) / math.sqrt(5), rtol=1e-10, atol=1e-12)
    assert got.value.dim() == got.standard_error.dim() == 0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_with_z_given_it_is_the_mean_over_prompts(name):
    f = get_divergence(name)
    log_ratio = torch.tensor([0.3, -0.2, 0.9, 0.1, -0.7], dtype=torch.float64)
    log_z = torch.tensor([0.5, 0.5, -1.0, -1.0, 0.2], dtype=torch.float64)
    ids = torch.tensor([4, 4, 2, 2, 9])
    terms = torch.exp(-(log_ratio + log_z)) * f.generator(log_ratio + log_z)  # f(t)/t
    by_prompt = torch.stack([terms[:2].mean(), terms[2:4].mean(), terms[4]])
    got = estimate_to_target(log_ratio, ids, name, log_z=log_z)
    torch.testing.assert_close(got.value, by_prompt.mean())
    torch.testing.assert_close(got.standard_error, by_prompt.std(correction=1) / math.sqrt(3))


def test_one_prompt_has_the_error_of_its_samples():
    """With Z given the jackknife's standard error of a mean is s.d./√n."""
    log_ratio = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    zero = torch.zeros(40, dtype=torch.long)
    got = estimate_to_target(log_ratio, zero, "jensen_shannon", log_z=torch.zeros(40, dtype=torch.float64))
    alone = get_divergence("jensen_shannon").estimate(log_ratio, sampled_from="p")
    torch.testing.assert_close(tuple(got), tuple(alone))
    assert estimate_to_target(log_ratio, zero, "reverse_kl").standard_error > 0


def test_importance_weights_change_the_sampling_law_only():
    """Every outcome once, with weights π/q for a uniform q: Ẑ and the plug-in are exact, as is Z given."""
    log_pi = torch.log_softmax(torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64), 0)
    log_target = torch.tensor([1.0, 0.2, -0.4, 0.6], dtype=torch.float64)
    log_z = torch.logsumexp(log_target, 0)
    exact = get_divergence("forward_kl").exact(log_pi, log_target - log_z)
    got = estimate_to_target(
        log_pi - log_target, torch.zeros(4), "forward_kl", log_z=log_z.expand(4), log_weight=log_pi + math.log(4)
    )
    assert got.value.item() == pytest.approx(exact.item(), rel=1e-12)


def test_no_spread_means_no_divergence_whatever_z():
    log_ratio = torch.tensor([3.0, 3.0, 3.0, -50.0, -50.0, -50.0])
    for name in DIVERGENCES:
        value, error = estimate_to_target(log_ratio, torch.tensor([0, 0, 0, 1, 1, 1]), name)
        assert abs(value.item()) < 1e-12 and abs(error.item()) < 1e-12 and value.dtype == torch.float32


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
@pytest.mark.parametrize(("outcomes", "spread"), [(8, 0.5), (27, 0.7)])
def test_bias_and_coverage_at_four_samples(name, outcomes, spread):
    """160 prompts of 4 samples, log weights of s.d. ½ and 0.7: the plug-in is 15 to 35 % low, this within 5 %.

    All runs in one call per statistic: the mean of the estimate over 100 runs, and how often ± 1.96 s.e. covers.
    """
    f, generator, prompts, runs = get_divergence(name), torch.Generator().manual_seed(3), 160, 100
    size = (runs * prompts, outcomes)
    log_pi = torch.log_softmax(torch.randn(size, generator=generator, dtype=torch.float64), -1)
    log_target = log_pi + spread * torch.randn(size, generator=generator, dtype=torch.float64) + 5.0
    truth = f.exact(log_pi, torch.log_softmax(log_target, -1)).reshape(runs, prompts).mean(1)
    drawn = torch.multinomial(log_pi.exp(), 4, replacement=True, generator=generator)
    log_ratio = (log_pi - log_target).gather(1, drawn)
    ids = torch.arange(runs * prompts).repeat_interleave(4)
    values = estimate_by_prompt(log_ratio.flatten(), ids, f).value.reshape(runs, prompts)
    value, error = values.mean(1), values.std(1) / math.sqrt(prompts)
    assert abs((value.mean() / truth.mean()).item() - 1) < 0.05
    assert ((value - truth).abs() < 1.96 * error).double().mean().item() >= 0.9
    log_z = torch.logsumexp(-log_ratio, 1) - math.log(4)
    low = f.dual().generator(-(log_ratio + log_z[:, None])).mean()
    assert (low / truth.mean()).item() < 0.85, "the plug-in would have passed: this simulation shows nothing"
    first = estimate_to_target(log_ratio[:prompts].flatten(), ids[: 4 * prompts], name)
    assert first.value.item() == pytest.approx(value[0].item()) and first.standard_error.item() == pytest.approx(error[0].item())  # fmt: skip


# ---------------------------------------------------------------- targets with zeros
def test_hard_targets():
    """P = 0 on some samples: f(t)/t is f'(∞) there. Prompts with one supported sample or none are named."""
    inf = math.inf
    ids = torch.tensor([0] * 4 + [1] * 4)
    both = torch.tensor([0.0, 0.1, 0.2, inf, 0.0, -0.3, inf, inf])
    value, error = estimate_to_target(both, ids, "jensen_shannon")
    assert math.isfinite(value) and math.isfinite(error)
    assert estimate_to_target(both, ids, "reverse_kl").value.item() == inf
    with pytest.warns(
        UserWarning, match="of 2 prompts 0 have no sample with P > 0 .*, 1 have one and are not corrected"
    ):
        estimate_to_target(torch.tensor([0.0, 0.1, 0.2, inf, 0.0, inf, inf, inf]), ids, "jensen_shannon")
    with pytest.warns(UserWarning, match="of 2 prompts 1 have no sample with P > 0 and are left out"):
        some = estimate_to_target(torch.tensor([0.0, 0.1, 0.2, inf, inf, inf, inf, inf]), ids, "jensen_shannon")
    assert some.value == estimate_to_target(both[:4], ids[:4], "jensen_shannon").value
    with pytest.raises(ValueError, match="none of the 2 prompts has a sample with P > 0"):
        estimate_to_target(torch.full((8,), inf), ids, "jensen_shannon")
    # known Z: a filter that passes 1 of 20, four samples of the base, KL(p‖π) = log 20 in the mean
    filtered = torch.tensor([0.0] + [inf] * 19, dtype=torch.float64)
    log_z = torch.full((20,), math.log(1 / 20), dtype=torch.float64)
    got = estimate_to_target(filtered, torch.zeros(20), "forward_kl", log_z=log_z).value.item()
    assert got == pytest.approx(math.log(20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_ratio": torch.zeros(2, 2)}, "log_ratio has shape"),
        ({"log_ratio": torch.zeros(0), "prompt_ids": torch.zeros(0)}, "N > 0"),
        ({"prompt_ids": torch.zeros(3)}, r"prompt_ids has shape \(3,\), log_ratio \(4,\)"),
        ({"log_z": torch.zeros(3)}, "log_z has shape"),
        ({"log_weight": torch.zeros(5)}, "log_weight has shape"),
        ({"log_z": torch.tensor([0.0, 0.0, 0.0, math.inf])}, "log_z is not finite"),
        ({"log_ratio": torch.tensor([0.0, math.nan, 0.0, 0.0])}, "NaN or -inf"),
        ({"log_ratio": torch.tensor([0.0, -math.inf, 0.0, 0.0])}, "NaN or -inf"),
        ({"prompt_ids": torch.tensor([0, 0, 0, 5])}, r"prompt 5 has a single sample \(1 prompts do\)"),
        ({"divergence": "kl"}, "ambiguous"),
    ],
    ids=str,
)
def test_refusals(change, message):
    arguments = {"log_ratio": torch.zeros(4), "prompt_ids": torch.zeros(4), "divergence": "reverse_kl"} | change
    with pytest.raises(ValueError, match=message):
        estimate_to_target(**arguments)


def test_many_samples_of_a_prompt():
    """600 samples: blocks are left out. D of N(0.3, 1) to N(0, 1) is 0.045 in both directions of KL."""
    x = torch.randn(600, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.3
    got = estimate_to_target(0.3 * x - 0.045 + 7.0, torch.zeros(600), "reverse_kl")
    assert got.value.item() == pytest.approx(0.045, abs=4 * got.standard_error.item())
    # log t is normal with s.d. 0.3 and terms are near (log t)²/2: their s.d. is about 0.09/√2
    assert got.standard_error.item() == pytest.approx(0.09 / math.sqrt(2 * 600), rel=0.3)


# ---------------------------------------------------------------- what rests on it
def test_the_error_of_a_mean_is_over_prompts():
    """Equal values within a prompt: the error is that of the prompts, not of four times as many samples."""
    values = torch.tensor([1.0, 4.0, 2.0, 7.0], dtype=torch.float64)
    mean, error = clustered_mean(
        values.repeat_interleave(4), torch.ones(16).double(), torch.arange(4).repeat_interleave(4)
    )
    assert (mean, error) == pytest.approx((3.5, values.std().item() / 2))
    one = clustered_mean(values, torch.ones(4).double(), torch.zeros(4))
    assert one == pytest.approx((3.5, values.std().item() / 2))
    assert math.isnan(clustered_mean(values[:1], torch.ones(1), torch.zeros(1))[1])


def test_the_keys_of_prompts_survive_float32():
    keys = torch.tensor([2**62 + 5, -(2**62) - 9, -1, 0, 2**24, 3])
    columns = {name: column.float().double() for name, column in prompt_columns(keys).items()}
    ids = columns["prompt_low"] + columns["prompt_high"] * 2.0**24
    assert len(ids.unique()) == 6


def columns_of(log_ratio, ids, log_z):
    """Recorded columns of samples of the policy itself, unweighted."""
    zero = torch.zeros_like(log_ratio)
    skipped = torch.zeros_like(log_ratio)
    names = ("log_weight", "log_base", "log_policy", "entropy", "slope", "clipped", "clamped", "weight_capped")
    return {
        "log_t": log_ratio + log_z, "log_z": log_z, "skipped": skipped, "tokens": zero + 1, "score/s": log_ratio,
        **dict.fromkeys(names, zero), **prompt_columns(ids),
    }  # fmt: skip


def test_the_log_shows_the_estimate():
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(40, generator=generator, dtype=torch.float64)
    ids = torch.arange(10).repeat_interleave(4)
    log_z = torch.randn(10, generator=generator, dtype=torch.float64)[ids]
    f = get_divergence("squared_hellinger")
    metrics = f_dpg_metrics(columns_of(log_ratio, ids, log_z), f, ["s"])
    for name in ("forward_kl", "jensen_shannon", "squared_hellinger"):
        value, error = estimate_to_target(log_ratio, ids, name)
        assert metrics[f"divergence/{name}"] == pytest.approx(value.item(), rel=1e-9)
        assert metrics[f"divergence/{name}_se"] == pytest.approx(error.item(), rel=1e-9)
    assert metrics["divergence/uncorrected_fraction"] == 0.0
    means = log_ratio.reshape(10, 4).mean(1)
    assert metrics["score/s_se"] == pytest.approx(means.std().item() / math.sqrt(10), rel=1e-9)
    given = f_dpg_metrics(columns_of(log_ratio, ids, log_z), f, ["s"], exact_z=True)
    value = estimate_to_target(log_ratio, ids, "forward_kl", log_z=log_z).value.item()
    assert given["divergence/forward_kl"] == pytest.approx(value, rel=1e-9)


def test_the_log_is_null_where_most_prompts_cannot_be_corrected():
    log_ratio = torch.tensor([0.0, math.inf, math.inf, math.inf] * 3 + [0.0, 0.1, 0.2, 0.3]).double()
    metrics = f_dpg_metrics(columns_of(log_ratio, torch.arange(4).repeat_interleave(4), 0 * log_ratio.clamp(max=0)), get_divergence("jensen_shannon"), [])  # fmt: skip
    assert metrics["divergence/uncorrected_fraction"] == 0.75
    assert math.isnan(metrics["divergence/jensen_shannon"]) and math.isnan(metrics["divergence/forward_kl_se"])


def test_the_baseline_under_the_z_of_the_other_samples():
    """By hand for f′ = log t: b_i = mean over j ≠ i of (ℓ_j + log Ẑ_i); the whole coefficient is then free of Ẑ."""
    log_ratio = torch.tensor([0.4, -1.0, 0.2, 3.0, 5.0], dtype=torch.float64)
    groups = torch.tensor([1, 1, 1, 4, 4])
    log_z = PartitionEstimates("loo").update(groups, -log_ratio)
    got = leave_one_out_slopes(lambda log_t: log_t, log_ratio, log_z, groups)
    means = torch.tensor([-0.4, 0.3, -0.3, 5.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(got, means + log_z)
    none = leave_one_out_slopes(lambda log_t: log_t, log_ratio[:1], log_z[:1], groups[:1])
    assert none.tolist() == [0.0]
    skipped = leave_one_out_slopes(
        lambda log_t: log_t, log_ratio[:2], torch.tensor([-math.inf, 0.5]).double(), groups[:2]
    )
    assert skipped.tolist() == pytest.approx([0.0, 0.9])


def test_z_of_the_other_samples():
    """log Ẑ of row i is the log mean of P/q over the other rows of its prompt; −inf where they are all 0 or none."""
    log_importance = torch.tensor([0.0, math.log(3.0), -math.inf, 1.0, -math.inf, 0.5, -math.inf]).double()
    prompts = torch.tensor([8, 8, 8, 5, 5, 1, 5])
    got = PartitionEstimates("loo").update(prompts, log_importance)
    expected = [math.log(1.5), math.log(0.5), math.log(2.0), -math.inf, 0.5 - math.log(2) + 0.5, -math.inf]
    assert got[:4].tolist() == pytest.approx(expected[:4])
    assert got[4].item() == pytest.approx(1.0 - math.log(2.0)) and got[5].item() == -math.inf
    assert PartitionEstimates("loo", z_floor=0.1).update(prompts, log_importance)[3].item() == pytest.approx(math.log(0.1))  # fmt: skip
