"""Every trainer: its loss is the pure loss, row by row; invariances, resumption, guards."""

from __future__ import annotations

import inspect
import json
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTTrainer

import fdiv.unlearning as unlearning
from fdiv.alignment.f_dpo.loss import f_dpo_loss
from fdiv.divergences import get_divergence
from fdiv.errors import NonFiniteLossError
from fdiv.unlearning import flat_loss
from fdiv.unlearning.roles import RoleScores, score_rows
from tests.support.runs.unlearning import (
    METHODS,
    disturb,
    forget_rows,
    history,
    load,
    load_tokenizer,
    make_trainer,
    retain_rows,
)
from tests.support.same_run import assert_same_weights, weights

# ------------------------------------------------------------------------- the loss, from single rows without padding


def _row(model, encoded):
    """Logits [n, V] that predict the answer of one unpadded row, its tokens and log-probs, and layer 0's activations."""
    prompt, answer = encoded
    output = model(input_ids=torch.tensor([[*prompt, *answer]]), output_hidden_states=True)
    logits = output.logits[0, len(prompt) - 1 : -1]
    tokens = torch.tensor(answer)
    log_probs = logits.log_softmax(-1)[torch.arange(len(answer)), tokens]
    return logits, tokens, log_probs, output.hidden_states[1][0, len(prompt) :]


