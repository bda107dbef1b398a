"""The gradient of `FDistillTrainer`: finite differences through the trainer, and on-policy by enumeration."""

import itertools

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fdiv.divergences import get_distance
from tests.support.runs.f_distill import make_teacher, make_trainer, rows

GATED = {
    "name": "gated",
    "forward": "forward_kl",
    "reverse": "cauchy_schwarz",
    "gate": {"name": "teacher_entropy", "threshold": 5.9},
}


# ---------------------------------------------------------------- finite differences
@pytest.mark.parametrize("spec", ["reverse_kl", "jensen_shannon", "neyman_chi2", "cauchy_schwarz", GATED], ids=str)
def test_finite_differences_through_the_trainer(spec, tiny_gpt2_dir, tmp_path):
    """The loss of a padded batch in float64 along random directions of all weights, against the gradient.

    GPT-2, for Llama's norm is computed in float32 whatever the weights are.
    """
    student = AutoModelForCausalLM.from_pretrained(tiny_gpt2_dir).double()
    teacher = AutoModelForCausalLM.from_pretrained(make_teacher(tmp_path / "teacher", architecture="gpt2")).double()
    data = rows(4)
    trainer = make_trainer(
        tiny_gpt2_dir,
        teacher,
        data,
        tmp_path / "out",
        model=student,
        divergence=spec,
        temperature=1.5,
        disable_dropout=True,
    )
    batch = trainer._prepare_inputs(data)
    trainer.compute_loss(trainer.model, batch).backward()
    weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in weights]
        slope = sum((part.grad * way).sum() for part, way in zip(weights, direction, strict=True)).item()
        values = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                for part, way in zip(weights, direction, strict=True):
                    part.add_(way, alpha=step)
                values.append(trainer.compute_loss(trainer.model, batch).item())
            for part, way in zip(weights, direction, strict=True):
                part.add_(way, alpha=1e-5)
        assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-7)


# ---------------------------------------------------------------- on-policy, by enumeration
WORDS = ["<pad>", "</s>", "a", "b", "c"]


def small_world(folder, seed, scale):
    """A GPT-2 over five tokens, and its tokenizer; `scale` times the weights of the head, so that it is sure of some."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a")),
        pad_token="<pad>", eos_token="</s>",
    )  # fmt: skip
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, pad_token_id=0, eos_token_id=1, bos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def completions(length):
    """Every completion: up to `length` tokens, the end token only at the end."""
    return [
        word
        for size in range(1, length + 1)
        for word in itertools.product(range(len(WORDS)), repeat=size)
        if 1 not in word[:-1] and (size == length or word[-1] == 1)
    ]


def flat_gradient(value, model):
    parts = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


@pytest.fixture
def world(tmp_path):
    return small_world(tmp_path / "student", 0, 40.0), small_world(tmp_path / "teacher", 1, 60.0)


def enumerated(student, teacher, prompt, divergence, length=2):
    """log π(y), ∑_t D_t and |y| of every completion, dense and with gradient."""
    log_pi, totals, lengths = [], [], []
    for word in completions(length):
        ids = torch.tensor([[*prompt, *word]])
        both = [model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (student, teacher)]
        log_pi.append(both[0].gather(-1, torch.tensor(word).unsqueeze(-1)).sum())
        totals.append(divergence.exact(both[0], both[1].detach()).sum())
        lengths.append(float(len(word)))
    return torch.stack(log_pi), torch.stack(totals), torch.tensor(lengths, dtype=torch.float64)


@pytest.mark.parametrize("spec", ["reverse_kl", "jensen_shannon", "cauchy_schwarz"])
def test_the_on_policy_gradient_is_that_of_the_divergence_without_the_score_function(spec, world, tmp_path):
    """In expectation over the student's own samples the trainer follows

        ∑_y π(y) ∑_t ∇D_t(y) / ∑_y π(y)·|y|,

    the gradient of the divergences at the sampled tokens, as in GKD: the samples are data. The whole gradient of
    E_π[∑_t D_t]/E_π|y| has a term more, E_π[∇log π(y)·…], which is not small here and which the trainer leaves out.
    """
    student_dir, teacher_dir = world
    prompt = [2, 3]
    count = 6000
    data = [{"prompt": "a b"} for _ in range(count)]
    trainer = make_trainer(
        student_dir, AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float64), data, tmp_path / "out",
        divergence=spec, on_policy_share=1.0,
        max_completion_length=2, per_device_train_batch_size=count, temperature=1.0, max_steps=1,
        model=AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float64),
        processing_class=PreTrainedTokenizerFast.from_pretrained(student_dir),
        train_dataset=Dataset.from_list(data),
    )  # fmt: skip
    trainer.model.train()
    batch = trainer._prepare_inputs(data)
    texts = [
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    assert set(texts) <= set(completions(2))
    loss = trainer.compute_loss(trainer.model, batch)
    sampled = flat_gradient(loss, trainer.model)

    student, teacher = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in world)
    log_pi, totals, lengths = enumerated(student, teacher, prompt, get_distance(spec))
    assert log_pi.exp().sum().item() == pytest.approx(1.0)
    pi = log_pi.detach().exp()
    without = flat_gradient((pi * totals).sum() / (pi * lengths).sum(), student)
    whole = flat_gradient((log_pi.exp() * totals).sum() / (log_pi.exp() * lengths).sum(), student)

    # On the very completions that were sampled it is the enumerated gradient at their frequencies, to rounding.
    frequency = torch.tensor([texts.count(word) / count for word in completions(2)], dtype=torch.float64)
    at_drawn = flat_gradient((frequency * totals).sum() / (frequency * lengths).sum(), student)
    torch.testing.assert_close(sampled.double(), at_drawn, rtol=1e-6, atol=1e-9)
    # And in expectation it is the one without the score function; six thousand samples tell the two apart.
    error = (sampled - without).norm() / without.norm()
    assert error < 0.15 and (whole - without).norm() > 3 * (sampled - without).norm()
