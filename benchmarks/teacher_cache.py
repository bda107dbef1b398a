"""A distillation step from a cached teacher against a fine-tuning step on the same rows, and a teacher in memory.

    python -m benchmarks.teacher_cache [--turns 12] [--output FILE]

One student of SmolLM2-135M's width with ten layers, random weights, and three trainers that get the same rows:

* cached: `FDistillTrainer` with `teacher: {name: cache, …}`, the top 64 of every token, on disk. No teacher in memory.
* sft: TRL's `SFTTrainer` on the completions.
* local: `FDistillTrainer` with a teacher of the student's size in memory.

A step is timed with the making of the batch (tokens, and what is read of the cache), forward, backward, clipping,
AdamW and a log. The trainers take turns in changing order; a ratio is the median over the turns, with a 95 % bootstrap
interval.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import string
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import in_turns, peak_bytes, ratio, ready, write_result

GOAL = 1.02
KINDS = ("cached", "sft", "local")


def write_models(folder: Path, options: argparse.Namespace) -> None:
    """`student/` and `teacher/`: random weights, one tokenizer, a head of `options.vocabulary` tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fdiv.models.tiny import build_tiny_tokenizer

    tokenizer = build_tiny_tokenizer()
    for number, name in enumerate(("student", "teacher")):
        torch.manual_seed(number)
        config = LlamaConfig(
            vocab_size=options.vocabulary, hidden_size=options.width, intermediate_size=options.width * 8 // 3,
            num_hidden_layers=options.layers, num_attention_heads=options.width // 64,
            num_key_value_heads=options.width // 192,
            max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def texts(options: argparse.Namespace) -> list[dict[str, str]]:
    """Rows of random capital letters, of which each is a token."""
    draw = random.Random(0)

    def letters(count: int) -> str:
        return "".join(draw.choices(string.ascii_uppercase, k=count))

    return [
        {"prompt": letters(options.prompt), "completion": letters(options.length - 1)} for _ in range(options.rows)
    ]


def write_cache(folder: Path, rows: list[dict[str, str]], options: argparse.Namespace) -> None:
    """A cache of these rows with made-up distributions, as only time and memory matter."""
    from transformers import AutoTokenizer

    from fdiv.distillation import cache
    from fdiv.distillation.f_distill.data import completion_tokens
    from fdiv.distillation.teachers import Encoded
    from fdiv.inference.encoding import Encoding
    from fdiv.models.fingerprints import tokenizer_fingerprint
    from fdiv.models.vocabulary import TopK
    from fdiv.sealed import write_record

    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    encoding, ends = Encoding(context="generation"), [tokenizer.eos_token_id]
    encoded = [Encoded(*completion_tokens(tokenizer, row, encoding, ends)) for row in rows]
    tokens = sum(len(row.completion_ids) for row in encoded)
    logits = torch.randn(tokens, options.vocabulary, generator=torch.Generator().manual_seed(3)) * 2
    log_q = logits.log_softmax(-1)
    top = log_q.topk(options.k)
    tail = log_q.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    settings = {
        "format": cache.FORMAT, "model": "random", "weights": "random", "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocabulary": options.vocabulary, "dataset": "random", "splits": ["train"], "k": options.k, "temperature": 1.0,
        "max_completion_length": options.length,
    }  # fmt: skip
    path = folder / "cache"
    path.mkdir()
    write_record(path / cache.SETTINGS, settings)
    said = cache.Said(TopK(top.values, top.indices, tail), log_q[:, 0], entropy)
    cache.write_part(path / cache.part_name(0), cache.settings_digest(settings), 0, encoded, said)
    write_record(path / cache.TAUGHT, {"parts": 1, "share": None})


def build(kind: str, folder: Path, rows: list[dict[str, str]], options: argparse.Namespace) -> Any:
    """A trainer of `kind`, with optimizer and schedule, ready to step."""
    from datasets import Dataset

    machine = {
        "per_device_train_batch_size": options.rows, "learning_rate": 1e-5, "bf16": False, "report_to": [],
        "use_cpu": not torch.cuda.is_available(), "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    student, data = str(folder / "student"), Dataset.from_list(rows)
    if kind == "sft":
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig(str(folder / kind), model_init_kwargs={"dtype": "float32"}, max_length=None, **machine)
        trainer = SFTTrainer(student, args=args, train_dataset=data)
        batch = next(iter(trainer.get_train_dataloader()))
        return ready(trainer), batch
    from fdiv.distillation import FDistillConfig, FDistillTrainer

    teacher = {"name": "cache", "path": str(folder / "cache")} if kind == "cached" else "local"
    args = FDistillConfig(
        str(folder / kind), divergence=options.divergence, on_policy_share=0.0, max_completion_length=options.length,
        teacher=teacher, model_init_kwargs={"dtype": "float32"},
        teacher_model_name_or_path=str(folder / "teacher") if kind == "local" else None, **machine,
    )  # fmt: skip
    return ready(FDistillTrainer(student, args=args, train_dataset=data)), rows


def weights_held(trainer: Any) -> dict[str, int]:
    """Bytes of the student's weights, and of another model's that the trainer holds."""
    teacher = getattr(trainer, "teacher_model", None)
    models = {"student": trainer.model} | ({} if teacher is None else {"teacher": teacher})
    held = {name: sum(p.numel() * p.element_size() for p in model.parameters()) for name, model in models.items()}
    return {"teacher": 0, **held}


def memory_of(trainer: Any, batch: Any) -> dict[str, Any]:
    """Peak bytes of a step with every model that the trainer holds, and the bytes of those models."""
    weights = weights_held(trainer)
    return {"peak_bytes": peak_bytes(trainer, batch) + weights["teacher"], "weights": weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12, help="each trainer steps once in a turn")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--length", type=int, default=48, help="tokens of a completion, the end token among them")
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--divergence", default="jensen_shannon")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "teacher_cache.json"))
    options = parser.parse_args()
    from fdiv.provenance import environment

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = texts(options)
        write_models(folder, options)
        write_cache(folder, rows, options)
        made = {kind: build(kind, folder, rows, options) for kind in KINDS}
        trainers, batches = ({kind: pair[part] for kind, pair in made.items()} for part in (0, 1))
        seconds = in_turns(trainers, batches, options.turns)
        memory = {kind: memory_of(trainers[kind], batches[kind]) for kind in KINDS}
    ratios = {f"cached_to_{kind}": ratio(seconds["cached"], seconds[kind]) for kind in KINDS[1:]}
    for kind in KINDS[1:]:
        found, peak = ratios[f"cached_to_{kind}"], memory["cached"]["peak_bytes"] / memory[kind]["peak_bytes"]
        low, high = found["time_ratio_interval"]
        print(f"cached / {kind:6} time {found['time_ratio']:.3f} [{low:.3f}, {high:.3f}], peak memory {peak:.3f}")
    content = {
        "goal": {"time_ratio": GOAL, "teacher_bytes": 0},
        "meets_time_goal": ratios["cached_to_sft"]["time_ratio"] <= GOAL,
        "meets_memory_goal": memory["cached"]["weights"]["teacher"] == 0,
        "settings": {name: value for name, value in vars(options).items() if name != "output"},
        "time": {"step_seconds": {kind: statistics.median(values) for kind, values in seconds.items()}, **ratios},
        "memory": memory,
        "environment": environment(shlex.join(["python", *sys.argv]), seed=0),
    }
    write_result(options.output, content)


if __name__ == "__main__":
    main()
