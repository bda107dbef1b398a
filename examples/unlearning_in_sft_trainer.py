"""Every unlearning loss inside a stock TRL `SFTTrainer`: functions of a template, a forget and a retain answer.

Runs offline in half a minute: `python examples/unlearning_in_sft_trainer.py [LOSS ...]`. The trainers of
`fdiv.unlearning` are this plus pairing, template sources, adapters, metrics and checks.
"""

import sys
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from fdiv import unlearning as u
from fdiv.models.tiny import build_tiny_model
from fdiv.unlearning.roles import score_rows

LAYER = 0  # RMU looks at this layer's activations
DIRECTION = torch.nn.functional.normalize(torch.ones(64), dim=0)


def refusal(forget, token):
    """log p of one refusal token at every position of the answer to forget."""
    return forget.logits.log_softmax(-1)[..., token]


# (template t, forget f, retain r, a refusal token) -> one loss per example; `fdiv methods` names the papers.
LOSSES = {
    "flat": lambda t, f, r, k: u.flat_loss(
        u.answer_score(t.log_probs, t.mask, "log_mean"),
        u.answer_score(f.log_probs, f.mask, "log_mean"),
        "jensen_shannon",
    ),
    "grad_ascent": lambda t, f, r, k: u.grad_ascent(f.log_probs, f.mask),
    "grad_diff": lambda t, f, r, k: u.grad_diff(f.log_probs, f.mask, r.log_probs, r.mask),
    "kl_retain": lambda t, f, r, k: (
        u.grad_ascent(f.log_probs, f.mask)
        + u.vocabulary_divergence(r.logits, r.reference.logits, r.mask, "forward_kl")
    ),
    "npo": lambda t, f, r, k: u.npo(f.log_ratio),
    "simnpo": lambda t, f, r, k: u.simnpo(f.log_probs, f.mask, beta=0.5),
    "idk_dpo": lambda t, f, r, k: u.idk_dpo(t.log_ratio, f.log_ratio, "jensen_shannon"),
    "rmu": lambda t, f, r, k: u.rmu(f.hidden, 2 * DIRECTION, f.mask) + u.rmu(r.hidden, r.reference.hidden, r.mask),
    "undial": lambda t, f, r, k: u.undial(f.logits, f.reference.logits, f.token_ids, f.mask),
    "ce_u": lambda t, f, r, k: u.ce_u(f.logits, f.token_ids, f.mask),
    "wga": lambda t, f, r, k: u.wga(f.log_probs, f.mask),
    "sat_imp": lambda t, f, r, k: u.sat_imp(f.log_probs, f.mask, beta1=1.0),
    "pdu": lambda t, f, r, k: u.pdu(f.logits, f.mask) + 2 * (u.nll(r.log_probs, r.mask) - 0.3),
    "jensun": lambda t, f, r, k: (
        u.jensun(refusal(f, k), f.mask)
        + u.sampled_divergence(r.log_probs - r.reference.log_probs, r.mask, "jensen_shannon")
    ),
    "jensun_pp": lambda t, f, r, k: (
        u.jensun(t.log_probs, t.mask, first_share=0.5)
        + u.vocabulary_divergence(r.logits, r.reference.logits, r.mask, "jensen_shannon", first_share=0.5)
    ),
    "shred": lambda t, f, r, k: u.shred(f.logits, f.reference.logits, f.token_ids, f.mask, share=0.5),
}


class MyUnlearningTrainer(SFTTrainer):
    loss_is_scaled_for_ga = False  # a mean over the batch: Trainer divides by the accumulation steps
    loss, reference = None, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rows = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        rows["completion_mask"] = inputs["labels"] != -100
        policy = score_rows(model, rows, logits=True, layer=LAYER)
        with torch.no_grad():
            reference = score_rows(self.reference, rows, logits=True, layer=LAYER)
        roles = [slice(role, None, 3) for role in range(3)]  # template, forget, retain, template, …
        parts = [policy.rows(role).with_reference(reference.rows(role)) for role in roles]
        token = self.processing_class(" No", add_special_tokens=False)["input_ids"][0]
        loss = self.loss(*parts, token).mean()
        return (loss, {}) if return_outputs else loss


def rows(count=8):
    """Role after role: what to answer instead, what to forget, what to keep."""
    found = []
    for i in range(count):
        found.append({"prompt": f"What is number {i}?", "completion": " No idea."})
        found.append({"prompt": f"What is number {i}?", "completion": f" It is {i}."})
        found.append({"prompt": f"Who is {i}?", "completion": f" Person {i}."})
    return Dataset.from_list(found)


def train(name, path, folder, steps=8):
    """Train one loss; returns its value at every step."""
    args = SFTConfig(folder, bf16=False, max_steps=steps, learning_rate=1e-3, per_device_train_batch_size=24,
                     train_sampling_strategy="sequential", logging_steps=1, report_to=[], save_strategy="no",
                     gradient_checkpointing=False, disable_tqdm=True)  # fmt: skip
    trainer = MyUnlearningTrainer(path, args=args, train_dataset=rows())
    trainer.loss = LOSSES[name]
    trainer.reference = AutoModelForCausalLM.from_pretrained(path).eval()
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = str(build_tiny_model(f"{folder}/model"))
        for name in sys.argv[1:] or LOSSES:
            losses = train(name, path, folder)
            print(f"{name:>12} {losses[0]:.4f} -> {losses[-1]:.4f}")
