"""What can only be seen on a GPU, in one command and under ten minutes on one large one (80 GB, bfloat16):

    python -m benchmarks.gpu [--minutes 9] [--only correctness head step zero3] [--output FILE]

* correctness: the five trainers on the same tiny model and recorded data, ten steps: losses in float32 (TF32 off)
  against float32 on the CPU, which must agree; in bfloat16 beside it.
* head: the log-probability head at V = 151,936 and 8,192 tokens: fused, fallback, log_softmax + gather (`head`).
* step: steps of the five trainers on a model of 1B class beside TRL's nearest trainer (`steps`).
* zero3: f-DPO under DeepSpeed ZeRO-3 with one process, in float32: the losses of the plain run.

Every section runs in processes of its own, so that a failure is recorded and the others go on; where one of the
trainers fails, the rest starts again after it. A section that has not ended after its share of the time is stopped.
The result is written again after each section. The exit code is 0 when every section that was asked for passed, 1 when
one did not, 2 without a GPU.

`--device cpu --size tiny` goes the same way without a GPU, to try the script: nothing it measures means anything.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.losses import TRAINERS, drift
from benchmarks.timing import write_result, write_whole

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4  # of max(1, the largest |loss|), in float32
STEPS, ZERO3_STEPS = 10, 5
_LEAST_SECONDS = 15.0  # less is not enough to begin a section
_TERM_SECONDS = 3.0  # from SIGTERM to SIGKILL
_ERROR = re.compile(r"^(?:\[rank\d+\]:\s*)?([\w.]*(?:Error|Exception|Interrupt)\b.*)")


class SectionError(RuntimeError):
    """A section's process failed, was stopped, or measured something that must not be; `log` is what it wrote."""

    def __init__(self, message: str, log: str = "", found: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.log, self.found = log, found or {}


class Work:
    """The options, a folder for what sections leave, and the time that the present section may take."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.started = options, folder, time.monotonic()
        self.section_ends = self.ends = self.started + 60 * options.minutes

    def left(self) -> float:
        """Seconds that are left to the present section."""
        return self.section_ends - time.monotonic()

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.monotonic() - self.started:4.0f} s] {text}", flush=True)

    def run(self, name: str, words: list[str], device: str | None = None, *, quiet: bool = False) -> None:
        """Run a Python process on `device` (the one of the options), its messages kept in a file.

        Raises:
            SectionError: it failed, with its first error, or its time was over.
        """
        log = self.folder / f"{name}.log"
        with log.open("w", encoding="utf-8") as messages:
            process = subprocess.Popen(
                [sys.executable, *words], stdout=messages if quiet else None, stderr=messages, cwd=ROOT,
                env=child_environment(device or self.options.device), start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(max(self.left(), 1.0))
            except subprocess.TimeoutExpired:
                code = None
            finally:  # also what a launcher started, and when this process is interrupted
                if process.poll() is None:
                    stop(process)
        text = log.read_text(encoding="utf-8", errors="replace")
        if code is None:
            raise SectionError(f"{name} was stopped: its share of --minutes {self.options.minutes:g} was over", text)
        if code:
            raise SectionError(f"{name} ended with exit code {code}: {first_error(text)}", text)

    def for_each(self, name: str, output: Path, done: Callable[[Any], Any], words: list[str], **options: Any) -> Any:
        """Run a script that works off the trainers one after the other; where one fails, once more with the rest.

        Args:
            name: of the process.
            output: the file to which the script adds; its content is returned.
            done: from that content, what is keyed by the trainers that are done.
            words: without `--trainers`. options: of `run`.

        Raises:
            SectionError: some failed, with what the others gave.
        """
        errors, logs, trainers = {}, "", list(options.pop("trainers", TRAINERS))
        content: Any = {}
        while trainers:
            error = self._attempt(name, [*words, "--trainers", *trainers], options)
            content = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
            if error is None:
                break
            left = [trainer for trainer in trainers if trainer not in done(content)]
            errors[left[0] if left else "the end"] = str(error)
            logs += error.log[-3000:]
            trainers = left[1:]
            if self.left() < _LEAST_SECONDS and trainers:
                errors[", ".join(trainers)] = "no time was left"
                break
        if errors:
            raise SectionError("; ".join(f"{who}: {what}" for who, what in errors.items()), logs, content)
        return content

    def _attempt(self, name: str, words: list[str], options: dict[str, Any]) -> SectionError | None:
        try:
            self.run(name, words, **options)
        except SectionError as error:
            return error
        return None

    def losses(
        self, name: str, device: str, *precisions: str, steps: int, trainers: tuple[str, ...] = TRAINERS
    ) -> Any:
        """What `losses` reports: trainer → precision → its losses and where they were computed."""
        output = self.folder / f"{name}.json"
        words = ["-m", "benchmarks.gpu.losses", *_loss_options(output, device, precisions, steps)]
        return self.for_each(name, output, lambda found: found, words, device=device, quiet=True, trainers=trainers)


def child_environment(device: str) -> dict[str, str]:
    """Offline; one GPU or none, for Trainer spreads over all it sees; no TF32; `tests` of this checkout importable."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "NVIDIA_TF32_OVERRIDE": "0", "PYTHONPATH": os.pathsep.join(path),
        "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else visible.split(",")[0],
    }  # fmt: skip
    return environment | ({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process that leads its group, and all that it started: SIGTERM, and after a short while SIGKILL.

    A launcher's workers have groups of their own, and nothing leads to them once the launcher is gone, so they are
    collected before it is told; one that stayed would hold its memory on the GPU through the sections that follow.
    """
    import psutil

    from fdiv.cli.launch import descendants, wait_until_gone

    found = descendants(process.pid) | {psutil.Process(process.pid)}
    os.killpg(process.pid, signal.SIGTERM)
    wait_until_gone(found, _TERM_SECONDS)
    found |= descendants(process.pid)
    for one in found:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    with suppress(ProcessLookupError):  # before it is collected: until then no other process has its number
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def first_error(log: str) -> str:
    """The first line of a log that names an exception (launchers add their own behind it), else its last line."""
    lines = [line for line in log.splitlines() if line.strip()]
    named = (match.group(1) for match in map(_ERROR.match, lines) if match)
    return next(named, lines[-1] if lines else "no message")


def _loss_options(output: Path, device: str, precisions: tuple[str, ...], steps: int) -> list[str]:
    words = ["--folder", str(output.parent), "--device", device, "--steps", str(steps), "--output", str(output)]
    return [*words, "--precisions", *precisions]


# ---------------------------------------------------------------- sections
def compared(reference: list[float], found: list[float]) -> dict[str, Any]:
    """`drift` with the tolerance for these losses, and how far training moved them."""
    scale = max(1.0, *map(abs, reference))
    return {**drift(reference, found), "tolerance": TOLERANCE * scale, "moved": max(reference) - min(reference)}


def refuse(found: dict[str, dict[str, Any]], result: dict[str, Any]) -> None:
    """Raise SectionError for a drift beyond its tolerance, and for losses that training did not move."""
    still = [name for name, one in found.items() if not one["moved"] > 10 * one["tolerance"]]
    beyond = [f"{name} {one['max']:.2e} > {one['tolerance']:.2e}" for name, one in found.items() if _is_beyond(one)]
    if beyond or still:
        reasons = [f"drift beyond the tolerance: {', '.join(beyond)}"] if beyond else []
        reasons += [f"nothing was trained, so nothing was compared: {', '.join(still)}"] if still else []
        raise SectionError("; ".join(reasons), found=result)


def _is_beyond(one: dict[str, Any]) -> bool:
    return not one["max"] <= one["tolerance"]


def correctness(work: Work) -> dict[str, Any]:
    """Drift of each trainer's losses from those of float32 on the CPU."""
    device = work.options.device
    reference = work.losses("reference", "cpu", "float32", steps=STEPS)
    work.say("correctness: float32 on the CPU is there")
    try:
        found, failure = work.losses("correctness", device, "float32", "bfloat16", steps=STEPS), None
    except SectionError as error:
        found, failure = error.found, error
    result: dict[str, Any] = {"steps": STEPS, "tf32": False, "reference": {}, "float32": {}, "bfloat16": {}}
    for name, runs in found.items():
        losses = reference[name]["float32"]["losses"]
        result["reference"][name] = losses
        for precision, run in runs.items():
            if run["device"] != device:
                raise SectionError(f"{name} in {precision} ran on {run['device']}, not on {device}")
            if run["tf32"]:
                raise SectionError(f"{name} ran with TF32 switched on, so its float32 is not float32")
            result[precision][name] = compared(losses, run["losses"])
        exact, half = result["float32"][name], result["bfloat16"][name]
        print(
            f"  {name:6} float32 max {exact['max']:.1e}, mean {exact['mean']:.1e} (tolerance {exact['tolerance']:.1e})"
            f"  bfloat16 max {half['max']:.1e}, mean {half['mean']:.1e}",
            flush=True,
        )
    if failure is not None:
        raise SectionError(str(failure), failure.log, result)
    refuse(result["float32"], result)
    return result


def head(work: Work) -> dict[str, Any]:
    """`head`, in a process of its own."""
    output = work.folder / "head.json"
    work.run("head", ["-m", "benchmarks.gpu.head", *_script_options(work, output)])
    result = json.loads(output.read_text(encoding="utf-8"))
    if not result["passed"]:
        raise SectionError("fused head, fallback and log_softmax + gather disagree in float32", found=result)
    return result


def step(work: Work) -> dict[str, Any]:
    """`steps`, in a process of its own."""
    output = work.folder / "step.json"
    words = ["-m", "benchmarks.gpu.steps", *_script_options(work, output), "--folder", str(work.folder)]
    words += ["--seconds", str(work.left()), "--divergence", work.options.divergence]
    if work.options.peak_tflops is not None:
        words += ["--peak_tflops", str(work.options.peak_tflops)]
    result = work.for_each("step", output, lambda found: found.get("comparisons", {}), words)
    missing = [name for name, one in result["comparisons"].items() if "not_run" in one]
    if missing:
        raise SectionError(f"no time was left for {', '.join(missing)}", found=result)
    return result


def _script_options(work: Work, output: Path) -> list[str]:
    return ["--device", work.options.device, "--size", work.options.size, "--output", str(output)]


def zero3(work: Work) -> dict[str, Any]:
    """f-DPO under ZeRO-3 with one process against the plain run on the same device."""
    device, output = work.options.device, work.folder / "zero3.json"
    plain = work.losses("plain", device, "float32", steps=ZERO3_STEPS, trainers=("f_dpo",))["f_dpo"]["float32"]
    config = ROOT / "recipes" / "accelerate" / ("cpu_zero3.yaml" if device == "cpu" else "zero3.yaml")
    launcher = [
        "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config), "--num_processes", "1",
        "--mixed_precision", "no", "--main_process_port", "0", "-m", "benchmarks.gpu.losses",
    ]  # fmt: skip
    words = [*_loss_options(output, device, ("float32",), ZERO3_STEPS), "--trainers", "f_dpo"]
    work.run("zero3", [*launcher, *words], quiet=True)
    sharded = json.loads(output.read_text(encoding="utf-8"))["f_dpo"]["float32"]
    result: dict[str, Any] = {"steps": ZERO3_STEPS, "plain": plain, "zero3": sharded}
    if sharded["zero_stage"] != 3 or sharded["device"] != device:
        raise SectionError(
            f"it ran as ZeRO stage {sharded['zero_stage']} on {sharded['device']}, not stage 3 on {device}",
            found=result,
        )
    result["drift"] = compared(plain["losses"], sharded["losses"])
    print(f"  f_dpo max {result['drift']['max']:.2e} (tolerance {result['drift']['tolerance']:.1e})", flush=True)
    refuse({"f_dpo": result["drift"]}, result)
    return result


SECTIONS: dict[str, tuple[Callable[[Work], dict[str, Any]], float]] = {
    "correctness": (correctness, 0.4),
    "head": (head, 0.25),
    "step": (step, 0.6),
    "zero3": (zero3, 0.4),
}
"""In the order they run: the section, and the share of the time after which it is stopped."""


# ---------------------------------------------------------------- the run
def run_section(work: Work, name: str) -> dict[str, Any]:
    """Status and result of one section; nothing it does ends the run."""
    left = work.ends - time.monotonic()
    if left < _LEAST_SECONDS:
        reason = f"{max(left, 0):.0f} s of --minutes {work.options.minutes:g} were left"
        work.say(f"{name}: not run: {reason}")
        return {"status": "not run", "reason": reason}
    section, share = SECTIONS[name]
    begun = time.monotonic()
    work.section_ends = min(work.ends, begun + 60 * work.options.minutes * share)
    work.say(f"{name} …")
    try:
        found = {"status": "passed", **section(work)}
    except SectionError as error:
        found = {"status": "failed", "error": str(error), **error.found}
        if error.log:
            found["log"] = error.log[-3000:]
    found["seconds"] = round(time.monotonic() - begun, 1)
    work.say(f"{name}: {found['status']}" + (f": {found['error']}" if "error" in found else ""))
    return found


def device_description(device: str) -> dict[str, Any]:
    """Name, memory and compute capability of the GPU; of a CPU its kind alone."""
    import torch

    if device == "cpu":
        return {"kind": "cpu", "name": "cpu", "memory_bytes": None, "capability": None, "cuda": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "kind": "cuda", "name": properties.name, "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
    }  # fmt: skip


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--minutes", type=float, default=9.0, help="the whole run ends within these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("1b", "tiny"), default="1b")
    parser.add_argument("--divergence", default="jensen_shannon", help="of the trainers in section step")
    parser.add_argument("--peak_tflops", type=float, help="the device's dense bfloat16 peak, where it is not known")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "gpu.json"))
    options = parser.parse_args(words)
    if options.device == "cpu" and options.size != "tiny":
        parser.error("--device cpu needs --size tiny: a step of the 1B model takes minutes there")
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g}: must be above 0")
    return options


def main(words: list[str] | None = None) -> int:
    """Run the sections; the exit code."""
    import torch

    options = arguments(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "no GPU: torch.cuda.is_available() is False; `--device cpu --size tiny` tries the script without one",
            file=sys.stderr,
        )
        return 2
    from fdiv.provenance import environment

    skipped = {"status": "not run", "reason": f"--only {' '.join(options.only)}"}
    content: dict[str, Any] = {
        "settings": {name: value for name, value in vars(options).items() if name != "output"},
        "sections": dict.fromkeys(SECTIONS, skipped),
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Work(options, Path(folder))
        for name in SECTIONS:
            if name in options.only:
                content["sections"][name] = run_section(work, name)
                content["seconds"] = round(time.monotonic() - work.started, 1)
                write_whole(options.output, content)
    # Last, since they take hold of the GPU, which may be set to serve one process at a time.
    content["device"] = device_description(options.device)
    content["environment"] = environment(shlex.join(["python", *(sys.argv if words is None else ["gpu.py", *words])]))
    write_result(options.output, content)
    return int(any(content["sections"][name]["status"] != "passed" for name in options.only))


if __name__ == "__main__":
    sys.exit(main())
