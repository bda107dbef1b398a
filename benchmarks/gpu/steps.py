"""Steps of the five trainers on a model of 1B class, each beside TRL's nearest trainer: time, tokens/s, MFU, memory.

A section of `benchmarks/gpu`, run in a process of its own. The model has the shape of Llama-3.2-1B (without its
stretched rotary positions) and random weights, held in bfloat16. Every row has the same length, rollouts are recorded,
and nothing is padded. `WHY` says what stands beside what. MFU: see `flops`.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.flops import Architecture, Passes, counted, peak_tflops, step_flops, utilisation
from benchmarks.timing import FixedRollouts, first_batch, in_turns, peak_bytes, ratio, ready, reward, step, write_whole

WHY = {
    "f_dpo": ("DPOTrainer", "the same rows, one reference forward each"),
    "f_dpg": ("GRPOTrainer", "beta > 0: the same recorded rollouts, one reference forward each"),
    "d2o": (
        "DPOTrainer",
        "as many rows of the same length, one reference forward each (3 anchors to an answer)",
    ),
    "flat": ("SFTTrainer", "as many rows of the same length and no reference, as FLAT has none (DPO does)"),
    "dph": (
        "GRPOTrainer",
        "beta > 0: the same recorded rollouts; GRPO has a reference, DPH rehearsal rows",
    ),
}
_VOCABULARY = 260  # 256 bytes and four special tokens
_LETTERS = "bcdfghjklmnpqrstvwxz0123456789"


@dataclass
class StepSize:
    """The model, the rows of a step and their tokens (a quarter is prompt), and how many steps are timed."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    rows: int
    tokens: int
    turns: int


SIZES = {
    "1b": StepSize(16, 2048, 8192, 32, 8, 64, 128_256, rows=8, tokens=1024, turns=15),
    "tiny": StepSize(2, 64, 128, 2, 1, 32, 512, rows=4, tokens=32, turns=2),
}


# ---------------------------------------------------------------- model and rows
def model_config(size: StepSize) -> Any:
    """A Llama of this size, embeddings tied, with the special tokens of `tokenizer()`."""
    from transformers import LlamaConfig

    tokens = tokenizer()
    return LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.key_heads,
        head_dim=size.head_dim, max_position_embeddings=max(2 * size.tokens, 64), tie_word_embeddings=True,
        pad_token_id=tokens.pad_token_id, bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id,
    )  # fmt: skip


def tokenizer() -> Any:
    """One token for each byte, so that a text's length in tokens is known."""
    from fdiv.models.tiny import build_tiny_tokenizer

    return build_tiny_tokenizer(vocab_size=_VOCABULARY)


