"""Divergences over the vocabulary from hidden states, against dense float64 autograd of `Divergence.exact`."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fdiv.divergences import Divergence, gated, get_distance, get_divergence
from fdiv.divergences.distances import Combined
from fdiv.models import vocabulary
from fdiv.models.selected import cell_log_probs
from fdiv.models.vocabulary import (
    Head,
    logits_divergence,
    score_topk,
    score_vocabulary,
    top_tokens,
    topk_divergence,
    topk_vocabulary_divergence,
    vocabulary_divergence,
)
from tests.divergences.reference import IDS, REFERENCES

MADE = {
    "scaled": lambda: get_divergence("jeffreys").scaled(0.3),
    "sum": lambda: get_divergence("reverse_kl") + get_divergence("total_variation").scaled(2.0),
    "dual": lambda: get_divergence("chi2_kl").dual(),
    "normalized": lambda: get_divergence("le_cam").normalized() + get_divergence("squared_hellinger"),
    "own": lambda: Divergence.from_generator("cubic", lambda x: torch.exp(3 * x) - x),
    "own_dual": lambda: Divergence.from_generator("cubic", lambda x: torch.exp(3 * x) - x).dual(),
    "extreme_alpha": lambda: get_divergence({"name": "alpha", "alpha": 1e-6}),
    "extreme_skew": lambda: get_divergence({"name": "skew_jensen_shannon", "weight": 1 - 1e-6}),
}
ALL = [
    *[pytest.param(lambda s=r.spec: get_divergence(s), id=i) for r, i in zip(REFERENCES, IDS, strict=True)],
    *[pytest.param(make, id=name) for name, make in MADE.items()],
]
ENTROPY_GAP, TEACHER_ENTROPY, HEAD_TAIL = (
    {"name": "entropy_gap", "width": 0.3},
    {"name": "teacher_entropy", "threshold": 4.5},
    {"name": "head_tail", "mass": 0.5},
)
# Members without an f.
DISTANCES = {
    "cauchy_schwarz": lambda: get_distance("cauchy_schwarz"),
    "entropy_gap": lambda: gated("forward_kl", "reverse_kl", ENTROPY_GAP),
    "teacher_entropy": lambda: gated("jeffreys", "reverse_kl", TEACHER_ENTROPY),
    "head_tail": lambda: gated({"name": "alpha", "alpha": 0.3}, "pearson_chi2", HEAD_TAIL),
    "gated_twice": lambda: gated("cauchy_schwarz", gated("le_cam", "total_variation", ENTROPY_GAP), HEAD_TAIL),
    "with_an_f": lambda: get_distance("cauchy_schwarz").scaled(0.5) + get_divergence("forward_kl"),
}
WHOLE = [*ALL, *[pytest.param(make, id=name) for name, make in DISTANCES.items()]]
SIX = ["reverse_kl", "forward_kl", "jensen_shannon", "pearson_chi2", "neyman_chi2", "le_cam"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows and tiles of a few columns, neither of which divides the sizes used here."""
    monkeypatch.setattr(vocabulary, "_BLOCK", 2000)
    monkeypatch.setattr(vocabulary, "_TILE", 900)


def models(rows=23, vocabulary=301, width=8, teacher_width=12, spread=1.0, seed=0, dtype=torch.float64):
    """(hidden_p, head_p, bias_p), (hidden_q, head_q, bias_q): two random models over one vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def one(h):
        return [spread * random(rows, h), random(vocabulary, h) / math.sqrt(h) * 2, random(vocabulary)]

    return [part.to(dtype) for part in one(width)], [part.to(dtype) for part in one(teacher_width)]


def log_softmax(hidden, weight, bias=None, temperature=1.0, scale=1.0, softcap=None):
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    logits = logits * scale
    if softcap is not None:
        logits = torch.where(torch.isneginf(logits), logits, softcap * torch.tanh(logits / softcap))
    return (logits / temperature).log_softmax(-1)


def gradients(value, leaves, upstream):
    return torch.autograd.grad(value, leaves, upstream.to(value.dtype), allow_unused=True)


def assert_near(got, expected, relative):
    """Within `relative` of the largest element: what float32 keeps of sums."""
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=relative * expected.abs().max().item())


# ------------------------------------------------------------------------------------------------------- the registry
@pytest.mark.parametrize("make", ALL)
def test_mass_and_its_derivative_are_the_terms_of_exact(make):
    """Over 10 orders of magnitude of P and of P/Q, and at the ends; the derivative also as P·f'(P/Q)."""
    divergence = make()
    log_q = torch.linspace(-25.0, -0.1, 23, dtype=torch.float64).repeat_interleave(28)
    log_t = torch.linspace(-20.0, 20.0, 28, dtype=torch.float64).repeat(23)
    log_p = (log_q + log_t).requires_grad_()
    term = divergence.exact(log_p.unsqueeze(-1), log_q.unsqueeze(-1))
    (slope,) = torch.autograd.grad(term.sum(), log_p)
    total = (log_p.exp() + log_q.exp()).detach()
    for got, expected in (
        (divergence.mass(log_p, log_q), term),
        (divergence.mass_derivative(log_p, log_q), slope),
        (divergence.mass_derivative(log_p, log_q), log_p.exp() * divergence.derivative(log_t)),
    ):
        error = (got - expected).detach().abs()
        assert (error <= 1e-9 * expected.detach().abs() + 1e-9 * total).all(), error.max()


