"""The student's own earlier weights as its teacher: what is compared, how the average moves, and on resume."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fdiv.distillation import FDistillConfig
from fdiv.divergences import get_divergence
from fdiv.errors import DataError
from tests.support.runs.f_distill import make_trainer, rows

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
STEPS = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 3}


def hinted(count=4):
    """Rows whose teacher reads a hint before the question."""
    return [{**row, "teacher_prompt": f"Count on by one. {row['prompt']}"} for row in rows(count)]


def trainer_of(model_dir, output, teacher, data=None, **options):
    return make_trainer(model_dir, None, data or hinted(), output, teacher=teacher, **(STEPS | options))


def dense(student, teacher, tokenizer, divergence, data):
    """The mean over tokens, row by row, each model on its own prompt."""
    total, tokens = 0.0, 0
    for row in data:
        completion = tokenizer(row["prompt"] + row["completion"])["input_ids"][
            len(tokenizer(row["prompt"])["input_ids"]) :
        ]
        completion = [*completion, tokenizer.eos_token_id][:24]
        logs = []
        for model, prompt in ((student, row["prompt"]), (teacher, row["teacher_prompt"])):
            ids = tokenizer(prompt)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1]
            logs.append(logits.double().log_softmax(-1))
        total += get_divergence(divergence).exact(*logs).sum().item()
        tokens += len(completion)
    return total / tokens


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Seen(TrainerCallback):
    """The student's weights after every step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights(model))


@pytest.mark.parametrize("kind", ["full", "fresh adapter", "trained adapter"])
def test_the_start_stays_what_it_was(kind, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model, options = AutoModelForCausalLM.from_pretrained(tiny_model_dir), {}
    if kind == "fresh adapter":
        options["peft_config"] = LoraConfig(**LORA)
    if kind == "trained adapter":
        model = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir) if kind != "trained adapter" else None
    if start is None:
        import copy

        start = copy.deepcopy(model).merge_and_unload()
    trainer = trainer_of(tiny_model_dir, tmp_path, "start", model=model, divergence="jensen_shannon", **options)
    before = dense(start, start, tokenizer, "jensen_shannon", hinted())
    assert before > 1e-4
    batch = trainer._prepare_inputs(hinted())
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(before, rel=1e-3)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    after = dense(trainer.model.eval(), start, tokenizer, "jensen_shannon", hinted())
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(after, rel=1e-3)
    assert after < before
    assert (trainer.teacher.reference.model is None) == (kind != "full")
    assert (trainer.teacher.reference.adapter is None) == (kind != "trained adapter")
    assert trainer.teacher.copies(kind != "full") == (kind == "full")


def test_the_average_is_the_recursion(tiny_model_dir, tmp_path):
    seen = Seen()
    trainer = trainer_of(tiny_model_dir, tmp_path, {"name": "ema", "decay": 0.75}, callbacks=[seen])
    expected = weights(trainer.model)
    trainer.train()
    for step in seen.steps:
        expected = {name: 0.75 * value + 0.25 * step[name] for name, value in expected.items()}
    found = weights(trainer.teacher.reference.model)
    moved = 0.0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        moved = max(moved, (value - seen.steps[-1][name]).abs().max().item())
    assert moved > 1e-4 and not any(
        parameter.requires_grad for parameter in trainer.teacher.reference.model.parameters()
    )


def test_the_average_of_an_adapter_is_that_of_its_matrices(tiny_model_dir, tmp_path):
    seen = Seen()
    trainer = trainer_of(
        tiny_model_dir, tmp_path, {"name": "ema", "decay": 0.75}, callbacks=[seen], peft_config=LoraConfig(**LORA)
    )
    expected = {name: value for name, value in weights(trainer.model).items() if ".default." in name}
    trainer.train()
    for step in seen.steps:
        expected = {name: 0.75 * value + 0.25 * step[name] for name, value in expected.items()}
    found = weights(trainer.model)
    for name, value in expected.items():
        torch.testing.assert_close(found[name.replace(".default.", ".ref.")], value)
    assert trainer.teacher.reference.model is None
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trained and all(".default." in name for name in trained)


@pytest.mark.parametrize("teacher", ["start", {"name": "ema", "decay": 0.6}], ids=["start", "ema"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_resumed_run_is_the_whole_run(teacher, lora, tiny_model_dir, tmp_path):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
    }

    def made():
        extra = {"peft_config": LoraConfig(**LORA)} if lora else {}
        return trainer_of(tiny_model_dir, tmp_path, teacher, **settings, **extra)

    whole = made()
    whole.train()
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(whole)
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_decay_or_start_is_another_run(tiny_model_dir, tmp_path):
    from fdiv.errors import CheckpointError

    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer_of(tiny_model_dir, tmp_path, {"name": "ema", "decay": 0.5}, **settings).train()
    with pytest.raises(CheckpointError, match="teacher is"):
        trainer_of(tiny_model_dir, tmp_path, {"name": "ema", "decay": 0.6}, **settings).train(
            resume_from_checkpoint=True
        )


def test_what_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(DataError, match="no column 'teacher_prompt', and the teacher is the student's own weights"):
        trainer_of(tiny_model_dir, tmp_path, "start", rows(4))
    empty = [*hinted(2), {**hinted(1)[0], "teacher_prompt": ""}]
    with pytest.raises(DataError, match="row 2: column 'teacher_prompt' is empty"):
        trainer_of(tiny_model_dir, tmp_path, "start", empty)
    with pytest.raises(DataError, match="teacher_model is given, and the teacher is the running average"):
        make_trainer(tiny_model_dir, tiny_model_dir, hinted(), tmp_path, teacher="ema")
    half = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    with pytest.raises(DataError, match="in half precision, which rounds them away"):
        trainer_of(tiny_model_dir, tmp_path, "ema", model=half)
    machine = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    for options, message in (
        ({"teacher": "emma"}, "unknown teacher 'emma'; did you mean 'ema'"),
        ({"teacher": None}, "teacher: a name or a mapping"),
        ({"teacher": {"decay": 0.5}}, "unknown teacher None"),
        ({"teacher": {"name": "ema", "decay": 1.0}}, "teacher: decay=1.0: must be at least 0 and below 1"),
        ({"teacher": {"name": "ema", "decay": float("nan")}}, "without NaN and infinities"),
        ({"teacher": {"name": "ema", "rate": 0.5}}, "teacher 'ema' has no argument 'rate'"),
        ({"teacher": "start", "teacher_model_name_or_path": "x"}, "teacher_model_name_or_path='x': the teacher is"),
        ({"teacher": "torch.nn:Linear"}, "must be a dataclass derived from"),
    ):
        with pytest.raises(ValueError, match=message):
            FDistillConfig(**machine, **options)


def test_another_prompt_for_a_teacher_in_memory(tiny_model_dir, tmp_path):
    """The column holds for every teacher; left padding of two lengths changes nothing."""
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    trainer = make_trainer(tiny_model_dir, teacher, hinted(), tmp_path, divergence="jensen_shannon")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(hinted()))
    assert loss.item() == pytest.approx(dense(teacher, teacher, tokenizer, "jensen_shannon", hinted()), rel=1e-3)
    assert Dataset.from_list(hinted()).column_names[-1] in type(trainer).optional_columns
