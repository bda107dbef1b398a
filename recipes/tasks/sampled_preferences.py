"""`prepare: {name: sampled_preferences}`: preference pairs that a model writes itself and a scorer labels.

A real model needs no data of anybody else for a first alignment run: it continues each prompt several times, a scorer
(VADER's sentiment, say) rates the continuations, and the best one is preferred to the worst, the second best to the
second worst, and so on. Some prompts are held out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["SampledPreferencesConfig"]


@dataclass
class SampledPreferencesConfig:
    """Recipe block `prepare: {name: sampled_preferences}`.

    Args:
        model: path or name of the model that writes; it is the one to be trained.
        prompts: the beginnings to continue, as plain text.
        scorer: what rates a continuation, as in `fdiv.alignment.scorers.build_scorer`.
        test_prompts: how many prompts, evenly spaced, are held out with their pairs.
        validation_prompts: how many of the others, evenly spaced, make a split of their own to choose settings on.
        samples_per_prompt: continuations per prompt. pairs_per_prompt: pairs made of them at most.
        min_gap: a pair is made only where the scores differ by at least so much.
        max_new_tokens: longest continuation. temperature: it is sampled at.
        batch_size: continuations sampled at once.
        seed: of the sampling.
    """

    model: str = ""
    prompts: list[str] = field(default_factory=list)
    scorer: Any = "vader"
    test_prompts: int = 10
    validation_prompts: int = 0
    samples_per_prompt: int = 6
    pairs_per_prompt: int = 2
    min_gap: float = 0.2
    max_new_tokens: int = 24
    temperature: float = 1.0
    batch_size: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        from fdiv.alignment.scorers import build_scorer

        if not self.model:
            raise ValueError("prepare.model is not set: give the path or name of a causal language model")
        for name in ("test_prompts", "pairs_per_prompt", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"prepare.{name}={getattr(self, name)}: must be at least 1")
        if self.validation_prompts < 0:
            raise ValueError(f"prepare.validation_prompts={self.validation_prompts}: must be at least 0")
        if len(set(self.prompts)) <= self.test_prompts + self.validation_prompts:
            raise ValueError(
                f"prepare.prompts has {len(set(self.prompts))} different prompts, of which test_prompts="
                f"{self.test_prompts} and validation_prompts={self.validation_prompts} are held out: give more"
            )
        if self.samples_per_prompt < 2 * self.pairs_per_prompt:
            raise ValueError(
                f"prepare.samples_per_prompt={self.samples_per_prompt} cannot make pairs_per_prompt="
                f"{self.pairs_per_prompt} pairs: take at least twice as many"
            )
        if not self.min_gap > 0:
            raise ValueError(f"prepare.min_gap={self.min_gap}: must be above 0, or a pair would prefer nothing")
        if not self.temperature > 0:
            raise ValueError(f"prepare.temperature={self.temperature}: must be above 0")
        build_scorer(self.scorer)

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `data/train.jsonl` and `data/test.jsonl` (prompt, chosen, rejected), `data/validation.jsonl` with
        `validation_prompts`, and `prepare.json`, which counts the pairs made and those whose gap was too small.
        `negatives.jsonl` has the training pairs for methods without positives: prompt, rejected, and the same text as
        completion.

        Returns:
            The recipe keys it sets: `model_name_or_path`, `dataset_name`, `dataset_train_split`,
            `dataset_test_split`.

        Raises:
            ValueError: no pair in one of the two parts.
            DataError: the model cannot be loaded.
        """
        output_dir = Path(output_dir)
        data = output_dir / "data"
        data.mkdir(parents=True, exist_ok=True)
        prompts = list(dict.fromkeys(self.prompts))
        samples = self._sample(prompts)
        parts = self._parts(len(prompts))
        counts: dict[str, Any] = {}
        for part, chosen in parts.items():
            pairs = [pair for index in chosen for pair in self._pairs(prompts[index], samples[index])]
            if not pairs:
                raise ValueError(
                    f"no two continuations of a {part} prompt differ by min_gap={self.min_gap}: lower it, or take "
                    "more samples"
                )
            counts[part] = {"pairs": len(pairs), "left out": len(chosen) * self.pairs_per_prompt - len(pairs)}
            _write(data / f"{part}.jsonl", pairs)
            if part == "train":
                _write(output_dir / "negatives.jsonl", [_negative(pair) for pair in pairs])
        record = json.dumps({"settings": asdict(self), **counts}, indent=2)
        (output_dir / "prepare.json").write_text(record + "\n", encoding="utf-8")
        return {
            "model_name_or_path": self.model,
            "dataset_name": str(data),
            "dataset_train_split": "train",
            "dataset_test_split": "test",
        }

    def _parts(self, count: int) -> dict[str, list[int]]:
        """The places of the prompts of each split."""
        test = [index * count // self.test_prompts for index in range(self.test_prompts)]
        others = [index for index in range(count) if index not in test]
        held = [others[i * len(others) // self.validation_prompts] for i in range(self.validation_prompts)]
        parts = {"train": [index for index in others if index not in held], "test": test}
        return {**parts, "validation": held} if held else parts

    def _sample(self, prompts: Sequence[str]) -> list[list[str]]:
        """`samples_per_prompt` continuations of each prompt."""
        from fdiv.inference.sampling import SamplingRequest, sample_completions
        from fdiv.models.loading import load_model, load_tokenizer

        tokenizer, model = load_tokenizer(self.model), load_model(self.model)
        requests = [
            SamplingRequest(f"{i}-{k}", tuple(tokenizer(prompt)["input_ids"]), self.max_new_tokens, stream=(i, k))
            for i, prompt in enumerate(prompts)
            for k in range(self.samples_per_prompt)
        ]
        drawn = sample_completions(
            model, tokenizer, requests, temperature=self.temperature, seed=self.seed, batch_size=self.batch_size
        )
        texts = tokenizer.batch_decode([drawn[request.key] for request in requests], skip_special_tokens=True)
        return [texts[i : i + self.samples_per_prompt] for i in range(0, len(texts), self.samples_per_prompt)]

    def _pairs(self, prompt: str, texts: Sequence[str]) -> list[dict[str, str]]:
        """The k-th best against the k-th worst, as long as the gap is large enough."""
        from fdiv.alignment.scorers import build_scorer, checked_scorer

        scorer = checked_scorer(build_scorer(self.scorer))
        scores = scorer(prompts=[prompt] * len(texts), completions=list(texts))
        ranked = sorted(zip(scores, texts, strict=True), key=lambda pair: pair[0], reverse=True)
        pairs = [(ranked[k], ranked[-1 - k]) for k in range(self.pairs_per_prompt)]
        return [
            {"prompt": prompt, "chosen": best[1], "rejected": worst[1]}
            for best, worst in pairs
            if best[0] - worst[0] >= self.min_gap
        ]


def _negative(pair: dict[str, str]) -> dict[str, str]:
    return {"prompt": pair["prompt"], "rejected": pair["rejected"], "completion": pair["rejected"]}


def _write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
