"""`fdiv merge`."""

from __future__ import annotations

import argparse

from fdiv.adapter_merge import merge_adapter, trained_rounding
from fdiv.terminal import info

__all__ = ["merge"]


def merge(args: argparse.Namespace) -> int:
    """Merge as the command line says; tell which base the adapter was added to."""
    quantization, dtype = None, args.dtype
    rounding = trained_rounding(args.adapter)
    if rounding is not None and args.base_weights == "as_trained":
        quantization, dtype = rounding[0], rounding[1] if args.dtype == "auto" else args.dtype
        bits = 4 if "load_in_4bit" in quantization else 8
        info(f"merge: the run trained on a base in {bits} bits, so the base is rounded in the same way first")
    elif rounding is not None:
        info("merge: the run trained on a rounded base; the base as it is stored differs from it by rounding errors")
    output = merge_adapter(args.adapter, args.output, base=args.base, dtype=dtype, quantization=quantization)
    info(f"merged model: {output}")
    return 0
