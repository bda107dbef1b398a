"""The Sinkhorn term: one distribution, an assignment, the published iterations, dense gradients, bounds of the cells."""

import itertools
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from fdiv.distillation.transport import (
    Transport,
    sinkhorn_plan,
    transport_costs,
    transport_from_hidden,
)
from fdiv.divergences import get_divergence
from fdiv.models import vocabulary
from fdiv.models.selected import cell_log_probs
from fdiv.models.vocabulary import Head


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(vocabulary, "_BLOCK", 300)
    monkeypatch.setattr(vocabulary, "_TILE", 120)


def distributions(rows=6, cells=5, seed=0, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, rows, cells, generator=generator, dtype=torch.float64) * spread
    return both.softmax(-1).unbind(0)


def models(rows=11, tokens=41, width=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def one(h):
        parts = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((rows, h), (tokens, h), (tokens,))
        )
        hidden, weight, bias = (part.to(dtype) for part in parts)
        return hidden.requires_grad_(), Head(weight.requires_grad_(), bias.requires_grad_(), 0.8, 9.0)

    return one(width), one(width + 2)


def log_probs(hidden, head, temperature):
    logits = head.softcap * torch.tanh(head.scale * (hidden @ head.weight.t() + head.bias) / head.softcap)
    return (logits / temperature).log_softmax(-1)


# ---------------------------------------------------------------- transport
@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 100.0])
def test_one_distribution_pays_twice_the_total_variation(epsilon):
    p, q = distributions(rows=1)
    found = transport_costs(p, q, epsilon=epsilon, iterations=1)
    twice = 2 * get_divergence("total_variation").exact(p.log(), q.log())
    torch.testing.assert_close(found.cost, twice)
    assert found.row_error < 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_without_entropy_it_is_the_optimal_assignment(seed):
    p, q = distributions(seed=seed)
    cost = torch.cdist(p, q, p=1.0)
    rows, columns = linear_sum_assignment(cost.numpy())
    best = cost[rows, columns].mean().item()
    found = transport_costs(p, q, epsilon=2e-3, iterations=3000)
    assert found.cost.mean().item() == pytest.approx(best, abs=5e-3)
    assert found.row_error < 0.05
    plan = sinkhorn_plan(cost, 2e-3, 3000).exp() * len(p)
    assert plan.argmax(1).tolist() == columns.tolist()


def test_with_much_entropy_everyone_is_carried_everywhere():
    p, q = distributions()
    cost = torch.cdist(p, q, p=1.0)
    assert transport_costs(p, q, epsilon=1e6).cost.mean().item() == pytest.approx(cost.mean().item(), rel=1e-5)


def test_the_iterations_are_those_of_the_kernel():
    """K = e^(−C/ε), rows and columns divided by their sums in turn, 20 times, as SinKD writes them; its P sums to n."""
    p, q = distributions()
    cost = torch.cdist(p, q, p=1.0)
    plan = torch.exp(-cost / 0.1)
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    torch.testing.assert_close(6 * sinkhorn_plan(cost, 0.1).exp(), plan)
    torch.testing.assert_close(transport_costs(p, q).cost.sum(), (plan * cost).sum())
    assert transport_costs(p, q, iterations=1).row_error > transport_costs(p, q).row_error


def test_it_does_not_underflow_where_the_kernel_would():
    p, q = distributions(cells=5, spread=9.0)
    found = transport_costs(p.float().requires_grad_(), q.float(), epsilon=1e-4, iterations=50)
    assert torch.isfinite(found.cost).all() and 0 <= found.cost.mean() <= 2


def test_the_gradient_runs_through_the_iterations():
    p, q = distributions(rows=4)
    logits = p.log().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: transport_costs(z.softmax(-1), q, epsilon=0.3).cost, [logits], atol=1e-6)


def test_the_order_of_the_teachers_rows_does_not_matter():
    """What a divergence token by token cannot say: the batch's distributions are matched, whichever row they are in."""
    p, _ = distributions(rows=5, spread=4.0)
    moved = transport_costs(p, p[torch.tensor([3, 0, 4, 1, 2])], epsilon=0.01, iterations=500).cost.mean()
    assert moved < 0.01
    torch.testing.assert_close(
        transport_costs(p, p, epsilon=0.01, iterations=500).cost.mean(), moved, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.0, 20), (math.nan, 20), (0.1, 0)])
