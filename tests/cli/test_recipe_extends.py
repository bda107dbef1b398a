"""`extends:`: one recipe over a base. What merges, what replaces, where errors point, what `fdiv recipes` prints."""

from __future__ import annotations

import pytest
import yaml

from fdiv.cli import main
from fdiv.errors import RecipeError
from fdiv.recipe.document import compose, merged_values, packaged_files, read_document
from fdiv.recipe.dump import resolved_yaml
from fdiv.recipe.load import find_recipe, is_base, load_recipe, packaged_recipes
from fdiv.recipe.whole import whole_text

OVERLAYS = [name for name, file in packaged_recipes().items() if read_document(file).base is not None]


@pytest.fixture
def pair(tmp_path):
    """Write a base and an overlay; the overlay's path."""

    def write(base: str, overlay: str):
        (tmp_path / "base.yaml").write_text(base, encoding="utf-8")
        path = tmp_path / "mine.yaml"
        path.write_text(overlay, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("base", "overlay", "merged"),
    [
        ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
        ({"a": 1}, {"a": None}, {"a": None}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"eval": {"name": "tofu", "k": 1, "n": 2}}, {"eval": {"k": 5}}, {"eval": {"name": "tofu", "k": 5, "n": 2}}),
        ({"eval": {"name": "tofu", "k": 1}}, {"eval": {"name": "tofu", "n": 2}}, {"eval": {"name": "tofu", "k": 1, "n": 2}}),
        ({"eval": {"name": "tofu", "k": 1}}, {"eval": {"name": "muse", "n": 2}}, {"eval": {"name": "muse", "n": 2}}),
        ({"eval": {"name": "tofu"}}, {"eval": [{"name": "muse"}]}, {"eval": [{"name": "muse"}]}),
        ({"eval": {"name": "tofu"}}, {"eval": None}, {"eval": None}),
        ({"eval": None}, {"eval": {"name": "tofu"}}, {"eval": {"name": "tofu"}}),
        ({"divergence": "alpha"}, {"divergence": {"name": "alpha", "alpha": 0.3}}, {"divergence": {"name": "alpha", "alpha": 0.3}}),
        ({"divergence": {"name": "alpha", "alpha": 0.3}}, {"divergence": "jeffreys"}, {"divergence": "jeffreys"}),
        ({"divergence": {"name": "alpha", "alpha": 0.3}}, {"divergence": {"name": "skew_jensen_shannon", "weight": 0.2}}, {"divergence": {"name": "skew_jensen_shannon", "weight": 0.2}}),
        ({"eval": {"require": {"x": "improved"}}}, {"eval": {"require": {"y": "increased"}}}, {"eval": {"require": {"x": "improved", "y": "increased"}}}),
    ],
)  # fmt: skip
def test_merged_values(base, overlay, merged, pair):
    assert merged_values(base, overlay) == merged
    path = pair(yaml.safe_dump(base), yaml.safe_dump({"extends": "base.yaml", **overlay}))
    assert read_document(path).values == merged
    assert yaml.safe_load(whole_text(path)) == merged


def test_the_base_is_a_file_beside_the_recipe_before_a_packaged_one(tmp_path):
    (tmp_path / "tofu").mkdir()
    (tmp_path / "tofu" / "mini_base.yaml").write_text("method: npo\n", encoding="utf-8")
    path = tmp_path / "mine.yaml"
    for name in ("tofu/mini_base", "tofu/mini_base.yaml"):
        path.write_text(f"extends: {name}\nbeta: 0.3\n", encoding="utf-8")
        assert read_document(path).values == {"method": "npo", "beta": 0.3}
    (tmp_path / "tofu" / "mini_base.yaml").unlink()
    assert read_document(path).values == {**read_document(packaged_files()["tofu/mini_base"]).values, "beta": 0.3}


