"""Divergences over the whole vocabulary, from hidden states and LM heads, without the logits of all rows at once.

For P = softmax(z) the student and Q the teacher, D_f(P‖Q) = ∑_v q_v f(t_v), t = p/q, and with w_v = p_v f'(t_v)

    ∂D_f/∂z_v = w_v − p_v ∑_u w_u,

so that a row needs two numbers beside its normalisers. A distance without an f (`fdiv.divergences.distances`) has its
own few numbers a row. Rows are taken in blocks, as many as fit a budget of logits;
the gradient is made from the blocks again (with a frozen head: in the same pass), so nothing of size [N, V] is kept.
Values and gradients are those of `Divergence.exact` on the log-probabilities, the registry's overflow policy included.

`topk_divergence` compares the k most likely tokens of a teacher and one cell for all others. Joining cells never
raises an f-divergence, so it is a lower bound of the full one, and grows with k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdiv.divergences import DistanceSpec, Divergence, DivergenceSpec, get_distance
from fdiv.divergences.cells import Cells, log_sum_exp
from fdiv.divergences.distances import Distance, Gated, as_distance
from fdiv.divergences.saturation import as_float
from fdiv.errors import DataError
from fdiv.models.logprobs import causal_lm, evaluating, few_tokens, is_spread, with_position_ids

__all__ = [
    "Head",
    "TopK",
    "VocabularyScores",
    "check_head",
    "gathered_weights",
    "last_hidden_states",
    "logits_divergence",
    "model_head",
    "score_topk",
    "score_vocabulary",
    "top_tokens",
    "topk_divergence",
    "topk_vocabulary_divergence",
    "vocabulary_divergence",
]

#: Logits of one model in a block, on the processor and on an accelerator: 32 MiB and 256 MiB of float32.
_BLOCK, _BLOCK_ON_ACCELERATOR = 2**23, 2**26
#: Cells handled by one elementwise operation on the processor: its operands stay in the cache.
_TILE = 2**17
#: Whether torch multiplies half precision out into float32 on a GPU.
_WIDE_PRODUCTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
#: How far above 1 the mass of a teacher's top k may be, beside what rounding its log-probabilities does to it.
_MASS_ROUNDING = 1e-2


class Head(NamedTuple):
    """An LM head: logits z = softcap·tanh(scale·(W h + b)/softcap), without the tanh where there is no softcap.

    Attributes:
        weight: W `[V, H]`. bias: b `[V]` or None; −inf takes a token out of the vocabulary.
        scale: what the logits are multiplied by (Cohere, Granite). softcap: of Gemma, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def cut(self, tokens: int | None) -> Head:
        """The head of the first `tokens` tokens; None: all."""
        if tokens is None:
            return self
        return self._replace(weight=self.weight[:tokens], bias=None if self.bias is None else self.bias[:tokens])


class TopK(NamedTuple):
    """A teacher's most likely tokens: `log_probs[N, k]`, their `ids[N, k]` (−1: no token), `log_tail[N]` or None.

    `log_tail` is the log of the mass of all other tokens; None stands for log(1 − ∑ e^log_probs). Where that is below
    the rounding r of the type of `log_probs`, it is the student's own rest, at most r.
    """

    log_probs: Tensor
    ids: Tensor
    log_tail: Tensor | None = None


def vocabulary_divergence(
    hidden_p: Tensor,
    head_p: Tensor,
    hidden_q: Tensor,
    head_q: Tensor,
    divergence: DistanceSpec,
    *,
    temperature: float = 1.0,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    scale_p: float = 1.0,
    scale_q: float = 1.0,
    softcap_p: float | None = None,
    softcap_q: float | None = None,
) -> Tensor:
    """D_f(P‖Q) of each row, P = softmax(z_p/T) the student, Q = softmax(z_q/T) the teacher → `[N]` float32, nats.

    The gradient goes to `hidden_p`, `head_p` and `bias_p`; the teacher has none. There is no factor T². Half precision
    is multiplied out into float32; float64 stays. A token whose bias is −inf has no mass; where only one side has it,
    the row counts P·f'(∞) or Q·f(0⁺), which may be inf.

    Args:
        hidden_p: `[N, H]` last hidden states of the student. head_p: `[V, H]` its LM head.
        hidden_q: `[N, H']` those of the teacher. head_q: `[V, H']`.
        divergence: any spec of `fdiv.divergences.get_distance`: an f-divergence, `cauchy_schwarz`, `gated`.
        temperature: T, of both.
        bias_p, bias_q: `[V]` biases of the heads. scale_p, scale_q: what the logits are multiplied by.
        softcap_p, softcap_q: z → softcap·tanh(z/softcap), after the scale.

    Raises:
        ValueError: shapes that do not fit, in particular vocabularies of two sizes; a temperature or soft cap that is
            not above 0; a scale that is no number.
        RuntimeError: a gradient of it is differentiated again.
    """
    student = Head(head_p, bias_p, scale_p, softcap_p)
    teacher = Head(head_q, bias_q, scale_q, softcap_q)
    _check_pair(hidden_p, student, hidden_q, teacher, temperature)
    measure = _Whole(divergence, teacher, temperature)
    return _Function.apply(hidden_p, head_p, bias_p, student, temperature, measure, hidden_q, head_q, bias_q)


class VocabularyScores(NamedTuple):
    """What `score_vocabulary` gives of each row, `[N]`; only `divergence` carries a gradient.

    Attributes:
        divergence: D_f(P‖Q), or a distance without an f, nats.
        log_p, log_q: log-probability of the row's token under student and teacher, nats.
        entropy_p, entropy_q: entropy of both distributions, nats; None where a teacher does not say.
        gate: γ, the weight of the forward member of a `gated` divergence; None of others.
    """

    divergence: Tensor
    log_p: Tensor
    log_q: Tensor | None
    entropy_p: Tensor
    entropy_q: Tensor | None
    gate: Tensor | None = None


