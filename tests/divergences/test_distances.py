"""Distances without an f: hand-worked values, limits, gates, algebra, and where they are refused."""

import math

import pytest
import torch

from fdiv.divergences import Gate, gated, get_distance, get_divergence, get_gate, list_distances, register_divergence
from fdiv.divergences.distances import CauchySchwarz, as_distance

GATES = (
    {"name": "entropy_gap", "width": 0.5},
    {"name": "teacher_entropy", "threshold": 1.0},
    {"name": "head_tail", "mass": 0.5},
)


def log(*masses, dtype=torch.float64):
    return torch.tensor(masses, dtype=dtype).log()


def random_pairs(rows=50, cells=7, spread=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, rows, cells, generator=generator, dtype=torch.float64) * spread
    return pair.log_softmax(-1).unbind(0)


# ---------------------------------------------------------------- Cauchy–Schwarz
def test_cauchy_schwarz_by_hand():
    """∑pq = ½, ∑p² = ½, ∑q² = 1: −2 log ½ + log ½ = log 2; and −2 log of a cosine of 60°."""
    distance = CauchySchwarz()
    assert distance.exact(log(0.5, 0.5), log(1.0, 0.0)).item() == pytest.approx(math.log(2))
    p, q = log(0.05, 0.45, 0.5), log(1.0, 0.0, 0.0)
    assert distance.exact(p, q).item() == pytest.approx(-2 * math.log(0.05) + math.log(0.455))


def test_cauchy_schwarz_is_a_symmetric_scale_free_distance():
    distance = CauchySchwarz()
    p, q = random_pairs()
    value = distance.exact(p, q)
    assert (value > 0).all()
    torch.testing.assert_close(distance.exact(q, p), value)
    torch.testing.assert_close(distance.exact(p + 3.0, q - 40.0), value)
    assert distance.exact(p, p).abs().max() == 0


def test_its_digits_near_equality_survive_float32():
    """D ≈ ∑δ² + …: at δ = 1e-4 it is 1e-8, far below the rounding of the three logs."""
    p = log(0.2, 0.3, 0.5, dtype=torch.float64)
    q = (p.exp() + torch.tensor([1e-4, -1e-4, 0.0], dtype=torch.float64)).log()
    exact = CauchySchwarz().exact(p, q)
    assert CauchySchwarz().exact(p.float(), q.float()).item() == pytest.approx(exact.item(), rel=5e-3)
    assert exact.item() == pytest.approx(
        -2 * math.log((p + q).exp().sum() / ((2 * p).exp().sum() * (2 * q).exp().sum()).sqrt()), rel=1e-6
    )


def test_without_a_common_cell_it_is_infinite_and_pulls_nowhere():
    p = log(0.5, 0.5, 0.0, 0.0).requires_grad_()
    value = CauchySchwarz().exact(p, log(0.0, 0.0, 0.3, 0.7))
    assert value.item() == math.inf
    assert CauchySchwarz().exact(p, log(0.0, 0.2, 0.3, 0.5)).isfinite()
    logits = torch.tensor([[400.0, 0.0, -400.0]], requires_grad=True)
    far = CauchySchwarz().exact(logits.log_softmax(-1), logits.detach().flip(-1).log_softmax(-1))
    far.sum().backward()
    # log p = (0, −400, −800) and log q backwards: ∑PQ = 3e^−800, far below the smallest float32.
    assert far.item() == pytest.approx(1600 - 2 * math.log(3), rel=1e-6)
    assert logits.grad.abs().max() <= 2 and torch.isfinite(logits.grad).all()


def test_joining_cells_may_raise_it():
    """The reason why a teacher's top k give no bound: 5.20 over three cells, 5.89 over two."""
    distance = CauchySchwarz()
    three = distance.exact(log(0.05, 0.45, 0.5), log(1.0, 0.0, 0.0))
    two = distance.exact(log(0.05, 0.95), log(1.0, 0.0))
    assert three.item() == pytest.approx(5.204, abs=1e-3) and two.item() == pytest.approx(5.892, abs=1e-3)


