"""The policy loss for verl, by value, against a stand-in of the interface that verl 0.9.1 has.

The stand-in is written from verl's documented behaviour (names, arguments, what the aggregation modes mean), not from its code.
"""

from __future__ import annotations

import math
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from fdiv.divergences import get_divergence, list_divergences
from fdiv.integrations.verl import policy_loss, register
from fdiv.rl.dph.loss import rehearsal_coefficient, rehearsal_loss

PARAMETERS = {"alpha": {"alpha": 0.3}, "skew_jensen_shannon": {"weight": 0.3}}


def agg_loss(loss_mat, loss_mask, loss_agg_mode, dp_size=1, batch_num_tokens=None, global_batch_size=None):
    """Sums over the mini-batch, over the tokens or rows of the global batch, times the processes whose mean is taken."""
    mask = loss_mask.to(loss_mat.dtype)
    if loss_agg_mode == "token-mean":
        return (loss_mat * mask).sum() / (batch_num_tokens or mask.sum()) * dp_size
    rows = (loss_mat * mask).sum(1)
    if loss_agg_mode == "seq-mean-token-mean":
        rows = rows / mask.sum(1).clamp(min=1)
    else:
        assert loss_agg_mode == "seq-mean-token-sum"
    return rows.sum() / (global_batch_size or len(rows)) * dp_size


@pytest.fixture
def verl(monkeypatch):
    """`verl.trainer.ppo.core_algos` with its registry, `agg_loss` and two of its losses."""
    core = types.ModuleType("verl.trainer.ppo.core_algos")
    core.POLICY_LOSS_REGISTRY = {}

    def register_policy_loss(name):
        return lambda function: core.POLICY_LOSS_REGISTRY.setdefault(name, function)

    def get_policy_loss_fn(name):
        if name not in core.POLICY_LOSS_REGISTRY:
            raise ValueError(f"Unsupported loss mode: {name}")
        return core.POLICY_LOSS_REGISTRY[name]

    def clipped(log_prob, old_log_prob, advantages):
        ratio = (log_prob - old_log_prob).exp()
        return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))

    def reinforce(log_prob, old_log_prob, advantages):
        return -log_prob * advantages

    def loss_of(formula):
        def loss(
            old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
            rollout_is_weights=None,
        ):  # fmt: skip
            terms = formula(log_prob, old_log_prob, advantages)
            if rollout_is_weights is not None:
                terms = terms * rollout_is_weights
            value = agg_loss(terms, response_mask, loss_agg_mode, **config.global_batch_info)
            return value, {"actor/ppo_kl": 0.0}

        return loss

    core.agg_loss, core.register_policy_loss, core.get_policy_loss_fn = (
        agg_loss,
        register_policy_loss,
        get_policy_loss_fn,
    )
    register_policy_loss("vanilla")(loss_of(clipped))
    register_policy_loss("gpg")(loss_of(reinforce))
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, core.__name__, core)
    return core


def batch(rows=3, tokens=4, seed=0):
    torch.manual_seed(seed)
    old = -torch.rand(rows, tokens, dtype=torch.float64) - 0.1
    new = (old + 0.5 * torch.randn(rows, tokens, dtype=torch.float64)).requires_grad_()
    mask = torch.arange(tokens) < torch.tensor([4, 2, 3][:rows])[:, None]
    return {
        "old_log_prob": old,
        "log_prob": new,
        "advantages": torch.randn(rows, tokens, dtype=torch.float64),
        "response_mask": mask,
    }


def actor(**global_batch_info):
    return SimpleNamespace(global_batch_info=global_batch_info)


def test_the_value_by_hand(verl):
    """u = 2 and ½ on two tokens, forward KL's f(u) = u − 1 − log u, η = 0.5; REINFORCE adds −A·log π."""
    register("kl", "forward_kl", 0.5, base="gpg")
    loss, metrics = verl.get_policy_loss_fn("kl")(
        old_log_prob=torch.tensor([[-2.0, -1.0]]),
        log_prob=torch.tensor([[-2.0 + math.log(2), -1.0 - math.log(2)]]),
        advantages=torch.tensor([[1.0, 1.0]]),
        response_mask=torch.tensor([[True, True]]),
        config=actor(),
    )
    penalty = ((2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2))) / 2
    reinforce = (2 - math.log(2) + 1 + math.log(2)) / 2
    assert loss.item() == pytest.approx(reinforce + 0.5 * penalty, rel=1e-6)
    assert metrics == {"actor/ppo_kl": 0.0, "actor/f_divergence": pytest.approx(penalty, rel=1e-6)}


@pytest.mark.parametrize("name", list_divergences())
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_the_penalty_is_f_of_the_ratio_in_every_mode(verl, name, mode):
    spec = {"name": name, **PARAMETERS.get(name, {})}
    given = batch()
    arguments = {**given, "loss_agg_mode": mode, "config": actor()}
    base, _ = verl.get_policy_loss_fn("vanilla")(**arguments)
    loss, _ = policy_loss(spec, 0.3)(**arguments)
    terms = get_divergence(spec).generator(given["log_prob"] - given["old_log_prob"])
    torch.testing.assert_close(loss, base + 0.3 * agg_loss(terms, given["response_mask"], mode))