@pytest.mark.parametrize("make", ALL)
def test_mass_derivative_where_one_side_is_empty(make):
    divergence, none, some = make(), torch.tensor(-math.inf), torch.tensor(math.log(0.2))
    slope = divergence.slope_at_infinity
    assert divergence.mass_derivative(some, none).item() == pytest.approx(0 if math.isinf(slope) else 0.2 * slope)
    assert divergence.mass_derivative(none, some) == 0
    assert divergence.mass_derivative(none, none) == 0
    assert divergence.mass(none, none) == 0
    for p, q in ((some, none), (none, some)):
        assert divergence.mass(p, q).item() == pytest.approx(divergence.exact(p.unsqueeze(0), q.unsqueeze(0)).item())


@pytest.mark.parametrize("make", ALL)
def test_far_apart_the_mass_is_finite_and_capped_as_the_registry_caps_it(make):
    divergence = make()
    log_p = torch.tensor([-0.1, -500.0, -90.0, -1e4, -0.0, -300.0])
    log_q = torch.tensor([-500.0, -0.1, -0.2, -1e-3, -1e4, -301.0])
    for got, expected in (
        (divergence.mass(log_p, log_q), divergence.exact(log_p.unsqueeze(-1), log_q.unsqueeze(-1))),
        (divergence.mass_derivative(log_p, log_q), slope_of_exact(divergence, log_p, log_q)),
    ):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


def slope_of_exact(divergence, log_p, log_q):
    log_p = log_p.clone().requires_grad_()
    return torch.autograd.grad(divergence.exact(log_p.unsqueeze(-1), log_q.unsqueeze(-1)).sum(), log_p)[0]


# ------------------------------------------------------------------------------------------------------- the whole head
def test_a_distance_that_is_an_f_gives_that_fs_numbers():
    """A sum with a second f, once in the registry and once as distances."""
    student, teacher = models(dtype=torch.float64)
    leaves = [part.requires_grad_() for part in student[:2]]
    f = get_divergence("jeffreys") + get_divergence("le_cam").scaled(0.3)
    as_distances = Combined([(1.0, gated("jeffreys", "le_cam", {"name": "teacher_entropy", "threshold": 0.0}))])
    as_distances = as_distances + get_divergence("le_cam").scaled(0.3)
    one, other = (vocabulary_divergence(*leaves, *teacher[:2], member) for member in (f, as_distances))
    torch.testing.assert_close(one, other)
    upstream = torch.linspace(-1.0, 1.0, len(one), dtype=torch.float64)
    for a, b in zip(gradients(one, leaves, upstream), gradients(other, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b)


def test_the_gate_comes_with_the_scores(small_blocks):
    student, teacher = models()
    heads = [Head(weight, bias) for _, weight, bias in (student, teacher)]
    ids = torch.zeros(23, dtype=torch.long)
    member = gated("forward_kl", "reverse_kl", ENTROPY_GAP)
    scores = score_vocabulary(student[0], heads[0], teacher[0], heads[1], ids, member)
    torch.testing.assert_close(scores.gate, torch.sigmoid((scores.entropy_q - scores.entropy_p) / 0.3))
    assert scores.gate.min() < 0.4 and scores.gate.max() > 0.6
    assert score_vocabulary(student[0], heads[0], teacher[0], heads[1], ids, "reverse_kl").gate is None


@pytest.mark.parametrize("make", DISTANCES.values(), ids=DISTANCES)
def test_top_k_is_refused_where_it_would_bound_nothing(make):
    student, teacher = models()
    for call in (
        lambda: topk_divergence(log_softmax(*student[:2]), top_of(teacher, 4), make()),
        lambda: topk_vocabulary_divergence(*student[:2], top_of(teacher, 4), make()),
    ):
        with pytest.raises(ValueError, match="no lower bound of the whole"):
            call()


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("make", WHOLE)
def test_values_and_gradients_are_those_of_dense_float64(make, spread, small_blocks):
    divergence = make()
    student, teacher = models(spread=spread)
    upstream = torch.linspace(-1.0, 2.0, len(student[0]), dtype=torch.float64)
    leaves = [part.requires_grad_() for part in student]
    dense = divergence.exact(log_softmax(*leaves), log_softmax(*teacher))
    expected = gradients(dense, leaves, upstream)

    ours = [part.detach().float().requires_grad_() for part in student]
    hidden, weight, bias = (part.float() for part in teacher)
    value = vocabulary_divergence(ours[0], ours[1], hidden, weight, divergence, bias_p=ours[2], bias_q=bias)
    torch.testing.assert_close(value.double(), dense, rtol=3e-5, atol=2e-6)
    for got, exact in zip(gradients(value, ours, upstream), expected, strict=True):
        assert_near(got, exact, 2e-4)


@pytest.mark.parametrize("name", [*SIX, *(make() for make in DISTANCES.values())], ids=str)
def test_a_frozen_head_gives_the_same_gradient_in_one_pass(name, small_blocks):
    student, teacher = models(dtype=torch.float64)
    hidden = student[0].clone().requires_grad_()
    upstream = torch.linspace(-1.0, 1.0, len(hidden), dtype=torch.float64)
    whole = [part.clone().requires_grad_() for part in student[:2]]
    both = gradients(vocabulary_divergence(*whole, *teacher[:2], name), whole, upstream)
    alone = gradients(vocabulary_divergence(hidden, student[1], *teacher[:2], name), [hidden], upstream)
    head = student[1].clone().requires_grad_()
    frozen_body = gradients(vocabulary_divergence(student[0], head, *teacher[:2], name), [head], upstream)
    torch.testing.assert_close(alone[0], both[0])
    torch.testing.assert_close(frozen_body[0], both[1])


@pytest.mark.parametrize("name", ["jensen_shannon", "chi2_kl", "total_variation", "cauchy_schwarz"])
@pytest.mark.parametrize("frozen", [False, True], ids=["head trained", "head frozen"])
def test_temperature_scale_and_soft_cap(name, frozen, small_blocks):
    divergence = get_distance(name)
    student, teacher = models()
    options = {"temperature": 1.7, "scale": 0.6, "softcap": 4.0}
    upstream = torch.ones(len(student[0]), dtype=torch.float64)
    leaves = [part.requires_grad_() for part in (student if not frozen else student[:1])]
    dense = divergence.exact(
        log_softmax(*student, **options), log_softmax(*teacher, temperature=1.7, scale=1.3, softcap=3.0)
    )
    value = vocabulary_divergence(
        student[0], student[1], teacher[0], teacher[1], name, temperature=1.7, bias_p=student[2], bias_q=teacher[2],
        scale_p=0.6, scale_q=1.3, softcap_p=4.0, softcap_q=3.0,
    )  # fmt: skip
    torch.testing.assert_close(value, dense)
    for got, exact in zip(gradients(value, leaves, upstream), gradients(dense, leaves, upstream), strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("soft", [None, 5.0])
@pytest.mark.parametrize(
    "name", [*SIX, "squared_hellinger", "total_variation", *(make() for make in DISTANCES.values())], ids=str
)
def test_tokens_outside_the_vocabulary(name, soft, small_blocks):
    """−inf on both sides drops a token; on one side its limit counts, and gradients stay finite."""
    divergence = get_distance(name)
    student, teacher = models()
    padded = [torch.zeros(301, dtype=torch.float64) for _ in range(2)]
    for bias in padded:
        bias[290:] = -math.inf
    caps = {"softcap_p": soft, "softcap_q": soft}
    both = vocabulary_divergence(*student[:2], *teacher[:2], name, bias_p=padded[0], bias_q=padded[1], **caps)
    cut = vocabulary_divergence(student[0], student[1][:290], teacher[0], teacher[1][:290], name, **caps)
    torch.testing.assert_close(both, cut)

    hidden = student[0].clone().requires_grad_()
    for sides in ({"bias_p": padded[0]}, {"bias_q": padded[1]}):
        value = vocabulary_divergence(hidden, student[1], teacher[0], teacher[1], name, **sides, **caps)
        dense = divergence.exact(
            log_softmax(hidden, student[1], sides.get("bias_p"), softcap=soft),
            log_softmax(*teacher[:2], sides.get("bias_q"), softcap=soft),
        )
        torch.testing.assert_close(value, dense)
        ones = torch.ones_like(value)
        torch.testing.assert_close(gradients(value, [hidden], ones)[0], gradients(dense, [hidden], ones)[0])


@pytest.mark.parametrize("name", [*SIX, *(make() for make in DISTANCES.values())], ids=str)
def test_half_precision_is_multiplied_out_in_float32(name, small_blocks):
    student, teacher = models(dtype=torch.bfloat16)
    exact = [[part.double().requires_grad_() for part in side] for side in (student, teacher)]
    dense = get_distance(name).exact(log_softmax(*exact[0][:2]), log_softmax(*exact[1][:2]))
    leaves = [part.requires_grad_() for part in student[:2]]
    value = vocabulary_divergence(*leaves, *teacher[:2], name)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), dense, rtol=3e-5, atol=2e-6)
    ones = torch.ones(len(value), dtype=torch.float64)
    for got, expected in zip(gradients(value, leaves, ones), gradients(dense, exact[0][:2], ones), strict=True):
        assert got.dtype == torch.bfloat16
        assert_near(got.float(), expected, 1e-2)