# ---------------------------------------------------------------- gates
def test_gates_by_hand():
    p, q = log(0.7, 0.2, 0.1), log(0.5, 0.25, 0.25)
    entropies = [-(x.exp() * x).sum().item() for x in (p, q)]
    assert entropies[1] == pytest.approx(1.5 * math.log(2))
    gap = get_gate({"name": "entropy_gap", "width": 0.5})
    assert gap(p, q).item() == pytest.approx(1 / (1 + math.exp(-(entropies[1] - entropies[0]) / 0.5)))
    assert gap(q, q).item() == 0.5 and gap(q, p) < 0.5 < gap(p, q)
    assert [get_gate({"name": "teacher_entropy", "threshold": h})(p, q).item() for h in (1.03, 1.05)] == [1.0, 0.0]
    # The head at ½ is the first token: |0.7 − 0.5| of 0.2 + 0.05 + 0.15; at 0.6 the first two.
    assert get_gate({"name": "head_tail", "mass": 0.5})(p, q).item() == pytest.approx(0.2 / 0.4)
    assert get_gate({"name": "head_tail", "mass": 0.6})(p, q).item() == pytest.approx(0.25 / 0.4)
    assert get_gate({"name": "head_tail", "mass": 0.5})(q, q).item() == 0.5


@pytest.mark.parametrize("spec", GATES, ids=lambda spec: spec["name"])
def test_gates_are_weights_also_with_empty_cells(spec):
    p, q = random_pairs(cells=9)
    whole = get_gate(spec)(p, q)
    assert ((whole >= 0) & (whole <= 1)).all() and whole.shape == (50,)
    padded = [torch.cat([part, torch.full((50, 3), -math.inf, dtype=part.dtype)], -1) for part in (p, q)]
    torch.testing.assert_close(get_gate(spec)(*padded), whole)


@pytest.mark.parametrize("spec", GATES, ids=lambda spec: spec["name"])
def test_gated_mixes_values_and_gradients_without_one_of_its_own(spec):
    p, q = random_pairs()
    logits = p.clone().requires_grad_()
    member = gated("forward_kl", "cauchy_schwarz", spec)
    share = get_gate(spec)(p, q)
    parts = [get_distance(name) for name in ("forward_kl", "cauchy_schwarz")]
    values = [part.exact(logits.log_softmax(-1), q) for part in parts]
    torch.testing.assert_close(member.exact(p, q), share * values[0] + (1 - share) * values[1])
    (mixed,) = torch.autograd.grad((share * values[0] + (1 - share) * values[1]).sum(), logits)
    (ours,) = torch.autograd.grad(member.exact(logits.log_softmax(-1), q).sum(), logits)
    torch.testing.assert_close(ours, mixed)


def test_reverse_kl_everywhere_and_forward_kl_where_the_teacher_is_unsure():
    p, q = random_pairs()
    member = gated("jeffreys", "reverse_kl", {"name": "teacher_entropy", "threshold": 1.0})
    unsure = -(q.exp() * q).sum(-1) >= 1.0
    assert 0 < unsure.sum() < 50
    kls = [get_divergence(name).exact(p, q) for name in ("reverse_kl", "forward_kl")]
    torch.testing.assert_close(member.exact(p, q), kls[0] + unsure * kls[1])


def test_an_infinite_part_of_weight_zero_does_not_count():
    p, q = log(0.5, 0.5, 0.0), log(0.5, 0.25, 0.25)  # forward KL is infinite
    for threshold, expected in ((2.0, get_divergence("reverse_kl").exact(p, q).item()), (0.0, math.inf)):
        member = gated("forward_kl", "reverse_kl", {"name": "teacher_entropy", "threshold": threshold})
        assert member.exact(p, q).item() == pytest.approx(expected)


class Even(Gate):
    """A gate of one's own."""

    name = "even"

    def __init__(self, share):
        self.parameters = {"share": share}

    def __call__(self, log_p, log_q):
        return torch.full(log_p.shape[:-1], self.parameters["share"], dtype=log_p.dtype)


def test_a_gate_of_ones_own():
    p, q = random_pairs()
    member = gated("reverse_kl", "forward_kl", {"name": f"{__name__}:Even", "share": 0.5})
    torch.testing.assert_close(member.exact(p, q), get_divergence("jeffreys").scaled(0.5).exact(p, q))
    assert member.label == "gated(reverse_kl,forward_kl,even(0.5))"
    with pytest.raises(ValueError, match=r"gate even\(1.5\) gave .*a weight in \[0, 1\]"):
        gated("reverse_kl", "forward_kl", Even(1.5)).exact(p, q)


