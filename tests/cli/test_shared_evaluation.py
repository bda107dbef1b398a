"""`fdiv eval KIND --accelerate`: what is refused, what one failing process does to the others, and equal results."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from fdiv.cli import main, shared_processes
from fdiv.cli.eval_verb import _without
from fdiv.cli.shared_processes import processes_asked_for
from fdiv.errors import RecipeError


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    path = tmp_path / "tasks.jsonl"
    rows = [{"task_id": f"t{i}", "prompt": f"Count {i}:", "answer": str(i)} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------- what is refused at once
@pytest.mark.parametrize("name", ["zero1", "zero3", "cpu_zero2", "fsdp2"])
def test_configurations_that_shard_the_model(name):
    with pytest.raises(
        RecipeError, match=f"--accelerate {name}: every process of an evaluation holds the whole model"
    ):
        processes_asked_for(name, 2)


def test_configurations(tmp_path, monkeypatch):
    assert processes_asked_for("cpu_ddp", None) == (2, {"ACCELERATE_USE_CPU": "true"})
    assert processes_asked_for("cpu_ddp", 5) == (5, {"ACCELERATE_USE_CPU": "true"})
    mine = tmp_path / "mine.yaml"
    mine.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\ngpu_ids: 1,3\n")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    assert processes_asked_for(str(mine), None) == (2, {"CUDA_VISIBLE_DEVICES": "1,3"})
    with pytest.raises(
        RecipeError, match="asks for 3 processes, and this machine has 2 accelerators .*--num_processes 2"
    ):
        processes_asked_for(str(mine), 3)
    with pytest.raises(RecipeError, match="asks for 8 processes, and this machine has 4 accelerators"):
        processes_asked_for("multi_gpu", None)
    mine.write_text("distributed_type: MULTI_GPU\nnum_processes: 16\nnum_machines: 2\n")
    with pytest.raises(RecipeError, match="num_machines: 2: on several machines run `accelerate launch"):
        processes_asked_for(str(mine), None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_processes", "3"], "--num_processes 3: without --accelerate there is one process"),
        (["--accelerate", "nothing"], "nothing"),
        (["--accelerate", "cpu_ddp", "--num_processes", "0"], "--num_processes 0: must be a whole number, 1 or more"),
        (["--accelerate", "cpu_ddp", "--backend", "vllm"], "--backend vllm runs in one process"),
        (["--accelerate", "cpu_ddp", "--check_golds"], "--check_golds scores the golds, which one process does"),
    ],
)
def test_what_cannot_be_shared_is_one_line(fails, tasks, tmp_path, words, message):
    fixed = ["eval", "passk", "--model", "m", "--dataset", tasks, "--output", tmp_path / "out"]
    assert message in fails(*fixed, *words)
    assert not (tmp_path / "out").exists()


def test_recorded_samples_and_logs_are_read_by_one(fails, tmp_path):
    several = ("--accelerate", "cpu_ddp", "--output", tmp_path / "o.json")
    assert "--from_samples reads recorded samples" in fails("eval", "passk", "--from_samples", "x", *several)
    assert "--from_logs reads a log" in fails("eval", "tofu", "--from_logs", "x", *several)


def test_lm_eval_on_a_cpu(fails, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    several = ("--model", "m", "--accelerate", "cpu_ddp", "--output", "o")
    assert "lm-eval shares them over accelerators only: leave" in fails("eval", "lm_eval", "--tasks", "mmlu", *several)
    line = fails("eval", "benchmark", "--data", "wmdp_bio", *several)
    assert "its tasks of lm-eval (wmdp_bio" in line and "run in one process: leave" in line


def test_under_another_launcher_the_same_is_refused(fails, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave --accelerate and other launchers out" in fails(
        "eval", "passk", "--from_samples", "x", "--output", "o"
    )


def test_words_of_the_processes():
    words = ["eval", "passk", "--accelerate", "cpu_ddp", "--n", "4", "--num_processes=2", "--n=5", "--greedy"]
    assert _without(words) == ["eval", "passk", "--samples_per_task", "4", "--samples_per_task=5", "--greedy"]


def test_a_count_is_shared_by_a_hook_of_torch():
    import inspect

    from torch.distributed import Store, distributed_c10d

    from fdiv.inference.processes import SharedCount

    assert list(inspect.signature(distributed_c10d._get_default_store).parameters) == [] and hasattr(Store, "add")
    count = SharedCount()
    assert not count.shared and [count.add(2), count.add(3), count.add(0)] == [2, 5, 5]


# ---------------------------------------------------------------- one fails, all end
WORKER = """
import os, pathlib, sys, time
rank, folder = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
(folder / f"{rank}.part").write_text(str(os.getpid()))
(folder / f"{rank}.part").rename(folder / f"pid{rank}")
while len(list(folder.glob("pid*"))) < 3:
    time.sleep(0.02)
