"""The baselines: hand calculation, the defining formulas on random input, padding, and their limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from fdiv.alignment.f_dpo.loss import f_dpo_loss
from fdiv.divergences import get_divergence
from fdiv.unlearning import (
    ce_u,
    grad_ascent,
    grad_diff,
    idk_dpo,
    jensun,
    nll,
    npo,
    pdu,
    rmu,
    sampled_divergence,
    sat_imp,
    shred,
    simnpo,
    undial,
    vocabulary_divergence,
    wga,
)
from fdiv.unlearning.losses import answer_mean, answer_weights, balance_scale
from fdiv.unlearning.vocabulary_losses import shred_positions, shred_target

HALF = math.log(0.5)


def rows(*probabilities):
    """Token log-probs of one answer, float64, with its all-ones mask."""
    log_probs = torch.tensor([probabilities], dtype=torch.float64).log()
    return log_probs, torch.ones_like(log_probs)


# --------------------------------------------------------------------------------------------------- by hand


def test_gradient_ascent_and_nll_by_hand():
    answer = rows(0.5, 0.125)
    assert grad_ascent(*answer).item() == pytest.approx(2 * HALF)
    assert nll(*answer).item() == pytest.approx(-2 * HALF)


def test_grad_diff_by_hand():
    """γ·mean log p_f − α·mean log p_r = 1·(−0.693) + 5·0.693 = 4·0.693"""
    loss = grad_diff(*rows(0.5), *rows(0.25, 1.0), forget_weight=1.0, retain_weight=5.0)
    assert loss.item() == pytest.approx(-4 * HALF)


def test_npo_by_hand():
    """At P = Q: −(2/β)·log ½; at log-ratio −10/β it is nearly 0; slope at P = Q is 1."""
    ratio = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = npo(ratio, beta=0.1)
    assert loss.item() == pytest.approx(20 * math.log(2))
    loss.backward()
    assert ratio.grad.item() == pytest.approx(1.0)
    assert npo(torch.tensor([-100.0]), beta=0.1).item() == pytest.approx(20 * math.log1p(math.exp(-10)), rel=1e-5)


def test_npo_tends_to_gradient_ascent_as_beta_vanishes():
    """NPO − (2/β) log 2 → log-ratio (Zhang et al. 2024, Prop. 1)."""
    ratio, beta = torch.tensor([1.5, -2.0], dtype=torch.float64), 1e-5
    torch.testing.assert_close(npo(ratio, beta) - 2 / beta * math.log(2), ratio, atol=1e-4, rtol=0)


def test_simnpo_by_hand():
    """nll = 2·log 2 over two tokens of p = ¼ each; δ = nll makes it −(2/β)·log ½."""
    answer = rows(0.25, 0.25)
    assert simnpo(*answer, beta=4.5, delta=2 * math.log(2)).item() == pytest.approx(2 / 4.5 * math.log(2))
    expected = -2 / 2.0 * math.log(1 / (1 + math.exp(-2.0 * (2 * math.log(2) - 0.5))))
    assert simnpo(*answer, beta=2.0, delta=0.5).item() == pytest.approx(expected)


def test_idk_dpo_is_tofu_dpo_for_reverse_kl():
    chosen, rejected, beta = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 3.0]).double(), 0.1
    expected = -F.logsigmoid(beta * (chosen - rejected)) * 2 / beta
    torch.testing.assert_close(idk_dpo(chosen, rejected, "reverse_kl", beta), expected)


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", {"name": "alpha", "alpha": 0.5}])
def test_idk_dpo_takes_every_f_dpo_divergence(divergence):
    chosen, rejected = torch.tensor([0.3]), torch.tensor([-0.7])
    expected = 20 * f_dpo_loss(chosen, rejected, divergence, 0.1)
    torch.testing.assert_close(idk_dpo(chosen, rejected, divergence, 0.1), expected)


def test_wga_by_hand():
    """Weights p^β: (0.5·log 0.5 + 0.25·log 0.25)/2 at β = 1; gradient p/|y| since the weight is detached."""
    log_probs, mask = rows(0.5, 0.25)
    log_probs.requires_grad_()
    loss = wga(log_probs, mask)
    assert loss.item() == pytest.approx((0.5 * HALF + 0.25 * 2 * HALF) / 2)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert gradient[0].tolist() == pytest.approx([0.25, 0.125])
    torch.testing.assert_close(wga(log_probs, mask, beta=0.0), grad_ascent(log_probs, mask))


def test_sat_imp_by_hand():
    """p = ½: ½⁵·½·log ½; p = 1 and p = 0 weigh nothing; β₁ = 1, β₂ = 0 is WGA."""
    assert sat_imp(*rows(0.5)).item() == pytest.approx(0.5**6 * HALF)
    log_probs = torch.tensor([[0.0, -1e4]], requires_grad=True)
    loss = sat_imp(log_probs, torch.ones(1, 2), beta1=5, beta2=1)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert loss.item() == 0 and gradient[0].tolist() == [0.0, 0.0]
    answer = rows(0.3, 0.7)
    torch.testing.assert_close(sat_imp(*answer, beta1=1.0, beta2=0.0), wga(*answer))


def test_jensun_by_hand():
    """JS in the registry's scale: p = 1 on the target costs 0, p → 0 costs f(0) + f'(∞) = log 2 + log 2."""
    assert jensun(*rows(1.0)).item() == pytest.approx(0.0, abs=1e-12)
    assert jensun(torch.tensor([[-60.0]]), torch.ones(1, 1)).item() == pytest.approx(2 * math.log(2), rel=1e-6)
    # p = ½ against one-hot, summed over the two outcomes: ½·log(½/¾) + 1·log(1/¾) + ½·log(½/¼)
    by_hand = 0.5 * math.log(0.5 / 0.75) + math.log(1 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert jensun(*rows(0.5)).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("name", ["jensen_shannon", "squared_hellinger", "forward_kl", "total_variation", "le_cam"])
def test_jensun_equals_the_exact_divergence_from_one_hot(name):
    torch.manual_seed(0)
    log_p = torch.randn(1, 6, 11, dtype=torch.float64).log_softmax(-1)
    target = torch.randint(11, (1, 6))
    log_q = torch.full_like(log_p, -math.inf).scatter(-1, target[..., None], 0.0)
    expected = get_divergence(name).exact(log_p, log_q).mean(-1)
    torch.testing.assert_close(jensun(log_p.gather(-1, target[..., None])[..., 0], torch.ones(1, 6), name), expected)


def test_rmu_by_hand():
    """Mean over D of (h − target)²: ((1−0)² + (3−0)²)/2 = 5 at the one answer token."""
    hidden = torch.tensor([[[1.0, 3.0], [100.0, math.inf]]], requires_grad=True)
    loss = rmu(hidden, torch.zeros(2), torch.tensor([[1, 0]]))
    assert loss.tolist() == [5.0]


def test_pdu_by_hand():
    """z = (3, 0, 0): (3 − 1)² = 4."""
    logits = torch.tensor([[[3.0, 0.0, 0.0], [9.0, 0.0, 0.0]]])
    assert pdu(logits, torch.tensor([[1, 0]])).tolist() == [4.0]


def test_undial_by_hand():
    """Reference (log 3, 0), β = log 3 on token 0 makes the target (½, ½); uniform policy: CE = log 2."""
    reference = torch.tensor([[[math.log(3), 0.0]]])
    loss = undial(torch.zeros(1, 1, 2), reference, torch.tensor([[0]]), torch.ones(1, 1), beta=math.log(3))
    assert loss.item() == pytest.approx(math.log(2))


def test_ce_u_by_hand():
    """Three equal logits, answer token out: target (0, ½, ½), CE against the uniform policy is log 3; first skipped."""
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    tokens, mask = torch.tensor([[0, 0]]), torch.ones(1, 2)
    loss = ce_u(logits, tokens, mask)
    assert loss.item() == pytest.approx(math.log(3))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (gradient[0, 0] == 0).all()  # the first answer token is left out
    # p − target, the target detached: (⅓ − 0, ⅓ − ½, ⅓ − ½)
    assert gradient[0, 1].tolist() == pytest.approx([1 / 3, -1 / 6, -1 / 6], abs=1e-6)
    assert ce_u(logits, tokens, torch.tensor([[1, 0]])).tolist() == [0.0]  # nothing left after the skip


def test_the_first_token_can_have_a_share_of_its_own():
    """Values 8, 2, 4 with a share of ½: 8/2 + (2 + 4)/4 = 5.5; one token alone has it all, none gives 0."""
    values = torch.tensor([[8.0, 2.0, 4.0], [math.nan, 6.0, math.nan], [math.nan] * 3], requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]])
    assert answer_mean(values, mask, 0.5).tolist() == [5.5, 6.0, 0.0]
    assert answer_mean(values, mask).tolist() == pytest.approx([14 / 3, 6.0, 0.0])
    assert answer_weights(mask, 0.2).tolist() == [pytest.approx([0.2, 0.4, 0.4]), [0, 1, 0], [0, 0, 0]]
    (gradient,) = torch.autograd.grad(answer_mean(values, mask, 0.5).sum(), values)
    assert gradient.tolist() == [[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_jensun_with_a_share_for_the_first_token_by_hand():
    """p = 1 on the first target costs 0, p = ½ on the second what it cost above: ½·0 + ½·c."""
    c = 0.5 * math.log(0.5 / 0.75) + math.log(1 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert jensun(*rows(1.0, 0.5), first_share=0.5).item() == pytest.approx(c / 2)
    assert jensun(*rows(1.0, 0.5, 0.5), first_share=0.2).item() == pytest.approx(0.8 * c)


def test_balance_scale_by_hand():
    """3/(4 + 1e-5); equal norms are left alone; nothing to push against is capped at 1e6."""
    retain, forget = torch.tensor([3.0, 2.0, 1e9, 0.0]), torch.tensor([4.0, 2.0, 0.0, 1.0])
    assert balance_scale(retain, forget).tolist() == pytest.approx([3 / 4.00001, 1.0, 1e6, 0.0])


def test_shred_target_is_the_figures():
    """The example of the method's figure: top-5 probabilities .77, .12, .05, .03, .03 of "Films", "Prod", "Pict" …; without
    "Films" .52, .22, .13, .13; without the nucleus of .9 the two others, ½ each. A kept position stays."""
    p = torch.tensor([[0.77, 0.12, 0.05, 0.03, 0.03]] * 2).log()
    token, demoted = torch.tensor([0, 0]), torch.tensor([True, False])
    alone, kept = shred_target(p, token, demoted)
    assert alone.tolist() == pytest.approx([0, 0.12 / 0.23, 0.05 / 0.23, 0.03 / 0.23, 0.03 / 0.23])
    assert [round(value, 2) for value in alone.tolist()] == [0.0, 0.52, 0.22, 0.13, 0.13]
    assert kept.tolist() == pytest.approx([0.77, 0.12, 0.05, 0.03, 0.03])
    assert shred_target(p, token, demoted, nucleus=0.9)[0].tolist() == pytest.approx([0, 0, 0, 0.5, 0.5])
    assert shred_target(p, token, demoted, nucleus=0.9)[1].tolist() == pytest.approx(kept.tolist())


def test_shred_target_cut_to_the_top_and_when_nothing_is_left():
    p = torch.tensor([[0.5, 0.3, 0.1, 0.1 - 1e-3, 1e-3]]).log()
    yes = torch.tensor([True])
    assert shred_target(p, torch.tensor([1]), yes, top_k=3)[0].tolist() == pytest.approx([5 / 6, 0, 1 / 6, 0, 0])
    # The row's own token is not among the k: nothing to take out of them.
    assert shred_target(p, torch.tensor([4]), yes, top_k=2)[0].tolist() == pytest.approx([5 / 8, 3 / 8, 0, 0, 0])
    # A nucleus that holds all k: the least likely of them that is not the answer's stays.
    assert shred_target(p, torch.tensor([1]), yes, nucleus=0.95, top_k=2)[0].tolist() == pytest.approx([1, 0, 0, 0, 0])
    assert shred_target(p, torch.tensor([0]), yes, nucleus=0.95, top_k=2)[0].tolist() == pytest.approx([0, 1, 0, 0, 0])


def test_shred_positions_by_hand():
    """⌊P·n⌋ of the least likely answer tokens, one at least: of 5, 2 at ½; of 3, 1; all at P = 1; ties go to the earlier."""
    log_p = torch.tensor([[-9.0, -1.0, -3.0, -2.0, -3.0, -0.5, -99.0]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0]])
    assert shred_positions(log_p, mask, 0.5).int().tolist() == [[0, 0, 1, 0, 1, 0, 0]]
    assert shred_positions(log_p, mask, 0.2).int().tolist() == [[0, 0, 1, 0, 0, 0, 0]]
    assert shred_positions(log_p, mask, 0.01).int().tolist() == [[0, 0, 1, 0, 0, 0, 0]]
    assert shred_positions(log_p, mask, 0.6).int().tolist() == [[0, 0, 1, 1, 1, 0, 0]]
    assert shred_positions(log_p, mask, 1.0).int().tolist() == mask.tolist()
    assert shred_positions(log_p, torch.zeros_like(mask), 0.5).sum() == 0


def test_shred_by_hand():
    """Two answer tokens of a two-token vocabulary, frozen p = (¼, ¾) and (¾, ¼), tokens 0 and 0: the first is less likely,
    so its target is (0, 1), the other keeps (¾, ¼). Policy uniform: (log 2 + [¾ log ¾ + ¼ log ¼ + log 2])/2."""
    frozen = torch.tensor([[[0.25, 0.75], [0.75, 0.25]]]).log()
    logits = torch.zeros(1, 2, 2, requires_grad=True)
    tokens, mask = torch.tensor([[0, 0]]), torch.ones(1, 2)
    loss = shred(logits, frozen, tokens, mask, 0.5)
    kept = 0.75 * math.log(0.75) + 0.25 * math.log(0.25) + math.log(2)
    assert loss.item() == pytest.approx((math.log(2) + kept) / 2)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient[0].tolist() == [pytest.approx([0.25, -0.25]), pytest.approx([-0.125, 0.125])]  # (p − q)/2
    # Where the policy is the target the loss is 0.
    at_target = torch.tensor([[[-60.0, 0.0], [math.log(0.75), math.log(0.25)]]])
    assert shred(at_target, frozen, tokens, mask, 0.5).item() == pytest.approx(0.0, abs=1e-6)


# --------------------------------------------------------------------------- the defining formulas, token by token


@pytest.fixture
def batch():
    """Logits of two models with prompt and padding around the answers, and per-row references to slice with."""
    torch.manual_seed(1)
    b, t, v = 3, 7, 13
    spans = [(2, 5), (1, 7), (3, 4)]
    mask = torch.zeros(b, t, dtype=torch.bool)
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = True
    logits, reference = torch.randn(2, b, t, v, dtype=torch.float32)
    logits[0, 5:], reference[0, 5:] = math.nan, math.nan  # what stands in padding must not matter
    return logits, reference, torch.randint(v, (b, t)), mask, spans


def test_undial_formula(batch):
    logits, reference, tokens, mask, spans = batch
    expected = []
    for row, (start, end) in enumerate(spans):
        z = reference[row, start:end] - 10 * F.one_hot(tokens[row, start:end], 13)
        expected.append(F.cross_entropy(logits[row, start:end], z.softmax(-1)))
    torch.testing.assert_close(undial(logits, reference, tokens, mask, 10.0), torch.stack(expected))


@pytest.mark.parametrize(("share", "nucleus", "top_k"), [(0.5, 0.0, None), (1.0, 0.4, None), (0.34, 0.2, 6)])
def test_shred_formula(batch, share, nucleus, top_k):
    """Against loops over positions and tokens."""
    logits, reference, tokens, mask, spans = batch
    expected = []
    for row, (start, end) in enumerate(spans):
        p = reference[row, start:end].softmax(-1)
        own = p[torch.arange(end - start), tokens[row, start:end]]
        demoted = set(own.argsort(stable=True)[: max(1, math.floor(share * (end - start)))].tolist())
        total = 0.0
        for place in range(end - start):
            order = p[place].argsort(descending=True).tolist()
            q = {v: p[place, v].item() for v in order[:top_k]}
            norm = sum(q.values())
            if place in demoted:
                held, gone = 0.0, {tokens[row, start + place].item()}
                for v in order[:top_k]:
                    if held < nucleus:
                        gone.add(v)
                    held += q[v] / norm
                q = {v: value for v, value in q.items() if v not in gone}
            norm = sum(q.values())
            log_p = logits[row, start + place].log_softmax(-1)
            total += sum(value / norm * (math.log(value / norm) - log_p[v].item()) for v, value in q.items())
        expected.append(total / (end - start))
    actual = shred(logits, reference, tokens, mask, share, nucleus=nucleus, top_k=top_k)
    assert actual.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
def test_vocabulary_divergence_with_a_share_for_the_first_token(batch, name):
    logits, reference, _, mask, spans = batch
    actual = vocabulary_divergence(logits, reference, mask, name, first_share=0.5)
    for row, (start, end) in enumerate(spans):
        pair = (part[row, start:end].log_softmax(-1) for part in (logits, reference))
        each = get_divergence(name).exact(*pair)
        expected = each[0] if end - start == 1 else each[0] / 2 + each[1:].mean() / 2
        assert actual[row].item() == pytest.approx(expected.item(), rel=1e-5)


def test_ce_u_formula(batch):
    logits, _, tokens, mask, spans = batch
    expected = []
    for row, (start, end) in enumerate(spans):
        z = logits[row, start + 1 : end]
        target = z.masked_fill(F.one_hot(tokens[row, start + 1 : end], 13).bool(), -math.inf).softmax(-1)
        expected.append(F.cross_entropy(z, target) if end - start > 1 else torch.tensor(0.0))
    torch.testing.assert_close(ce_u(logits, tokens, mask), torch.stack(expected))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_vocabulary_divergence_formula(batch, name):
    logits, reference, _, mask, spans = batch
    definitions = {
        "forward_kl": lambda p, q: (q * (q / p).log()).sum(-1),
        "reverse_kl": lambda p, q: (p * (p / q).log()).sum(-1),
        "jensen_shannon": lambda p, q: (p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log()).sum(-1),
        "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
    }
    expected = [
        definitions[name](logits[row, s:e].softmax(-1), reference[row, s:e].softmax(-1)).mean()
        for row, (s, e) in enumerate(spans)
    ]
    torch.testing.assert_close(
        vocabulary_divergence(logits, reference, mask, name), torch.stack(expected), atol=1e-6, rtol=1e-5
    )


def test_kl_retain_does_not_count_prompt_or_padding(batch):
    """Changing the logits outside the answers changes neither value nor gradient (the quirk of the KL term elsewhere)."""
    logits, reference, _, mask, _ = batch
    other = torch.where(mask[..., None], logits, torch.randn_like(logits))
    torch.testing.assert_close(
        vocabulary_divergence(other, reference, mask, "forward_kl"),
        vocabulary_divergence(logits, reference, mask, "forward_kl"),
    )
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(vocabulary_divergence(leaf, reference, mask, "forward_kl").sum(), leaf)
    assert torch.isfinite(gradient).all() and (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()


def test_sampled_divergence_is_unbiased_for_tokens_of_the_reference():
    """Weighted by Q over all tokens, the per-token terms add up to the exact divergence."""
    torch.manual_seed(2)
    log_p, log_q = torch.randn(2, 9, dtype=torch.float64).log_softmax(-1)
    terms = sampled_divergence((log_p - log_q)[:, None], torch.ones(9, 1), "jensen_shannon")
    exact = get_divergence("jensen_shannon").exact(log_p, log_q)
    torch.testing.assert_close((log_q.exp() * terms).sum(), exact)


TOKEN_LOSSES = {
    "grad_ascent": grad_ascent,
    "nll": nll,
    "simnpo": simnpo,
    "wga": wga,
    "sat_imp": sat_imp,
    "jensun": jensun,
    "jensun, first token": lambda log_probs, mask: jensun(log_probs, mask, first_share=0.5),
    "sampled": lambda log_probs, mask: sampled_divergence(log_probs, mask, "reverse_kl"),
}


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_padding_and_batching_change_nothing(name):
    loss = TOKEN_LOSSES[name]
    torch.manual_seed(3)
    log_probs = -torch.rand(2, 4) * 3
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    padded = torch.cat([torch.full((2, 3), math.nan), log_probs], 1).requires_grad_()
    wide = torch.cat([torch.zeros(2, 3, dtype=torch.long), mask], 1)
    value = loss(padded, wide)
    one_by_one = torch.cat(
        [loss(log_probs[i : i + 1, : int(mask[i].sum())], torch.ones(1, int(mask[i].sum()))) for i in (0, 1)]
    )
    torch.testing.assert_close(value, one_by_one)
    (gradient,) = torch.autograd.grad(value.sum(), padded)
    assert torch.isfinite(gradient).all() and (gradient[wide == 0] == 0).all()
    assert loss(log_probs.bfloat16(), mask).dtype == torch.float32


@pytest.mark.parametrize("name", ["wga", "sat_imp", "jensun", "simnpo", "grad_ascent"])
def test_float64_gradients(name):
    torch.manual_seed(4)
    log_probs = (-torch.rand(2, 3, dtype=torch.float64) * 3).requires_grad_()
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    if name in ("wga", "sat_imp"):  # weights are detached by definition, so the gradient is w/|y|, not d(loss)
        p = log_probs.detach().exp()
        weight = p if name == "wga" else p**5 * (1 - p)
        (gradient,) = torch.autograd.grad(TOKEN_LOSSES[name](log_probs, mask).sum(), log_probs)
        torch.testing.assert_close(gradient, weight * mask / mask.sum(-1, keepdim=True))
    else:
        assert torch.autograd.gradcheck(lambda x: TOKEN_LOSSES[name](x, mask), (log_probs,))


# ------------------------------------------------------------------------------------------------------ refusals


def test_invalid_arguments():
    with pytest.raises(ValueError, match="beta=0"):
        npo(torch.zeros(1), beta=0)
    with pytest.raises(ValueError, match="beta=-1"):
        simnpo(*rows(0.5), beta=-1)
    with pytest.raises(ValueError, match="pearson_chi2"):
        idk_dpo(torch.zeros(1), torch.zeros(1), "pearson_chi2")
    with pytest.raises(ValueError, match=r"reverse_kl has f'\(∞\) = ∞"):
        jensun(*rows(0.5), "reverse_kl")
    with pytest.raises(ValueError, match="beta2=-1"):
        sat_imp(*rows(0.5), beta2=-1)
    with pytest.raises(ValueError, match="skip_first=-1"):
        ce_u(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), -1)
