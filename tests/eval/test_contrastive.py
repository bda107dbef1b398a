"""Contrastive decoding against the plain formula: hand-worked vocabularies of five, a model's own loop, Pass@k's run."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.cli import main
from fdiv.errors import DataError
from fdiv.eval.pass_at_k.data import EvalTask
from fdiv.eval.pass_at_k.decoding import stripped_tasks, without_examples
from fdiv.eval.pass_at_k.evaluation import PassKEvalConfig
from fdiv.inference.contrastive import Contrast, ContrastProcessor, contrasted
from fdiv.inference.sampling import SamplingRequest, sample_completions

P0 = [0.4, 0.3, 0.2, 0.06, 0.04]  # ∑p² = 0.2952
P1 = [0.5, 0.1, 0.3, 0.06, 0.04]


def logits(*rows, shift=0.0):
    return torch.tensor(rows, dtype=torch.float32).log() + shift


def probabilities(scores):
    return scores.double().exp().tolist()


# ---------------------------------------------------------------- the formula
def test_contrast_by_hand():
    """η = ½, c = 0.9: p₀ − ½p₁ = (.15, .25, .05, …), and of five tokens only those with p₀ ≥ .18 are left."""
    how = Contrast(threshold=0.4, eta=0.5, cutoff=0.9)
    got = contrasted(logits(P0, shift=3.0), logits(P1, shift=-7.0), how)
    assert probabilities(got)[0] == pytest.approx([0.15, 0.25, 0.05, 0, 0])
    # c = ⅓: p₀ ≥ 1/15 leaves out the last two again; c = ¼ takes 0.06 in, at .03; c = 0 all.
    for cutoff, expected in (
        (1 / 3, [0.15, 0.25, 0.05, 0, 0]),
        (0.25, [0.15, 0.25, 0.05, 0.03, 0]),
        (0.0, [0.15, 0.25, 0.05, 0.03, 0.02]),
    ):
        got = contrasted(logits(P0), logits(P1), replace(how, cutoff=cutoff))
        assert probabilities(got)[0] == pytest.approx(expected, abs=1e-7)
    # η = 0.9: 0.4 − 0.45 and 0.2 − 0.27 are below 0, so these tokens are gone.
    got = contrasted(logits(P0), logits(P1), replace(how, eta=0.9, cutoff=0.0))
    assert probabilities(got)[0] == pytest.approx([0, 0.21, 0, 0.006, 0.004], abs=1e-7)


def test_the_collision_gate_by_hand():
    """∑p² = .16 + .09 + .04 + .0036 + .0016 = .2952: contrasted above it, kept bit for bit below."""
    scores = logits(P0, shift=2.5)
    for threshold, changed in ((0.2953, True), (0.2951, False), (0.0, False)):
        got = contrasted(scores, logits(P1), Contrast(threshold=threshold, eta=0.5))
        assert torch.equal(got, scores) is not changed


def test_the_collision_gate_is_the_papers_standard_deviation():
    """std(p₀) > θ is ∑p₀² > (V − 1)θ² + 1/V."""
    generator = torch.Generator().manual_seed(0)
    scores, other = torch.randn(2, 64, 50, generator=generator, dtype=torch.float64) * 2
    theta = 0.04
    unsure = scores.softmax(-1).std(-1) <= theta
    got = contrasted(scores, other, Contrast(threshold=49 * theta**2 + 1 / 50, eta=0.5))
    assert 5 < unsure.sum() < 59
    assert torch.equal((got != scores).any(-1), unsure)


@pytest.mark.parametrize("gate", ["jensen_shannon", {"name": "alpha", "alpha": 0.3}, "cauchy_schwarz"], ids=str)
def test_a_divergence_of_the_two_prompts_as_the_gate(gate):
    from fdiv.divergences import get_distance

    scores, stripped = logits(P0, P0), logits(P1, [0.39, 0.31, 0.2, 0.06, 0.04])
    near, far = sorted(get_distance(gate).exact(scores.log_softmax(-1), stripped.log_softmax(-1)).tolist())
    got = contrasted(scores, stripped, Contrast(gate=gate, threshold=(near + far) / 2, eta=0.5, cutoff=0.0))
    assert probabilities(got[:1])[0] == pytest.approx([0.15, 0.25, 0.05, 0.03, 0.02], abs=1e-7)
    assert torch.equal(got[1], scores[1])


def test_eta_zero_is_standard_decoding_bit_for_bit():
    generator = torch.Generator().manual_seed(1)
    scores, stripped = torch.randn(2, 9, 40, generator=generator) * 3
    for how in (Contrast(threshold=9.0, eta=0.0), Contrast("jensen_shannon", 0.0, 0.0, 5.0)):
        assert torch.equal(contrasted(scores, stripped, how), scores)


def test_where_nothing_is_left_the_scores_stay():
    """η = .9, c = 2: only p₀ ≥ ⅖, the first token, whose .4 − .9·.5 is below 0."""
    scores = logits(P0)
    assert torch.equal(contrasted(scores, logits(P1), Contrast(threshold=1.0, eta=0.9, cutoff=2.0)), scores)


def test_banned_tokens_stay_banned():
    scores, stripped = logits([0.5, 0.5, 0.0, 0.0, 0.0]), logits([0.2, 0.2, 0.2, 0.2, 0.2])
    got = contrasted(scores, stripped, Contrast(threshold=1.0, eta=0.5, cutoff=0.0))
    assert probabilities(got)[0] == pytest.approx([0.4, 0.4, 0, 0, 0])


def test_both_halves_get_the_same_scores():
    both = ContrastProcessor(Contrast(threshold=1.0, eta=0.5, cutoff=0.0))(None, torch.cat([logits(P0), logits(P1)]))
    assert torch.equal(both[0], both[1]) and probabilities(both)[0] == pytest.approx([0.15, 0.25, 0.05, 0.03, 0.02])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"eta": 1.0}, r"eta=1.0: must lie in \[0, 1\)"), ({"cutoff": -0.1}, "cutoff=-0.1"), ({"threshold": math.nan}, "threshold=nan"), ({"gate": "kl"}, "ambiguous")],
)  # fmt: skip
def test_what_a_contrast_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Contrast(**options)


# ---------------------------------------------------------------- the pass
HOW = Contrast(threshold=1.0, eta=0.6, cutoff=1 / 3)


@pytest.fixture
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


def requests(tokenizer):
    """Prompts and stripped prompts of uneven lengths, the stripped one longer in one of them."""
    pairs = [("Count to nine:", "Count"), ("What is the sum of 1 and 2?", "What?"), ("Go", "Say something else now")]
    return [
        SamplingRequest(
            f"{i}#{n}", tuple(tokenizer(a)["input_ids"]), 6, rows=2, stream=(i, n),
            stripped_ids=tuple(tokenizer(b)["input_ids"]),
        )
        for i, (a, b) in enumerate(pairs) for n in range(3)
    ]  # fmt: skip


@torch.no_grad()
def by_hand(model, request, how, temperature, seed, stop):
    """One token after the other: two forwards without cache or padding, the formula, the request's own uniforms."""
    uniforms = np.random.default_rng((seed, *request.stream)).random(request.max_new_tokens)
    drawn = []
    for uniform in uniforms:
        rows = [
            model(torch.tensor([[*ids, *drawn]])).logits[0, -1] for ids in (request.prompt_ids, request.stripped_ids)
        ]
        scores = contrasted(rows[0][None], rows[1][None], how)
        cumulative = (scores.double() / temperature).softmax(-1).cumsum(-1)[0]
        drawn.append(int(torch.searchsorted(cumulative, torch.tensor(uniform, dtype=torch.float64), right=True)))
        if drawn[-1] in stop:
            break
    return tuple(drawn)


