"""Small base models for f-DPG, built offline: short reviews, biographies, or one-line Python functions.

Each corpus is a grammar that a tiny Llama is trained on for some seconds, so that it has what a target asks for, but
rarely: "amazing" in about one review in twenty, female biographies one in ten, code that compiles about half the time.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fdiv.models.tiny import train_tiny_model

__all__ = ["EmptyPromptsConfig", "TinyTextsConfig", "review", "small_model", "word_tokenizer"]

_NOUNS = ("film", "story", "plot", "music", "acting", "ending", "cast", "dialogue")
_ADJECTIVES = {
    "good": 6, "fine": 5, "great": 3, "amazing": 1, "charming": 2, "fun": 3, "slow": 5, "long": 6,
    "bad": 5, "boring": 4, "awful": 2, "terrible": 2, "plain": 5, "strange": 4, "funny": 3, "sad": 3,
}  # fmt: skip
_ADVERBS = ("very", "quite", "rather", "somewhat")
_NAMES = {"she": ("mary", "anna", "ruth", "grace"), "he": ("john", "peter", "paul", "frank")}
_JOBS = ("writer", "singer", "doctor", "painter", "teacher", "farmer", "lawyer", "sailor")
_PLACES = ("paris", "london", "rome", "vienna", "lisbon", "oslo")
_VERBS = ("worked", "lived", "studied", "died")
_CODE_PROMPTS = ("def f ( a , b ) : return", "def g ( x ) : return", "total =", "print (")
_VARIABLES = {_CODE_PROMPTS[0]: "ab", _CODE_PROMPTS[1]: "x", _CODE_PROMPTS[2]: "ab", _CODE_PROMPTS[3]: "xy"}


def review(draw: random.Random) -> tuple[str, str]:
    """An empty prompt and a short review."""
    words, weights = zip(*_ADJECTIVES.items(), strict=True)
    first, second = draw.choices(words, weights, k=2)
    middle = [draw.choice(_ADVERBS)] if draw.random() < 0.5 else []
    return "", " ".join(["the", draw.choice(_NOUNS), "was", *middle, first, draw.choice(("and", "but")), second, "."])


def _biography(draw: random.Random) -> tuple[str, str]:
    pronoun = "she" if draw.random() < 0.1 else "he"
    name, job, place = draw.choice(_NAMES[pronoun]), draw.choice(_JOBS), draw.choice(_PLACES)
    return "", f"{name} was a {job} . {pronoun} {draw.choice(_VERBS)} in {place} ."


def _code(draw: random.Random) -> tuple[str, str]:
    prompt = draw.choice(_CODE_PROMPTS)

    def expression(depth: int) -> list[str]:
        kind = draw.random()
        if depth == 0 or kind < 0.3:
            return [draw.choice([*_VARIABLES[prompt], "1", "2"])]
        if kind < 0.5:
            return ["(", *expression(depth - 1), ")"]
        return [*expression(depth - 1), draw.choice("+-*"), *expression(depth - 1)]

    tokens = expression(2) + ([")"] if prompt.startswith("print") else [])
    if draw.random() < 0.5:  # a slip: a token lost, doubled or replaced
        place, slip = draw.randrange(len(tokens)), draw.randrange(3)
        replacement = [[], [tokens[place]] * 2, [draw.choice("()+*")]][slip]
        tokens[place : place + 1] = replacement
    return prompt, " ".join(tokens)


_CORPORA: dict[str, tuple[Callable[[random.Random], tuple[str, str]], tuple[str, ...]]] = {
    "reviews": (review, ("",)),
    "biographies": (_biography, ("",)),
    "code": (_code, _CODE_PROMPTS),
}


@dataclass
class TinyTextsConfig:
    """Recipe block `prepare: {name: tiny_texts}`.

    Args:
        corpus: `reviews`, `biographies` (neither has prompts) or `code` (four prompts).
        seed: of the corpus and the weights.
        steps: optimizer steps of the base model, on batches of 128 fresh texts.
    """

    corpus: Literal["reviews", "biographies", "code"] = "reviews"
    seed: int = 0
    steps: int = 300

    def __post_init__(self) -> None:
        if self.corpus not in _CORPORA:
            raise ValueError(f"prepare.corpus must be one of {', '.join(_CORPORA)}, got {self.corpus!r}")
        if self.steps < 1:
            raise ValueError(f"prepare.steps must be at least 1, got {self.steps}")

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `model/`, and `data/train.jsonl` with 64 rows of prompts.

        Returns:
            The recipe keys it sets: `model_name_or_path`, `dataset_name`, `dataset_train_split`.
        """
        output_dir = Path(output_dir)
        model_dir, data_dir = output_dir / "model", output_dir / "data"
        sample, prompts = _CORPORA[self.corpus]
        draw = random.Random(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            tokenizer = word_tokenizer(sample)
            model = train_tiny_model(small_model(tokenizer), tokenizer, lambda: sample(draw), self.steps)
        model.save_pretrained(model_dir)
        tokenizer.save_pretrained(model_dir)
        keys = _write_prompts(data_dir, [prompts[number % len(prompts)] for number in range(64)])
        return {"model_name_or_path": str(model_dir), **keys}


@dataclass
class EmptyPromptsConfig:
    """Recipe block `prepare: {name: empty_prompts}`: rows with an empty prompt, for training without prompts.

    Args:
        rows: how many; each stands for one group of samples.
    """

    rows: int = 64

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"prepare.rows must be at least 1, got {self.rows}")

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `data/train.jsonl`.

        Returns:
            The recipe keys it sets: `dataset_name`, `dataset_train_split`.
        """
        return _write_prompts(Path(output_dir) / "data", [""] * self.rows)


def _write_prompts(folder: Path, prompts: list[str]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {"dataset_name": str(folder), "dataset_train_split": "train"}


def word_tokenizer(sample: Callable[[random.Random], tuple[str, str]]) -> Any:
    """One token per word of the corpus, and pad, bos and eos."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(0)
    words = sorted({word for _ in range(5000) for part in sample(draw) for word in part.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def small_model(tokenizer: Any, hidden_size: int = 64) -> Any:
    """A random two-layer Llama, of about 0.08 M parameters at width 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2,
            num_attention_heads=2, head_dim=32, max_position_embeddings=64, **special,
        )
    )  # fmt: skip
