"""Log-probabilities of given tokens: the one place that computes them outside TRL's own trainers.

Two paths with the same values (to 1e-5, in value and gradient):

* *fused*: TRL's LM head (`trl.trainer.add_fused_lm_head`), which never materialises the `(B, T, V)` logits. Everything
  private that we rely on in it (the `fused_lm_head` argument, the name of the patched forward) stands in this file.
* *plain torch*: the model's own logits, reduced chunk by chunk. It keeps float64, and works on any causal model.

`check_fused_head` compares the two on a few tokens, once per run, and puts the plain path in place of a fused head
that fails or gives other values (heads with a soft cap or layers that TRL's does not know).

Everywhere, `log_probs[b, t]` scores `input_ids[b, t + 1]` given the tokens before it, so the second dimension is T−1,
and every per-token value is exactly 0 outside `completion_mask[:, 1:]`.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fdiv.models.label_positions import score_labels_only
from fdiv.models.loading import check_fits, context_length, keep_trainable_layout

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "OUTPUTS",
    "FusedHead",
    "TokenScores",
    "aux_loss_fault",
    "check_fused_head",
    "enable_fused_head",
    "fused_head",
    "mean_log_prob",
    "sequence_log_prob",
    "takes_position_ids",
    "token_scores",
    "with_position_ids",
]

OUTPUTS = ("log_probs", "entropy", "is_top1", "log_sum_sq_probs", "mean_logits")
"""The per-token values that can be asked for. Only `log_probs` and `entropy` carry a gradient."""

_CHUNK_LOGITS = 2**24  # float32 logits handled at once by the plain path: 64 MiB


class FusedHead(NamedTuple):
    """How a model was patched: the per-token outputs it computes and the temperature baked into it."""

    outputs: tuple[str, ...]
    temperature: float


class TokenScores(NamedTuple):
    """Per-token scores of a batch; every tensor is `[B, T-1]`, and 0 where `mask` is 0.

    Attributes:
        log_probs: log π(token | tokens before), nats.
        mask: bool, the scored positions: `completion_mask[:, 1:]`.
        entropy: entropy of the next-token distribution over the whole vocabulary, nats. None unless asked for.
        is_top1: bool, whether the token is the most likely one. None unless asked for.
        log_sum_sq_probs: log Σ_v p_v². None unless asked for.
        mean_logits: mean logit over the vocabulary (logits divided by the temperature). None unless asked for.
    """

    log_probs: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None


def _check_outputs(outputs: Sequence[str]) -> tuple[str, ...]:
    unknown = sorted(set(outputs) - set(OUTPUTS))
    if unknown:
        raise ValueError(f"unknown per-token outputs {unknown}: choose among {list(OUTPUTS)}")
    return ("log_probs", *(name for name in OUTPUTS[1:] if name in outputs))


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model under DDP/DeepSpeed wrappers and PEFT."""
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def fused_head(model: nn.Module) -> FusedHead | None:
    """How the fused head of `model` (possibly wrapped by PEFT or DDP) was set up; None when there is none.

    A model patched by a TRL trainer is recognised too.
    """
    forward = causal_lm(model).forward
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        if getattr(getattr(function, "__code__", None), "co_name", None) == "_fused_forward":
            settings = inspect.getclosurevars(function).nonlocals
            return FusedHead(_check_outputs(settings["outputs"]), float(settings["temperature"]))
        forward = getattr(function, "__wrapped__", None)  # accelerate wraps forward again (autocast, float32 outputs)
    return None


def enable_fused_head(model: nn.Module, outputs: Sequence[str] = ("log_probs",), temperature: float = 1.0) -> None:
    """Patch `model` in place so that `token_scores` takes the fused path. Calling it again changes nothing.

    Generation and ordinary forwards are unaffected. A `PeftModel` is patched at its base model, so the adapter is
    applied, or not, as usual.

    Args:
        model: a causal language model, or a `PeftModel` around one.
        outputs: the per-token values of `OUTPUTS` the head shall be able to give; each costs a little on every call.
        temperature: the logits are divided by it.

    The head is compared with the plain path and left where they differ; see `check_fused_head`.

    Raises:
        ValueError: an unknown output; `temperature` ≤ 0; the model is already patched at another temperature; an
            adapter sits on the LM head, which the fused path would ignore.
    """
    from trl.trainer.utils import add_fused_lm_head

    outputs = _check_outputs(outputs)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    present = fused_head(model)
    if present is not None:
        if present.temperature != temperature:
            raise ValueError(
                f"the model's fused LM head was set up at temperature {present.temperature}, not {temperature}, and "
                "that is baked in: load the model a second time for the other temperature"
            )
        if set(outputs) <= set(present.outputs):
            return
        outputs = _check_outputs({*outputs, *present.outputs})
    base = causal_lm(model)
    if hasattr(base.get_output_embeddings(), "base_layer"):
        raise ValueError(
            "an adapter sits on the LM head, whose weight the fused head multiplies by directly, so the adapter would "
            "be ignored: take `lm_head` out of `target_modules`"
        )
    add_fused_lm_head(base, temperature=temperature, outputs=outputs)
    check_fused_head(base)


