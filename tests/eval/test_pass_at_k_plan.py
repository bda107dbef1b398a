"""`fdiv eval passk --dry_run`: what is planned, what it takes, what is refused. Times are arithmetic on given speeds."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from fdiv.cli import main
from fdiv.eval.pass_at_k.evaluation import SamplingPass
from fdiv.eval.pass_at_k.plan import Batch, Speed, duration, make_plan, plan_rows
from fdiv.eval.pass_at_k.sampling import SamplingSettings
from fdiv.inference.sampling import SamplingRequest
from fdiv.memory.generation import GenerationMemory, generation_memory
from fdiv.rl.rewards.sandbox import check_sandbox


def sampling_pass(tasks: int, samples: int, width=lambda task: 10, bound: int = 100, rows: int = 1) -> SamplingPass:
    requests = [
        SamplingRequest(f"t{task:04d}#{sample:06d}", tuple(range(width(task))), bound, rows=rows)
        for task in range(tasks)
        for sample in range(samples)
    ]
    return SamplingPass("samples", requests, SamplingSettings(), "x")


# ---------------------------------------------------------------- arithmetic
def test_500_problems_of_64_samples():
    """Prompts of 1 to 500 tokens: each batch of 64 is one problem, and four processes take every fourth."""
    one = sampling_pass(500, 64, width=lambda task: task + 1, bound=1024)
    plan = make_plan([one], [set()], tasks=500, samples=64, batch_size=64, processes=4)
    assert (plan.total, plan.there, len(plan.batches)) == (32_000, 0, 500)
    assert [len(share) for share in plan.shares] == [125, 125, 125, 125]
    assert plan.prompt_tokens == 64 * 500 * 501 // 2 and plan.most_new_tokens == 32_000 * 1024
    assert plan.shares[1][0] == Batch(64, 64, 499, 1024, 64 * 499) and plan.longest == 1524
    speed = Speed(token=1e-5, step=0.02, check=0.5)
    first = sum(64 * width * 1e-5 + 1024 * 0.02 for width in range(500, 0, -4))  # the process with the longest
    assert plan.sampling_seconds(speed) == pytest.approx(first)
    assert plan.scoring_seconds(speed) == pytest.approx(8_000 * 0.5)


def test_500_problems_of_64_samples_at_servers():
    one = sampling_pass(500, 64)
    kept = {request.key for request in one.requests[:1000]}
    plan = make_plan([one], [kept], tasks=500, samples=64, batch_size=64, servers=3)
    assert (plan.total, plan.there, len(plan.batches)) == (32_000, 1_000, 31_000)
    assert plan.sampling_seconds(Speed(request=6.0)) == 162 * 6.0  # ⌈31,000 / 192⌉ rounds
    shown = {what: (number, note) for what, number, note in plan_rows(plan, None, None, Speed(request=6.0))}
    assert shown["left"] == ("31,000", "31,000 requests to 3 servers, 64 at once each")
    assert shown["there already"][0] == "1,000" and shown["time"][0] == "≤ 16 min 12 s"


def test_a_batch_of_which_one_is_missing_is_sampled_whole():
    one = sampling_pass(2, 4)
    kept = {request.key for request in one.requests} - {"t0001#000003"}
    plan = make_plan([one], [kept], tasks=2, samples=4, batch_size=4)
    assert plan.there == 7 and [batch.completions for batch in plan.batches] == [4]


def test_fewer_batches_than_processes_and_nothing_left():
    one = sampling_pass(3, 2)
    plan = make_plan([one], [set()], tasks=3, samples=2, batch_size=4, processes=8)
    assert [len(share) for share in plan.shares] == [1, 1, 0, 0, 0, 0, 0, 0]
    done = make_plan([one], [{r.key for r in one.requests}], tasks=3, samples=2, batch_size=4, processes=8)
    assert done.batches == [] and done.longest == 0 and done.sampling_seconds(Speed(token=1, step=1)) == 0
    assert ("left", "0", "nothing is sampled") in plan_rows(done, None, None, Speed())


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "under 1 s"), (59, "59 s"), (60, "1 min"), (61, "1 min 1 s"), (12_000, "3 h 20 min"), (90_000, "1 d 1 h"),
     (86_400, "1 d"), (3_605, "1 h")],
)  # fmt: skip
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_memory_by_hand(tiny_model_dir):
    config = AutoConfig.from_pretrained(tiny_model_dir)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    found = generation_memory(config, torch.float32, rows=8, tokens=100)
    parameters = sum({id(p): p.numel() for p in model.parameters()}.values())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert found.weights == 4 * parameters + buffers
    width = config.hidden_size // config.num_attention_heads
    cache = 100 * config.num_hidden_layers * 2 * config.num_key_value_heads * width * 4
    assert found.row == cache + config.vocab_size * 36 and found.total == found.weights + 8 * found.row
    assert GenerationMemory(100, 10, 8).most_rows(155) == 5 and GenerationMemory(100, 10, 8).most_rows(50) == 0


def test_what_does_not_fit_is_said_with_what_does():
    plan = make_plan([sampling_pass(2, 8)], [set()], tasks=2, samples=8, batch_size=8)
    shown = plan_rows(plan, GenerationMemory(1000, 100, 8), ("the GPU", 1500), None)
    assert ("memory", "1.76 KiB", "DOES NOT FIT: the GPU has 1.46 KiB free; --batch_size 5 fits") in shown


# ---------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """500 problems."""
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [{"prompt": "Count " + "on " * (i % 7) + f"{i}:", "answer": str(i)} for i in range(500)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def dry(tiny_model_dir, problems, capsys):
    """Plan a run; (exit code, the table's rows, stderr)."""

    def run(*words):
        capsys.readouterr()
        fixed = ["--model", str(tiny_model_dir), "--dataset", str(problems), "--n", "64", "--k", "1,8,64", "--dry_run"]
        code = main(["eval", "passk", *fixed, "--max_new_tokens", "50", *map(str, words)])
        shown = capsys.readouterr()
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.out.splitlines() if "│" in line]
        return code, {row[0]: tuple(row[1:]) for row in rows if len(row) == 3}, shown

    return run


