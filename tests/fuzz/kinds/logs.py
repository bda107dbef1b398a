"""Evaluation logs, and the records that runs and sweeps leave for reports."""

from __future__ import annotations

import json
import math
import random
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.fuzz.case import Edit, Kind, Outcome
from tests.fuzz.command import command, judged
from tests.fuzz.damage import NONSENSE, byte_damage, damage_bytes, damage_tree, tree_damage

__all__ = ["Logs"]

_EXAMPLES = "eval/after/examples_preferences.jsonl"
_RECORDS = ("result.json", "environment.json", "metrics.jsonl", "recipe_resolved.yaml", _EXAMPLES)
_NUMBERS: tuple[Any, ...] = (*NONSENSE, -1.0, 1.5, 1e9, 1e308, -1e-9, [0.5], [0.5, 2.0], [-1.0], "0.5", True)


class Logs(Kind):
    """`fdiv eval tofu --from_logs` of a damaged log, `fdiv report` of a damaged run or sweep."""

    name = "logs"
    what = "evaluation logs, records of runs and sweeps: values and bytes damaged"
    few = 10

    def members(self, rng: random.Random) -> list[Edit]:
        target = rng.choice(["log", "log", "retain log", "record", "record", "sweep"])
        if target in ("log", "retain log"):
            edits: list[Edit] = [("target", target)]
            content = self.log
        else:
            name = "results.json" if target == "sweep" else rng.choice(_RECORDS)
            edits = [("target", target), ("file", name)]
            content = self.sweep if target == "sweep" else self._tree(name)
        if target in ("record", "sweep") and rng.random() < 0.4:  # as a record of before there were digests
            edits.append(("delete", ("digest",)))
        for _ in range(rng.choice([1, 1, 1, 2])):
            if content is None or rng.random() < 0.4:
                edits.append(byte_damage(rng))
            elif rng.random() < 0.15:
                edits.append(("whole", rng.choice(NONSENSE)))
            else:
                edits.append(_deep_damage(rng, content))
        return edits

    @cached_property
    def run(self) -> Path:
        """The output of a finished run."""
        folder = self.world.folder / "finished"
        folder.mkdir(parents=True)
        evaluation = {"name": "preferences", "batch_size": 4}
        ended = command(["run", self.world.write_recipe(folder, eval=evaluation)], folder)
        if ended.code != 0:
            raise RuntimeError(f"the run of the world failed: {ended.error!r} {ended.messages}") from ended.error
        return folder / "out"

    @cached_property
    def sweep(self) -> dict[str, Any]:
        """`results.json` of a sweep of two cells."""
        folder = self.world.folder / "swept"
        folder.mkdir(parents=True)
        recipe = self.world.write_recipe(folder, eval={"name": "preferences"}, max_steps=1)
        ended = command(["sweep", recipe, "--divergences", "reverse_kl", "forward_kl"], folder, 120)
        if ended.code != 0:
            raise RuntimeError(f"the sweep of the world failed: {ended.error!r} {ended.messages}") from ended.error
        self.swept = folder / "out"
        return json.loads((self.swept / "results.json").read_text(encoding="utf-8"))

    @cached_property
    def log(self) -> dict[str, Any]:
        """A log of four rows in open-unlearning's layout."""

        def rows(**columns: Any) -> dict[str, Any]:
            return {"value_by_index": {str(i): dict(columns) for i in range(4)}}

        log: dict[str, Any] = {}
        for part in ("forget", "retain", "ra", "wf"):
            log[f"{part}_Q_A_Prob"] = rows(prob=0.5, avg_loss=0.7)
            log[f"{part}_Q_A_PARA_Prob"] = rows(prob=0.4, avg_loss=0.9)
            log[f"{part}_Q_A_PERT_Prob"] = rows(prob=[0.1, 0.2], avg_loss=[2.3, 1.6])
            log[f"{part}_Q_A_ROUGE"] = rows(
                rouge1_recall=0.5, rougeL_f1=0.4, rougeL_recall=0.3, generation="a", ground_truth="b"
            )
        log["mia_min_k"] = {"forget": rows(score=1.0), "holdout": rows(score=2.0)}
        log["extraction_strength"] = rows(score=0.2)
        return log

    def _tree(self, name: str) -> Any:
        text = (self.run / name).read_text(encoding="utf-8")
        return json.loads(text) if name.endswith(".json") else None

    def judge(self, edits: list[Edit], folder: Path) -> Outcome:
        target = next((edit[1] for edit in edits if edit[0] == "target"), "log")
        damage = [edit for edit in edits if edit[0] not in ("target", "file")]
        if target in ("log", "retain log"):
            return self._log(target, damage, folder)
        name = next((edit[1] for edit in edits if edit[0] == "file"), "result.json")
        if target == "sweep":
            _ = self.sweep
            source, name = self.swept, "results.json"
        else:
            source = self.run
        place = self.world.copy(source, folder)
        file = place / name
        original = file.read_bytes()
        file.write_bytes(_damaged(original, damage))
        ended = command(["report", place, "--output", folder / "report.html"], folder, 60)
        outcome = judged(ended)
        changed = _meaning(file.read_bytes(), name) != _meaning(original, name)
        if outcome.verdict == "ok" and changed and name not in ended.err and "not checked" not in ended.err:
            return Outcome("silent", f"a changed {name} is shown without a word")
        return outcome

    def _log(self, target: str, damage: list[Edit], folder: Path) -> Outcome:
        whole, damaged = folder / "whole.json", folder / "damaged.json"
        whole.write_text(json.dumps(self.log), encoding="utf-8")
        damaged.write_bytes(_damaged(json.dumps(self.log).encode(), damage))
        log, retain = (damaged, whole) if target == "log" else (whole, damaged)
        words = ["eval", "tofu", "--from_logs", log, "--retain_logs", retain, "--output", folder / "out.json"]
        outcome = judged(command(words, folder, 60))
        if outcome.verdict != "ok":
            return outcome
        found = json.loads((folder / "out.json").read_text(encoding="utf-8"))
        for name, value in _numbers(found):
            if not math.isfinite(value) or _out_of_range(name, value):
                return Outcome("silent", f"{name} out of its range", f"{name} = {value}")
        return outcome


