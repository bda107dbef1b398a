"""`fdiv teach` and the teacher it leaves on disk: values, size, what a kill leaves, and what is refused."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.cli import main
from fdiv.distillation import FDistillConfig, topk_divergence
from fdiv.distillation.cache import Said, TeacherCache, _bytes, _codes, _log_probs, _numbers, bytes_of, row_digest
from fdiv.distillation.f_distill.data import completion_tokens
from fdiv.distillation.teach.config import TeachConfig
from fdiv.distillation.teach.run import teach
from fdiv.distillation.teachers import Encoded
from fdiv.divergences import get_divergence
from fdiv.errors import CheckpointError, DataError
from fdiv.inference.encoding import Encoding
from fdiv.models.tiny import build_tiny_model
from tests.support.processes import run
from tests.support.runs.f_distill import make_teacher, make_trainer, messages, rows

FILES = ("settings.json", "part-00000.safetensors", "tokenizer/tokenizer.json")


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def write_rows(path, data):
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return path


def config(teacher_dir, data, **options):
    defaults = {"k": 9, "max_completion_length": 24, "batch_size": 3}
    return TeachConfig(**{"model": str(teacher_dir), "dataset": str(data), **defaults, **options})


@pytest.fixture(scope="module")
def cache_dir(teacher_dir, tmp_path_factory):
    """The top 9 of twelve rows."""
    folder = tmp_path_factory.mktemp("cache")
    teach(config(teacher_dir, write_rows(folder / "rows.jsonl", rows())), folder / "cache")
    return folder / "cache"


def encoded(model_dir, data, room=24):
    tokenizer, encoding = AutoTokenizer.from_pretrained(model_dir), Encoding(context="generation")
    found = []
    for row in data:
        prompt, ids = completion_tokens(tokenizer, row, encoding, [tokenizer.eos_token_id])
        found.append(Encoded(prompt, ids[:room]))
    return found


def log_probs_of(path, row, temperature=1.0):
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(path)
        logits = model(torch.tensor([[*row.prompt_ids, *row.completion_ids]])).logits[0, len(row.prompt_ids) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)


def cached_trainer(model_dir, data, output, cache, **options):
    spec = {"name": "cache", "path": str(cache), **options.pop("spec", {})}
    return make_trainer(model_dir, None, data, output, teacher=spec, **options)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def expected(model_dir, teacher_dir, data, divergence, k, temperature=1.0):
    """The dense loss over the top k and the rest, by hand; and the student it has a gradient to."""
    student = AutoModelForCausalLM.from_pretrained(model_dir).double()
    total, tokens = 0.0, 0
    for row in encoded(model_dir, data):
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        logits = student(ids).logits[0, len(row.prompt_ids) - 1 : -1] / temperature
        top = log_probs_of(teacher_dir, row, temperature).topk(k)
        total = total + topk_divergence(logits.log_softmax(-1), (top.values, top.indices), divergence).sum()
        tokens += len(row.completion_ids)
    return total / tokens, student


# ---------------------------------------------------------------- what is stored
def test_a_log_probability_in_three_bytes():
    values = torch.cat(
        [-torch.logspace(-7, 2, 500, dtype=torch.float64), torch.tensor([0.0, 1e-9, -300.0, -math.inf])]
    )
    stored = _bytes(_codes(values))
    assert stored.dtype == torch.uint8 and stored.shape == (504, 3)
    again = _log_probs(_numbers(stored)).double()
    assert (again - values)[:-2].abs().max() < 2**-18 + 1e-5 * 2**-6 + 1e-6
    assert again[-2] == pytest.approx(-128, abs=1e-4) and again[-1] == -math.inf and (again <= 0).all()
    ids = torch.tensor([0, 1, 255, 256, 151_935, 2**24 - 1])
    assert torch.equal(_numbers(_bytes(ids)), ids)


def test_the_cache_holds_the_teachers_top_tokens(cache_dir, teacher_dir, tiny_model_dir):
    cache, data = TeacherCache(cache_dir), encoded(tiny_model_dir, rows())
    assert len(cache) == 12 and cache.k == 9 and all(row in cache for row in data)
    order = [5, 0, 11]
    said = cache.read([data[number] for number in order])
    log_q = torch.cat([log_probs_of(teacher_dir, data[number]) for number in order])
    top, token = log_q.topk(9), torch.cat([torch.tensor(data[number].completion_ids) for number in order])
    assert torch.equal(said.top.ids, top.indices)
    near = {"rtol": 0, "atol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(said.top.log_probs, top.values, **near)
    torch.testing.assert_close(said.top.log_tail, (-top.values.exp().sum(-1)).log1p(), **near)
    torch.testing.assert_close(said.log_probs, log_q.gather(1, token[:, None])[:, 0], **near)
    torch.testing.assert_close(said.entropy.double(), -(log_q.exp() * log_q).sum(-1), rtol=1e-3, atol=0)
    fewer = cache.read([data[3]], 2)
    log_q = log_probs_of(teacher_dir, data[3]).topk(2).values
    torch.testing.assert_close(fewer.top.log_tail, (-log_q.exp().sum(-1)).log1p(), **near)
    assert cache.read([]).top.ids.shape == (0, 9) and cache.read([], 2).top.log_probs.shape == (0, 2)
    with pytest.raises(DataError, match="holds no row with the prompt"):
        cache.read([Encoded([1, 2], [3])])


def test_a_token_takes_at_most_400_bytes(teacher_dir, tiny_model_dir, tmp_path):
    """With the headers and digests of the files, at k = 64."""
    data = write_rows(tmp_path / "rows.jsonl", rows(200))
    content = teach(config(teacher_dir, data, k=64, batch_size=64), tmp_path / "cache")
    sizes = sum(path.stat().st_size for path in (tmp_path / "cache").glob("part-*"))
    assert content["counts"]["bytes"] == sizes and content["bytes_per_token"] <= 400
    assert bytes_of(1, 0, 64) == 392
    tokens = sum(len(row.completion_ids) for row in encoded(tiny_model_dir, rows(200)))
    assert content["counts"] == {"rows": 200, "tokens": tokens, "bytes": sizes}


# ---------------------------------------------------------------- training on it
@pytest.mark.parametrize(
    "spec", ["reverse_kl", "forward_kl", "total_variation", {"name": "alpha", "alpha": 0.3}], ids=str
)
def test_loss_and_gradient_are_those_of_the_cells(spec, cache_dir, tiny_model_dir, teacher_dir, tmp_path):
    trainer = cached_trainer(tiny_model_dir, rows(5), tmp_path, cache_dir, divergence=spec)
    assert trainer.teacher_model is None
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(rows(5)))
    loss.backward()
    dense, student = expected(tiny_model_dir, teacher_dir, rows(5), spec, 9)
    dense.backward()
    assert loss.item() == pytest.approx(dense.item(), rel=1e-4)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), student.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=3e-4 * scale, msg=name)


def test_all_tokens_are_the_teacher_itself(tiny_model_dir, teacher_dir, tmp_path):
    """k = V at temperature 1.5, as messages, under LoRA: the loss of the same steps with the teacher in memory."""
    from peft import LoraConfig

    vocabulary = AutoModelForCausalLM.from_pretrained(teacher_dir).config.vocab_size
    data = write_rows(tmp_path / "rows.jsonl", messages(6))
    content = teach(
        config(teacher_dir, data, k=vocabulary, temperature=1.5, max_completion_length=40), tmp_path / "cache"
    )
    assert content["share"] is None
    options = {
        "temperature": 1.5, "max_completion_length": 40, "divergence": "jensen_shannon", "learning_rate": 1e-2,
        "peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=True),
    }  # fmt: skip
    torch.manual_seed(0)
    cached = cached_trainer(tiny_model_dir, messages(6), tmp_path / "1", tmp_path / "cache", **options)
    torch.manual_seed(0)
    local = make_trainer(tiny_model_dir, teacher_dir, messages(6), tmp_path / "2", **options)
    cached.train(), local.train()
    assert losses(cached) == pytest.approx(losses(local), rel=1e-3)
    one, other = cached.state.log_history[0], local.state.log_history[0]
    for name in ("teacher_entropy", "entropy", "log_ratio/tokens_p50", "density_weight/tokens_p95"):
        assert one[name] == pytest.approx(other[name], rel=2e-3, abs=1e-4)


def test_fewer_of_the_tokens(cache_dir, tiny_model_dir, teacher_dir, tmp_path):
    trainer = cached_trainer(tiny_model_dir, rows(4), tmp_path, cache_dir, spec={"k": 3}, max_steps=1)
    trainer.train()
    dense, _ = expected(tiny_model_dir, teacher_dir, rows(4), "reverse_kl", 3)
    assert losses(trainer)[0] == pytest.approx(dense.item(), rel=1e-3)
    assert "top 3 of each token" in str(trainer.objective_settings()["teacher"])


def test_a_teacher_with_a_prompt_of_its_own(teacher_dir, tiny_model_dir, tmp_path):
    data = [{**row, "teacher_prompt": f"Count on. {row['prompt']}"} for row in rows(4)]
    vocabulary = AutoModelForCausalLM.from_pretrained(teacher_dir).config.vocab_size
    teach(config(teacher_dir, write_rows(tmp_path / "rows.jsonl", data), k=vocabulary), tmp_path / "cache")
    options = {"divergence": "le_cam", "max_steps": 1}
    cached = cached_trainer(tiny_model_dir, data, tmp_path / "1", tmp_path / "cache", **options)
    local = make_trainer(tiny_model_dir, teacher_dir, data, tmp_path / "2", **options)
    cached.train(), local.train()
    assert losses(cached) == pytest.approx(losses(local), rel=1e-3)
    with pytest.raises(DataError, match="4 of 4 rows are not in the teacher cache"):
        cached_trainer(tiny_model_dir, rows(4), tmp_path / "3", tmp_path / "cache")


def test_a_student_whose_head_is_wider(cache_dir, tiny_model_dir, teacher_dir, tmp_path):
    """Cells beyond the tokenizer's tokens are masked: they take no mass and get no gradient."""
    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    student.resize_token_embeddings(student.config.vocab_size + 32, mean_resizing=False)
    with torch.no_grad():
        student.get_output_embeddings().weight[-32:] = 3.0
    trainer = cached_trainer(tiny_model_dir, rows(4), tmp_path, cache_dir, model=student, max_steps=1)
    dense, _ = expected(tiny_model_dir, teacher_dir, rows(4), "reverse_kl", 9)
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(rows(4)))
    loss.backward()
    assert loss.item() == pytest.approx(dense.item(), rel=1e-4)
    assert trainer.model.get_output_embeddings().weight.grad[-32:].abs().max() == 0


