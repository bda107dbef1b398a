"""What an erasure report says in words: the numbers in short, what was not measured, what they cannot prove."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fdiv.catalog import ATTACKS
from fdiv.eval.unlearning.measurement import AttackResult, Measured
from fdiv.eval.unlearning.sets import RowSets
from fdiv.terminal import number

__all__ = ["cannot_prove", "in_short", "not_measured"]


def in_short(before: Measured, after: Measured, retrained: Mapping[str, AttackResult]) -> list[str]:
    """The numbers as sentences, none of which says more than was measured."""
    count = len(after.rows)
    lines = []
    unknown = len(before.unknown)
    if unknown:
        lines.append(
            f"{unknown} of {count} rows did not look known to the model before: their numbers say nothing about "
            "unlearning."
        )
    start, end = before.values["forget_probability"], after.values["forget_probability"]
    strength = (before.values["extraction_strength"], after.values["extraction_strength"])
    lines.append(
        f"The answers to forget had a probability of {number(start)} per token and have {number(end)}; extraction "
        f"strength went from {number(strength[0])} to {number(strength[1])}."
    )
    sampled = [
        (old.get("leaked"), new["leaked"]) for old, new in zip(before.rows, after.rows, strict=True) if "leaked" in new
    ]
    if sampled:
        samples = max(
            int(name.partition("@")[2]) for name in after.values if name.startswith("leak@") and "_" not in name
        )
        old = sum(bool(one) for one, _ in sampled)
        new = sum(bool(one) for _, one in sampled)
        lines.append(
            f"Of {len(sampled)} rows, {new} gave their secret in at least one of {samples} sampled answers; before, "
            f"{old} did."
        )
    for name, what in (("neighbour_probability", "neighbouring rows"), ("general_probability", "general text")):
        if after.values.get(name) is not None and before.values.get(name) is not None:
            lines.append(
                f"Probability per token of {what}: {number(before.values[name])} → {number(after.values[name])}."
            )
    name = "forget_probability"
    found = [result for result in after.attacks if result.values.get(name) is not None]
    if found:
        worst = max(found, key=lambda result: result.values[name] - result.unattacked[name])
        beside = retrained.get(worst.name)
        other = "" if beside is None else f" (a retrained model: {number(beside.values[name])})"
        back = worst.values[name] > worst.unattacked[name]
        what = (
            "The attack that brought most back was" if back else "No attack made the answers likelier; the nearest was"
        )
        lines.append(
            f"{what} {worst.name}: from {number(worst.unattacked[name])} to {number(worst.values[name])} per "
            f"token{other}, on {worst.rows} rows."
        )
    return lines


def not_measured(sets: RowSets, after: Measured, settings: Mapping[str, Any], retrained: bool) -> list[str]:
    """What this evaluation left out, and why where there is a reason."""
    lines = [f"{name.replace('_', ' ')}: {reason}." for name, reason in sets.missing.items()]
    if not retrained:
        lines.append(
            "The same numbers of a model that never saw the rows: none was named (retrained). Without it no one can "
            "say which of the remaining probability is memory and which is guesswork."
        )
    if not any("leaked" in row for row in after.rows):
        lines.append("Sampled answers: none were made.")
    elif len([row for row in after.rows if "leaked" in row]) < len(after.rows):
        lines.append("Sampled answers of all rows: some rows were not sampled (leak_rows).")
    made = {result.name for result in after.attacks if result.reason is None}
    absent = [name for name in ATTACKS if name != "paraphrase" and not any(_is(name, one) for one in made)]
    if absent:
        lines.append(f"The attacks {', '.join(absent)}.")
    if settings.get("max_items") is not None:
        lines.append(f"All rows: {settings['max_items']} evenly spaced ones of each set were (max_items).")
    lines += [
        "Questions that reach the same facts by another way: by several steps, in reverse, in another language, in "
        "code.",
        "What the hidden states still hold (probes of activations), and further attacks on the weights.",
        "Skills beyond the general text: reasoning, following instructions, safety behaviour.",
        "Where else the rows are: training data, other checkpoints, caches, logs, models distilled from this one.",
    ]
    return lines


def _is(name: str, made: str) -> bool:
    return made == name or (made.startswith(f"{name}_") and made.removeprefix(f"{name}_").isdigit())


def cannot_prove() -> list[str]:
    """What holds for every such report."""
    return [
        "That the rows are gone. Each number says what one way of asking brought out; a stronger one may bring out "
        "more.",
        "That the model is as if it had never seen the rows. Only training without them gives that.",
        "Anything about an adapter's base: an adapter hides, and whoever takes it off has the model before. "
        "Pass on merged weights (--merge) where the base holds what must go.",
        "That a low probability is ignorance: far below chance it says that the answer is avoided, which can itself "
        "tell that there was something to avoid.",
        "Absence from a rate of 0: of n samples without a leak, the rate may still be up to about 3/n (95 %).",
        "That the law is complied with. What a request asks for is a question for those who answer for it.",
    ]
