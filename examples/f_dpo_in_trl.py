"""f-DPO inside a stock TRL `DPOTrainer`: the loss is a function of two log-ratios, the rest stays TRL's.

Runs offline in seconds: `python examples/f_dpo_in_trl.py`. `FDPOTrainer` is this plus metrics and checks.
"""

import tempfile

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from fdiv.alignment import f_dpo_loss
from fdiv.models.tiny import build_tiny_model


class MyFDPOTrainer(DPOTrainer):
    def _compute_loss(self, model, inputs, return_outputs):
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(inputs["input_ids"], inputs["attention_mask"], labels=labels, fused_lm_head=True)
        reference = torch.cat(self.compute_ref_log_probs(self.ref_model or self.model, inputs))
        chosen, rejected = (outputs.log_probs.sum(1) - reference).chunk(2)  # the batch is [chosen; rejected]
        loss = f_dpo_loss(chosen, rejected, {"name": "alpha", "alpha": 0.3}, self.beta).mean()
        return (loss, outputs) if return_outputs else loss


with tempfile.TemporaryDirectory() as folder:
    rows = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i}"} for i in range(32)]
    args = DPOConfig(folder, bf16=False, max_steps=20, learning_rate=1e-3, logging_steps=5, report_to=[])
    model = str(build_tiny_model(f"{folder}/model"))
    trainer = MyFDPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