def score_vocabulary(
    hidden_p: Tensor,
    head_p: Head,
    hidden_q: Tensor,
    head_q: Head,
    token_ids: Tensor,
    divergence: DistanceSpec,
    *,
    temperature: float = 1.0,
    uniform: bool = False,
) -> VocabularyScores:
    """`vocabulary_divergence` of two heads, and in the same pass what a trainer logs of the rows' `token_ids[N]`.

    Args:
        uniform: the caller's loss is a multiple of the sum of the rows. Then the gradients are made in the first pass
            with a trained head too, which spares a fourth of the products; rows that weigh differently are an error
            in the backward pass.

    Errors as there; a token outside the vocabulary is a ValueError, too.
    """
    _check_pair(hidden_p, head_p, hidden_q, head_q, temperature)
    _check_tokens(token_ids, hidden_p, head_p)
    measure = _Whole(divergence, head_q, temperature, token_ids)
    measure.uniform = uniform and torch.is_grad_enabled()
    value = _Function.apply(
        hidden_p, head_p.weight, head_p.bias, head_p, temperature, measure, hidden_q, head_q.weight, head_q.bias
    )
    return VocabularyScores(value, *measure.scores(), measure.gate())


def logits_divergence(logits_p: Tensor, logits_q: Tensor, divergence: DistanceSpec) -> Tensor:
    """`vocabulary_divergence` of logits `[N, V]` that are there already → `[N]`: what it takes beyond them is their
    gradient and blocks of rows. The gradient goes to `logits_p`.

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits_p.dim() != 2 or logits_p.shape != logits_q.shape or logits_p.shape[1] == 0:
        raise ValueError(
            f"logits_p is {tuple(logits_p.shape)} and logits_q {tuple(logits_q.shape)}: both must be [rows, "
            "vocabulary], with a token at least"
        )
    if not logits_p.is_floating_point() or not logits_q.is_floating_point():
        raise ValueError(
            f"logits_p is {logits_p.dtype} and logits_q {logits_q.dtype}: they must be floating-point numbers"
        )
    return _FromLogits.apply(logits_p, logits_q, _Whole(divergence, Head(logits_p), 1.0))


def topk_vocabulary_divergence(
    hidden_p: Tensor,
    head_p: Tensor,
    teacher: tuple[Tensor, ...],
    divergence: DivergenceSpec,
    *,
    tail: bool = True,
    temperature: float = 1.0,
    bias_p: Tensor | None = None,
    scale_p: float = 1.0,
    softcap_p: float | None = None,
) -> Tensor:
    """`topk_divergence` of P = softmax(z_p/T) from the student's hidden states, block by block → `[N]`.

    Arguments and errors as in `vocabulary_divergence` and `topk_divergence`. The teacher's log-probabilities must have
    been taken at the same temperature.

    Args:
        hidden_p: `[N, d]` of the student, with gradient. head_p: `[V, d]`, its LM head.
        teacher: (log-probabilities, token ids), both `[N, k]`.
        divergence: any spec of `get_divergence`. tail: whether one cell holds all other tokens.
        temperature: T. bias_p: `[V]` or None. scale_p, softcap_p: what the student does to its logits.
    """
    student = Head(head_p, bias_p, scale_p, softcap_p)
    _check_head("p", hidden_p, student, temperature)
    top = _checked_top(teacher, hidden_p.shape[0], _rows_of(head_p), hidden_p.device)
    measure = _Top(_with_bound(divergence), tail)
    return _Function.apply(
        hidden_p, head_p, bias_p, student, temperature, measure, top.log_probs, top.ids, top.log_tail
    )


def score_topk(
    hidden_p: Tensor,
    head_p: Head,
    teacher: tuple[Tensor, ...],
    token_ids: Tensor,
    divergence: DivergenceSpec,
    *,
    temperature: float = 1.0,
    uniform: bool = False,
) -> VocabularyScores:
    """`topk_vocabulary_divergence` with its tail, and what `score_vocabulary` gives of the student.

    `log_q` and `entropy_q` are None: they are the teacher's to say. Arguments and errors as there.
    """
    _check_head("p", hidden_p, head_p, temperature)
    _check_tokens(token_ids, hidden_p, head_p)
    top = _checked_top(teacher, hidden_p.shape[0], _rows_of(head_p.weight), hidden_p.device)
    measure = _Top(_with_bound(divergence), True, token_ids)
    measure.uniform = uniform and torch.is_grad_enabled()
    value = _Function.apply(hidden_p, head_p.weight, head_p.bias, head_p, temperature, measure, *top)
    log_p, entropy_p = measure.scores()
    return VocabularyScores(value, log_p, None, entropy_p, None)


@torch.no_grad()
def top_tokens(
    hidden: Tensor, head: Head, k: int, token_ids: Tensor, *, temperature: float = 1.0
) -> tuple[TopK, Tensor, Tensor]:
    """The k most likely tokens of softmax(z/T) of each row, with the mass of all others, block by block.

    Args:
        hidden: `[N, H]` last hidden states. head: the LM head. k: tokens of each row.
        token_ids: `[N]`. temperature: T.

    Returns:
        The tokens, the most likely first (`log_tail` −inf where k is the vocabulary); log-probability of `token_ids`
        `[N]`; entropy `[N]` of the whole distribution. In float32 (float64 for float64), nats.

    Raises:
        ValueError: k below 1 or above the vocabulary; shapes that do not fit.
    """
    _check_head("q", hidden, head, temperature)
    _check_tokens(token_ids, hidden, head)
    vocabulary = _rows_of(head.weight)
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k={k}: must be at least 1 and at most {vocabulary}, the tokens of the teacher")
    parts: list[tuple[Tensor, ...]] = []
    with gathered_weights(head.weight, head.bias), torch.autocast(hidden.device.type, enabled=False):
        for rows in _blocks(len(hidden), vocabulary, hidden.device):
            log_q, _ = _log_softmax(hidden[rows], head, temperature)
            top = log_q.topk(k, dim=-1)
            token = log_q.gather(-1, token_ids[rows].unsqueeze(-1))[:, 0]
            entropy = _entropy(log_q, _has_holes(head.bias))
            tail = _log_rest(log_q.scatter_(-1, top.indices, -math.inf))
            parts.append((top.values, top.indices, tail, token, entropy))
    exact = torch.promote_types(hidden.dtype, torch.float32)
    if not parts:
        none = hidden.new_zeros(0, dtype=exact)
        return TopK(none.reshape(0, k), none.long().reshape(0, k), none), none, none
    values, ids, log_tail, log_probs, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
    return TopK(values, ids, log_tail), log_probs, entropies


def topk_divergence(
    log_p: Tensor, teacher: tuple[Tensor, ...], divergence: DivergenceSpec, *, tail: bool = True
) -> Tensor:
    """D_f(P‖Q) over the teacher's k most likely tokens and one cell for all others → `[N]`, nats.

    A lower bound of the divergence over the whole vocabulary for every f, exact where k is its size. With `tail=False`
    the sum runs over the k cells alone, not renormalised, and nothing holds the student's other mass.

    Args:
        log_p: `[N, V]` log-probabilities of the student; gradients flow to them. Half precision is raised to float32.
        teacher: (`log_probs[N, k]`, `ids[N, k]`), or with `log_tail[N]` as a third, the log of the teacher's other
            mass, where it is known better than as 1 − ∑. An id of −1 with log-probability −inf is no token: rows may
            have fewer than k.
        divergence: any spec of `fdiv.divergences.get_divergence`.
        tail: whether the cell of all other tokens counts.

    Raises:
        ValueError: k = 0 or above V, ids outside the vocabulary or twice in a row, NaN, log-probabilities of more
            mass than 1, or of less where they are those of all tokens.
    """
    if log_p.dim() != 2:
        raise ValueError(f"log_p is {tuple(log_p.shape)}: it must be [rows, vocabulary]")
    top = _checked_top(teacher, log_p.shape[0], log_p.shape[1], log_p.device)
    cells_p, cells_q = _top_cells(as_float(log_p, "log_p"), top, tail)
    return _with_bound(divergence).exact(cells_p, cells_q.to(cells_p.dtype))


def _with_bound(divergence: DivergenceSpec) -> Divergence:
    """The f-divergence of a spec.

    Raises:
        ValueError: also for a member without an f, whose value over joined cells bounds nothing.
    """
    member = get_distance(divergence)
    if isinstance(member, Distance):
        raise ValueError(
            f"{member.label} cannot be taken over a teacher's top k and one cell for the rest: it is no f-divergence, "
            "so that joining cells may raise it, and its value is no lower bound of the whole. Take a divergence with "
            "an f, or a teacher whose whole distribution is known"
        )
    return member


def model_head(model: Any) -> Head:
    """The LM head of a transformers model (plain, or under PEFT), with the scale and soft cap of its config.

    Raises:
        ValueError: the model has no output embeddings, or an adapter sits on them, which would be ignored.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer = model.get_output_embeddings()
    if layer is None or getattr(layer, "weight", None) is None:
        raise ValueError(f"{type(model).__name__} has no LM head to read: get_output_embeddings() gives {layer!r}")
    if hasattr(layer, "base_layer"):
        raise ValueError(
            "an adapter sits on the LM head, whose weight is read directly, so the adapter would be ignored: take "
            "`lm_head` out of `target_modules`"
        )
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), _logit_scale(config), softcap)


