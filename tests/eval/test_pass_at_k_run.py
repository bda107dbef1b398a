"""Pass@k of a model: sampled, scored, kept, resumed; in one process and two; and in a recipe's evaluation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.cli import main
from fdiv.eval.pass_at_k.evaluation import PassKEvalConfig
from fdiv.eval.pass_at_k.sampling import completion_record, stream_of
from fdiv.evaluation import EvalContext


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three tasks."""
    path = tmp_path_factory.mktemp("data") / "tasks.jsonl"
    rows = [{"task_id": f"t{i}", "prompt": f"Count {i}:", "answer": str(i)} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SCORER = """
def even_length(prompts, completions, answer, **_):
    return [
        1.0 if len(text) % 2 == 0 else (None if gold == "2" else 0.0)
        for text, gold in zip(completions, answer, strict=True)
    ]
"""


@pytest.fixture(autouse=True)
def scorer_module(tmp_path, monkeypatch):
    """A scorer with luck in it: right where the text has an even length; task 2's odd ones are not scored."""
    folder = tmp_path / "scorers"
    folder.mkdir()
    (folder / "luck_of_length.py").write_text(SCORER)
    monkeypatch.syspath_prepend(str(folder))


def _command(model, tasks, out, *more):
    scorer = "luck_of_length:even_length"
    fixed = ["--n", "6", "--k", "1,2", "--max_new_tokens", "5", "--batch_size", "4", "--scorer", scorer]
    words = ["eval", "passk", "--model", str(model), "--dataset", str(tasks), "--output", str(out), *fixed, *more]
    return main([*words, "--unscored", "wrong"])


def test_run_is_kept_and_a_killed_one_resumes_to_the_same(tiny_model_dir, tasks, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _command(tiny_model_dir, tasks, whole, "--greedy", "--top_p", "0.9") == 0
    rows = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [(row["task_id"], row["sample"]) for row in rows] == [(f"t{i}", s) for i in range(3) for s in range(6)]
    assert len({row["completion"] for row in rows}) > 6 and all(1 <= row["tokens"] <= 5 for row in rows)
    even = [len(row["completion"]) % 2 == 0 for row in rows]
    assert [row["correct"] for row in rows] == [
        e or (None if r["task_id"] == "t2" else False) for e, r in zip(even, rows, strict=True)
    ]
    out = json.loads((whole / "out.json").read_text())
    assert out["pass@1"]["value"] == pytest.approx(sum(even) / 18)
    assert out["unscored_samples"] == sum(row["correct"] is None for row in rows)
    assert 0 <= out["greedy_accuracy"]["value"] <= 1 and (whole / "pass_at_k.png").stat().st_size > 0

    shutil.copytree(whole, killed)
    for name in ("samples.jsonl", "out.json"):
        (killed / name).unlink()
    (cache,) = (killed / "cache").glob("samples-*/rank0.jsonl")
    lines = cache.read_text().splitlines(keepends=True)
    cache.write_text("".join(lines[:8]) + lines[8][:20])  # killed while writing the ninth
    assert _command(tiny_model_dir, tasks, killed, "--greedy", "--top_p", "0.9") == 0
    assert (killed / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()

    assert _command(tiny_model_dir, tasks, killed, "--greedy", "--top_p", "0.8") == 1
    assert "made with top_p: 0.9, not 0.8" in capsys.readouterr().err
    base = str(whole / "samples.jsonl")
    scored = ["--from_samples", base, "--base_samples", base, "--unscored", "wrong", "--k", "6"]
    assert main(["eval", "passk", *scored, "--output", str(tmp_path / "o.json")]) == 0
    assert json.loads((tmp_path / "o.json").read_text())["keep_rate@6"]["value"] == pytest.approx(1.0)


@pytest.mark.smoke
def test_in_a_recipe_before_and_after(tiny_model_dir, tasks, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    config = PassKEvalConfig(
        dataset="test", n=4, k=[1, 4], max_new_tokens=4, scorer="luck_of_length:even_length",
        unscored="wrong",
    )  # fmt: skip
    rows = [json.loads(line) for line in tasks.read_text().splitlines()]
    found = {}
    for stage in ("before", "after"):
        folder = tmp_path / stage
        folder.mkdir()
        context = EvalContext(SimpleNamespace(), folder, seed=3, stage=stage)
        found[stage] = config.evaluate(model, tokenizer, {"test": rows}, context)
        assert len((folder / "passk_samples.jsonl").read_text().splitlines()) == 12
        assert len((folder / "passk_greedy.jsonl").read_text().splitlines()) == 3
        shown = [json.loads(line) for line in (folder / "examples_passk.jsonl").read_text().splitlines()]
        greedy = [json.loads(line) for line in (folder / "passk_greedy.jsonl").read_text().splitlines()]
        assert [row["completion"] for row in shown] == [row["completion"] for row in greedy]
        assert [row["prompt"] for row in shown] == [row["prompt"] for row in rows]
    shared = {name: value for name, value in found["after"].items() if "_rate" not in name}
    assert shared == found["before"]
    assert found["after"]["keep_rate@4"] == pytest.approx(1.0)  # the same model and seed: the same samples
    assert "keep_rate@1" in config.summary_metrics and "greedy_accuracy" in found["before"]
    # A fresh config after a resume reads what the first part kept.
    again = PassKEvalConfig(
        **{f: getattr(config, f) for f in ("dataset", "n", "k", "max_new_tokens", "scorer", "unscored")}
    )
    context = EvalContext(SimpleNamespace(), tmp_path / "after", seed=3, stage="after")
    assert again.evaluate(model, tokenizer, {"test": rows}, context) == found["after"]


def test_greedy_is_the_argmax(tiny_model_dir):
    from fdiv.eval.pass_at_k.evaluation import draw_with_transformers
    from fdiv.eval.pass_at_k.sampling import SamplingSettings
    from fdiv.inference.cache import ItemCache
    from fdiv.inference.sampling import SamplingRequest

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    ids = tuple(tokenizer("Count 1:")["input_ids"])
    draw = draw_with_transformers(model, tokenizer, 2)
    (drawn,) = draw(
        [SamplingRequest("a", ids, 3, stream=(1,))], SamplingSettings(temperature=0.0), ItemCache(None, "", "")
    ).values()
    text = list(ids)
    for token in drawn:
        with torch.no_grad():
            assert token == model(torch.tensor([text])).logits[0, -1].argmax().item()
        text.append(token)


def test_nucleus_keeps_the_smallest_set():
    from fdiv.inference.sampling import _nucleus

    probs = torch.tensor([[0.1, 0.5, 0.25, 0.15]], dtype=torch.float64)
    assert _nucleus(probs, 0.7).tolist() == [[0.0, 0.5, 0.25, 0.0]]
    assert _nucleus(probs, 0.5).tolist() == [[0.0, 0.5, 0.0, 0.0]]
    assert _nucleus(probs, 1.0) is probs


def test_completion_record_cuts_at_end_token_and_stop_text(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = tokenizer("four\ndef x")["input_ids"]
    end = tokenizer.eos_token_id
    assert completion_record(ids, tokenizer, {end}, ()) == {
        "completion": "four\ndef x", "tokens": len(ids), "finish_reason": "length",
    }  # fmt: skip
    assert completion_record([*ids, end], tokenizer, {end}, ())["finish_reason"] == "stop"
    cut = completion_record([*ids, end], tokenizer, {end}, ("\ndef ", "x"))
    assert (cut["completion"], cut["finish_reason"], cut["tokens"]) == ("four", "stop_text", len(ids) + 1)
    assert stream_of("a", 3) == stream_of("a", 3) != stream_of("b", 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 8, "k": [16]}, "k=16 is more than n=8"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"top_p": 0.0}, "top_p"),
        ({"n": 0}, "n=0"),
        ({"unscored": "skip"}, "reduce, wrong, leave_out"),
        ({"scorer": "code"}, "allow_code_execution"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PassKEvalConfig(**options)


@pytest.mark.slow
def test_two_processes_give_the_samples_of_one(tiny_model_dir, tasks, tmp_path):
    """torchrun with two CPU processes: the same completions and scores, whoever drew them."""
    assert _command(tiny_model_dir, tasks, tmp_path / "one", "--greedy") == 0
    fixed = [
        "--samples_per_task", "6", "--k", "1,2", "--max_new_tokens", "5", "--batch_size", "4", "--unscored", "wrong", "--greedy",
        "--scorer", "luck_of_length:even_length",
    ]  # fmt: skip
    two = tmp_path / "two"
    words = ["eval", "passk", "--model", str(tiny_model_dir), "--dataset", str(tasks), "--output", str(two), *fixed]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fdiv"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "scorers")}
    done = subprocess.run(
        [*launcher, *words], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((two / "cache").glob("samples-*/rank*.jsonl"))) == 2
    for name in ("samples.jsonl", "greedy.jsonl"):
        assert (two / name).read_text() == (tmp_path / "one" / name).read_text()
