"""Training a small model until it has memorised its rows: what there is to unlearn in the tasks built here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdiv.unlearning.data import EncodedAnswer

__all__ = ["learn_by_heart"]


def learn_by_heart(
    folder: Path,
    batches: Sequence[Sequence[EncodedAnswer]],
    learning_rate: float,
    betas: tuple[float, float] | None = None,
    bf16: bool = False,
) -> None:
    """Train the model in `folder`, one step per batch on the mean NLL of its answer tokens, and save it there.

    AdamW without weight decay; one cycle of the learning rate, a tenth of the steps for its rise. `betas` are AdamW's,
    held; with None the first goes through a cycle too, against the rate, and the second is 0.999. `bf16` computes in
    bfloat16 with float32 weights: twice as fast on a CPU that has it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from fdiv.models.logprobs import token_scores
    from fdiv.training.finite import refuse_broken
    from fdiv.unlearning.data import UnlearningCollator

    model = AutoModelForCausalLM.from_pretrained(folder)
    collator = UnlearningCollator(model.config.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, betas=betas or (0.9, 0.999))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=len(batches), pct_start=0.1, cycle_momentum=betas is None
    )
    for rows in batches:
        batch = collator([{"index": 0, "forget": row} for row in rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            scores = token_scores(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        loss = -scores.log_probs.sum() / scores.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    refuse_broken(model, "the model that was trained on the texts", "lower learning_rate")
    model.save_pretrained(folder)