@pytest.mark.parametrize("batch_size", [2, 18])
def test_the_pass_draws_what_two_plain_forwards_say(model, tiny_model_dir, batch_size):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    made = sample_completions(
        model, tokenizer, requests(tokenizer), temperature=0.8, seed=5, batch_size=batch_size, contrast=HOW
    )
    for request in requests(tokenizer):
        assert made[request.key] == by_hand(model, request, HOW, 0.8, 5, {tokenizer.eos_token_id}), request.key
    standard = sample_completions(model, tokenizer, requests(tokenizer), temperature=0.8, seed=5, batch_size=4)
    assert made != standard


def test_eta_zero_draws_what_standard_decoding_draws(model, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    asked = requests(tokenizer)[:6]  # stripped prompts that are shorter, so that padding is the same
    standard = sample_completions(model, tokenizer, asked, seed=5, batch_size=4)
    assert (
        sample_completions(model, tokenizer, asked, seed=5, batch_size=8, contrast=replace(HOW, eta=0.0)) == standard
    )


def test_the_context_holds_the_longer_of_the_two_prompts(model, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    limit = model.config.max_position_embeddings
    long = replace(requests(tokenizer)[0], stripped_ids=(5,) * limit)
    with pytest.raises(DataError, match="exceed the model's context"):
        sample_completions(model, tokenizer, [long], contrast=HOW)


def test_a_model_whose_scores_depend_on_the_batch_is_refused(model, tiny_model_dir, monkeypatch):
    from fdiv.inference import sampling

    monkeypatch.setattr(sampling, "depends_on_padding", lambda _: "its logits change by 3 under left padding")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    with pytest.raises(DataError, match="two prompts side by side, and its logits change"):
        sample_completions(model, tokenizer, requests(tokenizer), contrast=HOW)


# ---------------------------------------------------------------- stripped prompts
HUMANEVAL = '''def add(x: int, y: int):
    """Add two numbers x and y
    >>> add(2, 3)
    5
    >>> add(5, 7)
    12
    """
'''


def test_examples_are_taken_out_of_a_docstring():
    assert without_examples(HUMANEVAL) == 'def add(x: int, y: int):\n    """Add two numbers x and y\n    """\n'
    spaced = 'def f():\n    """One.\n\n    >>> f()\n    1\n\n    Two.\n    >>> f()"""\n'
    assert without_examples(spaced) == 'def f():\n    """One.\n\n\n    Two.\n    """\n'
    assert without_examples([{"role": "user", "content": HUMANEVAL}])[0]["content"] == without_examples(HUMANEVAL)
    assert without_examples("no examples, 3 >>> 2") == "no examples, 3 >>> 2"


def shorter(prompt, **columns):
    if columns.get("level") == "raise":
        raise RuntimeError("no")
    return {"empty": " ", "number": 3, "messages": [{"role": "user", "content": "a"}]}.get(
        columns.get("level"), prompt[:5]
    )


def test_stripped_prompts_by_template_and_function():
    tasks = [EvalTask("a", "What is it?", "", {"level": "easy"}), EvalTask("b", "What", "", {"level": "hard"})]
    found, same = stripped_tasks(tasks, "A {level} one: {question} {{}}")
    assert [task.prompt for task in found] == ["A easy one: What is it? {}", "A hard one: What {}"] and same == 0
    found, same = stripped_tasks(tasks, f"{__name__}:shorter")
    assert [task.prompt for task in found] == ["What ", "What"] and same == 1
    talk = [EvalTask("a", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}], "")]
    (task,), _ = stripped_tasks(talk, "Say: {question}")
    assert task.prompt == [talk[0].prompt[0], {"role": "user", "content": "Say: Why?"}]