def last_hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor, keep: int | None = None) -> Tensor:
    """The hidden states `[B, keep, H]` that the LM head of `model` reads to predict the last `keep` tokens.

    Positions count the unmasked tokens, so padding may stand on either side. A PEFT model's adapter applies.

    Args:
        model: a causal language model, plain or under PEFT (no wrapper of DDP or DeepSpeed).
        keep: tokens predicted, at the end; None: all but the first.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = with_position_ids(model, {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False})
    hidden = model.base_model(**inputs).last_hidden_state[:, :-1]
    return hidden if keep is None else hidden[:, hidden.shape[1] - keep :]


@torch.no_grad()
def check_head(model: Any) -> None:
    """Refuse a model whose logits are not its LM head times its last hidden states, on a few tokens.

    Not checked where a forward cannot be run here (ZeRO-3, FSDP, weights without values).

    Raises:
        DataError: the logits differ, with by how much.
    """
    base = causal_lm(model)
    if is_spread(base):
        return
    inputs = few_tokens(base)
    with evaluating(base):
        logits = base(**inputs).logits[:, :-1].float()
        hidden = last_hidden_states(base, inputs["input_ids"], inputs["attention_mask"]).flatten(0, 1)
        ours, _ = _log_softmax(hidden, model_head(base), 1.0)
    difference = (ours - logits.log_softmax(-1).flatten(0, 1)).abs().max().item()
    if not difference <= 1e-3 + 16 * torch.finfo(hidden.dtype).eps * logits.abs().max().clamp(min=1).item():
        raise DataError(
            f"the logits of {type(base).__name__} are not its LM head times its last hidden states (off by "
            f"{difference:.2g} nats), so its divergence cannot be computed in blocks: take another model"
        )


def _logit_scale(config: Any) -> float:
    """What a config multiplies the logits by, under the names that models give it; 1 where it has none."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


