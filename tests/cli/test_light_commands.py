"""What the commands that load nothing import: modules, which no busy processor changes, and not times."""

import json
import subprocess
import sys

import pytest

from fdiv.cli import listings

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy", "scipy", "matplotlib", "pandas")
PROBE = """
import json, sys
from fdiv.cli import main
try:
    code = main(json.loads(sys.argv[1]))
except SystemExit as stop:
    code = stop.code
sys.stderr.write("\\n" + json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def imported(*words):
    done = subprocess.run([sys.executable, "-c", PROBE, json.dumps(words)], capture_output=True, text=True, check=True)
    return json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["divergences"], 0),
        (["methods"], 0),
        (["recipes"], 0),
        (["recipes", "tofu/mini/npo"], 0),
        (["models"], 0),
        (["run", "no_such_recipe"], 2),
        (["divergences", "--nmae"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_listings_and_help_import_nothing_heavy(words, code):
    found, modules = imported(*words)
    assert found == code
    assert not set(HEAVY) & set(modules)


@pytest.mark.slow
def test_a_dry_run_imports_trl_and_no_plotting_or_engine():
    code, modules = imported("run", "tiny/f_dpo", "--dry_run")
    assert code == 0 and "trl" in modules
    unneeded = {"matplotlib", "vllm", "deepspeed", "lm_eval", "nltk", "rouge_score", "wandb", "tensorboard"}
    assert not unneeded & set(modules)


def test_the_written_tables_are_those_of_the_classes():
    for name, rows in listings.computed_tables().items():
        assert rows == listings._written(name), f"the table of {name} is old: run `make tables`"
