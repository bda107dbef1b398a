"""What our passes use of the machine: FLOPs that are needed / CPU time / single-thread GEMM rate, and how cost grows.

    python -m benchmarks.limits [--parts shares tofu padded curves] [--model NAME] [--data DIR] [--output FILE]

* shares: a scoring pass (every answer of TOFU rows), an f-DPO step, a FLAT step and a generation pass, each once a
  turn in an order that changes, with the GEMM rate measured before and after each of them. A share is the median over
  the turns, with a 95 % bootstrap interval. One more run of each under torch's profiler says where the time goes.
* tofu: the whole TOFU set on `--tofu_rows` rows of each kind: scores, generations, all six attacks with GradNorm.
* padded: a FLAT step against the same step on batches padded to the released code's fixed length (500 tokens).
* curves: CPU time of a scoring pass against rows, tokens of a row, and processes; `--output` with `.png` is the plot.

**FLOPs needed** are 2 per weight and token of every matrix that is multiplied, 2 per weight of the LM head and label,
and 4·L·d per pair of a token and one that it attends to (itself and those before it). Padding is not counted, nor the
last token of a row (its output is not read), nor norms, softmax, the optimizer, or anything computed twice. A prompt
with several answers counts once when it is scored, and once an answer when it is trained on. A training step is three
times its forward, plus one forward of the reference where there is one; all weights are trained (with LoRA it would be
twice the forward, as frozen weights have no gradient). A generation counts the prompt and each new token once.

Time is CPU time of the process with one thread, so that other work on the machine takes nothing off; wall time stands
beside it. The GEMM rate is that of a square float32 product, the best of three.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.flops import Architecture, Passes, step_flops
from benchmarks.timing import interval, ratio, ready, step, write_result

PARTS = ("shares", "tofu", "padded", "curves")
GOALS = {"scoring": 0.70, "f_dpo": 0.55, "flat": 0.55}
PADDED_GOAL, PADDED_LENGTH = 4.0, 500
SETS = ("forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed", "holdout10")
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "linear"),
    "attention": ("_flash_attention", "_scaled_dot_product"),
    "optimizer": ("_foreach", "_fused_adam", "lerp_", "addcdiv_", "addcmul_"),
    "softmax and exponentials": ("_log_softmax", "_softmax", "exp", "log"),
    "copies": ("copy_", "cat", "clone", "index_select", "index", "gather", "fill_", "zero_", "masked_fill_"),
}
"""Operators, by the beginning of their names after `aten::`, by what they are counted as; others are elementwise."""


# ---------------------------------------------------------------- FLOPs needed
def architecture(model: Any) -> Architecture:
    """As `Architecture.of`; the body holds the weights of linear layers only, without norms and embeddings."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not head]
    return Architecture.of(model)._replace(body=sum(layer.weight.numel() for layer in layers))


def row_passes(prompt: int, answers: Sequence[int]) -> Passes:
    """What scoring answers of these lengths to one prompt needs: the prompt once, a logit vector per label.

    The first labels share the one that follows the prompt. The last token of an answer is predicted and not read.
    """
    tokens = prompt + sum(length - 1 for length in answers)
    pairs = triangle(prompt) + sum(triangle(prompt + length - 1) - triangle(prompt) for length in answers)
    return Passes(tokens, 1 + sum(length - 1 for length in answers), pairs)


def triangle(length: int) -> int:
    """Pairs of a token and one that it may attend to, in a row of `length`."""
    return length * (length + 1) // 2


def total(passes: Iterator[Passes]) -> Passes:
    """The sum of several."""
    summed = Passes()
    for one in passes:
        summed.tokens, summed.scored = summed.tokens + one.tokens, summed.scored + one.scored
        summed.pairs += one.pairs
    return summed


