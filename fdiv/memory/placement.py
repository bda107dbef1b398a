"""Where a run's tensors lie: what an accelerate configuration shards, offloads and narrows, as far as memory goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fdiv.errors import FdivError

__all__ = ["Placement", "read_placement"]

_SHARDED = {
    "single": frozenset(),
    "ddp": frozenset(),
    "zero1": frozenset({"optimizer"}),
    "zero2": frozenset({"optimizer", "gradients"}),
    "zero3": frozenset({"optimizer", "gradients", "weights"}),
    "fsdp": frozenset({"optimizer", "gradients", "weights"}),
}
_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}
# DeepSpeed's defaults, in elements: reduce_bucket_size and stage3_max_live_parameters.
_REDUCE_BUCKET, _LIVE_PARAMETERS = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Placement:
    """How a run is spread.

    Attributes:
        name: of the configuration, for the reader.
        strategy: `single`, `ddp`, `zero1`, `zero2`, `zero3` or `fsdp`.
        processes: how many share the work, one device each.
        precision: `no`, `bf16` or `fp16`.
        offloaded: parts held in host memory: `weights`, `gradients`, `optimizer`, `float32 copies`, `reference`.
    """

    name: str = "one process"
    strategy: str = "single"
    processes: int = 1
    precision: str = "no"
    offloaded: frozenset[str] = frozenset()

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed's engine holds the weights."""
        return self.strategy.startswith("zero")

    @property
    def fsdp(self) -> bool:
        """Whether PyTorch's FSDP does."""
        return self.strategy == "fsdp"

    @property
    def mixed(self) -> torch.dtype | None:
        """The 16-bit type of mixed precision, if there is any."""
        return _MIXED.get(self.precision)

    def share(self, size: int, part: str) -> int:
        """What one process holds of `size` bytes of `weights`, `gradients` or `optimizer`."""
        return math.ceil(size / self.processes) if part in _SHARDED[self.strategy] else size

    def buffers(self, trained: int, gradients: int, stored: int, layers: int) -> tuple[str, int]:
        """What communication holds besides, at most, and its name.

        Args:
            trained: elements that are trained. gradients, stored: bytes of gradients and weights, unsharded.
            layers: of the model.
        """
        if self.strategy == "ddp":
            return "communication: DDP's gradient buckets", gradients
        width = gradients // max(1, trained)
        if self.strategy == "zero3":
            return "communication: gathered weights, at most", min(stored, _LIVE_PARAMETERS * width)
        if self.strategy == "fsdp":
            return "communication: two gathered layers", 2 * stored // layers
        return "communication: the reduce bucket, at most", width * min(trained, _REDUCE_BUCKET)


def read_placement(args: Any, config: str | None = None, num_processes: int | None = None) -> Placement:
    """The placement of a run.

    Args:
        args: its training config; its `bf16` and `fp16` win over the configuration's precision, as in the run.
        config: an accelerate configuration by name or path (`fdiv run --accelerate`); None: one process.
        num_processes: instead of the configuration's.

    Raises:
        RecipeError: no such configuration, or one that cannot be used.
        FdivError: one whose memory is not modelled; the message says which setting.
    """
    from fdiv.memory.accelerate import process_count, read_accelerate_config

    content: Mapping[str, Any] = {} if config is None else read_accelerate_config(config)[1]
    for key in ("deepspeed", "fsdp"):
        if getattr(args, key, None):
            raise FdivError(f"`{key}` of the recipe is not modelled: choose a configuration with --accelerate")
    precision = "fp16" if args.fp16 else "bf16" if args.bf16 else str(content.get("mixed_precision", "no"))
    if precision not in ("no", *_MIXED):
        raise FdivError(f"mixed_precision {precision!r} is not modelled")
    strategy, offloaded = _strategy(content)
    processes = process_count(content, config, num_processes)
    return Placement(config or "one process", strategy, processes, precision, offloaded)


def _strategy(content: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
    kind = str(content.get("distributed_type", "NO"))
    if kind == "NO":
        return "single", frozenset()
    if kind in ("MULTI_GPU", "MULTI_CPU"):
        return "ddp", frozenset()
    if kind == "DEEPSPEED":
        return _deepspeed(content.get("deepspeed_config") or {})
    if kind == "FSDP":
        return _fsdp(content.get("fsdp_config") or {})
    raise FdivError(f"distributed_type {kind} is not modelled")


def _deepspeed(options: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
    if "deepspeed_config_file" in options:
        raise FdivError("a deepspeed_config_file of its own is not modelled")
    stated = str(options.get("zero_stage", 2))
    if stated not in ("1", "2", "3"):
        raise FdivError(f"zero_stage {stated} is not modelled")
    stage = int(stated)
    offloaded: set[str] = set()
    if options.get("offload_optimizer_device", "none") != "none":
        offloaded |= {"optimizer", "float32 copies"} | ({"gradients"} if stage > 1 else set())
    if stage == 3 and options.get("offload_param_device", "none") != "none":
        offloaded |= {"weights", "reference"}
    return f"zero{stage}", frozenset(offloaded)


def _fsdp(options: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
    reshard = str(options.get("fsdp_reshard_after_forward", options.get("fsdp_sharding_strategy", True)))
    if reshard.upper() not in ("TRUE", "FULL_SHARD", "1"):
        raise FdivError(f"FSDP with reshard_after_forward {reshard} is not modelled: full sharding is")
    offloads = bool(options.get("fsdp_offload_params", False))
    return "fsdp", frozenset({"weights", "gradients", "optimizer", "reference"} if offloads else ())
