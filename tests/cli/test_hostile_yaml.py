"""Recipes that no person writes: each is refused in one line, within the time a person waits for an answer."""

import os
import time

import pytest

from fdiv.errors import RecipeError
from fdiv.recipe.load import find_recipe, load_recipe
from fdiv.recipe.yaml_text import load_yaml

HEAD = "method: f_dpo\n"


def bomb(levels, width, block):
    """Nine values that stand for `width ** levels`."""
    start = "a0: &a0 [x]\n" if not block else "a0: &a0 {k: x}\n"
    lines = []
    for level in range(levels):
        names = [f"*a{level}"] * width
        value = (
            f"[{', '.join(names)}]" if not block else "{" + ", ".join(f"k{i}: {n}" for i, n in enumerate(names)) + "}"
        )
        lines.append(f"a{level + 1}: &a{level + 1} {value}\n")
    return HEAD + start + "".join(lines)


def merge_bomb(levels):
    lines = [
        f"a{level + 1}: &a{level + 1}\n  <<: [{', '.join([f'*a{level}'] * 9)}]\n  k{level}: 1\n"
        for level in range(levels)
    ]
    return HEAD + "a0: &a0 {k: 1}\n" + "".join(lines)


HOSTILE = {
    "sequence bomb": bomb(9, 9, block=False),
    "mapping bomb": bomb(9, 9, block=True),
    "bomb under a key": HEAD + "env:\n  " + bomb(9, 9, block=True).replace(HEAD, "").replace("\n", "\n  "),
    "merge bomb": merge_bomb(9),
    "self-reference": HEAD + "env: &x {a: *x}\n",
    "self-reference in a list": HEAD + "report_to: &x [a, *x]\n",
    "mutual reference": HEAD + "a: &a [ &b [*a, *b] ]\n",
    "the document inside itself": "&top\nmethod: f_dpo\nenv: *top\n",
    "flow nesting": HEAD + "env: " + "[" * 2_000 + "]" * 2_000,
    "flow nesting, huge": HEAD + "env: " + "[" * 90_000,
    "mapping nesting": HEAD + "env: " + "{a: " * 2_000 + "}" * 2_000,
    "block nesting": HEAD + "env:\n" + "".join(f"{' ' * n}a:\n" for n in range(1, 200)),
    "dashes": HEAD + "report_to:\n " + "- " * 5_000 + "x\n",
    "just too deep": HEAD + "env: " + "[" * 61 + "]" * 61,
    "deep through aliases": HEAD + "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}]\n" for n in range(300)),
    "NUL": HEAD + "run_name: a\0b\n",
    "bell": HEAD + "run_name: a\ab\n",
    "escape": HEAD + "run_name: \x1b[31mred\n",
    "delete": HEAD + "run_name: a\x7fb\n",
    "written NUL": HEAD + 'output_dir: "a\\0b"\n',
    "surrogate": HEAD + 'output_dir: "a\\ud800b"\n',
    "python tag": HEAD + "env: !!python/object/apply:os.system [id]\n",
    "own tag": HEAD + "env: !run {a: 1}\n",
    "int tag": HEAD + "seed: !!int 'x'\n",
    "float tag": HEAD + "seed: !!float x\n",
    "bool tag": HEAD + "bf16: !!bool maybe\n",
    "timestamp tag": HEAD + "seed: !!timestamp x\n",
    "set": HEAD + "env: !!set {a, b}\n",
    "omap": HEAD + "env: !!omap [a: 1]\n",
    "binary": HEAD + "run_name: !!binary x\n",
    "map tag on a list": HEAD + "env: !!map [1]\n",
    "sequence as a key": HEAD + "? [a]\n: 1\n",
    "mapping as a key": HEAD + "{a: 1}: 2\n",
    "merge of a number": HEAD + "<<: 5\n",
    "unknown alias": HEAD + "env: *nothing\n",
    "two documents": HEAD + "---\n" + HEAD,
    "unclosed": HEAD + "env: [1, 2\n",
    "unclosed quote": HEAD + 'run_name: "abc\n',
    "tabs": HEAD + "env:\n\ta: 1\n",
    "directive": "%YAML 9.9\n---\nmethod: f_dpo\n",
    "a number of 5,000 digits": HEAD + f"seed: {'9' * 5_000}\n",
    "a number of 80,000 digits": HEAD + f"seed: {'9' * 80_000}\n",
    "many keys": HEAD + "env: {" + ", ".join(f"a{n}: 1" for n in range(9_000)) + "}\n" * 2 + "x: 1",
    "too long": HEAD + "# " + "x" * 200_000,
    "far too long": HEAD + "# " + "x" * 2_000_000,
    "a list": "- method: f_dpo\n",
    "a word": "f_dpo\n",
    "nothing": "",
    "a comment": "# nothing\n",
    "null": "null\n",
    "duplicate": HEAD + "seed: 1\nseed: 2\n",
    "duplicate below": HEAD + "eval: {name: a, name: b}\n",
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_yaml_is_one_line_at_once(name, tmp_path, fails):
    path = tmp_path / "hostile.yaml"
    path.write_text(HOSTILE[name], encoding="utf-8")
    began = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert time.process_time() - began < 5, "a second, and what a busy processor adds"
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    line = fails("run", path)
    assert "hostile.yaml" in line and len(line) <= 1_010


