"""`rehearsal_loss` in a stock TRL `GRPOTrainer`: the policy learns a reward and keeps to samples of its own start.

Runs offline in half a minute: `python examples/rehearsal_in_grpo.py`. `DPHTrainer` is this in one forward, on several
processes, with a verified cache on disk.
"""

import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from fdiv.models.logprobs import token_scores
from fdiv.models.tiny import build_tiny_model
from fdiv.rl import rehearsal_loss

LENGTH = 8


class MyGRPOTrainer(GRPOTrainer):
    eta, cache = 0.0, None

    def rehearsal(self, model):
        ids, completion_mask, reference = self.cache
        scores = token_scores(model, ids, torch.ones_like(ids), completion_mask)
        return rehearsal_loss(scores.log_probs - reference, scores.mask, "forward_kl", coefficient_clip=10.0).mean()

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        return loss + self.eta * self.rehearsal(model) / self.current_gradient_accumulation_steps


def likes_digits(completions, **_):
    """The reward: the share of digits among the characters."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


with tempfile.TemporaryDirectory() as folder:
    path = str(build_tiny_model(f"{folder}/model"))
    # Samples of the start on a prompt it is to keep, and their log-probabilities, once: no reference in memory later.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    torch.manual_seed(0)
    prompt = tokenizer("The capital of", return_tensors="pt")
    ids = model.generate(**prompt, do_sample=True, top_k=0, max_new_tokens=LENGTH, num_return_sequences=64)
    completion_mask = torch.ones_like(ids)
    completion_mask[:, : prompt.input_ids.size(1)] = 0
    completion_mask &= ids != tokenizer.pad_token_id
    with torch.no_grad():
        reference = token_scores(model, ids, torch.ones_like(ids), completion_mask).log_probs

    for eta in (0.0, 1.0):
        args = GRPOConfig(
            folder, max_steps=25, per_device_train_batch_size=64, num_generations=64, max_completion_length=LENGTH,
            learning_rate=3e-3, loss_type="grpo", bf16=False, gradient_checkpointing=False, report_to=[],
            logging_steps=25, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": "0 1 2 3"}] * 64)
        trainer = MyGRPOTrainer(path, likes_digits, args=args, train_dataset=rows)
        trainer.eta, trainer.cache = eta, (ids, completion_mask, reference)
        trainer.train()
        reward = likes_digits(tokenizer.batch_decode(trainer.model.generate(
            **tokenizer(["0 1 2 3"] * 256, return_tensors="pt"), do_sample=True, top_k=0, max_new_tokens=LENGTH,
        )[:, -LENGTH:], skip_special_tokens=True))  # fmt: skip
        with torch.no_grad():
            moved = trainer.rehearsal(trainer.model).item()
        print(f"eta {eta:g}: digits {sum(reward) / len(reward):.2f}, KL(start||policy) per kept token {moved:.3f}")