def _deep_damage(rng: random.Random, content: Any) -> Edit:
    """Mostly values of rows, which lie four levels deep."""
    edit = tree_damage(rng, content, _NUMBERS)
    for _ in range(6):
        if len(edit[1]) >= 3:
            break
        edit = tree_damage(rng, content, _NUMBERS)
    return edit


def _damaged(content: bytes, damage: list[Edit]) -> bytes:
    for edit in damage:
        if edit[0] == "whole":
            content = json.dumps(edit[1]).encode()
        elif edit[0] in ("set", "delete", "rename"):
            try:
                tree = json.loads(content)
            except ValueError:
                continue
            content = json.dumps(damage_tree(tree, edit), indent=2).encode()
        else:
            content = damage_bytes(content, edit)
    return content


def _meaning(content: bytes, name: str) -> Any:
    """What a file says: white space and the order of keys do not matter in JSON."""
    if name.endswith(".json"):
        try:
            return json.dumps(json.loads(content), sort_keys=True)
        except ValueError:
            return None
    return content.strip()


def _numbers(tree: Any, name: str = "") -> list[tuple[str, float]]:
    if isinstance(tree, dict):
        return [
            pair
            for key, value in tree.items()
            for pair in _numbers(value, key if key not in ("value", "se") else name)
        ]
    return [(name, tree)] if isinstance(tree, float) else []


def _out_of_range(name: str, value: float) -> bool:
    share = name.endswith(("_Prob", "_ROUGE", "_normalised", "utility", "_strength", "quality")) or name == "prob"
    return share and not -1e-3 <= value <= 1 + 1e-3
