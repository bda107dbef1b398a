"""Do the rehearsed prompts look like the explored ones? Rehearsal protects what it resembles, and little else.

Three comparisons: by kind, where the data name one; by length; and by how often the model solves the prompts that are
most like them. In the paper both sets come from one distribution; where the near-perfect prompts are simply the easy
kind, nothing holds the policy on the kinds that collapse (`results/dph_arithmetic`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["KIND_COLUMNS", "MOST_KINDS", "coverage", "coverage_warnings", "kinds_of"]

KIND_COLUMNS = ("kind", "level", "difficulty", "type", "subject")
"""Columns that are taken for the kind of a prompt when none is named."""
MOST_KINDS = 50
"""Different values of such a column; one with more is no kind."""

#: Neighbours of a prompt, and prompts that are compared at most (evenly spaced ones of more).
NEIGHBOURS, MOST_COMPARED = 5, 2000

#: From where on a difference is reported: shares of kinds, AUC of the length, solve rates of neighbours.
KINDS_APART, LENGTH_APART, SOLVED_APART = 0.5, 0.8, 0.4


def kinds_of(rows: Any, wanted: str | None) -> list[str] | None:
    """The kind of every row, as text: column `wanted`, else the first of `KIND_COLUMNS` that is there and has at most
    `MOST_KINDS` different values (a difficulty on a scale names no kinds). None without such a column.

    Args:
        rows: a `datasets.Dataset`. wanted: a column of it, however many values it has.
    """
    for name in [wanted] if wanted else [name for name in KIND_COLUMNS if name in rows.column_names]:
        found = [str(value) for value in rows[name]]
        if wanted or len(set(found)) <= MOST_KINDS:
            return found
    return None


def coverage(
    prompt_ids: Sequence[Sequence[int]],
    solve_rates: Sequence[float],
    rehearsed: Mapping[int, int],
    explored: Sequence[int],
    kinds: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """How rehearsed prompts compare with explored ones, JSON-ready.

    Args:
        prompt_ids: tokens of every prompt.
        solve_rates: share of correct samples of every prompt.
        rehearsed: rows in the cache by prompt.
        explored: the explore set.
        kinds: the kind of every prompt; None where the data name none.

    Returns:
        `kinds` (by kind: prompts, solve_rate, rehearsed, rows, explored), `kind_distance` (total variation between the
        kinds of the two sets, in [0, 1]), `length_auc` (chance that a rehearsed prompt is longer than an explored one,
        ½ where they are alike), `rehearsed_neighbours` and `explored_neighbours` (mean solve rate of the 5 prompts
        that share most tokens with one of the set, itself left out). What cannot be compared is None.
    """
    found: dict[str, Any] = {"kinds": None, "kind_distance": None}
    if kinds is not None:
        found |= _by_kind(kinds, solve_rates, rehearsed, explored)
    lengths = np.array([len(ids) for ids in prompt_ids], dtype=float)
    inside, outside = list(rehearsed), list(explored)
    found["length_auc"] = _auc(lengths[inside], lengths[outside]) if inside and outside else None
    rates = _neighbour_rates(prompt_ids, solve_rates)
    for name, chosen in (("rehearsed", inside), ("explored", outside)):
        values = [rates[index] for index in chosen if index in rates]
        found[f"{name}_neighbours"] = float(np.mean(values)) if values else None
    return found


def coverage_warnings(found: Mapping[str, Any]) -> list[str]:
    """One line for each way in which the rehearsed prompts look unlike the explored ones; none where they do not."""
    warnings = []
    left_out = [str(kind) for kind, row in (found["kinds"] or {}).items() if row["explored"] and not row["rows"]]
    if left_out:
        warnings.append(f"explored kinds without a rehearsed row: {', '.join(left_out[:8])}{_more(left_out, 8)}")
    elif (found["kind_distance"] or 0) > KINDS_APART:
        warnings.append(
            f"rehearsed and explored prompts are of other kinds (distance {found['kind_distance']:.2f} of 1)"
        )
    auc = found["length_auc"]
    if auc is not None and max(auc, 1 - auc) > LENGTH_APART:
        word = "longer" if auc > 0.5 else "shorter"
        warnings.append(f"rehearsed prompts are {word} than explored ones in {max(auc, 1 - auc):.0%} of all pairs")
    near, far = found["rehearsed_neighbours"], found["explored_neighbours"]
    if near is not None and far is not None and near - far > SOLVED_APART:
        warnings.append(
            f"prompts like the rehearsed ones are solved in {near:.0%} of the samples, those like the explored ones "
            f"in {far:.0%}: the rehearsed ones are a region of their own"
        )
    return warnings


def _more(names: Sequence[str], shown: int) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""


def _by_kind(
    kinds: Sequence[Hashable], rates: Sequence[float], rehearsed: Mapping[int, int], explored: Sequence[int]
) -> dict[str, Any]:
    table: dict[str, dict[str, Any]] = {}
    members: dict[str, list[int]] = defaultdict(list)
    for index, kind in enumerate(kinds):
        members[str(kind)].append(index)
    inside = set(explored)
    for kind in sorted(members):
        indices = members[kind]
        table[kind] = {
            "prompts": len(indices),
            "solve_rate": float(np.mean([rates[index] for index in indices])),
            "rehearsed": sum(index in rehearsed for index in indices),
            "rows": sum(rehearsed.get(index, 0) for index in indices),
            "explored": sum(index in inside for index in indices),
        }
    totals = [sum(row[name] for row in table.values()) for name in ("rehearsed", "explored")]
    distance = None
    if all(totals):
        gaps = (abs(row["rehearsed"] / totals[0] - row["explored"] / totals[1]) for row in table.values())
        distance = 0.5 * sum(gaps)
    return {"kinds": table, "kind_distance": distance}


def _auc(first: np.ndarray, second: np.ndarray) -> float:
    """P(a > b) + ½ P(a = b) for a of `first`, b of `second`."""
    ordered = np.sort(second)
    below = np.searchsorted(ordered, first, "left") + np.searchsorted(ordered, first, "right")
    return float(below.mean() / (2 * len(second)))


def _neighbour_rates(prompt_ids: Sequence[Sequence[int]], rates: Sequence[float]) -> dict[int, float]:
    """Mean solve rate of the prompts that share most tokens (cosine of token counts, rare tokens weighing more) with
    each; of at most `MOST_COMPARED` prompts."""
    count = len(prompt_ids)
    if count <= NEIGHBOURS:
        return {}
    chosen = np.unique(np.linspace(0, count - 1, min(count, MOST_COMPARED)).astype(int))
    documents = Counter(token for index in chosen for token in set(prompt_ids[index]))
    columns = {token: number for number, token in enumerate(documents)}
    vectors = np.zeros((len(chosen), len(columns)), dtype=np.float32)
    for row, index in enumerate(chosen):
        for token, times in Counter(prompt_ids[index]).items():
            vectors[row, columns[token]] = times * np.log((1 + len(chosen)) / documents[token])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -1.0)
    nearest = np.argsort(-likeness, axis=1, kind="stable")[:, :NEIGHBOURS]
    solved = np.asarray(rates, dtype=float)[chosen]
    return {int(index): float(solved[nearest[row]].mean()) for row, index in enumerate(chosen)}