_CHECKED: dict[tuple[type, type, str], str | None] = {}  # model class, head class, config: why the fused head is left


def check_fused_head(model: nn.Module) -> str | None:
    """Compare the fused head of `model` with the model's own logits on a few tokens; leave it where they differ.

    A head that fails, or is off by more than the rounding of its type, is replaced in place: the patched forward keeps
    its interface and computes the same values from the model's own logits (which then take memory). Said in one note
    per run and architecture. A head that is kept multiplies label positions only, on a CPU too (`score_labels_only`).
    Not checked, and kept: weights on the meta device, without values, or sharded (ZeRO-3, FSDP), and a model whose own
    forward does not run where it lies (kernels for GPUs only).

    Args:
        model: patched by `enable_fused_head` or by a TRL trainer, plain or wrapped.

    Returns:
        Why the fused head was left; None where it is kept.
    """
    from fdiv.terminal import info

    base = causal_lm(model)
    head = fused_head(base)
    if head is not None:
        _name_experts(base.config)
    if head is None or is_spread(base):
        return None
    unpatch = score_labels_only(base, head.outputs)
    key = (type(base), type(base.get_output_embeddings()), base.config.to_json_string())
    if key not in _CHECKED:
        _CHECKED[key] = _fused_fault(base, head.temperature)
        if _CHECKED[key] is not None:
            info(
                f"the fused LM head does not fit {type(base).__name__} ({_CHECKED[key]}): log-probabilities come from "
                "the model's own logits, which need more memory"
            )
    if _CHECKED[key] is not None:
        unpatch()
        _add_plain_head(base, head)
    return _CHECKED[key]


def is_spread(base: nn.Module) -> bool:
    """Whether a single forward of `base` cannot be run here: no weights, or parts of them on each process."""
    from torch._subclasses.fake_tensor import FakeTensor

    from fdiv.inference.batches import collective_forward

    return collective_forward() or any(
        p.is_meta or hasattr(p, "ds_id") or isinstance(p.data, FakeTensor) for p in base.parameters()
    )


def _name_experts(config: Any) -> None:
    """Let `num_experts` of a mixture be read under the name that TRL's head asks for (Granite-MoE, Phi-3.5-MoE)."""
    config = config.get_text_config()
    if hasattr(config, "num_experts"):
        return
    for name in ("num_local_experts", "n_routed_experts", "moe_num_experts"):
        if hasattr(config, name):
            # An alias of the class, as transformers has it for Mixtral: nothing is added to a saved config.
            type(config).attribute_map = {**type(config).attribute_map, "num_experts": name}
            return


@torch.no_grad()
def aux_loss_fault(model: nn.Module) -> str | None:
    """Why the fused head of `model` gives no load-balancing loss; None where it gives the model's own.

    Not checked where `check_fused_head` does not check.
    """
    base = causal_lm(model)
    if is_spread(base):
        return None
    _name_experts(base.config)
    inputs = {**few_tokens(base), "output_router_logits": True}
    with evaluating(base):
        try:
            result = base(**inputs, labels=inputs["input_ids"], fused_lm_head=True)
        except Exception as error:  # any, from a forward that was written for other models
            return _named(error)
        own = getattr(base(**inputs), "aux_loss", None)
    if not isinstance(result.aux_loss, Tensor):
        return "the model returns no router logits"
    if isinstance(own, Tensor) and not torch.allclose(own.float(), result.aux_loss.float(), rtol=0.02, atol=1e-3):
        return f"it is {result.aux_loss.item():.4g} where the model's own is {own.item():.4g}"
    return None


