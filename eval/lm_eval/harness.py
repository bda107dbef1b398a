"""Tasks of lm-evaluation-harness on a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.inference.encoding import Encoding

__all__ = ["find_tasks", "imported", "run_tasks", "task_name"]


def imported() -> Any:
    """lm-eval.

    Raises:
        DataError: it is not installed, with the remedy.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise DataError(f"lm-eval cannot be imported ({error}): pip install 'fdiv[eval]'") from None
    return lm_eval


def find_tasks(tasks: Sequence[str], what: str = "--tasks") -> tuple[Any, list[str]]:
    """lm-eval's task manager and the names of the tasks; a task may also be a file `*.yaml`.

    Args:
        tasks: names of tasks or groups, or files. what: the flag or key, for errors.

    Raises:
        DataError: no such file or task, a file without a `task:` line.
    """
    manager_class = imported().tasks.TaskManager
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise DataError(f"{what} {file}: no such task file")
    include = sorted({str(file.parent) for file in files})
    # The index of all the harness's tasks takes seconds to read and is not needed for files alone.
    manager = manager_class(include_path=include or None, include_defaults=len(files) < len(tasks))
    names = [task_name(Path(task), what) if Path(task) in files else task for task in tasks]
    unknown = [task for task in names if not manager.match_tasks([task])]
    if unknown:
        raise DataError(f"{what}: lm-eval knows no {', '.join(unknown)}; `lm_eval ls tasks` lists what there is")
    return manager, names


def task_name(file: Path, what: str = "--tasks") -> str:
    """The `task:` (or `group:`) a task file defines, read without running its `!function` tags."""
    for line in file.read_text(encoding="utf-8").splitlines():
        key, colon, value = line.partition(":")
        if colon and key in ("task", "group") and value.strip():
            return value.split("#")[0].strip().strip("'\"")
    raise DataError(f"{what} {file}: no `task:` line, so it defines no task")


def run_tasks(
    lm: Any,
    manager: Any,
    tasks: Sequence[str],
    *,
    encoding: Encoding,
    seed: int = 0,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
) -> dict[str, Any] | None:
    """lm-eval's results; None on the processes that have none.

    Args:
        lm: lm-eval's model. manager, tasks: of `find_tasks`. encoding: system prompt and chat template.
        seed: of few-shot choices and bootstrap. num_fewshot: examples in the prompt (None: the task's own).
        limit: only the first items of every task. apply_chat_template: ask through the chat template.

    Raises:
        DataError: the rows of a task cannot be had.
    """
    if isinstance(lm.tokenizer.chat_template, str):  # lm-eval renders with it: no clock in a prompt
        lm.tokenizer.chat_template = encoding.template(lm.tokenizer)
    try:
        return imported().simple_evaluate(
            model=lm,
            system_instruction=encoding.system_prompt,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            apply_chat_template=apply_chat_template,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except ConnectionError as error:  # the hub, or a cache that does not hold the rows
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the rows of {', '.join(tasks)} cannot be had from the hub: {reason}; they need a connection once, with "
            "HF_HUB_OFFLINE and HF_DATASETS_OFFLINE unset"
        ) from error