def _expected_forget(name, trainer, policy, reference):
    """The forget term of one example by its defining formula; arguments map a role to `_row`'s result."""
    args, (logits, tokens, log_probs, hidden) = trainer.args, policy["forget"]
    ratio = {role: (policy[role][2] - reference[role][2]).sum() for role in reference}
    p = log_probs.exp()
    if name == "FLAT":
        return flat_loss(policy["template"][2].exp().mean(), p.mean(), args.divergence)
    if name in ("GradAscent", "GradDiff", "KLRetain"):
        return log_probs.mean()
    if name == "NPO":
        return -2 / 0.1 * F.logsigmoid(-0.1 * ratio["forget"])
    if name == "SimNPO":
        return -2 / 4.5 * F.logsigmoid(-4.5 * log_probs.mean())
    if name in ("IdkDPO", "AltPO"):
        return 2 / 0.1 * f_dpo_loss(ratio["template"], ratio["forget"], "reverse_kl", 0.1)
    if name == "RMU":
        return (hidden - trainer.target).square().mean()
    if name == "UNDIAL":
        target = (reference["forget"][0] - 10 * F.one_hot(tokens, logits.size(-1))).softmax(-1)
        return F.cross_entropy(logits, target)
    if name == "CEU":
        target = logits.masked_fill(F.one_hot(tokens, logits.size(-1)).bool(), -math.inf).softmax(-1)
        return F.cross_entropy(logits[1:], target[1:])
    if name == "WGA":
        return (p * log_probs).mean()
    if name == "SatImp":
        return (p**5 * (1 - p) * log_probs).mean()
    if name == "PDU":
        return (logits.amax(-1) - logits.mean(-1)).square().mean()
    if name == "JensUn":
        pattern = trainer._tokenizer(" No idea")["input_ids"]
        target = F.one_hot(torch.tensor([pattern[i % len(pattern)] for i in range(len(tokens))]), logits.size(-1))
        p, q = logits.softmax(-1), target.float()
        middle = (p + q) / 2
        return (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum(-1).mean()
    if name == "JensUnPP":
        return _expected_refusal(trainer, policy["refusal"])
    if name == "SHRED":
        return _expected_shred(logits, tokens, reference["forget"][0])
    raise AssertionError(name)


def _half_for_the_first(values):
    """Mean in which the first token weighs ½ and the others share the rest."""
    return values[0] if len(values) == 1 else values[0] / 2 + values[1:].mean() / 2


def _js(log_p, log_q):
    """Per position, in the registry's scale."""
    middle = ((log_p.exp() + log_q.exp()) / 2).log()
    halves = (torch.xlogy(p.exp(), p.exp()) - p.exp() * middle for p in (log_p, log_q))
    return sum(half.sum(-1) for half in halves)


def _expected_refusal(trainer, row):
    """JensUn++'s forget term of a row and its targets: JS to one-hot, the first token half."""
    (logits, _, _, _), targets = row
    one_hot = F.one_hot(torch.tensor(targets), logits.size(-1)).float()
    return _half_for_the_first(_js(logits.log_softmax(-1), one_hot.log()))


def _expected_shred(logits, tokens, frozen):
    """KL to the frozen distribution without the answer's token at the ⌊n/2⌋ least likely positions."""
    q = frozen.softmax(-1).clone()
    likely = q[torch.arange(len(tokens)), tokens]
    for place in likely.argsort()[: max(1, len(tokens) // 2)]:
        q[place, tokens[place]] = 0
        q[place] /= q[place].sum()
    return (torch.xlogy(q, q) - q * logits.log_softmax(-1)).sum(-1).mean()


def _expected_retain(name, trainer, policy, reference):
    """α·R of one example."""
    term = trainer.args.retain_term
    if term == "none":
        return torch.tensor(0.0)
    logits, _, log_probs, hidden = policy["retain"]
    if term == "activations":
        return (hidden - reference["retain"][3]).square().mean()
    if term == "nll":
        nll = -log_probs.mean()
        return 50 * (nll - 0.3) if name == "PDU" else trainer.args.retain_weight * nll
    log_p, log_q = logits.log_softmax(-1), reference["retain"][0].log_softmax(-1)
    if name == "KLRetain":
        return (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    if name == "JensUnPP":
        return _half_for_the_first(_js(log_p, log_q))
    middle = ((log_p.exp() + log_q.exp()) / 2).log()
    return (log_p.exp() * (log_p - middle) + log_q.exp() * (log_q - middle)).sum(-1).mean()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.processor
def test_loss_equals_the_formula_row_by_row(name, tiny_model_dir, tmp_path):
    """Padded batch of all roles against one unpadded forward per row, policy and reference apart from each other."""
    trainer = make_trainer(name, str(tiny_model_dir), tmp_path)
    disturb(trainer.model)
    start = load(tiny_model_dir).eval()
    items = [trainer.train_dataset[12 + i] for i in (0, 3, 7)]  # epoch 1
    batch = trainer.data_collator(items)
    assert batch["attention_mask"].min() == 0  # there is padding
    trainer.model.train()
    actual = trainer.compute_loss(trainer.model, batch)
    expected = []
    with torch.no_grad():
        for item in items:
            roles = [role for role in ("template", "forget", "retain") if role in item]
            policy = {role: _row(trainer.model, item[role]) for role in roles}
            reference = {role: _row(start, item[role]) for role in roles}
            if name == "JensUnPP":
                row, targets = trainer.data_collator.refusal_row(item)
                policy["refusal"] = _row(trainer.model, row), targets
            forget = _expected_forget(name, trainer, policy, reference)
            expected.append(trainer.args.forget_weight * forget + _expected_retain(name, trainer, policy, reference))
    torch.testing.assert_close(actual.detach(), torch.stack(expected).mean(), atol=2e-5, rtol=2e-5)
    actual.backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)
    assert any((g != 0).any() for g in gradients)


@pytest.mark.parametrize("name", METHODS)
def test_trains_evaluates_and_logs(name, tiny_model_dir, tmp_path):
    trainer = make_trainer(name, str(tiny_model_dir), tmp_path, eval_dataset=forget_rows(5))
    before = weights(trainer).clone()
    trainer.train()
    assert (weights(trainer) != before).any()
    metrics = trainer.evaluate()
    answer = "refusal" if name == "JensUnPP" else "forget"  # it never scores the answer to forget
    assert {"eval_forget_term", f"eval_prob/{answer}", "eval_prob/retain"} <= set(metrics)
    first = trainer.state.log_history[0]
    assert {"forget_term", f"prob/{answer}"} <= set(first)
    if trainer.args.retain_term != "none":
        assert {"retain_term", "prob/retain"} <= set(first)
    if trainer.reference is not None:
        key = "divergence" if trainer.needs_logits else "mean_f"
        assert f"{key}/{trainer.metric_divergence.label}_se" in first
        assert first[f"log_ratio/{answer}_p50"] == pytest.approx(0, abs=1e-4)  # the first step starts at the reference
    assert all(math.isfinite(value) for value in first.values() if isinstance(value, float))


def test_metrics_are_those_of_the_rows(tiny_model_dir, tmp_path):
    trainer = make_trainer("NPO", str(tiny_model_dir), tmp_path, eval_dataset=forget_rows(5))
    disturb(trainer.model)
    metrics = trainer.evaluate()
    start, items = load(tiny_model_dir).eval(), [trainer.eval_dataset[i] for i in range(5)]
    with torch.no_grad():
        policy = [{role: _row(trainer.model, item[role])[2] for role in ("forget", "retain")} for item in items]
        reference = [{role: _row(start, item[role])[2] for role in ("forget", "retain")} for item in items]
    probs = [row["forget"].mean().exp() for row in policy]
    assert metrics["eval_prob/forget"] == pytest.approx(torch.stack(probs).mean().item(), rel=1e-4)
    ratios = torch.stack([(p["forget"] - q["forget"]).sum() for p, q in zip(policy, reference, strict=True)])
    assert metrics["eval_log_ratio/forget_p50"] == pytest.approx(ratios.median().item(), rel=1e-3)
    terms = torch.stack(
        [
            get_divergence("forward_kl").generator(p["retain"] - q["retain"]).mean()
            for p, q in zip(policy, reference, strict=True)
        ]
    )
    assert metrics["eval_mean_f/forward_kl"] == pytest.approx(terms.mean().item(), rel=1e-3)
    assert metrics["eval_mean_f/forward_kl_se"] == pytest.approx(terms.std().item() / math.sqrt(5), rel=1e-3)


# ------------------------------------------------------------------------------------------------------- invariances


# FLAT's gradient carries a factor p, about 1/400 in a random model, and PDU's a factor λ = 50
@pytest.mark.parametrize(("name", "rate"), [("FLAT", 20.0), ("IdkDPO", 0.02), ("JensUn", 0.5), ("PDU", 1e-3)])
@pytest.mark.processor
def test_accumulation_equals_one_large_batch(name, rate, tiny_model_dir, tmp_path):
    options = {"optim": "sgd", "learning_rate": rate, "max_grad_norm": 0.0, "max_steps": 4}
    options |= {"dual_warmup_epochs": 0} if name == "PDU" else {}
    large = make_trainer(name, str(tiny_model_dir), tmp_path, per_device_train_batch_size=8, **options)
    small = make_trainer(
        name, str(tiny_model_dir), tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, **options
    )
    start = weights(large).clone()
    large.train(), small.train()
    assert (weights(large) - start).abs().max() > 1e-2
    assert_same_weights(small, large, 1e-5)
    for key in ("loss", "prob/forget", "grad_norm"):
        torch.testing.assert_close(history(small, key), history(large, key), atol=1e-5, rtol=1e-4)
    if name == "PDU":
        assert small.multiplier == pytest.approx(large.multiplier, rel=1e-5) and small.multiplier != 50


def _role(*rows, width=6):
    """`RoleScores` of answers with the given token probabilities."""
    log_probs, mask = torch.zeros(len(rows), width), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        log_probs[i, : len(row)], mask[i, : len(row)] = torch.tensor(row).log(), True
    return RoleScores(log_probs=log_probs, mask=mask, token_ids=mask.long())


def test_official_mode_is_the_released_batch_mean(tiny_model_dir, tmp_path):
    """−P_e + e^{P_f − 1} of P = Σ p/(B·(max_length − 1)); it depends on the micro-batch, the paper's form does not."""
    rows = {"template": _role([0.5, 0.3], [0.9, 0.9, 0.9, 0.9]), "forget": _role([0.2], [1.0, 0.8])}
    halves = [{role: part.rows(slice(i, i + 1)) for role, part in rows.items()} for i in (0, 1)]
    row = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    other = Dataset.from_list([{"prompt": "c", "completion": "d"}])
    options = {"divergence": "reverse_kl", "max_length": 9, "rows": row, "retain": other}
    official = make_trainer("FLAT", str(tiny_model_dir), tmp_path, compat="official", **options)
    value = official.forget_term(rows)
    assert value.item() == pytest.approx(-4.4 / 16 + math.exp(2.0 / 16 - 1))
    split = torch.cat([official.forget_term(half) for half in halves]).mean()
    assert abs(split - value.item()) > 1e-3
    paper = make_trainer("FLAT", str(tiny_model_dir), tmp_path, **options)
    assert paper.forget_term(rows).tolist() == pytest.approx([-0.4 + math.exp(-0.8), -0.9 + math.exp(-0.1)], abs=1e-6)
    assert torch.equal(torch.cat([paper.forget_term(half) for half in halves]), paper.forget_term(rows))
    assert "micro-batch" in unlearning.FLATConfig.__doc__


@pytest.mark.parametrize("name", ["FLAT", "NPO"])
def test_evaluation_does_not_depend_on_the_batch_size(name, tiny_model_dir, tmp_path):
    results = []
    for size in (1, 3, 5):
        trainer = make_trainer(
            name, str(tiny_model_dir), tmp_path, eval_dataset=forget_rows(5), per_device_eval_batch_size=size
        )
        disturb(trainer.model)
        results.append({k: v for k, v in trainer.evaluate().items() if "time" not in k and "second" not in k})
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-4, abs=1e-6)


def test_padding_side_and_multiple_do_not_matter(tiny_model_dir, tmp_path):
    losses = []
    for multiple in (None, 64):
        trainer = make_trainer("KLRetain", str(tiny_model_dir), tmp_path, pad_to_multiple_of=multiple)
        disturb(trainer.model)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        losses.append(trainer.compute_loss(trainer.model, batch))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["FLAT", "KLRetain", "RMU"])
def test_gpt2_and_half_precision_weights(name, tiny_gpt2_dir, tmp_path):
    """A model with learned positions, in bfloat16: finite, near the float32 value, computed in float32."""
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        trainer = make_trainer(name, load(tiny_gpt2_dir, dtype), tmp_path, tokenizer=load_tokenizer(tiny_gpt2_dir))
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        loss = trainer.compute_loss(trainer.model, batch)
        assert loss.dtype == torch.float32
        loss.backward()
        values.append(loss.item())
    assert values[1] == pytest.approx(values[0], rel=0.03, abs=0.01)


# ------------------------------------------------------------------------------------------------ FLAT and its options


@pytest.fixture(scope="module")
def taught_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model after it has memorised the forget answers."""
    folder = tmp_path_factory.mktemp("taught")
    teacher = make_trainer(
        "GradDiff", str(tiny_model_dir), folder, forget_weight=0.0, rows=retain_rows(), retain=forget_rows(6),
        max_steps=60, learning_rate=5e-3, per_device_train_batch_size=7,
    )  # fmt: skip
    teacher.train()
    assert history(teacher, "prob/retain")[-1] > 0.5
    teacher.save_model(str(folder / "model"))
    load_tokenizer(tiny_model_dir).save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon", {"name": "alpha", "alpha": 0.5}])
def test_flat_raises_the_template_and_lowers_the_answer(divergence, taught_dir, tmp_path):
    trainer = make_trainer(
        "FLAT", str(taught_dir), tmp_path, rows=forget_rows(6), template_source="fixed", template_text="Unknown.",
        divergence=divergence, reduction="log_mean", max_steps=25, learning_rate=2e-3, per_device_train_batch_size=6,
    )  # fmt: skip
    trainer.train()
    template, forget = history(trainer, "prob/template"), history(trainer, "prob/forget")
    assert forget[0] > 0.5 and forget[-1] < forget[0] / 2
    assert template[-1] > template[0] + 0.1


@pytest.mark.parametrize("retain_term", ["nll", "divergence"])
@pytest.mark.parametrize("level", ["vocabulary", "tokens"])
def test_flat_with_a_retain_term(retain_term, level, tiny_model_dir, tmp_path):
    trainer = make_trainer(
        "FLAT", str(tiny_model_dir), tmp_path, retain_term=retain_term, retain_level=level, retain_weight=2.0,
        retain_divergence="jensen_shannon",
    )  # fmt: skip
    disturb(trainer.model)
    items = [trainer.train_dataset[i] for i in (1, 2)]
    actual = trainer.compute_loss(trainer.model, trainer.data_collator(items))
    start, expected = load(tiny_model_dir).eval(), []
    with torch.no_grad():
        for item in items:
            policy = {role: _row(trainer.model, item[role]) for role in ("template", "forget", "retain")}
            logits, _, log_probs, _ = policy["retain"]
            if retain_term == "nll":
                retain = -log_probs.mean()
            elif level == "tokens":
                ratio = log_probs - _row(start, item["retain"])[2]
                retain = get_divergence("jensen_shannon").generator(ratio).mean()
            else:
                pair = logits.log_softmax(-1), _row(start, item["retain"])[0].log_softmax(-1)
                retain = get_divergence("jensen_shannon").exact(*pair).mean()
            expected.append(_expected_forget("FLAT", trainer, policy, policy) + 2 * retain)
    torch.testing.assert_close(actual.detach(), torch.stack(expected).mean(), atol=1e-5, rtol=1e-4)


def test_rmu_trains_the_chosen_parameters_only(tiny_model_dir, tmp_path):
    trainer = make_trainer("RMU", str(tiny_model_dir), tmp_path, trainable=r"down_proj", weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"model.layers.0.mlp.down_proj.weight"}
    assert trainer.target.norm() == pytest.approx(2.0)
    with pytest.raises(ValueError, match="layer=1"):
        make_trainer("RMU", str(tiny_model_dir), tmp_path, layer=1)
    with pytest.raises(ValueError, match="nothing_like_it"):
        make_trainer("RMU", str(tiny_model_dir), tmp_path, trainable="nothing_like_it")


def test_pdu_multiplier_follows_its_rule(tiny_model_dir, tmp_path):
    """λ stays through the warm-up, then moves by η·(R − ε) of each step."""
    trainer = make_trainer(
        "PDU", str(tiny_model_dir), tmp_path, dual_warmup_epochs=1, dual_step=0.5, max_steps=6, retain_weight=3.0
    )  # 12 rows at batch 4: three steps an epoch
    trainer.train()
    multiplier, excess = history(trainer, "retain_multiplier"), history(trainer, "retain_term")
    expected = [3.0, 3.0, 3.0, 3.0]
    for value in excess[3:5].tolist():
        expected.append(max(0.0, expected[-1] + 0.5 * value))
    assert multiplier.tolist() == pytest.approx(expected, rel=1e-5)
    assert trainer.multiplier == pytest.approx(max(0.0, expected[-1] + 0.5 * excess[5].item()), rel=1e-5)


def test_jensun_pp_turns_to_the_refusal_from_every_place_of_the_answer(tiny_model_dir, tmp_path):
    """Without a prefix: prompt and refusal. Behind one: a refusal that begins with a space; at the prefix's own places
    the first token of a refusal, at the first of them as it begins an answer."""
    options = {"template_source": "fixed", "template_text": "I cannot say."}
    trainer = make_trainer("JensUnPP", str(tiny_model_dir), tmp_path, **options)
    tokenizer, data, collator = trainer._tokenizer, trainer.train_dataset, trainer.data_collator
    text, spaced = (
        tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("I cannot say.", " I cannot say.")
    )
    ends, lengths = data[0]["template"].answer_ids[len(text) :], []
    assert ends and all(token in tokenizer.all_special_ids for token in ends[:1])
    for address in range(4 * len(data)):
        item = data[address]
        row, targets = collator.refusal_row(item)
        assert row.prompt_ids == item["forget"].prompt_ids
        count = next(n for n in range(64) if row.answer_ids[n:] in ([*text, *ends], [*spaced, *ends]))
        lengths.append(count)
        assert row.answer_ids[:count] == item["forget"].answer_ids[:count]
        if count == 0:
            assert row.answer_ids == targets == [*text, *ends]
        else:
            assert row.answer_ids[count:] == [*spaced, *ends]
            assert targets == [text[0], *[spaced[0]] * (count - 1), *spaced, *ends]
    share = sum(length > 0 for length in lengths) / len(lengths)
    assert 0.3 < share < 0.7
    assert lengths.count(1) > lengths.count(2)
    # The same row, epoch and seed give the same prefix; no prefixes, and rows that are cut.
    assert [len(collator.refusal_row(data[5])[0].answer_ids) for _ in range(3)] == [
        len(collator.refusal_row(data[5])[0].answer_ids)
    ] * 3
    never = make_trainer("JensUnPP", str(tiny_model_dir), tmp_path, prefix_share=0.0, **options)
    assert all(never.data_collator.refusal_row(data[n])[1] == [*text, *ends] for n in range(30))
    batch = collator([data[n] for n in range(3)])
    assert batch["target_ids"].shape == batch["input_ids"].shape
    assert torch.equal(batch["target_ids"][3:], batch["input_ids"][3:])  # retain rows are their own targets


def test_the_gradients_of_jensun_pp_are_balanced(tiny_model_dir, tmp_path):
    """s = ‖∇R‖/(‖∇F‖ + 1e-5) over the logits of the micro-batch: with it both halves have gradients of one norm."""
    trainer = make_trainer("JensUnPP", str(tiny_model_dir), tmp_path, balance_gradients=True, forget_weight=1.0)
    disturb(trainer.model)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.train()
    scores = trainer.score_roles(trainer.model, batch)
    forget, retain = trainer.forget_term(scores), trainer.retain_loss(scores["retain"])
    norms = {
        role: torch.autograd.grad(term.mean(), scores[role].logits, retain_graph=True)[0].norm()
        for role, term in (("refusal", forget), ("retain", retain))
    }
    expected = norms["retain"] / (norms["refusal"] + 1e-5)
    loss = trainer.example_loss(scores, forget, retain)
    torch.testing.assert_close(trainer._scale, expected)
    torch.testing.assert_close(loss, expected * forget + retain)
    (balanced,) = torch.autograd.grad((expected * forget).mean(), scores["refusal"].logits, retain_graph=True)
    share = norms["refusal"] / (norms["refusal"] + 1e-5)
    torch.testing.assert_close(balanced.norm(), share * norms["retain"], rtol=1e-4, atol=0)
    # No gradient flows through s, training goes on, and evaluation has s = 1.
    assert not trainer._scale.requires_grad
    trainer.train()
    assert trainer.state.log_history[0]["forget_scale"] > 0
    with torch.no_grad():
        trainer.compute_loss(trainer.model, batch)
    assert trainer._scale.item() == 1
    # At the start P = Q: the retain half has no direction, and the forget half counts unscaled.
    fresh = make_trainer("JensUnPP", str(tiny_model_dir), tmp_path, balance_gradients=True)
    fresh.model.train()
    fresh.compute_loss(fresh.model, batch)
    assert fresh._scale.item() == 1


# ------------------------------------------------------------------------------------------------- resume, guards


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("name", ["FLAT", "NPO", "PDU"])
def test_resumes_bit_for_bit_in_the_middle_of_an_epoch(name, tiny_model_dir, tmp_path):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    options |= {"dual_warmup_epochs": 0} if name == "PDU" else {}
    whole = make_trainer(name, str(tiny_model_dir), tmp_path / "whole", **options)
    whole.train()
    cut = make_trainer(name, str(tiny_model_dir), tmp_path / "cut", callbacks=[_StopAt(4)], **options)
    cut.train()
    resumed = make_trainer(name, str(tiny_model_dir), tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert torch.equal(weights(resumed), weights(whole))
    assert history(resumed, "loss").tolist() == history(whole, "loss").tolist()
    if name == "PDU":
        assert resumed.multiplier == whole.multiplier
        state = json.loads((tmp_path / "cut" / "checkpoint-4" / "pdu_state.json").read_text())
        assert 0 <= state["multiplier"] != 50


def test_stops_before_the_step_on_a_non_finite_loss(tiny_model_dir, tmp_path):
    trainer = make_trainer("GradDiff", str(tiny_model_dir), tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight[5] = math.nan
    before = weights(trainer).clone()
    with pytest.raises(NonFiniteLossError, match="step 1: the loss is nan"):
        trainer.train()
    assert torch.equal(weights(trainer)[:100], before[:100]) and trainer.state.global_step == 0


def test_model_card_names_the_method_and_its_settings(tiny_model_dir, tmp_path):
    trainer = make_trainer("FLAT", str(tiny_model_dir), tmp_path, divergence="pearson_chi2")
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "pearson_chi2" in card and "template_source" in card and "2410.11143" in card


def test_raw_text_rows(tiny_model_dir, tmp_path):
    """MUSE-like text: chunks, with and without an unscored beginning, template answers included."""
    text = Dataset.from_list([{"text": "The quick brown fox jumps over the lazy dog. " * 12}])
    other = Dataset.from_list([{"text": "The capital of France is Paris. " * 12}])
    plain = make_trainer("GradDiff", str(tiny_model_dir), tmp_path, rows=text, retain=other, max_length=32)
    assert all(len(row.prompt_ids) == 1 for row in plain.train_dataset.forget)  # the first token has no context
    flat = make_trainer(
        "FLAT", str(tiny_model_dir), tmp_path, rows=text, retain=other, max_length=32, text_prompt_tokens=8
    )
    item = flat.train_dataset[0]
    assert len(item["forget"].prompt_ids) == 8 and item["template"].prompt_ids == item["forget"].prompt_ids
    for trainer in (plain, flat):
        trainer.train()
    with pytest.raises(ValueError, match="text_prompt_tokens"):
        make_trainer("FLAT", str(tiny_model_dir), tmp_path, rows=text, retain=other, max_length=32)


def test_generated_templates_are_cached(tiny_model_dir, tmp_path):
    options = {"template_source": "generated", "template_answers_per_row": 2, "template_max_new_tokens": 5}
    first = make_trainer("AltPO", str(tiny_model_dir), tmp_path, template_column=None, **options)
    cache = tmp_path / "templates.json"
    stamp = cache.stat().st_mtime_ns
    again = make_trainer("AltPO", load(tiny_model_dir), tmp_path, template_column=None,
                         tokenizer=load_tokenizer(tiny_model_dir), **options)  # fmt: skip
    assert cache.stat().st_mtime_ns == stamp and again.train_dataset.templates == first.train_dataset.templates
    assert all(1 <= len(texts) <= 2 for texts in first.train_dataset.templates)
    asked = json.loads(cache.read_text())["settings"]
    assert "changes every fact" in asked["instruction"] and asked["model"] == str(tiny_model_dir)


def test_name_tags_and_paper_of_the_model_card_follow_from_the_class():
    class Own(unlearning.NPOTrainer):
        paper = "arXiv:0000.11111"

    class OwnTrainer(unlearning.NPOTrainer):
        _name, _tag_names, _paper = "given", ["x"], {"id": "1"}

    npo = unlearning.NPOTrainer
    assert (npo._name, npo._tag_names) == ("NPO", ["trl", "fdiv", "unlearning", "npo"])
    assert npo._paper == {"title": "arXiv:2404.05868", "id": "2404.05868"}
    assert unlearning.KLRetainTrainer._tag_names[-1] == "kl-retain"
    assert (Own._name, Own._tag_names[-1], Own._paper["id"]) == ("Own", "test-trainers", "0000.11111")
    assert (OwnTrainer._name, OwnTrainer._tag_names, OwnTrainer._paper) == ("given", ["x"], {"id": "1"})
    assert unlearning.FLATTrainer._paper["citation"].startswith("@inproceedings{wang2025flat")


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("name", ["FLAT", "IdkDPO", "AltPO", "NPO"])
def test_template_answers_have_a_forward_of_their_own(name, multiple, tiny_model_dir, tmp_path):
    """It is as wide as its longest row, and all scores are those of one forward over all rows of the batch."""
    trainer = make_trainer(name, str(tiny_model_dir), tmp_path, retain_term="nll", pad_to_multiple_of=multiple)
    disturb(trainer.model)
    items = [trainer.train_dataset[i] for i in range(4)]
    batch, widths = trainer.data_collator(items), []
    own = [("template",), ("forget", "retain")] if name != "NPO" else [("forget", "retain")]
    with torch.no_grad():
        whole = score_rows(trainer.model, batch)
        body = trainer.model.get_input_embeddings()
        handle = body.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
        scores = trainer.score_roles(trainer.model, batch)
        handle.remove()
    longest = [
        max(len(item[r].prompt_ids) + len(item[r].answer_ids) for item in items for r in roles) for roles in own
    ]
    longest = [-(-length // (multiple or 1)) * (multiple or 1) for length in longest]
    assert widths == longest  # of the policy; the reference is a copy
    for number, role in enumerate(role for roles in own for role in roles):
        part, found = whole.rows(slice(number * 4, number * 4 + 4)), scores[role]
        width = found.log_probs.shape[1]
        assert part.mask[:, :width].equal(found.mask)
        assert not part.mask[:, width:].any()
        torch.testing.assert_close(found.log_probs, part.log_probs[:, :width], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["FLAT", "IdkDPO", "JensUn"])
def test_normalized_is_the_divergence_with_curvature_one(name, tiny_model_dir, tmp_path):
    """f of squared Hellinger times 1/f''(1): FLAT's and JensUn's terms scale with it, f-DPO's score inside the sigmoid."""
    divergence = "jensen_shannon" if name == "IdkDPO" else "squared_hellinger"
    curvature = get_divergence(divergence).curvature
    terms = []
    for normalized in (False, True):
        trainer = make_trainer(name, str(tiny_model_dir), tmp_path, divergence=divergence, normalized=normalized)
        disturb(trainer.model)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
        terms.append(trainer.forget_term(trainer.score_roles(trainer.model, batch)).detach())
    assert curvature != 1.0 and (terms[0] != terms[1]).all()
    if name == "IdkDPO":  # (2/β)·−log σ(β·Δf'), so Δf' is read off and scaled
        score = [-torch.log(torch.expm1(0.1 / 2 * term.double())) for term in terms]
        torch.testing.assert_close(score[1], score[0] / curvature, atol=1e-5, rtol=1e-4)
    else:
        torch.testing.assert_close(terms[1], terms[0] / curvature, atol=1e-6, rtol=1e-5)


def test_grad_diff_trains_its_pure_loss(tiny_model_dir, tmp_path, monkeypatch):
    """γ·(log-likelihood of forget) + α·(NLL of retain), through `grad_diff` itself."""
    trainer = make_trainer("GradDiff", str(tiny_model_dir), tmp_path, forget_weight=0.5, retain_weight=3.0)
    seen = []

    def watched(*args, **kwargs):
        seen.append(unlearning.grad_diff(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr("fdiv.unlearning.methods.grad_diff.grad_diff", watched)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    loss = trainer.compute_loss(trainer.model, batch)
    scores = trainer.score_roles(trainer.model, batch)
    means = {role: (s.log_probs * s.mask).sum(-1) / s.mask.sum(-1) for role, s in scores.items()}
    torch.testing.assert_close(seen[0], 0.5 * means["forget"] - 3.0 * means["retain"])
    torch.testing.assert_close(loss, seen[0].mean())


@pytest.mark.smoke
def test_the_trl_hooks_are_the_ones_we_override():
    """A TRL release that renames or re-types one of them fails here, not in the middle of a run."""
    names = {
        "_prepare_dataset": ["dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"],
        "_set_signature_columns_if_needed": [],
        "_get_train_sampler": ["train_dataset"],
        "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
        "_save_checkpoint": ["model", "trial"],
        "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    }
    for name, expected in names.items():
        assert list(inspect.signature(getattr(SFTTrainer, name)).parameters)[1:] == expected, name
