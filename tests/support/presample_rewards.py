"""Rewards of the pre-sampling tests: what a row's `kind` says."""

from __future__ import annotations


def by_kind(prompts, completions, completion_ids, kind, **_):
    """easy: 1; half: 1 where the first token is even; never: 0; unknown: no score."""
    assert all(isinstance(text, str) or text[0]["role"] == "assistant" for text in completions)
    return [
        {"easy": 1.0, "half": float(ids[0] % 2 == 0), "never": 0.0, "unknown": None}[name]
        for name, ids in zip(kind, completion_ids, strict=True)
    ]


def graded(prompts, completions, kind, **_):
    """A reward between 0 and 1."""
    return [{"easy": 0.75, "half": 0.5, "never": 0.25, "unknown": None}[name] for name in kind]


def broken(prompts, completions, kind, **_):
    """NaN."""
    return [float("nan")] * len(kind)


def by_first_token(prompts, completions, completion_ids, **_):
    """0, 1/4, 1/2 or 3/4, as the first token says."""
    return [ids[0] % 4 / 4 for ids in completion_ids]
