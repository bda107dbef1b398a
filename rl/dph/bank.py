"""The answer bank: a rehearsal set with one row for each mode of each prompt, which can grow while training.

It starts with the rows of a rehearsal cache and, if asked, takes the policy's own verified answers as they come, each
with the log-probabilities of the policy that found it. A mode that the policy loses later is still rehearsed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import gather_object
from torch import Tensor

from fdiv.errors import DataError
from fdiv.models.fingerprints import tokenizer_fingerprint, vocabulary_size, weights_fingerprint
from fdiv.rl.dph.rehearsal import RehearsalCache, RehearsalHeader, RehearsalRow
from fdiv.rl.modes import mode_of, resolve_mode
from fdiv.terminal import info
from fdiv.training.rollouts import token_mask

__all__ = ["Added", "AnswerBank", "BankMixin"]

BANK_FILE, FOUND_FILE = "answer_bank.safetensors", "answers_found.safetensors"

Slot = tuple[tuple[int, ...], Hashable]


class Added(NamedTuple):
    """What became of some rows: `added`, `known` (their slot is taken), `refused` (the bank is full)."""

    added: int
    known: int
    refused: int


class AnswerBank(RehearsalCache):
    """Rehearsal rows by slot, (prompt tokens, mode); the first row of a slot stays.

    Args:
        header: see `RehearsalCache`.
        rows: what it starts with; a row whose slot is taken is left out, and so is one beyond `limit`.
        mode: the mode of a row's completion tokens, anything hashable.
        limit: rows at most. What comes later is refused and counted; nothing is dropped for it.
        path: where the rows were read from, for messages.

    Attributes:
        at_start: what became of `rows`.
    """

    def __init__(
        self,
        header: RehearsalHeader,
        rows: Iterable[RehearsalRow],
        mode: Callable[[Sequence[int]], Hashable],
        limit: int,
        path: str | Path | None = None,
    ) -> None:
        super().__init__(header, (), path)
        self.mode, self.limit = mode, limit
        self._slots: set[Slot] = set()
        self.at_start = self.add(rows)

    @property
    def name(self) -> str:
        """The bank in messages."""
        return "the answer bank" if self.path is None else f"the answer bank from {self.path}"

    def slot(self, row: RehearsalRow) -> Slot:
        """Prompt and mode of a row."""
        return tuple(row.prompt_ids), self.mode(row.completion_ids)

    def add(self, rows: Iterable[RehearsalRow]) -> Added:
        """Put rows into free slots, in order.

        Raises:
            DataError: a row that no cache may hold, or a mode function that fails.
        """
        added = known = refused = 0
        for row in rows:
            self._check_row(len(self.rows), row)
            slot = self.slot(row)
            if slot in self._slots:
                known += 1
            elif len(self.rows) >= self.limit:
                refused += 1
            else:
                self._slots.add(slot)
                self.rows.append(row._replace(weight=1.0))  # slots count the same
                added += 1
        return Added(added, known, refused)

    def restore(self, path: Path) -> None:
        """Take the rows of a checkpoint in place of the present ones, in their order.

        Raises:
            DataError: a damaged file, more rows than `limit`, or two of one slot.
        """
        rows = RehearsalCache.load(path).rows
        if len(rows) > self.limit:
            raise DataError(f"{path} holds {len(rows)} rows, and bank_limit is {self.limit}: set it to at least that")
        self.rows, self._slots = [], set()
        if known := self.add(rows).known:
            raise DataError(
                f"{path}: {known} of {len(rows)} rows are of a mode that another row has under the present mode "
                "function: restore the setting `mode`, and its function as it was"
            )


class BankMixin:
    """A `DPHTrainer`'s answer bank: made from its cache, filled between optimizer steps, saved with its checkpoints.

    Verified answers are noted while their loss is formed, where their log-probabilities are at hand, and enter the
    bank before the next optimizer step, on all processes in one order.
    """

    args: Any
    rehearsal: Any

    def _make_bank(self) -> AnswerBank:
        """The bank at the start of training, of the rows of the rehearsal cache if there is one.

        Raises:
            ValueError: `bank: cache` without a cache.
        """
        args, cache = self.args, self.rehearsal
        if cache is None and args.bank == "cache":
            raise ValueError("bank: cache needs a rehearsal_cache; with bank: policy the bank may start empty")
        header = RehearsalHeader(
            tokenizer_fingerprint(self._tokenizer),
            weights_fingerprint(self.model),
            self.temperature,
            vocab_size=vocabulary_size(self.model),
        )
        function = resolve_mode(args.mode)

        def mode(ids: Sequence[int]) -> Hashable:
            text = self._tokenizer.decode(list(ids), skip_special_tokens=True)
            return mode_of(function, text, "a row of the answer bank")

        rows, path = ((), None) if cache is None else (cache.rows, cache.path)
        bank = AnswerBank(header if cache is None else cache.header, rows, mode, args.bank_limit, path)
        start = bank.at_start
        weighed = any(row.weight != 1 for row in rows)
        info(
            f"{bank.name}: {start.added} rows, one for each mode of each prompt; {start.known} further rows of their "
            f"modes and {start.refused} above bank_limit={args.bank_limit} left out"
            + ("; every row counts the same, whatever its weight in the cache" if weighed else "")
        )
        self._found: list[RehearsalRow] = []
        self._full = False
        return bank

    def _note_found(self, inputs: dict[str, Any], log_policy: Tensor) -> None:
        """Keep the correct completions of a micro-step, with the log-probabilities of the policy that is trained.

        Raises:
            DataError: it is not defined which completions are correct; one holds tokens of tools, which a rehearsal
                row cannot.
        """
        if "correct" not in inputs:
            raise DataError(
                "bank: policy takes correct completions, and a reward here is neither 0 nor 1: set reward_threshold, "
                "the reward from which on a completion is correct"
            )
        if "tool_mask" in inputs:
            raise DataError(
                "bank: policy: these completions hold tokens of tools or of an environment, and a rehearsal row holds "
                "the policy's own alone: take bank: cache or bank: none"
            )
        mask, values = token_mask(inputs).bool(), log_policy.detach().float().clamp(max=0.0)
        for row in inputs["correct"].nonzero().flatten().tolist():
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
            ids = inputs["completion_ids"][row][mask[row]].tolist()
            if ids:
                text = self._tokenizer.decode(prompt)
                self._found.append(RehearsalRow(text, prompt, ids, values[row][mask[row]].tolist(), -1))

    def _fill_bank(self) -> None:
        """Put what was found in the last optimizer step into the bank; call it on all processes."""
        if self.args.bank != "policy":
            return
        rows = gather_object(self._found)
        self._found = []
        added = self.rehearsal.add(rows)
        sizes = {"bank/rows": len(self.rehearsal), "bank/added": added.added, "bank/refused": added.refused}
        for name, value in sizes.items():
            self._metrics["train"][name].append(float(value))
        if added.refused and not self._full:
            self._full = True
            info(
                f"the answer bank is full (bank_limit={self.args.bank_limit}): new modes are refused from now on, and "
                "counted as bank/refused"
            )

    def save_method_state(self, folder: Path) -> None:
        """The bank, where it grows, and apart what was found since it was filled: that enters with the next step."""
        super().save_method_state(folder)
        if self.args.bank != "policy":
            return
        found = gather_object(self._found)
        if self.args.should_save:
            self.rehearsal.save(folder / BANK_FILE)
            RehearsalCache(self.rehearsal.header, found).save(folder / FOUND_FILE)

    def load_method_state(self, folder: Path) -> None:
        """Read them back. What was found by all processes goes to the main one: it enters the bank in that order."""
        super().load_method_state(folder)
        if self.args.bank != "policy":
            return
        self.rehearsal.restore(folder / BANK_FILE)
        found = RehearsalCache.load(folder / FOUND_FILE).rows
        self._found = found if self.accelerator.is_main_process else []
