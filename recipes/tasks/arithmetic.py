"""Arithmetic with many right answers: a target from given numbers, each used once; and a small model that often can.

A problem reads `2,7,9=25:` and is solved by an expression with that value that uses each number once: `2*9+7`.
Addition, subtraction, multiplication, division and parentheses; most problems have several solutions. The verifier is
exact (fractions) and evaluates nothing but its own grammar.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fdiv.inference.prompting import completion_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["ArithmeticTaskConfig", "arithmetic_reward", "evaluate_expression", "solutions", "verify_expression"]

MAX_LENGTH, MAX_DEPTH = 256, 32
"""Longest expression in characters and deepest nesting that are read; longer ones are wrong, not an error."""


class ExpressionError(ValueError):
    """A text that is no expression of the grammar, divides by zero, or exceeds `MAX_LENGTH` or `MAX_DEPTH`."""


class _Parser:
    """sum := product (('+'|'-') product)*; product := atom (('*'|'/') atom)*; atom := digits | '(' sum ')'."""

    def __init__(self, text: str) -> None:
        self.text, self.position, self.depth = text, 0, 0
        self.numbers: list[int] = []

    def read(self) -> Fraction:
        value = self.sum()
        if self.position != len(self.text):
            raise ExpressionError(f"unexpected {self.text[self.position]!r} at character {self.position}")
        return value

    def peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            operator = self.peek()
            self.position += 1
            right = self.product()
            value = value + right if operator == "+" else value - right
        return value

    def product(self) -> Fraction:
        value = self.atom()
        while self.peek() in ("*", "/"):
            operator = self.peek()
            self.position += 1
            right = self.atom()
            if operator == "/" and right == 0:
                raise ExpressionError(f"division by zero before character {self.position}")
            value = value * right if operator == "*" else value / right
        return value

    def atom(self) -> Fraction:
        if self.peek() == "(":
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise ExpressionError(f"nested deeper than {MAX_DEPTH}")
            self.position += 1
            value = self.sum()
            if self.peek() != ")":
                raise ExpressionError(f"a parenthesis is not closed at character {self.position}")
            self.position += 1
            self.depth -= 1
            return value
        start = self.position
        while self.peek() in tuple("0123456789"):
            self.position += 1
        if start == self.position:
            raise ExpressionError(f"a number or a parenthesis is due at character {start}")
        self.numbers.append(int(self.text[start : self.position]))
        return Fraction(self.numbers[-1])


def evaluate_expression(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression and the numbers it uses, in order. Blanks count for nothing.

    Raises:
        ExpressionError: see there.
    """
    text = "".join(text.split())
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"{len(text)} characters; at most {MAX_LENGTH} are read")
    parser = _Parser(text)
    return parser.read(), parser.numbers


def verify_expression(text: str, numbers: Sequence[int], target: int) -> bool:
    """Whether `text` is an expression with the value `target` that uses each of `numbers` exactly once."""
    try:
        value, used = evaluate_expression(text)
    except ExpressionError:
        return False
    return value == target and Counter(used) == Counter(numbers)


def arithmetic_reward(
    completions: Sequence[Any], numbers: Sequence[Sequence[int]], target: Sequence[int], **_: Any
) -> list[float]:
    """1.0 for each completion that `verify_expression` accepts, else 0.0; a reward function of TRL.

    Args:
        completions: texts, or conversations.
        numbers, target: the columns of the task's rows, repeated for each completion.
    """
    texts = [completion_text(completion) for completion in completions]
    return [float(verify_expression(*row)) for row in zip(texts, numbers, target, strict=True)]


