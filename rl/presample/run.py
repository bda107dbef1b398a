"""Pre-sampling for DPH-RL: draw n completions per prompt from the reference, score them, split the prompts, keep
verified samples with their log-probabilities: one for each prompt that the reference masters (arXiv:2509.07430,
section 4), or several, also of prompts that it solves now and then.

What was sampled is kept in `OUTPUT/cache/` as it comes, so a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fdiv.errors import DataError
from fdiv.inference.backends import EngineSource, ServerSource, TransformersSource
from fdiv.inference.batches import run_batches
from fdiv.inference.cache import ItemCache, fingerprint
from fdiv.inference.encoding import encoding_stamp
from fdiv.inference.greedy import VLLMSource, stop_token_ids
from fdiv.inference.processes import process_state
from fdiv.inference.sampling import SamplingRequest
from fdiv.lock import output_lock
from fdiv.models.fingerprints import data_fingerprint, tokenizer_fingerprint, vocabulary_size, weights_fingerprint
from fdiv.models.loading import base_and_adapter, load_model, load_tokenizer
from fdiv.models.logprobs import token_scores
from fdiv.rl.dph.rehearsal import Partition, RehearsalCache, RehearsalHeader, RehearsalRow, partition_prompts
from fdiv.rl.modes import mode_of, resolve_mode
from fdiv.rl.presample.config import PresampleConfig
from fdiv.rl.presample.data import check_room, load_prompts, load_reward, tokenize_prompts
from fdiv.rl.presample.output import Sample, enter_directory, explored, write_outputs
from fdiv.rl.presample.selection import distinct_first, row_weights
from fdiv.rows.report import RowReport
from fdiv.secrets import without_secrets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["presample", "reference_log_probs"]


def presample(config: PresampleConfig, output_dir: str | Path, *, repartition: bool = False) -> dict[str, Any]:
    """Pre-sample `config.dataset` and write `samples.jsonl`, `verification.jsonl`, `explore.parquet`,
    `rehearsal.safetensors` and, last, `partition.json`; call it on all processes.

    Args:
        config: the settings.
        output_dir: new, or with an earlier run of the same settings, which is continued or found finished.
        repartition: let a finished directory be split again with other `fdiv.rl.presample.config.DECISIONS`
            (threshold, keep, samples_per_prompt, mode, weights …); its samples are used again.

    Returns:
        The content of `partition.json`.

    Raises:
        DataError: data, model, reward or mode function cannot be used; the directory holds something else, or nothing
            to split again; no prompt is near-perfect, or none is left to explore, without `allow_empty`.
        RolloutError: the server fails, serves another model, or returns no tokens.
    """
    with output_lock(Path(output_dir)), closing(load_reward(config.reward)) as reward:
        return _presample(config, Path(output_dir), repartition, reward)


def _presample(config: PresampleConfig, output_dir: Path, repartition: bool, reward: Any) -> dict[str, Any]:
    rows = load_prompts(config, reward.scorer)
    tokenizer = load_tokenizer(config.model, config.adapter)
    prompt_ids = tokenize_prompts(tokenizer, rows["prompt"], config.encoding())
    model: PreTrainedModel | None = load_model(config.model, config.adapter, config.dtype)
    check_room(rows, prompt_ids, model, config)
    stop_ids = stop_token_ids(model.get_base_model() if hasattr(model, "get_base_model") else model, tokenizer)
    drawing = {
        **without_secrets(config.drawing()),
        "data_fingerprint": data_fingerprint(rows, every_row=True),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "weights_fingerprint": weights_fingerprint(model),
        "encoding": encoding_stamp(tokenizer, config.encoding(), chat=not isinstance(rows[0]["prompt"], str)),
    }
    drawing["encoding"]["end_tokens"] = sorted(stop_ids)
    finished = enter_directory(output_dir, drawing, config.decisions(), repartition)
    if finished is not None:
        return finished
    source = _source(config, model, tokenizer, sorted(stop_ids))
    if config.backend != "transformers":
        model = None  # while vLLM samples, its memory is vLLM's
    run = _Run(config, rows, prompt_ids, tokenizer, reward, source, stop_ids, output_dir / "cache", drawing)
    samples = run.draw(range(len(rows)), range(config.num_samples), "sampling")
    partition = run.partition(samples)
    run.report(samples).check(config.min_used_fraction)
    kept, verification = run.rehearsed(samples, partition)
    run.check_not_empty(samples, partition, kept)
    del source, run.source
    model = load_model(config.model, config.adapter, config.dtype) if model is None else model
    log_probs = reference_log_probs(
        model,
        {f"{i}/{s.number}": (prompt_ids[i], s.completion_ids) for i, group in kept.items() for s in group},
        temperature=config.scoring_temperature,
        batch_size=config.batch_size,
        cache=run.cache(f"log_probs_at_{config.scoring_temperature}"),
    )
    header = RehearsalHeader(
        tokenizer=drawing["tokenizer_fingerprint"],
        model=drawing["weights_fingerprint"],
        temperature=config.scoring_temperature,
        model_name=config.model,
        settings={**drawing, **config.decisions(), "dtype": str(next(model.parameters()).dtype)},
        vocab_size=vocabulary_size(model),
    )
    cache = RehearsalCache(header, run.cached_rows(kept, log_probs))
    report = run.report(samples)
    content = write_outputs(
        output_dir, config, drawing, rows, prompt_ids, samples, verification, partition, cache, report
    )
    process_state().wait_for_everyone()
    return content


def _source(
    config: PresampleConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]
) -> TransformersSource | ServerSource | EngineSource:
    settings = {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "seed": config.seed,
        "batch_size": config.batch_size,
    }
    if config.backend == "transformers":
        return TransformersSource(model, tokenizer, **settings)
    if config.backend == "server":
        settings |= {"stop_token_ids": stop_ids, "vocabulary": vocabulary_size(model)}
        return ServerSource(config.server_url, config.model, config.server_model, **settings)
    place = VLLMSource(*base_and_adapter(config.model, config.adapter), config.dtype, config.vllm_memory)
    return EngineSource(place, stop_token_ids=stop_ids, **settings)


class _Run:
    """One pre-sampling, with what its steps share."""

    def __init__(
        self,
        config: PresampleConfig,
        rows: Any,
        prompt_ids: Sequence[list[int]],
        tokenizer: PreTrainedTokenizerBase,
        reward: Any,
        source: Any,
        stop_ids: set[int],
        cache_dir: Path,
        drawing: Mapping[str, Any],
    ) -> None:
        self.config, self.rows, self.prompt_ids, self.tokenizer = config, rows, prompt_ids, tokenizer
        self.reward, self.source, self.stop_ids, self.cache_dir = reward, source, stop_ids, cache_dir
        self._mode = resolve_mode(config.mode)
        self.digest = fingerprint(drawing)

    def cache(self, kind: str) -> ItemCache:
        """Results of one kind, resumable."""
        return ItemCache(self.cache_dir, kind, self.digest, process_state().process_index)

    def draw(self, indices: Iterable[int], numbers: Iterable[int], title: str) -> dict[int, list[Sample]]:
        """Samples `numbers` of the prompts `indices`, sampled and scored, by prompt."""
        numbers = list(numbers)
        requests = [
            SamplingRequest(
                key=f"{index}/{number}",
                prompt_ids=tuple(self.prompt_ids[index]),
                max_new_tokens=self.config.max_completion_length,
                stream=(index, number),
            )
            for index in indices
            for number in numbers
        ]
        drawn = self.source.draw(requests, self.cache("samples"), title)
        units = [_Completion(request.key, request.stream, drawn[request.key]) for request in requests]
        scores = run_batches(
            units, self._score, batch_size=self.config.batch_size, cache=self.cache("rewards"), title="scoring"
        )
        samples: dict[int, list[Sample]] = {}
        for unit in units:
            samples.setdefault(unit.stream[0], []).append(self._sample(unit, scores[unit.key]["reward"]))
        return samples

    def _score(self, batch: list[_Completion]) -> list[dict[str, Any]]:
        rows = [self.rows[unit.stream[0]] for unit in batch]
        texts = [self._text(unit.ids) for unit in batch]
        columns = {name: [row[name] for row in rows] for name in self.rows.column_names}
        prompts = columns.pop("prompt")
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        columns["completion_ids"] = [list(unit.ids) for unit in batch]
        rewards = self.reward(prompts=prompts, completions=completions, **columns)
        for unit, value in zip(batch, rewards, strict=True):
            if value is not None and not math.isfinite(value):
                raise DataError(f"the reward of sample {unit.key} is {value}: a number is due, or None for no score")
        return [
            {"key": unit.key, "reward": None if value is None else float(value)}
            for unit, value in zip(batch, rewards, strict=True)
        ]

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _sample(self, unit: _Completion, reward: float | None) -> Sample:
        at = self.config.reward_threshold
        if reward is not None and at is None and reward not in (0.0, 1.0):
            raise DataError(
                f"the reward of sample {unit.key} is {reward}, not 0 or 1: give reward_threshold, the reward from "
                "which on a completion counts as correct"
            )
        return Sample(
            index=unit.stream[0],
            number=unit.stream[1],
            completion_ids=unit.ids,
            completion=self._text(unit.ids),
            truncated=len(unit.ids) >= self.config.max_completion_length and unit.ids[-1] not in self.stop_ids,
            reward=reward,
            correct=None if reward is None else reward >= (1.0 if at is None else at),
        )

    def partition(self, samples: Mapping[int, Sequence[Sample]]) -> Partition:
        """The prompts split by their counts."""
        groups = [samples[index] for index in range(len(self.rows))]
        return partition_prompts(
            [sum(sample.correct is True for sample in group) for group in groups],
            [len(group) for group in groups],
            self.config.threshold,
            scored=[sum(sample.correct is not None for sample in group) for group in groups],
        )

    def rehearsed(
        self, samples: Mapping[int, Sequence[Sample]], partition: Partition
    ) -> tuple[dict[int, list[Sample]], list[Sample]]:
        """The verified samples to cache, by prompt, and the further ones that were sampled for it.

        Given that it is correct, a sample is distributed alike whether it was among the n that sorted the prompts or
        came later: prompts are sorted by counts alone.
        """
        if self.config.draws_one_more:
            return self.verify(partition.near_perfect)
        wanted = partition.near_perfect if self.config.keep == "near_perfect" else range(len(self.rows))
        kept: dict[int, list[Sample]] = {}
        for index in wanted:
            correct = [sample for sample in samples[index] if sample.correct]
            if correct:
                order = distinct_first([self.mode(sample) for sample in correct], self.config.samples_per_prompt)
                kept[index] = [correct[position] for position in order]
        if self.config.keep != "all":
            return kept, []
        found, drawn = self.verify([index for index in wanted if index not in kept])
        return kept | found, drawn

    def cached_rows(
        self, kept: Mapping[int, Sequence[Sample]], log_probs: Mapping[str, list[float]]
    ) -> list[RehearsalRow]:
        """The rows of the cache, by prompt, with their weights."""
        flat = [(index, sample) for index in sorted(kept) for sample in kept[index]]
        weights = row_weights([(index, self.mode(sample)) for index, sample in flat], self.config.weights)
        return [
            RehearsalRow(
                self.rows[index]["prompt"],
                self.prompt_ids[index],
                list(sample.completion_ids),
                log_probs[f"{index}/{sample.number}"],
                index,
                weight,
            )
            for (index, sample), weight in zip(flat, weights, strict=True)
        ]

    def mode(self, sample: Sample) -> Hashable:
        """The mode of a sample."""
        return mode_of(self._mode, sample.completion, f"sample {sample.index}/{sample.number}")

    def verify(self, indices: Sequence[int]) -> tuple[dict[int, list[Sample]], list[Sample]]:
        """One more sample for each prompt, sampled with numbers of its own until it is correct or `tries` are used up:
        (the correct one by prompt, all that were sampled)."""
        kept: dict[int, list[Sample]] = {}
        drawn: list[Sample] = []
        for attempt in range(self.config.tries):
            left = [index for index in indices if index not in kept]
            if not left:
                break
            number = self.config.num_samples + attempt
            for index, (sample,) in self.draw(left, [number], "verifying").items():
                drawn.append(sample)
                if sample.correct:
                    kept[index] = [sample]
        return kept, drawn

    def report(self, samples: Mapping[int, Sequence[Sample]]) -> RowReport:
        """What became of the prompts: one without a scored sample says nothing of the reference."""
        silent = sum(all(sample.correct is None for sample in group) for group in samples.values())
        longest = max(len(ids) for ids in self.prompt_ids)
        signal = {"without a scored sample": silent}
        return RowReport("prompts", len(self.rows), longest=longest, without_signal=signal, unit="prompts")

    def check_not_empty(
        self, samples: Mapping[int, Sequence[Sample]], partition: Partition, kept: Mapping[int, Sequence[Sample]]
    ) -> None:
        """DataError where there is nothing to rehearse, or nothing to explore, unless that is allowed.

        What was sampled stays: another threshold in the same directory uses it again.
        """
        if self.config.allow_empty:
            return
        threshold, n = self.config.decisions()["threshold"], self.config.num_samples
        if not partition.near_perfect and self.config.keep == "near_perfect":
            best = max(sum(sample.correct is True for sample in group) for group in samples.values())
            raise DataError(
                f"no near-perfect prompts: none of {len(self.rows)} has a share of {threshold} correct samples, the "
                f"best has {best} of {n}; lower threshold, take a stronger reference or easier prompts, check the "
                "reward, or write an empty rehearsal cache with allow_empty"
            )
        if not kept and self.config.keep != "near_perfect":
            raise DataError(
                f"none of {len(self.rows)} prompts has a correct sample among {n}: raise num_samples, take a stronger "
                "reference or easier prompts, check the reward, or write an empty rehearsal cache with allow_empty"
            )
        if not kept:
            raise DataError(
                f"none of the {len(partition.near_perfect)} near-perfect prompts got a correct verification sample in "
                f"{self.config.tries} tries: raise tries, or write an empty rehearsal cache with allow_empty"
            )
        if not explored(partition, kept, self.config.wrong):
            raise DataError(
                f"no prompt is left to explore: {len(kept)} are rehearsed, {len(partition.wrong)} wrong ones dropped; "
                "raise threshold, add harder prompts, or write an empty explore set with allow_empty"
            )


@dataclass(frozen=True)
class _Completion:
    """A sampled completion on its way to the reward."""

    key: str
    stream: tuple[int, ...]
    ids: tuple[int, ...]
    rows: int = 1
    group: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """The key, as the batched pass wants it."""
        return (self.key,)

    @property
    def length(self) -> int:
        """What batches are sorted by."""
        return len(self.ids)


def reference_log_probs(
    model: PreTrainedModel,
    pairs: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    *,
    temperature: float,
    batch_size: int,
    cache: ItemCache | None = None,
) -> dict[str, list[float]]:
    """log π_ref(y_t | x, y_<t) at `temperature` of every completion token, nats, float32; call it on all processes.

    No truncation to a nucleus: this is the policy that is trained, not the distribution that was sampled from.

    Args:
        model: the reference, on its device.
        pairs: key → (prompt ids, completion ids).
        temperature: the logits are divided by it before the log-softmax.
        batch_size: rows per forward pass.
        cache: where finished rows are looked up and stored, by key; None: nowhere.
    """
    device = next(model.parameters()).device
    units = [_Completion(key, (), (*prompt, *ids)) for key, (prompt, ids) in pairs.items()]

    @torch.no_grad()
    def compute(batch: list[_Completion]) -> list[dict[str, Any]]:
        width = max(unit.length for unit in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask, completion_mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, unit in enumerate(batch):
            ids[row, : unit.length] = torch.tensor(unit.ids)
            mask[row, : unit.length] = 1
            completion_mask[row, len(pairs[unit.key][0]) : unit.length] = 1
        scores = token_scores(
            model, ids.to(device), mask.to(device), completion_mask.to(device), fused=False, temperature=temperature
        )
        # A token of probability 1 comes out a rounding error above 0.
        values = scores.log_probs.float().clamp(max=0.0).cpu()
        kept = scores.mask.cpu()
        return [{"key": unit.key, "log_probs": values[row][kept[row]].tolist()} for row, unit in enumerate(batch)]

    cache = ItemCache(None, "log_probs", "") if cache is None else cache
    records = run_batches(units, compute, batch_size=batch_size, cache=cache, title="reference log-probabilities")
    return {key: records[key]["log_probs"] for key in pairs}