def save_model(size: StepSize, device: str, folder: str) -> str:
    """Random weights in bfloat16 and the tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):  # drawing a billion numbers takes a CPU half a minute
        model = AutoModelForCausalLM.from_config(model_config(size), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def texts(count: int, length: int) -> list[str]:
    """`count` texts of `length` tokens, all different."""
    generator = random.Random(0)
    return ["".join(generator.choices(_LETTERS, k=length)) for _ in range(count)]


class Builder:
    """Makes the trainers of one comparison, ready to step on `size.rows` rows."""

    def __init__(self, size: StepSize, model_dir: str, device: str, divergence: str, folder: str) -> None:
        self.size, self.model_dir, self.divergence = size, model_dir, divergence
        self.prompt = size.tokens // 4
        self.answer = size.tokens - self.prompt  # its end token included, where one is added
        self.common: dict[str, Any] = {
            "output_dir": folder, "learning_rate": 1e-5, "bf16": True, "gradient_checkpointing": False,
            "report_to": [], "disable_tqdm": True, "use_cpu": device == "cpu", "save_strategy": "no",
            "model_init_kwargs": {"dtype": "bfloat16"},
        }  # fmt: skip
        self.rollouts = FixedRollouts(size.rows, self.answer, _VOCABULARY, self.prompt)

    def build(self, name: str) -> Any:
        """Trainer `name`: one of ours, or a class of TRL's."""
        return ready(getattr(self, f"_{name.lower()}")())

    def _columns(self, rows: int, answers: list[str]) -> Any:
        """Prompts, and a column of texts for each of `answers`; four batches of them."""
        from datasets import Dataset

        drawn = texts(4 * rows * (1 + len(answers)), self.answer - 1)
        columns = {"prompt": [text[: self.prompt] for text in drawn[: 4 * rows]]}
        for number, column in enumerate(answers, start=1):
            columns[column] = drawn[4 * rows * number : 4 * rows * (number + 1)]
        return Dataset.from_dict(columns)

    def _rollout_options(self) -> dict[str, Any]:
        rows = self.size.rows
        return {
            **self.common, "per_device_train_batch_size": rows, "num_generations": rows // 2,
            "max_completion_length": self.answer,
        }  # fmt: skip

    def _prompts(self) -> Any:
        from datasets import Dataset

        return Dataset.from_dict({"prompt": ["a", "b"]})

    # ------------------------------------------------------------ ours
    def _f_dpo(self) -> Any:
        from fdiv.alignment import FDPOConfig, FDPOTrainer

        args = FDPOConfig(
            **self.common, per_device_train_batch_size=self.size.rows // 2, divergence=self.divergence, max_length=None
        )
        rows = self._columns(self.size.rows // 2, ["chosen", "rejected"])
        return FDPOTrainer(self.model_dir, args=args, train_dataset=rows)

    def _f_dpg(self) -> Any:
        from fdiv.alignment import FDPGConfig, FDPGTrainer

        args = FDPGConfig(**self._rollout_options(), divergence=self.divergence)
        target = {"name": "reward", "scorers": [reward], "beta": 1.0}
        return FDPGTrainer(self.model_dir, args, self._prompts(), target=target, rollout_func=self.rollouts)

    def _d2o(self) -> Any:
        from fdiv.alignment import D2OConfig, D2OTrainer

        groups = self.size.rows // 4
        args = D2OConfig(
            **self.common, per_device_train_batch_size=groups, num_generations=3, divergence=self.divergence,
            max_length=None, max_completion_length=self.answer,
        )  # fmt: skip
        rows = self._columns(groups, ["rejected", "first", "second", "third"])
        anchors = [list(group) for group in zip(rows["first"], rows["second"], rows["third"], strict=True)]
        rows = rows.select_columns(["prompt", "rejected"]).add_column("anchors", anchors)
        return D2OTrainer(self.model_dir, args=args, train_dataset=rows)

    def _flat(self) -> Any:
        from fdiv.unlearning import FLATConfig, FLATTrainer

        args = FLATConfig(
            **self.common, per_device_train_batch_size=self.size.rows // 2, divergence=self.divergence,
            max_length=2 * self.size.tokens, template_source="column", template_column="template",
        )  # fmt: skip
        rows = self._columns(self.size.rows // 2, ["completion", "template"])
        return FLATTrainer(self.model_dir, args=args, train_dataset=rows)

    def _dph(self) -> Any:
        from benchmarks.dph_step import rehearsal_cache
        from fdiv.rl import DPHConfig, DPHTrainer

        rows = max(1, self.size.rows // 8)  # the share of the release
        args = DPHConfig(**self._rollout_options(), divergence=self.divergence, rehearsal_batch_size=rows)
        cache = rehearsal_cache(self.model_dir, 2 * rows, self.answer, self.prompt)
        return DPHTrainer(
            self.model_dir, args, self._prompts(), reward_funcs=reward, rehearsal=cache, rollout_func=self.rollouts
        )

    # ------------------------------------------------------------ TRL's
    def _dpotrainer(self) -> Any:
        from trl import DPOConfig, DPOTrainer

        args = DPOConfig(**self.common, per_device_train_batch_size=self.size.rows // 2, max_length=None)
        rows = self._columns(self.size.rows // 2, ["chosen", "rejected"])
        return DPOTrainer(self.model_dir, args=args, train_dataset=rows)

    def _grpotrainer(self) -> Any:
        from trl import GRPOConfig, GRPOTrainer

        args = GRPOConfig(**self._rollout_options(), beta=0.1, disable_dropout=True)
        return GRPOTrainer(self.model_dir, reward, args, self._prompts(), rollout_func=self.rollouts)

    def _sfttrainer(self) -> Any:
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig(**self.common, per_device_train_batch_size=self.size.rows, max_length=2 * self.size.tokens)
        return SFTTrainer(self.model_dir, args=args, train_dataset=self._columns(self.size.rows, ["completion"]))


# ---------------------------------------------------------------- one comparison
def passes_of_step(trainer: Any, batch: Any) -> dict[str, Passes]:
    """What one step of `trainer` puts through its models."""
    reference = getattr(trainer, "ref_model", None)
    with counted(*(model for model in (trainer.model, reference) if model is not None)) as found:
        step(trainer, batch)
    return found


def compare(name: str, builder: Builder, peak: float | None) -> dict[str, Any]:
    """Our trainer `name` beside TRL's."""
    nearest, why = WHY[name]
    trainers = {"fdiv": builder.build(name), "trl": builder.build(nearest)}
    batches = {kind: first_batch(trainer) for kind, trainer in trainers.items()}
    times = in_turns(trainers, batches, builder.size.turns, log_every=10)
    result: dict[str, Any] = {"beside": nearest, "because": why, **ratio(times["fdiv"], times["trl"])}
    for kind, trainer in trainers.items():
        passes = passes_of_step(trainer, batches[kind])
        seconds = statistics.median(times[kind])
        flops = step_flops(Architecture.of(trainer.model), **passes)
        result[kind] = {
            "step_seconds": seconds,
            "tokens": {part: asdict(found) for part, found in passes.items()},
            "tokens_per_second": passes["trained"].tokens / seconds,
            "flops": flops,
            "mfu": utilisation(flops, seconds, peak),
            "peak_bytes": peak_bytes(trainer, batches[kind]),
        }
    result["memory_ratio"] = result["fdiv"]["peak_bytes"] / result["trl"]["peak_bytes"]
    return result


def _shown(name: str, result: dict[str, Any]) -> str:
    ours, (low, high) = result["fdiv"], result["time_ratio_interval"]
    mfu = "" if ours["mfu"] is None else f", MFU {ours['mfu']:.3f}"
    return (
        f"  {name:6} / {result['beside']:11} time {result['time_ratio']:.3f} [{low:.3f}, {high:.3f}]  "
        f"memory {result['memory_ratio']:.3f}  ours {ours['step_seconds']:.3f} s, "
        f"{ours['tokens_per_second']:.0f} tokens/s{mfu}"
    )


def measure(options: argparse.Namespace) -> None:
    """The comparisons asked for, as far as there is time; the file is written again after each, and added to."""
    started, size, output = time.monotonic(), SIZES[options.size], Path(options.output)
    peak, reason = options.peak_tflops, None
    if peak is None:
        device_name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        peak = peak_tflops(device_name)
        reason = None if peak else f"the peak of {device_name!r} is not known: give --peak_tflops"
    result: dict[str, Any] = {"peak_tflops": peak, "mfu_missing": reason, "size": asdict(size), "comparisons": {}}
    if output.is_file():
        result = json.loads(output.read_text(encoding="utf-8"))
    model_dir = options.folder / "step_model"
    if not (model_dir / "tokenizer_config.json").is_file():  # written last
        save_model(size, options.device, str(model_dir))
    builder = Builder(size, str(model_dir), options.device, options.divergence, str(options.folder / "steps"))
    longest = 0.0
    for name in options.trainers:
        begun = time.monotonic()
        left = options.seconds - (begun - started)
        if left < longest:
            reason = f"{left:.0f} s of the time budget are left, and a comparison takes {longest:.0f} s"
            result["comparisons"][name] = {"not_run": reason}
            print(f"  {name}: not run: {reason}", flush=True)
        else:
            result["comparisons"][name] = compare(name, builder, peak)
            print(_shown(name, result["comparisons"][name]), flush=True)
        gc.collect()  # trainers are full of cycles
        if options.device == "cuda":
            torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - begun)
        write_whole(output, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keeps the model")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--size", choices=tuple(SIZES), required=True)
    parser.add_argument("--trainers", nargs="+", choices=tuple(WHY), default=list(WHY))
    parser.add_argument("--output", required=True)
    parser.add_argument("--seconds", type=float, default=540.0, help="no comparison is begun that would last longer")
    parser.add_argument("--divergence", default="jensen_shannon")
    parser.add_argument("--peak_tflops", type=float)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
