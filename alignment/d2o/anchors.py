"""Anchors of D²O: the model's own samples for each prompt, from any rollout back end, scored, kept in a file.

Offline anchors are sampled once from the start model and read back by prompt; online ones are sampled from the current
policy. An anchor instruction goes into the prompt for sampling only: what is scored later is the bare prompt.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from fdiv.errors import DataError

__all__ = [
    "Anchor",
    "AnchorCache",
    "check_context",
    "draw_anchors",
    "draw_offline_anchors",
    "instructed_prompt",
    "prompt_key",
]

PLACEHOLDER = "{prompt}"
_FORMAT = 2


class Anchor(NamedTuple):
    """One self-sample: its token ids, Σ log q of its tokens when sampled (None: not known), and its harmfulness
    (None: no scorer, or the scorer gave no number)."""

    completion_ids: list[int]
    log_prob: float | None = None
    harmfulness: float | None = None


def prompt_key(prompt_ids: Sequence[int]) -> str:
    """A short name of a bare prompt, from its token ids."""
    return hashlib.sha256(json.dumps(list(prompt_ids)).encode()).hexdigest()[:24]


def instructed_prompt(prompt: str | list[dict[str, Any]], template: str) -> str | list[dict[str, Any]]:
    """`prompt` put in place of `{prompt}` in `template`; of a conversation, its last user message is.

    Raises:
        DataError: a conversation without a user message of plain text.
    """
    if isinstance(prompt, str):
        return template.replace(PLACEHOLDER, prompt)
    for position in range(len(prompt) - 1, -1, -1):
        message = prompt[position]
        if message["role"] == "user" and isinstance(message["content"], str):
            changed = {**message, "content": template.replace(PLACEHOLDER, message["content"])}
            return [*prompt[:position], changed, *prompt[position + 1 :]]
    raise DataError(f"anchor_instruction_templates: this prompt has no user message of plain text: {prompt!r:.120}")


def check_context(trainer: Any) -> None:
    """Refuse prompts that leave no room for `max_completion_length` tokens in the model's context.

    Instructions for sampling make them longer, and count.

    Raises:
        DataError: the longest one does not fit.
    """
    limit = getattr(trainer.model.config, "max_position_embeddings", None)
    if limit is None or trainer.args.num_generations == 0:
        return
    longest = max(len(ids) for dataset in trainer.all_datasets() for ids in dataset["prompt_ids"])
    for template in trainer.args.anchor_instruction_templates or ():
        for dataset in trainer.all_datasets():
            instructed = [instructed_prompt(prompt, template) for prompt in dataset["prompt"]]
            longest = max(longest, *(len(ids) for ids in trainer._tokenize_prompts(instructed)[0]))
    if longest + trainer.args.max_completion_length > limit:
        raise DataError(
            f"the longest prompt (with its instruction, if any) has {longest} tokens and max_completion_length is "
            f"{trainer.args.max_completion_length}, together more than the model's context of {limit}: lower "
            "max_completion_length, or leave the longest prompts out"
        )


def draw_anchors(trainer: Any, rows: Sequence[Mapping[str, Any]], count: int) -> list[list[Anchor]]:
    """Sample `count` anchors for each row from the current policy; call it on all processes, with as many rows each.

    Sample k of a prompt is sampled under instruction template k modulo their number.

    Args:
        trainer: a `D2OTrainer`.
        rows: with `prompt` and `prompt_ids`, the tokens of the bare prompt.
        count: K.

    Raises:
        RolloutError: the back end failed, or gave an empty completion.
        ValueError: a scorer that returned the wrong number of scores.
    """
    if count == 0:
        return [[] for _ in rows]
    templates = trainer.args.anchor_instruction_templates or [PLACEHOLDER]
    repeated = [row for row in rows for _ in range(count)]
    prompts = [
        instructed_prompt(row["prompt"], templates[number % count % len(templates)])
        for number, row in enumerate(repeated)
    ]
    ids, log_probs = _sample(trainer, repeated, prompts)
    harmfulness = trainer.score_harmfulness(repeated, ids)
    anchors = [
        Anchor(list(completion), None if log_probs is None else math.fsum(log_probs[number]), harmfulness[number])
        for number, completion in enumerate(ids)
    ]
    return [anchors[start : start + count] for start in range(0, len(anchors), count)]


def _sample(trainer: Any, rows: Sequence[Mapping[str, Any]], prompts: list) -> tuple[list[list[int]], list | None]:
    """Completion ids and per-token log-probabilities from the trainer's back end, one for each of `prompts`."""
    if trainer.rollout_func is not None:
        output = trainer.rollout_func(prompts, trainer)
        return output["completion_ids"], output["logprobs"]
    if trainer.args.anchor_instruction_templates:
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
    else:
        prompt_ids = [list(row["prompt_ids"]) for row in rows]
    return trainer._generate_single_turn(prompt_ids, None, {}, 1)


