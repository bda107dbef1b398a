"""Run by test_f_dpo_processes.py on one process or two: f-DPO, an evaluation, then a poisoned step. Writes one JSON file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.alignment import FDPOConfig, FDPOTrainer
from fdiv.cli.ending import exit_after
from fdiv.errors import NonFiniteLossError
from fdiv.eval.preferences.evaluation import PreferencesEvalConfig
from fdiv.evaluation import EvalContext


def main(model_dir: str, data: str, batch_size: str, output: str) -> None:
    rows = load_dataset("json", data_files=data, split="train")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    args = FDPOConfig(
        output_dir=f"{output}.run", divergence="forward_kl", per_device_train_batch_size=int(batch_size),
        per_device_eval_batch_size=int(batch_size), max_steps=10, learning_rate=0.05, optim="sgd", bf16=False,
        gradient_checkpointing=False, use_cpu=True, logging_steps=1, report_to=[], save_strategy="no",
        disable_tqdm=True, precompute_ref_log_probs="precompute" in output,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    # Eleven evaluation rows: two processes must not count the row that fills the last batch.
    trainer = FDPOTrainer(
        model, args=args, train_dataset=rows, eval_dataset=rows.select(range(11)), processing_class=tokenizer
    )
    trainer.train()
    history, evaluated = trainer.state.log_history, trainer.evaluate()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    trainer.model.eval()
    config = PreferencesEvalConfig(num_samples=2, max_prompts=5, max_new_tokens=4, batch_size=2)
    context = EvalContext(args, Path(output).parent, reference_model=trainer.ref_model, seed=3, stage="after")
    preferences = config.evaluate(trainer.model, tokenizer, {"test": rows.select(range(11))}, context)

    # One process alone sees a non-finite loss; all must stop.
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    if trainer.accelerator.is_main_process:
        columns = {"loss": torch.tensor([float("inf")]), "chosen_log_ratio": torch.zeros(1)}
    else:
        columns = {"loss": torch.ones(1), "chosen_log_ratio": torch.ones(1)}
    assert batch["input_ids"].numel()
    stopped = False
    try:
        trainer.record_examples(columns)
    except NonFiniteLossError as error:
        stopped = "the loss is inf" in str(error)
    stopped_everywhere = trainer.accelerator.gather(torch.tensor([stopped])).tolist()
    if trainer.accelerator.is_main_process:
        result = {"history": history, "evaluated": evaluated, "preferences": preferences, "weights": weights.tolist()}
        result |= {"stopped": stopped_everywhere, "processes": trainer.accelerator.num_processes}
        Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    exit_after(lambda: main(*sys.argv[1:]))