# ---------------------------------------------------------------- blocks of rows
def _rows_of(weight: Tensor) -> int:
    """The vocabulary of a head, sharded by ZeRO-3 or not."""
    return (getattr(weight, "ds_shape", None) or weight.shape)[0]


def _check_head(side: str, hidden: Tensor, head: Head, temperature: float) -> None:
    shape = tuple(getattr(head.weight, "ds_shape", None) or head.weight.shape)
    if hidden.dim() != 2 or len(shape) != 2 or hidden.shape[1] != shape[1] or shape[0] == 0:
        raise ValueError(
            f"hidden_{side} is {tuple(hidden.shape)} and head_{side} {shape}: they must be [rows, width] and "
            "[vocabulary, width], with a token at least"
        )
    if not hidden.is_floating_point() or not head.weight.is_floating_point():
        raise ValueError(f"hidden_{side} and head_{side} must hold floating-point numbers")
    bias = None if head.bias is None else tuple(getattr(head.bias, "ds_shape", None) or head.bias.shape)
    if bias is not None and bias != shape[:1]:
        raise ValueError(f"bias_{side} is {bias}: it must be [vocabulary], here {shape[:1]}")
    for name, value in (("temperature", temperature), (f"softcap_{side}", head.softcap)):
        if value is not None and not (_is_number(value) and value > 0):
            raise ValueError(f"{name}={value!r}: must be a number above 0")
    if not _is_number(head.scale):
        raise ValueError(f"scale_{side}={head.scale!r}: must be a finite number, what the logits are multiplied by")


def _is_number(value: Any) -> bool:
    """A finite number, also as a tensor of one element or numpy's; no bool."""
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError):
        return False


def _check_tokens(token_ids: Tensor, hidden: Tensor, head: Head) -> None:
    size = _rows_of(head.weight)
    if token_ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_ids is {tuple(token_ids.shape)}: it must be one of {size} tokens for each of {len(hidden)} rows"
        )
    _refuse_rows((token_ids < 0) | (token_ids >= size), f"token_ids must be one of {size} tokens")


def _check_pair(hidden_p: Tensor, student: Head, hidden_q: Tensor, teacher: Head, temperature: float) -> None:
    _check_head("p", hidden_p, student, temperature)
    _check_head("q", hidden_q, teacher, temperature)
    if hidden_p.shape[0] != hidden_q.shape[0]:
        raise ValueError(f"hidden_p has {hidden_p.shape[0]} rows and hidden_q {hidden_q.shape[0]}: they are compared")
    sizes = _rows_of(student.weight), _rows_of(teacher.weight)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"head_p has {sizes[0]} tokens and head_q {sizes[1]}: a divergence compares the same tokens. Where one "
            "tokenizer was padded to two widths, cut both heads to the shorter one (head[:V])"
        )


def gathered_weights(*weights: Tensor | None) -> AbstractContextManager:
    """Under ZeRO-3 the weights are whole inside the block; elsewhere nothing happens."""
    sharded = [weight for weight in weights if hasattr(weight, "ds_status")]
    if not sharded:
        return nullcontext()
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*sharded)  # type: ignore[arg-type]


