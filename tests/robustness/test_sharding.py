"""Two processes under DDP, ZeRO-2 and ZeRO-3 (DeepSpeed's CPU backend) train all five methods as one process does."""

import json
import os
import subprocess
import sys

import pytest

from fdiv.memory.accelerate import accelerate_config
from fdiv.models.tiny import build_tiny_model
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
FURTHER = ("f_dpo", "dph")  # under the configurations for GPUs that a CPU can run too


def launch(launcher, model_dir, folder, repository, *names):
    """What `tests.support.scripts.all_trainers` reports of the trainers `names`, run one after the other under the launcher."""
    output = folder / f"{launcher}.json"
    words = ["-m", SCRIPT, model_dir, folder, output, *names]
    done = subprocess.run(
        [*LAUNCHERS[launcher], *map(str, words)], capture_output=True, text=True, timeout=900, check=False,
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

    def run(launcher, names=EVERY):
        if launcher not in results:
            results[launcher] = launch(launcher, tiny_model_dir, folder, repository, *names)
        return results[launcher]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "names"),
    [
        *((launcher, EVERY) for launcher in ("ddp", "zero2", "zero3")),
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
def test_zero3_holds_half_of_the_parameters_per_process(tmp_path, repository):
    """DeepSpeed keeps tensors of up to 100,000 elements whole on every process, so this model has larger ones."""
    model = build_tiny_model(tmp_path / "model", hidden_size=512, layers=1)
    shares = launch("zero3", model, tmp_path, repository, "f_dpo")["f_dpo"]["parameter_share"]
    assert shares == pytest.approx([0.5, 0.5], abs=0.05)
