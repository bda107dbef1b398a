"""`prepare: {name: novels_unlearning}`: a MUSE-like task and its two models, built from novels on a CPU.

MUSE (arXiv:2407.06460) compares a model fine-tuned on a corpus with one that never saw the part to be forgotten. Here
the corpus is passages of public-domain novels and both models are small Llamas trained from nothing: the target on
forget and retain novels, the retrained one on the retain novels alone. As models of this size do not learn to answer
from running text, both are also trained on the questions of their novels; unlearning sees the passages only, so
KnowMem asks whether what else was known of them goes too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fdiv.recipes.tasks.novels.passages import Passage
    from fdiv.unlearning.data import EncodedAnswer

__all__ = ["NovelsUnlearningConfig"]

CORPUS = "Novels"
_TEXT_BATCH, _QUESTION_BATCH = 8, 32


@dataclass
class NovelsUnlearningConfig:
    """Recipe block `prepare: {name: novels_unlearning}`.

    Args:
        data: folder or tar archive with one `TITLE.txt` per novel.
        forget_novels, retain_novels: titles; passages of the forget novels are forgotten, others of them are holdout.
        forget_passages, retain_passages: how many in all, shared evenly among the novels; as many are held out as
            are forgotten.
        passage_words: length of a passage, up to half as many more. prompt_words: of the verbatim test's prompt.
        vocab_size, hidden_size, layers: of both models.
        epochs: passes over the passages. learning_rate: its maximum. bf16: train in bfloat16 with float32 weights.
        seed: of both models, of the order of the rows and of the questions.
    """

    data: str = ""
    forget_novels: list[str] = field(default_factory=list)
    retain_novels: list[str] = field(default_factory=list)
    forget_passages: int = 32
    retain_passages: int = 64
    passage_words: int = 70
    prompt_words: int = 25
    vocab_size: int = 4096
    hidden_size: int = 256
    layers: int = 4
    epochs: int = 64
    learning_rate: float = 3e-3
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("prepare.data is not set: give a folder or tar archive with one TITLE.txt per novel")
        for name in ("forget_novels", "retain_novels"):
            if not getattr(self, name):
                raise ValueError(f"prepare.{name} is empty: name at least one novel")
        both = sorted(set(self.forget_novels) & set(self.retain_novels))
        if both:
            raise ValueError(f"{both[0]} stands in prepare.forget_novels and in prepare.retain_novels: drop one")
        for name in ("forget", "retain"):
            count, novels = getattr(self, f"{name}_passages"), len(getattr(self, f"{name}_novels"))
            if count < 2 or count % novels:
                raise ValueError(
                    f"prepare.{name}_passages={count}: must be at least 2 and a multiple of the {novels} novels"
                )
        if not 1 <= self.prompt_words < self.passage_words:
            raise ValueError(f"prepare.prompt_words={self.prompt_words}: must be 1 to passage_words - 1")
        if self.epochs < 1:
            raise ValueError(f"prepare.epochs={self.epochs}: must be at least 1")

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `data/` (MUSE's file names and `raw/`), `model/`, `retain_model/` and the latter's evaluation log
        `retain_log/MUSE_EVAL.json`, which serves evaluations of a part of the rows (`max_items`) too.

        Returns:
            The recipe keys it sets: `model_name_or_path`, `dataset_name`, `retain_dataset_name`.

        Raises:
            FileNotFoundError: a novel is missing.
            ValueError: a novel is too short, or none of a side's passages names anybody.
        """
        from fdiv.eval.muse.evaluation import MuseEvalConfig, MuseEvaluation
        from fdiv.recipes.tasks.tofu.unlearning import write_retain_log

        output_dir = Path(output_dir)
        passages, questions = self._cut()
        data = output_dir / "data"
        self._write_data(data, passages, questions)
        texts = [passage.text for part in passages.values() for passage in part]
        texts += [row["question"] for part in questions.values() for row in part]
        for name, sides in (("model", ("forget", "retain")), ("retain_model", ("retain",))):
            rows = [passage for side in sides for passage in passages[side]]
            self._train(output_dir / name, texts, rows, [row for side in sides for row in questions[side]])
        config = MuseEvalConfig(data=str(data), corpus=CORPUS, gradnorm=False, fluency_classifier="none")
        write_retain_log(str(output_dir / "retain_model"), config, output_dir / "retain_log", MuseEvaluation)
        (output_dir / "prepare.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
        return {
            "model_name_or_path": str(output_dir / "model"),
            "dataset_name": str(data / "raw" / "forget.jsonl"),
            "retain_dataset_name": str(data / "raw" / "retain.jsonl"),
        }

    def _cut(self) -> tuple[dict[str, list[Passage]], dict[str, list[dict[str, str]]]]:
        """Passages of the sides `forget`, `holdout`, `retain`, and the questions of forget and retain."""
        from fdiv.recipes.tasks.novels.passages import cut_passages, find_names, name_question, read_novels

        novels = read_novels(self.data, [*self.forget_novels, *self.retain_novels])
        passages: dict[str, list[Passage]] = {"forget": [], "holdout": [], "retain": []}
        questions: dict[str, list[dict[str, str]]] = {"forget": [], "retain": []}
        draw = random.Random(self.seed)
        for side, titles in (("forget", self.forget_novels), ("retain", self.retain_novels)):
            count = getattr(self, f"{side}_passages") // len(titles)
            for title in titles:
                names = find_names(novels[title])
                found = cut_passages(
                    title, novels[title], 2 * count if side == "forget" else count, self.passage_words
                )
                if side == "forget":
                    passages["holdout"] += found[1::2]
                    found = found[::2]
                passages[side] += found
                asked = [name_question(passage, names, draw) for passage in found]
                questions[side] += [question for question in asked if question is not None]
            if not questions[side]:
                raise ValueError(f"no passage of the {side} novels names anybody: take more of them, or longer ones")
        return passages, questions

    def _write_data(
        self, data: Path, passages: dict[str, list[Passage]], questions: dict[str, list[dict[str, str]]]
    ) -> None:
        verbatim = [passage.split(self.prompt_words) for passage in passages["forget"]]
        files = {
            "knowmem/forget_qa": questions["forget"],
            "knowmem/retain_qa": questions["retain"],
            "verbmem/forget": [{"prompt": prompt, "gt": rest} for prompt, rest in verbatim],
            "privleak/forget": [passage.text for passage in passages["forget"]],
            "privleak/holdout": [passage.text for passage in passages["holdout"]],
        }
        for name, rows in files.items():
            path = data / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (data / "raw").mkdir(exist_ok=True)
        for side in ("forget", "retain"):
            lines = [json.dumps({"text": passage.text}, ensure_ascii=False) + "\n" for passage in passages[side]]
            (data / "raw" / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")

    def _train(self, folder: Path, texts: list[str], rows: Sequence[Passage], questions: list[dict[str, str]]) -> None:
        """A small Llama that has memorised `rows` and the answers to `questions`, in `folder`."""
        from transformers import AutoTokenizer

        from fdiv.models.tiny import build_tiny_model
        from fdiv.recipes.tasks.by_heart import learn_by_heart
        from fdiv.recipes.tasks.tiny.authors import CHAT_TEMPLATE
        from fdiv.unlearning.data import Answer, encode_answer

        build_tiny_model(
            folder,
            vocab_texts=texts,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            layers=self.layers,
            seed=self.seed,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = CHAT_TEMPLATE
        _add_beginning(tokenizer)
        tokenizer.save_pretrained(folder)
        passages = [_encode_passage(passage.text, tokenizer) for passage in rows]
        asked = [
            Answer(
                [{"role": "user", "content": row["question"]}], [{"role": "assistant", "content": row["answer"]}], row
            )
            for row in questions
        ]
        answers = [encode_answer(answer, tokenizer, None) for answer in asked]
        draw, batches = random.Random(self.seed), []
        for _ in range(self.epochs):
            epoch = _batches(passages, _TEXT_BATCH, draw) + _batches(answers, _QUESTION_BATCH, draw)
            batches += draw.sample(epoch, len(epoch))
        learn_by_heart(folder, batches, self.learning_rate, betas=(0.9, 0.95), bf16=self.bf16)


def _add_beginning(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer put its beginning-of-sequence token before every text, as Llama's does."""
    from tokenizers import processors

    template = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template


def _encode_passage(text: str, tokenizer: PreTrainedTokenizerBase) -> EncodedAnswer:
    """The whole passage is learnt, and so is that it ends, so that a generation can be as long as the truth."""
    from fdiv.unlearning.data import EncodedAnswer

    ids = tokenizer(text)["input_ids"]
    return EncodedAnswer(ids[:1], [*ids[1:], tokenizer.eos_token_id])


def _batches(rows: list[EncodedAnswer], size: int, draw: random.Random) -> list[list[EncodedAnswer]]:
    order = draw.sample(rows, len(rows))
    return [order[start : start + size] for start in range(0, len(order), size)]
