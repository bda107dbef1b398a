"""`benchmarks/gpu`: arithmetic by hand, the failure path, and the whole of it on a CPU, and on a GPU where there is one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch


def load(name):
    return importlib.import_module(name)


# ---------------------------------------------------------------- FLOPs and MFU
def test_flops_and_mfu_by_hand():
    flops = load("benchmarks.gpu.flops")
    model = flops.Architecture(body=1000, head=200, layers=2, width=16)
    two_rows_of_five = flops.Passes(tokens=10, scored=6, pairs=50)
    # 2·1000·10 + 2·200·6 + 4·2·16·50 = 20,000 + 2,400 + 6,400
    assert two_rows_of_five.flops(model) == 28_800
    assert flops.step_flops(model, two_rows_of_five, flops.Passes()) == 3 * 28_800
    assert flops.step_flops(model, two_rows_of_five, two_rows_of_five) == 4 * 28_800
    assert flops.utilisation(115_200, seconds=0.5, peak=1e-6) == pytest.approx(0.2304)  # of 10⁶ FLOP/s
    assert flops.utilisation(115_200, seconds=0.5, peak=None) is None


def test_flops_are_the_usual_six_n_tokens_plus_attention():
    flops = load("benchmarks.gpu.flops")
    model, rows, length = flops.Architecture(body=7000, head=900, layers=3, width=32), 4, 11
    passes = flops.Passes(tokens=rows * length, scored=rows * length, pairs=rows * length**2)
    usual = 6 * (7000 + 900) * rows * length + 12 * 3 * 32 * length * rows * length
    assert flops.step_flops(model, passes, flops.Passes()) == usual


def test_the_1b_model_is_llamas():
    """1,235,814,400 parameters, of which the tied embedding 128,256 × 2,048."""
    from transformers import AutoModelForCausalLM

    steps, flops = load("benchmarks.gpu.steps"), load("benchmarks.gpu.flops")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(steps.model_config(steps.SIZES["1b"]))
    found = flops.Architecture.of(model)
    assert (found.layers, found.width, found.head) == (16, 2048, 128_256 * 2048)
    assert found.body + found.head == 1_235_814_400


def test_passes_are_counted_with_and_without_gradient(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    ids = torch.arange(10).view(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, 3, 4], [-100, 6, 7, 8, 9]])
    with load("benchmarks.gpu.flops").counted(model) as found:
        model(input_ids=ids, attention_mask=mask, labels=labels)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
    model(input_ids=ids, attention_mask=mask)  # after the block: not counted
    trained, other = found["trained"], found["without_gradient"]
    assert (trained.tokens, trained.scored, trained.pairs) == (8, 6, 9 + 25)
    assert (other.tokens, other.scored, other.pairs) == (8, 8, 9 + 25)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_peak_by_device_name(name, tflops):
    assert load("benchmarks.gpu.flops").peak_tflops(name) == tflops


# ---------------------------------------------------------------- timing in turns
def test_trainers_take_turns(monkeypatch):
    timing = load("benchmarks.timing")
    seen = []

    def step(trainer, batch, log=True):
        seen.append((trainer, batch, log))
        return float(trainer)

    monkeypatch.setattr(timing, "step", step)
    seconds = timing.in_turns({"ours": 3, "theirs": 2}, {"ours": "a", "theirs": "b"}, turns=4, log_every=2)
    assert seconds == {"ours": [3.0] * 4, "theirs": [2.0] * 4}
    assert [trainer for trainer, _, _ in seen] == [3, 3, 2, 2, 3, 2, 2, 3, 3, 2, 2, 3]
    assert [batch for _, batch, _ in seen[4:6]] == ["a", "b"]
    assert [log for _, _, log in seen[4:]] == [True, True, False, False] * 2


def test_ratio_is_the_median_with_an_interval():
    found = load("benchmarks.timing").ratio([1.0, 2.0, 30.0], [1.0, 1.0, 10.0])
    assert found["ratios"] == [1.0, 2.0, 3.0] and found["time_ratio"] == 2.0
    assert found["time_ratio_interval"] == [1.0, 3.0]


def test_peak_memory_of_a_gpu_is_beyond_what_lay_there(monkeypatch):
    calls = []
    for name, value in {"synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 100}.items():
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: calls.append(name) or value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: calls.append("max_memory_allocated") or 350)
    assert load("benchmarks.timing").allocated_peak(lambda: calls.append("run"), torch.device("cuda", 0)) == 250
    assert calls == [
        "synchronize", "reset_peak_memory_stats", "memory_allocated", "run", "synchronize", "max_memory_allocated",
    ]  # fmt: skip


def test_peak_memory_is_what_lies_there_at_once():
    def run():
        first = torch.zeros(1000)  # 4,000 bytes
        del first
        second, third = torch.zeros(500), torch.zeros(1500)
        del second, third

    assert load("benchmarks.timing").allocated_peak(run) == 4 * 2000


# ---------------------------------------------------------------- what passes
def test_drift_by_hand():
    losses = load("benchmarks.gpu.losses")
    assert losses.drift([1.0, 2.0, 3.0], [1.0, 2.5, 2.9]) == pytest.approx({"max": 0.5, "mean": 0.2})
    assert losses.drift([1.0, 2.0], [1.0])["max"] == float("inf")
    assert losses.drift([1.0, 2.0], [1.0, float("nan")])["max"] == float("inf")


def test_beyond_the_tolerance_and_without_training_is_refused():
    gpu = load("benchmarks.gpu.run")
    near = gpu.compared([5.0, 2.0], [5.0, 2.0004])
    assert near["tolerance"] == pytest.approx(5e-4) and near["moved"] == 3.0
    gpu.refuse({"flat": near}, {})
    with pytest.raises(gpu.SectionError, match=r"flat 6\.00e-04 > 5\.00e-04"):
        gpu.refuse({"flat": gpu.compared([5.0, 2.0], [5.0, 2.0006])}, {})
    with pytest.raises(gpu.SectionError, match="nothing was trained.*flat"):
        gpu.refuse({"flat": gpu.compared([0.5, 0.5], [0.5, 0.5])}, {})


def test_a_head_that_disagrees_or_is_nan_does_not_pass():
    head = load("benchmarks.gpu.head")
    good = {"float32": {"value_error": 1e-6, "gradient_error": 1e-6}}
    assert head._agreement(dict.fromkeys(head.VARIANTS, good))["passed"]
    for wrong in (1e-3, float("nan")):
        results = {
            **dict.fromkeys(head.VARIANTS, good),
            "fused": {"float32": {**good["float32"], "value_error": wrong}},
        }
        assert not head._agreement(results)["passed"]


# ---------------------------------------------------------------- failures
def test_a_failing_section_is_recorded_and_the_others_go_on(monkeypatch, tmp_path):
    gpu = load("benchmarks.gpu.run")

    def failing(work):
        work.run("broken", ["-c", "import sys; print('noise', file=sys.stderr); raise ValueError('no such kernel')"])

    monkeypatch.setitem(gpu.SECTIONS, "correctness", (failing, 1.0))
    monkeypatch.setitem(gpu.SECTIONS, "head", (lambda work: {"scored_tokens": 64}, 1.0))
    output = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--size", "tiny", "--only", "correctness", "head", "--output", str(output)]
    assert gpu.main(words) == 1
    content = json.loads(output.read_text())
    broken = content["sections"]["correctness"]
    assert broken["status"] == "failed" and broken["error"].endswith("exit code 1: ValueError: no such kernel")
    assert "noise" in broken["log"] and "Traceback" in broken["log"]
    assert content["sections"]["head"]["status"] == "passed" and content["sections"]["head"]["scored_tokens"] == 64
    assert content["sections"]["step"] == {"status": "not run", "reason": "--only correctness head"}


def test_without_time_nothing_is_begun(tmp_path):
    gpu = load("benchmarks.gpu.run")
    output = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--size", "tiny", "--minutes", "0.1", "--only", "head", "--output", str(output)]
    assert gpu.main(words) == 1
    found = json.loads(output.read_text())["sections"]["head"]
    assert found["status"] == "not run" and "--minutes 0.1 were left" in found["reason"]


@pytest.mark.parametrize("own_session", [False, True], ids=["group", "session"])
@pytest.mark.parametrize("stubborn", [False, True], ids=["obeys", "stubborn"])
def test_a_section_is_stopped_with_all_its_processes(tmp_path, monkeypatch, own_session, stubborn):
    """Also a grandchild in a session of its own, as a launcher's workers are, and processes that ignore SIGTERM."""
    gpu = load("benchmarks.gpu.run")
    monkeypatch.setattr(gpu, "_TERM_SECONDS", 0.5)
    work = gpu.Work(gpu.arguments(["--device", "cpu", "--size", "tiny"]), tmp_path)
    work.section_ends = time.monotonic() + 3
    number = tmp_path / "grandchild"
    starts = (
        f"import signal, subprocess; signal.signal(signal.SIGTERM, signal.{'SIG_IGN' if stubborn else 'SIG_DFL'}); "
    )
    starts += f"p = subprocess.Popen(['sleep', '600'], start_new_session={own_session}); "
    starts += f"open({str(number)!r}, 'w').write(str(p.pid)); p.wait()"
    with pytest.raises(gpu.SectionError, match="hanging was stopped"):
        work.run("hanging", ["-c", starts])
    deadline = time.monotonic() + 10
    while _runs(int(number.read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(int(number.read_text()))


def _runs(process):
    """Whether it is there and not a zombie that was not collected."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_processes_see_one_gpu_or_none(monkeypatch, repository):
    gpu = load("benchmarks.gpu.run")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    cuda, cpu = gpu.child_environment("cuda"), gpu.child_environment("cpu")
    assert (cuda["CUDA_VISIBLE_DEVICES"], cpu["CUDA_VISIBLE_DEVICES"]) == ("2", "")
    assert cuda["NVIDIA_TF32_OVERRIDE"] == "0" and cuda["PYTHONPATH"] == f"{repository}:/elsewhere"
    assert "DS_ACCELERATOR" not in cuda and cpu["DS_ACCELERATOR"] == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpu.child_environment("cuda")["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """A `Work` for a GPU whose processes write losses at once: `ran` holds their words, `runs_on` says where they were."""
    gpu = load("benchmarks.gpu.run")
    work = gpu.Work(gpu.arguments(["--device", "cuda"]), tmp_path)
    work.ran, work.runs_on, work.tf32, work.stage, work.broken = {}, "cuda", False, 3, ()

    def run(name, words, device=None, *, quiet=False):
        work.ran.setdefault(name, []).append(words)
        options = {key: words[words.index(f"--{key}") + 1] for key in ("device", "output", "steps")}
        trainers = words[words.index("--trainers") + 1 :]
        precisions = words[words.index("--precisions") + 1 : words.index("--trainers")]
        stage = work.stage if name == "zero3" else None
        device = options["device"] if options["device"] == "cpu" else work.runs_on
        losses = [1.0 / (1 + number) for number in range(int(options["steps"]))]
        one = {"losses": losses, "device": device, "tf32": work.tf32, "zero_stage": stage, "processes": 1}
        output = Path(options["output"])
        runs = json.loads(output.read_text()) if output.is_file() else {}
        for trainer in trainers:
            if trainer in work.broken and name == "correctness":
                raise gpu.SectionError(f"{name} ended with exit code 1: RuntimeError: {trainer}", "the log")
            runs[trainer] = dict.fromkeys(precisions, one)
            output.write_text(json.dumps(runs))

    monkeypatch.setattr(work, "run", run)
    return work


def test_correctness_asks_for_both_devices(on_a_gpu):
    gpu = load("benchmarks.gpu.run")
    result = gpu.correctness(on_a_gpu)
    assert set(result["float32"]) == set(result["bfloat16"]) == {"f_dpo", "f_dpg", "d2o", "flat", "dph"}
    assert "cpu" in on_a_gpu.ran["reference"][0] and "cuda" in on_a_gpu.ran["correctness"][0]
    on_a_gpu.runs_on = "cpu"
    with pytest.raises(gpu.SectionError, match="ran on cpu, not on cuda"):
        gpu.correctness(on_a_gpu)
    on_a_gpu.runs_on, on_a_gpu.tf32 = "cuda", True
    with pytest.raises(gpu.SectionError, match="TF32 switched on"):
        gpu.correctness(on_a_gpu)


def test_a_trainer_that_fails_does_not_take_the_others_along(on_a_gpu):
    gpu = load("benchmarks.gpu.run")
    on_a_gpu.broken = ("f_dpg", "dph")
    with pytest.raises(gpu.SectionError) as caught:
        gpu.correctness(on_a_gpu)
    assert str(caught.value) == (
        "f_dpg: correctness ended with exit code 1: RuntimeError: f_dpg; "
        "dph: correctness ended with exit code 1: RuntimeError: dph"
    )
    assert set(caught.value.found["float32"]) == {"f_dpo", "d2o", "flat"} and caught.value.log == "the log" * 2
    asked = [words[words.index("--trainers") + 1 :] for words in on_a_gpu.ran["correctness"]]
    assert asked == [["f_dpo", "f_dpg", "d2o", "flat", "dph"], ["d2o", "flat", "dph"]]


def test_no_trainer_is_begun_without_time(on_a_gpu):
    gpu = load("benchmarks.gpu.run")
    on_a_gpu.broken, on_a_gpu.section_ends = ("f_dpo",), time.monotonic() + 1
    with pytest.raises(gpu.SectionError, match="f_dpg, d2o, flat, dph: no time was left"):
        gpu.correctness(on_a_gpu)


def test_zero3_is_launched_as_the_recipe_with_one_process_in_float32(on_a_gpu, repository):
    gpu = load("benchmarks.gpu.run")
    assert gpu.zero3(on_a_gpu)["drift"]["max"] == 0.0
    (words,) = on_a_gpu.ran["zero3"]
    assert words[words.index("--config_file") + 1] == str(repository / "recipes" / "accelerate" / "zero3.yaml")
    assert words[words.index("--num_processes") + 1] == "1" and words[words.index("--mixed_precision") + 1] == "no"
    on_a_gpu.stage = None
    with pytest.raises(gpu.SectionError, match="ran as ZeRO stage None"):
        gpu.zero3(on_a_gpu)


def test_the_first_error_of_a_launchers_log():
    log = "warning: noise\n[rank0]: Traceback\n[rank0]: RuntimeError: CUDA error: out of memory\nChildFailedError: x\n"
    assert load("benchmarks.gpu.run").first_error(log) == "RuntimeError: CUDA error: out of memory"
    assert load("benchmarks.gpu.run").first_error("Killed\n\n") == "Killed"


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load("benchmarks.gpu.run").main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "no GPU: torch.cuda.is_available() is False; `--device cpu --size tiny` tries the script without one"
    ]


def test_the_large_model_is_refused_on_a_cpu(capsys):
    with pytest.raises(SystemExit):
        load("benchmarks.gpu.run").main(["--device", "cpu"])
    assert "--device cpu needs --size tiny" in capsys.readouterr().err


# ---------------------------------------------------------------- the whole
def whole(repository, tmp_path, *words, timeout):
    output = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--output", str(output), *words],
        capture_output=True, text=True, timeout=timeout, check=False, cwd=repository, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done, json.loads(output.read_text())


def check_sections(content, device):
    sections = content["sections"]
    assert {name: one["status"] for name, one in sections.items()} == dict.fromkeys(
        ("correctness", "head", "step", "zero3"), "passed"
    )
    for one in sections["correctness"]["bfloat16"].values():
        assert 0 < one["max"] < 0.1  # another precision, and the same method
    assert sections["zero3"]["zero3"]["zero_stage"] == 3 and sections["zero3"]["zero3"]["device"] == device
    assert sections["zero3"]["drift"]["max"] <= 1e-4
    peak = sections["step"]["peak_tflops"] * 1e12
    rows = sections["step"]["size"]["rows"]
    for name, one in sections["step"]["comparisons"].items():
        trained = {kind: one[kind]["tokens"]["trained"]["tokens"] for kind in ("fdiv", "trl")}
        ours = trained["fdiv"] / trained["trl"]
        assert ours == ((rows + max(1, rows // 8)) / rows if name == "dph" else 1.0)  # DPH has rehearsal rows as well
        for kind, tokens in trained.items():
            seconds = one[kind]["step_seconds"]
            assert one[kind]["tokens_per_second"] == pytest.approx(tokens / seconds)
            assert one[kind]["mfu"] == pytest.approx(one[kind]["flops"] / seconds / peak)
            assert one[kind]["peak_bytes"] > 0


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_all_sections_on_a_cpu(repository, tmp_path):
    words = ("--device", "cpu", "--size", "tiny", "--minutes", "35", "--peak_tflops", "0.01")
    done, content = whole(repository, tmp_path, *words, timeout=2300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check_sections(content, "cpu")
    sections = content["sections"]
    for name, one in sections["correctness"]["float32"].items():  # the CPU against itself, in another process
        assert one["max"] <= 1e-7 and one["moved"] > 0.01, name
        assert len(sections["correctness"]["reference"][name]) == 10
    for variant in ("fused", "fallback", "log_softmax_gather"):
        found = sections["head"]["variants"][variant]
        assert found["float32"]["value_error"] < 1e-5 and found["float32"]["gradient_error"] < 1e-5
        assert 1e-5 < found["bfloat16"]["value_error"] < 0.1
    # By hand: 64 hidden, 2 heads of 32, 1 key head, 128 feed-forward, two layers, 512 tokens, norms of 64.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    forward = 2 * (2 * layer + 64) * 128 + 2 * 512 * 64 * 96 + 4 * 2 * 64 * 4 * 32**2  # 4 rows of 32, 96 scored
    assert sections["step"]["comparisons"]["flat"]["trl"]["flops"] == 3 * forward
    assert sections["step"]["comparisons"]["f_dpo"]["fdiv"]["flops"] == 4 * forward
    assert content["device"]["name"] == "cpu" and content["environment"]["versions"]["torch"]


@pytest.mark.gpu
@pytest.mark.timeout(700)
def test_the_real_thing(repository, tmp_path):
    words = () if load("benchmarks.gpu.flops").peak_tflops(torch.cuda.get_device_name()) else ("--peak_tflops", "100")
    done, content = whole(repository, tmp_path, *words, timeout=660)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check_sections(content, "cuda")
    assert (
        content["sections"]["head"]["vocabulary"] == 151_936 and content["sections"]["head"]["scored_tokens"] == 8192
    )
    assert content["seconds"] < 600
