"""Pre-sampling: counts, verification, log-probabilities, files, refusals, the command and the recipe block."""

from __future__ import annotations

import json
from collections import Counter

import datasets
import pytest
import torch

from fdiv.cli.command import main
from fdiv.errors import DataError
from fdiv.rl.dph.rehearsal import RehearsalCache
from fdiv.rl.presample.run import presample
from tests.support.runs.presample import KINDS, REWARD, config, read_lines, settings, write_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def finished(tiny_model_dir, rows, tmp_path_factory):
    """One run at temperature 0.8, log-probabilities at 1.3, threshold 1/4 of 4 samples, three tries to verify."""
    output = tmp_path_factory.mktemp("finished") / "out"
    more = {"temperature": 0.8, "training_temperature": 1.3, "tries": 3}
    return presample(config(tiny_model_dir, rows, **more), output), output


def even(sample) -> bool:
    return sample["completion_ids"][0] % 2 == 0


def test_partition_follows_the_counts(finished):
    content, output = finished
    samples = read_lines(output / "samples.jsonl")
    assert [(s["task_id"], s["sample"]) for s in samples] == [(i, k) for i in range(10) for k in range(4)]
    assert all(1 <= len(s["completion_ids"]) <= 5 for s in samples)
    correct = Counter(
        s["task_id"] for s in samples if KINDS[s["task_id"]] == "easy" or (KINDS[s["task_id"]] == "half" and even(s))
    )
    scored = [0 if kind == "unknown" else 4 for kind in KINDS]
    parts = ["near_perfect" if correct[i] >= 1 else "wrong" if scored[i] else "explore" for i in range(10)]
    assert content["prompts"] == {"correct": [correct[i] for i in range(10)], "scored": scored, "part": parts}
    assert content["prompts"]["part"][2:4] == ["wrong", "explore"]
    assert content["samples"]["drawn"] == 40 and content["samples"]["unscored"] == 4
    assert content["samples"]["correct"] == correct.total()
    assert content["prompts_by_correct"] == [[correct[i] for i in range(10)].count(n) for n in range(5)]
    assert json.loads((output / "partition.json").read_text())["counts"] == content["counts"]


def test_one_more_sample_is_kept_only_when_it_is_correct(finished):
    content, output = finished
    near_perfect = [i for i, part in enumerate(content["prompts"]["part"]) if part == "near_perfect"]
    drawn: dict[int, list] = {index: [] for index in near_perfect}
    for sample in read_lines(output / "verification.jsonl"):
        drawn[sample["task_id"]].append(sample)
    kept = []
    for index, samples in drawn.items():
        assert [sample["sample"] for sample in samples] == list(range(4, 4 + len(samples)))  # draws of their own
        right = [KINDS[index] == "easy" or even(sample) for sample in samples]
        assert right == [sample["correct"] for sample in samples]
        assert not any(right[:-1]) and (right[-1] or len(right) == 3)  # stops at the first correct one
        kept += [index] if right[-1] else []
    assert max(map(len, drawn.values())) > 1  # there was something to try again
    cache = RehearsalCache.load(output / "rehearsal.safetensors")
    assert [row.index for row in cache] == kept
    for row in cache:
        assert row.completion_ids == drawn[row.index][-1]["completion_ids"]
    assert content["counts"]["rehearsal"] == len(kept)
    assert content["counts"]["explore"] == 10 - len(kept)


def test_one_try_moves_prompts_to_explore(tiny_model_dir, rows, finished, tmp_path):
    """With the same seed, the first of the three tries is the only one."""
    _, output = finished
    content = presample(config(tiny_model_dir, rows, temperature=0.8, wrong="drop"), tmp_path / "out")
    first = [sample for sample in read_lines(output / "verification.jsonl") if sample["sample"] == 4]
    assert read_lines(tmp_path / "out" / "verification.jsonl") == first
    kept = [sample["task_id"] for sample in first if sample["correct"]]
    counts = content["counts"]
    assert 0 < counts["moved_to_explore"] == counts["near_perfect"] - len(kept)
    explore = datasets.load_dataset("parquet", data_files=str(tmp_path / "out" / "explore.parquet"), split="train")
    dropped = [i for i, part in enumerate(content["prompts"]["part"]) if part == "wrong"]
    expected = [index for index in range(10) if index not in kept and index not in dropped]
    assert 2 in dropped and counts["dropped"] == len(dropped) and 3 in expected
    original = datasets.load_dataset("json", data_files=str(rows), split="train")
    assert explore.features == original.features  # the dates too
    assert explore.to_list() == original.select(expected).to_list()