def scoring_passes(texts: Sequence[Any]) -> Passes:
    """Of encoded texts; those with the same prompt share it."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for text in texts:
        groups.setdefault(text.prompt_ids, []).append(text.label_count)
    return total(row_passes(len(prompt), lengths) for prompt, lengths in groups.items())


def batch_passes(batch: Mapping[str, torch.Tensor]) -> Passes:
    """Of a collated batch with `attention_mask` and `completion_mask`: every row is a row of its own."""
    lengths = batch["attention_mask"].sum(-1).tolist()
    labels = (batch["completion_mask"] * batch["attention_mask"]).sum(-1).tolist()
    return total(row_passes(n - k, [k]) for n, k in zip(lengths, labels, strict=True))


def generation_passes(prompts: Sequence[int], new: Sequence[int]) -> Passes:
    """Of prompts and new tokens: as scoring the new tokens."""
    return total(row_passes(prompt, [count]) for prompt, count in zip(prompts, new, strict=True) if count)


# ---------------------------------------------------------------- time
def gemm_rate(size: int, repeats: int = 3) -> float:
    """FLOP/s of a float32 product of two `size`×`size` matrices, the best of `repeats`."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        torch.mm(left, right)
        best = min(best, time.process_time() - started)
    return 2 * size**3 / best


@dataclass
class Task:
    """Something to time: `run()` needs `flops` and treats `rows` rows of `tokens` tokens in all."""

    name: str
    run: Callable[[], Any]
    flops: int
    rows: int
    tokens: int


def timed(task: Task, size: int) -> dict[str, float]:
    """CPU and wall seconds of a run, and the mean of the GEMM rates before and after it."""
    before = gemm_rate(size)
    wall, cpu = time.perf_counter(), time.process_time()
    task.run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rate = (before + gemm_rate(size)) / 2
    return {"cpu": cpu, "wall": wall, "gemm_rate": rate, "share": task.flops / cpu / rate}


def in_turns(tasks: Sequence[Task], turns: int, size: int) -> dict[str, list[dict[str, float]]]:
    """Every task once a turn, in an order that rotates; the first run of each warms up and is not kept."""
    for task in tasks:
        task.run()
    found: dict[str, list[dict[str, float]]] = {task.name: [] for task in tasks}
    for turn in range(turns):
        for place in range(len(tasks)):
            task = tasks[(turn + place) % len(tasks)]
            found[task.name].append(timed(task, size))
    return found


def kind_of(operator: str) -> str:
    """Which entry of `KINDS` an operator's time belongs to."""
    name = operator.removeprefix("aten::")
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), "elementwise")


def where_time_goes(run: Callable[[], Any]) -> dict[str, float]:
    """Shares of a run's time by kind of operator; `between operators` is Python and dispatch."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
    spent: dict[str, float] = {}
    for event in profile.key_averages():
        if event.key.startswith("aten::"):
            kind = kind_of(event.key)
            spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    spent["between operators"] = max(0.0, seconds - sum(spent.values()))
    return {kind: round(value / seconds, 4) for kind, value in sorted(spent.items(), key=lambda item: -item[1])}


def summary(task: Task, found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians over the turns, the share with its interval."""
    shares = [turn["share"] for turn in found]
    seconds = statistics.median(turn["cpu"] for turn in found)
    goal = GOALS.get(task.name)
    return {
        "flops_needed": task.flops,
        "rows": task.rows,
        "tokens": task.tokens,
        "cpu_seconds": seconds,
        "wall_seconds": statistics.median(turn["wall"] for turn in found),
        "gemm_gflops": statistics.median(turn["gemm_rate"] for turn in found) / 1e9,
        "share": statistics.median(shares),
        "share_interval": interval(shares),
        "shares": [round(share, 4) for share in shares],
        "rows_per_second": task.rows / seconds,
        "goal": goal,
        "meets_goal": None if goal is None else statistics.median(shares) >= goal,
    }


