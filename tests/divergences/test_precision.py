"""Every function of every entry against 50-digit mpmath on log t ∈ [−30, 30], in float64 and float32."""

import math

import mpmath as mp
import pytest
import torch

from fdiv.divergences import Divergence, get_divergence
from tests.divergences.reference import IDS, REFERENCES

# dense near t = 1, where cancellation bites, and out to both ends
_GRID = sorted({s * x for s in (-1.0, 1.0) for x in [0.0, 1e-9, 1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.2, 0.3, 0.5, 0.69, 0.7,
    1.0, 1.5, 2.0, 3.0, 5.0, 7.3, 10.0, 15.0, 20.0, 25.0, 29.9, 30.0]})  # fmt: skip

_TOLERANCE = {torch.float64: (1e-6, 1e-8), torch.float32: (1e-5, 1e-2)}


def assert_close(got: torch.Tensor, exact: list, at: list[float], what: str) -> None:
    relative, floor = _TOLERANCE[got.dtype]
    for value, truth, point in zip(got.tolist(), exact, at, strict=True):
        allowed = relative * max(abs(float(truth)), floor)
        assert abs(mp.mpf(value) - truth) <= allowed, f"{what} at {point!r}: {value!r} instead of {mp.nstr(truth, 17)}"


def points(dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(_GRID, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("reference", REFERENCES, ids=IDS)
def test_generator_and_derivative(reference, dtype):
    divergence, log_t = get_divergence(reference.spec), points(dtype)
    ts = [mp.exp(mp.mpf(x)) for x in log_t.tolist()]
    assert_close(divergence.generator(log_t), [reference.f(t) for t in ts], _GRID, "generator")
    assert_close(divergence.derivative(log_t), [reference.df(t) for t in ts], _GRID, "derivative")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("reference", [r for r in REFERENCES if r.inverse], ids=[i for r, i in zip(REFERENCES, IDS, strict=True) if r.inverse])  # fmt: skip
def test_conjugate_and_inverse_derivative(reference, dtype):
    """At v = f'(t) rounded to the type, for t over the whole range: v itself is taken as exact."""
    divergence = get_divergence(reference.spec)
    low, high = divergence.conjugate_domain
    v = divergence.derivative(points(dtype))
    v = v[(v.double() > low) & (v.double() < high)]
    if high == math.log(2) and dtype == torch.float32:
        v = v[v.double() < 0.6931471]  # float32 rounds log 2 up, past f'(∞)
    ts = [reference.inverse(mp.mpf(x)) for x in v.tolist()]
    at = v.tolist()
    assert_close(divergence.inverse_derivative(v), [mp.log(t) for t in ts], at, "inverse_derivative")
    exact = [t * mp.mpf(x) - reference.f(t) for t, x in zip(ts, at, strict=True)]
    assert_close(divergence.conjugate(v), exact, at, "conjugate")


@pytest.mark.parametrize("reference", REFERENCES, ids=IDS)
def test_gradients_are_the_next_derivative(reference):
    """d f/d log t = t f'(t), and d f*/dv = t, by autograd in float64, against mpmath."""
    divergence = get_divergence(reference.spec)
    log_t = points(torch.float64)
    log_t = log_t[log_t != 0].requires_grad_()
    (slope,) = torch.autograd.grad(divergence.generator(log_t).sum(), log_t)
    ts = [mp.exp(mp.mpf(x)) for x in log_t.tolist()]
    assert_close(slope, [t * reference.df(t) for t in ts], log_t.tolist(), "gradient of the generator")
    if reference.inverse is None:
        return
    v = divergence.derivative(log_t.detach())
    low, high = divergence.conjugate_domain
    v = v[(v > low) & (v < high) & (v.abs() < 1e6)].requires_grad_()
    (slope,) = torch.autograd.grad(divergence.conjugate(v).sum(), v)
    exact = [reference.inverse(mp.mpf(x)) for x in v.tolist()]
    assert_close(slope, exact, v.tolist(), "gradient of the conjugate")


@pytest.mark.parametrize("reference", REFERENCES, ids=IDS)
def test_the_constants_of_the_table(reference):
    divergence = get_divergence(reference.spec)
    assert divergence.at_zero == pytest.approx(reference.at_zero, rel=1e-15)
    assert divergence.derivative_at_zero == reference.derivative_at_zero
    assert divergence.slope_at_infinity == pytest.approx(reference.slope_at_infinity, rel=1e-15)
    assert divergence.conjugate_domain == (divergence.derivative_at_zero, divergence.slope_at_infinity)
    if reference.curvature is not None:
        assert divergence.curvature == pytest.approx(reference.curvature, rel=1e-15)
        second = mp.diff(lambda t: reference.df(t), 1)
        assert divergence.curvature == pytest.approx(float(second), rel=1e-12)


@pytest.mark.parametrize("reference", [r for r in REFERENCES if r.curvature], ids=[i for r, i in zip(REFERENCES, IDS, strict=True) if r.curvature])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_density_weight(reference, dtype):
    """t·f''(t) against mpmath's derivative of f'; f''(1) at t = 1; finite, and the far value, at the ends."""
    divergence = get_divergence(reference.spec)
    at = [-12.0, -5.0, -1.0, -0.1, 0.0, 0.3, 2.0, 6.0, 12.0]
    got = divergence.density_weight(torch.tensor(at, dtype=dtype))
    exact = [mp.exp(mp.mpf(x)) * mp.diff(reference.df, mp.exp(mp.mpf(x))) for x in at]
    assert_close(got, exact, at, "density_weight")
    assert got[4].item() == pytest.approx(reference.curvature)
    ends = divergence.density_weight(torch.tensor([-math.inf, math.inf], dtype=dtype))
    assert ends.equal(divergence.density_weight(torch.tensor([-1e4, 1e4], dtype=dtype))) and ends.isfinite().all()


def test_density_weight_of_derived_ones():
    log_t = torch.tensor([-1.0, 0.5], dtype=torch.float64)
    both = get_divergence("jeffreys").scaled(3.0) + get_divergence("pearson_chi2")
    torch.testing.assert_close(both.density_weight(log_t), 3 * (1 + torch.exp(-log_t)) + 2 * torch.exp(log_t))
    own = Divergence.from_generator("own", lambda x: torch.exp(2 * x))
    torch.testing.assert_close(own.density_weight(log_t), 2 * torch.exp(log_t))
    for corner in (get_divergence("total_variation"), get_divergence("total_variation") + get_divergence("le_cam")):
        with pytest.raises(ValueError, match="no curvature"):
            corner.density_weight(log_t)