def _blocks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    budget = _BLOCK if device.type == "cpu" else _BLOCK_ON_ACCELERATOR
    step = max(1, budget // max(1, vocabulary))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _tiles(block: Tensor) -> Iterator[slice]:
    """Columns of a block to handle at once: all of them on an accelerator."""
    width = block.shape[1] if block.device.type != "cpu" else max(256, _TILE // max(1, block.shape[0]))
    return (slice(start, start + width) for start in range(0, block.shape[1], width))


def _log_softmax(hidden: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax of the logits of a block of rows `[n, V]`, and log Z `[n]`, in float32 or float64."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    scale = head.scale / (temperature if head.softcap is None else head.softcap)
    if hidden.dtype == exact:
        block = _multiply(hidden * scale, head.weight, exact)
    else:  # half precision would round the scaled states
        block = _multiply(hidden, head.weight, exact).mul_(scale)
    if head.bias is not None:
        block += head.bias.to(exact) * scale
    if head.softcap is not None:
        banned = torch.isneginf(head.bias) if head.bias is not None else None
        block.tanh_().mul_(head.softcap / temperature)
        if banned is not None:
            block.masked_fill_(banned, -math.inf)
    log_z = _normalise_(block)
    return block, log_z


def _normalise_(block: Tensor) -> Tensor:
    """Put log softmax in place of the logits of every row; log ∑ e^z `[n]`.

    The largest logit is taken off first: log Z of logits of 1e4 has no digits left for a difference of 1e-3.
    """
    top = block.amax(-1, keepdim=True)
    total = torch.zeros_like(top)
    for tile in _tiles(block):
        total += block[:, tile].sub_(top).exp().sum(-1, keepdim=True)
    log_total = total.log_()
    block.sub_(log_total)
    return (top + log_total).squeeze(-1)


def _log_rest(block: Tensor) -> Tensor:
    """log ∑ e^x of every row `[n]` of log-masses of which some are −inf; −inf where all are."""
    top = block.amax(-1, keepdim=True)
    empty = torch.isneginf(top)
    top.masked_fill_(empty, 0.0)
    total = torch.zeros_like(top)
    for tile in _tiles(block):
        total += (block[:, tile] - top).exp_().sum(-1, keepdim=True)
    return (top + total.log_()).squeeze(-1)


def _entropy(log_p: Tensor, holes: bool = False) -> Tensor:
    """−∑ p log p of every row `[n]`; with holes −inf counts 0."""
    entropy = log_p.new_zeros(len(log_p))
    for tile in _tiles(log_p):
        terms = log_p[:, tile].exp().mul_(log_p[:, tile])
        entropy -= (terms.nan_to_num_(0.0) if holes else terms).sum(-1)
    return entropy


def _multiply(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """hidden `[n, H]` times weightᵀ, `[V, H]` → `[n, V]` in `dtype`: products of half precision are not rounded."""
    if hidden.dtype == weight.dtype == dtype:
        return hidden @ weight.t()
    if _WIDE_PRODUCTS and hidden.device.type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(hidden.to(weight.dtype), weight.t(), out_dtype=torch.float32)
    block = torch.empty(hidden.shape[0], weight.shape[0], dtype=dtype, device=hidden.device)
    hidden, step = hidden.to(dtype), max(1, _BLOCK // (2 * weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        block[:, start : start + step] = hidden @ weight[start : start + step].to(dtype).t()
    return block


def _multiply_back(block: Tensor, weight: Tensor) -> Tensor:
    """block `[n, V]` times weight `[V, H]` → `[n, H]` in the type of `block`."""
    if block.dtype == weight.dtype:
        return block @ weight
    result, step = block.new_zeros(block.shape[0], weight.shape[1]), max(1, _BLOCK // (2 * weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        result.addmm_(block[:, start : start + step], weight[start : start + step].to(block.dtype))
    return result


# ---------------------------------------------------------------- what is summed over cells
class _Whole:
    """A divergence over all tokens: its value, the numbers per row that its gradient needs, and the gradient; with
    `token_ids`, scores of these too."""

    uniform = False

    def __init__(
        self, divergence: DistanceSpec, head: Head, temperature: float, token_ids: Tensor | None = None
    ) -> None:
        self.distance = as_distance(get_distance(divergence))
        self.numbers = self.distance.numbers
        self.head, self.temperature = head, temperature
        self.token_ids, self.holes = token_ids, False
        self._scores: list[Tensor] = []
        self._gates: list[Tensor] = []
        self._rows = slice(0)

    def scores(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log P and log Q of the tokens and both entropies, of the rows seen so far."""
        if not self._scores:
            none = torch.zeros(0)
            return none, none, none, none
        log_p, log_q, entropy_p, entropy_q = torch.cat(self._scores, dim=1)
        return log_p, log_q, entropy_p, entropy_q

    def gate(self) -> Tensor | None:
        """γ of the rows seen so far, of a gated divergence."""
        if not isinstance(self.distance, Gated):
            return None
        return torch.cat(self._gates) if self._gates else torch.zeros(0)

    def _note(self, log_p: Tensor, log_q: Tensor) -> None:
        if self.token_ids is None:
            return
        ids = self.token_ids[self._rows].unsqueeze(-1)
        entropies = [_entropy(logs, self.holes) for logs in (log_p, log_q)]
        self._scores.append(torch.stack([log_p.gather(1, ids)[:, 0], log_q.gather(1, ids)[:, 0], *entropies]))

    def weights(self, teacher: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return teacher[1:]

    def rows(self, teacher: tuple[Tensor | None, ...], rows: slice) -> Tensor:
        hidden, weight, bias = teacher
        assert hidden is not None and weight is not None
        head = self.head._replace(weight=weight, bias=bias)
        self.holes, self._rows = self.holes or _has_holes(bias), rows
        return _log_softmax(hidden[rows], head, self.temperature)[0]

    def sums(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """D `[n]` and the numbers `[n, numbers]` of a block."""
        self._note(log_p, log_q)
        value, numbers = self.distance.rows(log_p, log_q, list(_tiles(log_p)), self.holes)
        if isinstance(self.distance, Gated):
            self._gates.append(numbers[:, 0])
        return value, numbers

    def gradient_(self, log_p: Tensor, log_q: Tensor, numbers: Tensor) -> None:
        """Put ∂D/∂z in place of `log_p`."""
        for tile in _tiles(log_p):
            columns = log_p[:, tile]
            columns.copy_(self.distance.slopes(Cells(columns, log_q[:, tile]), numbers, self.holes))


class _Top:
    """D_f over k tokens and the rest: per row D, ∑w, and w of each cell; with `token_ids`, scores of these too."""

    uniform = False
    numbers = 1

    def __init__(self, divergence: Divergence, tail: bool, token_ids: Tensor | None = None) -> None:
        self.divergence, self.tail, self.token_ids = divergence, tail, token_ids
        self.holes = True
        self._scores: list[Tensor] = []
        self._rows = slice(0)
        self._cells: tuple[Tensor, Tensor, Tensor] | None = None

    def scores(self) -> tuple[Tensor, Tensor]:
        """log P of the tokens and the student's entropy, of the rows seen so far."""
        log_p, entropy = torch.cat(self._scores, dim=1) if self._scores else torch.zeros(2, 0)
        return log_p, entropy

    def weights(self, teacher: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return ()

    def rows(self, teacher: tuple[Tensor | None, ...], rows: slice) -> TopK:
        log_probs, ids, log_tail = teacher
        assert log_probs is not None and ids is not None
        self._rows, self._cells = rows, None
        return TopK(log_probs[rows], ids[rows], None if log_tail is None else log_tail[rows])

    def sums(self, log_p: Tensor, top: TopK) -> tuple[Tensor, Tensor]:
        if self.token_ids is not None:
            ids = self.token_ids[self._rows].unsqueeze(-1)
            holes = bool(torch.isneginf(log_p.amin()))
            self._scores.append(torch.stack([log_p.gather(1, ids)[:, 0], _entropy(log_p, holes)]))
        cells_p, cells_q, weight = self._weighed(log_p, top)
        return self.divergence.exact(cells_p, cells_q), weight.sum(-1, keepdim=True)

    def gradient_(self, log_p: Tensor, top: TopK, numbers: Tensor) -> None:
        """w_c − p_c·A at the k tokens; elsewhere the last cell's w − p·A, shared out by p."""
        total = numbers[:, 0]
        cells_p, _, weight = self._weighed(log_p, top)
        k = top.ids.shape[1]
        at_top = weight[:, :k] - cells_p[:, :k].exp() * total.unsqueeze(-1)
        shift, factor = torch.zeros_like(total), -total
        if self.tail:
            rest = cells_p[:, -1]
            empty = torch.isneginf(rest)
            shift = rest.masked_fill(empty, 0.0)
            factor = (weight[:, -1] - rest.exp() * total).masked_fill(empty, 0.0)
        for tile in _tiles(log_p):
            log_p[:, tile].sub_(shift.unsqueeze(-1)).exp_().mul_(factor.unsqueeze(-1))
        _put_(log_p, top.ids, at_top)

    def _weighed(self, log_p: Tensor, top: TopK) -> tuple[Tensor, Tensor, Tensor]:
        """The cells of student and teacher and their w; of the block at hand, made once."""
        if self._cells is None:
            cells_p, cells_q = _top_cells_(log_p, top, self.tail)
            cells_q = cells_q.to(cells_p.dtype)
            self._cells = cells_p, cells_q, self.divergence.mass_derivative(cells_p, cells_q)
        return self._cells


def _has_holes(bias: Tensor | None) -> bool:
    return bias is not None and bool(torch.isneginf(bias).any())


def _top_cells(log_p: Tensor, top: TopK, tail: bool) -> tuple[Tensor, Tensor]:
    """log-masses `[N, k (+1)]` of the student and of the teacher; −inf where there is no token."""
    absent = top.ids < 0
    cells_p = log_p.gather(-1, top.ids.masked_fill(absent, 0)).masked_fill(absent, -math.inf)
    if not tail:
        return cells_p, top.log_probs.masked_fill(absent, -math.inf)
    # The student's rest as a sum: 1 − ∑ would lose its digits where the top k hold nearly everything.
    chosen = torch.zeros_like(log_p, dtype=torch.bool)
    _put_(chosen, top.ids, torch.ones_like(absent))
    rest_p = log_sum_exp(log_p.masked_fill(chosen, -math.inf))
    return torch.cat([cells_p, rest_p.unsqueeze(-1)], -1), _teacher_cells(top, log_p.shape[-1], rest_p.detach())


def _top_cells_(log_p: Tensor, top: TopK, tail: bool) -> tuple[Tensor, Tensor]:
    """`_top_cells` without a gradient and without copies: `log_p` is written to and restored."""
    absent = top.ids < 0
    at_top = log_p.gather(-1, top.ids.masked_fill(absent, 0))
    cells_p = at_top.masked_fill(absent, -math.inf)
    if not tail:
        return cells_p, top.log_probs.masked_fill(absent, -math.inf)
    _put_(log_p, top.ids, torch.full_like(at_top, -math.inf))
    rest_p = _log_rest(log_p)
    _put_(log_p, top.ids, at_top)
    return torch.cat([cells_p, rest_p.unsqueeze(-1)], -1), _teacher_cells(top, log_p.shape[-1], rest_p)


def _put_(block: Tensor, ids: Tensor, values: Tensor) -> None:
    """block[n, ids[n, c]] = values[n, c], for ids that are tokens."""
    if bool((ids >= 0).all()):
        block.scatter_(-1, ids, values)
        return
    present = ids >= 0
    rows = torch.arange(len(block), device=block.device).unsqueeze(-1).expand_as(ids)
    block[rows[present], ids[present]] = values[present]


def _teacher_cells(top: TopK, vocabulary: int, rest_p: Tensor) -> Tensor:
    """log-masses `[N, k + 1]` of the teacher, the last that of all other tokens; `rest_p[N]` is the student's."""
    absent = top.ids < 0
    cells = top.log_probs.masked_fill(absent, -math.inf)
    rest = top.log_tail
    if rest is None:
        # Below the rounding of the log-probs nothing is known of the rest. Of what it may be, the student's own is
        # taken, or what comes nearest: any other would make some f larger than it is over the whole vocabulary.
        least = torch.finfo(cells.dtype).eps
        rest = 1.0 - cells.double().exp().sum(-1)
        unknown, rest = rest <= least, rest.clamp(min=least).log()
        rest = torch.where(unknown, torch.minimum(rest, rest_p.double()), rest)
        rest = rest.masked_fill((~absent).sum(-1) == vocabulary, -math.inf)
    exact = torch.promote_types(cells.dtype, torch.float32)
    return torch.cat([cells.to(exact), rest.unsqueeze(-1).to(exact)], -1)


def _checked_top(teacher: tuple[Tensor, ...], rows: int, vocabulary: int, device: torch.device) -> TopK:
    """The teacher's cells on `device`, or ValueError for what no teacher can have said."""
    if len(teacher) not in (2, 3):
        raise ValueError(f"the teacher is (log_probs[N, k], ids[N, k]) or with log_tail[N]; got {len(teacher)} parts")
    top = TopK(*(part.to(device) if part is not None else None for part in teacher))
    log_probs, ids = top.log_probs.detach(), top.ids
    if log_probs.dim() != 2 or log_probs.shape != ids.shape or log_probs.shape[0] != rows:
        raise ValueError(
            f"the teacher's log_probs are {tuple(log_probs.shape)} and its ids {tuple(ids.shape)}: both must be "
            f"[{rows}, k]"
        )
    k = ids.shape[1]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"the teacher gives k={k} tokens a row: it must be at least 1 and at most {vocabulary}")
    if not log_probs.is_floating_point() or ids.is_floating_point():
        raise ValueError(
            f"the teacher's log_probs are {log_probs.dtype} and its ids {ids.dtype}: they must be floating-point and "
            "whole numbers"
        )
    if top.log_tail is not None and top.log_tail.shape != (rows,):
        raise ValueError(f"the teacher's log_tail is {tuple(top.log_tail.shape)}: it must be [{rows}]")
    _refuse_rows(torch.isnan(log_probs).any(-1), "the teacher's log_probs hold NaN")
    if top.log_tail is not None:
        _refuse_rows(torch.isnan(top.log_tail), "the teacher's log_tail is NaN")
    _refuse_rows(((ids < -1) | (ids >= vocabulary)).any(-1), f"the teacher's ids leave the {vocabulary} tokens")
    ordered = ids.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    _refuse_rows(twice.any(-1), "the teacher names a token twice")
    _check_mass(log_probs, ids, top.log_tail, vocabulary)
    return top._replace(log_probs=log_probs, ids=ids.long())


def _check_mass(log_probs: Tensor, ids: Tensor, log_tail: Tensor | None, vocabulary: int) -> None:
    """Refuse rows with more mass than 1, and of the whole vocabulary those with less."""
    logs = log_probs.masked_fill(ids < 0, -math.inf).double()
    mass = logs.exp().sum(-1)
    allowed = _MASS_ROUNDING + torch.finfo(log_probs.dtype).eps * _entropy(logs, holes=True)
    _refuse_rows(mass > 1 + allowed, "the teacher's top tokens have more mass than 1: are these log-probs?")
    if log_tail is not None:
        mass = mass + log_tail.detach().double().exp()
        _refuse_rows(mass > 1 + allowed, "the teacher's top tokens and log_tail have more mass than 1: are both logs?")
    whole = (ids >= 0).sum(-1) == vocabulary
    _refuse_rows(
        whole & (mass < 1 - allowed),
        f"the teacher gives all {vocabulary} tokens, and they have less mass than 1: are these log-probs?",
    )


def _refuse_rows(wrong: Tensor, what: str) -> None:
    if bool(wrong.any()):
        raise ValueError(f"{what} (row {int(wrong.nonzero()[0])}; {int(wrong.sum())} of {len(wrong)} rows)")


# ---------------------------------------------------------------- the function
class _Refusal(torch.autograd.Function):
    """Gradients as they are, which cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in tensors[inputs:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the gradient of a divergence over the vocabulary has no second derivative, for it is made from blocks of "
            "logits: take `get_distance(…).exact` on the log-probabilities, which has all of them"
        )


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A `backward` whose gradients refuse to be differentiated again.

    torch's `once_differentiable` refuses only where the incoming gradient is itself differentiated. Elsewhere its
    gradients are constants, and a penalty on them would have no effect.
    """

    @wraps(backward)
    def refusing(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, upstream)
        if not torch.is_grad_enabled():
            return found
        # What the gradients would depend on, as far as it was kept, and one tensor that is always there.
        inputs = [part for part in ctx.saved_tensors if part is not None and part.requires_grad]
        inputs.append(torch.zeros((), requires_grad=True))
        refused = iter(_Refusal.apply(len(inputs), *inputs, *(part for part in found if part is not None)))
        return tuple(None if part is None else next(refused) for part in found)

    return refusing


class _Function(torch.autograd.Function):
    """Row values of a measure, and its gradient from the blocks again, or at once where the head is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        temperature: float,
        measure: Any,
        *teacher: Tensor | None,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:3]
        at_once = any(needed) and (measure.uniform or not any(needed[1:]))
        device = hidden.device
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        values, log_z = (torch.zeros(len(hidden), dtype=dtype, device=device) for _ in range(2))
        numbers = torch.zeros(len(hidden), measure.numbers, dtype=dtype, device=device)
        gradients = _Gradients((hidden, weight, bias), needed if at_once else (False,) * 3, dtype)
        with gathered_weights(weight, bias, *measure.weights(teacher)), torch.autocast(device.type, enabled=False):
            head = head._replace(weight=weight, bias=bias)
            if isinstance(measure, _Whole):
                measure.holes = _has_holes(bias)
            for rows in _blocks(len(hidden), weight.shape[0], device):
                log_q = measure.rows(teacher, rows)
                log_p, log_z[rows] = _log_softmax(hidden[rows], head, temperature)
                values[rows], numbers[rows] = measure.sums(log_p, log_q)
                if at_once:
                    _gradient_to_logits_(log_p, log_z[rows], head, temperature, measure, log_q, numbers[rows])
                    gradients.add(log_p.mul_(head.scale / temperature), rows, hidden, weight)
        ctx.measure, ctx.head, ctx.temperature = measure, head._replace(weight=hidden, bias=None), temperature
        ctx.at_once, ctx.dtypes = at_once, [None if part is None else part.dtype for part in (hidden, weight, bias)]
        if at_once:
            ctx.save_for_backward(*gradients.parts)
        else:
            ctx.save_for_backward(hidden, weight, bias, numbers, log_z, *teacher)
        return values

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rest = (None,) * (len(ctx.needs_input_grad) - 3)
        if ctx.at_once:
            parts = _scaled(ctx.saved_tensors, upstream, ctx.measure.uniform)
            return (*(None if g is None else g.to(kind) for g, kind in zip(parts, ctx.dtypes, strict=True)), *rest)
        hidden, weight, bias, numbers, log_z, *teacher = ctx.saved_tensors
        measure, temperature, scale = ctx.measure, ctx.temperature, ctx.head.scale / ctx.temperature
        whole = gathered_weights(weight, bias, *measure.weights(tuple(teacher)))
        with whole, torch.autocast(hidden.device.type, enabled=False):
            head = ctx.head._replace(weight=weight, bias=bias)
            gradients = _Gradients((hidden, weight, bias), ctx.needs_input_grad[:3], numbers.dtype)
            for rows in _blocks(len(hidden), weight.shape[0], hidden.device):
                block, _ = _log_softmax(hidden[rows], head, temperature)
                log_q = measure.rows(teacher, rows)
                _gradient_to_logits_(block, log_z[rows], head, temperature, measure, log_q, numbers[rows])
                gradients.add(block.mul_((upstream[rows] * scale).unsqueeze(-1)), rows, hidden, weight)
        found = zip(gradients.parts, ctx.dtypes, strict=True)
        return (*(None if g is None else g.to(kind) for g, kind in found), *rest)


class _Gradients:
    """Gradients to hidden states, head and bias, added up over blocks of rows; None where none is needed."""

    def __init__(self, parts: tuple[Tensor | None, ...], needed: tuple[bool, ...], dtype: torch.dtype) -> None:
        self.parts = [
            torch.zeros(getattr(part, "ds_shape", None) or part.shape, dtype=dtype, device=part.device)
            if part is not None and wanted
            else None
            for part, wanted in zip(parts, needed, strict=True)
        ]

    def add(self, block: Tensor, rows: slice, hidden: Tensor, weight: Tensor) -> None:
        """The part of `rows`, from `block`, their gradient at hidden · weightᵀ."""
        to_hidden, to_weight, to_bias = self.parts
        if to_hidden is not None:
            to_hidden[rows] = _multiply_back(block, weight)
        if to_weight is not None:
            to_weight.addmm_(block.t(), hidden[rows].to(block.dtype))
        if to_bias is not None:
            to_bias += block.sum(0)


def _scaled(parts: tuple[Tensor | None, ...], upstream: Tensor, uniform: bool) -> list[Tensor | None]:
    """Gradients of the sum of the rows times what the rows weigh: of hidden states alone, one weight a row."""
    to_hidden, *to_head = parts
    if uniform and len(upstream) and bool((upstream != upstream[0]).any()):
        raise ValueError("uniform=True was promised, and the rows do not weigh the same in the loss: leave it out")
    one = upstream[:1].sum()
    return [
        None if to_hidden is None else to_hidden * upstream.unsqueeze(-1),
        *(None if part is None else part * one for part in to_head),
    ]


def _gradient_to_logits_(
    log_p: Tensor, log_z: Tensor, head: Head, temperature: float, measure: Any, log_q: Any, numbers: Tensor
) -> None:
    """Put the gradient at T·z before the soft cap in place of `log_p`."""
    squash = None
    if head.softcap is not None:  # z = softcap/T·tanh(u), so dz/du ∝ 1 − tanh², read from log p + log Z = z
        squash = ((log_p + log_z.unsqueeze(-1)) * (temperature / head.softcap)).square_().neg_().add_(1.0)
        squash.masked_fill_(torch.isneginf(squash), 0.0)
    measure.gradient_(log_p, log_q, numbers)
    if squash is not None:
        log_p.mul_(squash)


class _FromLogits(torch.autograd.Function):
    """`_Function` where the logits exist: no projection, and the gradient is theirs."""

    @staticmethod
    def forward(ctx: Any, logits_p: Tensor, logits_q: Tensor, measure: _Whole) -> Tensor:
        dtype = torch.promote_types(logits_p.dtype, torch.float32)
        values = torch.zeros(len(logits_p), dtype=dtype, device=logits_p.device)
        numbers = torch.zeros(len(logits_p), measure.numbers, dtype=dtype, device=logits_p.device)
        measure.holes = bool(torch.isneginf(logits_p).any() | torch.isneginf(logits_q).any())
        for rows in _blocks(logits_p.shape[0], logits_p.shape[1], logits_p.device):
            values[rows], numbers[rows] = measure.sums(*_log_probs(rows, dtype, logits_p, logits_q))
        ctx.measure, ctx.dtype = measure, dtype
        ctx.save_for_backward(logits_p, logits_q, numbers)
        return values

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits_p, logits_q, numbers = ctx.saved_tensors
        gradient = torch.empty_like(logits_p)
        for rows in _blocks(logits_p.shape[0], logits_p.shape[1], logits_p.device):
            log_p, log_q = _log_probs(rows, ctx.dtype, logits_p, logits_q)
            ctx.measure.gradient_(log_p, log_q, numbers[rows])
            gradient[rows] = log_p.mul_(upstream[rows].unsqueeze(-1)).to(gradient.dtype)
        return gradient, None, None


def _log_probs(rows: slice, dtype: torch.dtype, *logits: Tensor) -> list[Tensor]:
    """log softmax of some rows of each, in copies."""
    blocks = [part[rows].to(dtype, copy=True) for part in logits]
    for block in blocks:
        _normalise_(block)
    return blocks