def _expressions(numbers: tuple[int, ...]) -> tuple[tuple[int, str, int], ...]:
    """(value, text, binding) of every expression over sorted `numbers` whose intermediate results are natural numbers.

    Binding is 2 for a number, 1 for a product or quotient, 0 for a sum or difference; parentheses stand only where the
    grammar needs them, so that one text is one expression.
    """
    if len(numbers) == 1:
        return ((numbers[0], str(numbers[0]), 2),)
    found: dict[tuple[int, str], int] = {}
    places = range(len(numbers))
    splits = {
        (tuple(numbers[i] for i in left), tuple(numbers[i] for i in places if i not in left))
        for size in range(1, len(numbers))
        for left in combinations(places, size)
    }
    for left, right in sorted(splits):
        for a, a_text, a_binding in _of_part(left):
            for b, b_text, b_binding in _of_part(right):
                sum_right = f"({b_text})" if b_binding == 0 else b_text
                left_factor = f"({a_text})" if a_binding == 0 else a_text
                right_factor = f"({b_text})" if b_binding < 2 else b_text
                found[a + b, f"{a_text}+{b_text}"] = 0
                if a >= b:
                    found[a - b, f"{a_text}-{sum_right}"] = 0
                found[a * b, f"{left_factor}*{right_factor if b_binding == 0 else b_text}"] = 1
                if b and a % b == 0:
                    found[a // b, f"{left_factor}/{right_factor}"] = 1
    return tuple((value, text, binding) for (value, text), binding in found.items())


_of_part = lru_cache(maxsize=1024)(_expressions)  # whole problems are not kept: four numbers have thousands each


def solutions(numbers: Sequence[int]) -> dict[int, list[str]]:
    """Target → every way to write it with each of `numbers` once, over intermediate results 0, 1, 2 …

    Texts that differ in order (`2+3`, `3+2`) count as different; parentheses are the fewest that are needed.
    """
    found: dict[int, set[str]] = defaultdict(set)
    for value, text, _ in _expressions(tuple(sorted(numbers))):
        found[value].add(text)
    return {target: sorted(texts) for target, texts in sorted(found.items())}


@dataclass
class ArithmeticTaskConfig:
    """Recipe block `prepare: {name: arithmetic}`: problems in three disjoint parts, and a model trained on the first.

    Args:
        seed: of the problems, the split, the weights and what the base model sees.
        counts: how many numbers a problem has; as many problems of each in the train and test parts. Two numbers are
            easy, four are hard.
        largest_number: numbers are 1 to it.
        largest_target: targets are 1 to it.
        multisets: at most this many different sets of numbers for each count.
        train_problems, test_problems: problems kept for reinforcement learning and for the test; the base model is
            trained on all others, each time with one solution picked at random and the numbers in random order.
        steps, batch_size, learning_rate: of the base model.
        hidden_size, layers: its width (a multiple of 32) and depth.
        easy_problems: this many problems of two numbers are written to `easy/train.jsonl`, for a rehearsal cache of
            another kind than the problems that are trained on; the base model is trained on the others of it too.
        easy_share: the share of what the base model sees that is of this kind.
    """

    seed: int = 0
    counts: list[int] = field(default_factory=lambda: [2, 3, 4])
    largest_number: int = 15
    largest_target: int = 60
    multisets: int = 400
    train_problems: int = 384
    test_problems: int = 96
    steps: int = 1800
    batch_size: int = 128
    learning_rate: float = 4e-3
    hidden_size: int = 96
    layers: int = 3
    easy_problems: int = 0
    easy_share: float = 0.1

    def __post_init__(self) -> None:
        if not self.counts or not all(2 <= count <= 5 for count in self.counts):
            raise ValueError(f"prepare.counts must be a list of numbers from 2 to 5, got {self.counts}")
        for name in ("largest_number", "largest_target", "multisets", "batch_size", "hidden_size", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"prepare.{name} must be at least 1, got {getattr(self, name)}")
        if self.steps < 2:
            raise ValueError(f"prepare.steps must be at least 2, got {self.steps}")
        if self.easy_problems < 0 or (self.easy_problems and 2 in self.counts):
            raise ValueError(
                f"prepare.easy_problems must be at least 0, and 0 where counts hold 2; got {self.easy_problems} and "
                f"{self.counts}"
            )
        if not 0 < self.easy_share < 1:
            raise ValueError(f"prepare.easy_share must lie between 0 and 1, got {self.easy_share}")
        for name in ("train_problems", "test_problems"):
            if getattr(self, name) < len(self.counts) or getattr(self, name) % len(self.counts):
                raise ValueError(
                    f"prepare.{name} must be a multiple of the {len(self.counts)} counts, got {getattr(self, name)}"
                )

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `model/`, `data/train.jsonl`, `data/test.jsonl` and, where asked for, `easy/train.jsonl` (prompt,
        numbers, target, num_solutions, answer: one of them).

        Returns:
            The recipe keys it sets: `model_name_or_path`, `dataset_name`, `dataset_train_split`,
            `dataset_test_split`, `reward`.

        Raises:
            ValueError: a count has too few problems for the train and test parts.
        """
        import torch

        from fdiv.models.tiny import train_tiny_model
        from fdiv.training.finite import refuse_broken

        output_dir, draw = Path(output_dir), random.Random(self.seed)
        base, train, test = self._split(draw)
        easy = self._problems(2, draw) if self.easy_problems else []
        if self.easy_problems >= len(easy) and self.easy_problems:
            raise ValueError(f"prepare.easy_problems must be below {len(easy)}, all problems of two numbers")
        sampler = _sampler(base, draw, easy[self.easy_problems :], self.easy_share)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            tokenizer = _tokenizer()
            model = train_tiny_model(
                _new_model(tokenizer, self.hidden_size, self.layers), tokenizer, sampler, self.steps,
                batch_size=self.batch_size, learning_rate=self.learning_rate, max_grad_norm=1.0,
            )  # fmt: skip
        refuse_broken(model, "the base model that was trained", "lower learning_rate")
        for part in (model, tokenizer):
            part.save_pretrained(output_dir / "model")
        for file, problems in (("data/train", train), ("data/test", test), ("easy/train", easy[: self.easy_problems])):
            if problems:
                rows = [_row(problem, draw) for problem in problems]
                path = output_dir / f"{file}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (output_dir / "prepare.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return {
            "model_name_or_path": str(output_dir / "model"),
            "dataset_name": str(output_dir / "data"),
            "dataset_train_split": "train",
            "dataset_test_split": "test",
            "reward": "fdiv.recipes.tasks.arithmetic:arithmetic_reward",
        }

    def _split(self, draw: random.Random) -> tuple[list[list[_Problem]], list[_Problem], list[_Problem]]:
        """Problems for the base model by count, for training, and for the test."""
        base, train, test = [], [], []
        for count in self.counts:
            problems = self._problems(count, draw)
            trained, tested = (size // len(self.counts) for size in (self.train_problems, self.test_problems))
            if len(problems) < trained + tested + 1:
                raise ValueError(
                    f"{len(problems)} problems of {count} numbers do not suffice for {trained} in the train and "
                    f"{tested} in the test part: raise prepare.largest_number or multisets, or ask for fewer"
                )
            train += problems[:trained]
            test += problems[trained : trained + tested]
            base.append(problems[trained + tested :])
        draw.shuffle(train)
        return base, train, test

    def _problems(self, count: int, draw: random.Random) -> list[_Problem]:
        """Every (numbers, target) of `count` numbers that has a solution, in random order."""
        sets = list(combinations_with_replacement(range(1, self.largest_number + 1), count))
        chosen = draw.sample(sets, min(self.multisets, len(sets)))
        problems = [
            _Problem(numbers, target, texts)
            for numbers in chosen
            for target, texts in solutions(numbers).items()
            if 1 <= target <= self.largest_target
        ]
        draw.shuffle(problems)
        return problems


class _Problem(NamedTuple):
    numbers: tuple[int, ...]
    target: int
    solutions: list[str]


def _row(problem: _Problem, draw: random.Random) -> dict[str, Any]:
    numbers = draw.sample(problem.numbers, len(problem.numbers))
    return {
        "prompt": f"{','.join(map(str, numbers))}={problem.target}:",
        "numbers": numbers,
        "target": problem.target,
        "num_solutions": len(problem.solutions),
        "answer": problem.solutions[0],
    }


def _sampler(
    problems: list[list[_Problem]], draw: random.Random, easy: list[_Problem], easy_share: float
) -> Callable[[], tuple[str, str]]:
    """Draws (prompt, solution): easy or not, where such are given; the count uniformly; the problem; the solution."""

    def sample() -> tuple[str, str]:
        among = easy if easy and draw.random() < easy_share else draw.choice(problems)
        problem = draw.choice(among)
        return _row(problem, draw)["prompt"], draw.choice(problem.solutions)

    return sample


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; decoding joins them without blanks."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(("<pad>", "<eos>", *"0123456789+-*/(),=:"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", pad_token="<pad>", eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _new_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int) -> PreTrainedModel:
    """A random Llama; about 0.28 M parameters for 96 × 3."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size,
            num_hidden_layers=layers, num_attention_heads=hidden_size // 32, head_dim=32, max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