@pytest.mark.parametrize("make", WHOLE)
def test_logits_of_ten_thousand_keep_their_digits(make):
    """float32 logits of ±1e4, also equal and one-hot ones: what log softmax keeps, values and gradients keep."""
    divergence, head = make(), torch.eye(37)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 37, generator=generator).sign() * 1e4 for _ in range(2))
    teacher[1], teacher[2], student[3] = student[1], 0.0, 0.0
    student[4, 0], teacher[4, 1] = 3e4, 3e4
    exact = student.double().requires_grad_()
    dense = divergence.exact(exact.log_softmax(-1), teacher.double().log_softmax(-1))
    (slope,) = torch.autograd.grad(dense.sum(), exact)
    largest = slope.abs().amax(-1, keepdim=True)
    for call in (
        lambda logits: vocabulary_divergence(logits, head, teacher, head, divergence),
        lambda logits: logits_divergence(logits, teacher, divergence),
    ):
        leaf = student.clone().requires_grad_()
        value = call(leaf)
        torch.testing.assert_close(value.double(), dense, rtol=1e-5, atol=1e-6)
        (got,) = torch.autograd.grad(value.sum(), leaf)
        rounding = 5e-6 + 1e-7 * dense.detach().unsqueeze(-1)  # w − p·∑w cancels where both are as large as D
        assert ((got - slope).abs() <= 1e-5 * largest + rounding).all()


@pytest.mark.parametrize("make", WHOLE)
def test_a_teacher_that_is_the_student(make):
    divergence = make()
    hidden, weight, bias = (part.float() for part in models()[0])
    leaf = hidden.clone().requires_grad_()
    value = vocabulary_divergence(leaf, weight, hidden, weight, divergence, bias_p=bias, bias_q=bias)
    assert (value >= 0).all() and (value <= 1e-6).all()
    assert torch.autograd.grad(value.sum(), leaf)[0].abs().max() <= 1e-6


