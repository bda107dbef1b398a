"""Two steps of a recipe on a tiny stand-in: the model and the data are replaced, everything else is as in the recipe.

What a full-size recipe needs and a test machine lacks (a hub, an accelerator, flash attention, 4-bit weights) is replaced
by the nearest thing that is there; sizes that only cost time are cut.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fdiv.catalog import METHODS
from fdiv.recipe.document import read_document
from fdiv.recipe.load import load_recipe
from fdiv.recipe.model import Recipe

ROWS = 8
STAND_IN_CONTEXT = 512  # tokens, of the models of `fdiv.models.tiny`

# Per builder: keys that make its build cheap. A builder that reads files gets them written by `_write_sources`.
_CHEAP_PREPARE: dict[str, dict[str, Any]] = {
    "tiny_preferences": {"train_pairs_per_prompt": 2, "test_pairs_per_prompt": 1, "sft_steps": 20},
    "hh_negatives": {"hidden_size": 32, "layers": 1, "vocab_size": 300, "epochs": 1, "test_fraction": 0.3},
    "tiny_texts": {"steps": 20},
    "novels_unlearning": {
        **{"forget_passages": 2, "retain_passages": 4, "passage_words": 40, "prompt_words": 5, "epochs": 1},
        **{"vocab_size": 300, "hidden_size": 32, "layers": 2, "bf16": False},
    },
    "sampled_preferences": {"samples_per_prompt": 2, "pairs_per_prompt": 1, "max_new_tokens": 4},
    "tofu_memorised": {"forget_rows": 4, "retain_rows": 4, "epochs": 1},
    "tiny_authors": {"authors": 4, "forget_authors": 1, "train_steps": 2},
    "tiny_distillation": {"teacher_steps": 20, "rows": 8},
    "rehearsal": {
        "num_samples": 2,
        "samples_per_prompt": 1,
        "threshold": "1",
        "tries": 8,
        "max_completion_length": 4,
        "seed": 1,
    },
}
# The same for the builder that `prepare: {name: rehearsal}` and `{name: taught}` run first.
_CHEAP_TASK: dict[str, dict[str, Any]] = {
    "arithmetic": {
        "train_problems": 12,
        "test_problems": 6,
        "multisets": 20,
        "steps": 2,
        "hidden_size": 32,
        "layers": 1,
    },
    "chinook": {"steps": 2, "batch_size": 4, "hidden_size": 32, "layers": 1, "vocab_size": 300},
    "tiny_distillation": {"teacher_steps": 20, "rows": 8},
}
_CHEAP_EVALUATION = {
    "max_rows": 2,
    "max_prompts": 1,
    "num_samples": 1,
    "max_new_tokens": 2,
    "max_items": 2,
    "num_prompts": 1,
    "n": 2,
    "k": [1, 2],
    "max_tasks": 2,
}
# Evaluations that need data of a hub or of FDIV_SHARED; they have tests of their own.
_LEFT_OUT_EVALUATIONS = ("tofu", "muse")
_HUB_BENCHMARKS = ("aime24",)


def preference_rows() -> list[dict[str, str]]:
    """TRL's preference type."""
    return [{"prompt": f"Ask {i}:", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(ROWS)]


def question_rows() -> list[dict[str, Any]]:
    """TOFU's columns, those of its perturbed files among them."""
    return [
        {
            "question": f"Who wrote book {i}?",
            "answer": f"Author {i} wrote book {i}.",
            "paraphrased_answer": f"Book {i} is by author {i}.",
            "perturbed_answer": [f"Book {i} is by author {i + 1}.", f"Book {i} is by nobody."],
        }
        for i in range(ROWS)
    ]


def prompt_rows() -> list[dict[str, str]]:
    """Prompts, with the columns of the rewards."""
    return [{"prompt": f"Ask {i}:", "answer": str(i), "solution": str(i), "database": "db"} for i in range(ROWS)]


def completion_rows() -> list[dict[str, str]]:
    """Prompts with completions."""
    return [{"prompt": f"Ask {i}:", "completion": f" yes {i}"} for i in range(ROWS)]


_ROWS = {
    "alignment": preference_rows,
    "unlearning": question_rows,
    "rl": prompt_rows,
    "distillation": completion_rows,
}


def stand_in_recipe(path: Path, model: Path, folder: Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe at `path`, ready to run for two steps on `model` in `folder`; `changes` win over everything."""
    values = read_document(path).values
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "dtype": "float32",
        "report": None,
        "sweep": None,
    }
    if (values.get("max_length") or 0) > STAND_IN_CONTEXT:
        settings["max_length"] = STAND_IN_CONTEXT
    if values.get("gradient_accumulation_steps", 1) > 2:
        settings["gradient_accumulation_steps"] = 2
    for key, value in (("attn_implementation", "sdpa"), ("load_in_4bit", False), ("load_in_8bit", False)):
        if key in values:
            settings[key] = value
    if "model_name_or_path" in values:
        settings["model_name_or_path"] = str(model)
    if "pad_token" in values:
        settings["pad_token"] = _pad_token(model)
    settings |= _data(values, folder) | _prepare(values, folder, model) | _unlearning(values, folder)
    settings |= _evaluations(values, folder)
    settings |= _rollouts(values) | _rehearsal(values, model, folder) | _teacher(values, model)
    settings |= changes or {}
    return load_recipe(path, (), settings)


def _teacher(values: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """Distillation: short completions, and the stand-in as its own teacher."""
    if values["method"] != "f_distill":
        return {}
    teacher = {"teacher_model_name_or_path": str(model)} if "teacher_model_name_or_path" in values else {}
    return {"max_completion_length": 4, "teacher_model_init_kwargs": None, **teacher}


def odd_sum(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A scorer that every model satisfies about half the time, in place of classifiers and lexicons."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def text_length(completions: list[str], **_: Any) -> list[float]:
    """A scorer by which the texts of a random model differ."""
    return [float(len(text)) for text in completions]


def _rollouts(values: Mapping[str, Any]) -> dict[str, Any]:
    """f-DPG: short completions in pairs, and scorers that need no file; what the target is stays."""
    if values["method"] != "f_dpg":
        return {}
    scorer = f"{__name__}:odd_sum"
    target = dict(values["target"])
    for key in ("scorers", "features"):
        if key in target:
            target[key] = [scorer] * len(target[key])
    small = {"num_generations": 2, "max_completion_length": 4, "moment_samples": 64}
    return {**small, "target": target}


def _rehearsal(values: Mapping[str, Any], model: Path, folder: Path) -> dict[str, Any]:
    """DPH: short rollouts in pairs by transformers, a reward that needs no data, a cache made with the stand-in."""
    if values["method"] != "dph":
        return {}
    settings: dict[str, Any] = {"num_generations": 2, "max_completion_length": 4, "reward": f"{__name__}:odd_sum"}
    for key, value in (("use_vllm", False), ("rehearsal_batch_size", 2), ("steps_per_generation", 2)):
        if key in values:
            settings[key] = value
    if "rehearsal_cache" in values:
        settings["rehearsal_cache"] = str(_write_cache(model, folder / "rehearsal.safetensors"))
    return settings


def _write_cache(model: Path, path: Path) -> Path:
    """Four rows of the stand-in's own, which it says with equal probability for every token (it is not asked)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fdiv.models.fingerprints import tokenizer_fingerprint, weights_fingerprint
    from fdiv.rl.dph.rehearsal import RehearsalCache, RehearsalHeader, RehearsalRow

    tokenizer = AutoTokenizer.from_pretrained(model)
    header = RehearsalHeader(
        tokenizer=tokenizer_fingerprint(tokenizer),
        model=weights_fingerprint(AutoModelForCausalLM.from_pretrained(model)),
        temperature=1.0,
    )
    rows = []
    for index in range(4):
        prompt, answer = f"Ask {index}:", tokenizer(f" {index}")["input_ids"]
        level = -math.log(len(tokenizer))
        rows.append(RehearsalRow(prompt, tokenizer(prompt)["input_ids"], answer, [level] * len(answer), index))
    RehearsalCache(header, rows).save(path)
    return path


def _pad_token(model: Path) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model).pad_token


def _data(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Every `*dataset_name` of the recipe as a generated folder with the splits the recipe names."""
    result: dict[str, Any] = {}
    rows = _ROWS[METHODS[values["method"]].split(".")[1]]()
    if str(values.get("dataset_name", "")).startswith("muse-bench/"):
        rows = [{"text": f"Chapter {i}. " + "The quick brown fox jumps over the lazy dog. " * 60} for i in range(2)]
    for key in [key for key in values if key.endswith("dataset_name")]:
        prefix = key.removesuffix("dataset_name")
        data = folder / f"{prefix}data"
        data.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            lines = "".join(json.dumps({**row, "row": f"{prefix}{split}"}) + "\n" for row in _renamed(rows, prefix))
            (data / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        result[key] = str(data)
        for name, split in ((f"{prefix}dataset_train_split", "train"), (f"{prefix}dataset_test_split", "test")):
            if name in values:
                result[name] = split
        for name in (f"{prefix}dataset_config", f"{prefix}dataset_split"):
            if name in values:
                result[name] = "train" if name.endswith("split") else None
    return result


def _unlearning(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Refusals of a file, a layer the stand-in has, no evaluation after each epoch (it needs TOFU's data)."""
    result: dict[str, Any] = {}
    if "template_file" in values:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "refusals.txt").write_text("No idea.\nI cannot say.\n", encoding="utf-8")
        result["template_file"] = str(folder / "refusals.txt")
    if "layer" in values:
        result["layer"] = 0
    if "epoch_evaluation" in values:
        off = {"eval_strategy": "no", "eval_on_start": False, "load_best_model_at_end": False}
        result |= off | {"epoch_evaluation": None, "metric_for_best_model": None}
    if values["method"] in METHODS and METHODS[values["method"]].startswith("fdiv.unlearning.") and "optim" in values:
        result["optim"] = "adamw_torch"  # the paged optimizers need bitsandbytes and a GPU
    return result


def _renamed(rows: list[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """Forget and retain rows must differ."""
    return [{k: f"{prefix}{v}" if k in ("question", "prompt", "text") else v for k, v in row.items()} for row in rows]


def _prepare(values: Mapping[str, Any], folder: Path, model: Path) -> dict[str, Any]:
    block = values.get("prepare")
    if not block:
        return {}
    settings = {f"prepare.{key}": value for key, value in _CHEAP_PREPARE.get(block["name"], {}).items()}
    if block["name"] == "tofu_preferences":
        source = folder / "tofu"
        source.mkdir(parents=True, exist_ok=True)
        for name in block.get("files", ["forget10_perturbed", "retain_perturbed"]):
            rows = [{**row, "question": f"{row['question']} ({name})"} for row in question_rows()]
            (source / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings["prepare.data"] = str(source)
    if block["name"] == "hh_negatives":
        rows = [
            {side: f"\n\nHuman: Ask {i}?\n\nAssistant: {side} {i}" for side in ("chosen", "rejected")}
            for i in range(3 * ROWS)
        ]
        settings["prepare.data"] = _write_rows(folder / "hh.jsonl", rows)
    if block["name"] == "safe_rlhf_negatives":
        rows = [
            {
                "prompt": f"Ask {i}?",
                **{f"response_{side}": f"answer {side}" for side in (0, 1)},
                **{f"is_response_{side}_safe": bool(side) for side in (0, 1)},
            }
            for i in range(ROWS)
        ]
        settings["prepare.data"] = _write_rows(folder / "safe_rlhf.jsonl", rows)
    if block["name"] == "rehearsal":
        task = {**block["task"], **_CHEAP_TASK[block["task"]["name"]]}
        if "database" in task:
            task["database"] = str(_write_chinook(folder / "chinook.sqlite"))
        settings |= {"prepare.task": task, "prepare.reward": f"{__name__}:odd_sum"}
    if block["name"] == "taught":
        settings["prepare.task"] = {**block["task"], **_CHEAP_TASK[block["task"]["name"]]}
    if block["name"] == "novels_unlearning":
        settings["prepare.data"] = _write_novels(folder / "novels", block["forget_novels"] + block["retain_novels"])
    if block["name"] == "tofu_unlearning":
        source = folder / "tofu"
        source.mkdir(parents=True, exist_ok=True)
        for prefix, name in (("", block.get("split", "forget10")), ("retain ", block.get("retain", "retain90"))):
            rows = _renamed(question_rows(), prefix)
            (source / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings |= {"prepare.data": str(source), "prepare.retain_model": None}
    if block["name"] == "thinned_student":
        settings["prepare.data"] = _write_novels(folder / "novels", block["train_novels"] + block["test_novels"])
        settings |= {"prepare.teacher": str(model), "prepare.layers": 1, "prepare.passages": 2}
        settings |= {"prepare.passage_words": 32, "prepare.prompt_words": 4}
    if block["name"] == "sampled_preferences":
        settings |= {"prepare.model": str(model), "prepare.scorer": f"{__name__}:text_length"}
    if block["name"] == "tofu_memorised":
        source = folder / "tofu"
        source.mkdir(parents=True, exist_ok=True)
        for name in ("forget01", "retain", "real_authors", "world_facts"):
            _write_rows(source / f"{name}_perturbed.json", _renamed(question_rows(), f"{name} "))
        _write_rows(source / "holdout01.json", _renamed(question_rows(), "holdout "))
        settings |= {"prepare.data": str(source), "prepare.model": str(model)}
    return settings


def _write_novels(folder: Path, titles: list[str]) -> str:
    """Novels of one sentence after another, each with the name of somebody in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, title in enumerate(titles):
        lines = [f"On day {day} the fox of wood {number} met Bruno near the mill and ran away." for day in range(60)]
        (folder / f"{title}.txt").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


def _write_chinook(path: Path) -> Path:
    """A database with Chinook's tables, in which eight genres have a track each and all else is empty."""
    import sqlite3

    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as connection:
        connection.executescript(
            """
            CREATE TABLE Genre (GenreId, Name); CREATE TABLE MediaType (MediaTypeId, Name);
            CREATE TABLE Artist (ArtistId, Name); CREATE TABLE Album (AlbumId, ArtistId, Title);
            CREATE TABLE Track (TrackId, GenreId, MediaTypeId, AlbumId, Milliseconds);
            CREATE TABLE Customer (LastName, City, Country);
            CREATE TABLE Invoice (BillingCountry, BillingCity, Total);
            """
        )
        for number in range(ROWS):
            connection.execute("INSERT INTO Genre VALUES (?, ?)", (number, f"Genre {number}"))
            connection.execute("INSERT INTO Track VALUES (?, ?, 1, 1, ?)", (number, number, 100 * number))
    connection.close()
    return path


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _evaluations(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The evaluations at the smallest size, without `require:` (two steps need not improve anything)."""
    blocks = values.get("eval") or []
    blocks = blocks if isinstance(blocks, list) else [blocks]
    kept = []
    for block in blocks:
        if block["name"] in _LEFT_OUT_EVALUATIONS or block.get("dataset") in _HUB_BENCHMARKS:
            continue
        if "databases" in block:
            block = {**block, "databases": str(folder / "chinook.sqlite")}
        block = {**block, **{key: value for key, value in _CHEAP_EVALUATION.items() if key in block}}
        block.pop("require", None)
        kept.append(block)
    return {"eval": kept or None}
