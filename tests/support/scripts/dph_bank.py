"""Run by test_dph_processes.py on two processes: an answer bank that grows, with dynamic sampling. Writes a JSON file."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.runs.dph import PROMPTS, correct, load, trainer


def main(model_dir: str, folder: str, resume: str, output: str) -> None:
    """Four steps with a checkpoint after two, or the last two from it."""
    made = trainer(
        load(model_dir), folder, rewards=correct, prompts=[*PROMPTS, *(f"1 {text}" for text in PROMPTS)], bank="policy", mode="text", resample_groups=2,
        per_device_train_batch_size=8, num_generations=2, rehearsal_batch_size=4, max_steps=4, save_strategy="steps",
        save_steps=2, rehearsal_coefficient=0.5, divergence="forward_kl",
    )  # fmt: skip
    made.train(resume_from_checkpoint=resume or None)
    result = {
        "processes": made.accelerator.num_processes,
        "rows": [[row.prompt_ids, row.completion_ids, row.reference_log_probs] for row in made.rehearsal],
        "history": made.state.log_history,
    }
    Path(f"{output}.{made.accelerator.process_index}").write_text(json.dumps(result))