@pytest.mark.parametrize(
    ("level", "stripped", "message"),
    [
        ("", "{question}", "leaves every prompt unchanged"),
        (
            "",
            "{entry_point}",
            "task 'a': stripped_prompt='{entry_point}' has the field {entry_point}, which is not there",
        ),
        ("", "{", "a brace stands alone"),
        (" ", "{level}", "task 'a': stripped_prompt gives an empty text"),
        ("raise", f"{__name__}:shorter", "shorter raised RuntimeError: no"),
        ("empty", f"{__name__}:shorter", "returned ' ': it must be a function"),
        ("number", f"{__name__}:shorter", "returned 3"),
        ("messages", f"{__name__}:shorter", "another kind of prompt"),
    ],
)
def test_stripped_prompts_that_cannot_be(level, stripped, message):
    with pytest.raises(DataError) as caught:
        stripped_tasks([EvalTask("a", "What is it?", "", {"level": level})], stripped)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": "contrastive"}, "needs stripped_prompt"),
        ({"decode": "contrast"}, "must be one of standard, contrastive"),
        ({"stripped_prompt": "{question}"}, "goes with decode: contrastive"),
        ({"contrast_eta": 0.3}, "goes with decode: contrastive"),
        ({"decode": "contrastive", "stripped_prompt": "a", "contrast_gate": "jensen_shannon"}, "needs contrast_threshold"),
        ({"decode": "contrastive", "stripped_prompt": "a", "contrast_gate": "jenson", "contrast_threshold": 0.1}, "did you mean"),
        ({"decode": "contrastive", "stripped_prompt": "a", "contrast_eta": 1.0}, "contrast_eta=1.0: must be"),
        ({"decode": "contrastive", "stripped_prompt": "a", "contrast_cutoff": -1.0}, "contrast_cutoff=-1.0"),
        ({"decode": "contrastive", "stripped_prompt": "os:system"}, "a module of Python itself"),
        ({"decode": "contrastive", "stripped_prompt": f"{__name__}:HUMANEVAL"}, "it must be a function"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        PassKEvalConfig(**options)


# ---------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def tasks_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tasks.jsonl"
    rows = [{"task_id": f"t{i}", "prompt": f"Count from {i} to nine:", "answer": str(i)} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(model, tasks, out, *more):
    fixed = ["--n", "4", "--k", "1,4", "--max_new_tokens", "4", "--scorer", "exact"]
    return main(["eval", "passk", "--model", str(model), "--dataset", str(tasks), "--output", str(out), *fixed, *more])


CONTRASTIVE = ("--decode", "contrastive", "--stripped_prompt", "Count:", "--contrast_threshold", "1")


def test_the_command_decodes_stamps_and_compares(tiny_model_dir, tasks_file, tmp_path, capsys):
    def completions(folder):
        return [json.loads(line)["completion"] for line in (folder / "samples.jsonl").read_text().splitlines()]

    for name, more in (
        ("standard", ()),
        ("zero", (*CONTRASTIVE, "--contrast_eta", "0", "--greedy")),
        ("contrastive", (*CONTRASTIVE, "--greedy")),
    ):
        assert command(tiny_model_dir, tasks_file, tmp_path / name, *more) == 0
    assert completions(tmp_path / "zero") == completions(tmp_path / "standard")
    assert completions(tmp_path / "contrastive") != completions(tmp_path / "standard")
    stamp = json.loads((tmp_path / "contrastive" / "out.json").read_text())["settings"]["made_with"]
    assert stamp["decode"] == "contrastive" and stamp["stripped_prompt"] == "Count:"
    assert (stamp["contrast_gate"], stamp["contrast_threshold"], stamp["contrast_eta"]) == ("collision", 1.0, 0.7)
    standard = json.loads((tmp_path / "standard" / "out.json").read_text())["settings"]
    assert not [
        name for name in (*standard, *standard["made_with"]) if name.startswith(("decode", "contrast", "stripped"))
    ]

    # Another η in the same folder, and base samples that were decoded otherwise, are refused by key.
    assert command(tiny_model_dir, tasks_file, tmp_path / "contrastive", *CONTRASTIVE, "--contrast_eta", "0.5") == 1
    assert "contrast_eta: 0.7, not 0.5" in capsys.readouterr().err
    base = ("--base_samples", str(tmp_path / "standard" / "samples.jsonl"))
    assert command(tiny_model_dir, tasks_file, tmp_path / "other", *CONTRASTIVE, *base) == 1
    assert "decode=(not set), now it is 'contrastive'" in capsys.readouterr().err


def test_what_the_command_refuses(tiny_model_dir, tasks_file, tmp_path, capsys):
    for more, message in (
        ((*CONTRASTIVE, "--backend", "vllm"), "vLLM samples each prompt by itself: use --backend transformers"),
        (("--decode", "contrastive"), "needs stripped_prompt"),
        (("--stripped_prompt", "Count:"), "goes with decode: contrastive"),
        ((*CONTRASTIVE, "--contrast_gate", "{name: alpha}"), "needs the parameter 'alpha'"),
        ((*CONTRASTIVE[:2], "--stripped_prompt", "{level}"), "has the field {level}, which is not there"),
    ):
        assert command(tiny_model_dir, tasks_file, tmp_path / "out", *more) != 0
        assert message in capsys.readouterr().err
    recorded = ["--from_samples", "x.jsonl", "--output", str(tmp_path / "o.json"), "--stripped_prompt", "a"]
    assert main(["eval", "passk", *recorded]) == 1
    assert "--stripped_prompt goes with --model" in capsys.readouterr().err
