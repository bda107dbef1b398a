"""A small preference world known completely: what f-DPO should reach on it is computed, not only hoped for.

A prompt joins a tone and a topic ("Write a calm line about rain:"), a response is an adjective and a noun
(" quiet river"): 36 prompts, 64 well-formed responses each, with the reward u[tone, adjective] + v[topic, noun]. Any
other text is malformed and has one fixed low reward. The reference is a tiny Llama trained on samples of a broad base
distribution of which a share is malformed, as a real model's outputs are; a pair is two different responses labelled
by Bradley–Terry, P(y_1 ≻ y_2) = σ(r_1 − r_2).

The malformed share is not decoration. A pairwise loss fixes only the ratios among the responses it sees. Without any
malformed response among the pairs, reverse KL and Jensen–Shannon moved 99.9 % of the policy's mass to text no one had
compared (likelihood displacement) while ordering over 90 % of the pairs rightly. Some (tone, topic) combinations are
held out of the pairs; every tone and every topic is still seen. Everything is built offline in seconds and depends on
the seed alone.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fdiv.models.logprobs import token_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TONES = ("calm", "bold", "dry", "warm", "stern", "playful")
TOPICS = ("rain", "money", "music", "winter", "cities", "gardens")
ADJECTIVES = ("quiet", "bright", "plain", "sharp", "gentle", "heavy", "golden", "distant")
NOUNS = ("river", "market", "lantern", "engine", "window", "letter", "harbor", "orchard")
PROMPTS = tuple(f"Write a {tone} line about {topic}:" for tone in TONES for topic in TOPICS)
RESPONSES = tuple(f" {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)
_WORDS = ("Write", "a", "line", "about", ":", *TONES, *TOPICS, *ADJECTIVES, *NOUNS)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from more threads, and on a busy machine threads that wait for each other cost
    minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, eq=False)
class TinyWorld:
    """The known facts of one world; tensors are float64, rows are `PROMPTS`, columns are `RESPONSES`."""

    held_out: torch.Tensor
    """`[36]` bool: True for a prompt no training pair was made of."""
    reward: torch.Tensor
    """`[36, 64]` r(x, y), in nats of preference log-odds."""
    malformed_reward: float
    """The reward of every other text."""
    reference_log_probs: torch.Tensor
    """`[36, 64]` log π_ref(y | x) of the whole response with its end-of-sequence token; the rest to 1 is malformed."""

    def save(self, path: Path) -> None:
        """Write the world as JSON, with the prompts and responses that its rows and columns stand for."""
        content = {
            "prompts": PROMPTS,
            "responses": RESPONSES,
            "held_out": self.held_out.tolist(),
            "reward": self.reward.tolist(),
            "malformed_reward": self.malformed_reward,
            "reference_log_probs": self.reference_log_probs.tolist(),
        }
        path.write_text(json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: Path) -> "TinyWorld":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no world at `path`.
            ValueError: the world was built for other prompts or responses.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: build the world with `prepare: {{name: tiny_preferences}}`"
            )
        content = json.loads(path.read_text())
        if tuple(content["prompts"]) != PROMPTS or tuple(content["responses"]) != RESPONSES:
            raise ValueError(f"{path} lists other prompts or responses than this version of fdiv: build it again")
        return cls(
            torch.tensor(content["held_out"]),
            torch.tensor(content["reward"], dtype=torch.float64),
            content["malformed_reward"],
            torch.tensor(content["reference_log_probs"], dtype=torch.float64),
        )


@dataclass
class TinyPreferencesConfig:
    """Recipe block `prepare: {name: tiny_preferences}`: build the world, its reference model and its preference pairs.

    Args:
        seed: of the reward, the base distribution, the weights, the held-out combinations and the pairs.
        held_out_per_tone: how many of a tone's six topics are held out, 1 to 5 (as many of a topic's tones).
        train_pairs_per_prompt: preference pairs sampled for each training prompt.
        test_pairs_per_prompt: preference pairs sampled for each held-out prompt.
        base_scale: standard deviation of each of the two summands of the base distribution's logits; small is broad.
        reward_scale: standard deviation of each of the two summands of the reward.
        malformed_share: share of malformed responses in what the reference learns and in the pairs, in (0, 1).
        malformed_reward: their reward.
        sft_steps: optimizer steps of the reference, on batches of 128 fresh samples.
    """

    seed: int = 0
    held_out_per_tone: int = 2
    train_pairs_per_prompt: int = 512
    test_pairs_per_prompt: int = 64
    base_scale: float = 1.0
    reward_scale: float = 1.0
    malformed_share: float = 0.1
    malformed_reward: float = -3.0
    sft_steps: int = 400

    def __post_init__(self) -> None:
        if not 1 <= self.held_out_per_tone < len(TOPICS):
            raise ValueError(f"prepare.held_out_per_tone must be 1 to {len(TOPICS) - 1}, got {self.held_out_per_tone}")
        for name in ("train_pairs_per_prompt", "test_pairs_per_prompt", "sft_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"prepare.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("base_scale", "reward_scale"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"prepare.{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.malformed_share < 1:
            raise ValueError(f"prepare.malformed_share must lie in (0, 1), got {self.malformed_share}")

    @_one_thread()
    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `model/`, `data/train.jsonl`, `data/test.jsonl` (prompt, chosen, rejected) and `world.json`.

        Returns:
            The recipe keys it sets: `model_name_or_path`, `dataset_name`, `dataset_train_split`,
            `dataset_test_split`.
        """
        output_dir = Path(output_dir)
        model_dir, data_dir = output_dir / "model", output_dir / "data"
        data_dir.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(self.seed)
        reward = self.reward_scale * _sum_of_two_tables(generator)
        base = torch.softmax(self.base_scale * _sum_of_two_tables(generator), dim=-1)
        held_out = self._held_out(generator)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            tokenizer = _new_tokenizer()
            model = _new_model(tokenizer)
            self._train_reference(model, tokenizer, base, generator)
            reference_log_probs = response_log_probs(model, tokenizer)
        model.save_pretrained(model_dir)
        tokenizer.save_pretrained(model_dir)

        world = TinyWorld(held_out, reward, self.malformed_reward, reference_log_probs)
        world.save(output_dir / "world.json")
        for split, rows, count in (
            ("train", ~held_out, self.train_pairs_per_prompt),
            ("test", held_out, self.test_pairs_per_prompt),
        ):
            pairs = self._pairs(world, rows.nonzero().flatten().repeat_interleave(count), generator)
            (data_dir / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        return {
            "model_name_or_path": str(model_dir),
            "dataset_name": str(data_dir),
            "dataset_train_split": "train",
            "dataset_test_split": "test",
        }

    def _held_out(self, generator: torch.Generator) -> torch.Tensor:
        """`[36]` bool with `held_out_per_tone` True in each row and each column of the tone × topic square."""
        tone_order = torch.randperm(len(TONES), generator=generator)
        topic_order = torch.randperm(len(TOPICS), generator=generator)
        offset = (tone_order[:, None] + topic_order[None, :]) % len(TOPICS)
        return (offset < self.held_out_per_tone).flatten()

    def _responses(self, probs: torch.Tensor, generator: torch.Generator) -> list[tuple[str, int]]:
        """One response per row of `probs` `[B, 64]`: its text and its column, 64 for a malformed one."""
        columns = torch.multinomial(probs, 1, generator=generator).flatten()
        malformed = torch.rand(len(probs), generator=generator) < self.malformed_share
        return [
            (_malformed(column, generator), len(RESPONSES)) if bad else (RESPONSES[column], column)
            for column, bad in zip(columns.tolist(), malformed.tolist(), strict=True)
        ]

    def _train_reference(self, model, tokenizer, base: torch.Tensor, generator: torch.Generator) -> None:
        """Supervised training of `model`, in place, on fresh samples of the base distribution for every prompt."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        warmup = 0.1 if self.sft_steps != 10 else 0.2  # a warm-up of exactly one step divides by zero in torch
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=self.sft_steps, pct_start=warmup)
        model.train()
        for _ in range(self.sft_steps):
            rows = torch.randint(len(PROMPTS), (128,), generator=generator)
            texts = [text for text, _ in self._responses(base[rows], generator)]
            scores = token_scores(model, *_tokenised(tokenizer, [PROMPTS[row] for row in rows.tolist()], texts))
            loss = -scores.log_probs.sum() / scores.mask.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()

    def _pairs(self, world: TinyWorld, rows: torch.Tensor, generator: torch.Generator) -> list[dict[str, str]]:
        """One pair of different responses, ordered by Bradley–Terry, for each entry of `rows`; in random order."""
        reward = torch.nn.functional.pad(world.reward, (0, 1), value=world.malformed_reward)
        probs = torch.softmax(world.reference_log_probs, dim=-1)
        pairs = []
        for row in rows[torch.randperm(len(rows), generator=generator)].tolist():
            first = second = ("", -1)
            while first[0] == second[0]:
                first, second = self._responses(probs[[row, row]], generator)
            first_wins = torch.sigmoid(reward[row, first[1]] - reward[row, second[1]])
            if torch.rand((), generator=generator, dtype=torch.float64) >= first_wins:
                first, second = second, first
            pairs.append({"prompt": PROMPTS[row], "chosen": first[0], "rejected": second[0]})
        return pairs


@_one_thread()
def response_log_probs(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> torch.Tensor:
    """`[36, 64]` float64 log π(y | x) of every well-formed response with its end-of-sequence token, for every prompt.

    What is missing to a total probability of 1 is the mass of malformed responses.
    """
    rows = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for prompt in PROMPTS:
            batch = [tensor.to(model.device) for tensor in _tokenised(tokenizer, [prompt] * len(RESPONSES), RESPONSES)]
            rows.append(token_scores(model, *batch).log_probs.double().sum(dim=-1).cpu())
    model.train(was_training)
    return torch.stack(rows)


def _new_tokenizer() -> "PreTrainedTokenizerBase":
    """A tokenizer with one token per word of the world and one special token.

    Padding is the end-of-sequence token under a mask, and there is no unknown or first token: a token that occurs in
    no response is compared with nothing, and a pairwise loss leaves the mass on it free to grow.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(("<eos>", *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", eos_token="<eos>", pad_token="<eos>", unk_token="<eos>"
    )


def _new_model(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
    """A random two-layer Llama of about 0.08 M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=32,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _sum_of_two_tables(generator: torch.Generator) -> torch.Tensor:
    """`[36, 64]` a[tone, adjective] + b[topic, noun] with standard-normal entries."""
    tones = torch.randn(len(TONES), len(ADJECTIVES), generator=generator, dtype=torch.float64)
    topics = torch.randn(len(TOPICS), len(NOUNS), generator=generator, dtype=torch.float64)
    return (tones[:, None, :, None] + topics[None, :, None, :]).reshape(len(PROMPTS), len(RESPONSES))


def _malformed(column: int, generator: torch.Generator) -> str:
    """A well-formed response with one mistake: a wrong word in place of either, no noun, or a word too many."""

    def pick(words: Sequence[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    words = RESPONSES[column].split()
    mistake = pick(("adjective", "noun", "missing", "extra"))
    if mistake == "adjective":
        words[0] = pick([word for word in _WORDS if word not in ADJECTIVES])
    elif mistake == "noun":
        words[1] = pick([word for word in _WORDS if word not in NOUNS])
    elif mistake == "missing":
        words.pop()
    else:
        words.append(pick(_WORDS))
    return "".join(f" {word}" for word in words)


def _tokenised(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], responses: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded input ids, `attention_mask`, `completion_mask` `[B, L]`: response tokens and end-of-sequence."""
    prompt_ids = tokenizer(list(prompts))["input_ids"]
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    full_ids = tokenizer(texts)["input_ids"]
    rows = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in full_ids]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    positions = torch.arange(input_ids.size(1))[None, :]
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    prompt_lengths = torch.tensor([len(ids) for ids in prompt_ids])[:, None]
    return input_ids, (positions < lengths).long(), ((positions >= prompt_lengths) & (positions < lengths)).long()


__all__ = ["PROMPTS", "RESPONSES", "TinyPreferencesConfig", "TinyWorld", "response_log_probs"]
