"""FLAT inside a stock TRL `SFTTrainer`: `flat_loss` is a function of two probabilities, the rest stays TRL's.

Runs offline in seconds: `python examples/flat_in_sft_trainer.py`. `FLATTrainer` is this plus template sources, retain
terms, metrics and checks.
"""

import tempfile

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from fdiv.models.tiny import build_tiny_model
from fdiv.unlearning import answer_score, flat_loss


class MyFLATTrainer(SFTTrainer):
    loss_is_scaled_for_ga = False  # a mean over the batch: Trainer divides by the accumulation steps

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scores = model(**inputs, use_cache=False, fused_lm_head=True)
        answers = answer_score(scores.log_probs, inputs["labels"][:, 1:] != -100, "log_mean")
        template, forget = answers[0::2], answers[1::2]  # the rows alternate
        loss = flat_loss(template, forget, "jensen_shannon").mean()
        return (loss, scores) if return_outputs else loss


with tempfile.TemporaryDirectory() as folder:
    rows = [
        {"prompt": f"Question {i}:", "completion": text} for i in range(16) for text in (" No idea.", f" It is {i}.")
    ]
    args = SFTConfig(folder, bf16=False, max_steps=20, learning_rate=1e-3, per_device_train_batch_size=8,
                     train_sampling_strategy="sequential", logging_steps=5, report_to=[])  # fmt: skip
    trainer = MyFLATTrainer(str(build_tiny_model(f"{folder}/model")), args=args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