@pytest.mark.parametrize(
    ("base", "overlay", "message"),
    [
        ("method: npo", "extends: bas\n", "mine.yaml, line 1: unknown base of `extends` 'bas'"),
        ("method: npo", "beta: 1\nextends: tofu/mini_bas\n", "mine.yaml, line 2: unknown base of `extends` 'tofu/mini_bas'; did you mean 'tofu/mini_base'?"),
        ("method: npo", "extends: [base.yaml]\n", "mine.yaml, line 1: `extends` must be the name or file of one recipe, got ['base.yaml']"),
        ("a: 1\nextends: tofu/base", "extends: base.yaml\n", "base.yaml, line 2: the base of MINE itself extends 'tofu/base'; one level is allowed: write the keys out in one of the two"),
        ("method: npo", "extends: base.yaml\nbeta: 1\nbetta: 2\n", "mine.yaml, line 3: unknown key 'betta'; did you mean 'beta'?"),
        ("# base\nmethod: npo\nbetta: 2", "extends: base.yaml\nbeta: 1\n", "base.yaml, line 3: unknown key 'betta'; did you mean 'beta'?"),
        ("method: npo\neval:\n  name: tofu\n  itms: 3", "extends: base.yaml\neval:\n  max_items: 3\n", "base.yaml, line 4: unknown key 'itms' in `eval`"),
        ("method: npo\neval:\n  name: tofu", "extends: base.yaml\neval:\n  itms: 3\n", "mine.yaml, line 3: unknown key 'itms' in `eval`"),
        ("method: npo\neval:\n  name: tofu", "extends: base.yaml\neval: 3\n", "mine.yaml, line 2: `eval:` must be a mapping"),
        ("method: npo\nseed: x", "extends: base.yaml\nbeta: 1.0\n", "base.yaml, line 2"),
        ("beta: 1", "extends: base.yaml\nseed: 1\n", "MINE: no `method:`"),
    ],
)  # fmt: skip
def test_errors_name_the_file_and_line_of_the_key(base, overlay, message, pair):
    path = pair(base + "\n", overlay)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert message.replace("MINE", str(path)) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_of_a_replaced_block_has_no_place(pair):
    """The line of `k` in the base must not be named for a `k` that is not there any more."""
    path = pair("eval:\n  name: tofu\n  k: 1\n", "extends: base.yaml\neval:\n  name: muse\n")
    document = read_document(path)
    assert document.where(("eval", "k")) == f"{path}, line 2"
    assert document.where(("eval", "name")) == f"{path}, line 3"


def test_a_base_without_a_method_is_no_run_by_itself(capsys):
    assert main(["run", "tofu/mini_base"]) == 2
    message = capsys.readouterr().err.strip()
    assert message.endswith("a base without one runs through a recipe that `extends:` it") and "\n" not in message


def test_extends_is_no_key_of_the_command_line():
    with pytest.raises(RecipeError, match="command line: `extends` is a key of a recipe file; write it there"):
        load_recipe("tofu/mini/npo", ["--extends", "tofu/base"])


def test_recipes_lists_bases_apart(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.split() and is_base(line.split()[0])]
    assert [line for line in lines if "muse/base, muse/novels_base, tofu/base, tofu/mini_base" in line]


def test_packaged_bases_are_those_without_a_method():
    for name, file in packaged_files().items():
        assert is_base(name) == ("method" not in read_document(file).values), name


def test_four_sets_are_overlays():
    folders = {name.rpartition("/")[0] for name in OVERLAYS}
    assert folders >= {"tofu", "tofu/mini", "muse", "muse/novels"}
    assert len(OVERLAYS) >= 48


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_states_what_differs_from_its_base(name):
    path = packaged_recipes()[name]
    base = read_document(read_document(path).base).values
    own = compose(path.read_text(encoding="utf-8"), name)[1]
    assert [key for key, value in own.items() if key in base and base[key] == value] == []


@pytest.mark.parametrize("name", ["tofu/mini/alt_po", "tofu/llama_3.2_3b_flat_lora", "muse/books_npo"])
def test_a_copy_is_whole_and_the_same_recipe(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FDIV_SHARED", str(tmp_path))
    assert main(["recipes", name, "--copy", str(tmp_path / "copy.yaml")]) == 0
    copy, original = (
        load_recipe(tmp_path / "copy.yaml", ["--output_dir", "x"]),
        load_recipe(name, ["--output_dir", "x"]),
    )
    assert read_document(tmp_path / "copy.yaml").base is None
    assert yaml.safe_load(resolved_yaml(copy)) == yaml.safe_load(resolved_yaml(original))


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_whole_text_keeps_the_values_and_the_comments(name):
    path = find_recipe(name)
    text = whole_text(path)
    assert compose(text, name)[1] == read_document(path).values
    comments = {line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")}
    assert comments <= set(text.splitlines())


def test_the_whole_text_merges_line_by_line(pair):
    path = pair(
        "# The base.\n\n# First.\na: 1  # one\n\nblock:\n  name: x\n  # Inner.\n  k: 1\n  m: 2\n\n# Last.\nz: 3\n",
        "# Mine.\nextends: base.yaml\nown: 0\nblock:\n    # Other.\n    k: 5\nz: 4\n",
    )
    assert whole_text(path) == (
        "# Mine.\n#\n# The base.\n\nown: 0\n\n# First.\na: 1  # one\n\nblock:\n  name: x\n  # Other.\n  k: 5\n  m: 2\n\nz: 4\n"
    )


def test_anchors_and_braces_are_written_out(pair):
    path = pair("a: &x {k: 1}\nb: *x\nc: {name: n, k: 1}\n", "extends: base.yaml\nc: {k: 2}\na: 3\n")
    assert yaml.safe_load(whole_text(path)) == {"a": 3, "b": {"k": 1}, "c": {"name": "n", "k": 2}}