@pytest.mark.parametrize("frozen", [False, True], ids=["head trained", "head frozen"])
@pytest.mark.parametrize("kind", ["whole", "top", "logits", "cells"])
def test_a_gradient_is_no_constant_where_it_is_differentiated_again(kind, frozen):
    """A penalty on it would otherwise do nothing, without a word."""
    student, teacher = models()
    hidden, weight = student[0].requires_grad_(), student[1].requires_grad_(not frozen)
    value = {
        "whole": lambda: vocabulary_divergence(hidden, weight, *teacher[:2], "reverse_kl"),
        "top": lambda: topk_vocabulary_divergence(hidden, weight, top_of(teacher, 4), "reverse_kl"),
        "logits": lambda: logits_divergence(hidden @ weight.t(), teacher[0] @ teacher[1].t(), "reverse_kl"),
        "cells": lambda: cell_log_probs(hidden, Head(weight), torch.arange(4).expand(23, -1)),
    }[kind]()
    (gradient,) = torch.autograd.grad(value.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        (value.sum() + gradient.square().sum()).backward()


def test_no_rows_and_one_token():
    student, teacher = models(rows=0)
    hidden = student[0].requires_grad_()
    value = vocabulary_divergence(hidden, student[1].requires_grad_(), *teacher[:2], "reverse_kl")
    assert value.shape == (0,)
    value.sum().backward()
    assert hidden.grad.shape == (0, 8) and student[1].grad.abs().sum() == 0
    one, other = models(vocabulary=1)
    assert vocabulary_divergence(*one[:2], *other[:2], "jeffreys").abs().max() == 0


class _Largest(TorchDispatchMode):
    """The elements of the largest new tensor of an operation inside the block, and how many have at least `size`."""

    def __init__(self, size=math.inf):
        super().__init__()
        self.elements, self.size, self.count = 0, size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.numel())
                self.count += part.numel() >= self.size and function.overloadpacket.__name__ == "empty_like"
        return result


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_of_the_size_of_all_logits_is_made(frozen, small_blocks):
    student, teacher = models(rows=200)
    student[0].requires_grad_(), student[1].requires_grad_(not frozen)
    logits = log_softmax(*teacher[:2])
    top = logits.topk(5)
    with _Largest() as largest:
        vocabulary_divergence(*student[:2], *teacher[:2], "jensen_shannon").sum().backward()
        topk_vocabulary_divergence(*student[:2], (top.values, top.indices), "jensen_shannon").sum().backward()
    assert largest.elements <= max(2000, 301 * 12) < 200 * 301 / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", WHOLE)
def test_from_logits_it_is_the_dense_sum(make, dtype, small_blocks):
    """Value and gradient, against float64 on the logits of that type."""
    divergence = make()
    student, teacher = models(spread=0.7)
    logits = [(part[0] @ part[1].t()).to(dtype) for part in (student, teacher)]
    exact = logits[0].double().requires_grad_()
    log_p, log_q = exact.log_softmax(-1), logits[1].double().log_softmax(-1)
    dense = divergence.exact(log_p, log_q)
    ours = logits[0].clone().requires_grad_()
    value = logits_divergence(ours, logits[1], divergence)
    torch.testing.assert_close(value.double(), dense, rtol=3e-5, atol=2e-6)
    upstream = torch.linspace(-1.0, 2.0, 23, dtype=torch.float64)
    (got,), (expected,) = gradients(value, [ours], upstream), gradients(dense, [exact], upstream)
    assert got.dtype == dtype
    assert_near(got.double(), expected, 1e-2 if dtype == torch.bfloat16 else 2e-4)


def test_from_logits_with_holes_and_what_is_refused(small_blocks):
    student, teacher = models()
    logits = [part[0] @ part[1].t() for part in (student, teacher)]
    for part in logits:
        part[:, 290:] = -math.inf
    holes = logits_divergence(*logits, "neyman_chi2")
    torch.testing.assert_close(holes, logits_divergence(logits[0][:, :290], logits[1][:, :290], "neyman_chi2"))
    for pair in ((logits[0], logits[1][1:]), (logits[0][0], logits[1][0])):
        with pytest.raises(ValueError, match="both must be"):
            logits_divergence(*pair, "reverse_kl")


def test_scores_of_tokens_come_with_the_divergence(small_blocks):
    """log-probabilities of given tokens and entropies, beside a divergence with its gradient."""
    student, teacher = models()
    student[0].requires_grad_()
    heads = [Head(weight, bias, 0.7, 5.0) for _, weight, bias in (student, teacher)]
    ids = torch.arange(23) * 7 % 301
    scores = score_vocabulary(student[0], heads[0], teacher[0], heads[1], ids, "jeffreys", temperature=1.3)
    logs = [log_softmax(*side, temperature=1.3, scale=0.7, softcap=5.0) for side in (student, teacher)]
    torch.testing.assert_close(scores.divergence, get_divergence("jeffreys").exact(*logs))
    assert scores.divergence.requires_grad and not any(part.requires_grad for part in scores[1:5])
    for log_prob, entropy, log in zip(scores[1:3], scores[3:5], logs, strict=True):
        torch.testing.assert_close(log_prob, log.gather(1, ids[:, None])[:, 0].detach())
        torch.testing.assert_close(entropy, -(log.exp() * log).sum(-1).detach())
    for bad in (ids[1:], ids + 301, ids - 1):
        with pytest.raises(ValueError, match="one of 301 tokens"):
            score_vocabulary(student[0], heads[0], teacher[0], heads[1], bad, "jeffreys")
    none = score_vocabulary(student[0][:0], heads[0], teacher[0][:0], heads[1], ids[:0], "jeffreys")
    assert [part.shape for part in none[:5]] == [(0,)] * 5


