"""Which share of a divergence the top k of a teacher holds, on a sample of rows, between it and the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdiv.distillation.f_distill.data import batch_tensors
from fdiv.distillation.teachers.base import Encoded
from fdiv.divergences import get_divergence
from fdiv.models.loading import load_model
from fdiv.models.vocabulary import (
    Head,
    TopK,
    last_hidden_states,
    model_head,
    top_tokens,
    topk_vocabulary_divergence,
    vocabulary_divergence,
)

if TYPE_CHECKING:
    from fdiv.distillation.teach.run import Plan

__all__ = ["measure_share", "share_table", "shares"]

_SHOWN = (1, 8, 64, 512)


@torch.no_grad()
def measure_share(plan: Plan, source: Any) -> dict[str, Any]:
    """The table for the student of the settings: sums over the tokens of `share_rows` rows, spread evenly.

    Returns:
        `rows`, `tokens`, and `table`: a list of `{divergence, full, share: {k: value}}`; `full` is the whole
        divergence per token, the share None where it is 0 or not finite.
    """
    config, taught = plan.config, plan.taught
    student = load_model(config.student)  # type: ignore[arg-type]
    count = min(config.share_rows, len(taught.rows))
    places = sorted({round(place * (len(taught.rows) - 1) / max(1, count - 1)) for place in range(count)})
    ks = sorted({k for k in _SHOWN if k < config.k} | {config.k})
    totals: dict[int, dict[str, float]] = {number: {} for number in range(len(config.divergences))}
    tokens = 0
    for start in range(0, len(places), config.batch_size):
        batch = places[start : start + config.batch_size]
        hidden_p = _hidden(student, [taught.students[place] for place in batch], plan)
        hidden_q = _hidden(source.model, [taught.rows[place] for place in batch], plan)
        head_p = model_head(student).cut(source.vocabulary)
        tokens += len(hidden_p)
        for number, spec in enumerate(config.divergences):
            for name, value in shares(hidden_p, head_p, hidden_q, source.head(), spec, ks, config.temperature).items():
                totals[number][name] = totals[number].get(name, 0.0) + value
    table = [
        {
            "divergence": spec,
            "full": totals[number]["full"] / tokens,
            "share": {str(k): _ratio(totals[number][str(k)], totals[number]["full"]) for k in ks},
        }
        for number, spec in enumerate(config.divergences)
    ]
    return {"rows": len(places), "tokens": tokens, "student": config.student, "table": table}


@torch.no_grad()
def shares(
    hidden_p: Tensor, head_p: Head, hidden_q: Tensor, head_q: Head, spec: Any, ks: Sequence[int], temperature: float
) -> dict[str, float]:
    """Sums over rows: `full`, and for every k the divergence over the teacher's top k and the rest."""
    options = {"bias_p": head_p.bias, "scale_p": head_p.scale, "softcap_p": head_p.softcap}
    others = {"bias_q": head_q.bias, "scale_q": head_q.scale, "softcap_q": head_q.softcap}
    full = vocabulary_divergence(
        hidden_p, head_p.weight, hidden_q, head_q.weight, spec, temperature=temperature, **options, **others
    )
    found = {"full": full.double().sum().item()}
    ids = torch.zeros(len(hidden_q), dtype=torch.long, device=hidden_q.device)
    for k in ks:
        top, _, _ = top_tokens(hidden_q, head_q, k, ids, temperature=temperature)
        part = topk_vocabulary_divergence(
            hidden_p, head_p.weight, TopK(*top), spec, temperature=temperature, **options
        )
        found[str(k)] = part.double().sum().item()
    return found


def share_table(share: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of the table, for the terminal."""
    ks = list(share["table"][0]["share"])
    rows = []
    for entry in share["table"]:
        values = (entry["share"][k] for k in ks)
        label = get_divergence(entry["divergence"]).label
        full = "–" if entry["full"] is None else f"{entry['full']:.4g}"  # JSON has no infinity
        rows.append([label, full, *("–" if value is None else f"{value:.3f}" for value in values)])
    title = f"share of the divergence that the top k holds ({share['tokens']} tokens)"
    return title, ["divergence", "all", *(f"k = {k}" for k in ks)], rows


def _ratio(part: float, full: float) -> float | None:
    return part / full if 0 < full < float("inf") else None


def _hidden(model: Any, rows: Sequence[Encoded], plan: Plan) -> Tensor:
    ids, mask, answers = (part.to(model.device) for part in batch_tensors(rows, plan.tokenizer.pad_token_id or 0))
    return last_hidden_states(model, ids, mask)[answers]
