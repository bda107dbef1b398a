"""Rehearsal for DPH-RL: which prompts the reference masters, and its verified samples with their log-probabilities.

D_pef (near-perfect prompts) is rehearsed from a `RehearsalCache`, so that training needs no reference model; the other
prompts are explored with rollouts (D_exp). `fdiv presample` makes both. arXiv:2509.07430, section 4.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fdiv.errors import DataError
from fdiv.files import one_line, write_bytes
from fdiv.models.fingerprints import tokenizer_fingerprint, vocabulary_size, weights_fingerprint
from fdiv.sealed import DIGEST, NO_DIGEST, UNSEALED, check_sealed, check_token_ids, sealed
from fdiv.stamps import compare_stamps
from fdiv.terminal import info

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Partition",
    "RehearsalBatch",
    "RehearsalCache",
    "RehearsalHeader",
    "RehearsalRow",
    "parse_threshold",
    "partition_prompts",
]

_FORMAT = 1
_METADATA = "fdiv_rehearsal"
_REMEDY = "run `fdiv presample` again with what is trained now"


# ---------------------------------------------------------------- partition
class Partition(NamedTuple):
    """Indices of prompts, ascending: `near_perfect` is rehearsed, `explore` is trained with rollouts, `wrong` had no
    correct sample at all (the paper explores them too)."""

    near_perfect: list[int]
    explore: list[int]
    wrong: list[int]


def parse_threshold(threshold: str | float | Fraction) -> Fraction:
    """A share of correct samples as an exact fraction: "7/8", "0.875", 0.875 and 1 are read as they are written.

    Raises:
        ValueError: not a number, or outside (0, 1].
    """
    try:
        value = Fraction(str(threshold).replace(" ", ""))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"threshold={threshold!r} is no share of correct samples: write 7/8, or 0.875") from error
    if not 0 < value <= 1:
        raise ValueError(f"threshold={threshold}: a share of correct samples lies above 0 and is at most 1 (7/8 say)")
    return value


def partition_prompts(
    correct: Sequence[int],
    drawn: Sequence[int],
    threshold: str | float | Fraction,
    *,
    scored: Sequence[int] | None = None,
) -> Partition:
    """Split prompts by their counts: near-perfect where correct ≥ threshold · `drawn`, compared exactly.

    Args:
        correct: correct samples of each prompt.
        drawn: samples taken for it, n. A sample that could not be scored counts here, so it never helps a prompt.
        threshold: see `parse_threshold`.
        scored: samples that were scored; None: all. Without a correct sample a prompt is `wrong` only when all were
            scored, else it is `explore`: nothing is called wrong that was not looked at.

    Raises:
        ValueError: counts of different lengths, or not 0 ≤ correct ≤ scored ≤ `drawn` with `drawn` ≥ 1.
    """
    share = parse_threshold(threshold)
    scored = drawn if scored is None else scored
    result = Partition([], [], [])
    for index, (right, seen, total) in enumerate(zip(correct, scored, drawn, strict=True)):
        if not (0 <= right <= seen <= total and total >= 1):
            raise ValueError(f"prompt {index}: {right} correct of {seen} scored of {total} sampled cannot be")
        if right >= share * total:
            result.near_perfect.append(index)
        elif right == 0 and seen == total:
            result.wrong.append(index)
        else:
            result.explore.append(index)
    return result


# ---------------------------------------------------------------- cache
class RehearsalRow(NamedTuple):
    """A verified sample of the reference.

    Attributes:
        prompt: text, or a list of `{role, content}` messages.
        prompt_ids: its tokens, as they were fed to the model (chat template applied).
        completion_ids: tokens of the completion, end token included where it was sampled.
        reference_log_probs: log π_ref of each completion token at the training temperature, nats; as many.
        index: row of the prompt in the dataset that was pre-sampled.
        weight: what the row counts in the mean over rehearsal rows, above 0; 1 on average over a cache.
    """

    prompt: str | list[dict[str, Any]]
    prompt_ids: list[int]
    completion_ids: list[int]
    reference_log_probs: list[float]
    index: int
    weight: float = 1.0


class RehearsalBatch(NamedTuple):
    """Padded rows, laid out as TRL's GRPO: prompts padded on the left, completions on the right; masks are 0/1 long.

    Attributes:
        prompt_ids, prompt_mask: `[B, P]`.
        completion_ids, completion_mask: `[B, C]`.
        reference_log_probs: `[B, C]` float32, nats, 0 on padding.
        weights: `[B]` float32, what each row counts in the mean.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    reference_log_probs: Tensor
    weights: Tensor


