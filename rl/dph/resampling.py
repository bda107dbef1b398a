"""Dynamic sampling: groups whose rewards are all alike teach GRPO nothing, and are sampled again, within a bound.

With m more tries at most and q the chance that a group has no signal, the expected gradient of a prompt is that of one
try times (1 − q^{m+1})/(1 − q): tries without signal add nothing, and the first one with signal is distributed as any.
So prompts that the policy nearly always or hardly ever solves count more than in GRPO. DAPO (arXiv:2503.14476) takes
other prompts instead, until the batch is full; here the prompts of a step stay, and so do order and epochs.

Advantages under which such a group does add something (`pkpo`, `nsr`, any with a KL in the reward) are refused by
`DPHConfig`. A KL penalty in the loss is taken on the groups that stay, which are no fair sample of the policy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdiv.training.rollouts import token_mask

__all__ = ["has_signal", "merge_rows", "resample_groups"]

#: Tensors of TRL's batch with a row a completion that are padded on the left; the others are padded on the right.
_LEFT = ("prompt_ids", "prompt_mask")


def has_signal(rewards: Tensor, size: int) -> Tensor:
    """Which groups have two different rewards, `[N / size]` bool.

    Args:
        rewards: `[N]`, NaN where not scored.
        size: completions of a group.
    """
    groups = rewards.view(-1, size)
    scored = ~groups.isnan()
    low = groups.masked_fill(~scored, torch.inf).amin(-1)
    high = groups.masked_fill(~scored, -torch.inf).amax(-1)
    return (high > low) & scored.any(-1)


def merge_rows(batch: Mapping[str, Any], other: Mapping[str, Any], rows: Tensor, pad_token_id: int) -> dict[str, Any]:
    """`batch` with the rows `rows` `[R]` taken from `other`, which has R rows; padded to one width.

    Only tensors with a row a completion change; prompts keep their padding on the left.
    """
    count, merged = len(batch["completion_ids"]), dict(batch)
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != count or name not in other:
            continue
        new = other[name]
        if value.dim() > 1:
            width, fill = max(value.size(1), new.size(1)), pad_token_id if name.endswith("_ids") else 0
            value, new = (_padded(part, width, fill, left=name in _LEFT) for part in (value, new))
        value = value.clone()
        value[rows] = new.to(value.dtype)
        merged[name] = value
    return merged


def _padded(values: Tensor, width: int, fill: int, *, left: bool) -> Tensor:
    missing = width - values.size(1)
    return F.pad(values, (missing, 0) if left else (0, missing), value=fill)


def resample_groups(
    trainer: Any, inputs: list[Any], batch: dict[str, Any], generate: Callable[[list[Any]], dict[str, Any]]
) -> dict[str, Any]:
    """`batch` with the groups without signal sampled again, up to `resample_groups` times; call it on all processes.

    Rewards and what else is logged of a generation stay those of the first try, which alone is a fair sample of the
    policy; how many groups were sampled again is logged beside them.

    Args:
        trainer: the `DPHTrainer`, which has just sampled `batch`.
        inputs: the rows of `batch`, whole groups.
        batch: TRL's batch of this process.
        generate: inputs → batch, with the rewards of all processes in `trainer._rewards`.
    """
    size, rewards = trainer.num_generations, trainer.my_part(trainer._rewards, len(inputs)).clone()
    dull = ~has_signal(rewards, size)
    first, again = dull.float().mean(), 0
    for _ in range(trainer.args.resample_groups):
        # 1. All processes sample equally many groups, so that none waits for another; surplus ones are thrown away.
        wanted = dull.nonzero().flatten()
        most = int(trainer.accelerator.gather(torch.tensor([len(wanted)], device=rewards.device)).max())
        if most == 0:
            break
        groups = torch.cat([wanted, (~dull).nonzero().flatten()])[:most]
        rows = (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()
        with _unlogged(trainer):
            other = generate([inputs[row] for row in rows.tolist()])
        again += len(wanted)
        # 2. The groups that were wanted take their new completions, with or without signal.
        kept = rows[: len(wanted) * size]
        if len(kept):
            rewards[kept] = trainer.my_part(trainer._rewards, len(rows))[: len(kept)].to(rewards)
            part = {k: v[: len(kept)] if _is_rows(v, len(rows)) else v for k, v in other.items()}
            batch = merge_rows(batch, part, kept, trainer._tokenizer.pad_token_id)
        dull = ~has_signal(rewards, size)
    # 3. TRL's normaliser counts the tokens of the whole step, those that other processes sampled again too.
    if "num_items_in_batch" in batch:
        batch["num_items_in_batch"] = trainer.accelerator.gather(token_mask(batch).sum()).sum()
    shares = {"groups/without_signal": first, "groups/left_without_signal": dull.float().mean()}
    for name, value in shares.items():
        trainer._metrics["train"][name].append(trainer.accelerator.gather(value).mean().item())
    total = trainer.accelerator.gather(torch.tensor([float(again)], device=rewards.device)).sum().item()
    trainer._metrics["train"]["groups/sampled_again"].append(total)
    return batch


def _is_rows(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == count


@contextmanager
def _unlogged(trainer: Any) -> Iterator[None]:
    """Metrics and the table of completions stay those of before."""
    metrics, logs = copy.deepcopy(trainer._metrics["train"]), copy.deepcopy(trainer._logs)
    try:
        yield
    finally:
        trainer._metrics["train"], trainer._logs = metrics, logs
