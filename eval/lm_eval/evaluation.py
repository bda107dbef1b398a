"""Tasks of lm-evaluation-harness around a training: `eval: {name: lm_eval, tasks: [wmdp_cyber]}`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from fdiv.errors import DataError
from fdiv.eval.lm_eval.harness import find_tasks, imported, run_tasks
from fdiv.evaluation import EvalContext
from fdiv.inference.encoding import Encoding
from fdiv.inference.processes import process_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LmEvalConfig", "task_values"]


@dataclass
class LmEvalConfig:
    """Settings of lm-eval in a recipe.

    Args:
        tasks: names of tasks or groups (`wmdp_bio`, `wmdp_cyber`, `mmlu`), or task files (`*.yaml`).
        num_fewshot: examples in the prompt; None: the task's own.
        limit: only the first items of every task.
        batch_size: rows of a forward.
        apply_chat_template: ask through the chat template.
        system_prompt, date_string, chat_template_kwargs: see `fdiv.inference.encoding.Encoding`.
        seed: of few-shot choices and bootstrap.
    """

    summary_metrics: ClassVar[tuple[str, ...]] = ()

    tasks: list[str] = field(default_factory=list)
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    apply_chat_template: bool = False
    system_prompt: str | None = None
    date_string: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks or not all(isinstance(task, str) and task for task in self.tasks):
            raise DataError(f"tasks={self.tasks!r:.60}: name at least one task of lm-eval, or a task file")
        for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"{name}={value}: must be at least {least}")

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, datasets: Any, context: EvalContext
    ) -> dict[str, Any]:
        """Evaluate a model in memory: values by `task/metric`, and their standard errors as `task/metric_se`."""
        encoding = Encoding(self.system_prompt, self.date_string, self.chat_template_kwargs)
        return task_values(
            model, tokenizer, self.tasks, encoding, batch_size=self.batch_size, limit=self.limit,
            num_fewshot=self.num_fewshot, apply_chat_template=self.apply_chat_template, seed=self.seed,
        )  # fmt: skip


def task_values(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    encoding: Encoding,
    *,
    batch_size: int = 8,
    **options: Any,
) -> dict[str, float]:
    """Values by `task/metric` and standard errors by `task/metric_se` of a model in memory, on one process.

    Args:
        model, tokenizer: of this process. tasks: names or files. encoding: system prompt and chat template.
        batch_size: rows of a forward. options: of `run_tasks`.

    Raises:
        DataError: lm-eval is not installed, an unknown task, several processes.
    """
    import copy

    from fdiv.eval.lm_eval.command import summarise

    if process_state().num_processes > 1:
        raise DataError("tasks of lm-eval around a training run on one process; use `fdiv eval lm_eval` afterwards")
    manager, names = find_tasks(tasks, "tasks")
    # A copy: lm-eval sets the pad token and the template of the tokenizer that it is passed.
    lm = imported().models.huggingface.HFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=batch_size,
        chat_template_args=encoding.template_variables(),
    )
    values, errors = summarise(run_tasks(lm, manager, names, encoding=encoding, **options) or {"results": {}})
    return values | {f"{name}_se": error for name, error in errors.items()}
