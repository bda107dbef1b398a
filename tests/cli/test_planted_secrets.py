"""Secrets planted wherever a recipe or a command line takes a value are in nothing that a command writes or says."""

import json
import pickle
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from fdiv.cli import main
from tests.cli.conftest import write_pairs
from tests.support.presample_rewards import by_kind
from tests.support.runs.presample import settings, write_rows

MARK = "pl4nt"


def secret(number):
    """One that YAML, JSON, HTML and a shell each write in a way of their own."""
    return f'{MARK}-{number}\'s <"{number}"> & ü'


def plain_secret(number):
    return f"{MARK}x{number}yz"


@dataclass
class Keyed:
    """An evaluation with credentials, which says them."""

    password: str = ""
    connection: str = ""
    headers: dict | None = None

    def evaluate(self, model, tokenizer, datasets, context):
        return {"rows": 1.0, "notes": {"rows": f"asked {self.connection} as {self.password} with {self.headers}"}}


@dataclass
class KeyedData:
    """A builder with credentials."""

    api_key: str = ""
    url: str = ""

    def build(self, output_dir):
        write_pairs(Path(output_dir) / "train.jsonl", 4)
        write_pairs(Path(output_dir) / "test.jsonl", 2)
        return {"dataset_name": str(output_dir)}


def keyed_reward(api_key, url=""):
    """A reward made with a key."""
    return by_kind


def planted_recipe():
    """Keys of a recipe with 17 secrets."""
    return {
        "env": {
            "WANDB_AUTH": secret(0), "PGPASS": secret(1), "MY_KEY": secret(2), "PLAIN": secret(3),
            "DATABASE_URL": f"postgres://me:{plain_secret(4)}@host/db", "SESSION_COOKIE": secret(5),
            "OMP_NUM_THREADS": "1",
        },
        "model_init_kwargs": {"token": secret(6)},
        "hub_token": secret(7),
        "report": {"title": f"by {secret(0)} from https://me:{plain_secret(8)}@host and hf_{MARK}ABCDEFG1234567"},
        "prepare": {
            "name": f"{__name__}:KeyedData", "api_key": secret(9), "url": f"s3://key:{plain_secret(10)}@bucket",
        },
        "eval": {
            "name": f"{__name__}:Keyed", "password": secret(11),
            "connection": f"mysql://root:{MARK}p@ss/12@db;Password={plain_secret(13)};",
            "headers": {"Authorization": f"Bearer {plain_secret(14)}", "Cookie": secret(15), "x-api-key": secret(16)},
        },
    }  # fmt: skip


WORDS = [
    "--env.HF_TOKEN", secret(17), f"--env.HIDDEN_SECRET={secret(18)}", "--hub_token", secret(19),
    "--lr_scheduler_kwargs", f"{{api_key: {plain_secret(20)}}}",
]  # fmt: skip
VARIABLES = ("WANDB_AUTH", "PGPASS", "MY_KEY", "PLAIN", "DATABASE_URL", "SESSION_COOKIE", "HF_TOKEN", "HIDDEN_SECRET")


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # taken back after the test


