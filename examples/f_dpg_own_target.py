"""f-DPG to a target of your own: base model, scorer and divergence; then quasi-rejection sampling with the result.

Runs offline, in about a minute: `python examples/f_dpg_own_target.py`. Any function with TRL's reward signature is a
scorer.
"""

import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.alignment import FDPGConfig, FDPGTrainer
from fdiv.alignment.f_dpg.quasi_rejection import sample_target
from fdiv.alignment.f_dpg.targets import build_target
from fdiv.recipes.tasks.tiny.texts import TinyTextsConfig


def praises(completions, **_):
    """1 where the review uses a word of praise."""
    return [float(any(word in text.split() for word in ("amazing", "great", "charming"))) for text in completions]


with tempfile.TemporaryDirectory() as folder:
    path = TinyTextsConfig(corpus="reviews").build(folder)["model_name_or_path"]
    target = build_target({"name": "pointwise", "scorers": [praises]})
    args = FDPGConfig(
        folder, divergence="jensen_shannon", max_steps=60, per_device_train_batch_size=128, num_generations=128,
        max_completion_length=12, learning_rate=3e-3, bf16=False, gradient_checkpointing=False, logging_steps=10,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = FDPGTrainer(path, args, target=target)  # no dataset: no prompts
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "score/praises" in entry]
    first, last = history[0], history[-1]
    print(f"reviews that praise: {first['score/praises']:.2f} -> {last['score/praises']:.2f}")
    key = "divergence/jensen_shannon"
    print(f"JS to the target: loss {first[key]:.4f} -> {last[key]:.4f}")

    # The policy as a proposal: the base accepts no more than it satisfies; the policy three times as many.
    tokenizer, base = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    for name, proposal, rate in (("base", base, 0.1), ("policy", trainer.model.eval(), 0.3)):
        texts, found = sample_target(
            proposal, tokenizer, "", target, 500, base_model=base, acceptance_rate=rate, max_new_tokens=12,
            batch_size=512,
        )  # fmt: skip
        print(
            f"{name}: accepts {found.acceptance_rate:.2f}, TV to the target at most {found.total_variation_bound:.2f}"
        )
    print("for instance:", texts[0])
