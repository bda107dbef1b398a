"""Chat templates and tokenizers with the properties of known ones, small and of our own making, for the encoding tests.

Each template says how it renders an answer and how a turn ends, so that labels can be compared with what is due.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    *("<pad>", "<s>", "</s>", "<eos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|head|>", "<|/head|>", "<|eot|>", "<|U|>", "<|A|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>"),
)
_LINES = (
    "The quick brown fox jumps over the lazy dog.", "Question: Where does Ana live?\nAnswer: Porto, Portugal.",
    "user assistant system model think Today Date: 26 Jul 2024 You are a helpful assistant.", "  two spaces\n\nlines\n",
    "Größe, naïve, 你好 мир, 1984 and 3.14", "<think>\nwell\n</think>\n\nyes", "[INST] [/INST] Where? Why? Who is it?",
)  # fmt: skip


def _same(content: str) -> str:
    return content


@dataclass(frozen=True)
class Template:
    """A chat template.

    Args:
        text: Jinja.
        eos: the tokenizer's end-of-sequence token.
        end: what closes a turn.
        answer: how the answer's content is rendered.
        opened: what the generation prompt opens and the finished turn has not.
        block: what the finished turn writes before an answer and the generation prompt has not.
        roles_refused: roles that it raises on.
    """

    text: str
    eos: str
    end: str
    answer: Callable[[str], str] = field(default=_same)
    opened: str = ""
    block: str = ""
    roles_refused: tuple[str, ...] = ()


_TURNS = "{% for m in messages %}"
_DONE = "{% endfor %}"


def _opening(text: str) -> str:
    return "{% if add_generation_prompt %}{{ '" + text + "' }}{% endif %}"


_CHATML = _TURNS + r"{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}" + _DONE
_QWEN3 = (
    _TURNS + r"{% if m.role == 'assistant' %}{% set thought = '' %}{% set said = m.content %}"
    r"{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    r"{% set said = said.split('</think>')[-1] %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    r"{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said.lstrip('\n') + '<|im_end|>\n' }}"
    r"{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}" + _DONE
)
_LLAMA = (
    r"{{ '<s><|head|>system<|/head|>\n\nToday Date: ' + date_string + '\n\n' }}"
    r"{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{{ '<|eot|>' }}" + _TURNS + r"{% if "
    r"m.role != 'system' %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + m.content | trim + '<|eot|>' }}{% endif %}"
    + _DONE
) + _opening(r"<|head|>assistant<|/head|>\n\n")

TEMPLATES: dict[str, Template] = {
    "chatml": Template(_CHATML + _opening(r"<|im_start|>assistant\n"), "<|im_end|>", "<|im_end|>\n"),
    "chatml, another eos": Template(_CHATML + _opening(r"<|im_start|>assistant\n"), "<eos>", "<|im_end|>\n"),
    "gemma": Template(
        "{{ '<s>' }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + _TURNS
        + r"{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
        r"{{ '<end_of_turn>\n' }}" + _DONE + _opening(r"<start_of_turn>model\n"),
        "<eos>", "<end_of_turn>\n", str.strip, roles_refused=("system",),
    ),
    "llama 3, a date of its own": Template(
        "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}" + _LLAMA,
        "<|eot|>", "<|eot|>", str.strip,
    ),
    "llama 3, the clock's date": Template(
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}" + _LLAMA,
        "<|eot|>", "<|eot|>", str.strip,
    ),
    "granite, the clock": Template(
        "{{ '<|im_start|>system\nToday is ' + strftime_now('%B %d, %Y') + '<|im_end|>\n' }}" + _CHATML
        + _opening(r"<|im_start|>assistant\n"),
        "<|im_end|>", "<|im_end|>\n",
    ),
    "r1": Template(
        "{{ '<s>' }}" + _TURNS + "{% if m.role == 'assistant' %}{{ '<|A|>' + m.content.split('</think>')[-1] + '<|end|>' }}"
        "{% elif m.role == 'user' %}{{ '<|U|>' + m.content }}{% else %}{{ m.content }}{% endif %}" + _DONE
        + _opening(r"<|A|><think>\n"),
        "<|end|>", "<|end|>", lambda content: content.split("</think>")[-1], opened="<think>\n",
    ),
    "qwen 3": Template(
        _QWEN3 + r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and "
        r"enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
        "<|im_end|>", "<|im_end|>\n", lambda content: content.lstrip("\n"), block="<think>\n\n</think>\n\n",
    ),
    "qwen 3, always thinking": Template(
        _QWEN3 + _opening(r"<|im_start|>assistant\n<think>\n"),
        "<|im_end|>", "<|im_end|>\n", lambda content: content.lstrip("\n"), block="\n</think>\n\n",
    ),
    "other tags of thought": Template(
        _TURNS + r"{{ '<|U|>' + m.content if m.role == 'user' else '<|A|>[THINK][/THINK]' + m.content + '<|end|>' }}"
        + _DONE + _opening("<|A|>"),
        "<|end|>", "<|end|>", block="[THINK][/THINK]",
    ),
    "a thought that is dropped": Template(
        _TURNS + r"{{ '<|U|>' + m.content if m.role == 'user' else '<|A|>\n' + m.content + '<|end|>\n' }}" + _DONE
        + _opening(r"<|A|>\n<think>\n\n</think>\n\n"),
        "<|end|>", "<|end|>\n", opened="<think>\n\n</think>\n\n",
    ),
    "channels": Template(
        _TURNS + r"{{ '<|start|>' + m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}{{ '<|message|>' }}"
        r"{{ m.content + '<|end|>' }}" + _DONE + _opening("<|start|>assistant"),
        "<|end|>", "<|end|>", block="<|channel|>final<|message|>",
    ),
    "a default system prompt": Template(
        r"{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
        r"{% endif %}" + _CHATML + _opening(r"<|im_start|>assistant\n"),
        "<|im_end|>", "<|im_end|>\n",
    ),
    "stripping, with spaces of its own": Template(
        _TURNS + "{% if m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' </s>' }}{% else %}"
        "{{ '<s>[INST] ' + m.content.strip() + ' [/INST]' }}{% endif %}" + _DONE,
        "</s>", " </s>", lambda content: " " + content.strip(),
    ),
    "lines, ended by eos": Template(
        _TURNS + r"{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}" + _DONE + _opening(r"<|assistant|>\n"),
        "</s>", "</s>\n",
    ),
    "nothing but the contents": Template(_TURNS + "{{ m.content }}" + _DONE, "</s>", ""),
}  # fmt: skip


def _trained(tokenizer: Tokenizer, trainer: trainers.BpeTrainer) -> Tokenizer:
    tokenizer.train_from_iterator(_LINES, trainer)
    return tokenizer


def _byte_level(split: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    parts = [plain] if split is None else [pre_tokenizers.Split(Regex(split), "isolated"), plain]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    return _trained(tokenizer, trainer)


def _sentencepiece_like() -> Tokenizer:
    """As Llama 2's: spaces are letters, one before every text, merges across words, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<eos>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=special, show_progress=False, max_token_length=12)
    tokenizer = _trained(tokenizer, trainer)
    return tokenizer


_LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def _base(name: str) -> PreTrainedTokenizerFast:
    kinds: dict[str, Callable[[], Tokenizer]] = {
        "bytes": _byte_level,
        "bytes, a bos": lambda: _byte_level(_LLAMA3),
        "sentencepiece-like": _sentencepiece_like,
        "bytes, no bos": _byte_level,
        "bytes, bos and eos": _byte_level,
    }
    inner = kinds[name]()
    bos = None if name == "bytes, no bos" else "<s>"
    if name in ("bytes, a bos", "sentencepiece-like", "bytes, bos and eos"):
        single = "<s> $A </s>" if name == "bytes, bos and eos" else "<s> $A"
        ids = [(token, inner.token_to_id(token)) for token in ("<s>", "</s>")]
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token="</s>", pad_token="<pad>")
    return fast


TOKENIZERS = ("bytes", "bytes, a bos", "sentencepiece-like", "bytes, no bos", "bytes, bos and eos")


@cache
def tokenizer_with(template: str | None, tokenizer: str = "bytes") -> PreTrainedTokenizerFast:
    """A tokenizer with a template of `TEMPLATES`, or none. That of "bytes, no bos" pads with its eos token."""
    fast = copy.deepcopy(_base(tokenizer))
    if template is not None:
        fast.chat_template = TEMPLATES[template].text
        fast.eos_token = TEMPLATES[template].eos
    if tokenizer == "bytes, no bos":
        fast.pad_token = fast.eos_token
    return fast


def messages(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Turns of user and assistant by turns, after a system turn where there is one."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