# ---------------------------------------------------------------- rows
def write_rows(folder: Path, count: int) -> None:
    """Rows of made-up words in TOFU's files, as long as TOFU's, for a machine that has none."""
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join("".join(draw.choices("aeioubdglmnrst", k=4)) for _ in range(draw.randint(least, most)))

    for name in SETS:
        rows = [
            {
                "question": f"{words(8, 16)}?",
                "answer": words(16, 40),
                "paraphrased_answer": words(16, 40),
                "perturbed_answer": [words(16, 40) for _ in range(5)],
            }
            for _ in range(count)
        ]
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(folder: Path, count: int) -> list[dict[str, Any]]:
    """`count` different forget rows, evenly spaced; the program ends with one line where the file has fewer."""
    file = folder / f"{SETS[0]}.json"
    lines = file.read_text(encoding="utf-8").splitlines()
    if len(lines) < count:
        sys.exit(
            f"{file} has {len(lines)} rows and {count} are asked for: lower --rows, --batch, --padded_batch and "
            "--curve_rows to that, or give --data with more"
        )
    return [json.loads(lines[i * len(lines) // count]) for i in range(count)]


def texts_of(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[Any]:
    """Every answer of every row, encoded in the plain format."""
    from fdiv.inference.prompting import PromptFormat

    prompt = PromptFormat("never")
    return [
        prompt.encode(tokenizer, row["question"], answer)
        for row in rows
        for answer in (row["answer"], row["paraphrased_answer"], *row["perturbed_answer"])
    ]


# ---------------------------------------------------------------- the passes
def scoring_task(model: Any, texts: Sequence[Any], name: str = "scoring", **settings: Any) -> Task:
    """`score_texts` of all texts, with its defaults where `settings` do not say otherwise."""
    from fdiv.inference.scoring import ScoringRequest, score_texts

    requests = [ScoringRequest(f"text/{number:05d}", text) for number, text in enumerate(texts)]
    passes = scoring_passes(texts)
    return Task(
        name,
        lambda: score_texts(model, requests, pad_id=0, progress=False, **settings),
        passes.flops(architecture(model)),
        len(texts),
        passes.tokens,
    )


def generation_task(model: Any, tokenizer: Any, texts: Sequence[Any], new_tokens: int) -> Task:
    """`generate_texts` after the prompts of all rows."""
    from fdiv.inference.greedy import GenerationRequest, generate_texts

    prompts = dict.fromkeys(text.prompt_ids for text in texts)
    requests = [GenerationRequest(f"prompt/{n:05d}", prompt, new_tokens) for n, prompt in enumerate(prompts)]

    def run() -> dict[str, Any]:
        return generate_texts(model, tokenizer, requests, progress=False)

    records = run()
    # The end token is generated too, where there is one.
    new = [min(records[request.key]["tokens"] + 1, new_tokens) for request in requests]
    passes = generation_passes([len(prompt) for prompt in prompts], new)
    return Task("generation", run, passes.flops(architecture(model)), len(requests), sum(new))


def asked(row: Mapping[str, Any]) -> str:
    """The prompt of a row in the plain format."""
    return f"Question: {row['question']}\nAnswer:"


def f_dpo_trainer(model: str, rows: Sequence[Mapping[str, Any]], size: int, folder: Path) -> Any:
    """`FDPOTrainer` on pairs of the true and the first perturbed answer, with a frozen reference."""
    from datasets import Dataset

    from fdiv.alignment import FDPOConfig, FDPOTrainer

    pairs = [
        {"prompt": asked(row), "chosen": f" {row['answer']}", "rejected": f" {row['perturbed_answer'][0]}"}
        for row in rows
    ]
    args = FDPOConfig(str(folder / "f_dpo"), max_length=None, **_machine(size))
    return ready(FDPOTrainer(model, args=args, train_dataset=Dataset.from_list(pairs)))


def flat_trainer(model: str, rows: Sequence[Mapping[str, Any]], size: int, folder: Path, padded: bool = False) -> Any:
    """`FLATTrainer` on forget rows and refusals; `padded`: every batch is as wide as the released code's."""
    from datasets import Dataset

    from fdiv.unlearning import FLATConfig, FLATTrainer

    forget = [{"prompt": asked(row), "completion": f" {row['answer']}"} for row in rows]
    args = FLATConfig(
        str(folder / "flat"),
        max_length=PADDED_LENGTH,
        pad_to_multiple_of=PADDED_LENGTH if padded else None,
        **_machine(size),
    )
    return ready(FLATTrainer(model, args=args, train_dataset=Dataset.from_list(forget)))


def _machine(size: int) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": size, "learning_rate": 1e-6, "bf16": False, "report_to": [], "use_cpu": True,
        "gradient_checkpointing": False, "disable_tqdm": True, "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip


def step_task(name: str, trainer: Any, size: int, references: int) -> Task:
    """One step on the trainer's first `size` rows: reading, collation, forward, backward, clipping, AdamW, the log."""

    def batch() -> dict[str, Any]:
        return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in range(size)]))

    first = batch()
    passes = batch_passes(first)
    flops = step_flops(architecture(trainer.model), passes, passes if references else Passes())
    return Task(name, lambda: step(trainer, batch()), flops, first["attention_mask"].size(0), passes.tokens)


# ---------------------------------------------------------------- parts
def shares(model_name: str, folder: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Share of the GEMM rate of every pass, and where its time goes."""
    from fdiv.models.loading import load_model, load_tokenizer

    model, tokenizer = load_model(model_name, dtype="float32").eval(), load_tokenizer(model_name)
    texts = texts_of(rows[: options.rows], tokenizer)
    pairs = rows[: options.batch]
    tasks = [
        scoring_task(model, texts),
        step_task("f_dpo", f_dpo_trainer(model_name, pairs, options.batch, folder), options.batch, references=1),
        step_task("flat", flat_trainer(model_name, pairs, options.batch, folder), options.batch, references=0),
        generation_task(model, tokenizer, texts, options.new_tokens),
    ]
    found = in_turns(tasks, options.turns, options.gemm_size)
    result = {task.name: summary(task, found[task.name]) for task in tasks}
    for name, one in result.items():
        low, high = one["share_interval"]
        rate = one["gemm_gflops"]
        print(f"{name:11} {one['share']:.3f} [{low:.3f}, {high:.3f}] of {rate:.0f} GFLOP/s", flush=True)
    for task in tasks if options.profile else ():
        spent = result[task.name]["time_by_kind"] = where_time_goes(task.run)
        print(f"{task.name:11} " + ", ".join(f"{kind} {share:.0%}" for kind, share in spent.items()), flush=True)
    return result


def tofu(model_name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The TOFU set once: FLOPs needed by its four passes and the share of the GEMM rate over its CPU time."""
    from fdiv.eval.tofu.evaluation import TofuEvalConfig, TofuEvaluation
    from fdiv.models.loading import load_model, load_tokenizer

    model, reference = (load_model(model_name, dtype="float32") for _ in range(2))
    generated: list[tuple[Any, Any]] = []

    class Watched(TofuEvaluation):
        """Remembers what was generated and how long it became."""

        def _generate(self, model: Any, title: str, requests: Sequence[Any]) -> Any:
            records = super()._generate(model, title, requests)
            generated.extend((request, records[request.key]) for request in requests)
            return records

    config = TofuEvalConfig(
        data=str(folder), max_items=options.tofu_rows, chat_template="never", fluency_classifier="none"
    )
    plans: list[Any] = []

    def run() -> None:
        evaluation = Watched(config, load_tokenizer(model_name), progress=False)
        evaluation.aggregate(evaluation.run(model, reference_model=reference))
        plans.append(evaluation.plan)

    task = Task("tofu", run, 0, 0, 0)
    found = timed(task, options.gemm_size)
    plan, weights = plans[0], architecture(model)
    attacked = [request.text for request in plan.attacked()]
    each_alone = total(row_passes(text.prompt_length, [text.label_count]) for text in attacked)
    bounds = [min(record["tokens"] + 1, request.max_new_tokens) for request, record in generated]
    new = [max(0, bound - len(request.draft)) for bound, (request, _) in zip(bounds, generated, strict=True)]
    flops = {
        "scoring": scoring_passes([request.text for request in plan.scoring]).flops(weights),
        "reference": scoring_passes(attacked).flops(weights),
        "gradnorm": step_flops(weights, each_alone, Passes()),
        "generation": generation_passes([len(request.prompt_ids) for request, _ in generated], new).flops(weights),
    }
    share = sum(flops.values()) / found["cpu"] / found["gemm_rate"]
    print(f"tofu        {share:.3f} of {found['gemm_rate'] / 1e9:.0f} GFLOP/s", flush=True)
    return {
        "flops_needed": flops, "texts": len(plan.scoring), "generations": len(generated), "cpu_seconds": found["cpu"],
        "wall_seconds": found["wall"], "gemm_gflops": found["gemm_rate"] / 1e9, "share": share,
    }  # fmt: skip


def padded(model_name: str, folder: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """CPU time of a FLAT step on batches of the released code's width over that of ours; the rows are the same."""
    size = options.padded_batch
    tasks = []
    for name in ("ours", "padded"):
        trainer = flat_trainer(model_name, rows[:size], size, folder / name, padded=name == "padded")
        tasks.append(step_task(name, trainer, size, references=0))
    found = in_turns(tasks, options.padded_turns, options.gemm_size)
    cpu = {name: [turn["cpu"] for turn in turns] for name, turns in found.items()}
    compared = ratio(cpu["padded"], cpu["ours"])
    speed = compared.pop("time_ratio")
    low, high = compared.pop("time_ratio_interval")
    print(f"padded      {speed:.2f} [{low:.2f}, {high:.2f}] times the rows per second", flush=True)
    return {
        "rows": size, "tokens": tasks[0].tokens, "padded_length": PADDED_LENGTH, "rows_per_second_ratio": speed,
        "interval": [low, high], "ratios": compared["ratios"], "goal": PADDED_GOAL, "meets_goal": speed >= PADDED_GOAL,
        "rows_per_second": {name: size / statistics.median(seconds) for name, seconds in cpu.items()},
    }  # fmt: skip


# ---------------------------------------------------------------- curves
def fixed_texts(length: int, count: int, vocabulary: int) -> list[Any]:
    """`count` texts of `length` random tokens, the second half of which are labels."""
    from fdiv.inference.prompting import EncodedText

    draw = random.Random(length)
    return [
        EncodedText(tuple(draw.randrange(4, vocabulary) for _ in range(length)), length // 2) for _ in range(count)
    ]


def growth(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent k of seconds ∝ sizeᵏ, by least squares of the logarithms; 1 is linear."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def curve(tasks: Mapping[int, Task], turns: int, size: int) -> dict[str, Any]:
    """Seconds and shares of tasks by their size, the median over the turns."""
    found = in_turns(list(tasks.values()), turns, size)
    medians = {
        key: [statistics.median(turn[key] for turn in found[task.name]) for task in tasks.values()]
        for key in ("cpu", "share")
    }
    return {
        "sizes": list(tasks),
        "cpu_seconds": medians["cpu"],
        "shares": medians["share"],
        "exponent": growth(list(tasks), medians["cpu"]),
    }


def curves(model_name: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """CPU time of a scoring pass against rows, tokens per row, and processes."""
    from fdiv.models.loading import load_model, load_tokenizer

    model, tokenizer = load_model(model_name, dtype="float32").eval(), load_tokenizer(model_name)
    by_rows = {n: scoring_task(model, texts_of(rows[:n], tokenizer), f"rows {n}") for n in options.curve_rows}
    vocabulary = model.config.get_text_config().vocab_size
    by_length = {
        n: scoring_task(model, fixed_texts(n, options.curve_texts, vocabulary), f"length {n}")
        for n in options.curve_lengths
    }
    found = {
        "rows": curve(by_rows, options.curve_turns, options.gemm_size),
        "length": curve(by_length, options.curve_turns, options.gemm_size),
        "processes": by_processes(model_name, rows, options),
    }
    for name in ("rows", "length"):
        print(
            f"{name:11} exponent {found[name]['exponent']:.3f}: {np.round(found[name]['cpu_seconds'], 2)}", flush=True
        )
    print(f"processes   {found['processes']}", flush=True)
    return found


def by_processes(model_name: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of one scoring pass shared by 1, 2, … processes: of the busiest one, and of all together."""
    found: dict[str, Any] = {"sizes": options.processes, "busiest_cpu_seconds": [], "all_cpu_seconds": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / f"{SETS[0]}.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for count in options.processes:
            command = [sys.executable, "-m", "benchmarks.limits", "--model", model_name, "--data", name]
            command += ["--rows", str(max(options.curve_rows)), "--worker", name]
            workers = [
                subprocess.Popen(command, env=worker_environment(rank, count), cwd=Path(__file__).parents[1])
                for rank in range(count)
            ]
            codes = [worker.wait() for worker in workers]
            if any(codes):
                sys.exit(f"a process of {count} failed with the exit codes {codes}")
            seconds = [float((folder / f"{rank}.txt").read_text()) for rank in range(count)]
            found["busiest_cpu_seconds"].append(max(seconds))
            found["all_cpu_seconds"].append(sum(seconds))
    return found


def worker_environment(rank: int, count: int) -> dict[str, str]:
    """That of one process among several that find each other as torchrun's do."""
    shared = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    if count > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29_500 + os.getpid() % 1000)}
        shared |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
        }
    return os.environ | shared


def work(options: argparse.Namespace) -> None:
    """One process of `by_processes`: write the CPU seconds of its share of a scoring pass."""
    from fdiv.inference.processes import process_state
    from fdiv.models.loading import load_model, load_tokenizer

    state = process_state()
    model, tokenizer = load_model(options.model, dtype="float32").eval(), load_tokenizer(options.model)
    # Processes share batches: of two rows, so that a few rows make more batches than there are processes.
    task = scoring_task(model, texts_of(read_rows(Path(options.data), options.rows), tokenizer), batch_size=2)
    task.run()
    state.wait_for_everyone()
    started = time.process_time()
    task.run()
    seconds = time.process_time() - started
    (Path(options.worker) / f"{state.process_index}.txt").write_text(str(seconds))


def draw_curves(found: Mapping[str, Any], path: Path) -> None:
    """One panel each for rows, length and processes, beside a cost in proportion to the first point's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    labels = {"rows": "questions, seven answers each", "length": "tokens of a row", "processes": "processes"}
    for axis, (name, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        sizes = found[name]["sizes"]
        seconds = found[name].get("cpu_seconds") or found[name]["busiest_cpu_seconds"]
        axis.plot(sizes, seconds, "o-", label="measured")
        power = -1 if name == "processes" else 1
        axis.plot(
            sizes, [seconds[0] * (n / sizes[0]) ** power for n in sizes], "--", color="grey", label="in proportion"
        )
        axis.set(xlabel=label, ylabel="CPU seconds of a scoring pass", xscale="log", yscale="log")
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.minorticks_off()
        axis.legend()
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- command
def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    made.add_argument(
        "--model", default="smollm2-135m-instruct", help="a path, or a name that `fdiv models fetch` knows"
    )
    made.add_argument("--data", help="a folder with TOFU's files; rows of made-up words when left out")
    made.add_argument("--rows", type=int, default=12, help="questions of the scoring and the generation pass")
    made.add_argument("--batch", type=int, default=8, help="pairs of a training step")
    made.add_argument("--new_tokens", type=int, default=32)
    made.add_argument("--turns", type=int, default=5)
    made.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True, help="where the time goes")
    made.add_argument("--gemm_size", type=int, default=1024)
    made.add_argument("--tofu_rows", type=int, default=6, help="rows of each of TOFU's sets")
    made.add_argument("--padded_batch", type=int, default=4)
    made.add_argument("--padded_turns", type=int, default=3)
    made.add_argument("--curve_rows", type=int, nargs="+", default=[2, 4, 8, 16])
    made.add_argument("--curve_lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    made.add_argument("--curve_texts", type=int, default=2, help="texts of each length")
    made.add_argument("--curve_turns", type=int, default=2)
    made.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    made.add_argument("--output", default=str(Path(__file__).parent / "results" / "limits.json"))
    made.add_argument("--worker", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measure, print, and write JSON and plot."""
    options = parser().parse_args()
    torch.set_num_threads(1)
    from fdiv.models.fetch import find_model
    from fdiv.provenance import environment

    options.model = find_model(options.model) or options.model
    if options.worker:
        work(options)
        return
    content: dict[str, Any] = {"settings": {k: v for k, v in vars(options).items() if k not in ("output", "worker")}}
    content["settings"] |= {"model": Path(options.model).name, "data": "TOFU" if options.data else "made up"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        needed = max(options.rows, options.batch, options.padded_batch, *options.curve_rows)
        if options.data is None:
            write_rows(folder, max(needed, options.tofu_rows))
        data = Path(options.data) if options.data else folder
        rows = read_rows(data, needed)
        parts = {
            "shares": lambda: shares(options.model, folder, rows, options),
            "tofu": lambda: tofu(options.model, data, options),
            "padded": lambda: padded(options.model, folder, rows, options),
            "curves": lambda: curves(options.model, rows, options),
        }
        for part in options.parts:
            content[part] = parts[part]()
    content["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    content["environment"] = environment(shlex.join(["python", *sys.argv]), seed=0)
    if "curves" in content:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        draw_curves(content["curves"], Path(options.output).with_suffix(".png"))
    write_result(options.output, content)


if __name__ == "__main__":
    main()