def nothing_is_in(folder, capsys, *expected):
    """No file and no line of output holds a secret; the files that are looked at are there."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert set(expected) <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        assert MARK.encode() not in content, (file, content[content.index(MARK.encode()) - 60 :][:160])
    said = capsys.readouterr()
    assert MARK not in said.out + said.err


def test_a_run(write_recipe, tmp_path, capsys, monkeypatch):
    values = planted_recipe()
    path = write_recipe(
        **values, dataset_name=None, save_strategy="steps", save_steps=1, ref_model_mixup_alpha=None,
        metric_for_best_model="loss",
    )  # fmt: skip
    words = [word for word in WORDS if not word.startswith("{")]
    words.remove("--lr_scheduler_kwargs")
    assert main(["run", str(path), "--dry_run", *words]) == 0
    assert main(["run", str(path), *words]) == 0
    nothing_is_in(
        tmp_path / "out", capsys, "training_args.bin", "recipe_resolved.yaml", "report.html", "README.md",
        "environment.json", "metrics.jsonl", "fdiv_checkpoint.json", "trainer_state.json", "recipe_keys.json",
        "eval_after.json", "result.json",
    )  # fmt: skip
    resolved = yaml.safe_load((tmp_path / "out" / "recipe_resolved.yaml").read_text())
    assert resolved["env"] == {"OMP_NUM_THREADS": "1"} and resolved["learning_rate"] == 1e-2
    notes = json.loads((tmp_path / "out" / "result.json").read_text())["notes"]
    assert notes["rows"].startswith("asked mysql://REDACTED@db;Password=REDACTED; as REDACTED with ")
    args = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert type(args).__name__ == "FDPOConfig" and args.learning_rate == 1e-2 and args.hub_token is None
    assert args.save_strategy.value == "steps"  # an enumeration, as before
    assert main(["report", str(tmp_path / "out"), "--output", str(tmp_path / "out" / "page.html")]) == 0
    nothing_is_in(tmp_path / "out", capsys, "page.html")


def test_a_sweep(write_recipe, tmp_path, capsys):
    path = write_recipe(**planted_recipe(), dataset_name=None, sweep={"seed": [1, 2]}, max_steps=1)
    words = [word for word in WORDS if not word.startswith(("{", "--lr"))]
    assert main(["sweep", str(path), "--dry_run", *words]) == 0
    assert main(["sweep", str(path), *words]) == 0
    nothing_is_in(tmp_path / "out", capsys, "results.json", "table.md")


def test_what_fails_says_nothing(write_recipe, tmp_path, capsys):
    """Values of the wrong kind, in messages that name the value; a cell that fails leaves its traceback."""
    for wrong in (
        {"hub_token": [secret(0), secret(1)]},
        {"learning_rate": f"postgres://me:{plain_secret(2)}@host"},
        {"dataset_name": f"https://me:{plain_secret(3)}@host/data"},
        {"model_name_or_path": f"https://{plain_secret(4)}@host/model"},
        {"model_init_kwargs": {"token": secret(5), "no_such_key": secret(5)}},
        {"env": secret(6)},
        {"eval": {"name": f"{__name__}:Keyed", "password": secret(7), "pasword": secret(7)}},
        {"prepare": {"name": f"{__name__}:KeyedData", "api_key": [secret(8)]}, "max_steps": "x"},
    ):
        assert main(["run", str(write_recipe(**wrong))]) in (1, 2), wrong
        said = capsys.readouterr()
        assert MARK not in said.out + said.err, (wrong, said.err[-400:])
    for words in (
        ["--hub_token", secret(9), "--no_such_key", "1"],
        ["--max_steps", "x", "--env.API_KEY", secret(10)],
        ["--model_init_kwargs.password", secret(11)],
    ):
        assert main(["run", str(write_recipe()), *words]) in (1, 2)
        said = capsys.readouterr()
        assert MARK not in said.out + said.err, (words, said.err[-400:])
    assert (
        main(["sweep", str(write_recipe(dataset_name=f"https://me:{plain_secret(12)}@host/data")), "--seeds", "1"])
        == 1
    )
    nothing_is_in(tmp_path / "out", capsys, "error.txt")


def test_a_traceback(monkeypatch, capsys):
    import sys

    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    main(["divergences", "reverse_kl"])  # any command sets it
    try:
        raise OSError(f"no connection to https://me:{plain_secret(0)}@host with hf_{MARK}ABCDEFG1234567")
    except OSError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    said = capsys.readouterr().err
    assert "OSError: no connection to https://REDACTED@host with REDACTED" in said and "Traceback" in said


def test_what_is_pushed_to_the_hub_and_to_trackers(tiny_model_dir, tmp_path, monkeypatch):
    """A push after a checkpoint writes `training_args.bin` again; the upload itself has the token."""
    import transformers.trainer
    from datasets import Dataset

    from tests.support.runs.f_dpo import make_trainer, preference_rows

    rows = Dataset.from_list(preference_rows(4))
    trainer = make_trainer(
        tiny_model_dir, rows, tmp_path, hub_token=secret(0), hub_strategy="every_save", hub_model_id="me/mine",
        model_init_kwargs=None, max_steps=1,
    )  # fmt: skip
    tokens = []
    hub = types.SimpleNamespace(upload_folder=lambda **options: tokens.append(options["token"]))
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    trainer.hub_model_id = "me/mine"
    trainer.push_in_progress = None
    (tmp_path / "checkpoint-1").mkdir()
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert tokens and set(tokens) == {secret(0)} and trainer.args.hub_token == secret(0)
    content = (tmp_path / "training_args.bin").read_bytes()
    assert MARK.encode() not in content and b"FDPOConfig" in content
    published = json.dumps(trainer.args.to_dict(), default=str)
    assert MARK not in published and '"learning_rate"' in published
    assert pickle.loads(pickle.dumps(trainer.args)).hub_token == secret(0)  # worker processes get all of them


def test_presampling_and_pass_at_k(tiny_model_dir, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", ["easy", "half", "half", "never"])
    reward = {"name": f"{__name__}:keyed_reward", "api_key": secret(0), "url": f"http://me:{plain_secret(1)}@host"}
    options = settings(
        tiny_model_dir, rows, reward=yaml.safe_dump(reward, default_flow_style=True, width=9999).strip()
    )
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    for _ in range(2):  # the second finds the first finished: the settings it compares are those it wrote
        assert main(["presample", *words, "--output", str(tmp_path / "out")]) == 0
    nothing_is_in(tmp_path / "out", capsys, "settings.json", "partition.json", "rehearsal.safetensors")
