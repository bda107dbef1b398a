"""Tiny, randomly initialised language models, built offline in under a second.

They stand in for real checkpoints in the tests, in `recipes/tiny/` and when a full-size recipe is tried for two
steps: the same files on disk (safetensors, config, fast tokenizer with a ChatML template), about 0.1 M parameters, no
hub.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

__all__ = ["CHAT_TEMPLATE", "build_tiny_model", "build_tiny_tokenizer", "train_tiny_model"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, as Qwen's chat models use it: a turn ends with the end-of-sequence token, so generation stops there."""

_PAD, _BOS, _TURN_START, _EOS = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"

_DEFAULT_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Question: what is two plus two? Answer: four.",
    "I do not know the answer to that question, sorry.",
    "The capital of France is Paris and the capital of Italy is Rome.",
    "system user assistant",
    "0 1 2 3 4 5 6 7 8 9 10 + - * / = ( )",
)


def build_tiny_tokenizer(
    vocab_texts: Iterable[str] | None = None, *, vocab_size: int = 384
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: every string round-trips, no token is ever unknown.

    Args:
        vocab_texts: texts whose merges are learned; a few English sentences when None. Pass the texts of your task
            to get short sequences.
        vocab_size: upper bound on the vocabulary: 256 bytes, 4 special tokens, the rest merges (fewer when the texts
            offer fewer). At least 260.

    Returns:
        A fast tokenizer with pad, bos and eos tokens, left padding and `CHAT_TEMPLATE`. It adds no bos by itself.

    Raises:
        ValueError: `vocab_size` below 260, or `vocab_texts` is empty.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special_tokens = [_PAD, _BOS, _TURN_START, _EOS]
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} cannot hold the 256 bytes and 4 special tokens: use {smallest} or more"
        )
    texts = list(_DEFAULT_TEXTS if vocab_texts is None else vocab_texts)
    if not texts:
        raise ValueError("vocab_texts is empty: pass at least one text, or None for the built-in sentences")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, bos_token=_BOS, eos_token=_EOS, padding_side="left"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_tiny_model(
    output_dir: str | Path,
    *,
    vocab_texts: Iterable[str] | None = None,
    vocab_size: int = 384,
    hidden_size: int = 64,
    layers: int = 2,
    head_dim: int = 32,
    max_positions: int = 512,
    seed: int = 0,
    architecture: Literal["llama", "gpt2"] = "llama",
) -> Path:
    """Build a random float32 model and its tokenizer and save both to `output_dir`.

    The same arguments give the same weights, bit for bit; the caller's random state is left as it was.

    Args:
        output_dir: directory to write (made when missing); usable at once as `model_name_or_path`.
        vocab_texts: see `build_tiny_tokenizer`.
        vocab_size: see `build_tiny_tokenizer`.
        hidden_size: width; the feed-forward layer is twice as wide for Llama and four times for GPT-2.
        layers: number of transformer blocks.
        head_dim: width of one attention head. vLLM on a CPU wants a multiple of 32.
        max_positions: longest sequence in tokens.
        seed: seed of the weights.
        architecture: `"llama"` (rotary positions, two query heads per key head where they divide) or `"gpt2"` (learned
            absolute positions: the one that shows position-id mistakes under left padding).

    Returns:
        `output_dir` as a `Path`.

    Raises:
        ValueError: an unknown architecture, a size below 1, a `hidden_size` that is no multiple of `head_dim`, or an
            odd `head_dim` for Llama.
    """
    import torch
    from transformers import AutoModelForCausalLM

    for name, value in {"hidden_size": hidden_size, "layers": layers, "head_dim": head_dim}.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if hidden_size % head_dim:
        raise ValueError(f"hidden_size={hidden_size} is not a multiple of head_dim={head_dim}: change one of the two")
    tokenizer = build_tiny_tokenizer(vocab_texts, vocab_size=vocab_size)
    config = _model_config(architecture, tokenizer, hidden_size, layers, head_dim, max_positions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    output_dir = Path(output_dir)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return output_dir


def _model_config(
    architecture: str,
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int,
    layers: int,
    head_dim: int,
    max_positions: int,
) -> PretrainedConfig:
    """The transformers config of the chosen architecture; ValueError for one that is not offered."""
    from transformers import GPT2Config, LlamaConfig

    heads = hidden_size // head_dim
    shared = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if architecture == "llama":
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} is odd: rotary positions need an even one")
        return LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            tie_word_embeddings=False,
            **shared,
        )
    if architecture == "gpt2":
        return GPT2Config(n_embd=hidden_size, n_layer=layers, n_head=heads, n_positions=max_positions, **shared)
    raise ValueError(f"architecture={architecture!r} is not offered: use 'llama' or 'gpt2'")


def train_tiny_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sample: Callable[[], tuple[str, str]],
    steps: int,
    *,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    max_grad_norm: float | None = None,
) -> PreTrainedModel:
    """Train `model` in place on fresh texts: AdamW under a one-cycle schedule, on one thread.

    Args:
        model: a causal LM on the CPU.
        tokenizer: an empty prompt becomes its bos token; every completion ends with its eos token.
        sample: draws one (prompt, completion); the loss is on the completion and its end token, averaged over tokens.
        steps: optimizer steps, at least 2.
        batch_size: texts per step.
        learning_rate: the peak.
        max_grad_norm: gradients are clipped to this norm; None: they are not.

    Returns:
        `model`, in evaluation mode.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of this size gain nothing from a second thread
    try:
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
        model.train()
        for _ in range(steps):
            loss = _loss_of_texts(model, tokenizer, [sample() for _ in range(batch_size)])
            optimizer.zero_grad()
            loss.backward()
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def _loss_of_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str]]):
    """Mean negative log-probability of the completions' tokens, end tokens included."""
    import torch

    from fdiv.models.logprobs import token_scores

    pairs = [
        (tokenizer(prompt)["input_ids"] or [tokenizer.bos_token_id], tokenizer(text)["input_ids"])
        for prompt, text in texts
    ]
    rows = [torch.tensor([*prompt, *text, tokenizer.eos_token_id]) for prompt, text in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    position = torch.arange(ids.size(1))[None]
    inside = position < torch.tensor([len(row) for row in rows])[:, None]
    completion = inside & (position >= torch.tensor([len(prompt) for prompt, _ in pairs])[:, None])
    scores = token_scores(model, ids, inside.long(), completion.long())
    return -scores.log_probs.sum() / scores.mask.sum()
