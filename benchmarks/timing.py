"""What the step benchmarks share: steps of two or more trainers in turns, ratios with an interval, peak memory.

A step is timed without the data loader: reward and scoring of rollouts where there are any, reference forward, forward
and backward of the policy, clipping, optimizer, and the log. Trainers take turns in changing order, so that what the
machine does besides falls on all of them alike; a ratio is the median over the turns, with a 95 % bootstrap interval.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


# ---------------------------------------------------------------- recorded rollouts
def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Cheap, and different for every completion."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


class FixedRollouts:
    """A `rollout_func` that always answers with the same random completions, so that sampling costs nothing.

    Args:
        count: completions per call.
        length: tokens per completion.
        vocabulary: ids are sampled from [4, vocabulary).
        prompt_length: tokens per prompt; None: half of `length`.
    """

    def __init__(self, count: int, length: int, vocabulary: int, prompt_length: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        prompt_length = length // 2 if prompt_length is None else prompt_length
        self.prompts = torch.randint(4, vocabulary, (count, prompt_length), generator=generator).tolist()
        self.completions = torch.randint(4, vocabulary, (count, length), generator=generator).tolist()
        self.log_probs = [[-float(np.log(vocabulary))] * length] * count

    def __call__(self, prompts: list, trainer: Any) -> dict[str, Any]:
        return {"prompt_ids": self.prompts, "completion_ids": self.completions, "logprobs": self.log_probs}


# ---------------------------------------------------------------- one step
def ready(trainer: Any) -> Any:
    """`trainer` with optimizer and schedule, its model placed and under its mixed precision, ready for `step`."""
    trainer.callback_handler.callbacks = []  # nothing but the trainer's own work
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    trainer.model.to(trainer.args.device)
    trainer.model.train()
    return trainer


def first_batch(trainer: Any) -> Any:
    """What `training_step` takes: a collated batch on the trainer's device, or rows that it makes one of itself."""
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer._prepare_inputs(batch) if isinstance(batch, Mapping) else batch


def step(trainer: Any, batch: Any, log: bool = True) -> float:
    """One optimizer step on `batch` (a mapping of tensors, or a list of rows), in seconds."""
    copied = dict(batch) if isinstance(batch, Mapping) else [dict(row) for row in batch]
    _synchronize()
    started = time.perf_counter()
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, copied, None)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    if log:
        trainer.log({})
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---------------------------------------------------------------- in turns
def in_turns(
    trainers: Mapping[str, Any], batches: Mapping[str, Any], turns: int, log_every: int = 1
) -> dict[str, list[float]]:
    """Seconds of every trainer's steps: after two to warm up, one in each turn, in an order that changes.

    The orders are the permutations in a cycle, so every trainer stands in every place equally often.

    Args:
        trainers: by name, made `ready`.
        batches: what each of them steps on.
        turns: timed steps of each.
        log_every: the metrics are logged in every such turn.
    """
    for name, trainer in trainers.items():
        for _ in range(2):  # the first steps allocate the optimizer states and warm the caches
            step(trainer, batches[name])
    orders = list(itertools.permutations(trainers))
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(turns):
        for name in orders[turn % len(orders)]:
            seconds[name].append(step(trainers[name], batches[name], turn % log_every == 0))
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """The median of ours/theirs over the turns, its 95 % bootstrap interval (10,000 draws), and all ratios."""
    ratios = np.array(ours) / np.array(theirs)
    return {
        "time_ratio": float(np.median(ratios)),
        "time_ratio_interval": interval(ratios),
        "ratios": [round(float(value), 5) for value in ratios],
    }


def interval(values: Any) -> list[float]:
    """95 % bootstrap interval of the median, of 10,000 draws."""
    resampled = np.random.default_rng(0).choice(np.array(values), size=(10_000, len(values)))
    return [float(edge) for edge in np.quantile(np.median(resampled, axis=1), [0.025, 0.975])]


# ---------------------------------------------------------------- memory
def allocated_peak(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes of tensors that `run` holds at its peak, beyond what lies there before it.

    `max_memory_allocated` on a GPU; on a CPU the allocations that the profiler counts, exact and repeatable.

    Raises:
        RuntimeError: this torch build reports no allocations to the profiler.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    if not events:
        raise RuntimeError("the profiler reported no allocations: this torch build cannot measure CPU memory")
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max())


def resident_bytes(trainer: Any) -> int:
    """Weights of policy and reference and optimizer states."""
    tensors = list(trainer.model.parameters())
    if getattr(trainer, "ref_model", None) is not None:
        tensors += trainer.ref_model.parameters()
    for state in trainer.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_bytes(trainer: Any, batch: Any) -> int:
    """Peak tensor memory of one step, weights and optimizer states included; other trainers beside it do not count."""
    return allocated_peak(lambda: step(trainer, batch), trainer.args.device) + resident_bytes(trainer)


# ---------------------------------------------------------------- results
def write_whole(output: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON; a process that is stopped meanwhile leaves the file as it was."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, output)


def write_result(output: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON and say where."""
    write_whole(output, content)
    print(f"written: {output}")