def few_tokens(base: nn.Module) -> dict[str, Any]:
    """One short row of tokens to try a model on, as the inputs of its forward."""
    # 64: xLSTM's kernels for training want whole chunks
    length = min(64, context_length(base) or 64)
    ids = (torch.arange(length) * 37 + 5).remainder(base.config.get_text_config().vocab_size)
    ids = ids.unsqueeze(0).to(next(base.parameters()).device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


@contextmanager
def evaluating(base: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; modes and random numbers afterwards are those of before."""
    keep_trainable_layout(base)
    device = next(base.parameters()).device
    modes = {module: module.training for module in base.modules()}
    base.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"


@torch.no_grad()
def _fused_fault(base: nn.Module, temperature: float) -> str | None:
    """What is wrong with the fused head of `base`, in a few words; None when it agrees with the logits."""
    device, dtype = next(base.parameters()).device, next(base.parameters()).dtype
    inputs = few_tokens(base)
    ids = inputs["input_ids"]
    with evaluating(base):
        try:
            logits = base(**inputs).logits[:, :-1].float() / temperature
        except Exception:  # not to be judged here: a model that does not run is reported by whoever runs it
            return None
        plain = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        try:
            fused = base(**inputs, labels=ids, fused_lm_head=True).log_probs.float()
        except Exception as error:  # any, from a forward that was written for other models
            return _named(error)
    reduced = device.type == "cuda" and dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    epsilon = 2.0**-10 if reduced else torch.finfo(dtype if dtype.is_floating_point else torch.bfloat16).eps
    difference = (fused - plain).abs().max().item()
    if difference > 1e-5 + 4 * epsilon * logits.abs().max().clamp(min=1).item():
        return f"it is off by {difference:.2g} nats"
    return None


def _add_plain_head(base: nn.Module, head: FusedHead) -> None:
    """Patch `base` as TRL's fused head does, with the values computed from the model's own logits."""
    from trl.trainer.utils import FusedCausalLMOutput

    patched = getattr(base.forward, "__func__", base.forward)
    original_forward = inspect.getclosurevars(patched).nonlocals.get("original_forward", base.forward)
    outputs, temperature = head.outputs, head.temperature

    # The name is what `fused_head` recognises; `generate` checks its keywords against the signature.
    @functools.wraps(type(base).forward)
    def _fused_forward(
        self: nn.Module,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        if not fused_lm_head:
            return original_forward(*args, **kwargs, **{k: v for k, v in given.items() if v is not None})
        kwargs["use_cache"] = False
        result = original_forward(*args, **kwargs)
        logits = result.logits if shift_labels is not None else result.logits[:, :-1]
        targets = shift_labels if shift_labels is not None else labels[:, 1:]
        targets = targets.to(logits.device)
        mask = targets != -100
        values = _reduce_logits(logits, targets.clamp(min=0), mask, outputs, temperature)
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss, aux_loss = -values["log_probs"].sum() / count, getattr(result, "aux_loss", None)
        if aux_loss is not None:
            loss = loss + getattr(base.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
        every = {name: values.get(name) for name in OUTPUTS}
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **every)

    base.forward = types.MethodType(_fused_forward, base)


@functools.lru_cache(maxsize=32)
def _takes_position_ids(model_class: type) -> bool:
    return "position_ids" in inspect.signature(model_class.forward).parameters


def takes_position_ids(model: nn.Module) -> bool:
    """Whether the forward of `model` (possibly wrapped by PEFT or DDP) has a `position_ids` argument."""
    return _takes_position_ids(type(causal_lm(model)))


def with_position_ids(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` of a forward with position ids that count the unmasked tokens: padding may then stand on either side.

    Models with learned positions (GPT-2) need it. Unchanged where the ids are given, where `model` takes none, and
    beside images, whose models count in their own way.

    Args:
        model: plain or wrapped (PEFT, DDP).
        inputs: with `attention_mask` `[B, T]`.
    """
    if "position_ids" in inputs or "pixel_values" in inputs or not takes_position_ids(model):
        return inputs
    return {**inputs, "position_ids": (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)}


def token_scores(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    outputs: Sequence[str] = ("log_probs",),
    position_ids: Tensor | None = None,
    fused: bool = True,
    temperature: float | None = None,
) -> TokenScores:
    """Score the completion tokens of a padded batch under `model`, whichever side it is padded on.

    Args:
        model: a causal language model, plain or wrapped (PEFT, DDP, DeepSpeed).
        input_ids: `[B, T]` token ids.
        attention_mask: `[B, T]`, 0 on padding.
        completion_mask: `[B, T]`, 1 on the tokens to score. The first token of a row is never scored.
        outputs: which of `OUTPUTS` to return besides `log_probs`.
        position_ids: `[B, T]`; None counts the unmasked tokens, which is right under left padding too (rotary models
            do not care, models with learned positions do). Not passed to models that take none.
        fused: use the fused head where the model has one that gives all `outputs`; False forces the plain path.
        temperature: the logits are divided by it. None: the fused head's own, else 1.

    Returns:
        `TokenScores`: float32 (float64 for a float64 model on the plain path).

    Raises:
        ValueError: an unknown output, masks of another shape than `input_ids`, a temperature ≤ 0, or one that differs
            from the fused head's while the fused path is asked for.
        DataError: (a ValueError) a text longer than the model's context.
    """
    wanted = _check_outputs(outputs)
    for name, mask in (("attention_mask", attention_mask), ("completion_mask", completion_mask)):
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}: must be equal"
            )
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    if input_ids.size(1) > (context_length(model) or math.inf):  # padding does not count
        longest = int(attention_mask.sum(-1).max())
        check_fits(longest, model, "a text of this batch", "set max_length, or leave the longest rows out")
    head = fused_head(model) if fused else None
    if head is not None and temperature not in (None, head.temperature):
        raise ValueError(
            f"temperature={temperature} was asked for, but the fused LM head was set up at {head.temperature}: pass "
            "fused=False to score at another temperature"
        )
    kwargs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if position_ids is not None and takes_position_ids(model):
        kwargs["position_ids"] = position_ids
    kwargs = with_position_ids(model, kwargs)
    mask = completion_mask[:, 1:].bool() & attention_mask[:, 1:].bool()
    if head is not None and set(wanted) <= set(head.outputs):
        labels = input_ids.masked_fill(completion_mask == 0, -100).masked_fill(attention_mask == 0, -100)
        result = model(**kwargs, labels=labels, fused_lm_head=True)
        # Prompt-learning PEFT puts virtual tokens in front of the outputs: keep the positions of the real ones.
        values = {name: getattr(result, name)[:, -mask.size(1) :] for name in wanted}
    else:
        logits = model(**kwargs).logits[:, -input_ids.size(1) : -1]
        values = _reduce_logits(logits, input_ids[:, 1:], mask, wanted, 1.0 if temperature is None else temperature)
    return TokenScores(mask=mask, **values)


