"""The evaluation `to_teacher` against dense sums, and the builders of students."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, SmolLM3Config, SmolLM3ForCausalLM

from fdiv.distillation.evaluation import ToTeacherEvalConfig
from fdiv.divergences import get_distance
from fdiv.errors import DataError
from fdiv.evaluation import EvalContext
from fdiv.models.tiny import build_tiny_model
from fdiv.recipes.tasks.novels.distillation import ThinnedStudentConfig
from fdiv.recipes.tasks.thinned import kept_layers, write_thinned
from fdiv.recipes.tasks.tiny.distillation import TinyDistillationConfig
from fdiv.recipes.tasks.tofu.distillation import TofuDistillationConfig
from tests.support.runs.f_distill import make_teacher, messages, rows


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def context(path, **arguments):
    return EvalContext(training_args=type("Arguments", (), arguments)(), output_dir=path)


def test_numbers_are_dense_sums_over_tokens(tiny_model_dir, teacher_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    student, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_model_dir, teacher_dir))
    spec = {"name": "alpha", "alpha": 0.3}
    config = ToTeacherEvalConfig(
        str(teacher_dir), divergences=["reverse_kl", spec, "cauchy_schwarz"], batch_size=2, max_rows=5, max_tokens=9
    )
    found = config.evaluate(student, tokenizer, {"test": Dataset.from_list(rows(7))}, context(tmp_path))
    sums, same, tokens = {}, 0, 0
    for row in rows(5):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["prompt"] + row["completion"])["input_ids"][len(prompt) :], tokenizer.eos_token_id][
            :9
        ]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            log_p, log_q = (
                model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for model in (student, teacher)
            )
        for f in map(get_distance, ("reverse_kl", spec, "cauchy_schwarz")):
            sums[f.label] = sums.get(f.label, 0.0) + f.exact(log_p, log_q).sum().item()
        same += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        tokens += len(answer)
    for label, total in sums.items():
        assert found[f"to_teacher/{label}"] == pytest.approx(total / tokens, rel=1e-4)
        assert found[f"to_teacher/{label}_se"] > 0
    assert found["to_teacher/agreement"] == pytest.approx(same / tokens)
    assert config.summary_metrics == (
        "to_teacher/reverse_kl",
        "to_teacher/alpha(0.3)",
        "to_teacher/cauchy_schwarz",
        "to_teacher/agreement",
    )


def test_a_student_is_at_no_distance_from_itself(tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    found = ToTeacherEvalConfig().evaluate(
        student, tokenizer, {"test": Dataset.from_list(messages(3))},
        context(tmp_path, teacher_model_name_or_path=str(tiny_model_dir)),
    )  # fmt: skip
    assert found["to_teacher/agreement"] == 1
    assert all(abs(value) < 1e-6 for name, value in found.items() if name != "to_teacher/agreement")


def test_the_teacher_is_loaded_as_the_run_loads_it(tiny_model_dir, teacher_dir, tmp_path, monkeypatch):
    """Revision, loading options and trust of the run's own teacher; none of them for one that `teacher` names."""
    from fdiv.distillation import evaluation

    loaded, tokenizers = [], []

    def load(name, revision=None, **loading):
        loaded.append((name, revision, loading))
        return AutoModelForCausalLM.from_pretrained(name, dtype=loading.get("dtype", "float32"))

    def read_tokenizer(name, **loading):
        tokenizers.append(loading)
        return AutoTokenizer.from_pretrained(name)

    monkeypatch.setattr(evaluation, "load_teacher", load)
    monkeypatch.setattr(evaluation, "teacher_tokenizer", read_tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    data, name = {"test": Dataset.from_list(rows(2))}, str(teacher_dir)
    run = context(
        tmp_path, teacher_model_name_or_path=name, teacher_model_revision="v2", trust_remote_code=True,
        teacher_model_init_kwargs={"attn_implementation": "eager"},
    )  # fmt: skip
    ToTeacherEvalConfig().evaluate(student, tokenizer, data, run)
    ToTeacherEvalConfig(name).evaluate(student, tokenizer, data, run)
    assert loaded == [(name, "v2", {"trust_remote_code": True, "attn_implementation": "eager"}), (name, None, {})]
    assert tokenizers == [{"trust_remote_code": True}, {}]


def test_the_teacher_of_the_run_keeps_its_own_depth(tiny_model_dir, teacher_dir, tmp_path):
    """A run whose teacher is loaded with one of its three layers: the evaluation measures against that one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    one_layer = AutoModelForCausalLM.from_pretrained(teacher_dir, num_hidden_layers=1)
    run = context(
        tmp_path, teacher_model_name_or_path=str(teacher_dir), teacher_model_init_kwargs={"num_hidden_layers": 1}
    )
    found = ToTeacherEvalConfig().evaluate(one_layer, tokenizer, {"test": Dataset.from_list(rows(3))}, run)
    assert found["to_teacher/agreement"] == 1 and found["to_teacher/reverse_kl"] == pytest.approx(0, abs=1e-6)


def test_what_it_refuses(tiny_model_dir, teacher_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    data = {"test": Dataset.from_list(rows(2))}
    with pytest.raises(ValueError, match="needs a teacher"):
        ToTeacherEvalConfig().evaluate(student, tokenizer, data, context(tmp_path))
    with pytest.raises(DataError, match="the valid split is missing"):
        ToTeacherEvalConfig(str(teacher_dir), split="valid").evaluate(student, tokenizer, data, context(tmp_path))
    longer = AutoTokenizer.from_pretrained(tiny_model_dir)
    longer.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
    data_with = {"test": Dataset.from_list([*rows(2), {"prompt": "a", "completion": " b<|done|>"}])}
    with pytest.raises(DataError, match=r"the test split: 1 of 3 rows have a token that the teacher lacks, .* row 2"):
        ToTeacherEvalConfig(str(teacher_dir)).evaluate(student, longer, data_with, context(tmp_path))
    other = build_tiny_model(tmp_path / "other", vocab_texts=["quite other words, and no others"], vocab_size=300)
    with pytest.raises(DataError, match="different vocabularies"):
        ToTeacherEvalConfig(str(other)).evaluate(student, tokenizer, data, context(tmp_path))
    for options, message in (({"divergences": []}, "is empty"), ({"divergences": ["kl"]}, "ambiguous"), ({"batch_size": 0}, "batch_size"), ({"max_rows": 0}, "max_rows must be at least 1, got 0; leave it out for all"), ({"max_rows": -2}, "got -2")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ToTeacherEvalConfig(**options)


def test_layers_are_spread_evenly():
    assert kept_layers(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert kept_layers(4, 4) == [0, 1, 2, 3] and kept_layers(4, 1) == [0] and kept_layers(7, 2) == [0, 6]
    with pytest.raises(ValueError, match="the teacher has 3"):
        kept_layers(3, 4)


def test_a_thinned_student_has_its_teachers_layers(teacher_dir, tmp_path):
    """All layers kept: the same model; one of three: the first, and it generates (its cache has one layer)."""
    text = " ".join(f"On day {day} the fox of the wood met Bruno near the mill and ran away." for day in range(80))
    for name in ("Seen", "Unseen"):
        (tmp_path / f"{name}.txt").write_text(text)
    options = {"teacher": str(teacher_dir), "data": str(tmp_path), "train_novels": ["Seen"], "test_novels": ["Unseen"]}
    options |= {"passages": 3, "passage_words": 32, "prompt_words": 4}
    keys = ThinnedStudentConfig(**options, layers=3).build(tmp_path / "whole")
    one, other = (
        AutoModelForCausalLM.from_pretrained(keys[f"{which}model_name_or_path"]) for which in ("", "teacher_")
    )
    ids = torch.arange(10).unsqueeze(0)
    torch.testing.assert_close(one(ids).logits, other(ids).logits)
    small = ThinnedStudentConfig(**options, layers=1).build(tmp_path / "small")
    student = AutoModelForCausalLM.from_pretrained(small["model_name_or_path"])
    assert student.config.num_hidden_layers == len(student.model.layers) == 1
    assert student.generate(ids, max_new_tokens=2, min_new_tokens=2).shape == (1, 12)
    lines = [json.loads(line) for line in (tmp_path / "small" / "data" / "train.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(len(row["prompt"].split()) == 4 and row["completion"][0] == " " for row in lines)
    for changes, message in (
        ({"test_novels": ["Seen"]}, "stands in"),
        ({"teacher": ""}, "teacher is not set"),
        ({"prompt_words": 32}, "below passage_words"),
        ({"layers": 0}, "layers=0"),
    ):
        with pytest.raises(ValueError, match=message):
            ThinnedStudentConfig(**(options | changes))


def smollm3(folder, tokenizer_dir, layers=8, **options):
    """A tiny SmolLM3, every fourth layer of which does not see positions, with a tokenizer beside it."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = SmolLM3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=0,
        eos_token_id=list(range(layers)), **options,
    )  # fmt: skip
    torch.manual_seed(0)
    SmolLM3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_thinned_smollm3_keeps_its_layers_positions(tiny_model_dir, tmp_path):
    """Of 8 layers 0, 4 and 7 stay, the last of which sees no positions; written and read again, the student says what
    the teacher says without its other layers."""
    source = smollm3(tmp_path / "teacher", tiny_model_dir)
    teacher = AutoModelForCausalLM.from_pretrained(source)
    assert teacher.config.no_rope_layers == [1, 1, 1, 0, 1, 1, 1, 0]
    write_thinned(str(source), 3, tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.no_rope_layers == [1, 1, 0] and student.config.num_hidden_layers == 3
    assert student.config.layer_types == ["full_attention"] * 3
    assert student.config.eos_token_id == list(range(8))  # as many as layers, by chance
    assert [layer.self_attn.use_rope for layer in student.model.layers] == [1, 1, 0]
    teacher.model.layers = torch.nn.ModuleList([teacher.model.layers[number] for number in (0, 4, 7)])
    teacher.config.num_hidden_layers = 3
    ids = torch.arange(12).unsqueeze(0)
    torch.testing.assert_close(student(ids, use_cache=False).logits, teacher(ids, use_cache=False).logits)
    assert student.generate(ids, max_new_tokens=2, min_new_tokens=2).shape == (1, 14)


def test_layers_without_attention_are_refused(tiny_model_dir, tmp_path, monkeypatch):
    source = smollm3(tmp_path / "teacher", tiny_model_dir, layers=2)
    model = AutoModelForCausalLM.from_pretrained(source)
    del model.model.layers[1].self_attn
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    with pytest.raises(
        ValueError, match=r"layer 1 of SmolLM3ForCausalLM has no `self_attn`.*; take a teacher"
    ) as error:
        write_thinned(str(source), 1, tmp_path / "student")
    assert "\n" not in str(error.value)


def test_the_tiny_pair(tmp_path):
    keys = TinyDistillationConfig(teacher_steps=20, rows=8).build(tmp_path)
    sizes = [AutoModelForCausalLM.from_pretrained(keys[key]).config.hidden_size for key in ("model_name_or_path", "teacher_model_name_or_path")]  # fmt: skip
    assert sizes == [16, 64]
    train, test = ((tmp_path / "data" / f"{split}.jsonl").read_text().splitlines() for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 2) and set(json.loads(train[0])) == {"prompt", "completion"}
    with pytest.raises(ValueError, match="teacher_steps"):
        TinyDistillationConfig(teacher_steps=1)


def test_questions_that_the_teacher_never_saw(tiny_model_dir, tmp_path):
    """Five authors of 20 rows, of which the teacher saw a whole one and half of another: 70 rows over four authors."""
    every = [
        {"question": f"What of {author}, {row}?", "answer": f"It is {row}."}
        for author in range(5)
        for row in range(20)
    ]
    for name, part in (("retain90", every), ("retain_perturbed", every[:30])):
        (tmp_path / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in part))
    options = {"teacher": str(tiny_model_dir), "data": str(tmp_path), "validation_authors": 1, "test_authors": 1}
    keys = TofuDistillationConfig(**options).build(tmp_path / "out")
    assert keys["teacher_model_name_or_path"] == str(tiny_model_dir) and keys["dataset_test_split"] == "test"
    splits = {
        split: [json.loads(line) for line in (tmp_path / "out" / "data" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation", "test")
    }
    authors = {split: {row["prompt"][0]["content"].split(",")[0] for row in part} for split, part in splits.items()}
    assert [len(names) for names in authors.values()] == [2, 1, 1] and len(set.union(*authors.values())) == 4
    asked = [row["prompt"][0]["content"] for part in splits.values() for row in part]
    assert sorted(asked) == sorted(row["question"] for row in every[30:])
    row = splits["train"][0]
    assert row["completion"] == [
        {"role": "assistant", "content": "It is " + row["prompt"][0]["content"][-3:-1].strip() + "."}
    ]
    student = AutoModelForCausalLM.from_pretrained(keys["model_name_or_path"])
    assert student.config.num_hidden_layers == 1
    with pytest.raises(ValueError, match="nothing to train on: there are 4 authors"):
        TofuDistillationConfig(**(options | {"test_authors": 3})).build(tmp_path / "all")
    (tmp_path / "retain90.json").write_text(json.dumps({"question": "", "answer": "a"}) + "\n")
    with pytest.raises(DataError, match="column 'question' is empty"):
        TofuDistillationConfig(**options).build(tmp_path / "bad")
    for changes, message in (({"teacher": ""}, "teacher is not set"), ({"layers": 0}, "layers=0")):
        with pytest.raises(ValueError, match=message):
            TofuDistillationConfig(**(options | changes))
