"""Any divergence inside a stock TRL `DistillationTrainer`, over the whole vocabulary and without the logits in full.

Runs offline in seconds: `python examples/distillation_in_trl.py`. `FDistillTrainer` is this with given completions,
heads of two widths, LoRA, ZeRO and FSDP, metrics and checks.
"""

import tempfile

import torch
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer

from fdiv.distillation import vocabulary_divergence
from fdiv.models.tiny import build_tiny_model
from fdiv.models.vocabulary import last_hidden_states, model_head


class MyDistillationTrainer(DistillationTrainer):
    divergence = "squared_hellinger"

    def _compute_loss(self, student, inputs, num_items_in_batch):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        tokens = inputs["completion_mask"].bool()
        hidden = last_hidden_states(student, ids, attention, tokens.size(1))[tokens]
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():
            other = last_hidden_states(teacher, ids, attention, tokens.size(1))[tokens]
        heads = model_head(student).weight, model_head(teacher).weight
        distance = vocabulary_divergence(
            hidden, heads[0], other, heads[1], self.divergence, temperature=self.temperature
        )
        return distance.sum() / num_items_in_batch, torch.zeros(()), tokens.sum()  # loss, entropy (not made), tokens


with tempfile.TemporaryDirectory() as folder:
    student = str(build_tiny_model(f"{folder}/student", seed=0))
    teacher = str(build_tiny_model(f"{folder}/teacher", seed=1))
    args = DistillationConfig(
        folder, beta=0.0, max_steps=20, per_device_train_batch_size=16, max_completion_length=8, learning_rate=3e-3,
        temperature=1.0, bf16=False, gradient_checkpointing=False, logging_steps=1, report_to=[], disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": f"{i} + 1 ="} for i in range(64)])
    # TRL's β = 0 is KL(teacher‖student), `forward_kl` here: the same first loss.
    for name in ("TRL", "forward_kl", "squared_hellinger", "jensen_shannon"):
        kind = DistillationTrainer if name == "TRL" else MyDistillationTrainer
        trainer = kind(student, teacher, args=args, train_dataset=rows)
        trainer.divergence = name
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
