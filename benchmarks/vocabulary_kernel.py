"""Time and memory of `fdiv.models.vocabulary` against TRL's chunked JSD: value and both gradients, in turns.

    python -m benchmarks.vocabulary_kernel --divergences jensen_shannon alpha

Hidden states and heads are random; student and teacher have a width each. TRL's kernel has three of the entries
(`beta` 0, ½ and 1); every other entry is compared with its JSD, the one of three with a second pass, and so are the
distances without an f. The ratio is the median over the turns, with its bootstrap interval.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import allocated_peak, ratio, write_result
from fdiv.divergences import list_divergences, parameters_of
from fdiv.divergences.registry import EXAMPLES
from fdiv.models.vocabulary import vocabulary_divergence
from fdiv.provenance import environment

_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0}
GOAL = {"time_ratio": 1.1, "memory_ratio": 1.0}


def operands(
    rows: int, vocabulary: int, widths: tuple[int, int], device: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    """hidden_p, head_p, hidden_q, head_q; the first two want a gradient."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for width in widths:
        for shape, scale in (((rows, width), 1.0), ((vocabulary, width), 2.0 / width**0.5)):
            made.append((scale * torch.randn(shape, generator=generator)).to(device, dtype))
    return [made[0].requires_grad_(), made[1].requires_grad_(), *made[2:]]


def our_step(parts: list[torch.Tensor], spec: Any) -> None:
    """Value and gradients by our kernel."""
    torch.autograd.grad(vocabulary_divergence(*parts, spec).sum(), parts[:2])


def their_step(parts: list[torch.Tensor], beta: float) -> None:
    """Value and gradients by TRL's."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden_p, head_p, hidden_q, head_q = parts
    value, _ = ChunkedDivergenceFunction.apply(hidden_p, head_p, None, hidden_q, head_q, None, beta)
    torch.autograd.grad(value.sum(), parts[:2])


def seconds(run: Any) -> float:
    """Seconds of a call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(parts: list[torch.Tensor], name: str, turns: int, device: str) -> dict[str, Any]:
    """One entry against TRL's kernel: ratios of time and of peak memory, ours over theirs."""
    spec = EXAMPLES.get(name) or {"name": name, **dict.fromkeys(parameters_of(name), 0.3)}
    beta = _BETA.get(name, 0.5)
    ours, theirs = [], []
    for turn in range(turns + 1):  # the first warms the caches and is dropped
        for whose in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
            if whose == "ours":
                ours.append(seconds(lambda: our_step(parts, spec)))
            else:
                theirs.append(seconds(lambda: their_step(parts, beta)))
    peaks = [
        allocated_peak(lambda: our_step(parts, spec), device),
        allocated_peak(lambda: their_step(parts, beta), device),
    ]
    return {
        "divergence": name,
        "trl_beta": beta,
        "seconds": float(torch.tensor(ours[1:]).median()),
        "trl_seconds": float(torch.tensor(theirs[1:]).median()),
        **ratio(ours[1:], theirs[1:]),
        "peak_bytes": peaks[0],
        "trl_peak_bytes": peaks[1],
        "memory_ratio": peaks[0] / peaks[1],
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--widths", type=int, nargs=2, default=(576, 576), help="of the student and of the teacher")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--divergences", nargs="*", default=[*list_divergences(), *EXAMPLES])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "vocabulary_kernel.json")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    parts = operands(options.rows, options.vocabulary, tuple(options.widths), device, dtype)
    results = []
    for name in options.divergences:
        results.append(compare(parts, name, options.turns, device))
        shown = results[-1]
        print(
            f"{name:22s} {shown['seconds']:.2f} s against {shown['trl_seconds']:.2f} s (beta {shown['trl_beta']:g}): "
            f"time {shown['time_ratio']:.2f}, memory {shown['memory_ratio']:.2f}",
            flush=True,
        )
    shape = {"rows": options.rows, "vocabulary": options.vocabulary, "widths": list(options.widths)}
    content = {
        "goal": GOAL,
        "meets_goal": {
            name: [shown["divergence"] for shown in results if shown[name] <= bound] for name, bound in GOAL.items()
        },
        "settings": {**shape, "dtype": options.dtype, "device": device, "threads": torch.get_num_threads()},
        "results": results,
        "environment": environment(shlex.join(["python", *sys.argv]), seed=0),
    }
    write_result(options.output, content)


if __name__ == "__main__":
    main()