def test_from_logits_only_the_gradient_is_as_large_as_they_are(small_blocks):
    student, teacher = models(rows=200)
    logits = [part[0] @ part[1].t() for part in (student, teacher)]
    logits[0].requires_grad_()
    with _Largest(200 * 301) as largest:
        logits_divergence(*logits, "jensen_shannon").sum().backward()
    assert largest.count == 1


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_trl_has_three_of_them(beta):
    """TRL's `beta = b` is skew_jensen_shannon(weight = 1 − b); 0 and 1 the two KLs; ½ is half of jensen_shannon."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = models(dtype=torch.float32)
    names = {0.0: "forward_kl", 1.0: "reverse_kl"}
    divergence = get_divergence(names.get(beta) or {"name": "skew_jensen_shannon", "weight": 1 - beta})
    leaves = [part.requires_grad_() for part in student]
    theirs, _ = ChunkedDivergenceFunction.apply(*leaves, *teacher, beta, 2.0)
    ours = vocabulary_divergence(
        *leaves[:2], *teacher[:2], divergence, temperature=2.0, bias_p=leaves[2], bias_q=teacher[2]
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if beta == 0.5:
        half = get_divergence("jensen_shannon").scaled(0.5)
        again = vocabulary_divergence(
            *leaves[:2], *teacher[:2], half, temperature=2.0, bias_p=leaves[2], bias_q=teacher[2]
        )
        torch.testing.assert_close(again, theirs, rtol=1e-5, atol=1e-6)
    upstream = torch.linspace(-1, 1, len(ours))
    for got, expected in zip(gradients(ours, leaves, upstream), gradients(theirs, leaves, upstream), strict=True):
        assert_near(got, expected.double(), 1e-5)


def test_under_autocast_the_products_stay_exact():
    student, teacher = models(dtype=torch.float32)
    plain = vocabulary_divergence(*student[:2], *teacher[:2], "reverse_kl")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vocabulary_divergence(*student[:2], *teacher[:2], "reverse_kl"), plain)


@pytest.mark.slow
@pytest.mark.parametrize("make", WHOLE)
def test_a_vocabulary_of_fifty_thousand(make):
    divergence = make()
    student, teacher = models(rows=7, vocabulary=50_257, width=32, teacher_width=48)
    leaves = [part.requires_grad_() for part in student[:2]]
    dense = divergence.exact(log_softmax(*leaves), log_softmax(*teacher[:2]))
    ones = torch.ones(7, dtype=torch.float64)
    ours = [part.detach().float().requires_grad_() for part in leaves]
    value = vocabulary_divergence(*ours, *(part.float() for part in teacher[:2]), divergence)
    torch.testing.assert_close(value.double(), dense, rtol=3e-5, atol=1e-5)
    for got, expected in zip(gradients(value, ours, ones), gradients(dense, leaves, ones), strict=True):
        # A cell whose P and Q are equal to rounding may fall on the other side of total variation's corner.
        assert_near(got, expected, 1e-3 if "total_variation" in divergence.label else 1e-4)


# ---------------------------------------------------------------------------------------------------- top k and the rest
def top_of(teacher, k, temperature=1.0):
    top = log_softmax(*teacher[:2], temperature=temperature).topk(k)
    return top.values, top.indices


@pytest.mark.parametrize("make", ALL)
def test_top_k_is_a_lower_bound_that_grows_to_the_whole(make):
    divergence = make()
    student, teacher = models()
    log_p = log_softmax(*student[:2])
    whole = divergence.exact(log_p, log_softmax(*teacher[:2]))
    before = torch.zeros_like(whole)
    for k in (1, 2, 7, 40, 150, 300, 301):
        value = topk_divergence(log_p, top_of(teacher, k), divergence)
        assert (value >= before * (1 - 1e-9) - 1e-12).all() and (value <= whole * (1 + 1e-9) + 1e-12).all()
        before = value
    torch.testing.assert_close(before, whole)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("make", ALL)
def test_top_k_from_hidden_states_is_that_of_the_log_probs(make, tail, small_blocks):
    divergence = make()
    student, teacher = models(spread=0.7)
    top = top_of(teacher, 9, temperature=1.5)
    leaves = [part.requires_grad_() for part in student[:2]]
    dense = topk_divergence(log_softmax(*leaves, temperature=1.5), top, divergence, tail=tail)
    value = topk_vocabulary_divergence(*leaves, top, divergence, tail=tail, temperature=1.5)
    torch.testing.assert_close(value, dense)
    upstream = torch.linspace(-1, 2, len(value), dtype=torch.float64)
    for got, expected in zip(gradients(value, leaves, upstream), gradients(dense, leaves, upstream), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", SIX)
def test_half_precision_is_rounded_once(name):
    """bfloat16 log-probabilities count as the numbers they are, and do not round those of the other side."""
    student, teacher = models()
    log_p, (log_q, ids) = log_softmax(*student[:2]), top_of(teacher, 9)
    tail = torch.log1p(-log_q.exp().sum(-1))
    for p, q in ((log_p.bfloat16(), log_q), (log_p, log_q.bfloat16()), (log_p.bfloat16(), log_q.bfloat16())):
        got = topk_divergence(p, (q, ids, tail), name)
        torch.testing.assert_close(got, topk_divergence(p.double(), (q.double(), ids, tail), name).float(), rtol=1e-5, atol=1e-6, check_dtype=False)  # fmt: skip


def test_without_the_tail_the_cells_count_as_they_are():
    log_p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    teacher = (torch.tensor([[0.6, 0.3]], dtype=torch.float64).log(), torch.tensor([[1, 0]]))
    both = topk_divergence(log_p, teacher, "total_variation")
    assert both.item() == pytest.approx((abs(0.3 - 0.6) + abs(0.5 - 0.3) + abs(0.2 - 0.1)) / 2)
    assert topk_divergence(log_p, teacher, "total_variation", tail=False).item() == pytest.approx(0.25)


def test_rows_with_fewer_tokens_and_a_known_tail():
    log_p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64).log().requires_grad_()
    log_q = torch.tensor([[0.6, 0.3], [0.9, 0.0]], dtype=torch.float64).log()
    ids = torch.tensor([[1, 0], [2, -1]])
    value = topk_divergence(log_p, (log_q, ids), "pearson_chi2")
    assert value.tolist() == pytest.approx([0.3**2 / 0.6 + 0.2**2 / 0.3 + 0.1**2 / 0.1, 0.1**2 / 0.9 + 0.1**2 / 0.1])
    value.sum().backward()
    assert torch.isfinite(log_p.grad).all()
    known = torch.tensor([0.1, 0.05], dtype=torch.float64).log()
    assert topk_divergence(log_p, (log_q, ids, known), "pearson_chi2")[1].item() == pytest.approx(
        0.1**2 / 0.9 + 0.15**2 / 0.05
    )


def test_a_tail_below_rounding_is_not_taken_for_none():
    """float32 log-probs whose masses add to 1: P²/Q over the rest stays finite; only a whole vocabulary has no rest."""
    log_p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    teacher = (torch.tensor([[1.0, 1e-9]]).log(), torch.tensor([[1, 0]]))
    value = topk_divergence(log_p, teacher, "pearson_chi2")
    assert 0.2**2 / 2.4e-7 < value.item() - 0.5**2 / 1e-9 < 0.2**2 / 1e-7 * 1e3
    every = (torch.tensor([[0.2, 0.3, 0.5]]).log(), torch.tensor([[1, 0, 2]]))
    assert topk_divergence(log_p, every, "neyman_chi2").isfinite()


@pytest.mark.parametrize("name", ["forward_kl", "jeffreys", "neyman_chi2", "jensen_shannon", "reverse_kl"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_tail_below_rounding_never_raises_the_lower_bound(name, masked):
    """The teacher's 2 tokens are all it has; the student has nothing, or e^-40, elsewhere: 7e-9, 1e5 or inf was added."""
    logits = torch.tensor([[0.3, -0.2, -40.0, -41.0]], dtype=torch.float64)
    if masked:
        logits[:, 2:] = -math.inf
    log_p = logits.log_softmax(-1)
    log_q = torch.tensor([[-0.4, 0.1, *(2 * ([-math.inf] if masked else [-39.0]))]], dtype=torch.float64).log_softmax(
        -1
    )
    whole = logits_divergence(log_p, log_q, name)
    top = log_q[:, :2].float(), torch.tensor([[0, 1]])
    leaf = log_p.clone().requires_grad_()
    bound = topk_divergence(leaf, top, name)
    assert bound.item() <= whole.item() + 1e-7
    torch.testing.assert_close(bound, whole, rtol=1e-6, atol=1e-6)
    bound.sum().backward()
    assert torch.isfinite(leaf.grad).all()
    blocks = topk_vocabulary_divergence(torch.ones(1, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64), top, name, bias_p=logits[0])  # fmt: skip
    torch.testing.assert_close(blocks, bound.detach(), rtol=1e-9, atol=1e-12)


