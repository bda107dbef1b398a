"""Mutated recipes, read by `fdiv run --dry_run`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz.case import Edit, Kind, Outcome
from tests.fuzz.command import command, judged
from tests.fuzz.damage import NONSENSE, byte_damage, damage_bytes, damage_tree, misspelt, tree_damage

__all__ = ["Recipes"]

_LIMIT = 30.0  # seconds, for any answer
_SLOW = 5.0  # seconds of processor time for a message about a recipe; it is owed within one

# Documents that no recipe may be: what is wrong, and the text, into which the recipe is put for RECIPE.
_DOCUMENTS: dict[str, str] = {
    "aliases without end": "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" if i else "a0: &a0 [x, x]\n" for i in range(9)) + "RECIPE",
    "an alias of itself": "eval: &a {name: preferences, x: *a}\nRECIPE",
    "a list of itself": "sweep: &a [*a]\nRECIPE",
    "lists within lists": f"sweep: {'[' * 3000}{']' * 3000}\nRECIPE",
    "mappings within mappings": f"eval: {'{a: ' * 2000}1{'}' * 2000}\nRECIPE",
    "a NUL": "RECIPEseed: 1\x00\n",
    "a control character": "RECIPErun_name: \x07\n",
    "a Python object": "RECIPErun_name: !!python/object/apply:os.system ['touch canary']\n",
    "a Python name": "RECIPErun_name: !!python/name:os.system\n",
    "an unknown tag": "RECIPErun_name: !secret x\n",
    "a tag that does not fit": "RECIPEseed2: !!int x\n",
    "a set": "RECIPErun_name: !!set {a, b}\n",
    "a tab": "RECIPEeval:\n\tname: preferences\n",
    "two documents": "RECIPE---\nRECIPE",
    "a list": "- RECIPE",
    "a word": "f_dpo",
    "nothing": "",
    "a comment": "# nothing\n",
    "an open quote": "RECIPErun_name: 'x\n",
    "an open bracket": "RECIPEeval: [\n",
    "an unknown alias": "RECIPErun_name: *x\n",
    "a key that is a list": "RECIPE? [a, b]\n: 1\n",
    "a key that is a number": "RECIPE1: 2\n",
    "a key without a name": "RECIPE'': 2\n",
    "a long key": f"RECIPE{'k' * 20_000}: 1\n",
    "a merge of no mapping": "RECIPE<<: 3\n",
    "it extends itself": "extends: recipe.yaml\nRECIPE",
    "it extends nothing there is": "extends: nothing/there\nRECIPE",
    "it extends a list": "extends: [a]\nRECIPE",
    "no method": "seed: 1\n",
    "an unknown method": "method: f_dop\n",
    "a method that is a list": "method: [f_dpo]\n",
    "a method of no module": "method: no_such_module:Trainer\n",
}  # fmt: skip
_EXTRA_BLOCKS: tuple[dict[str, Any], ...] = (
    {"eval": {"name": "preferences", "batch_size": 2}},
    {"eval": [{"name": "preferences"}, {"name": "gibberish"}]},
    {"eval": {"name": "preferences", "require": {"accuracy": "improved"}, "summary": ["accuracy"]}},
    {"prepare": {"name": "tiny_preferences", "sft_steps": 2}},
    {"report": {"title": "A run"}},
    {"sweep": {"divergence": ["reverse_kl", "forward_kl"], "seed": [1, 2]}},
    {"sweep": {"method": {"a": {"beta": 0.1}, "b": {"beta": 0.2}}, "metrics": {"train/loss": "lower"}}},
    {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 0.5}, "warmup_steps": 1},
    {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj"]},
    {"optim": "adamw_torch", "optim_args": "", "adam_beta1": 0.9, "max_grad_norm": 1.0, "weight_decay": 0.0},
    {"env": {"SOME_NAME": "some value"}},
    {"model_init_kwargs": {"attn_implementation": "sdpa"}, "dtype": "float32"},
)


class Recipes(Kind):
    """Documents that are no recipe, damaged text, wrong keys and values."""

    name = "recipes"
    what = "mutated YAML, `fdiv run --dry_run`"
    few = 40

    def members(self, rng: random.Random) -> list[Edit]:
        extra = rng.randrange(len(_EXTRA_BLOCKS))
        edits: list[Edit] = [("with", extra)]
        tree = self.world.recipe(Path("out"), **_EXTRA_BLOCKS[extra])
        kind = rng.choice(["document", "text", "text", "tree", "tree", "tree", "key"])
        if kind == "document":
            return [*edits, ("document", rng.choice(list(_DOCUMENTS)))]
        if kind == "key":
            key = rng.choice(list(tree))
            return [
                *edits,
                rng.choice([("twice", key), ("unknown key", misspelt(key, rng)), ("unknown key", key[::-1])]),
            ]
        if kind == "text":
            return [*edits, *(byte_damage(rng) for _ in range(rng.choice([1, 1, 3])))]
        return [*edits, *(tree_damage(rng, tree, NONSENSE) for _ in range(rng.choice([1, 1, 2])))]

    def judge(self, edits: list[Edit], folder: Path) -> Outcome:
        content, must_refuse = self._content(edits, folder)
        path = folder / "recipe.yaml"
        path.write_bytes(content)
        ended = command(["run", path, "--dry_run"], folder, _LIMIT)
        outcome = judged(ended, must_refuse)
        if (folder / "canary").exists():
            return Outcome("escape", "the recipe ran a command")
        if not outcome.is_fault and ended.seconds > _SLOW:
            return Outcome("hang", f"an answer after {ended.seconds:.0f} s of processor time", outcome.message)
        if outcome.verdict != "ok":
            return outcome
        return self._the_same_again(ended.out, folder)

    def _content(self, edits: list[Edit], folder: Path) -> tuple[bytes, str]:
        """The file, and what is certainly wrong with it."""
        extra = next((edit[1] for edit in edits if edit[0] == "with"), None)
        tree = self.world.recipe(folder / "out", **(_EXTRA_BLOCKS[extra] if extra is not None else {}))
        known = set(tree)
        must_refuse = ""
        for edit in edits:
            if edit[0] in ("set", "delete", "rename"):
                tree = damage_tree(tree, edit)
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        for name, *values in edits:
            if name == "document":
                text, must_refuse = _DOCUMENTS[values[0]].replace("RECIPE", text), values[0]
            elif name == "twice":
                text, must_refuse = f"{text}{values[0]}: {tree[values[0]]!r}\n", "a key twice"
            elif name == "unknown key" and values[0] and values[0] not in known:
                text = f"{text}{values[0]}: 1\n"
                must_refuse = "" if self._is_key(values[0]) else "an unknown key"
        content = text.encode("utf-8", "surrogatepass")
        for edit in edits:
            if edit[0] not in ("with", "document", "twice", "unknown key", "set", "delete", "rename"):
                content = damage_bytes(content, edit)
        return content, must_refuse

    def _is_key(self, name: str) -> bool:
        """A misspelt key may be another key."""
        from fdiv.catalog import METHODS
        from fdiv.recipe.check import top_section

        keys = top_section(METHODS.find("f_dpo")).keys
        return name in keys or name.removeprefix("no_") in keys

    def _the_same_again(self, resolved: str, folder: Path) -> Outcome:
        """A resolved recipe resolves to itself."""
        path = folder / "resolved.yaml"
        path.write_text(resolved, encoding="utf-8")
        again = command(["run", path, "--dry_run"], folder, _LIMIT)
        if again.code != 0:
            reason = (
                "the resolved recipe is refused" if again.error is None else "the resolved recipe ends in a traceback"
            )
            return Outcome("silent", reason, " ".join(again.messages) or repr(again.error))
        before, after = (yaml.safe_load(text) for text in (resolved, again.out))
        if repr(before) != repr(after):
            names = [name for name in before.keys() | after.keys() if repr(before.get(name)) != repr(after.get(name))]
            said = "; ".join(f"{name}: {before.get(name)!r}, then {after.get(name)!r}" for name in sorted(names))
            return Outcome("silent", f"the resolved recipe resolves to another {sorted(names)[:1]}", said)
        return Outcome("ok")
