"""Nonsense for every key of every method: refused by `--dry_run`, or it runs and trains."""

from __future__ import annotations

import json
import math
import random
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.fuzz.case import Edit, Kind, Outcome
from tests.fuzz.command import Ended, command, judged

__all__ = ["Values"]

_WORDS = (
    *("nan", ".nan", ".inf", "-.inf", "-1", "0", "1", "-0.5", "0.5", "1.5", "1e300", "-1e300", "1e-320", "1e9999"),
    *("2147483648", "-9223372036854775809", "18446744073709551617", "x", "", " ", "null", "true", "[]", "[[]]", "{}"),
    *("[1, 2]", "[x]", "{x: 1}", "{name: x}", "a" * 5000, "\x00", "é\U0001f600", "../..", "${NOT_SET}", "%s{0}"),
)
# Keys whose values reach another place, the network, other processes, or more memory than there is.
_NOT_RUN = (
    *(
        "output_dir",
        "hub_",
        "push_to_hub",
        "report_to",
        "dataloader_",
        "dataset_num_proc",
        "deepspeed",
        "fsdp",
        "torch_",
    ),
    *(
        "use_vllm",
        "vllm_",
        "ddp_",
        "local_rank",
        "tpu",
        "accelerator_config",
        "parallelism_config",
        "prepare",
        "sweep",
    ),
    *(
        "logging_dir",
        "tensor_parallel",
        "context_parallel",
        "liger",
        "use_liger",
        "num_train_epochs",
        "max_steps",
        "trackio",
    ),
    *("resume_from_checkpoint", "overwrite_output_dir", "env", "extends", "half_precision", "neftune", "compile"),
)
_HUGE = ("1e300", "1e9999", "2147483648", "18446744073709551617")
_RECIPES = {
    **{"f_dpo": "tiny/f_dpo", "d2o": "tiny/d2o", "f_dpg": "tiny/f_dpg", "dph": "tiny/dph", "flat": "tiny/flat"},
    "f_distill": "tiny/distill",
}


class Values(Kind):
    """One key of one method, one value; where the dry run of f-DPO accepts it, the two steps are run."""

    name = "values"
    what = "nonsense for every key of every method; what the dry run accepts is run"
    few = 16

    @cached_property
    def keys(self) -> dict[str, list[str]]:
        """Dotted keys by method."""
        from fdiv.catalog import METHODS
        from fdiv.recipe.check import all_keys

        return {
            method: sorted({path for path, _ in all_keys(METHODS.find(method)) if not path.startswith("sweep.")})
            for method in METHODS
        }

    def members(self, rng: random.Random) -> list[Edit]:
        method = rng.choice(["f_dpo"] * 8 + sorted(self.keys))
        own = [key for key in self.keys[method] if "." not in key]
        key = rng.choice(own if rng.random() < 0.8 else self.keys[method])
        return [("value", method, key, rng.choice(_WORDS))]

    def judge(self, edits: list[Edit], folder: Path) -> Outcome:
        _, method, key, word = edits[0]
        recipe = self._recipe(method, folder)
        words = ["run", recipe, f"--{key}", word] if word else ["run", recipe, f"--{key}="]
        outcome = judged(command([*words, "--dry_run"], folder, 30))
        if outcome.verdict != "ok" or method != "f_dpo" or key.startswith(_NOT_RUN) or word in _HUGE:
            return outcome
        return self._run(command([*words, "--debug"], folder, 60), folder, key, word)

    def _recipe(self, method: str, folder: Path) -> Any:
        """Our own for f-DPO; for other methods a packaged one of the family, with the method replaced."""
        if method == "f_dpo":
            return self.world.write_recipe(folder)
        path = folder / "recipe.yaml"
        family = _RECIPES.get(method, "tiny/flat")
        path.write_text(f"extends: {family}\nmethod: {method}\noutput_dir: out\n", encoding="utf-8")
        return path

    def _run(self, ended: Ended, folder: Path, key: str, word: str) -> Outcome:
        from fdiv.errors import FdivError, RecipeError

        if isinstance(ended.error, FdivError):
            late = isinstance(ended.error, RecipeError) or type(ended.error) is FdivError
            if late:
                return Outcome("silent", f"the dry run accepts what the run refuses: {key}", str(ended.error))
            return Outcome("refused", "", str(ended.error))
        if ended.error is not None or ended.code != 0:
            return judged(ended)
        out = folder / "out"
        if not (out / "result.json").is_file():
            return Outcome("silent", f"no result.json with {key}")
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        if not result.get("steps"):
            return Outcome("silent", f"nothing was trained with {key}={word}")
        wrong = [name for name, value in result.items() if isinstance(value, float) and not math.isfinite(value)]
        return Outcome("silent", f"{wrong[0]} is not finite with {key}", repr(wrong)) if wrong else Outcome("ok")
