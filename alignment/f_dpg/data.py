"""What f-DPG reads off a batch of `GRPOTrainer`: the tokens that count, the model's inputs, keys of prompts; and
the rows it trains on when there are none."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor

from fdiv.rows.checks import Check, shown

if TYPE_CHECKING:
    from fdiv.alignment.f_dpg.config import FDPGConfig

__all__ = ["empty_prompts", "given_log_z", "log_z_checks", "prompt_keys"]


_NEEDS_LOG_Z = "z_estimate: given needs a finite log Z for every prompt: set log_z, or a dataset column log_z"


def empty_prompts(args: FDPGConfig) -> Dataset:
    """Rows without a prompt, as many as one generation needs; `max_steps` sets how often they come round.

    Raises:
        ValueError: `max_steps` is not set.
    """
    if args.max_steps <= 0:
        raise ValueError("without train_dataset the length of training is not known: set max_steps")
    return Dataset.from_dict({"prompt": [""] * (args.generation_batch_size // args.num_generations)})


def given_log_z(rows: list[dict[str, Any]], default: float | None) -> Tensor:
    """`[B]` float64 log Z of rows whose Z is known: their column `log_z`, or `default`.

    Raises:
        ValueError: a row with neither, or one that is not finite.
    """
    values = [row.get("log_z", default) for row in rows]
    if any(value is None or not math.isfinite(value) for value in values):
        raise ValueError(_NEEDS_LOG_Z)
    return torch.tensor(values, dtype=torch.float64)


def log_z_checks(args: FDPGConfig, rows: Any) -> dict[str, Check]:
    """The check of the column `log_z`, where it has to give log Z of every prompt.

    Raises:
        ValueError: there is no such column.
    """
    if args.z_estimate != "given" or args.log_z is not None:
        return {}
    if "log_z" not in (getattr(rows, "column_names", None) or ("log_z",)):
        raise ValueError(_NEEDS_LOG_Z)
    return {"log_z": _log_z_fault}


def _log_z_fault(value: Any) -> str | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return None if number and math.isfinite(value) else f"is {shown(value)}, not a finite number"


def prompt_keys(batch: dict[str, Tensor]) -> Tensor:
    """`[B]` int64, equal for equal prompts on every process and in every run: a hash of the token ids."""
    rows = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["prompt_ids"].cpu(), batch["prompt_mask"].cpu(), strict=True)
    ]
    digests = [hashlib.sha256(json.dumps(row).encode()).digest() for row in rows]
    keys = [int.from_bytes(digest[:8], "big", signed=True) for digest in digests]
    return torch.tensor(keys, dtype=torch.int64, device=batch["prompt_ids"].device)
