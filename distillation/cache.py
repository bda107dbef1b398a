"""A teacher on disk: the k most likely tokens of every completion token, in sharded safetensors files.

    DIR/settings.json             what the rest was made with, with its digest
    DIR/part-00000.safetensors …  rows in order, each part with the digest of all its bytes
    DIR/tokenizer/                the tokenizer that made the token ids
    DIR/taught.json               counts and the share that the top k holds, written last

A token takes 6·k + 8 bytes: of each of the k tokens its id in three bytes and its log-probability in three, in steps
of 2⁻¹⁷ nats (an error of 4e-6) down to −128; then the log-mass of all other tokens and the log-probability of the
token itself in three bytes each, and the entropy of the whole distribution as float16. At k = 64 that is 392 bytes,
and 12 more for each row. Rows are found by the digest of their token ids, so their order and number in training do not
matter.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fdiv.distillation.teachers.base import Encoded
from fdiv.errors import DataError
from fdiv.files import one_line, read_bytes, write_bytes
from fdiv.models.vocabulary import TopK
from fdiv.sealed import DIGEST, UNSEALED, check_sealed, read_record, sealed

__all__ = [
    "SETTINGS",
    "TAUGHT",
    "TOKENIZER",
    "Said",
    "TeacherCache",
    "bytes_of",
    "part_fault",
    "part_name",
    "row_digest",
    "settings_digest",
    "write_part",
]

FORMAT = 1
SETTINGS, TAUGHT, TOKENIZER = "settings.json", "taught.json", "tokenizer"
_METADATA = "fdiv_teacher"
_STEPS, _NONE = 2**17, 2**24 - 1  # steps of a log-probability in a nat; what stands for −inf
_REMEDY = "remove it and run `fdiv teach` again: the other parts are kept"
_AGAIN = "run `fdiv teach` again"


class Said(NamedTuple):
    """What a teacher said of `N` tokens: the k most likely ones, `log_probs[N]` of the tokens themselves, and the
    `entropy[N]` of the whole distribution, None where it is not known."""

    top: TopK
    log_probs: Tensor
    entropy: Tensor | None


def bytes_of(tokens: int, rows: int, k: int) -> int:
    """Bytes of the parts for this many tokens and rows, without their headers."""
    return tokens * (6 * k + 8) + rows * 12


def row_digest(row: Encoded) -> bytes:
    """Eight bytes of the SHA-256 of a row's token ids: prompt, completion."""
    text = json.dumps([list(row.prompt_ids), list(row.completion_ids)], separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:8]


def settings_digest(settings: Mapping[str, Any]) -> str:
    """What every part says it was made with."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def part_name(number: int) -> str:
    """The file of a part."""
    return f"part-{number:05d}.safetensors"


# ---------------------------------------------------------------- one part
def write_part(path: Path, settings: str, number: int, rows: Sequence[Encoded], said: Said) -> None:
    """Write the tokens of `rows`, in their order; whole or not at all, the same bytes for the same values.

    Args:
        settings: `settings_digest`. number: of the part. said: of all tokens of the rows, on any device.
    """
    from safetensors.torch import save

    ids = said.top.ids.masked_fill(said.top.ids < 0, 0).cpu()
    log_probs = said.top.log_probs.masked_fill(said.top.ids < 0, -math.inf)
    entropy = torch.full_like(said.log_probs, math.nan) if said.entropy is None else said.entropy
    starts = torch.tensor([0, *(len(row.completion_ids) for row in rows)]).cumsum(0)
    digests = b"".join(map(row_digest, rows))
    tensors = {
        "cells": torch.cat([_bytes(ids), _bytes(_codes(log_probs))], -1),
        "log_tail": _bytes(_codes(said.top.log_tail)),
        "log_probs": _bytes(_codes(said.log_probs)),
        "entropy": entropy.to(torch.float16).cpu(),
        "starts": starts.to(torch.int32),
        "rows": torch.frombuffer(bytearray(digests), dtype=torch.uint8).reshape(-1, 8) if rows else torch.zeros(0, 8),
    }
    # One entry: safetensors writes several in an order that differs from process to process.
    header = json.dumps({"format": FORMAT, "settings": settings, "part": number, DIGEST: UNSEALED})
    write_bytes(path, sealed(save(tensors, metadata={_METADATA: header})))


def part_fault(path: Path, settings: str, number: int) -> str | None:
    """Why a file is not that part, whole and of these settings; None where it is.

    Raises:
        DataError: it is damaged.
    """
    if not path.is_file():
        return "it is missing"
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_METADATA])
        if not check_sealed(path, read_bytes(path), header, _REMEDY):
            return "it has no digest"
        del header[DIGEST]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is no part of a teacher's cache, or damaged ({one_line(error)}): {_REMEDY}"
        ) from error
    wanted = {"format": FORMAT, "settings": settings, "part": number}
    return None if header == wanted else "it was made with other settings"


def _codes(log_probs: Tensor) -> Tensor:
    """Log-probabilities as whole numbers of three bytes."""
    steps = (log_probs.double().clamp(max=0.0) * -_STEPS).round().clamp(max=_NONE - 1)
    return steps.masked_fill(torch.isneginf(log_probs), _NONE).long().cpu()


def _log_probs(codes: Tensor) -> Tensor:
    """The log-probabilities of codes, in float32."""
    return (codes.double() / -_STEPS).float().masked_fill(codes == _NONE, -math.inf)


def _bytes(numbers: Tensor) -> Tensor:
    """Whole numbers below 2²⁴ as three bytes each, the low ones first, in a new last axis."""
    return torch.stack([(numbers >> shift) & 255 for shift in (0, 8, 16)], -1).to(torch.uint8)


def _numbers(stored: Tensor) -> Tensor:
    """And back."""
    parts = stored.long()
    return parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16


# ---------------------------------------------------------------- all of them
@dataclass(frozen=True)
class _Place:
    """Where a row's tokens lie."""

    part: int
    start: int
    end: int


