"""`fdiv unlearn`: from files to an adapter and an erasure report; resumed, merged, repeated by `fdiv run`; bad input."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.cli import main
from fdiv.models.loading import load_model
from tests.support.unlearned import FORGET, RETAIN, build_known_model, write

# A rate for a model of 64 channels, at which forgetting comes before the neighbours go; few samples and one cheap attack.
QUICK = ("--learning_rate", "2e-3", "--samples", "2", "--attacks", "int8", "--max_new_tokens", "12", "--disable_tqdm")


def command(known, output, *words, model="model", retain=True):
    given = ["unlearn", "--model", known / model, "--forget", known / "forget.jsonl", "--output", output, *words]
    given += ["--retain", known / "retain.jsonl"] if retain else []
    return [str(word) for word in given]


@pytest.fixture(scope="module")
def run(known_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlearn") / "out"
    assert main(command(known_models, folder, *QUICK, "--merge")) == 0
    return folder


def test_what_it_leaves(run):
    for name in ("adapter_model.safetensors", "erasure.html", "erasure.json", "report.html", "recipe_resolved.yaml"):
        assert (run / name).is_file(), name
    found = json.loads((run / "erasure.json").read_text())
    measured, training = found["measured"], found["training"]
    # The rows were known whole; at the end what is above chance is gone, and the retain rows stay.
    assert measured["forgotten"]["before"] < 0.05 and measured["forgotten"]["after"] >= 0.9
    assert measured["neighbour_probability"]["after"] > 0.8
    assert "leak@2" in measured and [entry["name"] for entry in found["attacks"]] == ["int8"]
    # It stopped by its rule, at the first epoch that reached it, which is the one that was taken.
    epochs = training["epochs"]
    assert [entry["epoch"] for entry in epochs] == list(range(len(epochs)))
    assert epochs[-1]["taken"] and epochs[-1]["forgotten"] >= 0.9 > max(entry["forgotten"] for entry in epochs[:-1])
    assert len(epochs) - 1 < 25 and "forgotten of at least 0.9" in training["stopping_rule"]
    assert training["method"]["method"] == "NPO" and training["method"]["retain_term"] == "nll"
    # The file is the one that was named, not the copy that the run read.
    assert found["asked"]["source"].endswith("forget.jsonl") and "prepared" not in found["asked"]["source"]
    text = (run / "erasure.html").read_text() + json.dumps(found)
    assert "erased" not in text.lower() and FORGET[0]["answer"] in text


def test_the_adapter_is_what_was_measured_and_the_merged_model_is_the_same(run, known_models):
    tokenizer = AutoTokenizer.from_pretrained(run)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": FORGET[0]["question"]}, {"role": "assistant", "content": FORGET[0]["answer"]}],
        return_tensors="pt", return_dict=True,
    )  # fmt: skip
    with torch.no_grad():
        base = load_model(str(known_models / "model"))(**text).logits
        adapted = load_model(str(known_models / "model"), str(run))(**text).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)(**text).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=2e-3)
    assert (base - adapted).abs().max() > 0.1


def test_fdiv_run_repeats_the_recipe(run, tmp_path):
    """The recipe in the folder is whole: without the verb it gives the same adapter, and the report."""
    assert (
        main(["run", str(run / "prepared" / "unlearn.yaml"), "--output_dir", str(tmp_path / "again"), *QUICK[:2]]) == 0
    )
    first, again = _weights(run), _weights(tmp_path / "again")
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert (tmp_path / "again" / "erasure.html").is_file()


def _weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_an_earlier_run_is_left_alone(run, known_models, capsys):
    assert main(command(known_models, run, *QUICK)) == 1
    line = capsys.readouterr().err
    assert "holds a finished run, which is left alone; choose another --output, or replace it with --overwrite" in line
    assert "output_dir" not in line and "--overwrite_" not in line
    assert main(command(known_models, run, *QUICK, "--resume")) == 1
    assert "holds a finished run: there is nothing to go on with" in capsys.readouterr().err


def test_resumed_it_is_the_same_run(run, known_models, tmp_path, capsys):
    """Cut off after an epoch, and gone on with: the same adapter, bit for bit."""
    assert main(command(known_models, tmp_path / "out", *QUICK, "--max_steps", "4")) == 0
    folder = tmp_path / "out"
    for name in ("result.json", "adapter_model.safetensors", "erasure.html", "erasure.json"):
        (folder / name).unlink()
    capsys.readouterr()
    assert main(command(known_models, folder, *QUICK, "--resume", "--force_resume")) == 0
    first, again = _weights(run), _weights(folder)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert main(command(known_models, tmp_path / "new", *QUICK, "--max_steps", "1", "--resume")) == 0
    assert "holds no checkpoint yet; begun again" in capsys.readouterr().err


def test_killed_while_it_is_measured_it_goes_on_there(run, known_models, tmp_path, capsys):
    """The training had ended by its rule: no further step is made, and report and adapter are those of the whole run."""
    folder = tmp_path / "out"
    shutil.copytree(run, folder)
    for name in ("result.json", "erasure.html", "erasure.json", "eval_after.json"):
        (folder / name).unlink()
    assert main(command(known_models, folder, *QUICK)) == 1
    line = capsys.readouterr().err
    assert "holds checkpoints of an unfinished run; continue it with --resume, start again with --overwrite" in line
    assert main(command(known_models, folder, *QUICK, "--resume")) == 0
    first, again = (json.loads((one / "erasure.json").read_text()) for one in (run, folder))
    for name in ("measured", "attacks"):
        for entry in (*first["attacks"], *again["attacks"]):
            entry.pop("seconds", None)
        assert first[name] == again[name]
    assert first["training"]["epochs"] == again["training"]["epochs"]
    assert all(torch.equal(_weights(run)[name], _weights(folder)[name]) for name in _weights(run))


def test_a_dry_run_writes_nothing_and_says_what_it_takes(known_models, tmp_path, capsys):
    assert main(command(known_models, tmp_path / "out", "--dry_run", "--beta", "0.2")) == 0
    said = capsys.readouterr()
    assert "name: own_rows" in said.out and "beta: 0.2" in said.out and "stop_at: 0.9" in said.out
    assert "memory plan" in said.err and "time plan" in said.err and "attacks" in said.err
    assert not (tmp_path / "out").exists()


def test_only_rows_without_neighbours_of_their_own_are_said_to_be_held_out(known_models, tmp_path, capsys):
    sampled = ("--dry_run", "--sample_retain", "10")
    assert main(command(known_models, tmp_path / "out", *sampled, retain=False)) == 0
    assert "neighbours: up to 2 of the retain rows are not trained on" in capsys.readouterr().err
    write(tmp_path / "near.jsonl", [{"question": "Who wrote the near book?", "answer": "Ann Near."}])
    words = (*sampled, "--neighbours", tmp_path / "near.jsonl")
    assert main(command(known_models, tmp_path / "out", *words, retain=False)) == 0
    assert "are not trained on" not in capsys.readouterr().err


def test_without_retain_rows_it_says_what_is_lost(known_models, tmp_path, capsys):
    assert main(command(known_models, tmp_path / "out", "--dry_run", retain=False)) == 0
    said = capsys.readouterr()
    assert "note: without retain rows nothing holds what lies near the forget rows" in said.err
    assert "retain_term: none" in said.out
    assert main(command(known_models, tmp_path / "out", "--dry_run", "--method", "grad_diff", retain=False)) == 2
    line = capsys.readouterr().err
    assert "--method grad_diff needs rows to keep: give --retain FILE" in line and "npo" in line
    assert main(command(known_models, tmp_path / "out", "--dry_run", "--method", "f_dpo")) == 2
    assert "--method f_dpo: not a method that unlearns" in capsys.readouterr().err


@pytest.mark.parametrize("count", [5, 10])
def test_the_models_own_answers_as_retain_rows(count, known_models, tmp_path, capsys):
    """To questions of a file: those of the forget rows, and answers that hold a secret, are left out and counted.

    Of ten rows two would be held out; there are fewer, so none is, and the report says so.
    """
    asked = [{"question": row["question"]} for row in [FORGET[0], *RETAIN]]
    write(tmp_path / "asked.jsonl", asked)
    words = ("--sample_retain", str(count), "--retain_questions", tmp_path / "asked.jsonl", "--max_steps", "1")
    assert main(command(known_models, tmp_path / "out", *QUICK, *words, retain=False)) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("sampled retain rows"))
    assert "7 read" in line and "1 of 7 rows dropped: their question is a forget row's" in line
    folder = next((tmp_path / "out" / "prepared").glob("own_rows-*"))
    rows = [json.loads(text) for text in (folder / "retain.jsonl").read_text().splitlines()]
    assert 0 < len(rows) <= min(count, 6) and not (folder / "neighbours.jsonl").exists()
    found = json.loads((tmp_path / "out" / "erasure.json").read_text())
    lines = [line for line in found["not_measured"] if line.startswith("neighbours kept apart: ")]
    assert len(lines) == 1 and ("too few answers of the model could be used" in lines[0]) == (count == 10)
    assert found["measured"]["neighbour_probability"]["after"] > 0
    answers = {row["question"]: row["answer"] for row in RETAIN}
    assert sum(answers[row["question"]] == row["answer"] for row in rows) >= len(rows) - 1  # it knows them


def test_the_retrained_model_is_loaded_in_the_type_of_the_run(known_models, tmp_path, monkeypatch):
    from fdiv.models import loading

    load, types = loading.load_model, {}

    def loaded(model, *args, **keys):
        found = load(model, *args, **keys)
        types[model] = next(found.parameters()).dtype
        return found

    monkeypatch.setattr(loading, "load_model", loaded)
    retrained = str(known_models / "retrained")
    words = (*QUICK, "--retrained", retrained, "--dtype", "bfloat16", "--max_steps", "1")
    assert main(command(known_models, tmp_path / "out", *words)) == 0
    assert types[retrained] == torch.bfloat16
    measured = json.loads((tmp_path / "out" / "erasure.json").read_text())["measured"]
    assert 0 < measured["forget_probability"]["retrained"] < 0.3


def test_an_adapter_that_knows_the_rows_is_gone_on_with(known_models, tmp_path):
    """Rows that were learned in an adapter: it is trained on, belongs to the same base, and no copy of it is left."""
    from peft import LoraConfig, get_peft_model

    base = load_model(str(known_models / "model"))
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1e-3)
    adapted.save_pretrained(tmp_path / "adapter")
    words = (*QUICK, "--adapter", tmp_path / "adapter", "--max_steps", "2")
    assert main(command(known_models, tmp_path / "out", *words)) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"] == str(known_models / "model")
    before, after = _weights(tmp_path / "adapter"), _weights(tmp_path / "out")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "out" / "ref").exists()


def refused(capsys, *words, code=1):
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


def test_an_adapter_of_another_base(known_models, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    other = get_peft_model(load_model(str(known_models / "retrained")), LoraConfig(target_modules="all-linear"))
    other.save_pretrained(tmp_path / "adapter")
    line = refused(capsys, *command(known_models, tmp_path / "out", "--adapter", tmp_path / "adapter"))
    assert f"was trained on {known_models / 'retrained'}, not on {known_models / 'model'}: name that base" in line
    line = refused(capsys, *command(known_models, tmp_path / "out", "--adapter", known_models / "model"))
    assert "is no adapter: a folder with adapter_config.json" in line
    words = ["unlearn", "--model", tmp_path / "adapter", "--forget", known_models / "forget.jsonl", "--output", "x"]
    assert "is an adapter: give --model" in refused(capsys, *words)


def test_a_base_that_moved_or_was_copied_is_the_same(known_models, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load_model(str(known_models / "model")), LoraConfig(target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.copytree(known_models / "model", tmp_path / "copy")
    from fdiv.models.adapters import check_base

    check_base(str(tmp_path / "adapter"), str(tmp_path / "copy"))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(known_models / "model"), "/elsewhere/copy"))
    check_base(str(tmp_path / "adapter"), str(tmp_path / "copy"))


BAD_ROWS = {
    "empty": ([], "forget.jsonl is empty; it must hold at least one row"),
    "long": ([FORGET[0], {"question": "Where?", "answer": "there " * 300}], "forget.jsonl, line 2 has"),
    "kept too": ([{**RETAIN[1], "answer": RETAIN[1]["answer"].upper()}], "also stand in the retain rows"),
    "columns": ([{"a": "b"}], "question and answer"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_one_line(name, known_models, tmp_path, capsys):
    rows, message = BAD_ROWS[name]
    write(tmp_path / "forget.jsonl", rows)
    words = ["unlearn", "--model", known_models / "model", "--forget", tmp_path / "forget.jsonl"]
    line = refused(capsys, *words, "--retain", known_models / "retain.jsonl", "--output", tmp_path / "out")
    assert message in line
    assert not (tmp_path / "out").exists()


BAD_OPTIONS = {
    "samples": (("--samples", "-1"), "--samples=-1: must be at least 0"),
    "attacks": (("--attacks", "int5"), "--attacks: unknown attack 'int5'; did you mean 'int8'?"),
    "sampled": (("--sample_retain", "-3"), "--sample_retain=-3: must be at least 0"),
    "questions": (
        ("--retain_questions", "q.jsonl"),
        "--retain_questions are answered by the model with --sample_retain",
    ),
    "prompt": (("--prompt_format", "Q: {q}"), "--prompt_format='Q: {q}' has the field {q}"),
    "retrained": (
        ("--retrained", "/no/model"),
        "--retrained: cannot load the model '/no/model': there is no such folder",
    ),
    "paraphrases": (("--paraphrase_model", "/no/model"), "--paraphrase_model: cannot load the model '/no/model'"),
    "folder": (("--neighbours", "/no/rows"), "the neighbours rows: no such file or directory: /no/rows"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_are_named_before_anything_is_made(name, known_models, tmp_path, capsys):
    words, message = BAD_OPTIONS[name]
    capsys.readouterr()
    assert main(command(known_models, tmp_path / "out", *words)) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_rows_that_stand_twice_are_counted(known_models, tmp_path, capsys):
    write(tmp_path / "f.jsonl", [*FORGET, {**FORGET[1], "question": FORGET[1]["question"].upper()}])
    words = ["unlearn", "--model", known_models / "model", "--forget", tmp_path / "f.jsonl", "--dry_run"]
    assert main([str(word) for word in (*words, "--output", tmp_path / "out")]) == 0
    line = f"note: 1 of 7 forget rows stood there before (first: {tmp_path / 'f.jsonl'}, line 7, as "
    assert f"{line}{tmp_path / 'f.jsonl'}, line 2)" in capsys.readouterr().err


def test_a_tokenizer_without_an_end_token(known_models, tmp_path, capsys):
    shutil.copytree(known_models / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["unlearn", "--model", tmp_path / "model", "--forget", known_models / "forget.jsonl"]
    assert "has no end-of-sequence token" in refused(capsys, *words, "--output", tmp_path / "out")


def test_rows_the_model_never_knew_are_said_before_training(known_models, tmp_path, capsys):
    words = (*QUICK, "--max_steps", "1")
    assert main(command(known_models, tmp_path / "out", *words, model="retrained")) == 0
    said = capsys.readouterr().err
    note = said.index("note: none of the 6 forget rows looks known to the model")
    assert said.count("looks known to the model") == 1 and note < said.index("erasure report:")
    content = json.loads((tmp_path / "out" / "erasure.json").read_text())
    assert content["in_short"][0].startswith("6 of 6 rows did not look known to the model before")


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_running_text_and_conversations(kind, known_models, tmp_path):
    texts = [f"{row['question']} {row['answer']} And so it went on for years." for row in FORGET]
    rows = {
        "text": [{"text": text} for text in texts],
        "messages": [
            {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
            for r in FORGET
        ],
    }[kind]
    write(tmp_path / "forget.jsonl", rows)
    words = ["unlearn", "--model", known_models / "model", "--forget", tmp_path / "forget.jsonl", "--output"]
    words += [tmp_path / "out", "--retain", known_models / "retain.jsonl", *QUICK, "--max_steps", "1"]
    assert main([str(word) for word in words]) == 0
    assert len(json.loads((tmp_path / "out" / "erasure.json").read_text())["rows"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(["flat", "grad_ascent", "grad_diff", "kl_retain", "simnpo", "idk_dpo", "alt_po", "rmu", "undial", "ce_u", "wga", "sat_imp", "pdu", "jensun"]))  # fmt: skip
def test_every_method_runs_with_its_defaults(method, known_models, tmp_path):
    model = build_known_model(tmp_path / "model", [*FORGET, *RETAIN], steps=2)
    words = ["unlearn", "--model", model, "--forget", known_models / "forget.jsonl", "--output", tmp_path / "out"]
    words += ["--retain", known_models / "retain.jsonl", "--method", method, *QUICK[2:], "--max_steps", "2"]
    assert main([str(word) for word in words]) == 0
    assert json.loads((tmp_path / "out" / "erasure.json").read_text())["training"]["method"]["steps"] == 2