def test_what_a_plan_refuses(epsilon, iterations):
    with pytest.raises(ValueError, match="must be above 0"):
        sinkhorn_plan(torch.zeros(2, 2), epsilon, iterations)


def test_what_is_no_distribution_is_refused():
    """NaN passes, for a loss that is NaN is refused with more to say."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    for pair, message in (
        ((p.log(), p), r"p: 2 of 2 rows are no distributions \(row 0 adds up to -3.507\): pass probabilities"),
        ((p, 2 * p), "q: 2 of 2 rows are no distributions"),
        ((p[0], p), r"p is \(3,\)"),
        ((p, torch.ones(2, 3).long()), "floating-point numbers"),
        ((p, torch.full((2, 2), 0.5)), r"p is \(2, 3\) and q \(2, 2\): both must have rows over the same cells"),
    ):
        with pytest.raises(ValueError, match=message):
            transport_costs(*pair)
    assert transport_costs(p[:0], p[:0]).cost.shape == (0,)
    half = transport_costs(p.bfloat16(), p.flip(0).bfloat16()).cost
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, transport_costs(p, p.flip(0)).cost, rtol=0.02, atol=0)


# ---------------------------------------------------------------- chosen cells from hidden states
@pytest.mark.parametrize("tail", [True, False])
def test_cells_are_those_of_the_dense_log_probs(tail, small_blocks):
    (hidden, head), _ = models()
    ids = torch.stack([torch.randperm(41, generator=torch.Generator().manual_seed(row))[:5] for row in range(11)])
    ids[3, 2:], ids[7] = -1, -1
    dense = log_probs(hidden, head, 1.7)
    chosen = dense.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -math.inf)
    if tail:
        taken = torch.zeros(11, 41, dtype=torch.bool)
        for row, some in enumerate(ids):
            taken[row, some[some >= 0]] = True
        chosen = torch.cat([chosen, dense.masked_fill(taken, -math.inf).logsumexp(-1, keepdim=True)], -1)
    got = cell_log_probs(hidden, head, ids, temperature=1.7, tail=tail)
    torch.testing.assert_close(got, chosen)
    upstream = torch.linspace(-1, 2, got.numel(), dtype=torch.float64).reshape(got.shape)
    leaves = [hidden, head.weight, head.bias]
    wanted = torch.autograd.grad(chosen[torch.isfinite(chosen)] @ upstream[torch.isfinite(chosen)], leaves)
    for one, other in zip(torch.autograd.grad(got, leaves, upstream), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_cells_of_the_whole_vocabulary_have_no_rest(small_blocks):
    (hidden, head), _ = models()
    got = cell_log_probs(hidden, head, torch.arange(41).expand(11, -1))
    assert torch.isneginf(got[:, -1]).all()
    got[:, :-1].exp().sum().backward()
    assert torch.isfinite(hidden.grad).all()


def test_half_precision_cells(small_blocks):
    (hidden, head), _ = models(dtype=torch.bfloat16)
    exact = [part.detach().double() for part in (hidden, head.weight, head.bias)]
    dense = log_probs(exact[0], Head(*exact[1:], 0.8, 9.0), 2.0)
    ids = torch.arange(4).expand(11, -1)
    got = cell_log_probs(hidden, head, ids, temperature=2.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[:, :4].double(), dense[:, :4], rtol=1e-4, atol=1e-4)
    got.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("ids", [torch.zeros(10, 2), torch.full((11, 2), 41), torch.full((11, 2), -2)], ids=str)
def test_ids_that_cannot_be(ids):
    (hidden, head), _ = models()
    with pytest.raises(ValueError, match=r"must be \[11, M\], each one of 41 tokens"):
        cell_log_probs(hidden, head, ids.long())


# ---------------------------------------------------------------- the term from hidden states
def dense_costs(student, teacher, how, cells=None):
    """By hand, group by group, from all log-probabilities; `cells` of a group, or all tokens."""
    p, q = (log_probs(*side, how.temperature).exp() for side in (student, teacher))
    q = q.detach()
    parts = []
    for start in range(0, len(p), how.group):
        rows = slice(start, start + how.group)
        if cells is not None:
            chosen = cells(q[rows])
            rest = torch.tensor([v for v in range(p.shape[1]) if v not in chosen])
            pair = [torch.cat([x[rows][:, chosen], x[rows][:, rest].sum(-1, keepdim=True)], -1) for x in (p, q)]
        else:
            pair = [p[rows], q[rows]]
        parts.append(transport_costs(*pair, epsilon=how.epsilon, iterations=how.iterations).cost)
    return torch.cat(parts)


def test_the_teachers_top_k_and_the_rest(small_blocks):
    """Groups of 4, 4 and 3 rows; values and the student's gradients against the dense ones."""
    student, teacher = models()
    how = Transport(top_k=3, group=4)
    wanted = dense_costs(student, teacher, how, lambda q: sorted(set(q.topk(3).indices.flatten().tolist())))
    got = transport_from_hidden(*student, *teacher, how)
    torch.testing.assert_close(got.cost, wanted)
    leaves = [student[0], student[1].weight, student[1].bias]
    for one, other in zip(
        torch.autograd.grad(got.cost.mean(), leaves), torch.autograd.grad(wanted.mean(), leaves), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert not any(part.requires_grad and part.grad is not None for part in (teacher[0], teacher[1].weight))


def test_with_all_tokens_it_is_the_whole_and_fewer_bound_each_pair_from_below(small_blocks):
    student, teacher = models()
    whole = dense_costs(student, teacher, Transport(group=11))
    torch.testing.assert_close(transport_from_hidden(*student, *teacher, Transport(top_k=41, group=11)).cost, whole)
    alone = [
        transport_from_hidden(*student, *teacher, Transport(top_k=k, group=1)).cost.detach() for k in (1, 2, 5, 20, 41)
    ]
    for fewer, more in itertools.pairwise(alone):
        assert (fewer <= more + 1e-12).all()
    log_p, log_q = (log_probs(*side, 2.0) for side in (student, teacher))
    torch.testing.assert_close(alone[-1], 2 * get_divergence("total_variation").exact(log_p, log_q))


def test_label_words_are_renormalised(small_blocks):
    student, teacher = models()
    how = Transport(words=(3, 17, 29), group=11)
    pair = [log_probs(*side, 2.0)[:, [3, 17, 29]].softmax(-1) for side in (student, teacher)]
    torch.testing.assert_close(transport_from_hidden(*student, *teacher, how).cost, transport_costs(*pair).cost)


def test_no_rows():
    student, teacher = models(rows=0)
    assert transport_from_hidden(*student, *teacher, Transport()).cost.shape == (0,)


# ---------------------------------------------------------------- in the trainer
@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    from tests.support.runs.f_distill import make_teacher

    return make_teacher(tmp_path_factory.mktemp("teacher"))


def term_by_hand(trainer, model_dir, teacher_dir, data, words=None):
    """⟨P, C⟩ of all rows at once, dense: over the whole vocabulary, or over words at the first token."""
    from transformers import AutoModelForCausalLM

    models_ = [AutoModelForCausalLM.from_pretrained(path).double() for path in (model_dir, teacher_dir)]
    pair = [[], []]
    tokenizer = trainer._tokenizer
    for row in data:
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([whole[: len(prompt) + 24]])
        for side, model in zip(pair, models_, strict=True):
            logits = model(ids).logits[0, len(prompt) - 1 : -1] / 2.0
            side.append(logits[:1, list(words)] if words else logits)
    p, q = (torch.cat(side).softmax(-1) for side in pair)
    return transport_costs(p, q.detach()), models_[0]


@pytest.mark.parametrize("words", [None, [" comes", " what", "?"]])
def test_the_trainer_adds_the_term(words, tiny_model_dir, teacher_dir, tmp_path):
    """Loss and gradient: with λ less without, over λ, is the dense term; and it is logged."""
    from transformers import AutoTokenizer

    from tests.support.runs.f_distill import make_trainer, rows

    tokenizer, data = AutoTokenizer.from_pretrained(tiny_model_dir), rows(4)
    words = words and [word for word in words if len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1]
    assert words is None or len(words) >= 2
    options = {"sinkhorn_words": words} if words else {"sinkhorn_top_k": len(tokenizer), "sinkhorn_group": 500}
    found = []
    for number, more in enumerate(({}, {"sinkhorn_weight": 3.0, **options})):
        trainer = make_trainer(tiny_model_dir, teacher_dir, data, tmp_path / str(number), max_steps=1, **more)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(data))
        loss.backward()
        found.append((loss.item(), [part.grad for part in trainer.model.parameters()]))
    ids = words and [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    term, student = term_by_hand(trainer, tiny_model_dir, teacher_dir, data, ids)
    term.cost.mean().backward()
    assert (found[1][0] - found[0][0]) / 3.0 == pytest.approx(term.cost.mean().item(), rel=1e-3)
    for one, two, dense in zip(found[0][1], found[1][1], student.parameters(), strict=True):
        scale = dense.grad.abs().max().item()
        torch.testing.assert_close(((two - one) / 3.0).double(), dense.grad, rtol=5e-3, atol=2e-3 * scale + 1e-7)
    metrics = trainer.reduce_examples(
        dict(zip(trainer._example_columns, torch.cat(trainer._examples["train"]).unbind(1), strict=True)), "eval"
    )
    assert metrics["sinkhorn"] == pytest.approx(term.cost.mean().item(), rel=1e-3)
    assert metrics["sinkhorn_row_error"] == pytest.approx(term.row_error.item(), abs=1e-4)
    assert metrics["loss"] == pytest.approx(found[1][0], rel=1e-4)
    assert trainer.objective_settings()["sinkhorn_weight"] == 3.0


def test_the_term_alone_teaches(tiny_model_dir, teacher_dir, tmp_path):
    from tests.support.runs.f_distill import make_trainer, rows

    trainer = make_trainer(
        tiny_model_dir, teacher_dir, rows(), tmp_path, sinkhorn_weight=50.0, max_steps=15, learning_rate=5e-3,
        per_device_train_batch_size=6,
    )  # fmt: skip
    trainer.train()
    costs = [entry["sinkhorn"] for entry in trainer.state.log_history if "sinkhorn" in entry]
    assert costs[-1] < 0.7 * costs[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinkhorn_epsilon": 0.2}, "does nothing at sinkhorn_weight: 0"),
        ({"sinkhorn_weight": 0.1, "sinkhorn_words": ["a"]}, "at least two words"),
        ({"sinkhorn_weight": 0.1, "sinkhorn_words": ["a", "a"]}, "each once"),
        ({"sinkhorn_weight": -1.0}, "sinkhorn_weight=-1.0"),
        ({"sinkhorn_weight": 0.1, "sinkhorn_epsilon": 0.0}, "sinkhorn_epsilon=0.0"),
        ({"sinkhorn_weight": 0.1, "teacher": {"name": "cache", "path": "x"}}, "take a teacher in memory"),
        ({"sinkhorn_weight": 0.1, "teacher": {"name": "server", "url": "http://localhost:1"}, "teacher_model_name_or_path": "x"}, "take a teacher in memory"),
    ],
)  # fmt: skip
def test_options_of_the_term(options, message, tmp_path):
    from fdiv.distillation import FDistillConfig

    with pytest.raises(ValueError, match=message):
        FDistillConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, on_policy_share=0.0, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinkhorn_words": [" comes", " of course it does"]}, "a label word must be one"),
        ({"sinkhorn_top_k": 10**6}, "sinkhorn_top_k=1000000: student and teacher have"),
    ],
)
def test_words_and_cells_that_cannot_be(options, message, tiny_model_dir, teacher_dir, tmp_path):
    from fdiv.errors import DataError
    from tests.support.runs.f_distill import make_trainer, rows

    with pytest.raises(DataError, match=message):
        make_trainer(tiny_model_dir, teacher_dir, rows(2), tmp_path, sinkhorn_weight=0.1, **options)
