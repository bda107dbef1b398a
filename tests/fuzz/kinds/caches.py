"""Caches: rehearsal rows, items of an evaluation, the folder of a pre-sampling."""

from __future__ import annotations

import json
import random
from functools import cached_property
from pathlib import Path

from tests.fuzz.case import Edit, Kind, Outcome
from tests.fuzz.command import command, judged
from tests.fuzz.damage import byte_damage, damage_bytes
from tests.fuzz.world import write_rows

__all__ = ["Caches"]

_PRESAMPLED = (
    "rehearsal.safetensors",
    "explore.parquet",
    "samples.jsonl",
    "verification.jsonl",
    "partition.json",
    "settings.json",
)


class Caches(Kind):
    """A changed byte is refused, or changes nothing; items that cannot be trusted are made again."""

    name = "caches"
    what = "rehearsal cache, item cache, pre-sampling folder: bytes damaged"
    few = 40

    def members(self, rng: random.Random) -> list[Edit]:
        target = rng.choice(["rehearsal"] * 4 + ["items"] * 4 + ["presampled"])
        edits: list[Edit] = [("target", target)]
        if target == "presampled":
            edits.append(("file", rng.choice(_PRESAMPLED)))
        return [*edits, *(byte_damage(rng) for _ in range(rng.choice([1, 1, 1, 2])))]

    def judge(self, edits: list[Edit], folder: Path) -> Outcome:
        target = next((edit[1] for edit in edits if edit[0] == "target"), "rehearsal")
        damage = [edit for edit in edits if edit[0] not in ("target", "file")]
        if target == "presampled":
            name = next((edit[1] for edit in edits if edit[0] == "file"), _PRESAMPLED[0])
            return self._presampled(name, damage, folder)
        return (self._rehearsal if target == "rehearsal" else self._items)(damage, folder)

    @cached_property
    def cache(self) -> Path:
        """A rehearsal cache of six rows."""
        from fdiv.rl.dph.rehearsal import RehearsalCache, RehearsalHeader, RehearsalRow

        header = RehearsalHeader(tokenizer="a" * 24, model="b" * 24, temperature=1.0, model_name="tiny")
        rows = [RehearsalRow(f"Ask {i}:", [5 + i, 6, 7], [8, 9 + i], [-0.5 - i / 7, -1.25], index=i) for i in range(6)]
        path = self.world.folder / "rehearsal.safetensors"
        RehearsalCache(header, rows).save(path)
        return path

    def _rehearsal(self, damage: list[Edit], folder: Path) -> Outcome:
        from fdiv.errors import DataError
        from fdiv.rl.dph.rehearsal import RehearsalCache

        path = _damaged(self.cache, damage, folder)
        whole = RehearsalCache.load(self.cache)
        try:
            found = RehearsalCache.load(path)
        except DataError as error:
            return Outcome("refused", "", str(error))
        same = found.header == whole.header and list(found) == list(whole)
        return Outcome("ok") if same else Outcome("silent", "an altered rehearsal cache was loaded")

    @cached_property
    def items(self) -> Path:
        """An item cache of twelve items, as a run leaves it."""
        from fdiv.inference.cache import ItemCache

        store = ItemCache(self.world.folder / "items", "scores", "c" * 24)
        store.add([{"key": f"{i}/0", "log_probs": [-0.25 * i, -1.5], "text": f"answer é {i}"} for i in range(12)])
        return next((self.world.folder / "items").rglob("rank*.jsonl"))

    def _items(self, damage: list[Edit], folder: Path) -> Outcome:
        from fdiv.errors import DataError
        from fdiv.inference.cache import ItemCache

        place = folder / "items" / self.items.parent.name
        place.mkdir(parents=True)
        _damaged(self.items, damage, place)
        whole = ItemCache(self.world.folder / "items", "scores", "c" * 24).items
        try:
            found = ItemCache(folder / "items", "scores", "c" * 24)
            found.add([{"key": "new", "log_probs": [], "text": ""}])
            found = ItemCache(folder / "items", "scores", "c" * 24).items
        except DataError as error:
            return Outcome("refused", "", str(error))
        other = [key for key, item in found.items() if key != "new" and item != whole.get(key)]
        if other:
            return Outcome("silent", "an altered item was taken from the cache", repr(found[other[0]]))
        return Outcome("ok") if "new" in found else Outcome("lost", "an item that was added is gone")

    @cached_property
    def presampled(self) -> Path:
        """A finished pre-sampling; its command is `self.words`."""
        data = write_rows(
            self.world.folder / "prompts.jsonl",
            [{"prompt": "What is " + "1 + " * i + "1?", "kind": kind} for i, kind in enumerate(["easy", "half"] * 3)],
        )
        self.words = ["presample", "--model", self.world.model, "--dataset", data, "--num_samples", "2"]
        self.words += ["--reward", "tests.support.presample_rewards:by_kind", "--max_completion_length", "4"]
        self.words += ["--threshold", "1/2", "--batch_size", "8", "--output"]
        folder = self.world.folder / "presampled"
        ended = command([*self.words, folder], self.world.folder, 120)
        if ended.code != 0:
            raise RuntimeError(f"the pre-sampling of the world failed: {ended.error!r} {ended.err}") from ended.error
        return folder

    def _presampled(self, name: str, damage: list[Edit], folder: Path) -> Outcome:
        """The command again: what is damaged is named, or made again; it is not called finished."""
        place = self.world.copy(self.presampled, folder)
        whole = (self.presampled / name).read_bytes()
        content = whole
        for edit in damage:
            content = damage_bytes(content, edit)
        (place / name).write_bytes(content)
        outcome = judged(command([*self.words, place], folder, 60))
        now = (place / name).read_bytes()
        if outcome.verdict == "ok" and content != whole and now == content and not _same_json(now, whole):
            return Outcome("silent", f"a damaged {name} passed as finished")
        return outcome


def _damaged(source: Path, damage: list[Edit], folder: Path) -> Path:
    content = source.read_bytes()
    for edit in damage:
        content = damage_bytes(content, edit)
    path = folder / source.name
    path.write_bytes(content)
    return path


def _same_json(content: bytes, other: bytes) -> bool:
    """Whether two files say the same as JSON (white space aside)."""
    try:
        return json.loads(content) == json.loads(other)
    except ValueError:
        return False
