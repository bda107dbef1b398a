"""The log-probability head at a large vocabulary: fused against its plain-torch fallback and log_softmax + gather.

A section of `benchmarks/gpu`, run in a process of its own. The model is an embedding, a norm and an LM head, so
that nothing but the head takes time. Timed is forward and backward of Σ w·log π for fixed random w, in bfloat16. What
every variant makes of the same weights is compared with log_softmax + gather in float32: the log-probabilities, and
the gradients of head and embedding relative to their largest entry.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import allocated_peak, write_whole

VARIANTS = ("fused", "fallback", "log_softmax_gather")


@dataclass
class HeadSize:
    """Rows of `tokens` scored positions each, vocabulary, width, and how often a pass is timed."""

    rows: int
    tokens: int
    vocabulary: int
    hidden: int
    repeats: int


SIZES = {"1b": HeadSize(8, 1024, 151_936, 2048, 10), "tiny": HeadSize(2, 32, 4096, 64, 2)}
VALUE_TOLERANCE = 1e-4  # nats, float32
GRADIENT_TOLERANCE = 1e-4  # of the largest entry, float32


def build(size: HeadSize, device: str) -> Any:
    """A Llama without layers, in bfloat16; tied to nothing."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fdiv.models.logprobs import enable_fused_head

    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.hidden, num_hidden_layers=0,
        num_attention_heads=size.hidden // 64, head_dim=64, max_position_embeddings=2 * size.tokens,
        tie_word_embeddings=False, initializer_range=0.02,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    enable_fused_head(model)
    return model


def log_probs(variant: str, model: Any, ids: Tensor) -> Tensor:
    """`[rows, tokens]` log-probabilities of every token but the first, one way or another."""
    from fdiv.models.logprobs import token_scores

    mask = torch.ones_like(ids)
    if variant == "log_softmax_gather":
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        return logits.float().log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return token_scores(model, ids, mask, mask, fused=variant == "fused").log_probs


def measure(size: HeadSize, device: str) -> dict[str, Any]:
    """All variants, agreement first."""
    model = build(size, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size.vocabulary, (size.rows, size.tokens + 1), generator=generator).to(device)
    weights = torch.rand((size.rows, size.tokens), generator=generator).to(device)

    def backward(variant: str) -> Tensor:
        values = log_probs(variant, model, ids)
        (weights * values).sum().backward()
        return values.detach()

    results: dict[str, Any] = {variant: {} for variant in VARIANTS}
    model.float()
    truth, true_gradients = backward("log_softmax_gather"), _taken_gradients(model)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)  # the weights were made in bfloat16, so nothing is lost
        for variant in VARIANTS:
            values, gradients = backward(variant), _taken_gradients(model)
            results[variant][str(dtype).removeprefix("torch.")] = {
                "value_error": (values - truth).abs().max().item(),
                "gradient_error": max(map(_relative_error, gradients, true_gradients)),
            }
            del values, gradients
    del truth, true_gradients
    for variant in VARIANTS:
        results[variant] |= _cost(lambda variant=variant: backward(variant), model, size.repeats, device)
    return {
        **asdict(size),
        "scored_tokens": size.rows * size.tokens,
        "variants": results,
        "fused_to_fallback": _against(results, "fallback"),
        "fused_to_log_softmax_gather": _against(results, "log_softmax_gather"),
        **_agreement(results),
    }


def _taken_gradients(model: Any) -> list[Tensor]:
    """The gradients of head and embedding in float32, which the model then has no longer."""
    parameters = (model.get_output_embeddings().weight, model.get_input_embeddings().weight)
    gradients = [parameter.grad.float() for parameter in parameters]
    model.zero_grad(set_to_none=True)
    return gradients


def _relative_error(found: Tensor, true: Tensor) -> float:
    return ((found - true).abs().max() / true.abs().max()).item()


def _cost(run: Callable[[], Any], model: Any, repeats: int, device: str) -> dict[str, Any]:
    """Seconds (the median) and peak bytes beyond the weights, gradients included."""
    gc.collect()
    synchronize: Callable[[], Any] = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    seconds = []
    for _ in range(repeats + 1):  # the first compiles the kernels
        model.zero_grad(set_to_none=True)
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - started)
    model.zero_grad(set_to_none=True)
    peak = allocated_peak(run, device)
    model.zero_grad(set_to_none=True)
    return {"seconds": statistics.median(seconds[1:]), "peak_bytes": peak}


def _against(results: dict[str, Any], other: str) -> dict[str, float]:
    fused, theirs = results["fused"], results[other]
    return {
        "time_ratio": fused["seconds"] / theirs["seconds"],
        "memory_ratio": fused["peak_bytes"] / theirs["peak_bytes"],
    }


def _agreement(results: dict[str, Any]) -> dict[str, Any]:
    found = [results[variant]["float32"] for variant in VARIANTS]
    agree = [each["value_error"] <= VALUE_TOLERANCE and each["gradient_error"] <= GRADIENT_TOLERANCE for each in found]
    return {
        "value_tolerance": VALUE_TOLERANCE,
        "gradient_tolerance": GRADIENT_TOLERANCE,
        "passed": all(agree),  # a NaN agrees with nothing
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--size", choices=tuple(SIZES), required=True)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    result = measure(SIZES[options.size], options.device)
    for variant, found in result["variants"].items():
        print(
            f"  {variant:20} {1e3 * found['seconds']:9.2f} ms  {found['peak_bytes'] / 2**30:7.3f} GiB  float32 errors "
            f"{found['float32']['value_error']:.1e} nats, gradient {found['float32']['gradient_error']:.1e}",
            flush=True,
        )
    write_whole(options.output, result)


if __name__ == "__main__":
    main()