if rank == 1:
    exec(sys.argv[2])
time.sleep(60)
"""
SAYS = "pathlib.Path(os.environ['FDIV_EVAL_ERRORS'], '1').write_text('row 7 holds nothing'); sys.exit(2)"
ENDINGS = {
    "says why": (SAYS, 2, "fdiv: process 1 of 3: row 7 holds nothing"),
    "killed": ("os.kill(os.getpid(), 9)", 137, "fdiv: process 1 of 3 was killed by SIGKILL (the system's usual reason is "
               "that memory ran out); the others were ended: go on so"),
    "traceback": ("raise ZeroDivisionError('a bug')", 1, "process 1 of 3 ended with exit code 1; the others were ended: go"),
}  # fmt: skip


@pytest.mark.parametrize("ending", ENDINGS)
def test_where_one_process_fails_all_end(ending, tmp_path, monkeypatch, capfd):
    does, code, line = ENDINGS[ending]
    real = shared_processes.subprocess.Popen
    program = [sys.executable, "-c", WORKER, str(tmp_path), does]
    monkeypatch.setattr(shared_processes.subprocess, "Popen", lambda command, **options: real(program, **options))
    assert shared_processes.run_together(["eval"], 3, {"MARK": "x"}, "go on so") == code
    said = capfd.readouterr().err
    assert line in said and ("ZeroDivisionError: a bug" in said) == (ending == "traceback")
    assert said.count("fdiv: ") == 1 and (ending == "traceback" or said.count("\n") == 1)
    for rank in range(3):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)


SAYS_THE_SAME = """
import os, pathlib, sys, time
rank = os.environ["RANK"]
with open(pathlib.Path(os.environ["FDIV_EVAL_ERRORS"], rank), "w") as file:
    time.sleep(0.5 if rank == "0" else 0)  # its file is there, and nothing in it yet
    file.write("no such file: x")