def _reduce_logits(
    logits: Tensor, labels: Tensor, mask: Tensor, wanted: tuple[str, ...], temperature: float
) -> dict[str, Tensor]:
    """The `wanted` values of `logits[B, T-1, V]` at `labels[B, T-1]`, in chunks of rows, 0 outside `mask`."""
    vocabulary = logits.size(-1)
    rows = max(1, _CHUNK_LOGITS // vocabulary)
    flat_logits, flat_labels = logits.reshape(-1, vocabulary), labels.reshape(-1)
    chunks = [
        checkpoint(_score_chunk, chunk, chunk_labels, wanted, temperature, use_reentrant=False)
        if chunk.requires_grad
        else _score_chunk(chunk, chunk_labels, wanted, temperature)
        for chunk, chunk_labels in zip(flat_logits.split(rows), flat_labels.split(rows), strict=True)
    ]
    stacked = {
        name: torch.cat(parts).view(mask.shape) for name, parts in zip(wanted, zip(*chunks, strict=True), strict=True)
    }
    return {name: value.masked_fill(~mask, 0) for name, value in stacked.items()}


def _score_chunk(logits: Tensor, labels: Tensor, wanted: tuple[str, ...], temperature: float) -> tuple[Tensor, ...]:
    """The `wanted` values of `logits[N, V]` at `labels[N]`, in float32 or better."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits / temperature
    log_normaliser = logits.logsumexp(-1)
    values = {"log_probs": logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - log_normaliser}
    if "entropy" in wanted:
        values["entropy"] = log_normaliser - (torch.softmax(logits, -1) * logits).sum(-1)
    with torch.no_grad():
        if "is_top1" in wanted:
            values["is_top1"] = logits.argmax(-1) == labels
        if "log_sum_sq_probs" in wanted:
            values["log_sum_sq_probs"] = (2 * logits).logsumexp(-1) - 2 * log_normaliser
        if "mean_logits" in wanted:
            values["mean_logits"] = logits.mean(-1)
    return tuple(values[name] for name in wanted)


def sequence_log_prob(scores: TokenScores) -> Tensor:
    """log π(y|x) = Σ_t log π(y_t | x, y_<t) over the scored tokens: `[B]`, nats; 0 for a row without scored tokens."""
    return scores.log_probs.sum(-1)


def mean_log_prob(scores: TokenScores) -> Tensor:
    """(1/|y|) log π(y|x), the length-normalised log-probability: `[B]`, nats per token; 0 for an empty completion."""
    return sequence_log_prob(scores) / scores.mask.sum(-1).clamp(min=1)