def test_the_plan_of_500_problems(dry, problems, tiny_model_dir):
    code, rows, shown = dry("--probe", 0, "--scorer", "math", "--accelerate", "cpu_ddp", "--num_processes", 4)
    assert code == 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    prompts = [json.loads(line)["prompt"] for line in problems.read_text().splitlines()]
    exact = 64 * sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    assert rows["problems"][0] == "500" and rows["completions"] == ("32,000", "64 of each problem")
    assert rows["there already"][0] == "0" and rows["prompt tokens"][0] == f"{exact:,}"
    assert rows["left"] == ("32,000", "500 batches of at most 64 rows; completions of 4 processes: 4 × 8,000")
    assert rows["new tokens"][0] == f"{32_000 * 50:,}" and rows["time"] == ("not estimated", "--probe measures it")
    assert rows["memory"][1].startswith("fits: a process's share of this machine has ")
    assert "Plan of Pass@k · problems.jsonl · tiny-llama · transformers · scorer math" in shown.out


def test_the_probe_measures_here(dry, tmp_path):
    code, rows, _ = dry("--max_tasks", 2, "--n", 2, "--k", "1", "--greedy", "--output", tmp_path / "out")
    assert code == 0 and rows["completions"] == ("6", "2 of each problem, and 2 greedy ones")
    assert re.match(r"≤ |under", rows["sampling"][0]) and "17 new ones, measured here" in rows["sampling"][1].replace(
        "  ", " "
    )
    assert "ms each, measured on 2 golds" in rows["scoring"][1] and rows["time"][0]
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_counted_with_and_without_the_model(dry, tiny_model_dir, problems, tmp_path, capsys):
    out = tmp_path / "out"
    fixed = ["--model", str(tiny_model_dir), "--dataset", str(problems), "--max_tasks", "3", "--max_new_tokens", "50"]
    assert main(["eval", "passk", *fixed, "--n", "4", "--k", "1", "--output", str(out)]) == 0
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    for probe in ((), ("--probe", 0)):
        code, rows, shown = dry("--max_tasks", 3, "--n", 6, "--k", 1, "--batch_size", 1, "--output", out, *probe)
        assert code == 0 and rows["there already"][0] == "12" and rows["left"][0] == "6"
        assert ("its weights were not compared" in shown.out) == bool(probe)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    code, _, shown = dry("--max_tasks", 3, "--n", 4, "--k", 1, "--output", out, "--probe", 0, "--seed", 1)
    assert code == 1 and "holds samples made with seed: 0, not 1" in shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--k", "1,65"), "--k=65 is more than n=64"),
        (("--dataset", "nope"), "dataset 'nope' is neither a benchmark"),
        (("--scorer", "code"), "--allow_code_execution"),
        (("--scorer", "sql"), "scorer 'sql' needs --databases"),
        (("--max_new_tokens", "100000"), "max_new_tokens=100000 exceed the context of"),
        (("--base_samples", "nope.jsonl"), "no such file: nope.jsonl"),
        (("--probe", "-1"), "--probe -1: must be at least 0"),
        (("--accelerate", "cpu_zero2"), "every process of an evaluation holds the whole model"),
        (("--server_url", "http://127.0.0.1:9"), "no vLLM server answers at http://127.0.0.1:9"),
        (("--skip_tasks", "500"), "skip_tasks=500 leaves no task"),
    ],
)
def test_what_the_run_would_refuse_is_refused(dry, words, message):
    code, _, shown = dry("--probe", 0, *words)
    assert code in (1, 2) and message in shown.err and shown.err.count("\n") == 1


def test_a_missing_sandbox_is_refused(dry, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    check_sandbox.cache_clear()  # an earlier test of this process may have found it
    code, _, shown = dry("--probe", 0, "--scorer", "code", "--allow_code_execution")
    assert code == 1 and "bubblewrap" in shown.err and shown.err.count("\n") == 1


def test_no_problem_and_options_of_the_plan_alone(tiny_model_dir, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    fixed = ["eval", "passk", "--model", str(tiny_model_dir), "--dataset", str(empty)]
    for more in (["--dry_run"], ["--output", str(tmp_path / "o")]):
        assert main([*fixed, *more]) == 1
        assert "holds no task" in capsys.readouterr().err or "empty" in capsys.readouterr().err
    assert main([*fixed, "--probe", "3", "--output", str(tmp_path / "o")]) == 1
    assert "--probe 3 goes with --dry_run" in capsys.readouterr().err
    assert main(["eval", "passk", "--from_samples", "x", "--dry_run"]) == 1
    assert "--dry_run plans the sampling of a model" in capsys.readouterr().err
