"""Anchors of D²O: the model's own samples for each prompt, from any rollout back end, scored, kept in a file.

Offline anchors are sampled once from the start model and read back by prompt; online ones are sampled from the current
policy. An anchor instruction goes into the prompt for sampling only: what is scored later is the bare prompt.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from fdiv.errors import DataError, RolloutError
from fdiv.files import numbered_json_lines, write_bytes
from fdiv.filling import fill
from fdiv.models.loading import check_all_fit, context_length
from fdiv.sealed import DIGEST, NO_DIGEST, UNSEALED, check_sealed, check_token_ids, sealed
from fdiv.stamps import compare_stamps

__all__ = [
    "ANCHORS_FILE",
    "Anchor",
    "AnchorCache",
    "anchor_prompts_at_once",
    "check_context",
    "draw_anchors",
    "draw_offline_anchors",
    "instructed_prompt",
    "prompt_key",
]

ANCHORS_FILE = "anchors.jsonl"
"""The file of the offline anchors in `output_dir`, where no `anchor_cache` is named."""

PLACEHOLDER = "{prompt}"
_FORMAT = 3
_WITHOUT_DIGEST = 2
_REMEDY = "remove it, or set another anchor_cache, so that anchors are sampled again before the first step"


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
        return fill(template, prompt=prompt)
    for position in range(len(prompt) - 1, -1, -1):
        message = prompt[position]
        if message["role"] == "user" and isinstance(message["content"], str):
            changed = {**message, "content": fill(template, prompt=message["content"])}
            return [*prompt[:position], changed, *prompt[position + 1 :]]
    raise DataError(f"anchor_instruction_templates: this prompt has no user message of plain text: {prompt!r:.120}")


def check_context(trainer: Any) -> None:
    """Refuse rows longer than the model's context, and prompts that leave no room in it for `max_completion_length`.

    Instructions for sampling make them longer, and count.

    Raises:
        DataError: a row, or the longest prompt, does not fit.
    """
    for dataset in trainer.all_datasets():
        lengths = (len(row["prompt_ids"]) + len(row["rejected_ids"]) for row in dataset)
        check_all_fit(lengths, trainer.model, partial(_row_name, dataset), "set max_length to at most")
    limit = context_length(trainer.model)
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


def _row_name(dataset: Any, number: int) -> str:
    return f"the row with the rejected answer {str(dataset[number]['rejected'])[:60]!r} …"


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
        if not trainer.args.anchor_instruction_templates:
            _check_prompts(rows, output["prompt_ids"])
        return output["completion_ids"], output["logprobs"]
    if trainer.args.anchor_instruction_templates:
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
    else:
        prompt_ids = [list(row["prompt_ids"]) for row in rows]
    return trainer._generate_single_turn(prompt_ids, None, {}, 1)


def _check_prompts(rows: Sequence[Mapping[str, Any]], prompt_ids: Sequence[Sequence[int]] | None) -> None:
    """Refuse a rollout from another prompt than the one anchors are scored under, where the back end says which."""
    for number, (row, ids) in enumerate(zip(rows, prompt_ids or (), strict=False)):
        if list(ids) != list(row["prompt_ids"]):
            raise RolloutError(
                f"rollout_func sampled anchor {number} of the batch from a prompt with the tokens {list(ids)[:8]}… "
                f"({len(ids)}), and it is scored under {list(row['prompt_ids'])[:8]}… ({len(row['prompt_ids'])}): "
                "sample from `trainer._tokenize_prompts(prompts)`"
            )


def anchor_prompts_at_once(args: Any) -> int:
    """How many prompts offline anchors are sampled for at once: `anchor_batch_size` completions, K for each prompt."""
    return max(1, args.anchor_batch_size // max(1, args.num_generations))


def draw_offline_anchors(trainer: Any, cache: AnchorCache, rows: Sequence[Mapping[str, Any]], count: int) -> int:
    """Sample and keep `count` anchors for every prompt among `rows` that `cache` lacks; how many prompts that were.

    Called on all processes, each of which draws its share. The random streams outside are left as they were, so that
    training goes on alike whether anchors were sampled or read. Prompts that are sampled one at a time have a random
    stream each, by the seed and the prompt: their anchors do not follow from the other rows.

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
    chunk = anchor_prompts_at_once(trainer.args)
    drawn: list[tuple[str, list[Anchor]]] = []
    with torch.random.fork_rng():
        torch.manual_seed(trainer.args.seed * accelerator.num_processes + accelerator.process_index)
        for start in range(0, share, chunk):
            part = mine[start : start + chunk]
            if chunk == 1:
                torch.manual_seed(_own_seed(trainer.args.seed, part[0]["prompt_ids"]))
            groups = draw_anchors(trainer, part, count)
            drawn += [(prompt_key(row["prompt_ids"]), group) for row, group in zip(part, groups, strict=True)]
    cache.add(dict(gather_object(drawn)), write=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    return len(missing)


def _own_seed(seed: int, prompt_ids: Sequence[int]) -> int:
    """The seed of a prompt's random stream, below 2^63."""
    return int(hashlib.sha256(f"{seed} {prompt_key(prompt_ids)}".encode()).hexdigest()[:15], 16)


class AnchorCache:
    """Anchors by prompt, in a JSON-lines file: a line with the sampling settings, then one line for each prompt.

    The first line holds the digest of the whole file.

    Args:
        path: the file; read when it is there.
        settings: from which weights and how the anchors are sampled, and how their prompts are encoded; compared with
            those in the file.
        vocab_size: token ids lie below it; None: not compared.

    Raises:
        DataError: the file is no anchor file, is damaged, was sampled with other settings, or holds an empty
            completion or a token id outside the vocabulary.

    Attributes:
        notes: what differs and may be fine, what was not checked.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], vocab_size: int | None = None) -> None:
        self.path, self.settings, self.vocab_size = Path(path), dict(settings), vocab_size
        self._groups: dict[str, list[Anchor]] = {}
        self.notes: list[str] = []
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

    def take(self, path: Path, keys: Set[str], *, write: bool = True) -> None:
        """Add the anchors of some prompts from another run's file, which is checked as one's own is.

        Args:
            path: the file. keys: the prompts. write: see `add`; of several processes, one writes.

        Raises:
            DataError: see the class.
        """
        theirs = AnchorCache(path, self.settings, self.vocab_size)
        self.notes += theirs.notes
        self.add({key: group for key, group in theirs._groups.items() if key in keys}, write=write)

    def add(self, groups: Mapping[str, list[Anchor]], *, write: bool = True) -> None:
        """Add anchors by `prompt_key`, and write the file (whole, then renamed: it is never half written)."""
        self._groups.update({key: [Anchor(*anchor) for anchor in group] for key, group in groups.items()})
        if not write:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"fdiv_anchors": _FORMAT, DIGEST: UNSEALED, **self.settings}]
        lines += [
            {"prompt": key, "anchors": [anchor._asdict() for anchor in group]} for key, group in self._groups.items()
        ]
        write_bytes(self.path, sealed("".join(json.dumps(line) + "\n" for line in lines).encode()))

    def _read(self) -> None:
        lines = self._lines()
        try:
            header, *groups = lines
            version = header["fdiv_anchors"]
            if check_sealed(self.path, self.path.read_bytes(), header, _REMEDY):
                version = _FORMAT  # the one byte of the number may not switch the check off
            elif version == _WITHOUT_DIGEST:
                self.notes.append(f"{self.path}: {NO_DIGEST}")
            found = {name: value for name, value in header.items() if name not in ("fdiv_anchors", DIGEST)}
            self._groups = {group["prompt"]: [Anchor(**anchor) for anchor in group["anchors"]] for group in groups}
        except DataError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.path} is no file of anchors ({error}): {_REMEDY}") from error
        if version not in (_FORMAT, _WITHOUT_DIGEST):
            raise DataError(f"{self.path} is an anchor file of format {version}, not {_FORMAT}: {_REMEDY}")
        remedy = "remove the file, set another anchor_cache, or restore the setting"
        self.notes += compare_stamps(self.settings, found, str(self.path), remedy)
        for key, group in self._groups.items():
            for anchor in group:
                self._check(key, anchor)

    def _lines(self) -> list[Any]:
        try:
            return [value for _, value in numbered_json_lines(self.path)]
        except DataError as error:
            raise DataError(f"{error}; this is the file of anchors: {_REMEDY}") from None

    def _check(self, key: str, anchor: Anchor) -> None:
        where = f"{self.path}, prompt {key}"
        if not isinstance(anchor.completion_ids, list) or not anchor.completion_ids:
            raise DataError(f"{where}: an empty completion, which has no log-probability: remove its line")
        check_token_ids(anchor.completion_ids, self.vocab_size, where, _REMEDY)
        for name in ("log_prob", "harmfulness"):
            value = getattr(anchor, name)
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise DataError(f"{where}: {name} is {str(value)[:40]}, no finite number: {_REMEDY}")
