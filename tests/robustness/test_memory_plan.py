"""The memory plan against bytes counted in real training steps on models of sizes it was not written for, and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainerCallback

from fdiv.cli import main
from fdiv.errors import FdivError
from fdiv.memory.count import ModelCount, Weight, count_saved
from fdiv.memory.placement import Placement, read_placement
from fdiv.memory.plan import MemoryPlan, device_bytes, optimizer_bytes, plan_memory
from fdiv.models.tiny import build_tiny_model
from fdiv.recipe.load import load_recipe

SIZES = {
    "small": {"hidden_size": 96, "layers": 3, "head_dim": 48, "max_positions": 256},
    "wide": {"hidden_size": 192, "layers": 2, "head_dim": 32, "max_positions": 160, "vocab_size": 300},
    "gpt2": {"hidden_size": 160, "layers": 5, "head_dim": 40, "max_positions": 128, "architecture": "gpt2"},
}


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sizes")
    return {name: build_tiny_model(root / name, **size) for name, size in SIZES.items()}


class _Count(TrainerCallback):
    """Bytes that a real step holds: gradients before the optimizer's step, its state and the weights after it."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.bytes, loss = trainer, {}, trainer.compute_loss

        def counted(*args: Any, **kwargs: Any) -> Any:
            box = []
            saved = count_saved(trainer.model, lambda: box.append(loss(*args, **kwargs)))
            self.bytes["activations"] = max(saved, self.bytes.get("activations", 0))
            return box[0]

        trainer.compute_loss = counted
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        gradients = [parameter.grad for parameter in self.trainer.model.parameters()]
        self.bytes["gradients"] = sum(gradient.nbytes for gradient in gradients if gradient is not None)

    def on_step_end(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        states = [value for state in optimizer.state.values() for value in state.values()]
        self.bytes["optimizer"] = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
        model = self.trainer.model
        self.bytes["weights"] = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        reference = getattr(self.trainer, "ref_model", None)
        if reference is None and getattr(self.trainer, "reference", None) is not None:
            reference = self.trainer.reference.model
        self.bytes["reference"] = 0 if reference is None else sum(p.nbytes for p in reference.parameters())


def planned_and_counted(model_dir: Path, tmp_path: Path, rows: Any, prompt_tokens=None, trainer_options=None, **keys):
    """The plan of a recipe, and what one step of the same recipe's trainer held."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import get_peft_config

    from fdiv.run.data import model_arguments

    keys = {
        "model_name_or_path": str(model_dir), "output_dir": str(tmp_path / "out"), "use_cpu": True, "max_steps": 1,
        "per_device_train_batch_size": 3, "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False,
        "disable_tqdm": True, **keys,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(f"{key}: {str(value) if not isinstance(value, bool) else str(value).lower()}"
                              for key, value in keys.items()))  # fmt: skip
    recipe = load_recipe(path)
    configs = recipe.configs()
    plan = plan_memory(recipe, configs, read_placement(configs.training), prompt_tokens)
    configs.training.model_init_kwargs = model_arguments(configs)
    trainer = recipe.method(
        model=str(model_dir),
        args=configs.training,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=get_peft_config(configs.model),
        **(trainer_options or {}),
    )
    count = _Count(trainer)
    trainer.train()
    return plan, count.bytes


def check(plan: MemoryPlan, counted: dict[str, int]) -> None:
    """Every part and the sum within 15 %; what is exact by construction within 1 %."""
    found = {name: plan.device[name] for name in counted}
    for name, value in counted.items():
        tolerance = 0.15 if name == "activations" else 0.01
        assert found[name] == pytest.approx(value, rel=tolerance), name
    assert sum(found.values()) == pytest.approx(sum(counted.values()), rel=0.15)


def pairs() -> list[dict[str, str]]:
    """Three chosen answers longer than any `max_length` here, beside short rejected ones: a padded batch."""
    return [{"prompt": f"Tell {i}:", "chosen": " 7 8" * 200, "rejected": " no" * (i + 1)} for i in range(3)]


@pytest.mark.parametrize(
    ("size", "keys"),
    [
        ("small", {"max_length": 150}),
        ("small", {"max_length": 150, "gradient_checkpointing": True}),
        ("wide", {"max_length": 96, "bf16": True}),
        ("wide", {"max_length": 96, "use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}),
        ("gpt2", {"max_length": 120, "optim": "adafactor"}),
    ],
    ids=["llama", "checkpointing", "autocast", "lora", "gpt2-adafactor"],
)
def test_f_dpo_holds_what_the_plan_says(size, keys, model_dirs, tmp_path):
    check(*planned_and_counted(model_dirs[size], tmp_path, pairs(), method="f_dpo", divergence="reverse_kl", **keys))


@pytest.mark.parametrize(("method", "size"), [("flat", "wide"), ("npo", "small"), ("undial", "gpt2")])
def test_unlearning_holds_what_the_plan_says(method, size, model_dirs, tmp_path):
    from datasets import Dataset

    rows = [{"prompt": f"Tell {i}:", "completion": " 7 8" * (200 if i else 20)} for i in range(3)]
    retain = Dataset.from_list([{"prompt": f"Say {i}:", "completion": " one" * 200} for i in range(3)])
    # The plan is for rows of max_length: a template answer that short rows would make narrower is as long.
    settings = {"template_source": "fixed", "template_text": "7 8 " * 200} if method == "flat" else {}
    options = {} if method == "flat" else {"retain_dataset": retain}
    check(
        *planned_and_counted(model_dirs[size], tmp_path, rows, None, options, method=method, max_length=90, **settings)
    )


def test_dph_holds_what_the_plan_says(model_dirs, tmp_path):
    from transformers import AutoTokenizer

    from tests.support.runs.dph import PROMPTS, cache, reward

    tokenizer = AutoTokenizer.from_pretrained(model_dirs["small"])
    cache(model_dirs["small"]).save(tmp_path / "cache.json")
    plan, counted = planned_and_counted(
        model_dirs["small"],
        tmp_path,
        [{"prompt": prompt} for prompt in PROMPTS],
        max(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS),
        {"reward_funcs": reward},
        method="dph",
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=60,
        rehearsal_cache=tmp_path / "cache.json",
        rehearsal_batch_size=2,
    )
    check(plan, counted)
    # 8 completions of prompt + 60 tokens, 3 layers, keys and values of one head, 48 wide, float32.
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS) + 60
    cache_line = next(name for name in plan.apart if name.startswith("keys and values"))
    assert plan.apart[cache_line] == 8 * longest * 3 * 2 * 1 * 48 * 4


# ---------------------------------------------------------------- by hand
def model(itemsize: int) -> ModelCount:
    """100,100 trained and 5,000 frozen weights, without buffers."""
    weights = [Weight((1000, 100), itemsize, True), Weight((100,), itemsize, True), Weight((50, 100), itemsize, False)]
    return ModelCount(weights, 105_100 * itemsize, activations=777, layers=10)


@pytest.mark.parametrize(
    ("strategy", "precision", "itemsize", "expected"),
    [
        ("single", "bf16", 4, {"weights": 420_400, "gradients": 400_400, "optimizer": 800_800, "reference": 420_400}),
        ("ddp", "no", 4, {"weights": 420_400, "gradients": 400_400, "optimizer": 800_800, "reference": 420_400}),
        # 16-bit weights and gradients; 8 bytes of Adam's state and a float32 copy for each trained weight, over 4.
        (
            "zero1", "bf16", 2,
            {"weights": 210_200, "gradients": 200_200, "optimizer": 200_200, "float32 copies": 100_100,
             "reference": 210_200},
        ),
        (
            "zero2", "bf16", 2,
            {"weights": 210_200, "gradients": 50_050, "optimizer": 200_200, "float32 copies": 100_100,
             "reference": 210_200},
        ),
        (
            "zero3", "bf16", 2,
            {"weights": 52_550, "gradients": 50_050, "optimizer": 200_200, "float32 copies": 100_100,
             "reference": 52_550},
        ),
        # Without mixed precision the engine keeps what was loaded, and its float32 copies all the same.
        (
            "zero3", "no", 4,
            {"weights": 105_100, "gradients": 100_100, "optimizer": 200_200, "float32 copies": 100_100,
             "reference": 105_100},
        ),
        # FSDP gathers in 16 bits; what it keeps is float32.
        ("fsdp", "bf16", 4, {"weights": 105_100, "gradients": 100_100, "optimizer": 200_200, "reference": 105_100}),
    ],
)  # fmt: skip
def test_shares_by_hand(strategy, precision, itemsize, expected):
    processes = 1 if strategy == "single" else 4
    plan = device_bytes(model(itemsize), Placement("x", strategy, processes, precision), "adamw_torch", references=1)
    assert plan.device == expected | {"activations": 777}
    assert plan.total == sum(expected.values()) + 777
    assert plan.host == {}


def test_an_adapter_under_deepspeed_is_narrowed_too():
    count = ModelCount([Weight((1000,), 2, False), Weight((10,), 4, True)], 2040, activations=0)
    plan = device_bytes(count, Placement("x", "zero2", 2, "bf16"), "adamw_torch_fused", references=0)
    assert plan.device == {
        "weights": 2020, "gradients": 10, "optimizer": 40, "float32 copies": 20, "reference": 0, "activations": 0
    }  # fmt: skip


def test_weights_that_are_narrow_only_while_they_are_gathered():
    count = model(2).held_in(4)
    assert (count.stored, count.activations) == (420_400, 777)
    assert count == model(4)


def test_offloaded_parts_are_host_memory():
    args = torch.nn.Module()  # anything with these two attributes
    args.bf16, args.fp16 = False, False
    placement = read_placement(args, "zero3_offload", num_processes=4)
    assert (placement.strategy, placement.processes, placement.precision) == ("zero3", 4, "bf16")
    plan = device_bytes(model(2), placement, "adamw_torch", references=1)
    assert plan.device == {"activations": 777}
    assert plan.host == {
        "weights": 52_550, "gradients": 50_050, "optimizer": 200_200, "float32 copies": 100_100, "reference": 52_550
    }  # fmt: skip
    plan = device_bytes(model(2), read_placement(args, "zero2_offload", 4), "adamw_torch", references=0)
    assert plan.device == {"weights": 210_200, "reference": 0, "activations": 777}
    assert plan.host == {"gradients": 50_050, "optimizer": 200_200, "float32 copies": 100_100}


@pytest.mark.parametrize(
    ("name", "strategy", "processes"),
    [("single", "single", 1), ("multi_gpu", "ddp", 8), ("cpu_ddp", "ddp", 2), ("zero1", "zero1", 8),
     ("cpu_zero2", "zero2", 2), ("fsdp2", "fsdp", 8)],
)  # fmt: skip
def test_packaged_configurations_are_understood(name, strategy, processes):
    args = torch.nn.Module()
    args.bf16, args.fp16 = False, False
    placement = read_placement(args, name)
    assert (placement.strategy, placement.processes, placement.offloaded) == (strategy, processes, frozenset())


def test_what_is_not_modelled_is_said(tmp_path):
    args = torch.nn.Module()
    args.bf16, args.fp16 = False, False
    (tmp_path / "tpu.yaml").write_text("distributed_type: XLA")
    with pytest.raises(FdivError, match="distributed_type XLA is not modelled"):
        read_placement(args, str(tmp_path / "tpu.yaml"))
    (tmp_path / "fsdp.yaml").write_text("distributed_type: FSDP\nfsdp_config: {fsdp_sharding_strategy: HYBRID_SHARD}")
    with pytest.raises(FdivError, match="HYBRID_SHARD is not modelled"):
        read_placement(args, str(tmp_path / "fsdp.yaml"))
    assert device_bytes(model(4), Placement(), "lomo", references=0).device["optimizer"] is None


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ("adamw_torch", 2 * 4 * 8392), ("sgd", 0), ("rmsprop", 4 * 8392), ("paged_adamw_32bit", 8 * 8392),
        ("adafactor", 4 * (64 + 128 + 200)),
        # A byte for each of two states of 64·128 weights and a scale for 256 of them; 200 weights stay float32.
        ("adamw_bnb_8bit", 2 * (8192 + 32 * 4) + 2 * 4 * 200),
        ("lion_8bit", 8192 + 32 * 4 + 4 * 200),
        ("galore_adamw", None),
    ],
)  # fmt: skip
def test_optimizer_state_by_hand(optim, expected):
    assert optimizer_bytes(optim, [Weight((64, 128), 4, True), Weight((200,), 4, True)]) == expected


# ---------------------------------------------------------------- the command
def test_dry_run_prints_the_plan_on_stderr(model_dirs, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"method: f_dpo\ndivergence: reverse_kl\nmodel_name_or_path: {model_dirs['small']}\nmax_length: 100\n"
        "use_cpu: true\nbf16: false\nper_device_train_batch_size: 2\ndataset_name: none.jsonl\n"
    )
    assert main(["run", str(path), "--dry_run", "--accelerate", "cpu_zero2", "--num_processes", "4"]) == 0
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out)["method"] == "f_dpo"
    assert "memory plan" not in printed.out
    lines = {line.split("│")[1].strip(): line for line in printed.err.splitlines() if line.startswith("│")}
    assert {"weights", "gradients", "optimizer", "float32 copies", "reference", "activations", "sum"} <= set(lines)
    assert "4 rows of 100 tokens in a micro-batch (max_length=100)" in printed.err
    assert "process overhead" in printed.err


def test_a_model_that_cannot_be_read_is_one_line(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: f_dpo\ndivergence: reverse_kl\nmodel_name_or_path: nobody/nothing\nuse_cpu: true\n")
    assert main(["run", str(path), "--dry_run"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("memory plan: unknown: the config of 'nobody/nothing' cannot be read")