KEYS = {
    "a number as a key": ("3: 1\n", "unknown key '3'"),
    "null as a key": ("~: 1\n", "unknown key"),
    "a truth value as a key": ("true: 1\n", "unknown key 'True'"),
    "an empty key": ('"": 1\n', "unknown key ''"),
    "a key of 900 letters": (f"{'k' * 900}: 1\n", "unknown key 'kkk"),
    "a number as a key of a block": ("eval: {name: preferences, 3: 1}\n", "unknown key '3' in `eval`"),
    "a number as a key of sweep": ("sweep: {3: [1]}\n", "3"),
    "a list where a name belongs": ("eval: {name: [preferences]}\n", "unknown `eval.name` ['preferences']"),
    "a mapping where a name belongs": ("prepare: {name: {a: 1}}\n", "unknown `prepare.name` {'a': 1}"),
}


@pytest.mark.parametrize("name", sorted(KEYS))
def test_odd_keys_are_refused_by_name(name, write_recipe, fails):
    text, expected = KEYS[name]
    assert expected in fails("run", write_recipe(text), "--dry_run")


ENUMS = ("optim", "lr_scheduler_type", "save_strategy", "eval_strategy", "logging_strategy", "hub_strategy")
ODD = ["{x: 1}", "[adamw_torch]", "3", "true", "null", '""', "ADAMW", "no such thing", ".nan", "[[]]"]


@pytest.mark.parametrize("key", ENUMS)
@pytest.mark.parametrize("value", ODD)
def test_keys_of_fixed_names_take_nothing_else(key, value, write_recipe, fails):
    path = write_recipe(f"{key}: {value}\n", **{"save_strategy": None})
    line = fails("run", path)
    assert f"'{key}' must be one of " in line and f"{path}, line " in line


def test_an_enum_names_the_nearest(write_recipe, fails):
    line = fails("run", write_recipe("lr_scheduler_type: cosin\n"))
    assert "'lr_scheduler_type' must be one of " in line and "names; did you mean 'cosine'?, got 'cosin'" in line


def test_words_of_yaml_1_1_stay_words_and_numbers_numbers():
    text = "a: no\nb: on\nc: 1e-5\nd: 0o17\ne: 1_000\nf: 12:30\ng: 2024-01-01\nh: Yes\ni: !!str 5\nj: 0x1F\n"
    assert load_yaml(text, "x")[1] == {
        "a": "no", "b": "on", "c": 1e-5, "d": "0o17", "e": 1000, "f": "12:30", "g": "2024-01-01", "h": "Yes", "i": "5",
        "j": "0x1F",
    }  # fmt: skip


def test_aliases_and_merges_of_an_honest_recipe_are_read():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n"
    assert load_yaml(text, "x")[1]["b"] == {"x": 1, "y": 3}
    assert load_yaml(text, "x")[1]["c"] == [{"x": 1, "y": 2}] * 2


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("utf-8-sig", None), ("utf-16", "not UTF-8 text"), ("utf-32", "not UTF-8 text"), ("latin-1", "not UTF-8 text")],
)
def test_encodings(encoding, expected, write_recipe, fails):
    path = write_recipe()
    path.write_bytes((path.read_text(encoding="utf-8") + "run_name: Käse\n").encode(encoding))
    if expected is None:
        assert load_recipe(path).stated["run_name"] == "Käse"
    else:
        assert expected in fails("run", path)


def test_what_is_no_file_is_no_recipe(tmp_path, fails):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    cases = {
        str(tmp_path): "is a directory",
        str(tmp_path / "fifo"): "is no regular file",
        "/dev/null": "is no regular file",
        "/dev/full": "is no regular file",
        str(tmp_path / "loop"): "no recipe file",
        str(tmp_path / "dangling"): "no recipe file",
        "x" * 300: "no recipe file",
        "a/" * 3_000: "no recipe file",
        "": "no recipe file",
    }
    for name, expected in cases.items():
        for verb in ("run", "sweep"):
            assert expected in fails(verb, name), name
        if name:
            assert expected in fails("recipes", name), name


def test_an_unknown_recipe_shows_the_five_nearest():
    with pytest.raises(RecipeError) as caught:
        find_recipe("something entirely different")
    said = str(caught.value)
    assert "the nearest of " in said and said.count("/") <= 8 and len(said) < 400
    with pytest.raises(RecipeError, match="did you mean 'tiny/f_dpo'"):
        find_recipe("tiny/fdpo")
