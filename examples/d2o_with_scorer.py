"""D²O from negatives alone, with a scorer of your own watching the anchors.

Runs offline in seconds: `python examples/d2o_with_scorer.py`. Each row has a prompt and a rejected answer; the model's
own samples take the place of a chosen one. The scorer has TRL's reward signature and is logged, not trained on.
"""

import tempfile

from datasets import Dataset

from fdiv.alignment import D2OConfig, D2OTrainer
from fdiv.models.tiny import build_tiny_model


def rudeness(completions, **columns):
    """Share of exclamation marks: any function of prompts, completions and columns will do."""
    return [text.count("!") / max(len(text), 1) for text in completions]


with tempfile.TemporaryDirectory() as folder:
    rows = [{"prompt": f"Please add {i} and 1.", "rejected": " Do it yourself!"} for i in range(16)]
    args = D2OConfig(
        folder, bf16=False, max_steps=12, learning_rate=1e-3, logging_steps=4, report_to=[],
        per_device_train_batch_size=8, num_generations=4, max_completion_length=8, harmful_above=0.05,
    )  # fmt: skip
    model = str(build_tiny_model(f"{folder}/model"))
    trainer = D2OTrainer(model, args=args, train_dataset=Dataset.from_list(rows), harmfulness_func=rudeness)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {logs[0]['loss']:.4f} -> {logs[-1]['loss']:.4f}")
    print(f"rejected answers: {logs[0]['logps/rejected']:.2f} -> {logs[-1]['logps/rejected']:.2f} nats")
    print(f"harmful anchors: {logs[-1]['harmfulness/harmful_share']:.3f}")
    print(f"Jeffreys: {logs[-1]['divergence/jeffreys']:.3f} ± {logs[-1]['divergence/jeffreys_se']:.3f}")
