"""Two processes under DDP, ZeRO-2 and ZeRO-3 (DeepSpeed's CPU backend) train every method as one process does."""

import json
import os
import sys

import pytest

from fdiv.cli.build_locks import remove_stale_locks
from fdiv.memory.accelerate import accelerate_config
from fdiv.models.tiny import build_tiny_model
from tests.support.processes import end_with_group
from tests.support.runs.all_trainers import EVERY, ROUNDING
from tests.support.runs.dph import cache
from tests.support.runs.f_distill import make_distant_teacher
from tests.support.runs.f_dpg import recorded
from tests.support.scripts.all_trainers import STEPS

SCRIPT = "tests.support.scripts.all_trainers"
LAUNCHERS = {
    "one": [sys.executable],
    "ddp": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    **{
        name.removeprefix("cpu_"): [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config(name)),
            "--main_process_port", "0", "--num_processes", "2", "--mixed_precision", "no",
        ]
        for name in ("cpu_zero2", "cpu_zero3", "zero1", "zero2_offload", "zero3_offload")
    },
}  # fmt: skip
SHARDED = (*EVERY, "sinkhorn")
FURTHER = ("f_dpo", "dph")  # under the configurations for GPUs that a CPU can run too


def launch(launcher, model_dir, folder, repository, *names):
    """What `tests.support.scripts.all_trainers` reports of the trainers `names`, run one after the other under the launcher."""
    output = folder / f"{launcher}.json"
    words = ["-m", SCRIPT, model_dir, folder, output, *names]
    remove_stale_locks()  # as `fdiv run --accelerate` does: extensions are compiled in the first run
    done = end_with_group(
        [*LAUNCHERS[launcher], *map(str, words)], timeout=1100,
        cwd=repository, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tmp_path_factory, repository):
    """Launcher → trainer → what `tests.support.scripts.all_trainers` reports; each launcher runs its trainers once."""
    folder = tmp_path_factory.mktemp("sharding")
    cache(tiny_model_dir, shift=0.5).save(folder / "rehearsal.safetensors")
    records = recorded(tiny_model_dir, 4 * STEPS)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    make_distant_teacher(folder / "teacher")
    results = {}

    def run(launcher, names=SHARDED):
        if launcher not in results:
            results[launcher] = launch(launcher, tiny_model_dir, folder, repository, *names)
        return results[launcher]

    return run


@pytest.mark.slow
@pytest.mark.timeout(2400)  # two launches, and the first one may compile an extension of DeepSpeed
@pytest.mark.parametrize(
    ("launcher", "names"),
    [
        *((launcher, SHARDED) for launcher in ("ddp", "zero2", "zero3")),
        *((launcher, FURTHER) for launcher in ("zero1", "zero2_offload", "zero3_offload")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_losses_are_those_of_one_process(runs, launcher, names):
    one, two = runs("one"), runs(launcher, names)
    for name in names:
        assert (one[name]["processes"], two[name]["processes"]) == (1, 2)
        assert ("DEEPSPEED" in two[name]["distributed"]) == launcher.startswith("zero")
        assert len(one[name]["losses"]) == STEPS
        assert two[name]["losses"] == pytest.approx(one[name]["losses"], abs=10 * ROUNDING[name], rel=0), name
        assert max(one[name]["losses"]) - min(one[name]["losses"]) > 1e-2, f"{name}: nothing was trained"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_zero3_holds_half_of_the_parameters_per_process(tmp_path, repository):
    """DeepSpeed keeps tensors of up to 100,000 elements whole on every process, so this model has larger ones."""
    model = build_tiny_model(tmp_path / "model", hidden_size=512, layers=1)
    shares = launch("zero3", model, tmp_path, repository, "f_dpo")["f_dpo"]["parameter_share"]
    assert shares == pytest.approx([0.5, 0.5], abs=0.05)


RECIPES = {  # with what makes the steps comparable: no clipping, no Adam of signs
    "tiny/flat": ["--learning_rate", "0.01", "--eval", "null", "--use_peft", "true", "--gradient_checkpointing", "true",
                  "--prepare.authors", "8", "--prepare.train_steps", "60"],
    "tiny/distill": ["--learning_rate", "0.1", "--eval.require", "null", "--eval.max_rows", "16", "--on_policy_share", "0"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_build_and_evaluate_with_whole_models_and_train_sharded_ones(recipe, tmp_path, repository):
    """`prepare:` runs on one process while the other waits: a model that is sharded there would wait for ever.

    FLAT's two forwards with gradient go through checkpointed layers of sharded weights with an adapter; the evaluation
    of distillation loads a teacher of its own, which is whole, beside the student, which is not.
    """
    words = [
        "run",
        recipe,
        "--max_steps",
        "4",
        "--logging_steps",
        "1",
        "--max_grad_norm",
        "0",
        "--adam_epsilon",
        "0.1",
    ]
    logs, after = {}, {}
    for name, batch, more in (("one", 4, []), ("two", 2, ["--accelerate", "cpu_zero3", "--num_processes", "2"])):
        own = ["--per_device_train_batch_size", str(batch), "--output_dir", str(tmp_path / name), *more]
        done = end_with_group(
            [sys.executable, "-m", "fdiv", *words, *RECIPES[recipe], *own], timeout=560, cwd=repository,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        logs[name] = [line["loss"] for line in lines if "loss" in line]
        result = json.loads((tmp_path / name / "result.json").read_text())
        after[name] = {key: value for key, value in result.items() if key.startswith("after/")}
    assert len(logs["one"]) == 4
    assert logs["two"] == pytest.approx(logs["one"], abs=1e-5, rel=0)
    assert max(logs["one"]) - min(logs["one"]) > 1e-3
    assert after["two"] == pytest.approx(after["one"], abs=1e-4, rel=0)
    assert bool(after["one"]) == ("distill" in recipe)
