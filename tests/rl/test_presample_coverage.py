"""Pre-sampling that covers: several verified samples a prompt, of solved prompts too, weighed, and compared."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from datasets import Dataset

from fdiv.errors import DataError
from fdiv.rl.dph.rehearsal import RehearsalCache
from fdiv.rl.presample.coverage import MOST_KINDS, coverage, coverage_warnings, kinds_of
from fdiv.rl.presample.run import presample
from fdiv.rl.presample.selection import distinct_first, row_weights
from tests.support.runs.presample import KINDS, config, read_lines, write_rows


def first_token(completion):
    """A mode: the first word."""
    return completion.split()[:1] and completion.split()[0]


def parity(completion):
    """Two modes at most."""
    return len(completion) % 2


def unhashable(completion):
    return [completion]


def nameless(completion):
    """Equal to nothing, itself included."""
    return math.nan


# ---------------------------------------------------------------- pure functions
def test_distinct_modes_come_first():
    modes = ["a", "a", "b", "a", "c", "b"]
    assert distinct_first(modes, 1) == [0]
    assert distinct_first(modes, 3) == [0, 2, 4]
    assert distinct_first(modes, 4) == [0, 1, 2, 4]
    assert distinct_first(modes, 5) == [0, 1, 2, 4, 5]
    assert distinct_first(modes, 99) == [0, 1, 2, 3, 4, 5]
    assert distinct_first([], 3) == []


def test_weights_give_each_prompt_or_mode_the_same_total():
    rows = [(0, "a"), (0, "a"), (0, "b"), (1, "a"), (2, "c"), (2, "c")]
    assert row_weights(rows, "samples") == [1.0] * 6
    assert row_weights(rows, "prompts") == pytest.approx([6 / 9] * 3 + [2.0] + [1.0] * 2)
    assert row_weights(rows, "modes") == pytest.approx([0.75, 0.75, 1.5, 1.5, 0.75, 0.75])
    for name in ("prompts", "modes", "samples"):
        assert sum(row_weights(rows, name)) == pytest.approx(6.0)
    assert row_weights([], "modes") == []


def test_coverage_by_hand():
    """Kinds a (short, solved) and b (long, unsolved); the rehearsed prompts are those of a."""
    prompts = [[1, 2, 3 + i] for i in range(8)] + [[11, 12, 13, 14, 20 + i] for i in range(8)]
    rates = [1.0] * 8 + [0.25] * 8
    found = coverage(prompts, rates, dict.fromkeys(range(8), 2), range(8, 16), ["a"] * 8 + ["b"] * 8)
    assert found["kinds"]["a"] == {"prompts": 8, "solve_rate": 1.0, "rehearsed": 8, "rows": 16, "explored": 0}
    assert found["kinds"]["b"] == {"prompts": 8, "solve_rate": 0.25, "rehearsed": 0, "rows": 0, "explored": 8}
    assert found["kind_distance"] == 1.0 and found["length_auc"] == 0.0
    assert (found["rehearsed_neighbours"], found["explored_neighbours"]) == (1.0, 0.25)
    warnings = coverage_warnings(found)
    assert [line.split(":")[0] for line in warnings[:1]] == ["explored kinds without a rehearsed row"]
    assert "shorter than explored ones in 100%" in warnings[1] and "in 100% of the samples" in warnings[2]
    # Rehearsed ones spread over both kinds: nothing to warn of.
    spread = coverage(prompts, rates, dict.fromkeys(range(0, 16, 2), 1), range(1, 16, 2), ["a"] * 8 + ["b"] * 8)
    assert spread["kind_distance"] == 0.0 and spread["length_auc"] == 0.5 and coverage_warnings(spread) == []


def test_coverage_without_kinds_or_sets():
    found = coverage([[1], [2]], [0.5, 0.5], {}, [0, 1])
    assert found == {
        "kinds": None, "kind_distance": None, "length_auc": None, "rehearsed_neighbours": None,
        "explored_neighbours": None,
    }  # fmt: skip
    assert coverage_warnings(found) == []


def test_which_column_names_the_kind():
    """Of several the first with few values; the one that is asked for always."""
    many = [{"level": i, "subject": "ab"[i % 2], "type": None if i else "x"} for i in range(MOST_KINDS + 1)]
    rows = Dataset.from_list(many)
    assert kinds_of(rows, None) == ["x", *["None"] * MOST_KINDS]
    assert kinds_of(rows.remove_columns("type"), None) == ["ab"[i % 2] for i in range(MOST_KINDS + 1)]
    assert kinds_of(rows, "level") == [str(i) for i in range(MOST_KINDS + 1)]
    assert kinds_of(rows.select(range(MOST_KINDS)), None) == [str(i) for i in range(MOST_KINDS)]
    assert kinds_of(rows.select_columns("level"), None) is None


# ---------------------------------------------------------------- the pass
@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def solved(tiny_model_dir, rows, tmp_path_factory):
    """Up to three verified samples of every solved prompt, distinct first words first, prompts weighing the same."""
    output = tmp_path_factory.mktemp("solved") / "out"
    more = {"keep": "solved", "samples_per_prompt": 3, "mode": f"{__name__}:first_token", "weights": "prompts"}
    return presample(config(tiny_model_dir, rows, threshold=1, **more), output), output


def test_verified_samples_of_every_solved_prompt(solved):
    content, output = solved
    samples = read_lines(output / "samples.jsonl")
    correct = {index: [s for s in samples if s["task_id"] == index and s["correct"]] for index in range(len(KINDS))}
    cache = RehearsalCache.load(output / "rehearsal.safetensors")
    expected = []
    for index, found in correct.items():
        chosen = distinct_first([first_token(s["completion"]) for s in found], 3)
        expected += [(index, found[position]["completion_ids"]) for position in chosen]
    assert [(row.index, row.completion_ids) for row in cache] == expected
    per_prompt = Counter(row.index for row in cache)
    assert max(per_prompt.values()) == 3 and all(
        index in per_prompt for index, kind in enumerate(KINDS) if kind == "easy"
    )
    for row in cache:
        assert row.weight == pytest.approx(len(cache) / (len(per_prompt) * per_prompt[row.index]))
    assert read_lines(output / "verification.jsonl") == []
    # Near-perfect ones (all four right) are not explored; the solved ones between are in both sets.
    near = [i for i, part in enumerate(content["prompts"]["part"]) if part == "near_perfect"]
    assert content["counts"]["explore"] == len(KINDS) - len(near)
    assert content["counts"]["rehearsed_and_explored"] == len(per_prompt) - len(near) > 0
    assert content["rehearsal_rows"] == len(cache) and content["counts"]["rehearsal"] == len(per_prompt)


def test_the_choice_is_made_again_without_sampling(solved, tiny_model_dir, rows, tmp_path, monkeypatch):
    _, output = solved
    monkeypatch.setattr("fdiv.inference.sampling._InverseCDF", None)  # any draw now fails
    more = {"keep": "solved", "samples_per_prompt": 4, "mode": f"{__name__}:parity", "weights": "modes"}
    content = presample(config(tiny_model_dir, rows, threshold="one", **more), output, repartition=True)
    cache = RehearsalCache.load(output / "rehearsal.safetensors")
    assert len(cache) == content["samples"]["correct"] == content["rehearsal_rows"]
    assert content["threshold"] == "1/4" and content["counts"]["rehearsed_and_explored"] == 0
    with pytest.raises(DataError, match="keep='solved', now it is 'near_perfect'.*--repartition"):
        presample(config(tiny_model_dir, rows, threshold="one"), output)
    # A choice that fails leaves the one before it as it was.
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    for name, fault in (("unhashable", "returned a list for sample 0/0"), ("nameless", "returned nan for sample 0/0")):
        with pytest.raises(DataError, match=fault):
            presample(
                config(tiny_model_dir, rows, threshold="one", **more | {"mode": f"{__name__}:{name}"}),
                output,
                repartition=True,
            )
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == before
    assert presample(config(tiny_model_dir, rows, threshold="one", **more), output)["counts"] == content["counts"]


def test_keep_all_tries_more_for_prompts_without_a_right_sample(tiny_model_dir, rows, tmp_path):
    more = {"keep": "all", "tries": 2, "wrong": "drop", "threshold": 1}
    content = presample(config(tiny_model_dir, rows, **more), tmp_path / "out")
    drawn = read_lines(tmp_path / "out" / "verification.jsonl")
    without = [index for index, count in enumerate(content["prompts"]["correct"]) if count == 0]
    assert sorted({sample["task_id"] for sample in drawn}) == without and 2 in without
    found = {sample["task_id"] for sample in drawn if sample["correct"]}
    assert content["without_verified_sample"] == [index for index in without if index not in found]
    dropped = [i for i in content["without_verified_sample"] if content["prompts"]["part"][i] == "wrong"]
    assert content["counts"]["dropped"] == len(dropped)


def test_kinds_are_shown(solved, capsys):
    from fdiv.rl.presample.command import show_partition

    content, _ = solved
    kinds = content["coverage"]["kinds"]
    assert {kind: row["prompts"] for kind, row in kinds.items()} == dict(Counter(KINDS))
    assert kinds["never"]["rows"] == 0 and kinds["easy"]["solve_rate"] == 1.0
    show_partition(content)
    shown = capsys.readouterr().out
    assert "by kind" in shown and "warning: explored kinds without a rehearsed row: never, unknown" in shown


def test_what_is_refused(tiny_model_dir, rows, tmp_path):
    with pytest.raises(ValueError, match="samples_per_prompt=5 is more than num_samples=4"):
        config(tiny_model_dir, rows, samples_per_prompt=5)
    with pytest.raises(ValueError, match="unknown mode 'anwer'; did you mean 'answer'"):
        config(tiny_model_dir, rows, mode="anwer")
    with pytest.raises(DataError, match=r"no column 'sort' \(kind\); it has: prompt, kind, day"):
        presample(config(tiny_model_dir, rows, kind="sort"), tmp_path / "a")
    with pytest.raises(DataError, match=r"unhashable returned a list for sample 0/0"):
        presample(config(tiny_model_dir, rows, samples_per_prompt=2, mode=f"{__name__}:unhashable"), tmp_path / "b")
    never = write_rows(tmp_path / "never.jsonl", ["never", "never"])
    with pytest.raises(DataError, match="none of 2 prompts has a correct sample among 4"):
        presample(config(tiny_model_dir, never, keep="solved"), tmp_path / "c")


def test_a_cache_without_weights_counts_its_rows_alike(solved, tmp_path):
    """As release 0.2 wrote it."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = solved[1] / "rehearsal.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "weight"}
        metadata = {name: value for name, value in file.metadata().items() if name != "digest"}
    assert json.loads(metadata["fdiv_rehearsal"])
    save_file(tensors, tmp_path / "old.safetensors", metadata=metadata)
    assert {row.weight for row in RehearsalCache.load(tmp_path / "old.safetensors")} == {1.0}
