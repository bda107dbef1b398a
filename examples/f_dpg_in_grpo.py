"""f-DPG inside a stock TRL `GRPOTrainer`: the reward shapes a target density, p(x) ∝ a(x)·exp(reward/β).

Runs offline in half a minute: `python examples/f_dpg_in_grpo.py`. `FDPGTrainer` is this with Ẑ over all processes,
constraints, proposals, metrics and checks.
"""

import tempfile

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from fdiv.alignment import f_dpg_loss
from fdiv.alignment.f_dpg.loss import log_partition, target_divergence_terms
from fdiv.models.tiny import build_tiny_model

BETA = 0.05


class MyFDPGTrainer(GRPOTrainer):
    divergence = "jensen_shannon"

    def _calculate_rewards(self, *args, **kwargs):
        self.scores = super()._calculate_rewards(*args, **kwargs)  # of all processes; here there is one
        return self.scores

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        base = (output["ref_per_token_logps"] * output["completion_mask"]).sum(1)
        return output | {"log_target": base + self.scores[:, 0] / BETA}  # log P, not normalised

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        tokens = inputs["completion_mask"]
        log_probs, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, tokens.size(1))
        log_prob = (log_probs * tokens).sum(1)
        # The batch is one group, sampled from the policy itself: log Z of its prompt, then log t = log π/P + log Z.
        log_ratio = log_prob.detach() - inputs["log_target"]
        log_t = log_ratio + log_partition(-log_ratio)
        distance = target_divergence_terms(log_t, self.divergence).mean()
        self._metrics["train"]["distance"].append(distance.item())
        return f_dpg_loss(log_prob, log_t, self.divergence).mean() / self.current_gradient_accumulation_steps


def likes_digits(completions, **_):
    """The reward: the share of digits among the characters."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


with tempfile.TemporaryDirectory() as folder:
    args = GRPOConfig(
        folder, beta=1.0, num_generations=64, per_device_train_batch_size=64, steps_per_generation=1, max_steps=40,
        max_completion_length=8, learning_rate=3e-3, bf16=False, gradient_checkpointing=False, logging_steps=10,
        report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    model = str(build_tiny_model(f"{folder}/model"))
    rows = Dataset.from_list([{"prompt": "0 1 2 3"}] * 64)
    trainer = MyFDPGTrainer(model, likes_digits, args=args, train_dataset=rows)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name, key in (("JS to the target", "distance"), ("digits", "reward")):
        print(f"{name} {logs[0][key]:.3f} -> {logs[-1][key]:.3f}")
