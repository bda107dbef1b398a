"""How far runs drift apart that should be one and the same run: all five trainers, six things that must not matter.

Shared by test_invariance.py and tests/support/scripts/invariance.py. Plain SGD without clipping: AdamW and clipping divide the
gradient's scale out, and with it a wrong normaliser.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdiv.cli.ending import exit_after
from tests.support.instruments import move_padding, remove_fused_head, watched
from tests.support.runs.all_trainers import TRAINERS, build, flat_weights, losses

STEPS = 30
BATCH = 8

AXES = {
    "accumulation": ("uneven", "accumulated"),
    "checkpointing": ("base", "checkpointed"),
    "tokenizer_side": ("tokenizer_left", "tokenizer_right"),
    "padding": ("padded_left", "padded_right"),
    "processes": ("base", "two_processes"),
    "head": ("base", "plain_head"),
}
"""What must not matter → the two runs that are compared.

* accumulation: 8 examples at once, or one after the other; f-DPO and D²O on 12 rows, so that every second step has 4.
* checkpointing: gradient checkpointing off, or on.
* tokenizer_side: `padding_side` of the tokenizer. The trainer samples its rollouts itself. GPT-2 (learned positions).
* padding: every row that a model scores padded on the left, or on the right. GPT-2.
* processes: one, or two under DDP, at the same global batch.
* head: TRL's fused LM head, or log-probabilities from the model's own logits (`token_scores(fused=False)`).
"""

_RATES = {"f_dpo": 0.05, "f_dpg": 0.02, "d2o": 0.05, "flat": 0.01, "dph": 0.05}
_SETTINGS: dict[str, dict[str, Any]] = {
    "f_dpo": {"rows": 24},
    "f_dpg": {},
    "d2o": {"rows": 24},
    "flat": {"forget_weight": 100.0},  # its gradient carries a factor p, about 1/400 in a random model
    "dph": {"rehearsal_batch_size": 5},  # fewer than there are micro-steps: some have none
}


@dataclass(frozen=True)
class Run:
    """The logged loss of every step, all weights before and after, and what was counted on the way (`watched`)."""

    losses: list[float]
    start: Tensor
    end: Tensor
    processes: int = 1
    counts: dict[str, int] = field(default_factory=Counter)


def drift(one: Run, other: Run) -> dict[str, float]:
    """Absolute differences of losses and final weights, beside how far training moved both."""
    gaps = [abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)]
    apart, moved = one.end - other.end, one.end - one.start
    return {
        "loss_max": max(gaps),
        "loss_mean": sum(gaps) / len(gaps),
        "loss_range": max(one.losses) - min(one.losses),
        "weights_max": apart.abs().max().item(),
        "weights_moved": moved.abs().max().item(),
    }


def measured(suite: Invariance) -> dict[str, dict[str, dict[str, float]]]:
    """Axis → trainer → `drift`."""
    return {axis: {name: drift(*suite.pair(axis, name)) for name in TRAINERS} for axis in AXES}


def table(drifts: dict[str, dict[str, dict[str, float]]]) -> str:
    """What `measured` found as a Markdown table: trainers down, axes across, maximum and mean drift of the loss."""

    def cell(found: dict[str, float]) -> str:
        return "0" if found["loss_max"] == 0 else f"{found['loss_max']:.1e} / {found['loss_mean']:.1e}"

    head = ["", *(axis.replace("_", " ") for axis in AXES)]
    rows = [[f"`{name}`", *(cell(drifts[axis][name]) for axis in AXES)] for name in TRAINERS]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


class Invariance:
    """Runs of the five trainers on tiny models made in `folder`, `steps` optimizer steps each; no run is made twice."""

    def __init__(self, folder: Path, steps: int = STEPS) -> None:
        self.folder, self.steps = Path(folder), steps
        self._runs: dict[tuple[str, str], Run] = {}

    def pair(self, axis: str, name: str) -> tuple[Run, Run]:
        """The two runs of trainer `name` that `axis` compares."""
        one, other = AXES[axis]
        return self.run(name, one), self.run(name, other)

    def run(self, name: str, variant: str) -> Run:
        """Trainer `name`, trained as `variant` of `AXES` says."""
        if variant == "uneven" and name not in ("f_dpo", "d2o"):
            variant = "base"
        if (name, variant) not in self._runs:
            if variant == "two_processes":
                self._runs |= {(trainer, variant): run for trainer, run in self.on_two_processes().items()}
            else:
                self._runs[name, variant] = self.train(name, variant)
        return self._runs[name, variant]

    def train(self, name: str, variant: str, fault: Callable[[Any], None] | None = None) -> Run:
        """As `run`, but never from the cache; `fault` is done to the trainer before it starts."""
        materials = self._materials("gpt2" if variant.startswith(("padded", "tokenizer")) else "llama")
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        options = {
            "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "learning_rate": _RATES[name],
            "max_steps": self.steps, "per_device_train_batch_size": BATCH // processes, **_SETTINGS[name],
        }  # fmt: skip
        options |= _rollouts(name, variant, materials) | _changed_options(name, variant, materials)
        torch.manual_seed(0)
        trainer = build(name, materials / "model", self.folder / "runs" / f"{name}_{variant}", **options)
        if variant.startswith("padded"):
            move_padding(trainer, variant.removeprefix("padded_"))
        elif variant == "plain_head":
            remove_fused_head(trainer)
        if fault is not None:
            fault(trainer)
        start = flat_weights(trainer)
        with watched(trainer) as counts:
            trainer.train()
        return Run(losses(trainer), start, flat_weights(trainer), trainer.accelerator.num_processes, counts)

    def on_two_processes(self, *flags: str) -> dict[str, Run]:
        """All five under DDP in one launch of torchrun, which runs this module."""
        self._materials("llama")
        words = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tests.support.invariance"]
        done = subprocess.run(
            [sys.executable, "-m", *words, str(self.folder), str(self.steps), *flags],
            capture_output=True, text=True, timeout=1800, check=False, cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"two processes failed:\n{done.stderr[-4000:]}")
        weights = load_file(self.folder / "two_processes.safetensors")
        found = json.loads((self.folder / "two_processes.json").read_text())
        return {
            name: Run(values["losses"], weights[f"{name}.start"], weights[f"{name}.end"], values["processes"],
                      values["counts"])
            for name, values in found.items()
        }  # fmt: skip

    def _materials(self, architecture: str) -> Path:
        """A folder with a tiny model, recorded rollouts of it and rehearsal rows."""
        from fdiv.models.tiny import build_tiny_model
        from tests.support.runs.dph import cache
        from tests.support.runs.f_dpg import recorded

        folder = self.folder / architecture
        if not (folder / "rehearsal.safetensors").exists():
            model = build_tiny_model(folder / "model", architecture=architecture)
            records = recorded(model, 2 * self.steps + 4)  # of 4 prompts; a step takes 4 samples of 2 of them
            for record in records:  # of 3, 4 and 5 tokens, so that completions are padded too
                for column in ("completion_ids", "logprobs"):
                    record[column] = record[column][: 3 + record["sample"] % 3]
            (folder / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            cache(model, shift=0.5).save(folder / "rehearsal.safetensors")
        return folder


def _rollouts(name: str, variant: str, materials: Path) -> dict[str, Any]:
    """Replayed completions and given anchors, but where the trainer's own sampling is to be seen."""
    from fdiv.training.rollouts import RecordedRollouts

    chosen: dict[str, Any] = {}
    if name == "dph":
        chosen["rehearsal_cache"] = str(materials / "rehearsal.safetensors")
    if variant.startswith("tokenizer"):
        return chosen
    if name in ("f_dpg", "dph"):
        chosen["rollout_func"] = RecordedRollouts(materials / "rollouts.jsonl")
    if name == "d2o":
        chosen["given_anchors"] = 3
    return chosen


