"""Scorers: plain functions with TRL's reward signature, `(prompts, completions, **columns) -> list[float]`.

Any TRL reward function is a scorer. Those here are made by a factory each, so that a recipe can name them:
`{name: contains_words, words: [amazing]}` is `contains_words(words=["amazing"])`.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fdiv.catalog import REWARDS, build_reward
from fdiv.errors import ScorerError
from fdiv.files import numbered_lines
from fdiv.inference.prompting import completion_text

__all__ = [
    "SCORERS",
    "Scorer",
    "build_scorer",
    "checked_scorer",
    "classifier",
    "compiles",
    "contains_words",
    "lexicon_sentiment",
    "prepare_scorer",
    "read_lexicon",
    "vader",
]

Scorer = Callable[..., Sequence[float]]


def _named(name: str, score: Callable[[str], float]) -> Scorer:
    """A scorer that looks at each completion's text alone."""

    def scorer(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        return [score(completion_text(completion)) for completion in completions]

    scorer.__name__ = name
    return scorer


def contains_words(
    words: Sequence[str], *, all_of_them: bool = False, case_sensitive: bool = False, name: str = "contains_words"
) -> Scorer:
    """1 where the completion contains one of `words` as a whole word (all of them with `all_of_them`), else 0.

    Raises:
        ValueError: no words, or an empty one.
    """
    words = [words] if isinstance(words, str) else list(words)
    if not words or not all(words):
        raise ValueError(f"contains_words: words={words!r} must name at least one word, none of them empty")
    flags = 0 if case_sensitive else re.IGNORECASE
    patterns = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", flags) for word in words]
    combine = all if all_of_them else any
    return _named(name, lambda text: float(combine(pattern.search(text) for pattern in patterns)))


def read_lexicon(path: str | Path) -> dict[str, float]:
    """A VADER lexicon: token → mean valence, −4 (most negative) to 4 (tab-separated; further columns are ignored).

    `$VARIABLES` in `path` are filled in from the environment.

    Raises:
        FileNotFoundError: no such file, or an environment variable in the path is unset.
        ValueError: a line without a number in its second column.
    """
    filled = os.path.expanduser(os.path.expandvars(str(path)))
    if not Path(filled).is_file():
        hint = " (an environment variable in it is unset)" if "$" in filled else ""
        raise FileNotFoundError(f"lexicon {filled}: no such file{hint}; VADER's is vader_lexicon.txt")
    lexicon = {}
    for number, line in numbered_lines(Path(filled)):
        columns = line.split("\t")
        try:
            lexicon[columns[0].lower()] = float(columns[1])
        except (IndexError, ValueError) as error:
            raise ValueError(f"lexicon {filled}, line {number}: token, tab, number are due, got {line!r}") from error
    return lexicon


def lexicon_sentiment(lexicon: str | Path, *, threshold: float | None = None, name: str = "sentiment") -> Scorer:
    """Sentiment by a VADER lexicon: s/√(s² + 15) in (−1, 1), s the summed valence of the words; 0 without any.

    The file is read on first use, or when `prepare_scorer` asks for it.

    VADER's normalisation without its rules for negation, boosters, punctuation and capitals. With `threshold` it is 1
    where the sentiment is at least that, else 0 (VADER calls ≥ 0.05 positive).
    """
    loaded = functools.cache(lambda: read_lexicon(lexicon))
    word = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")

    def score(text: str) -> float:
        valence = loaded()
        # Emoticons and the like are entries too, but not words: they stand between spaces.
        tokens = [token for token in text.lower().split() if token in valence and not word.fullmatch(token)]
        total = sum(valence.get(token, 0.0) for token in [*tokens, *word.findall(text.lower())])
        sentiment = total / math.sqrt(total * total + 15.0)
        return sentiment if threshold is None else float(sentiment >= threshold)

    scorer = _named(name, score)
    scorer.prepare = loaded
    return scorer


def vader(*, negated: bool = False, name: str = "vader") -> Scorer:
    """VADER's compound sentiment in [−1, 1] with all of its rules, by its authors' package (ICWSM 2014).

    Args:
        negated: minus the compound, where a high score is to mean a bad text (`harmfulness_scorer`).
        name: name of the scorer in the logs.

    The package is imported on first use, or when `prepare_scorer` asks for it.

    Raises:
        ScorerError: (on first use) the package vaderSentiment is not installed.
    """

    @functools.cache
    def analyzer() -> Any:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise ScorerError("scorer 'vader' needs the package vaderSentiment: pip install 'fdiv[models]'") from error
        return SentimentIntensityAnalyzer()

    sign = -1.0 if negated else 1.0
    scorer = _named(name, lambda text: sign * analyzer().polarity_scores(text)["compound"])
    scorer.prepare = analyzer
    return scorer


def compiles(*, with_prompt: bool = True, name: str = "compiles") -> Scorer:
    """1 where prompt + completion (the completion alone without `with_prompt`) is Python source that compiles, else 0.

    `compile` only: nothing is ever executed. Empty source does not count as code.
    """

    def compiles_one(source: str) -> float:
        if not source.strip():
            return 0.0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SyntaxWarning about "is" with a literal and the like
                compile(source, "<completion>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
            return 0.0  # ValueError: null bytes; the last three: source too deep or too large for the compiler
        return 1.0

    def scorer(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        heads = [prompt if with_prompt and isinstance(prompt, str) else "" for prompt in prompts]
        return [
            compiles_one(head + completion_text(completion))
            for head, completion in zip(heads, completions, strict=True)
        ]

    scorer.__name__ = name
    return scorer


def classifier(
    model: str, label: str | int, *, with_prompt: bool = False, batch_size: int = 32, name: str = "classifier"
) -> Scorer:
    """The probability a transformers sequence classifier gives to `label`; the model is loaded on first use.

    Args:
        model: path or hub name of an `AutoModelForSequenceClassification`.
        label: one of the model's labels, by name or number.
        with_prompt: classify prompt + completion (plain prompts only).
        batch_size: texts per forward pass.
        name: name of the scorer in the logs.

    Raises:
        ValueError: (on first use) the model has no such label.
    """

    @functools.cache
    def loaded() -> tuple[Any, Any, int]:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from fdiv.inference.processes import whole_models

        with whole_models():
            network = AutoModelForSequenceClassification.from_pretrained(model).eval().requires_grad_(False)
        labels = network.config.label2id
        number = label if isinstance(label, int) else labels.get(label)
        if number is None or not 0 <= number < network.config.num_labels:
            raise ValueError(f"classifier {model}: no label {label!r}; it has {', '.join(map(str, labels))}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return AutoTokenizer.from_pretrained(model), network.to(device), number

    def scorer(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        import torch

        tokenizer, network, number = loaded()
        heads = [prompt if with_prompt and isinstance(prompt, str) else "" for prompt in prompts]
        texts = [head + completion_text(completion) for head, completion in zip(heads, completions, strict=True)]
        scores: list[float] = []
        with torch.no_grad():
            for start in range(0, len(texts), batch_size):
                batch = tokenizer(
                    texts[start : start + batch_size], return_tensors="pt", padding=True, truncation=True
                )
                scores += network(**batch.to(network.device)).logits.softmax(-1)[:, number].tolist()
        return scores

    scorer.__name__ = name
    scorer.prepare = loaded
    return scorer


SCORERS = REWARDS  # its name in release 0.1: there is one table of what scores a completion


def build_scorer(spec: str | Mapping[str, Any] | Scorer) -> Scorer:
    """A scorer from a callable, a name, or a mapping: `fdiv.catalog.build_reward`, whose errors say "scorer"."""
    return build_reward(spec, "scorer")


def prepare_scorer(scorer: Scorer) -> None:
    """Have a scorer read what it needs (its lexicon, its classifier) now, so that a wrong path shows at once."""
    if hasattr(scorer, "prepare"):
        scorer.prepare()


def checked_scorer(scorer: Scorer, *, finite: bool = True) -> Scorer:
    """`scorer` with its faults named: what it raises, a wrong length, or a score that is None, NaN or infinite.

    TRL reads None as "no reward for this row" and drops it; a target density has no such row, so it is refused here,
    unless `finite` is False (a score that is only logged).
    Asynchronous reward functions and reward models are returned as they are.
    """
    if inspect.iscoroutinefunction(scorer) or not callable(scorer) or hasattr(scorer, "forward"):
        return scorer
    name = getattr(scorer, "__name__", type(scorer).__name__)

    @functools.wraps(scorer, assigned=("__doc__",), updated=())
    def checked(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        try:
            scores = list(scorer(prompts=prompts, completions=completions, **columns))
        except Exception as error:  # a scorer is the user's code: whatever it raises is reported with its name
            raise ScorerError(f"scorer {name!r} raised {type(error).__name__}: {error}") from error
        if len(scores) != len(completions):
            raise ScorerError(f"scorer {name!r} returned {len(scores)} scores for {len(completions)} completions")
        if finite:
            check_finite(name, scores, completions)
        return scores

    checked.__name__ = name
    return checked


def check_finite(name: str, scores: Sequence[float | None], completions: Sequence[Any]) -> None:
    """ScorerError if any of `scores` is None, NaN or infinite, showing the completion."""
    for score, completion in zip(scores, completions, strict=True):
        if score is None or not math.isfinite(score):
            shown = completion_text(completion)
            raise ScorerError(
                f"scorer {name!r} returned {score} for the completion {shown[:80]!r}: every completion needs a finite "
                "score, since the target density is made from it"
            )
