"""From a request to a recipe: everything is looked at first, and what `fdiv run` repeats is written down whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdiv.errors import DataError, RecipeError
from fdiv.eval.unlearning.aggregate import FORGOTTEN_AT
from fdiv.eval.unlearning.attacks.rows import encode, prompt_rows
from fdiv.eval.unlearning.data import Row, passages
from fdiv.eval.unlearning.evaluation import PROFILES, UnlearningEvalConfig
from fdiv.eval.unlearning.sets import check_context, check_end
from fdiv.files import home_path
from fdiv.inference.encoding import EncodedText
from fdiv.inference.prompting import PromptFormat
from fdiv.models.loading import context_of
from fdiv.unlearning.request.builder import SETS, OwnRowsConfig, held_out
from fdiv.unlearning.request.defaults import LORA, TRAINING, length_keys, method_keys
from fdiv.unlearning.request.sampling import longest_sampled

__all__ = ["Looked", "Request", "look", "recipe_of"]

_PLAIN_PROMPT = "Question: {question}\nAnswer:"
_TEXT_LENGTH, _TEXT_PROMPT, _CHEAP_ROWS = 256, 16, 100


@dataclass
class Request:
    """What the command line of `fdiv unlearn` says.

    Attributes:
        model: to unlearn from. rows: files by set, `paraphrases` among them. output: the folder.
        adapter: on the model, to go on training. method: name. bits: 4 for a base in 4 bits, else None.
        prompt_format: prompt of a question without a chat template. seed: of everything random.
        sample_retain: answers of the model as retain rows; questions: a file of what is asked.
        measures: settings of the evaluation.
    """

    model: str
    rows: dict[str, str]
    output: str
    method: str
    adapter: str | None = None
    bits: int | None = None
    prompt_format: str | None = None
    seed: int = 0
    sample_retain: int = 0
    questions: str | None = None
    measures: dict[str, Any] = field(default_factory=dict)

    def prompt(self) -> PromptFormat:
        """How questions are asked.

        Raises:
            RecipeError: a format without {question}, or with another field.
        """
        if self.prompt_format is None:
            return PromptFormat()
        try:
            return PromptFormat(chat_template="never", question_format=self.prompt_format)
        except ValueError as error:
            raise RecipeError(str(error).replace("question_format", "--prompt_format", 1)) from error

    def check(self) -> None:
        """Refuse settings that could not be used, and models that are not there, before anything is made.

        Raises:
            RecipeError, DataError: with the option.
        """
        if self.sample_retain < 0:
            raise RecipeError(f"--sample_retain={self.sample_retain}: must be at least 0")
        if self.questions is not None and not self.sample_retain:
            raise RecipeError("--retain_questions are answered by the model with --sample_retain N alone: give both")
        self.prompt()
        for name, value in self.measures.items():
            try:
                UnlearningEvalConfig(**{name: value})
            except ValueError as error:
                what = str(error) if str(error).startswith(f"{name}=") else f"{name}: {error}"
                raise RecipeError(f"--{what}") from error
        for name in ("retrained", "paraphrase_model"):
            if self.measures.get(name) is not None:
                try:
                    context_of(self.measures[name])
                except DataError as error:
                    raise DataError(f"--{name}: {error}") from error

    def builder(self) -> dict[str, Any]:
        """Its `prepare:` block."""
        files = {name: _absolute(file) for name, file in self.rows.items()}
        keys = {"name": "own_rows", **files}
        if self.sample_retain:
            keys |= {"sample_retain": self.sample_retain, "model": self.model, "seed": self.seed}
            keys |= {"adapter": _absolute(self.adapter)} if self.adapter else {}
            keys |= {"questions": _absolute(self.questions)} if self.questions else {}
        return keys


@dataclass
class Looked:
    """What the files, the tokenizer and the model's config say.

    Attributes:
        sets: rows by set. texts: the same as token ids, running text in passages. limit: the model's context.
        layers: of the model. prompt_format: the request's, or the plain one where there is no chat template.
        sampled: bound on the tokens of a retain row that the model is to answer; 0 where it answers none.
        shortest_text: tokens of the shortest running text that is trained on; 0 where none is.
    """

    sets: dict[str, Sequence[Row]]
    texts: dict[str, list[EncodedText]]
    limit: int | None
    layers: int
    prompt_format: str | None
    sampled: int = 0
    shortest_text: int = 0

    def longest(self, *names: str) -> int:
        """Tokens of the longest row of some sets."""
        return max((len(text.input_ids) for name in names for text in self.texts.get(name, ())), default=0)

    def tokens(self, name: str) -> int:
        """Tokens of a set."""
        return sum(len(text.input_ids) for text in self.texts.get(name, ()))

    @property
    def raw_text(self) -> bool:
        """Whether the forget rows are running text."""
        return "text" in self.sets["forget"][0]

    @property
    def retain_rows(self) -> int:
        """How many retain rows are trained on."""
        return len(self.sets["retain"])


def look(request: Request) -> Looked:
    """Read every file, the tokenizer and the model's config, and refuse what the run could not use.

    Raises:
        RecipeError: see `Request.check`.
        DataError: rows that cannot be read or stand in two sets, a tokenizer without an end token, a row beyond the
            model's context, an adapter of another base.
    """
    from transformers import AutoConfig

    from fdiv.models.adapters import adapter_folder, base_and_adapter, check_base
    from fdiv.models.fetch import find_model
    from fdiv.models.loading import check_pad_token, load_tokenizer

    request.check()
    if request.adapter is not None:
        check_base(request.adapter, request.model)
    elif adapter_folder(request.model) is not None:
        base, adapter = base_and_adapter(request.model)
        raise DataError(f"--model {request.model} is an adapter: give --model {base} --adapter {adapter}")
    config = OwnRowsConfig(**{key: value for key, value in request.builder().items() if key != "name"})
    sets = config.read()
    limit = context_of(request.model)
    layers = getattr(AutoConfig.from_pretrained(find_model(request.model)).get_text_config(), "num_hidden_layers", 1)
    tokenizer = load_tokenizer(request.model, request.adapter)
    check_end(tokenizer, request.model)
    check_pad_token(tokenizer, request.model)
    stated = request.prompt_format
    prompt_format = _PLAIN_PROMPT if stated is None and not tokenizer.chat_template else stated
    prompt = Request("", {}, "", "", prompt_format=prompt_format).prompt()
    texts = {}
    for name in SETS:
        if not sets[name]:
            continue
        pieces = passages(sets[name])
        texts[name] = [encode(row, tokenizer, prompt) for row in prompt_rows(pieces)]
        known = _with_source(pieces, sets[name])
        check_context(texts[name], known, name, limit)
    sampled = longest_sampled(config, tokenizer, prompt, sets["forget"]) if request.sample_retain else 0
    trained = [row["text"] for name in ("forget", "retain") for row in sets[name] if "text" in row]
    lengths = (len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in trained)
    return Looked(sets, texts, limit, layers, prompt_format, sampled, min(lengths, default=0))


def _with_source(pieces: list[Row], rows: Any) -> Any:
    from fdiv.eval.unlearning.data import Rows
    from fdiv.rows.sources import mark_source

    source = getattr(rows, "fdiv_source", None)
    return pieces if source is None else mark_source(Rows(pieces), source)


def _absolute(name: str) -> str:
    """The full path of a file or folder of this machine; any other name unchanged."""
    path = home_path(name)
    return str(path.resolve()) if path.exists() else name


def recipe_of(request: Request, looked: Looked) -> dict[str, Any]:
    """The recipe, key by key.

    Raises:
        RecipeError: see `method_keys`.
    """
    import torch

    sampled = request.sample_retain
    has_retain = bool(looked.retain_rows or sampled)
    measured = {name for name in SETS if looked.sets[name]}
    if sampled:
        measured |= {"retain"} | ({"neighbours"} if held_out(looked.retain_rows + sampled) else set())
    keys: dict[str, Any] = {
        "method": request.method,
        "model_name_or_path": _absolute(request.model),
        **({"adapter_name_or_path": _absolute(request.adapter)} if request.adapter else {}),
        "dtype": "bfloat16" if torch.accelerator.is_available() else "float32",
        **_adapter(request),
        **({"load_in_4bit": True} if request.bits == 4 else {}),
        "prepare": request.builder(),
        **({"prompt_format": looked.prompt_format} if looked.prompt_format is not None else {}),
        "max_length": _max_length(looked),
        **TRAINING,
        "stop_at": FORGOTTEN_AT,
        **method_keys(request.method, has_retain, looked.layers),
        "seed": request.seed,
    }
    rows = len(looked.texts["forget"])
    keys["per_device_train_batch_size"] = batch_size = min(TRAINING["per_device_train_batch_size"], rows)
    keys |= length_keys(rows, batch_size)
    if looked.raw_text:
        # Of a short text fewer, for a text without a token that is scored would not be trained on.
        keys["text_prompt_tokens"] = min(_TEXT_PROMPT, looked.shortest_text // 2)
    files = {name: f"${{prepare}}/{name}.jsonl" for name in SETS if name in measured}
    cheap = {name: files[name] for name in ("forget", "retain", "neighbours", "general") if name in files}
    common = {"name": "unlearning", "cache": "${prepare}/cache"}
    # Thinned, so that an epoch's look at many rows costs no more than the epoch; the report measures all.
    most = {"max_items": _CHEAP_ROWS} if len(looked.texts["forget"]) > _CHEAP_ROWS else {}
    keys["epoch_evaluation"] = {**common, **cheap, "profile": "cheap", **most}
    keys["eval"] = {**common, **files, **request.measures}
    keys["report"] = {"title": f"unlearning {len(looked.sets['forget'])} rows"}
    keys["output_dir"] = request.output
    return keys


def _adapter(request: Request) -> dict[str, Any]:
    """LoRA's keys; of an adapter that is gone on with, its own."""
    if request.adapter is None:
        return LORA
    from fdiv.files import read_json
    from fdiv.models.adapters import adapter_folder

    folder = adapter_folder(request.adapter) or Path(request.adapter)
    own: Mapping[str, Any] = read_json(folder / "adapter_config.json")
    known = {"lora_r": own.get("r"), "lora_alpha": own.get("lora_alpha"), "lora_dropout": own.get("lora_dropout")}
    return {**LORA, **{name: value for name, value in known.items() if value is not None}}


def _max_length(looked: Looked) -> int:
    """The longest row that is trained on or may be sampled, rounded up to 8, within the model's context; of running
    text at least a chunk."""
    if looked.raw_text:
        longest = max(_TEXT_LENGTH, looked.sampled)
    else:
        least = 64 if "retain" not in looked.texts else 0
        longest = max(looked.longest("forget", "retain"), least, looked.sampled)
    longest = -(-longest // 8) * 8
    return longest if looked.limit is None else min(longest, looked.limit)


def samples_of(request: Request) -> int:
    """Answers sampled of each row."""
    stated = request.measures.get("samples")
    return PROFILES[request.measures.get("profile", "quick")].samples if stated is None else stated