class TeacherCache:
    """A finished cache, read from its files as rows are asked for.

    Args:
        path: the folder that `fdiv teach` wrote.
        check: compare every part with its digest, which reads all of them once.

    Raises:
        DataError: no such folder, one that is not finished, a part that is missing, of other settings, or damaged.
    """

    def __init__(self, path: str | Path, *, check: bool = True) -> None:
        self.path = Path(path)
        if not (self.path / SETTINGS).is_file():
            raise DataError(f"teacher.path: {self.path} holds no {SETTINGS}: `fdiv teach` makes a cache")
        self.settings = read_record(self.path / SETTINGS, f"remove {self.path} and {_AGAIN}")
        if self.settings.get("format") != FORMAT:
            raise DataError(f"{self.path} is a teacher's cache of format {self.settings.get('format')}, not {FORMAT}")
        if not (self.path / TAUGHT).is_file():
            raise DataError(f"{self.path} is not finished: {_AGAIN} with the same settings, it goes on")
        self.taught = read_record(self.path / TAUGHT, f"remove it and {_AGAIN}")
        self._files: dict[int, Any] = {}
        self._places: dict[bytes, _Place] = {}
        for number in range(self.taught["parts"]):
            self._index(number, check)

    @property
    def k(self) -> int:
        """Tokens kept of each distribution."""
        return self.settings["k"]

    @property
    def name(self) -> str:
        """The cache in messages."""
        return f"the teacher cache {self.path}"

    def __contains__(self, row: Encoded) -> bool:
        return row_digest(row) in self._places

    def __len__(self) -> int:
        return len(self._places)

    def _index(self, number: int, check: bool) -> None:
        path = self.path / part_name(number)
        if check or not path.is_file():
            fault = part_fault(path, settings_digest(self.settings), number)
            if fault is not None:
                raise DataError(f"{path}: {fault}; {_REMEDY}")
        file = self._open(number)
        starts, digests = file.get_tensor("starts").tolist(), file.get_tensor("rows").tolist()
        for place, digest in enumerate(digests):
            self._places[bytes(digest)] = _Place(number, starts[place], starts[place + 1])

    def _open(self, number: int) -> Any:
        """The part, mapped into memory: its pages are read as they are needed, and are the system's to drop."""
        if number not in self._files:
            self._files[number] = safe_open(self.path / part_name(number), framework="pt")
        return self._files[number]

    def read(self, rows: Sequence[Encoded], k: int | None = None) -> Said:
        """What the teacher said of all tokens of `rows`, row after row, on the CPU.

        Args:
            rows: with a token each. k: how many tokens of each distribution, at most those kept; the others join the
                rest. None: all.

        Raises:
            DataError: a row that is not in the cache.
        """
        columns: dict[str, list[Tensor]] = {name: [] for name in ("cells", "log_tail", "log_probs", "entropy")}
        for row in rows:
            place = self._places.get(row_digest(row))
            if place is None:
                raise DataError(
                    f"{self.name} holds no row with the prompt {list(row.prompt_ids)[:8]} … and the completion "
                    f"{list(row.completion_ids)[:8]} … (token ids): {_AGAIN} on the rows that are trained on"
                )
            for name, parts in columns.items():
                parts.append(self._open(place.part).get_slice(name)[place.start : place.end])
        if not rows:
            columns = {name: [self._open(0).get_slice(name)[:0]] for name in columns}
        cells = torch.cat(columns["cells"])
        log_probs, ids = _log_probs(_numbers(cells[..., 3:])), _numbers(cells[..., :3])
        ids = ids.masked_fill(torch.isneginf(log_probs), -1)
        tail = _log_probs(_numbers(torch.cat(columns["log_tail"])))
        if k is not None and k < self.k:
            tail = torch.logaddexp(tail, log_probs[:, k:].logsumexp(-1))
            log_probs, ids = log_probs[:, :k], ids[:, :k]
        entropy = torch.cat(columns["entropy"]).float()
        return Said(
            TopK(log_probs, ids, tail),
            _log_probs(_numbers(torch.cat(columns["log_probs"]))),
            None if bool(entropy.isnan().any()) else entropy,
        )
