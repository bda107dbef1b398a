"""Real negatives for D²O on one CPU: Anthropic's HH harmless pairs and a small model trained on their chosen side.

The last human turn of a dialogue is the prompt; the rejected answer is the negative. A byte-level BPE tokenizer and a
Llama of about a million parameters learn the chosen dialogues of the training part, and nothing else. What D²O and its
baselines then train on holds no chosen answer at all; the held-out pairs keep both sides for evaluation.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fdiv.files import numbered_json_lines

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HHNegativesConfig", "HHPair", "read_pairs"]

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class HHPair(NamedTuple):
    """One row: the last human turn up to and including "Assistant:", both answers with their leading space, and the
    whole chosen dialogue."""

    prompt: str
    chosen: str
    rejected: str
    dialogue: str


@dataclass
class HHNegativesConfig:
    """Recipe block `prepare: {name: hh_negatives}`: split the pairs, train tokenizer and model, write the negatives.

    Args:
        data: HH file, `harmless-base.*.jsonl` or `.jsonl.gz`, with the columns chosen and rejected.
        max_prompt_tokens, max_answer_tokens: a pair is left out when its prompt, or either answer, is longer.
        validation_fraction, test_fraction: shares of the prompts held out; pairs with the same prompt stay together.
        vocab_size, hidden_size, layers, context: of the tokenizer and the Llama.
        epochs: passes over the chosen dialogues of the training part.
        batch_size: windows of `context` tokens in an optimizer step.
        learning_rate: peak of the one-cycle schedule (AdamW).
        seed: of the split, the weights and the order.
    """

    data: str
    max_prompt_tokens: int = 48
    max_answer_tokens: int = 80
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    vocab_size: int = 2048
    hidden_size: int = 128
    layers: int = 4
    context: int = 128
    epochs: float = 6.0
    batch_size: int = 16
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_answer_tokens", "layers", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"prepare.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"prepare.{name} must be above 0, got {getattr(self, name)}")
        held_out = self.validation_fraction + self.test_fraction
        if not (self.validation_fraction > 0 and self.test_fraction > 0 and held_out < 1):
            raise ValueError(
                f"prepare.validation_fraction={self.validation_fraction} and prepare.test_fraction="
                f"{self.test_fraction} must be above 0 and leave something to train on"
            )
        if self.max_prompt_tokens + self.max_answer_tokens >= 2 * self.context:
            raise ValueError(
                f"prepare: max_prompt_tokens + max_answer_tokens = {self.max_prompt_tokens + self.max_answer_tokens} "
                f"must stay below the model's {2 * self.context} positions (twice context={self.context})"
            )

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `model/`, `train.jsonl` (prompt, rejected, and the same text as completion) and `held_out/`.

        `held_out/validation.jsonl` and `held_out/test.jsonl` hold prompt, chosen and rejected. `prepare.json` counts
        what was left out and gives the model's size and held-out perplexity.

        Returns:
            The recipe keys it sets: `model_name_or_path`, `dataset_name`, `dataset_train_split`.

        Raises:
            FileNotFoundError, ValueError: no such file, or rows that are no HH dialogues.
        """
        import torch

        from fdiv.models.tiny import build_tiny_model

        output_dir = Path(output_dir)
        pairs = read_pairs(self.data)
        parts = self._split(pairs)
        dialogues = [pair.dialogue for pair in parts["train"]]
        build_tiny_model(
            output_dir / "model", vocab_texts=dialogues, vocab_size=self.vocab_size, hidden_size=self.hidden_size,
            layers=self.layers, max_positions=2 * self.context, seed=self.seed,
        )  # fmt: skip
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from fdiv.training.finite import refuse_broken

        tokenizer = AutoTokenizer.from_pretrained(output_dir / "model")
        model = AutoModelForCausalLM.from_pretrained(output_dir / "model")
        windows = [window for text in dialogues for window in self._windows(tokenizer, text)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._train(model, windows)
        refuse_broken(model, "the base model that was trained", "lower learning_rate")
        model.save_pretrained(output_dir / "model")

        kept = {name: [pair for pair in part if self._short(tokenizer, pair)] for name, part in parts.items()}
        for name, part in kept.items():
            if not part:
                raise ValueError(f"prepare: no pair of the {name} part fits max_prompt_tokens and max_answer_tokens")
        negatives = [
            {"prompt": pair.prompt, "rejected": pair.rejected, "completion": pair.rejected} for pair in kept["train"]
        ]
        _write(output_dir / "train.jsonl", negatives)
        for name in ("validation", "test"):
            rows = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in kept[name]]
            _write(output_dir / "held_out" / f"{name}.jsonl", rows)
        held_out = [window for pair in parts["test"] for window in self._windows(tokenizer, pair.dialogue)]
        summary = {
            "settings": asdict(self),
            "pairs": {name: {"all": len(part), "kept": len(kept[name])} for name, part in parts.items()},
            "parameters": model.num_parameters(),
            "training_tokens": sum(len(window) for window in windows),
            "held_out_chosen_nats_per_token": self._nats_per_token(model, held_out),
        }
        (output_dir / "prepare.json").write_text(json.dumps(summary, indent=2) + "\n")
        return {
            "model_name_or_path": str(output_dir / "model"),
            "dataset_name": str(output_dir / "train.jsonl"),
            "dataset_train_split": "train",
        }

    def _split(self, pairs: Sequence[HHPair]) -> dict[str, list[HHPair]]:
        """Pairs by part; all pairs of a prompt are in one."""
        prompts = sorted({pair.prompt for pair in pairs})
        random.Random(self.seed).shuffle(prompts)
        test = round(self.test_fraction * len(prompts))
        validation = test + round(self.validation_fraction * len(prompts))
        if not 0 < test < validation < len(prompts):
            raise ValueError(f"prepare: {len(prompts)} prompts are too few for the fractions asked for")
        part_of = {prompt: "test" if i < test else "validation" if i < validation else "train"
                   for i, prompt in enumerate(prompts)}  # fmt: skip
        parts: dict[str, list[HHPair]] = {"train": [], "validation": [], "test": []}
        for pair in pairs:
            parts[part_of[pair.prompt]].append(pair)
        return parts

    def _windows(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[list[int]]:
        """The tokens of a dialogue and its end, cut from the end, so that the last answer is whole where it fits."""
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        first = len(ids) % self.context
        cuts = [0] * (first > 1) + list(range(first, len(ids), self.context))
        return [ids[start:end] for start, end in zip(cuts, [*cuts[1:], len(ids)], strict=True)]

    def _short(self, tokenizer: PreTrainedTokenizerBase, pair: HHPair) -> bool:
        answers = max(len(tokenizer(text)["input_ids"]) for text in (pair.chosen, pair.rejected)) + 1
        return len(tokenizer(pair.prompt)["input_ids"]) <= self.max_prompt_tokens and answers <= self.max_answer_tokens

    def _batches(self, windows: Sequence[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """`input_ids` and `attention_mask` `[B, T]`, padded on the right; windows of like length share a batch."""
        import torch

        order = sorted(range(len(windows)), key=lambda i: len(windows[i]))
        for start in range(0, len(order), self.batch_size):
            part = [torch.tensor(windows[i]) for i in order[start : start + self.batch_size]]
            ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=0)
            lengths = torch.tensor([len(window) for window in part])
            yield ids, (torch.arange(ids.size(1))[None] < lengths[:, None]).long()

    def _train(self, model: PreTrainedModel, windows: Sequence[list[int]]) -> None:
        """Next-token training on all windows, in place."""
        import torch

        from fdiv.models.logprobs import token_scores

        batches = list(self._batches(windows))
        steps = max(2, math.ceil(self.epochs * len(batches)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps, pct_start=0.1)
        model.train()
        order: list[int] = []
        for _ in range(steps):
            order = order or torch.randperm(len(batches)).tolist()
            ids, mask = batches[order.pop()]
            scores = token_scores(model, ids, mask, mask)
            loss = -scores.log_probs.sum() / scores.mask.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        model.eval()

    def _nats_per_token(self, model: PreTrainedModel, windows: Sequence[list[int]]) -> float:
        import torch

        from fdiv.models.logprobs import token_scores

        total, tokens = 0.0, 0
        with torch.no_grad():
            for ids, mask in self._batches(windows):
                scores = token_scores(model, ids, mask, mask)
                total, tokens = total - scores.log_probs.sum().item(), tokens + int(scores.mask.sum())
        return total / tokens


def read_pairs(path: str | Path) -> list[HHPair]:
    """The pairs of an HH file whose dialogues differ in the last answer only; equal answers are no preference.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row without the columns or the turns of an HH dialogue; nothing left.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: set prepare.data to HH's harmless-base .jsonl or .jsonl.gz file"
        )
    pairs = []
    for number, row in numbered_json_lines(path):
        if not isinstance(row, dict) or not all(isinstance(row.get(side), str) for side in ("chosen", "rejected")):
            raise ValueError(f"{path}, line {number}: the texts `chosen` and `rejected` are needed")
        (context, chosen), (other, rejected) = (_last_answer(row[side]) for side in ("chosen", "rejected"))
        if context is None or other is None:
            raise ValueError(f"{path}, line {number}: no {_ASSISTANT!r} after a {_HUMAN!r} turn")
        if context == other and chosen.strip() and rejected.strip() and chosen != rejected:
            prompt = context[context.rindex(_HUMAN) :]
            pairs.append(HHPair(prompt, chosen, rejected, row["chosen"]))
    if not pairs:
        raise ValueError(f"{path} holds no pair of two different answers to the same dialogue")
    return pairs


def _last_answer(dialogue: str) -> tuple[str | None, str]:
    """A dialogue up to its last "Assistant:", and what follows; (None, "") where there is no such turn."""
    start = dialogue.rfind(_ASSISTANT)
    if start < 0 or _HUMAN not in dialogue[:start]:
        return None, ""
    end = start + len(_ASSISTANT)
    return dialogue[:end], dialogue[end:]


def _write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