def test_log_probabilities_are_those_of_a_direct_forward_at_the_training_temperature(finished, tiny_model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, output = finished
    cache = RehearsalCache.load(output / "rehearsal.safetensors")
    model, tokenizer = (c.from_pretrained(tiny_model_dir) for c in (AutoModelForCausalLM, AutoTokenizer))
    model = model.double()
    for row in cache:
        assert row.prompt_ids == tokenizer(row.prompt)["input_ids"]
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(row.prompt_ids) - 1 : -1]
        expected = torch.log_softmax(logits / 1.3, -1)[range(len(row.completion_ids)), row.completion_ids]
        assert torch.allclose(torch.tensor(row.reference_log_probs).double(), expected, rtol=0, atol=1e-5)
    cache.check(tokenizer=tokenizer, model=model, temperature=1.3)
    with pytest.raises(DataError, match="temperature 1.3"):
        cache.check(temperature=0.8)


def test_a_draw_depends_on_prompt_and_sample_alone(finished, tiny_model_dir):
    """Sample 2 of prompt 8, computed by hand: nucleus of 0.95, inverse of its cumulative distribution."""
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, output = finished
    drawn = next(s for s in read_lines(output / "samples.jsonl") if (s["task_id"], s["sample"]) == (8, 2))
    model, tokenizer = (c.from_pretrained(tiny_model_dir) for c in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer("What is " + "1 + " * 8 + "1?")["input_ids"]
    expected = []
    for uniform in np.random.default_rng((0, 8, 2)).random(5):
        with torch.no_grad():
            probs = torch.softmax(model(torch.tensor([ids + expected])).logits[0, -1].double() / 0.8, -1)
        ordered, order = probs.sort(descending=True)
        inside = order[(ordered.cumsum(-1) - ordered) < 0.95]
        probs = torch.zeros_like(probs).scatter(0, inside, probs[inside])
        token = int((probs.cumsum(-1) / probs.sum() > uniform).nonzero()[0])
        expected.append(token)
        if token == tokenizer.eos_token_id:
            break
    assert drawn["completion_ids"] == expected
    assert drawn["truncated"] == (expected[-1] != tokenizer.eos_token_id)
    assert drawn["completion"] == tokenizer.decode(expected, skip_special_tokens=True)


# ---------------------------------------------------------------- going on, and refusals
def test_a_finished_directory_is_found_and_split_again_only_when_told(finished, tiny_model_dir, rows, tmp_path):
    content, output = finished
    same = {"temperature": 0.8, "training_temperature": 1.3, "tries": 3}
    before = (output / "samples.jsonl").read_bytes()
    found = presample(config(tiny_model_dir, rows, **same), output)
    assert found["counts"] == content["counts"]
    other = config(tiny_model_dir, rows, **same | {"threshold": 1.0})
    with pytest.raises(DataError, match="threshold='1/4', now it is '1': .*--repartition"):
        presample(other, output)
    for changed, message in (
        ({"temperature": 0.9}, "temperature=0.8, now it is 0.9"),
        ({"seed": 1}, "seed=0, now it is 1"),
        ({"reward": "tests.support.presample_rewards:graded"}, "reward='tests.support.presample_rewards:by_kind'"),
    ):
        with pytest.raises(DataError, match=message):
            presample(config(tiny_model_dir, rows, **same | changed), output)
    with pytest.raises(DataError, match=r"holds no pre-sampling whose samples could be split again: leave --rep"):
        presample(other, tmp_path / "written-wrong", repartition=True)  # and is not sampled into
    changed_rows = write_rows(tmp_path / "rows.jsonl", [*KINDS[:-1], "easy"])
    with pytest.raises(DataError, match="dataset="):
        presample(config(tiny_model_dir, changed_rows, **same), output)
    assert (output / "samples.jsonl").read_bytes() == before


def test_splitting_again_is_the_same_as_having_split_so_at_first(tiny_model_dir, rows, tmp_path):
    """At the higher reward threshold some prompts keep a later verification sample than at the lower one."""
    caches = {}
    for name, thresholds in (("twice", (0.25, 0.5)), ("once", (0.5,))):
        for threshold in thresholds:
            more = {"reward_threshold": threshold, "tries": 4, "allow_empty": True}
            more["reward"] = "tests.support.presample_rewards:by_first_token"
            again = threshold != thresholds[0]
            presample(config(tiny_model_dir, rows, **more), tmp_path / name, repartition=again)
            caches[name, threshold] = RehearsalCache.load(tmp_path / name / "rehearsal.safetensors").rows
    assert caches["twice", 0.5] == caches["once", 0.5]
    low, high = ({row.index: row for row in caches["twice", threshold]} for threshold in (0.25, 0.5))
    assert any(low[index].completion_ids != high[index].completion_ids for index in low.keys() & high.keys())


def test_nothing_near_perfect_is_an_error_and_its_samples_are_used_again(tiny_model_dir, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", ["half", "never"])
    output = tmp_path / "out"
    with pytest.raises(
        DataError, match=r"no near-perfect prompts: none of 2 .* share of 1 .* the best has [0-3] of 4"
    ):
        presample(config(tiny_model_dir, rows, threshold=1), output)
    monkeypatch.setattr("fdiv.inference.sampling._InverseCDF", None)  # any draw now fails
    content = presample(config(tiny_model_dir, rows, threshold=1, allow_empty=True), output)
    assert content["counts"] == {
        "prompts": 2, "near_perfect": 0, "rehearsal": 0, "rehearsed_and_explored": 0, "moved_to_explore": 0,
        "to_explore": 1, "wrong": 1, "dropped": 0, "explore": 2,
    }  # fmt: skip
    assert len(RehearsalCache.load(output / "rehearsal.safetensors")) == 0


def test_nothing_left_to_explore_is_an_error(tiny_model_dir, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ["easy"])
    with pytest.raises(DataError, match="no prompt is left to explore: 1 are rehearsed, 0 wrong ones dropped"):
        presample(config(tiny_model_dir, rows), tmp_path / "out")


def test_rewards_that_are_not_zero_or_one(tiny_model_dir, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ["easy", "half", "never", "unknown"])
    graded = {"reward": "tests.support.presample_rewards:graded"}
    with pytest.raises(DataError, match=r"the reward of sample 0/0 is 0.75, not 0 or 1: give reward_threshold"):
        presample(config(tiny_model_dir, rows, **graded), tmp_path / "out")
    content = presample(config(tiny_model_dir, rows, **graded, reward_threshold=0.6), tmp_path / "out")
    assert content["prompts"]["part"] == ["near_perfect", "wrong", "wrong", "explore"]
    with pytest.raises(DataError, match="is nan: a number is due"):
        presample(config(tiny_model_dir, rows, reward="tests.support.presample_rewards:broken"), tmp_path / "nan")


def test_conversational_prompts_go_through_the_chat_template(tiny_model_dir, tmp_path):
    from transformers import AutoTokenizer

    data = tmp_path / "rows.jsonl"
    turns = [[{"role": "user", "content": text}] for text in ("One?", "And two?")]
    data.write_text(
        "".join(json.dumps({"prompt": t, "kind": k}) + "\n" for t, k in zip(turns, ["easy", "never"], strict=True))
    )
    presample(config(tiny_model_dir, data), tmp_path / "out")
    (row,) = RehearsalCache.load(tmp_path / "out" / "rehearsal.safetensors")
    assert row.prompt == turns[0] and row.index == 0
    text = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert row.prompt_ids == tokenizer(text)["input_ids"]


# ---------------------------------------------------------------- the command
def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["presample", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def flags(given: dict) -> list[str]:
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_dry_run_prints_the_settings_and_writes_nothing(tiny_model_dir, rows, tmp_path, capsys):
    words = [*flags(settings(tiny_model_dir, rows)), "--output", str(tmp_path / "out"), "--dry_run"]
    code, out, _ = run(capsys, *words)
    assert code == 0 and "threshold: 1/4" in out and "top_p: 0.95" in out and "# 10 prompts, 40 samples" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": "9/8"}, "threshold=9/8: a share of correct samples lies above 0"),
        ({"num_samples": 0}, "num_samples=0: must be at least 1"),
        ({"mode": "anwer"}, "fdiv: unknown mode 'anwer'; did you mean 'answer'"),
        ({"samples_per_prompt": 5}, "fdiv: --samples_per_prompt=5 is more than num_samples=4"),
        ({"backend": "server"}, "server_url belongs to backend: server"),
        ({"reward": "nonsense"}, "unknown reward 'nonsense'"),
        ({"dataset": "absent.jsonl"}, "no such file or directory: absent.jsonl"),
        ({"split": "validation"}, "has no split 'validation'; it has: train"),
        ({"model": "/absent/model"}, "/absent/model"),
    ],
)
def test_mistakes_are_one_line(tiny_model_dir, rows, tmp_path, capsys, changes, message):
    words = [*flags(settings(tiny_model_dir, rows) | changes), "--output", str(tmp_path / "out")]
    code, _, err = run(capsys, *words)
    lines = [line for line in err.splitlines() if "fdiv: " in line]
    assert code in (1, 2) and len(lines) == 1 and message in lines[0]


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["presample", "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    for name in ("--threshold", "--wrong {explore,drop}", "--tries", "--repartition", "--dry_run", "--server_url"):
        assert name in out


# ---------------------------------------------------------------- the recipe block
def test_one_recipe_prepares_rehearsal_and_trains(tiny_model_dir, tmp_path):
    from fdiv.recipe.load import load_recipe
    from fdiv.run.run import plan_run, prepare, run_plan

    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl")
    write_rows(data / "test.jsonl", ["easy", "never"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
method: dph
divergence: forward_kl
rehearsal_batch_size: 2
prepare: {{name: rehearsal, model: {tiny_model_dir}, dataset: {data}, reward: "{REWARD}", num_samples: 4,
  max_completion_length: 5, threshold: 1/4, temperature: 0.9, mode: text, reward_threshold: 0.5}}
max_steps: 1
per_device_train_batch_size: 4
num_generations: 2
max_completion_length: 5
report_to: none
save_strategy: "no"
output_dir: {tmp_path / "run"}
"""
    )
    plan = prepare(plan_run(load_recipe(recipe)), tmp_path / "run" / "prepared")
    result = run_plan(plan)
    assert plan.settled["temperature"] == 0.9 and plan.settled["reward"] == REWARD
    # What the cache calls another answer, and a right one, the training does too.
    assert plan.settled["mode"] == "text" and plan.settled["reward_threshold"] == 0.5
    cache = RehearsalCache.load(plan.settled["rehearsal_cache"])
    splits = datasets.load_dataset(plan.settled["dataset_name"])
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 10 - len(cache), "test": 2}
    assert result["steps"] == 1
    # The policy is the reference before its first step: the divergence on the cached rows is 0.
    assert abs(result["train/rehearsal/loss"]) < 1e-6


def test_the_block_checks_its_task(tiny_model_dir):
    from fdiv.errors import RecipeError
    from fdiv.recipes.tasks.rehearsal import RehearsalConfig

    for values, message in (
        ({"reward": REWARD}, "prepare.model is missing: give it, or a `task`"),
        ({"task": {"seed": 1}}, "prepare.task needs a `name`"),
        ({"task": {"name": "tiny_text"}}, "did you mean 'tiny_texts'"),
        ({"task": {"name": "tiny_texts", "sead": 1}}, "unknown key 'sead' in `prepare.task`; did you mean"),
        ({"task": {"name": "tiny_texts", "steps": "many"}}, "'steps' must be a whole number, got 'many'"),
        ({"task": {"name": "rehearsal"}}, "cannot be 'rehearsal' itself"),
        ({"task": {"name": "tiny_texts"}, "threshold": 2}, "threshold=2"),
    ):
        with pytest.raises((ValueError, RecipeError), match=message):
            RehearsalConfig(**values)


def test_a_task_gives_model_and_data(tmp_path, monkeypatch):
    from fdiv.recipes.tasks.rehearsal import RehearsalConfig

    block = RehearsalConfig(
        task={"name": "empty_prompts"}, model="m", reward="r", num_samples=3, threshold="1/2", training_temperature=0.6
    )
    seen = []

    def pretend(settings, folder):
        folder.mkdir()
        (folder / "explore.parquet").write_bytes(b"rows")
        seen.append(settings)

    monkeypatch.setattr("fdiv.rl.presample.run.presample", pretend)
    keys = block.build(tmp_path)
    (given,) = seen
    assert given.dataset == str(tmp_path / "task" / "data") and given.model == "m" and given.num_samples == 3
    assert keys == {
        "model_name_or_path": "m",
        "dataset_name": str(tmp_path / "data"),
        "dataset_train_split": "train",
        "dataset_test_split": "test",
        "rehearsal_cache": str(tmp_path / "rehearsal" / "rehearsal.safetensors"),
        "temperature": 0.6,
        "reward": "r",
    }
    assert (tmp_path / "data" / "train.parquet").read_bytes() == b"rows"
    with pytest.raises(ValueError, match="sets no model_name_or_path: give prepare.model"):
        RehearsalConfig(task={"name": "empty_prompts"}, reward="r").build(tmp_path / "again")


def test_blocks_that_name_the_same_task_share_its_build(tmp_path, monkeypatch):
    """Another threshold builds no second base model; another task does; a relative dataset is one of the task's."""
    from fdiv.recipes.tasks.rehearsal import RehearsalConfig

    seen = []

    def pretend(settings, folder):
        folder.mkdir()
        (folder / "explore.parquet").write_bytes(b"rows")
        seen.append(settings)

    monkeypatch.setattr("fdiv.rl.presample.run.presample", pretend)
    task = {"name": "empty_prompts"}
    for name, more in (("one", {"threshold": "1/2"}), ("two", {"threshold": "3/4"}), ("three", {"dataset": "data"})):
        (tmp_path / name).mkdir()
        RehearsalConfig(task=task, model="m", reward="r", num_samples=4, **more).build(tmp_path / name)
    (build,) = tmp_path.glob("empty_prompts-*")
    assert {(tmp_path / name / "task").resolve() for name in ("one", "two", "three")} == {build}
    assert seen[2].dataset == str(tmp_path / "three" / "task" / "data")