def test_a_resumed_run_is_the_whole_run_and_another_cache_another_run(
    cache_dir, teacher_dir, tiny_model_dir, tmp_path
):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = cached_trainer(tiny_model_dir, rows(), tmp_path, cache_dir, **settings)
    whole.train()
    again = cached_trainer(tiny_model_dir, rows(), tmp_path, cache_dir, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(whole)
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    fewer = cached_trainer(tiny_model_dir, rows(), tmp_path, cache_dir, spec={"k": 2}, **settings)
    with pytest.raises(CheckpointError, match="teacher is"):
        fewer.train(resume_from_checkpoint=True)


# ---------------------------------------------------------------- the share
def test_the_share_is_that_of_dense_sums(teacher_dir, tiny_model_dir, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows(6))
    specs = ["reverse_kl", {"name": "alpha", "alpha": 0.3}, "pearson_chi2"]
    vocabulary = AutoModelForCausalLM.from_pretrained(teacher_dir).config.vocab_size
    options = {
        "student": str(tiny_model_dir),
        "share_rows": 3,
        "divergences": specs,
        "k": vocabulary,
        "temperature": 1.3,
    }
    share = teach(config(teacher_dir, data, **options), tmp_path / "cache")["share"]
    sample = [encoded(tiny_model_dir, rows(6))[number] for number in (0, 2, 5)]
    assert share["rows"] == 3 and share["tokens"] == sum(len(row.completion_ids) for row in sample)
    logs = [[log_probs_of(path, row, 1.3) for row in sample] for path in (tiny_model_dir, teacher_dir)]
    log_p, log_q = map(torch.cat, logs)
    for entry, spec in zip(share["table"], specs, strict=True):
        full = get_divergence(spec).exact(log_p, log_q).sum().item()
        assert entry["full"] == pytest.approx(full / share["tokens"], rel=1e-3)
        values = [value for _, value in sorted(entry["share"].items(), key=lambda item: int(item[0]))]
        for k in (1, 8, 64):
            top = log_q.topk(k)
            part = topk_divergence(log_p, (top.values, top.indices), spec).sum().item()
            assert entry["share"][str(k)] == pytest.approx(part / full, rel=1e-3)
        assert values == sorted(values) and values[-1] == pytest.approx(1, abs=1e-4)
    assert share["table"][2]["share"]["1"] < share["table"][0]["share"]["64"]  # Pearson lives in the tail


def test_a_run_says_what_its_top_k_holds(teacher_dir, tiny_model_dir, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", rows(6))
    options = {"student": str(tiny_model_dir), "divergences": ["reverse_kl"]}
    share = teach(config(teacher_dir, data, **options), tmp_path / "cache")["share"]
    held = share["table"][0]["share"]["9"]
    trainer = cached_trainer(tiny_model_dir, rows(6), tmp_path / "1", tmp_path / "cache")
    assert trainer.notes["teacher"] == f"top 9 holds {held:.3f} of reverse_kl (a sample of 6 rows, before training)"
    other = cached_trainer(tiny_model_dir, rows(6), tmp_path / "2", tmp_path / "cache", divergence="le_cam")
    assert "its share of le_cam is not among those measured" in other.notes["teacher"]


# ---------------------------------------------------------------- killed, and gone on with
def teach_and_die(options, output, parts):
    """Write `parts` parts, and be killed while the next one is being read."""
    from fdiv.distillation.teach import run as module

    say = module.ModelSource.say

    def dying(self, batch):
        if len(list(Path(output).glob("part-*"))) >= parts:
            os.kill(os.getpid(), signal.SIGKILL)
        return say(self, batch)

    module.ModelSource.say = dying
    teach(TeachConfig(**options), output)


@pytest.mark.parametrize("parts", [0, 2])
def test_killed_and_gone_on_with_it_is_the_same_bytes(parts, teacher_dir, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", rows())
    options = {
        "model": str(teacher_dir), "dataset": str(data), "k": 9, "max_completion_length": 24, "batch_size": 2,
        "part_tokens": 30,
    }  # fmt: skip
    ended = run(teach_and_die, options, str(tmp_path / "killed"), parts)
    assert ended.codes == [-signal.SIGKILL], ended.stderr
    assert len(list((tmp_path / "killed").glob("part-*.safetensors"))) == parts
    with pytest.raises(DataError, match="is not finished: run `fdiv teach` again"):
        TeacherCache(tmp_path / "killed")
    capsys.readouterr()
    for name in ("whole", "killed"):
        teach(TeachConfig(**options), tmp_path / name)
    said = capsys.readouterr().err
    assert (f"{parts} of " in said and "parts were written before" in said) == (parts > 0)
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert len(files) > 6
    for file in files:
        if file.name != "taught.json":  # has the time
            assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes(), file
    assert "the cache is finished" not in said
    teach(TeachConfig(**options), tmp_path / "whole")
    assert "the cache is finished" in capsys.readouterr().err


def test_what_is_missing_of_a_finished_cache_is_written_again(cache_dir, copied, teacher_dir, capsys):
    """As the message about a damaged part says; the other files are left."""
    import shutil

    data = cache_dir.parent / "rows.jsonl"
    kept = (copied / "settings.json").stat().st_mtime_ns
    (copied / FILES[1]).unlink(), shutil.rmtree(copied / "tokenizer")
    teach(config(teacher_dir, data), copied)
    assert "lacks tokenizer, part-00000.safetensors: written again" in " ".join(capsys.readouterr().err.split())
    for name in FILES:
        assert (copied / name).read_bytes() == (cache_dir / name).read_bytes()
    assert (copied / "settings.json").stat().st_mtime_ns == kept
    assert len(TeacherCache(copied)) == 12


@pytest.mark.parametrize("left", [".settings.json.part", "settings.json"])
def test_killed_before_the_first_part(left, cache_dir, teacher_dir, tmp_path):
    """While the settings are written, or before the tokenizer is."""
    (tmp_path / "killed").mkdir()
    content = (cache_dir / "settings.json").read_bytes()
    (tmp_path / "killed" / left).write_bytes(content if left == "settings.json" else content[:50])
    teach(config(teacher_dir, cache_dir.parent / "rows.jsonl"), tmp_path / "killed")
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (cache_dir / name).read_bytes()


def teach_with_others(options, output):
    teach(TeachConfig(**options), output)


def test_several_processes_write_the_same_parts(teacher_dir, tmp_path):
    from tests.support.processes import run_well

    data = write_rows(tmp_path / "rows.jsonl", rows())
    options = {
        "model": str(teacher_dir), "dataset": str(data), "k": 5, "max_completion_length": 24, "batch_size": 4,
        "part_tokens": 40,
    }  # fmt: skip
    run_well(teach_with_others, options, str(tmp_path / "two"), processes=2)
    teach(TeachConfig(**options), tmp_path / "one")
    for path in sorted((tmp_path / "one").glob("part-*")):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


# ---------------------------------------------------------------- what is refused
@pytest.fixture
def copied(cache_dir, tmp_path):
    import shutil

    return Path(shutil.copytree(cache_dir, tmp_path / "copied"))


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "a byte": (lambda folder: flip(folder / FILES[1], -20), "its content does not agree with its digest"),
    "cut off": (lambda folder: (folder / FILES[1]).write_bytes((folder / FILES[1]).read_bytes()[:-9]), "part-00000"),
    "missing": (lambda folder: (folder / FILES[1]).unlink(), "it is missing"),
    "settings": (lambda folder: flip(folder / FILES[0], 60), "settings.json"),
    "no settings": (lambda folder: (folder / FILES[0]).unlink(), "`fdiv teach` makes a cache"),
    "unfinished": (lambda folder: (folder / "taught.json").unlink(), "is not finished"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_cache(case, copied, tiny_model_dir, tmp_path):
    change, message = DAMAGE[case]
    change(copied)
    with pytest.raises(DataError, match=message):
        cached_trainer(tiny_model_dir, rows(), tmp_path / "out", copied)


def test_a_part_of_another_cache(copied, teacher_dir, tiny_model_dir, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows())
    teach(config(teacher_dir, data, k=8), tmp_path / "other")
    (copied / FILES[1]).write_bytes((tmp_path / "other" / FILES[1]).read_bytes())
    with pytest.raises(DataError, match="it was made with other settings"):
        cached_trainer(tiny_model_dir, rows(), tmp_path / "out", copied)


def test_a_cache_that_does_not_fit_the_training(cache_dir, tiny_model_dir, teacher_dir, tmp_path):
    def refused(message, data=None, **options):
        with pytest.raises(DataError, match=message):
            cached_trainer(tiny_model_dir, data or rows(), tmp_path, options.pop("cache", cache_dir), **options)

    refused("was made at temperature 1, the training temperature is 2: set temperature: 1", temperature=2.0)
    refused(r"teacher.k=10: the teacher cache .* holds 9 tokens", spec={"k": 10})
    refused(r"3 of 15 rows are not in the teacher cache .*, the first is row 12", data=rows(15))
    refused(r"completions cut at max_completion_length=24, here 5", max_completion_length=5)
    refused("holds no settings.json", cache=tmp_path)
    refused("3 of 3 rows are not in", data=rows(), train_dataset=Dataset.from_list(rows()), eval_dataset=Dataset.from_list(rows(15)[12:]))  # fmt: skip
    with pytest.raises(DataError, match="teacher_model is a model in memory, and the teacher is a cache"):
        model = AutoModelForCausalLM.from_pretrained(teacher_dir)
        make_trainer(tiny_model_dir, model, rows(), tmp_path, teacher={"name": "cache", "path": str(cache_dir)})


def test_a_student_of_another_vocabulary(cache_dir, tmp_path):
    other = build_tiny_model(tmp_path / "other", vocab_texts=["quite other words, and no others"], vocab_size=300)
    with pytest.raises(DataError, match=r"the teacher cache .*different vocabularies: token \d+ is '.+' and '.+'"):
        cached_trainer(other, rows(4), tmp_path / "out", cache_dir)


def test_options_of_the_cache(tmp_path):
    machine = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "on_policy_share": 0.0}
    cache = {"name": "cache", "path": "x"}
    FDistillConfig(**machine, teacher=cache, teacher_model_name_or_path="for the evaluation")
    for options, message in (
        (
            {"teacher": cache, "on_policy_share": 0.5},
            "on_policy_share=0.5: a cache knows the completions of the rows alone",
        ),
        ({"teacher": "cache"}, "teacher.path is not set"),
        ({"teacher": {**cache, "k": 0}}, "k=0: must be at least 1"),
        ({"teacher": cache, "divergence": "cauchy_schwarz"}, "only an f-divergence bounds the whole"),
    ):
        with pytest.raises(ValueError, match=message):
            FDistillConfig(**{**machine, **options})


def test_what_cannot_be_taught(teacher_dir, tiny_model_dir, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "rows.jsonl", rows(3))
    other = build_tiny_model(tmp_path / "other", vocab_texts=["quite other words, and no others"], vocab_size=300)
    broken = AutoModelForCausalLM.from_pretrained(teacher_dir)
    with torch.no_grad():
        broken.get_output_embeddings().weight[7] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(teacher_dir).save_pretrained(tmp_path / "broken")
    longer = AutoTokenizer.from_pretrained(tiny_model_dir)
    longer.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "longer")
    longer.save_pretrained(tmp_path / "longer")
    foreign = write_rows(tmp_path / "foreign.jsonl", [*rows(3), {"prompt": "a", "completion": " b<|done|>"}])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    for options, folder, message in (
        ({"k": 10_000}, "a", "k=10000: there are [0-9]+ tokens, and no more can be kept"),
        (
            {"student": str(tmp_path / "longer"), "dataset": foreign},
            "g",
            "1 of 4 rows have a token that the teacher lacks, the first is .*foreign.jsonl, line 4 with token",
        ),
        ({"student": str(other)}, "b", r"different vocabularies: token \d+ is '.+' and '.+'"),
        ({"splits": ["train", "test"]}, "c", "has no split 'test'; it has: train"),
        ({"model": str(tmp_path / "broken")}, "d", "has weights that are NaN or infinite"),
        ({}, "full", "is not empty and no teacher's cache"),
        ({"model": str(tmp_path / "nowhere")}, "e", "no tokenizer can be loaded"),
        ({"max_completion_length": 5, "dataset": str(tmp_path / "none.jsonl")}, "f", "no such file"),
    ):
        with pytest.raises(DataError, match=message):
            teach(config(teacher_dir, options.pop("dataset", data), **options), tmp_path / folder)
    teach(config(teacher_dir, data, k=4), tmp_path / "mine")
    for options, message in (({"k": 5}, "was begun with k=4, now it is 5"), ({"system_prompt": None, "max_completion_length": 7}, "max_completion_length=24, now it is 7")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            teach(config(teacher_dir, data, **{"k": 4, **options}), tmp_path / "mine")
    for options, message in (
        ({"k": 0}, "k=0: must be at least 1"), ({"splits": []}, "splits is empty"), ({"splits": ["a", "a"]}, "named twice"),
        ({"divergences": ["kl"]}, "ambiguous"), ({"temperature": 0.0}, "temperature=0.0"), ({"tokenizer": "x"}, "belongs to server_url"),
        ({"server_url": "localhost:1"}, "must start with http"), ({"server_url": "http://localhost:1", "temperature": 2.0}, "temperature=2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            config(teacher_dir, data, **options)


def test_rows_that_are_there_twice_and_long_ones(teacher_dir, tiny_model_dir, tmp_path, capsys):
    """A repeated row is read once; a cut one is found again where training cuts it at the same place."""
    data = [*rows(4), rows(4)[1]]
    content = teach(
        config(teacher_dir, write_rows(tmp_path / "rows.jsonl", data), max_completion_length=6), tmp_path / "cache"
    )
    assert content["counts"]["rows"] == 4 and content["rows"]["rows of train"]["cut"] > 0
    assert content["rows"]["rows of train"]["dropped"] == {"the same tokens as a row before": 1}
    trainer = cached_trainer(tiny_model_dir, data, tmp_path / "out", tmp_path / "cache", max_completion_length=6)
    trainer.train()
    assert row_digest(Encoded([1, 2], [3])) != row_digest(Encoded([1], [2, 3]))
    assert Said._fields == ("top", "log_probs", "entropy")


def test_a_row_that_is_there_twice_hides_none_without_an_answer(teacher_dir, tmp_path, monkeypatch):
    """One of four that are left has an answer, and half is due."""
    from fdiv.distillation.teach import rows as module

    data = write_rows(tmp_path / "rows.jsonl", rows(5))
    read = iter([[3], [3], [], [], []])
    monkeypatch.setattr(module, "_encoded", lambda *_: (Encoded([1], ids := next(read)), ([1], ids)))
    with pytest.raises(DataError, match="1 of 4 rows are left .* without an answer token"):
        module.load_rows(config(teacher_dir, data, min_used_fraction=0.5), AutoTokenizer.from_pretrained(teacher_dir))


def test_a_share_of_an_infinite_divergence_is_none():
    """What comes back from JSON, which has no infinity."""
    from fdiv.distillation.teach.share import share_table

    entry = {"divergence": "reverse_kl", "full": None, "share": {"1": None, "9": None}}
    _, columns, table = share_table({"tokens": 4, "table": [entry]})
    assert columns == ["divergence", "all", "k = 1", "k = 9"] and table == [["reverse_kl", "–", "–", "–"]]


# ---------------------------------------------------------------- the verb
def test_the_verb(teacher_dir, tiny_model_dir, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", rows(6))
    words = [
        "teach",
        "--model",
        str(teacher_dir),
        "--dataset",
        str(data),
        "--student",
        str(tiny_model_dir),
        "--k",
        "9",
    ]
    words += ["--max_completion_length", "24", "--divergences", "le_cam", "{name: alpha, alpha: 0.3}"]
    words += ["--output", str(tmp_path / "cache")]
    assert main([*words, "--dry_run"]) == 0
    said = capsys.readouterr().out
    settings = yaml.safe_load(said)
    assert settings["k"] == 9 and settings["divergences"] == ["le_cam", {"name": "alpha", "alpha": 0.3}]
    tokens = sum(len(row.completion_ids) for row in encoded(tiny_model_dir, rows(6)))
    assert f"# 6 rows, {tokens} tokens: {bytes_of(tokens, 6, 9) / 1024:.2f} KiB in 1 parts, about" in said
    assert not (tmp_path / "cache").exists()
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "le_cam" in captured.out and "alpha(0.3)" in captured.out and "k = 8" in captured.out
    assert f"6 rows, {tokens} tokens" in captured.err and "bytes a token" in captured.err
    for extra, code, message in (
        (["--k", "0"], 2, "k=0: must be at least 1"),
        (["--k", "9999"], 1, "k=9999"),
        (["--divergences", "kl"], 2, "ambiguous"),
        (["--splits", "valid"], 1, "has no split 'valid'"),
    ):
        assert main([*words, *extra, "--output", str(tmp_path / "none")]) == code
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("fdiv: ") and message in error
