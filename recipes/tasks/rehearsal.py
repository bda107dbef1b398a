"""Recipe block `prepare: {name: rehearsal}`: pre-sampling before training, on a task's own data or one's own.

    prepare:
      name: rehearsal
      task: {name: arithmetic, seed: 0}      # any other builder of `prepare:`, with its keys
      reward: "fdiv.recipes.tasks.arithmetic:arithmetic_reward"
      threshold: 7/8

or, with `model` and `dataset` instead of `task`, on a model and rows that exist.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fdiv.recipes.tasks.inner import built_task, inner_builder
from fdiv.rl.presample.config import PresampleConfig
from fdiv.rl.presample.output import EXPLORE, REHEARSAL, write_rows

__all__ = ["RehearsalConfig"]


@dataclass
class RehearsalConfig(PresampleConfig):
    """`prepare: {name: rehearsal}`: the keys of `fdiv presample`, and `task`.

    The model, the dataset, its split and the reward may come from `task`: the recipe keys `model_name_or_path`,
    `dataset_name`, `dataset_train_split` and `reward` that its builder sets. What stands here wins.

    It runs on the main process alone while the others of a launcher wait; for a large model run `fdiv presample` on
    all of them first, and give the recipe its files.

    Args:
        task: Another builder of `prepare:` with its keys, `{name: …}`, built first, as `task/`. Rehearsal blocks
            beside each other that name the same task share one build. With it, a relative `dataset` is looked up in
            what it built.
    """

    task: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Another builder that makes model and data first: {name: ...} with its keys. A relative "
            "`dataset` is looked up in what it built."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task is None:
            for name in ("model", "dataset", "reward"):
                if not getattr(self, name):
                    raise ValueError(f"prepare.{name} is missing: give it, or a `task` that builds it")
        else:
            self._builder()

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Build `task/`, pre-sample into `rehearsal/`.

        Returns:
            The recipe keys it sets: those of the task; `dataset_name`, the explore set as split `train` and, where
            the data has a test split, that as `test`; `rehearsal_cache`; `temperature`, that of its
            log-probabilities; `reward`; and, where they are set here, `mode` and `reward_threshold`, so that the
            training tells answers apart, and right ones from wrong ones, as the cache did.

        Raises:
            ValueError: the task sets no model or dataset, and none is given; there is no reward.
            DataError, RolloutError: see `fdiv.rl.presample.run.presample`.
        """
        from fdiv.rl.presample.run import presample

        output_dir = Path(output_dir)
        folder = output_dir / "rehearsal"
        keys = {} if self.task is None else built_task(self.task, self._builder(), output_dir)
        settings = self._settled(keys, output_dir / "task")
        presample(settings, folder)
        data = output_dir / "data"
        data.mkdir(exist_ok=True)
        shutil.copyfile(folder / EXPLORE, data / "train.parquet")
        _keep_test_split(settings.dataset, keys.get("dataset_test_split", "test"), data / "test.parquet")
        return {
            **{key: value for key, value in keys.items() if key != "dataset_config"},
            "model_name_or_path": settings.model,
            "dataset_name": str(data),
            "dataset_train_split": "train",
            "dataset_test_split": "test",
            "rehearsal_cache": str(folder / REHEARSAL),
            "reward": settings.reward,
            "temperature": self.scoring_temperature,
            **{name: getattr(self, name) for name in ("mode", "reward_threshold") if self._is_set(name)},
        }

    def _is_set(self, name: str) -> bool:
        return any(entry.name == name and getattr(self, name) != entry.default for entry in fields(self))

    def _settled(self, keys: dict[str, Any], task: Path) -> PresampleConfig:
        """The settings of the pass, with what the task set."""
        settings = {entry.name: getattr(self, entry.name) for entry in fields(PresampleConfig)}
        if (
            settings["dataset"]
            and not Path(settings["dataset"]).is_absolute()
            and (task / settings["dataset"]).exists()
        ):
            settings["dataset"] = str(task / settings["dataset"])
        if not settings["dataset"] and "dataset_train_split" in keys:
            settings["split"] = keys["dataset_train_split"]
        for name, key in (("model", "model_name_or_path"), ("dataset", "dataset_name"), ("reward", "reward")):
            settings[name] = settings[name] or keys.get(key)
            if not settings[name]:
                raise ValueError(f"the task {self.task} sets no {key}: give prepare.{name}")
        return PresampleConfig(**settings)

    def _builder(self) -> Any:
        return inner_builder(self.task, RehearsalConfig)


def _keep_test_split(dataset: str, split: str, path: Path) -> None:
    """Write the test split of the data that was pre-sampled, if it has one."""
    from fdiv.rows.loading import named_dataset

    found = named_dataset(dataset)
    if hasattr(found, "keys") and split in found:
        write_rows(path, found[split])
