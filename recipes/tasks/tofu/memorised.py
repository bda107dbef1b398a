"""`prepare: {name: tofu_memorised}`: a pretrained model that has memorised some TOFU authors, and its retrained twin.

TOFU publishes its fine-tuned models for Llama-2, Phi and Llama-3 alone. Here any causal model is fine-tuned with LoRA
on the forget rows and some retain rows, and again on the retain rows alone; both adapters are merged. Unlike the small
models of `tofu_unlearning` the result still holds what the pretrained model knew, which a method can keep or lose.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fdiv.filling import check_template, fill

__all__ = ["TofuMemorisedConfig"]

Row = dict[str, Any]


@dataclass
class TofuMemorisedConfig:
    """Recipe block `prepare: {name: tofu_memorised}`.

    Args:
        model: path or hub name of the pretrained model.
        data: local folder with TOFU's files (`forget01_perturbed.json` …).
        split: forget split, `forget01`, `forget05` or `forget10`.
        forget_rows, retain_rows: how many rows are trained on: the first of the split and of `retain_perturbed`, 20 an
            author.
        utility_rows: rows of real authors and world facts that the evaluation keeps, evenly spaced.
        evaluated_retain_rows: retain rows that the evaluation keeps, evenly spaced; None: all of them.
        perturbed_answers: wrong answers per forget and retain row that the evaluation scores; TOFU has 5.
        epochs: passes over the rows. learning_rate: its maximum; it falls linearly to 0.
        batch_size: rows per step. lora_r: rank of the adapters, with alpha = 2 · rank, on all linear layers.
        question_format: prompt of a row; the answer follows after a space.
        seed: of the adapters' start and the order of the rows.
    """

    model: str = ""
    data: str = ""
    split: str = "forget01"
    forget_rows: int = 40
    retain_rows: int = 40
    utility_rows: int = 16
    evaluated_retain_rows: int | None = None
    perturbed_answers: int = 5
    epochs: int = 5
    learning_rate: float = 1e-3
    batch_size: int = 4
    lora_r: int = 16
    question_format: str = "Question: {question}\nAnswer:"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("prepare.model is not set: give the path or hub name of a causal language model")
        if not self.data:
            raise ValueError("prepare.data is not set: give a local folder with TOFU's files")
        check_template(self.question_format, ("question",), needs=("question",), what="prepare.question_format")
        for name in ("perturbed_answers", "epochs", "batch_size", "lora_r"):
            if getattr(self, name) < 1:
                raise ValueError(f"prepare.{name}={getattr(self, name)}: must be at least 1")
        # Half of them are for validation, and the two-sample test needs two rows.
        leasts = {"forget_rows": 4, "retain_rows": 2, "evaluated_retain_rows": 2, "utility_rows": 2}
        for name, least in leasts.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"prepare.{name}={value}: must be at least {least}")

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `data/` (what is trained on), `validation/` and `test/` (what is evaluated, in TOFU's file names: rows
        of even and of odd place), `model/`, `retain_model/`, and the latter's evaluation logs, of likelihoods alone,
        `retain_log/validation/TOFU_EVAL.json` and `retain_log/test/TOFU_EVAL.json`.

        Returns:
            The recipe keys it sets: `model_name_or_path`, `dataset_name`, `retain_dataset_name`.

        Raises:
            FileNotFoundError: the data folder lacks one of the files.
            ValueError: fewer rows than `forget_rows` or `retain_rows`.
        """
        from fdiv.eval.tofu.evaluation import TofuEvalConfig
        from fdiv.recipes.tasks.tofu.unlearning import write_retain_log

        output_dir = Path(output_dir)
        rows = self._rows()
        _write(output_dir / "data" / f"{self.split}.json", rows["forget"], ("question", "answer"))
        _write(output_dir / "data" / "retain.json", rows["retain"], ("question", "answer"))
        for half, first in (("validation", 0), ("test", 1)):
            self._write_half(output_dir / half, rows, first)
        for name, parts in (("model", ("forget", "retain")), ("retain_model", ("retain",))):
            self._train([row for part in parts for row in rows[part]], output_dir / name)
        for half in ("validation", "test"):
            config = TofuEvalConfig(
                data=str(output_dir / half),
                split=self.split,
                chat_template="never",
                question_format=self.question_format,
                generate=False,
                gradnorm=False,
                fluency_classifier="none",
            )
            write_retain_log(str(output_dir / "retain_model"), config, output_dir / "retain_log" / half)
        (output_dir / "prepare.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return {
            "model_name_or_path": str(output_dir / "model"),
            "dataset_name": str(output_dir / "data" / f"{self.split}.json"),
            "retain_dataset_name": str(output_dir / "data" / "retain.json"),
        }

    def _rows(self) -> dict[str, list[Row]]:
        """The rows by set: `forget`, `retain`, `holdout`, `ra` and `wf`, with TOFU's columns."""
        from fdiv.eval.benchmark.sources import load_rows

        names = {"retain": "retain_perturbed", "ra": "real_authors_perturbed", "wf": "world_facts_perturbed"}
        rows = {
            part: load_rows(self.data, name) for part, name in {"forget": f"{self.split}_perturbed", **names}.items()
        }
        for part, count in (("forget", self.forget_rows), ("retain", self.retain_rows)):
            if len(rows[part]) < count:
                raise ValueError(f"prepare.{part}_rows={count}: there are {len(rows[part])} {part} rows")
            rows[part] = rows[part][:count]
        holdout = load_rows(self.data, self.split.replace("forget", "holdout"))
        return {**rows, "holdout": _spaced(holdout, self.forget_rows)}

    def _write_half(self, folder: Path, rows: dict[str, list[Row]], first: int) -> None:
        """Every second evaluated row of each set, from place `first` on."""
        evaluated = {
            f"{self.split}_perturbed": self._fewer_answers(rows["forget"]),
            "retain_perturbed": self._fewer_answers(_spaced(rows["retain"], self.evaluated_retain_rows)),
            "real_authors_perturbed": _spaced(rows["ra"], self.utility_rows),
            "world_facts_perturbed": _spaced(rows["wf"], self.utility_rows),
            self.split.replace("forget", "holdout"): rows["holdout"],
        }
        for name, part in evaluated.items():
            _write(folder / f"{name}.json", part[first::2], tuple(part[0]))

    def _fewer_answers(self, rows: Sequence[Row]) -> list[Row]:
        return [{**row, "perturbed_answer": row["perturbed_answer"][: self.perturbed_answers]} for row in rows]

    def _train(self, rows: Sequence[Row], folder: Path) -> None:
        """Fine-tune the pretrained model with LoRA on `rows` and write it, the adapter merged, with its tokenizer."""
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
        from trl import SFTConfig, SFTTrainer

        from fdiv.models.fetch import find_model
        from fdiv.training.finite import refuse_broken

        set_seed(self.seed)
        source = find_model(self.model)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        prompts = [fill(self.question_format, question=row["question"]) for row in rows]
        texts = [{"prompt": p, "completion": f" {row['answer']}"} for p, row in zip(prompts, rows, strict=True)]
        args = SFTConfig(
            output_dir=str(folder / "training"),
            num_train_epochs=self.epochs,
            per_device_train_batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=5,
            weight_decay=0.0,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=False,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            seed=self.seed,
        )
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=self.lora_r, lora_alpha=2 * self.lora_r, target_modules="all-linear"),
        )
        trainer.train()
        refuse_broken(trainer.model, "the model that was trained", "lower learning_rate")
        trainer.model.merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "training_log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
        del trainer, model
        gc.collect()


def _write(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({column: row[column] for column in columns}) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _spaced(rows: Sequence[Row], count: int | None) -> list[Row]:
    """`count` evenly spaced rows; all of them for None or where there are no more."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]
