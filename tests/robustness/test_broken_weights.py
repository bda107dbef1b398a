"""Weights that are NaN or infinite are saved nowhere, and the message of a stop says what stands."""

import math
import re

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from fdiv.errors import CheckpointError, DataError, NonFiniteLossError
from fdiv.training.checkpoints import checkpoint_folders
from fdiv.training.finite import broken_weight
from tests.support.runs.all_trainers import TRAINERS, build
from tests.support.runs.f_dpo import LORA, preference_rows

NOTHING = "No checkpoint was written: start again"
NOT_AT_ALL = r"No checkpoint was written \(save_strategy: no\): start again"


class Break(TrainerCallback):
    """Puts a value into one entry of a trained weight after a step, as an optimizer's overflow does."""

    def __init__(self, after, value):
        self.after, self.value = after, value

    def on_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step == self.after - 1:
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            trained[-1].data.view(-1)[-1] = self.value


def stop_of(trainer):
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    assert "\n" not in str(error.value)
    return str(error.value)


def saved(output):
    """What stands in a folder: the steps of the checkpoints, and whether there are weights beside them."""
    steps = [int(folder.name.split("-")[1]) for folder in checkpoint_folders(output)]
    return steps, bool(list(output.glob("*.safetensors")))


@pytest.mark.parametrize("name", TRAINERS)
def test_a_broken_first_step_publishes_nothing(name, tiny_model_dir, tmp_path):
    for strategy, end in (("no", NOT_AT_ALL), ("steps", NOTHING)):
        output = tmp_path / strategy
        breaking = [Break(1, math.inf)]
        trainer = build(name, tiny_model_dir, output, save_strategy=strategy, save_steps=1, callbacks=breaking)
        text = stop_of(trainer)
        assert re.search(r"step 1: the optimizer made weights NaN or infinite \(\S+weight\); they are not saved", text)
        assert re.search(end, text)
        with pytest.raises(NonFiniteLossError, match="step 1: the optimizer made weights NaN or infinite"):
            trainer.save_model(str(output / "model"))
        assert saved(output) == ([], False) and not (output / "model").exists()