def _changed_options(name: str, variant: str, materials: Path) -> dict[str, Any]:
    """The options in which `variant` differs from `base`."""
    changed: dict[str, Any] = {}
    if variant in ("uneven", "accumulated") and "rows" in _SETTINGS[name]:
        changed["rows"] = 12
    if variant == "accumulated":
        changed |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH}
    if variant == "checkpointed":
        changed["gradient_checkpointing"] = True
    if variant.startswith("tokenizer"):
        from transformers import AutoTokenizer

        side = variant.removeprefix("tokenizer_")
        tokenizer = AutoTokenizer.from_pretrained(materials / "model", padding_side=side)
        changed["tokenizer" if name == "flat" else "processing_class"] = tokenizer
    return changed


def main(folder: str, steps: str, *flags: str) -> None:
    """What torchrun starts: the five, one after the other. With the flag `--alone` gradients are not averaged."""
    suite = Invariance(Path(folder), int(steps))
    fault = _keep_gradients_apart if "--alone" in flags else None
    runs = {name: suite.train(name, "two_processes", fault) for name in TRAINERS}
    if int(os.environ["RANK"]) == 0:
        weights = {f"{name}.{when}": getattr(run, when) for name, run in runs.items() for when in ("start", "end")}
        save_file(weights, Path(folder) / "two_processes.safetensors")
        values = {
            name: {"losses": run.losses, "processes": run.processes, "counts": run.counts}
            for name, run in runs.items()
        }
        (Path(folder) / "two_processes.json").write_text(json.dumps(values))


def _keep_gradients_apart(trainer: Any) -> None:
    """Each process steps on its own gradient, as if DDP were not there."""
    training_step = trainer.training_step

    def alone(*args: Any) -> Tensor:
        with trainer.model_wrapped.no_sync():
            return training_step(*args)

    trainer.training_step = alone


if __name__ == "__main__":
    exit_after(lambda: main(*sys.argv[1:]))
