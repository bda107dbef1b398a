"""`prepare: {name: tofu_unlearning}`: the data keys of a TOFU run, and the retain model's evaluation logs.

Forget quality compares the unlearnt model with one that never saw the forget rows, so that model is evaluated once,
on all rows and on the cheap subset that epochs are selected by, and both logs are kept beside the build.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fdiv.filling import check_template
from fdiv.inference.prompting import PromptFormat

if TYPE_CHECKING:
    from fdiv.eval.benchmark.evaluation import ModelEvaluation
    from fdiv.eval.benchmark.settings import EvaluationSettings

__all__ = ["TofuUnlearningConfig", "write_retain_log"]


def write_retain_log(
    model_path: str, config: EvaluationSettings, folder: Path, evaluation: type[ModelEvaluation] | None = None
) -> Path:
    """Evaluate the model at `model_path` and write the benchmark's log into `folder`; returns its path.

    `evaluation` is `TofuEvaluation` (None) or `MuseEvaluation`; the log is `TOFU_EVAL.json` or `MUSE_EVAL.json`.
    On the accelerator in bfloat16 where there is one, else in float32.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fdiv.eval.benchmark.log import write_eval_log
    from fdiv.eval.tofu.evaluation import TofuEvaluation
    from fdiv.models.fetch import find_model

    model_path = find_model(model_path)
    run = (evaluation or TofuEvaluation)(config, AutoTokenizer.from_pretrained(model_path))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).to(device).eval()
    result = run.aggregate(run.run(model))
    path = folder / f"{run.benchmark.upper()}_EVAL.json"
    write_eval_log(path, result.log)
    return path


@dataclass
class TofuUnlearningConfig:
    """Recipe block `prepare: {name: tofu_unlearning}`.

    Args:
        data: hub dataset or local folder with TOFU's files (`forget10.json`, `forget10_perturbed.json` …).
        split: forget split, `forget01`, `forget05` or `forget10`.
        retain: retain rows: `retain90`, `retain95`, `retain99`; `retain_perturbed` for the small models, which were
            trained on those rows.
        retain_model: path or hub id of the retain model, to be evaluated here; None leaves `full` and `subset`
            out, and `retain_logs` of the evaluations must come from elsewhere.
        max_items: rows of every set in the subset.
        chat_template, question_format, answer_format, system_prompt, date_string, chat_template_kwargs, end_token: how
            rows are encoded (`fdiv.inference.prompting.PromptFormat`); as the recipe trains, where the block does not
            say.
    """

    data: str = "locuslab/TOFU"
    split: str = "forget10"
    retain: str = "retain90"
    retain_model: str | None = None
    max_items: int = 40
    chat_template: Literal["auto", "always", "never"] = "auto"
    question_format: str = "Question: {question}\nAnswer:"
    answer_format: str = " {answer}"
    system_prompt: str | None = None
    date_string: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    end_token: Literal["turn", "appended"] = "turn"

    def __post_init__(self) -> None:
        check_template(self.question_format, ("question",), needs=("question",), what="prepare.question_format")
        PromptFormat(**self._prompt())
        if self.max_items < 2:
            raise ValueError(f"prepare.max_items={self.max_items}: a two-sample test needs at least 2 rows")

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `full/TOFU_EVAL.json` and `subset/TOFU_EVAL.json` of the retain model.

        Returns:
            The recipe keys it sets: the forget rows as `dataset_name` and the retain rows as `retain_dataset_name`.

        Raises:
            FileNotFoundError: the local folder lacks one of the files.
            DataError: rows that the evaluation cannot use.
        """
        from fdiv.eval.tofu.evaluation import TofuEvalConfig

        keys = self._data_keys()
        if self.retain_model is not None:
            for name, max_items in (("subset", self.max_items), ("full", None)):
                config = TofuEvalConfig(
                    data=self.data,
                    split=self.split,
                    max_items=max_items,
                    gradnorm=False,
                    fluency_classifier="none",
                    **self._prompt(),
                )
                write_retain_log(self.retain_model, config, Path(output_dir) / name)
        return keys

    def _prompt(self) -> dict[str, Any]:
        names = ("chat_template", "question_format", "answer_format", "system_prompt", "date_string")
        return {name: getattr(self, name) for name in (*names, "chat_template_kwargs", "end_token")}

    def _data_keys(self) -> dict[str, Any]:
        folder = Path(self.data)
        if not folder.is_dir():
            return {
                "dataset_name": self.data,
                "dataset_config": self.split,
                "retain_dataset_name": self.data,
                "retain_dataset_config": self.retain,
            }
        keys = {}
        for key, name in (("dataset_name", self.split), ("retain_dataset_name", self.retain)):
            found = [folder / f"{name}{suffix}" for suffix in (".json", ".jsonl", ".parquet")]
            found = [path for path in found if path.is_file()]
            if not found:
                raise FileNotFoundError(f"{folder} has no {name}.json, .jsonl or .parquet: set prepare.data")
            keys[key] = str(found[0])
        return keys