def draw_offline_anchors(trainer: Any, cache: AnchorCache, rows: Sequence[Mapping[str, Any]], count: int) -> int:
    """Sample and keep `count` anchors for every prompt among `rows` that `cache` lacks; how many prompts that were.

    Called on all processes, each of which draws its share. The random streams outside are left as they were, so that
    training goes on alike whether anchors were sampled or read.

    Raises:
        DataError: the cache holds fewer than `count` anchors for a prompt.
    """
    wanted = {prompt_key(row["prompt_ids"]): row for row in rows}
    for key, row in wanted.items():
        if key in cache:
            cache.anchors(row["prompt_ids"], count)
    missing = [row for key, row in wanted.items() if key not in cache]
    if not missing or count == 0:
        return 0
    accelerator = trainer.accelerator
    # Every process makes the same number of calls: generation is collective under ZeRO-3 and with vLLM.
    share = math.ceil(len(missing) / accelerator.num_processes)
    mine = [missing[(accelerator.process_index + i * accelerator.num_processes) % len(missing)] for i in range(share)]
    chunk = max(1, trainer.args.anchor_batch_size // count)
    drawn: list[tuple[str, list[Anchor]]] = []
    with torch.random.fork_rng():
        torch.manual_seed(trainer.args.seed * accelerator.num_processes + accelerator.process_index)
        for start in range(0, share, chunk):
            part = mine[start : start + chunk]
            groups = draw_anchors(trainer, part, count)
            drawn += [(prompt_key(row["prompt_ids"]), group) for row, group in zip(part, groups, strict=True)]
    cache.add(dict(gather_object(drawn)), write=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    return len(missing)


class AnchorCache:
    """Anchors by prompt, in a JSON-lines file: a line with the sampling settings, then one line for each prompt.

    Args:
        path: the file; read when it is there.
        settings: from which weights and how the anchors are sampled, compared with those in the file.

    Raises:
        DataError: the file is no anchor file, was sampled with other settings, or holds an empty completion.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = Path(path), dict(settings)
        self._groups: dict[str, list[Anchor]] = {}
        if self.path.is_file():
            self._read()

    def __contains__(self, key: str) -> bool:
        return key in self._groups

    def __len__(self) -> int:
        return len(self._groups)

    def anchors(self, prompt_ids: Sequence[int], count: int) -> list[Anchor]:
        """The first `count` anchors of a prompt.

        Raises:
            DataError: none, or fewer than `count`, were sampled for it.
        """
        group = self._groups.get(prompt_key(prompt_ids), [])
        if len(group) < count:
            raise DataError(
                f"{self.path} holds {len(group)} anchors for the prompt with the tokens {list(prompt_ids)[:8]}…, and "
                f"num_generations={count} asks for {count}: lower num_generations, or remove the file (or set another "
                "anchor_cache) so that they are sampled again before the first step"
            )
        return group[:count]

    def add(self, groups: Mapping[str, list[Anchor]], *, write: bool = True) -> None:
        """Add anchors by `prompt_key`, and write the file (whole, then renamed: it is never half written)."""
        self._groups.update({key: [Anchor(*anchor) for anchor in group] for key, group in groups.items()})
        if not write:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"fdiv_anchors": _FORMAT, **self.settings}) + "\n")
            for key, group in self._groups.items():
                file.write(json.dumps({"prompt": key, "anchors": [anchor._asdict() for anchor in group]}) + "\n")
        os.replace(partial, self.path)

    def _read(self) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        try:
            header, *groups = [json.loads(line) for line in lines]
            version = header["fdiv_anchors"]
            found = {name: header[name] for name in self.settings} if version == _FORMAT else {}
            self._groups = {group["prompt"]: [Anchor(**anchor) for anchor in group["anchors"]] for group in groups}
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.path} is no file of anchors ({error}): remove it, or set anchor_cache") from error
        if version != _FORMAT:
            raise DataError(f"{self.path} is an anchor file of format {version}, not {_FORMAT}: remove it")
        for name, value in self.settings.items():
            if found[name] != value:
                raise DataError(
                    f"{self.path} was sampled with {name}={found[name]!r}, now it is {value!r}: remove the file, set "
                    "another anchor_cache, or restore the setting"
                )
        if any(not anchor.completion_ids for group in self._groups.values() for anchor in group):
            raise DataError(f"{self.path} holds an empty completion, which has no log-probability: remove its line")
