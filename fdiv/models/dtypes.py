"""Number types of weights, by the names that options and recipes take."""

from __future__ import annotations

import argparse

from fdiv.errors import DataError

__all__ = ["DTYPES", "add_dtype", "dtype_name"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
_SHORT = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def dtype_name(text: str) -> str:
    """One of `DTYPES`; `bf16`, `fp16` and `fp32` are understood.

    Raises:
        DataError: (a ValueError) another name.
    """
    name = str(text).removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in DTYPES:
        raise DataError(f"dtype {text!r}: choose {', '.join(DTYPES)} (or bf16, fp16, fp32)")
    return name


def add_dtype(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the option `--dtype`."""
    text = "auto (float32 on a CPU), float32, bfloat16, float16; short: bf16, fp16, fp32"
    parser.add_argument("--dtype", type=_option, default="auto", metavar="TYPE", help=text)


def _option(text: str) -> str:
    try:
        return dtype_name(text)
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
