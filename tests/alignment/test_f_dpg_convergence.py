"""Where f-DPG ends: at p when the model can represent it, at a known compromise when it cannot."""

import math

import pytest
import torch

from fdiv.alignment import f_dpg_loss
from fdiv.divergences import get_divergence, list_divergences
from tests.support.sequence_model import SequenceModel

PARAMETERS = {"alpha": {"alpha": 0.3}, "skew_jensen_shannon": {"weight": 0.3}}
ALL = [{"name": name, **PARAMETERS.get(name, {})} for name in list_divergences()]


def label(spec):
    return spec["name"] if isinstance(spec, dict) else spec


def train(model, log_p, spec, *, steps, lr, samples=None, seed=0):
    """Adam with steps that decay to 0 (total variation's gradient does not vanish at p, so it needs that).

    `samples` None: the exact expected gradient, by enumeration; else that many samples of π per step.
    """
    optimizer = torch.optim.Adam([model.logits], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        log_pi = model.log_probs()
        probability = log_pi.detach().exp()
        if samples is None:
            log_t = (log_pi - log_p).detach()
            loss = (probability * f_dpg_loss(log_pi, log_t, spec, baseline="none")).sum()
        else:
            drawn = torch.multinomial(probability, samples, replacement=True, generator=generator)
            loss = f_dpg_loss(log_pi[drawn], (log_pi - log_p).detach()[drawn], spec).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return get_divergence(spec).exact(model.log_probs().detach(), log_p).item()


@pytest.mark.parametrize("spec", ALL, ids=label)
def test_exact_gradient_reaches_the_target(spec):
    log_p = SequenceModel().randomize(7).log_probs().detach()
    model = SequenceModel().randomize(1, 0.5)
    assert get_divergence(spec).exact(model.log_probs(), log_p) > 0.05
    assert train(model, log_p, spec, steps=600, lr=0.1) < 1e-3


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon"])
def test_sampled_gradient_reaches_the_target(name):
    log_p = SequenceModel().randomize(7).log_probs().detach()
    model = SequenceModel().randomize(1, 0.5)
    assert train(model, log_p, name, steps=600, lr=0.1, samples=64) < 1e-3


def two_modes():
    """Sequences of three letters; p puts 0.45 on AAA, 0.35 on BBB and spreads the rest: no unigram model has that."""
    model = SequenceModel(symbols=2, tabular=False, fixed_length=True)
    p = torch.full((len(model.sequences),), 0.2 / 6, dtype=torch.float64)
    p[model.sequences.index((0, 0, 0))] = 0.45
    p[model.sequences.index((1, 1, 1))] = 0.35
    return model, p.log()


def test_misspecified_ends_where_theory_says(record_property):
    """Forward KL matches the moments of p (mass covering); reverse KL sits on one mode; as found, the others between.

    The unigram model is an exponential family in the letter counts, so the minimiser of KL(p‖π) has exactly p's
    letter frequency. For the others the minimiser is found on a grid of π(A) and training must end there.
    """
    frequency = {}
    for name in ("forward_kl", "jensen_shannon", "total_variation", "squared_hellinger", "reverse_kl"):
        model, log_p = two_modes()
        with torch.no_grad():
            model.logits.copy_(torch.tensor([[0.4, 0.0]], dtype=torch.float64))
        train(model, log_p, name, steps=800, lr=0.05)
        frequency[name] = model.logits.softmax(-1)[0, 0].item()

        grid = torch.linspace(0.5, 0.999, 2000, dtype=torch.float64)
        letters = torch.tensor([[sequence.count(0), sequence.count(1)] for sequence in model.sequences]).double()
        log_pi = torch.stack([grid.log(), (1 - grid).log()], -1) @ letters.T
        values = get_divergence(name).exact(log_pi, log_p)
        assert frequency[name] == pytest.approx(grid[values.argmin()].item(), abs=2e-3), name
    _, log_p = two_modes()
    letters = torch.tensor([sequence.count(0) / 3 for sequence in model.sequences], dtype=torch.float64)
    assert frequency["forward_kl"] == pytest.approx((log_p.exp() * letters).sum().item(), abs=1e-4)
    assert frequency["reverse_kl"] > frequency["forward_kl"] + 0.2
    record_property("policy's probability of the larger mode's letter", frequency)
