"""D²O inside a stock TRL `GRPOTrainer`: its samples are the anchors, and each row brings a rejected answer.

Runs offline in seconds: `python examples/d2o_in_grpo.py`. `D2OTrainer` is this with groups split over micro-batches
and processes, a second reference, refreshed references, metrics and checks.
"""

import tempfile

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from fdiv.alignment import d2o_loss
from fdiv.models.tiny import build_tiny_model


class MyD2OTrainer(GRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.processing_class.padding_side = "right"
        rejected = self.processing_class(
            [row["rejected"] for row in inputs], padding=True, add_special_tokens=False, return_tensors="pt"
        )
        self.processing_class.padding_side = "left"
        output["rejected_ids"], output["rejected_mask"] = rejected["input_ids"], rejected["attention_mask"]
        with torch.no_grad():
            output["ref_rejected"] = self.answer_log_prob(self.ref_model, output, "rejected")
        return output

    def answer_log_prob(self, model, batch, which):
        ids = torch.cat([batch["prompt_ids"], batch[f"{which}_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch[f"{which}_mask"]], 1)
        answer = batch[f"{which}_mask"]
        log_probs, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, answer.size(1))
        return (log_probs * answer).sum(1)

    def _compute_loss(self, model, inputs):
        reference = (inputs["ref_per_token_logps"] * inputs["completion_mask"]).sum(1)
        anchors = self.answer_log_prob(model, inputs, "completion") - reference
        rejected = self.answer_log_prob(model, inputs, "rejected") - inputs["ref_rejected"]
        # The batch is one group: K samples of one prompt, and its rejected answer K times.
        loss = d2o_loss(anchors[None], rejected[:1], alpha=0.1, beta=0.1).mean()
        self._metrics["train"]["log_ratio/rejected"].append(rejected[0].item())
        return loss / self.current_gradient_accumulation_steps


def unused_reward(completions, **_):
    return [0.0] * len(completions)


with tempfile.TemporaryDirectory() as folder:
    rows = [{"prompt": f"Please add {i} and 1.", "rejected": " Do it yourself!"} for i in range(16)]
    args = GRPOConfig(
        folder, beta=0.1, num_generations=4, per_device_train_batch_size=4, steps_per_generation=1, max_steps=20,
        max_completion_length=8, learning_rate=1e-3, bf16=False, gradient_checkpointing=False, logging_steps=1,
        report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    model = str(build_tiny_model(f"{folder}/model"))
    trainer = MyD2OTrainer(model, unused_reward, args=args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {logs[0]['loss']:.4f} -> {logs[-1]['loss']:.4f}")
    first, last = (entry["log_ratio/rejected"] for entry in (logs[0], logs[-1]))
    print(f"log-ratio of the rejected answer: {first:.2f} -> {last:.2f}")