@dataclass(frozen=True)
class RehearsalHeader:
    """What the rows of a cache depend on.

    Args:
        tokenizer: `tokenizer_fingerprint` of the tokenizer that made the ids.
        model: `weights_fingerprint` of the reference.
        temperature: the logits were divided by it before the log-softmax: the training temperature.
        model_name: path or hub name of the reference, for messages.
        settings: how the rows were sampled and chosen, JSON-ready; recorded, not compared.
        vocab_size: token ids lie below it; None: not recorded.
    """

    tokenizer: str
    model: str
    temperature: float
    model_name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None


class RehearsalCache:
    """The rehearsal set in memory: a sequence of `RehearsalRow`; on disk one safetensors file with a JSON header.

    The file holds the digest of all its bytes.

    Args:
        header: what the rows depend on.
        rows: the samples.
        path: where they were read from, for messages.

    Raises:
        DataError: a row without prompt or completion tokens, with a token id outside the vocabulary, with another
            number of log-probabilities than tokens, or with one that is NaN, infinite or above 0.
    """

    def __init__(self, header: RehearsalHeader, rows: Iterable[RehearsalRow], path: str | Path | None = None) -> None:
        self.header, self.rows, self.path = header, list(rows), None if path is None else Path(path)
        self._check_vocabulary(header.vocab_size)
        for number, row in enumerate(self.rows):
            self._check_row(number, row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> RehearsalRow:
        return self.rows[number]

    def __iter__(self) -> Iterator[RehearsalRow]:
        return iter(self.rows)

    @property
    def name(self) -> str:
        """The cache in messages."""
        return "the rehearsal cache" if self.path is None else f"the rehearsal cache {self.path}"

    def check(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        model: nn.Module | str | None = None,
        temperature: float | None = None,
        made_with: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Refuse a cache of another tokenizer, model, temperature or encoding; what is None is not compared.

        Args:
            tokenizer: the tokenizer of the training, or its `tokenizer_fingerprint`.
            model: the policy before its first step (it must be the reference), or its `weights_fingerprint`. Leave it
                out when training is resumed: the policy has moved since. Collective under ZeRO-3.
            temperature: the training temperature; must be equal to the last bit.
            made_with: `encoding_stamp` of the training's prompts, with `dtype`.

        Returns:
            Notes: what differs and may be fine (the number type), what is not known.

        Raises:
            DataError: naming what differs, and the remedy.
        """
        header = self.header
        if temperature is not None and float(temperature) != header.temperature:
            raise DataError(
                f"{self.name} holds log-probabilities at temperature {header.temperature}, the training temperature "
                f"is {temperature}: set temperature: {header.temperature}, or {_REMEDY}"
            )
        named = f" ({header.model_name})" if header.model_name else ""
        if tokenizer is not None:
            found = tokenizer if isinstance(tokenizer, str) else tokenizer_fingerprint(tokenizer)
            if found != header.tokenizer:
                raise DataError(
                    f"{self.name} was made with another tokenizer{named}: vocabulary fingerprint "
                    f"{header.tokenizer}, now {found}, so its token ids mean another text; {_REMEDY}"
                )
        if model is not None and not isinstance(model, str):
            self._check_vocabulary(vocabulary_size(model))
        if model is not None:
            found = model if isinstance(model, str) else weights_fingerprint(model)
            if found != header.model:
                raise DataError(
                    f"{self.name} holds log-probabilities of another model{named}: weights fingerprint "
                    f"{header.model}, now {found}, so its log-ratios would not start at 0; start training from the "
                    f"model it was made with, or {_REMEDY}"
                )

        if made_with is None:
            return []
        stamp = header.settings.get("encoding")
        if stamp:
            stamp = {name: value for name, value in stamp.items() if name != "end_tokens"}  # of the sampling alone
            stamp |= {"dtype": header.settings["dtype"]} if "dtype" in header.settings else {}
        return compare_stamps(made_with, stamp, self.name, f"restore the setting, or {_REMEDY}")

    def batch(self, numbers: Sequence[int], pad_token_id: int) -> RehearsalBatch:
        """The rows `numbers`, padded to the longest prompt and completion among them; on the CPU.

        Raises:
            ValueError: no rows are asked for.
        """
        if not numbers:
            raise ValueError(f"{self.name}: a batch of no rows")
        rows = [self.rows[number] for number in numbers]
        prompts = [torch.tensor(row.prompt_ids) for row in rows]
        completions = [torch.tensor(row.completion_ids) for row in rows]
        log_probs = [torch.tensor(row.reference_log_probs, dtype=torch.float32) for row in rows]
        return RehearsalBatch(
            prompt_ids=_padded(prompts, pad_token_id, "left"),
            prompt_mask=_padded([torch.ones_like(ids) for ids in prompts], 0, "left"),
            completion_ids=_padded(completions, pad_token_id, "right"),
            completion_mask=_padded([torch.ones_like(ids) for ids in completions], 0, "right"),
            reference_log_probs=_padded(log_probs, 0, "right"),
            weights=torch.tensor([row.weight for row in rows], dtype=torch.float32),
        )

    def save(self, path: str | Path) -> None:
        """Write the file; it is whole or absent, never half written."""
        from safetensors.torch import save

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [json.dumps(row.prompt, ensure_ascii=False).encode() for row in self.rows]
        tensors = {
            "prompt_text": torch.tensor(list(b"".join(texts)), dtype=torch.uint8),
            "prompt_text_offsets": _offsets(texts),
            "prompt_ids": _flat([row.prompt_ids for row in self.rows], torch.int32),
            "prompt_offsets": _offsets([row.prompt_ids for row in self.rows]),
            "completion_ids": _flat([row.completion_ids for row in self.rows], torch.int32),
            "reference_log_probs": _flat([row.reference_log_probs for row in self.rows], torch.float32),
            "completion_offsets": _offsets([row.completion_ids for row in self.rows]),
            "index": torch.tensor([row.index for row in self.rows], dtype=torch.int64),
            "weight": torch.tensor([row.weight for row in self.rows], dtype=torch.float64),
        }
        header = json.dumps({"format": _FORMAT, **asdict(self.header)}, sort_keys=True)
        write_bytes(path, sealed(save(tensors, metadata={_METADATA: header, DIGEST: UNSEALED})))

    @classmethod
    def load(cls, path: str | Path) -> RehearsalCache:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            DataError: not a rehearsal cache, one of another format, or a damaged one.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"rehearsal_cache: no such file: {path}; `fdiv presample` makes one")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if not check_sealed(path, path.read_bytes(), metadata, _REMEDY):
                info(f"{path}: {NO_DIGEST}")
            header = json.loads(metadata[_METADATA])
            version = header.pop("format")
            if version != _FORMAT:
                raise DataError(f"{path} is a rehearsal cache of format {version}, not {_FORMAT}: {_REMEDY}")
            return cls(RehearsalHeader(**header), _rows(tensors), path)
        except (SafetensorError, KeyError, TypeError, IndexError, ValueError, RuntimeError) as error:
            if isinstance(error, DataError):
                raise
            reason = one_line(error)
            raise DataError(f"{path} is no rehearsal cache, or a damaged one ({reason}): {_REMEDY}") from error

    def _check_vocabulary(self, size: int | None) -> None:
        for number, row in enumerate(self.rows):
            for name in ("prompt_ids", "completion_ids"):
                check_token_ids(getattr(row, name), size, f"{self.name}, row {number}, {name}", _REMEDY)

    def _check_row(self, number: int, row: RehearsalRow) -> None:
        if not row.prompt_ids or not row.completion_ids:
            raise DataError(f"{self.name}, row {number}: prompt or completion without tokens")
        if len(row.reference_log_probs) != len(row.completion_ids):
            raise DataError(
                f"{self.name}, row {number}: {len(row.reference_log_probs)} log-probabilities for "
                f"{len(row.completion_ids)} tokens"
            )
        if not (math.isfinite(row.weight) and row.weight > 0):
            raise DataError(f"{self.name}, row {number}: weight {row.weight}: must be a finite number above 0")
        for value in row.reference_log_probs:
            if not (math.isfinite(value) and value <= 0):
                raise DataError(f"{self.name}, row {number}: {value} is no log-probability of a sampled token")


def _padded(rows: list[Tensor], value: int, side: str) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def _flat(rows: Iterable[Sequence[float]], dtype: torch.dtype) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=dtype)


def _offsets(rows: Iterable[Sequence[Any]]) -> Tensor:
    """Row i lies in [offsets[i], offsets[i + 1])."""
    return torch.tensor([0, *accumulate(len(row) for row in rows)], dtype=torch.int64)


def _rows(tensors: Mapping[str, Tensor]) -> list[RehearsalRow]:
    def ragged(values: str, offsets: str) -> list[Tensor]:
        bounds = tensors[offsets].tolist()
        if bounds[-1] != len(tensors[values]) or sorted(bounds) != bounds:
            raise IndexError(f"{offsets} do not fit {values}")
        return [tensors[values][start:end] for start, end in pairwise(bounds)]

    columns = zip(
        ragged("prompt_text", "prompt_text_offsets"),
        ragged("prompt_ids", "prompt_offsets"),
        ragged("completion_ids", "completion_offsets"),
        ragged("reference_log_probs", "completion_offsets"),
        tensors["index"].tolist(),
        # Caches of release 0.2 have no weights: all rows counted the same.
        tensors["weight"].tolist() if "weight" in tensors else [1.0] * len(tensors["index"]),
        strict=True,
    )
    return [
        RehearsalRow(
            json.loads(bytes(text.tolist()).decode()), prompt.tolist(), ids.tolist(), log_probs.tolist(), index, weight
        )
        for text, prompt, ids, log_probs, index, weight in columns
    ]