sys.exit(1)
"""


def test_what_all_find_is_said_once_and_plainly(tmp_path, monkeypatch, capfd):
    real = shared_processes.subprocess.Popen
    program = [sys.executable, "-c", SAYS_THE_SAME]
    monkeypatch.setattr(shared_processes.subprocess, "Popen", lambda command, **options: real(program, **options))
    monkeypatch.setattr(shared_processes, "_MOMENT", 30.0)  # the main process ends long before
    assert shared_processes.run_together(["eval"], 4, {}, "again") == 1
    assert capfd.readouterr().err == "fdiv: no such file: x\n"


def test_the_port_of_a_group_is_no_one_elses_until_torch_takes_it():
    from torch.distributed import TCPStore

    with shared_processes.reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        store.set("key", "value")
        assert TCPStore("127.0.0.1", port).get("key") == b"value"


def test_sigterm_ends_them_too(tmp_path, monkeypatch):
    real = shared_processes.subprocess.Popen
    program = [sys.executable, "-c", WORKER, str(tmp_path), "pass"]
    started: list = []

    def start(command, **options):
        started.append(real(program, **options))
        return started[-1]

    nap, sent = time.sleep, []

    def look(seconds):
        nap(0.01)
        if len(list(tmp_path.glob("pid*"))) == 3 and not sent:
            sent.append(True)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(shared_processes.subprocess, "Popen", start)
    monkeypatch.setattr(shared_processes.time, "sleep", look)
    monkeypatch.setattr(
        "fdiv.cli.command._VERBS", {"eval": lambda *_: shared_processes.run_together([], 3, {}, "again")}
    )
    assert main(["eval", "passk"]) == 143
    assert all(process.poll() is not None for process in started) and len(started) == 3


# ---------------------------------------------------------------- the same numbers
def _command(model: Path, tasks: Path, out: Path) -> list[str]:
    words = ["eval", "passk", "--model", model, "--dataset", tasks, "--output", out, "--n", "6", "--k", "1,2"]
    return [*map(str, words), "--max_new_tokens", "5", "--batch_size", "4", "--greedy"]


@pytest.mark.slow
def test_samples_are_those_of_one_process_whatever_their_number(tiny_model_dir, tasks, tmp_path, monkeypatch, capfd):
    """Two processes, and eight for three problems, of which one is killed half-way at first."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(_command(tiny_model_dir, tasks, tmp_path / "one")) == 0
    for count in (2, 8):
        out = tmp_path / f"{count}"
        capfd.readouterr()
        assert (
            main([*_command(tiny_model_dir, tasks, out), "--accelerate", "cpu_ddp", "--num_processes", str(count)])
            == 0
        )
        said = capfd.readouterr()
        assert said.out.count("pass@1 ") == 1 and said.err.count("written: ") == 1
        for name in ("samples.jsonl", "greedy.jsonl"):
            assert (out / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert len(list((tmp_path / "8" / "cache").glob("samples-*/rank*.jsonl"))) == 5  # batches of four rows of eighteen


KILLS = """
import os, pathlib, signal
def odd(prompts, completions, answer, **_):
    mark = pathlib.Path(os.environ["MARK"])
    if os.environ.get("RANK") == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(text) % 2) for text in completions]
"""


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_same_command_goes_on(tiny_model_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tasks = tmp_path / "tasks.jsonl"
    rows = [{"prompt": f"Count {i}:", "answer": str(i)} for i in range(60)]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "kills_once.py").write_text(KILLS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.setenv("MARK", str(tmp_path / "killed"))
    words = [
        *_command(tiny_model_dir, tasks, tmp_path / "two"),
        "--scorer",
        "kills_once:odd",
        "--accelerate",
        "cpu_ddp",
    ]
    assert main(words) == 137
    said = capfd.readouterr().err
    assert (
        said.count("fdiv: ") == 1 and "fdiv: process 1 of 2 was killed by SIGKILL" in said and "Traceback" not in said
    )
    assert "run the same command again" in said and not (tmp_path / "two" / "samples.jsonl").exists()
    before = {file: file.read_bytes() for file in (tmp_path / "two" / "cache").glob("samples-*/rank*.jsonl")}
    assert main(words) == 0
    assert all(file.read_bytes() == content for file, content in before.items()) and len(before) == 2  # none again
    assert main([*_command(tiny_model_dir, tasks, tmp_path / "one"), "--scorer", "kills_once:odd"]) == 0
    for name in ("samples.jsonl", "greedy.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
def test_preferences_are_those_of_one_process(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = [{"prompt": f"Say {i}:", "chosen": f" yes {i}", "rejected": f" no {i * i}"} for i in range(21)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", "preferences", "--model", tiny_model_dir, "--reference", tiny_model_dir, "--beta", "0.1"]
    words += ["--dataset", tmp_path / "pairs.jsonl", "--divergence", "reverse_kl", "--max_new_tokens", "6", "--output"]
    fixed = [*map(str, words)]
    assert main([*fixed, str(tmp_path / "one"), "--batch_size", "2"]) == 0
    assert main([*fixed, str(tmp_path / "two"), "--batch_size", "2", "--accelerate", "cpu_ddp"]) == 0
    one, two = (json.loads((tmp_path / name / "preferences_eval.json").read_text()) for name in ("one", "two"))
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-9, abs=1e-12)
    ours = {key: value for key, value in two["arguments"].items() if key != "output"}
    assert ours == {key: value for key, value in one["arguments"].items() if key != "output"}


@pytest.mark.slow
def test_an_erasure_report_is_that_of_one_process(known_models, tmp_path, monkeypatch):
    """With a retrained model, which all processes measure."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["eval", "unlearning", "--model", known_models / "retrained", "--base", known_models / "model"]
    words += ["--forget", known_models / "forget.jsonl", "--retain", known_models / "retain.jsonl", "--samples", "2"]
    words += ["--retrained", known_models / "retrained", "--attacks", "int8", "--max_items", "5", "--output"]
    fixed = [*map(str, words)]
    for name, more in (("one", []), ("two", ["--accelerate", "cpu_ddp"])):
        assert main([*fixed, str(tmp_path / name), "--batch_size", "2", "--generation_batch_size", "3", *more]) == 0
    one, two = (json.loads((tmp_path / name / "out.json").read_text()) for name in ("one", "two"))
    assert two.keys() == one.keys() and len(one) > 20
    assert two["notes"] == one["notes"]
    for name in one.keys() - {"settings", "digest", "notes"}:
        assert two[name] == (None if one[name] is None else pytest.approx(one[name], rel=1e-6, abs=1e-9)), name
    measured = [json.loads((tmp_path / name / "erasure.json").read_text())["measured"] for name in ("one", "two")]
    assert len(measured[0]) > 10 and _numbers(measured[1]) == pytest.approx(_numbers(measured[0]), rel=1e-6, abs=1e-9)


def _numbers(found: object) -> list[float]:
    """Every number in nested values, in order."""
    if isinstance(found, dict):
        return [number for name in sorted(found) for number in _numbers(found[name])]
    if isinstance(found, list):
        return [number for part in found for number in _numbers(part)]
    return [float(found)] if isinstance(found, int | float) else []