EVALUATING = {"eval_strategy": "steps", "metric_for_best_model": "loss"}
#: save settings → what is broken, and the checkpoints of steps 1 and 2 that stand
WAYS = {
    "no": ({"save_strategy": "no"}, math.nan, []),
    "every step": ({"save_strategy": "steps", "save_steps": 1}, math.inf, [1, 2]),
    "every second": ({"save_strategy": "steps", "save_steps": 2}, -math.inf, [2]),
    "epoch": ({"save_strategy": "epoch"}, math.inf, []),
    "load best": (
        {"save_strategy": "steps", "save_steps": 2, "eval_steps": 2, "load_best_model_at_end": True, **EVALUATING},
        math.nan,
        [2],
    ),
    "best": ({"save_strategy": "best", "eval_steps": 1, **EVALUATING}, math.inf, [1, 2]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_breaks_a_weight(way, tiny_model_dir, tmp_path):
    """Step 3, which ends an epoch; what was saved before stands, and the message names the newest of it."""
    settings, value, steps = WAYS[way]
    if "eval_strategy" in settings:
        settings = settings | {"eval_dataset": Dataset.from_list(preference_rows(4))}
    trainer = build("f_dpo", tiny_model_dir, tmp_path, callbacks=[Break(3, value)], **settings)
    text = stop_of(trainer)
    assert "step 3: the optimizer made weights NaN or infinite" in text
    found, weights = saved(tmp_path)
    assert (set(found) <= {1, 2} if way == "best" else found == steps) and not weights
    if found:
        assert text.endswith(
            f"{tmp_path}/checkpoint-{found[-1]} is complete: go on from there with resume_from_checkpoint: true"
        )
        assert broken_weight(AutoModelForCausalLM.from_pretrained(checkpoint_folders(tmp_path)[-1])) is None
        trainer = build("f_dpo", tiny_model_dir, tmp_path, **settings)
        trainer.train(resume_from_checkpoint=True)  # which is what the message says
        assert trainer.state.global_step == 6
    else:
        assert text.endswith("start again")


@pytest.mark.parametrize("name", TRAINERS)
def test_the_last_step_of_all(name, tiny_model_dir, tmp_path):
    """Nothing comes after it that would meet the weights."""
    trainer = build(name, tiny_model_dir, tmp_path, max_steps=1, callbacks=[Break(1, math.inf)])
    assert "step 1: the optimizer made weights NaN or infinite" in stop_of(trainer)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter(value, tiny_model_dir, tmp_path):
    from peft import LoraConfig

    trainer = build(
        "f_dpo", tiny_model_dir, tmp_path, peft_config=LoraConfig(**LORA), save_strategy="steps", save_steps=1,
        callbacks=[Break(2, value)],
    )  # fmt: skip
    text = stop_of(trainer)
    assert "step 2: the optimizer made weights NaN or infinite" in text and "lora_" in text
    assert saved(tmp_path) == ([1], False)
    with pytest.raises(NonFiniteLossError):
        trainer.save_model()
    assert saved(tmp_path) == ([1], False)


@pytest.mark.parametrize("name", ["f_dpo", "flat"])
@pytest.mark.parametrize(
    ("strategy", "end"), [("no", NOT_AT_ALL), ("epoch", NOTHING), ("steps", "checkpoint-2 is com")]
)
def test_a_loss_that_is_not_finite(name, strategy, end, tiny_model_dir, tmp_path, monkeypatch):
    """In the third step, with weights as they should be."""
    trainer = build(name, tiny_model_dir, tmp_path, save_strategy=strategy, save_steps=2)
    record = trainer.record_examples

    def poisoned(columns):
        loss = columns["loss"]
        record(columns | {"loss": loss * math.nan if trainer.state.global_step == 2 else loss})

    monkeypatch.setattr(trainer, "record_examples", poisoned)
    text = stop_of(trainer)
    assert text.startswith("step 3: the loss is nan")
    assert (
        "Training stopped before the optimizer step: the weights in memory are those after step 2, and finite" in text
    )
    assert re.search(end, text)


def test_a_model_that_is_broken_from_the_start(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.lm_head.weight.data[3, 4] = math.nan
    text = stop_of(build("f_dpo", tiny_model_dir, tmp_path, model=model))
    assert "step 0: the model was loaded with weights that are NaN or infinite (" in text


def test_a_checkpoint_of_another_run_is_none_to_go_on_from(tiny_model_dir, tmp_path):
    build("f_dpo", tiny_model_dir, tmp_path, save_strategy="steps", save_steps=2, divergence="reverse_kl").train()
    assert re.search(NOT_AT_ALL, stop_of(build("f_dpo", tiny_model_dir, tmp_path, callbacks=[Break(1, math.nan)])))


def test_a_full_disk_before_the_first_checkpoint_and_after(tiny_model_dir, tmp_path, monkeypatch):
    import fdiv.training.resume

    publish, full_at = fdiv.training.resume.publish, [2]

    def full(staged, *rest):
        if staged.name == f"checkpoint-{full_at[0]}":
            raise OSError(28, "No space left on device")
        return publish(staged, *rest)

    monkeypatch.setattr("fdiv.training.resume.publish", full)
    settings = {"save_strategy": "steps", "save_steps": 2}
    for step, end in ((2, NOTHING), (4, "checkpoint-2 is complete: go on from there")):
        full_at[0] = step
        with pytest.raises(CheckpointError, match=f"step {step} could not be written .* Make room.*{end}"):
            build("flat", tiny_model_dir, tmp_path, **settings).train()


def test_broken_weight_names_the_first():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert broken_weight(model) is None
    model[1].bias.data[1] = -math.inf
    model[2].weight.data[0, 0] = math.nan
    assert broken_weight(model) == "1.bias"
    model[1].bias.requires_grad = False
    assert broken_weight(model) == "2.weight" and broken_weight(model, trained=False) == "1.bias"


@pytest.mark.parametrize("part", ["base", "adapter", "number type"])
def test_a_merge_of_broken_weights_is_refused(part, tiny_model_dir, tmp_path):
    from peft import LoraConfig, get_peft_model

    from fdiv.training.merge import merge_adapter

    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    if part != "adapter":
        model.model.norm.weight.data[0] = math.inf if part == "base" else 1e20  # float16 ends at 65,504
    model.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((tiny_model_dir / name).read_bytes())
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA))
    if part == "adapter":
        next(weight for weight in adapted.parameters() if weight.requires_grad).data[0, 0] = math.inf
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(DataError, match="NaN or infinite|cannot be merged"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="fp16" if part == "number type" else "auto")
    assert not (tmp_path / "merged").exists()