# A gate that reads the student takes no gradient, so differences would see more than the gradient does.
@pytest.mark.parametrize(
    "name", ["cauchy_schwarz", gated("le_cam", "cauchy_schwarz", {**TEACHER_ENTROPY, "threshold": 1.5})], ids=str
)
def test_finite_differences_without_an_f(name, small_blocks):
    student, teacher = models(rows=3, vocabulary=23, width=3, spread=0.5)
    leaves = [part.requires_grad_() for part in student]

    def whole(hidden, weight, bias):
        return vocabulary_divergence(
            hidden, weight, *teacher[:2], name, bias_p=bias, bias_q=teacher[2], softcap_p=6.0, temperature=1.3
        )

    assert torch.autograd.gradcheck(whole, leaves, eps=1e-6, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", SIX)
def test_finite_differences(name, small_blocks):
    student, teacher = models(rows=2, vocabulary=23, width=3, spread=0.5)
    leaves = [part.requires_grad_() for part in student]
    top = top_of(teacher, 6)

    def whole(hidden, weight, bias):
        return vocabulary_divergence(
            hidden, weight, *teacher[:2], name, bias_p=bias, bias_q=teacher[2], softcap_p=6.0, temperature=1.3
        )

    def first(hidden, weight, bias):
        return topk_vocabulary_divergence(hidden, weight, top, name, bias_p=bias, softcap_p=6.0)

    assert torch.autograd.gradcheck(whole, leaves, eps=1e-6, atol=1e-5, rtol=1e-3)
    assert torch.autograd.gradcheck(first, leaves, eps=1e-6, atol=1e-5, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------- what is refused
def edited(top, change):
    log_probs, ids = (part.clone() for part in top)
    change(log_probs, ids)
    return log_probs, ids


BAD_TEACHERS = {
    "k=0": (lambda top: (top[0][:, :0], top[1][:, :0]), "at least 1"),
    "more tokens than there are": (lambda top: tuple(part.repeat(1, 80) for part in top), "at most 301"),
    "NaN": (lambda top: edited(top, lambda p, i: p[3].fill_(math.nan)), r"NaN \(row 3; 1 of 23"),
    "outside": (lambda top: edited(top, lambda p, i: i[2].fill_(301)), "leave the 301 tokens"),
    "below −1": (lambda top: edited(top, lambda p, i: i[2].fill_(-2)), "leave the 301 tokens"),
    "twice": (lambda top: edited(top, lambda p, i: i[5].fill_(7)), "names a token twice"),
    "logits": (lambda top: (top[0] + 9, top[1]), "more mass than 1"),
    "rows": (lambda top: (top[0][1:], top[1][1:]), r"must be \[23, k\]"),
    "shapes": (lambda top: (top[0], top[1][:, 1:]), r"must be \[23, k\]"),
    "types": (lambda top: (top[0], top[1].double()), "ids torch.float64: they must be floating-point and whole"),
    "parts": (lambda top: top[:1], "got 1 parts"),
    "tail": (lambda top: (*top, torch.zeros(22)), r"log_tail is \(22,\)"),
    "too much with the tail": (lambda top: (*top, torch.full((23,), 0.1)), "log_tail have more mass than 1"),
    "NaN tail": (lambda top: (*top, torch.full((23,), math.nan)), "log_tail is NaN"),
}


@pytest.mark.parametrize("case", BAD_TEACHERS)
def test_a_teacher_that_cannot_be(case):
    change, message = BAD_TEACHERS[case]
    student, teacher = models()
    bad = change(top_of(teacher, 4))
    with pytest.raises(ValueError, match=message):
        topk_divergence(log_softmax(*student[:2]), bad, "reverse_kl")
    with pytest.raises(ValueError, match=message):
        topk_vocabulary_divergence(*student[:2], bad, "reverse_kl")


def test_all_tokens_of_a_teacher_have_all_its_mass():
    student, teacher = models()
    log_probs, ids = top_of(teacher, 301)
    with pytest.raises(ValueError, match="all 301 tokens, and they have less mass than 1"):
        topk_divergence(log_softmax(*student[:2]), (log_probs - 0.5, ids), "forward_kl")
    topk_divergence(log_softmax(*student[:2]), (log_probs[:, :300] - 0.5, ids[:, :300]), "forward_kl")


def test_what_bfloat16_makes_of_log_probabilities_is_accepted():
    """Each of a hundred probabilities of 1/100 comes to 1.16 % more."""
    log_p = torch.zeros(1, 200).log_softmax(-1)
    log_q, ids = torch.full((1, 100), 0.01).log(), torch.arange(100).unsqueeze(0)
    assert log_q.bfloat16().double().exp().sum() > 1.011
    value = topk_divergence(log_p, (log_q.bfloat16(), ids), "total_variation")
    assert value.item() == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match="more mass than 1"):
        topk_divergence(log_p, (log_q.bfloat16().float(), ids), "total_variation")


def test_shapes_that_do_not_fit():
    (hidden, weight, bias), teacher = models()
    for arguments, options, message in (
        ((hidden, weight[:, 1:], *teacher[:2]), {}, r"hidden_p is \(23, 8\) and head_p \(301, 7\)"),
        ((hidden, weight, teacher[0][1:], teacher[1]), {}, "23 rows and hidden_q 22"),
        ((hidden, weight, teacher[0], teacher[1][1:]), {}, "301 tokens and head_q 300"),
        ((hidden, weight, *teacher[:2]), {"bias_p": bias[1:]}, r"bias_p is \(300,\)"),
        ((hidden, weight, *teacher[:2]), {"temperature": 0.0}, "temperature=0.0"),
        ((hidden, weight, *teacher[:2]), {"softcap_q": -1.0}, "softcap_q=-1.0"),
        ((hidden, weight, *teacher[:2]), {"temperature": "1"}, "temperature='1'"),
        ((hidden, weight, *teacher[:2]), {"scale_q": math.nan}, "scale_q=nan: must be a finite number"),
        ((hidden, weight[:0], teacher[0], teacher[1][:0]), {}, "with a token at least"),
        ((hidden.long(), weight, *teacher[:2]), {}, "floating-point"),
        ((hidden.unsqueeze(0), weight, *teacher[:2]), {}, r"\(1, 23, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            vocabulary_divergence(*arguments, "reverse_kl", **options)


def test_the_head_of_a_model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    head = vocabulary.model_head(model)
    assert head == Head(model.get_output_embeddings().weight, None, 1.0, None)
    model.config.logits_scaling, model.config.final_logit_softcapping = 8.0, 30.0
    assert vocabulary.model_head(model)[2:] == (0.125, 30.0)
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="has no LM head"):
        vocabulary.model_head(model)


@pytest.mark.parametrize("soft", [None, 5.0])
@pytest.mark.parametrize("make", ALL)
def test_where_all_rows_weigh_the_same_one_pass_gives_all_gradients(make, soft, small_blocks):
    """`uniform`, over the whole vocabulary and over the top k, against the two passes."""
    divergence = make()
    student, teacher = models(spread=0.7)
    ids, top = torch.arange(23) * 7 % 301, top_of(teacher, 9)
    found = []
    for uniform in (False, True):
        leaves = [part.clone().requires_grad_() for part in student]
        heads = [Head(*side[1:], 0.7, soft) for side in (leaves, teacher)]
        whole = score_vocabulary(leaves[0], heads[0], teacher[0], heads[1], ids, divergence, uniform=uniform)
        part = score_topk(leaves[0], heads[0], top, ids, divergence, temperature=1.3, uniform=uniform)
        weight = torch.full((23,), 0.25, dtype=torch.float64)
        found.append([*gradients(whole.divergence, leaves, weight), *gradients(part.divergence, leaves, weight)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_that_weigh_differently_break_the_promise():
    student, teacher = models()
    leaves = [part.requires_grad_() for part in student[:2]]
    scores = score_topk(leaves[0], Head(leaves[1]), top_of(teacher, 3), torch.zeros(23).long(), "le_cam", uniform=True)
    with pytest.raises(ValueError, match="uniform=True was promised"):
        (scores.divergence * torch.arange(23)).sum().backward()
    with torch.no_grad():
        again = score_topk(
            leaves[0], Head(leaves[1]), top_of(teacher, 3), torch.zeros(23).long(), "le_cam", uniform=True
        )
    torch.testing.assert_close(again.divergence, scores.divergence.detach())


@pytest.mark.parametrize("k", [1, 9, 301])
def test_scores_of_tokens_come_with_the_top_k(k, small_blocks):
    student, teacher = models()
    ids = torch.arange(23) * 7 % 301
    head = Head(*student[1:], 0.7, 5.0)
    scores = score_topk(student[0], head, top_of(teacher, k, 1.3), ids, "jeffreys", temperature=1.3)
    log_p = log_softmax(*student, temperature=1.3, scale=0.7, softcap=5.0)
    torch.testing.assert_close(scores.divergence, topk_divergence(log_p, top_of(teacher, k, 1.3), "jeffreys"))
    torch.testing.assert_close(scores.log_p, log_p.gather(1, ids[:, None])[:, 0])
    torch.testing.assert_close(scores.entropy_p, -(log_p.exp() * log_p).sum(-1))
    assert scores.log_q is None and scores.entropy_q is None
    none = score_topk(student[0][:0], head, [part[:0] for part in top_of(teacher, k)], ids[:0], "jeffreys")
    assert none.divergence.shape == none.log_p.shape == none.entropy_p.shape == (0,)


@pytest.mark.parametrize("make", ALL)
def test_a_student_with_next_to_no_mass_on_the_rest(make):
    """The rest is e^−120 of it: the gradient is finite, and that of the log-probabilities."""
    divergence = make()
    head = torch.eye(6, dtype=torch.float64)
    hidden = torch.tensor([[0.0, 0.3, -120.0, -121.0, -119.0, -120.5]], dtype=torch.float64)
    teacher = (torch.tensor([[0.5, 0.3]], dtype=torch.float64).log(), torch.tensor([[0, 1]]))
    found = []
    for dtype in (torch.float64, torch.float32):
        leaf = hidden.to(dtype).requires_grad_()
        value = topk_vocabulary_divergence(leaf, head.to(dtype), tuple(p.to(dtype) if p.is_floating_point() else p for p in teacher), divergence)  # fmt: skip
        found.append((value.detach().double(), *(g.double() for g in gradients(value, [leaf], torch.ones(1)))))
    exact = hidden.requires_grad_()
    dense = topk_divergence(exact.log_softmax(-1), teacher, divergence)
    wanted = (dense.detach(), gradients(dense, [exact], torch.ones(1))[0])
    for got in found:
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_top_tokens_of_a_teacher(dtype, small_blocks):
    _, (hidden, weight, bias) = models(dtype=dtype)
    ids = torch.arange(23) * 7 % 301
    top, log_probs, entropy = top_tokens(hidden, Head(weight, bias, 0.7, 5.0), 11, ids, temperature=1.3)
    log_q = log_softmax(hidden.double(), weight.double(), bias.double(), temperature=1.3, scale=0.7, softcap=5.0)
    near = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(top.log_probs, log_q.topk(11).values, **near)
    torch.testing.assert_close(top.log_probs, log_q.gather(1, top.ids), **near)
    torch.testing.assert_close(top.log_tail, log_q.topk(301).values[:, 11:].logsumexp(-1), **near)
    torch.testing.assert_close(log_probs, log_q.gather(1, ids[:, None])[:, 0], **near)
    torch.testing.assert_close(entropy, -(log_q.exp() * log_q).sum(-1), **near)
    whole = top_tokens(hidden, Head(weight, bias), 301, ids)[0]
    assert torch.isneginf(whole.log_tail).all() and whole.ids.sort(-1).values.equal(torch.arange(301).expand(23, 301))
    masked = bias.clone()
    masked[200:] = -math.inf
    log_q = log_softmax(hidden.double(), weight.double()[:200], bias.double()[:200])
    torch.testing.assert_close(
        top_tokens(hidden, Head(weight, masked), 5, ids)[2], -(log_q.exp() * log_q).sum(-1), **near
    )
    none = top_tokens(hidden[:0], Head(weight, bias), 5, ids[:0])
    assert none[0].ids.shape == (0, 5) and none[1].shape == none[2].shape == (0,)
    for k in (0, 302):
        with pytest.raises(ValueError, match=f"k={k}: must be at least 1 and at most 301"):
            top_tokens(hidden, Head(weight, bias), k, ids)
