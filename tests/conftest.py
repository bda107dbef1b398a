"""Shared fixtures: offline environment, fixed seeds, the shared data folder and one tiny model per session."""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# Before any test module imports transformers or datasets: both read these once, at import.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false"
)

import signal

import hypothesis
import numpy as np
import pytest
import torch

# A shell starts background jobs with Ctrl-C ignored, which the tests of signals need.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, and no limit on their time: 200 ms is what a busy machine may take for anything.
hypothesis.settings.register_profile("fdiv", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fdiv")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--rounding`: imitate another processor (`tests.support.rounding`)."""
    parser.addoption(
        "--rounding", action="store_true", help="round differently in every call: see make test-processor"
    )


@pytest.fixture(autouse=True, scope="session")
def rounding(request: pytest.FixtureRequest) -> Iterator[None]:
    """Under `--rounding` the whole session runs on an imitated processor."""
    if not request.config.getoption("--rounding"):
        yield
        return
    from tests.support.rounding import imitate

    with imitate():
        yield


_frozen_modules = 0


def pytest_runtest_setup() -> None:
    """Take what imports have made out of garbage collection, whenever much was imported since the last time.

    A trainer collects garbage when it starts, which takes 0.3 s in a process that has imported TRL.
    """
    global _frozen_modules
    if len(sys.modules) > _frozen_modules + 500:
        gc.collect()
        gc.freeze()
        _frozen_modules = len(sys.modules)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests, with the reason, where there is no accelerator."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no accelerator: torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def deterministic_seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data and small trained models that FDIV_SHARED names; skips when it is unset."""
    name = os.environ.get("FDIV_SHARED")
    if not name:
        pytest.skip("FDIV_SHARED is unset: it names the folder with the shared data (.ci/run sets it to ../shared)")
    folder = Path(name)
    assert folder.is_dir(), f"FDIV_SHARED={name} is not a directory: correct it, or unset it to skip these tests"
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random Llama with its tokenizer and chat template. Shared by all tests: read it, never write to it."""
    from fdiv.models.tiny import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def known_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, which has memorised the rows of `tests.support.unlearned`, `retrained`, which never saw those to forget,
    and the rows as `forget.jsonl` and `retain.jsonl`. Read only."""
    from tests.support.unlearned import FORGET, RETAIN, build_known_model, write

    folder = tmp_path_factory.mktemp("known")
    write(folder / "forget.jsonl", FORGET)
    write(folder / "retain.jsonl", RETAIN)
    build_known_model(folder / "model", [*FORGET, *RETAIN])
    build_known_model(folder / "retrained", RETAIN)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model_dir`, with learned absolute positions (GPT-2)."""
    from fdiv.models.tiny import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-gpt2", architecture="gpt2")


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """This interpreter, where vLLM is installed beside the trainers (`make test-vllm`); skips where it is not."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("no vLLM in this environment: run `make test-vllm`")
    return Path(sys.executable)
