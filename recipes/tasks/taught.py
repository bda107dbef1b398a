"""Recipe block `prepare: {name: taught}`: `fdiv teach` before training, on a task's own data or one's own.

    prepare:
      name: taught
      task: {name: tiny_distillation, seed: 0}      # any other builder of `prepare:`, with its keys
      k: 64

or, with `model` and `dataset` instead of `task`, on a teacher and rows that exist.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from fdiv.distillation.teach.config import TeachConfig
from fdiv.recipes.tasks.inner import built_task, inner_builder

__all__ = ["TaughtConfig"]


@dataclass
class TaughtConfig(TeachConfig):
    """`prepare: {name: taught}`: the keys of `fdiv teach`, and `task`.

    Teacher, student, dataset and its splits may come from `task`: the recipe keys `teacher_model_name_or_path`,
    `model_name_or_path`, `dataset_name`, `dataset_train_split` and `dataset_test_split` that its builder sets. What
    stands here wins. `max_completion_length` and the keys of the chat template are those of the training, where the
    block does not say.

    It runs on the main process alone while the others of a launcher wait; for a large teacher run `fdiv teach` on all
    of them first, and give the recipe `teacher: {name: cache, path: DIR}`.

    Args:
        task: Another builder of `prepare:` with its keys, `{name: …}`, built first, into `task/`.
    """

    takes_over: ClassVar[tuple[str, ...]] = ("max_completion_length", "temperature")

    task: dict[str, Any] | None = field(
        default=None, metadata={"help": "Another builder that makes model and data first: {name: ...} with its keys."}
    )
    splits: list[str] = field(
        default_factory=list, metadata={"help": "Splits of the dataset; empty: those that the task names, else train."}
    )

    def __post_init__(self) -> None:
        named, self.splits = self.splits, self.splits or ["train"]
        super().__post_init__()
        self.splits = named
        if self.task is not None:
            inner_builder(self.task, TaughtConfig)
            return
        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"prepare.{name} is missing: give it, or a `task` that builds it")

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Build `task/`, and write the cache into `teacher/`.

        Returns:
            The recipe keys it sets: those of the task; `teacher`, the cache; `temperature`, that of its distributions;
            and `max_completion_length`.

        Raises:
            ValueError: the task sets no teacher or dataset, and none is given.
            DataError, RolloutError: see `fdiv.distillation.teach.run.teach`.
        """
        from fdiv.distillation.teach.command import show_share
        from fdiv.distillation.teach.run import teach

        output_dir = Path(output_dir)
        builder = None if self.task is None else inner_builder(self.task, TaughtConfig)
        keys = {} if builder is None else built_task(self.task, builder, output_dir)
        show_share(teach(self._settled(keys), output_dir / "teacher"))
        return {
            **keys,
            "teacher": {"name": "cache", "path": str(output_dir / "teacher")},
            "temperature": self.temperature,
            "max_completion_length": self.max_completion_length,
        }

    def _settled(self, keys: dict[str, Any]) -> TeachConfig:
        """The settings of the pass, with what the task set."""
        settings = {entry.name: getattr(self, entry.name) for entry in fields(TeachConfig)}
        for name, key in (("model", "teacher_model_name_or_path"), ("dataset", "dataset_name")):
            settings[name] = settings[name] or keys.get(key)
            if not settings[name]:
                raise ValueError(f"the task {self.task} sets no {key}: give prepare.{name}")
        settings["student"] = settings["student"] or keys.get("model_name_or_path")
        if not settings["splits"]:
            named = [keys[key] for key in ("dataset_train_split", "dataset_test_split") if key in keys]
            settings["splits"] = list(dict.fromkeys(named)) or ["train"]
        return TeachConfig(**settings)
