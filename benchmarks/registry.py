"""Cost of the registry's scores: forward + backward on 1e6 log-ratios against the bare torch expression.

    python -m benchmarks.registry                 # prints the table, writes benchmarks/results/registry.json

Both sides run interleaved in one process; the ratio is the median over pairs with a bootstrap interval. The bare
expression is what one would write without any overflow policy (it returns inf where the registry saturates). Beside it
the share of a training step: the scores of 128 sequence log-ratios (64 pairs) against one optimizer step of a 2-layer,
15 M-parameter Llama on 16 sequences of 256 tokens. Any real step is longer, so the share is an upper bound.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from fdiv.divergences import get_divergence

#: spec → the bare expression of its score and whether that expression takes an unbounded exponential
BARE: list[tuple[str | dict, Callable[[torch.Tensor], torch.Tensor], bool]] = [
    ("reverse_kl", lambda x: x + 0.0, False),
    ("jensen_shannon", lambda x: F.logsigmoid(x) + 0.6931471805599453, False),
    ("le_cam", lambda x: torch.tanh(0.5 * x) * (1.0 + 2.0 * torch.sigmoid(-x)), False),
    ("total_variation", lambda x: 0.5 * torch.sign(x), False),
    (
        {"name": "skew_jensen_shannon", "weight": 0.3},
        lambda x: 0.3 * (x - torch.log(0.3 * torch.exp(x) + 0.7)),
        False,
    ),
    ("forward_kl", lambda x: -torch.expm1(-x), True),
    ("jeffreys", lambda x: x - torch.expm1(-x), True),
    ({"name": "alpha", "alpha": 0.5}, lambda x: -torch.expm1(-0.5 * x) / 0.5, True),
    ("squared_hellinger", lambda x: -torch.expm1(-0.5 * x), True),
    ("neyman_chi2", lambda x: -torch.expm1(-2.0 * x), True),
    ("pearson_chi2", lambda x: 2.0 * torch.expm1(x), True),
    ("chi2_kl", lambda x: x + torch.expm1(x), True),
]


def seconds(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """Wall time of one forward + backward."""
    x.grad = None
    began = time.perf_counter()
    function(x).sum().backward()
    return time.perf_counter() - began


def compare(ours: Callable, bare: Callable, size: int, pairs: int) -> dict:
    """Median ratio ours/bare over interleaved pairs, with a 95 % bootstrap interval."""
    x = (3.0 * torch.randn(size, generator=torch.Generator().manual_seed(0))).requires_grad_()
    for _ in range(3):
        seconds(ours, x), seconds(bare, x)
    mine, theirs = [], []
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            (mine if which else theirs).append(seconds(ours if which else bare, x))
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
    return {
        "ours_ms": 1e3 * statistics.median(mine),
        "bare_ms": 1e3 * statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratio_95": [medians[25], medians[974]],
    }


def training_step_seconds(steps: int = 5) -> float:
    """Median optimizer step of a small Llama on 16 sequences of 256 tokens (8 pairs)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=8
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 8192, (16, 256))
    times = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1_000_000, help="log-ratios per call")
    parser.add_argument("--pairs", type=int, default=41, help="interleaved pairs per divergence")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "registry.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    step = training_step_seconds()
    rows = {}
    for spec, bare, exponential in BARE:
        divergence = get_divergence(spec)
        row = compare(divergence.derivative, bare, args.size, args.pairs)
        row["takes_an_exponential"] = exponential
        small = (3.0 * torch.randn(128)).requires_grad_()
        row["share_of_step"] = statistics.median(seconds(divergence.derivative, small) for _ in range(200)) / step
        rows[divergence.label] = row
        low, high = row["ratio_95"]
        print(
            f"{divergence.label:26s} ours {row['ours_ms']:7.2f} ms  bare {row['bare_ms']:7.2f} ms  "
            f"ratio {row['ratio']:.3f} [{low:.3f}, {high:.3f}]  of a step {100 * row['share_of_step']:.4f} %"
        )
    report = {
        "command": "python -m benchmarks.registry",
        "log_ratios": args.size,
        "pairs": args.pairs,
        "threads": 1,
        "dtype": "float32",
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {platform.system()}, CPU",
        "training_step_s": step,
        "scores": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