# ---------------------------------------------------------------- algebra and names
def test_algebra():
    p, q = random_pairs()
    cs, kl = get_distance("cauchy_schwarz"), get_divergence("reverse_kl")
    expected = 2 * cs.exact(p, q) + 0.5 * kl.exact(p, q)
    for made in (cs.scaled(2.0) + kl.scaled(0.5), kl.scaled(0.5) + cs.scaled(2.0), (cs.scaled(4.0) + kl).scaled(0.5)):
        torch.testing.assert_close(made.exact(p, q), expected)
    assert (kl + cs).label == "reverse_kl+cauchy_schwarz" and cs.scaled(2).label == "2*cauchy_schwarz"
    member = gated("le_cam", "pearson_chi2", GATES[0])
    halves = gated("le_cam", get_divergence("pearson_chi2").scaled(0.5), GATES[0])
    torch.testing.assert_close(member.normalized().exact(p, q), halves.exact(p, q))
    assert member == gated("le_cam", "pearson_chi2", GATES[0]) != gated("le_cam", "pearson_chi2", GATES[1])
    assert len({member, gated("le_cam", "pearson_chi2", GATES[0]), cs, get_distance("cauchy_schwarz")}) == 2
    with pytest.raises(ValueError, match="no f''"):
        cs.normalized()
    with pytest.raises(ValueError, match="positive finite"):
        cs.scaled(0)
    with pytest.raises(TypeError):
        cs + 1


def test_names():
    assert list_distances() == ["cauchy_schwarz", "gated"]
    assert get_distance("Cauchy-Schwarz") == CauchySchwarz()
    assert get_distance("rkl") == get_divergence("reverse_kl")
    spec = {"name": "gated", "forward": {"name": "alpha", "alpha": 0.3}, "reverse": "reverse_kl", "gate": GATES[2]}
    assert get_distance(spec).label == "gated(alpha(0.3),reverse_kl,head_tail(0.5))"
    assert get_distance(get_distance(spec)) == get_distance(spec)
    with pytest.raises(ValueError, match="already registered"):
        register_divergence("gated", get_divergence("reverse_kl"))
    own = get_distance(f"{__name__}:HALF")
    assert own is HALF
    for wrong, message in (
        ({"name": "gated", "forward": "forward_kl"}, r"needs the parameter 'reverse': write \{name: gated"),
        ({**spec, "gate": "entropy_gap"}, "missing a required argument: 'width'"),
        ({**spec, "gate": {"name": "entropy_gab", "width": 1}}, "did you mean 'entropy_gap'"),
        ({**spec, "gate": {"name": "entropy_gap", "witdh": 1}}, "did you mean 'width'"),
        ({**spec, "gate": {"name": "entropy_gap", "width": 0}}, "above 0, got 0"),
        ({**spec, "gate": {"name": "teacher_entropy", "threshold": -1}}, "at least 0"),
        ({**spec, "gate": {"name": "teacher_entropy", "threshold": math.nan}}, "at least 0"),
        ({**spec, "gate": {"name": "head_tail", "mass": 1.0}}, "above 0 and below 1"),
        ({**spec, "gate": {"name": "head_tail", "mass": True}}, "got True"),
        ({**spec, "gate": 3}, "a mapping is due"),
        ({**spec, "forward": "kl"}, "ambiguous"),
        ({"name": "cauchy_schwarz", "alpha": 1}, "takes none"),
        ("cauchy_schwartz", "did you mean cauchy_schwarz"),
    ):
        with pytest.raises(ValueError, match=message):
            get_distance(wrong)


HALF = CauchySchwarz().scaled(0.5)


@pytest.mark.parametrize("spec", ["cauchy_schwarz", {"name": "gated"}, CauchySchwarz(), HALF], ids=str)
def test_where_an_f_is_needed_they_are_refused(spec):
    from fdiv.alignment import d2o_loss, f_dpg_loss, f_dpo_loss
    from fdiv.rl import rehearsal_loss
    from fdiv.unlearning import flat_loss

    one = torch.zeros(1)
    for call in (
        lambda: get_divergence(spec),
        lambda: f_dpo_loss(one, one, spec, 0.1),
        lambda: d2o_loss(one.unsqueeze(0), one, 0.1, 0.1, spec),
        lambda: f_dpg_loss(one, one, spec),
        lambda: flat_loss(one + 0.5, one + 0.5, spec),
        lambda: rehearsal_loss(one.unsqueeze(0), one.unsqueeze(0) == 0, spec),
    ):
        with pytest.raises(ValueError, match="is no f-divergence: it has no f"):
            call()


def test_an_f_divergence_as_a_distance_is_itself():
    p, q = random_pairs()
    torch.testing.assert_close(as_distance(get_divergence("le_cam")).exact(p, q), get_divergence("le_cam").exact(p, q))