def test_rows_without_advantage_are_rehearsal_rows(verl):
    """Value and gradient of `rehearsal_loss` on samples of the reference, its log-probabilities as old ones."""
    given = batch() | {"advantages": torch.zeros(3, 4, dtype=torch.float64)}
    loss, _ = policy_loss("forward_kl", 0.7, coefficient_clip=0.2)(
        **given, loss_agg_mode="seq-mean-token-mean", config=actor()
    )
    (gradient,) = torch.autograd.grad(loss, given["log_prob"])
    log_ratio = given["log_prob"] - given["old_log_prob"]
    expected = 0.7 * rehearsal_loss(log_ratio, given["response_mask"], "forward_kl", coefficient_clip=0.2).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, given["log_prob"])[0])
    clipped = rehearsal_coefficient(log_ratio, "forward_kl").clamp(-0.2, 0.2) * given["response_mask"]
    torch.testing.assert_close(gradient, 0.7 * clipped / given["response_mask"].sum(1, keepdim=True) / 3)


def test_on_policy_the_penalty_has_no_gradient(verl):
    """At u = 1 f and f′ are 0: the first step on fresh rollouts is the base loss's."""
    given = batch()
    given["old_log_prob"] = given["log_prob"].detach().clone()
    arguments = {**given, "config": actor()}
    gradients = [
        torch.autograd.grad(function(**arguments)[0], given["log_prob"])[0]
        for function in (verl.get_policy_loss_fn("vanilla"), policy_loss("jensen_shannon", 5.0))
    ]
    torch.testing.assert_close(*gradients)


def test_cutting_a_mini_batch_changes_nothing(verl):
    """Micro-batches with the global counts sum to the whole, as verl's own losses do."""
    given, loss = batch(), policy_loss("jensen_shannon", 0.5, base="gpg")
    tokens = int(given["response_mask"].sum())
    for mode in ("token-mean", "seq-mean-token-mean"):
        info = actor(dp_size=1, batch_num_tokens=tokens, global_batch_size=3)
        whole, _ = loss(**given, loss_agg_mode=mode, config=info)
        parts = [
            loss(**{key: value[rows] for key, value in given.items()}, loss_agg_mode=mode, config=info)[0]
            for rows in (slice(0, 1), slice(1, 3))
        ]
        torch.testing.assert_close(sum(parts), whole)


def test_padding_is_not_read_and_weights_of_the_rollout_engine_count(verl):
    given, loss = batch(), policy_loss("neyman_chi2", 0.5)
    weights = torch.rand(3, 4, dtype=torch.float64)
    arguments = {"rollout_is_weights": weights, "config": actor()}
    clean, metrics = loss(**given, **arguments)
    terms = get_divergence("neyman_chi2").generator(given["log_prob"] - given["old_log_prob"]) * weights
    base, _ = verl.get_policy_loss_fn("vanilla")(**given, **arguments)
    torch.testing.assert_close(clean, base + 0.5 * agg_loss(terms, given["response_mask"], "token-mean"))
    padded = torch.where(given["response_mask"], given["old_log_prob"], math.nan)
    verl.POLICY_LOSS_REGISTRY["vanilla"] = lambda **_: (torch.zeros((), dtype=torch.float64), {})  # not its NaN
    broken, shown = loss(**given | {"old_log_prob": padded}, **arguments)
    (gradient,) = torch.autograd.grad(broken, given["log_prob"])
    torch.testing.assert_close(broken, clean - base)
    assert torch.isfinite(gradient).all() and shown["actor/f_divergence"] == metrics["actor/f_divergence"]


def test_an_empty_mini_batch_has_no_divergence(verl):
    given = batch() | {"response_mask": torch.zeros(3, 4, dtype=torch.bool)}
    loss, metrics = policy_loss("jensen_shannon", 0.5)(**given, config=actor(batch_num_tokens=7))
    assert loss.item() == 0.0 and metrics["actor/f_divergence"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient": -0.1}, "coefficient=-0.1"),
        ({"coefficient": math.nan}, "coefficient=nan"),
        ({"coefficient": math.inf}, "coefficient=inf"),
        ({"divergence": "jensenshanon"}, "jensen_shannon"),
        ({"coefficient_clip": 0.0}, "coefficient_clip=0.0"),
        ({"max_exponent": 100.0}, "max_exponent"),
        ({"name": "vanilla"}, "has a policy loss named 'vanilla' already"),
        ({"base": "vanila"}, "Unsupported loss mode: vanila"),
    ],
)
def test_what_cannot_be_registered_is_refused_at_once(verl, options, message):
    before = dict(verl.POLICY_LOSS_REGISTRY)
    with pytest.raises(ValueError, match=message):
        register(**{"name": "mine", "divergence": "jensen_shannon", "coefficient": 0.1} | options)
    assert before == verl.POLICY_LOSS_REGISTRY
