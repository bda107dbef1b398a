"""Rollouts for the trainers built on TRL's `GRPOTrainer`: where completions come from, and their log-probabilities.

Back ends, one interface (TRL's: `_generate_single_turn`, or a `rollout_func`):

* transformers: the trainer's own model; `RolloutMixin` records the sampling log-probabilities while it generates.
* vLLM in TRL's colocate and server modes: `use_vllm`, `vllm_mode` and TRL's other keys. Needs a GPU.
* a vLLM server over HTTP (`fdiv.inference.vllm_server`): `rollout_server_url`. No vLLM in the trainer's environment,
  runs on a CPU.
* recorded rollouts (`RecordedRollouts`): the same completions again, by (prompt, sample index).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Sampler

from fdiv.errors import DataError, RolloutError
from fdiv.files import read_json_lines
from fdiv.inference.encoding import template_without_clock
from fdiv.inference.padding import depends_on_padding
from fdiv.models.loading import check_fits, context_length
from fdiv.rows.report import RowReport
from fdiv.rows.sources import source_of
from fdiv.sealed import NO_DIGEST, SealedLines, sealed_line
from fdiv.terminal import info
from fdiv.training.config import ChatTemplateOptions, option
from fdiv.training.data_checks import report_name
from fdiv.training.finite import check_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from trl import GRPOConfig

__all__ = [
    "GRPO_LOSS_KEYS",
    "EpochOrder",
    "RecordedRollouts",
    "RolloutConfig",
    "RolloutMixin",
    "RolloutRecorder",
    "check_completions",
    "check_padding",
    "check_room",
    "checked_log_probs",
    "checked_rollouts",
    "model_inputs",
    "record_log_probs",
    "token_mask",
    "without_generation_defaults",
    "without_trl_reference",
]


_COMPLETIONS_FILE = "completions.json"

GRPO_LOSS_KEYS = (
    "delta", "entropy_coef", "entropy_coef_delta", "entropy_coef_max", "entropy_coef_min", "entropy_target", "epsilon",
    "epsilon_high", "importance_sampling_level", "loss_type", "mask_truncated_completions",
    "multi_objective_aggregation", "off_policy_mask_threshold", "ref_model_mixup_alpha", "ref_model_sync_steps",
    "reward_weights", "sapo_temperature_neg", "sapo_temperature_pos", "scale_rewards", "sync_ref_model",
    "top_entropy_quantile", "use_adaptive_entropy", "use_bias_correction_kl", "vespo_k_neg", "vespo_k_pos",
    "vespo_lambda_neg", "vespo_lambda_pos", "vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min", "vllm_importance_sampling_mode",
)  # fmt: skip
"""Keys of TRL's `GRPOConfig` that shape GRPO's own loss and nothing else: under another loss they would be silent."""


_PROMPTS_AT_ONCE = 1000


@dataclass
class RolloutConfig(ChatTemplateOptions):
    """Keys a trainer config inherits to choose the rollout back end (beside TRL's `use_vllm` family), and those of the
    chat template."""

    rollout_server_url: str | None = option(
        None, "Base URL of a vLLM server to sample from over HTTP, for instance http://localhost:8000"
    )
    rollout_sync_dir: str | None = option(
        None,
        "Directory the trainer and that server share, through which weights are passed; not set: `vllm_weights` in "
        "`output_dir`",
    )

    def server_rollouts(self) -> Callable | None:
        """The `rollout_func` for `rollout_server_url`; None when it is not set.

        Raises:
            ValueError: `rollout_server_url` together with `use_vllm`.
        """
        if self.rollout_server_url is None:
            return None
        if self.use_vllm:
            raise ValueError(
                "rollout_server_url and use_vllm=true are two back ends: unset one. use_vllm is TRL's colocate or "
                "server mode (NCCL weight transfer); rollout_server_url is plain HTTP"
            )
        from fdiv.inference.vllm_server import VLLMServerRollouts

        sync_dir = self.rollout_sync_dir or str(Path(self.output_dir) / "vllm_weights")
        return VLLMServerRollouts(self.rollout_server_url, sync_dir)


class RolloutMixin:
    """Put it before `GRPOTrainer` in the bases.

    * Scores with position ids counted from the attention mask, so that models with learned positions (GPT-2) are right
      under left padding; TRL passes none.
    * Transformers generation returns the log-probabilities it sampled with (at the sampling temperature, before top-k,
      top-p and the like), so that no second forward is needed for log q.
    * Transformers generation samples by the config's keys alone. `generate` would add what the model's own generation
      config holds (forbidden tokens, penalties, a smallest length), and log q would be that of another distribution.
    * Refuses models whose scores change under left padding (`fdiv.inference.padding`).
    * Refuses empty completions and rollouts that do not match the prompts, naming the prompt.
    * Orders the prompts of an epoch by (seed, epoch) alone, so that a run resumed in a later epoch sees the same ones.
    * A checkpoint between two generations holds the rollouts that are still to be trained on.
    """

    def __init__(self, *args: Any, rollout_func: Callable | None = None, **kwargs: Any) -> None:
        if rollout_func is not None:
            rollout_func = checked_rollouts(rollout_func)
        super().__init__(*args, rollout_func=rollout_func, **kwargs)
        self.encoding = self.args.encoding()
        self.chat_template_kwargs = self.encoding.template_variables()
        template = self.chat_template or getattr(self.processing_class, "chat_template", None)
        if isinstance(template, str):  # TRL renders with it: no clock in a prompt
            dated = template_without_clock(template, self.chat_template_kwargs.get("date_string"))
            self.chat_template = dated if dated != template else self.chat_template
        check_padding(self.model)

    def _get_train_sampler(self, dataset=None):
        return EpochOrder(super()._get_train_sampler(dataset), self)

    def _tokenize_prompts(self, prompts: list):
        """As TRL's, with the system turn; a prompt that leaves no room for the completion is refused."""
        tokenized = self._encode_prompts(prompts)
        check_room(self, prompts, tokenized[0])
        return tokenized

    def _encode_prompts(self, prompts: list):
        if self.encoding.system_prompt is not None:
            prompts = [self.encoding.turns(prompt) for prompt in prompts]
        if isinstance(prompts[0], str) and not self._is_vlm:
            # TRL would keep an end-of-sequence token that the tokenizer writes after a text.
            return [self.encoding.encode_prompt(self._tokenizer, prompt) for prompt in prompts], None, {}
        return super()._tokenize_prompts(prompts)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; what became of the prompts is reported first, and those that are too long are refused."""
        for name, rows in self.__dict__.pop("prompts_to_report", {}).items():
            self.report_prompts(rows, name)
        return super().train(*args, **kwargs)

    def report_prompts(self, rows: Any, name: str) -> None:
        """Report the prompts of a data path, and refuse those that leave no room for the completion.

        Args:
            rows: with a column `prompt`; streams, and rows with images or tools of an environment, are not read.
            name: of the dataset.

        Raises:
            DataError: a prompt is too long; names its row, and how many there are.
        """
        skipped = self._is_vlm or getattr(self, "environment_factories", None) is not None
        if rows is None or not hasattr(rows, "__len__") or skipped:
            return
        lengths: list[int] = []
        for start in range(0, len(rows), _PROMPTS_AT_ONCE):
            prompts = rows[start : start + _PROMPTS_AT_ONCE]["prompt"]
            lengths += [len(ids) for ids in self._encode_prompts(prompts)[0]]
        room, limit = self.max_completion_length, context_length(self.model)
        long = [number for number, tokens in enumerate(lengths) if limit is not None and tokens + room > limit]
        if long:
            check_fits(
                lengths[long[0]] + room,
                self.model,
                f"{source_of(rows, name).row(long[0])}: the prompt {str(rows[long[0]]['prompt'])[:60]!r} with "
                f"max_completion_length={room}",
                f"{len(long)} of {len(rows)} prompts are too long; shorten them or leave them out, or lower "
                "max_completion_length",
            )
        self.report_rows(RowReport(report_name(name, "prompts"), len(rows), longest=max(lengths), unit="prompts"))

    def save_method_state(self, folder: Path) -> None:
        """The rollouts of this process that later micro-steps still need, and which of them is next; the last
        completions, which logs look at."""
        super().save_method_state(folder)
        if self.args.should_save:
            (folder / _COMPLETIONS_FILE).write_text(json.dumps(self._shown(), default=str), encoding="utf-8")
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            return  # the next micro-step generates
        tensors = {}
        for number, batch in enumerate(self._buffered_inputs):
            for name, value in batch.items():
                if value is not None:
                    tensors[f"{number}.{name}"] = value.detach().clone().contiguous()
        save_file(tensors, self._rollouts_file(folder), metadata={"step": str(self._step)})

    def load_method_state(self, folder: Path) -> None:
        """Read them back."""
        super().load_method_state(folder)
        if (folder / _COMPLETIONS_FILE).is_file():
            self._show(json.loads((folder / _COMPLETIONS_FILE).read_text(encoding="utf-8")))
        path = self._rollouts_file(folder)
        if not path.is_file():
            return
        batches: dict[int, dict[str, Tensor]] = defaultdict(dict)
        with safe_open(path, framework="pt") as file:  # it does not know the device cpu:0 of a process
            self._step = int(file.metadata()["step"])
            for key in file.keys():
                number, _, name = key.partition(".")
                batches[int(number)][name] = file.get_tensor(key).to(self.accelerator.device)
        self._buffered_inputs = [batches[number] for number in sorted(batches)]

    def _rollouts_file(self, folder: Path) -> Path:
        return folder / f"rollouts_{self.accelerator.process_index}.safetensors"

    def _shown(self) -> dict[str, Any]:
        """TRL's table of the completions of the last generation, on all processes."""
        shown = {name: list(self._logs[name]) for name in ("prompt", "completion", "advantages")}
        return shown | {"rewards": {name: list(values) for name, values in self._logs["rewards"].items()}}

    def _show(self, shown: dict[str, Any]) -> None:
        for name, values in shown.pop("rewards").items():
            self._logs["rewards"][name].extend(values)
        for name, values in shown.items():
            self._logs[name].extend(values)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        return super()._get_per_token_logps_and_entropies(
            _PositionIds(model), input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def my_part(self, gathered: Tensor, count: int) -> Tensor:
        """The `count` rows of this process, of a tensor gathered from all of them."""
        start = self.accelerator.process_index * count
        return gathered[start : start + count]

    def show_advantages(self, advantages: Tensor) -> None:
        """In TRL's table of completions, these `[N]` values of the last generation in place of GRPO's."""
        shown = self._logs["advantages"]
        for _ in range(min(len(advantages), len(shown))):
            shown.pop()
        shown.extend(advantages.tolist())

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        check_weights(self)  # samplers fail on them in words of their own, or give noise
        if self.use_vllm or self.use_transformers_continuous_batching:
            completion_ids, log_probs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        else:
            model = self.accelerator.unwrap_model(self.model_wrapped)
            with without_generation_defaults(model), record_log_probs(model, self.temperature) as recorded:
                completion_ids, _ = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            log_probs = recorded.of(completion_ids)
        check_completions(completion_ids, log_probs, len(prompt_ids), "the generation back end")
        return completion_ids, log_probs


def check_padding(model: nn.Module) -> None:
    """Refuse a model whose scores change under left padding.

    Raises:
        DataError: with the reason.
    """
    reason = depends_on_padding(model)
    if reason is not None and not reason.startswith("longrope"):
        raise DataError(
            f"{type(model).__name__} cannot be trained on rollouts: {reason}, and prompts of a batch are "
            "padded on the left; take another model, or an objective on given answers"
        )
    if reason is not None:
        info(f"keep prompt and completion within original_max_position_embeddings: {reason}")


def check_room(trainer: Any, prompts: list, prompt_ids: list[list[int]]) -> None:
    """Refuse a prompt that leaves no room for the completion in the model's context."""
    longest = max(range(len(prompts)), key=lambda number: len(prompt_ids[number]))
    room = trainer.max_completion_length
    check_fits(
        len(prompt_ids[longest]) + room,
        trainer.model,
        f"the prompt {str(prompts[longest])[:60]!r} with max_completion_length={room}",
        "shorten the prompt or leave it out, or lower max_completion_length",
    )


class EpochOrder(Sampler):
    """TRL's `RepeatSampler`, seeded again for each epoch; its own generator runs on, and a resumed one starts over.

    It takes whole generations alone, so an epoch leaves prompts out where they are no multiple; how many is said.

    Raises:
        DataError: fewer prompts than one generation takes, with which TRL would train for no step.
    """

    def __init__(self, sampler: Sampler, trainer: Any) -> None:
        self.sampler, self.trainer = sampler, trainer
        prompts, needed = sampler.num_samples, sampler.batch_size
        if prompts < needed:
            raise DataError(
                f"{prompts} training prompts, and a generation takes {needed}, with {sampler.mini_repeat_count} "
                "completions of each: no step could be made; give more prompts, or a smaller batch "
                "(per_device_train_batch_size, gradient_accumulation_steps)"
            )
        if left := prompts % needed:
            which = "other ones each time" if sampler.shuffle else "the last ones"
            info(f"{left} of {prompts} prompts are left out of each epoch ({which}): a generation takes {needed}")

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.trainer.args.seed + int(self.trainer.state.epoch or 0))
        yield from self.sampler

    def __len__(self) -> int:
        return len(self.sampler)


class _PositionIds:
    """A model called with position ids counted from its attention mask, unless it takes none or is given some."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        from fdiv.models.logprobs import with_position_ids

        return self.model(**with_position_ids(self.model, inputs))


class _Recorded:
    """log q of the tokens a `generate` call sampled, kept as one float per row and step."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.steps: list[Tensor] = []
        self.pending: Tensor | None = None

    def observe(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: the newest input token is the one sampled from the previous call's logits."""
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if self.pending is not None:
            self.steps.append(self.pending.gather(-1, ids[:, -1:]).squeeze(-1))
        self.pending = torch.log_softmax(output.logits[:, -1].float() / self.temperature, dim=-1)

    def of(self, completion_ids: list[list[int]]) -> list[list[float]]:
        """Per completion, the log-probability of each of its tokens."""
        if self.pending is None:
            raise RolloutError(
                "the model generated without calling its own forward, so the sampling log-probabilities are unknown: "
                "use a back end that returns them (use_vllm, rollout_server_url)"
            )
        steps = torch.stack(self.steps, dim=1).cpu() if self.steps else self.pending.new_zeros(len(completion_ids), 0)
        last = self.pending.cpu()
        rows = []
        for row, ids in enumerate(completion_ids):
            seen = steps[row, : len(ids)].tolist()
            # The token sampled last is never fed back; it belongs to the longest rows only.
            rows.append(seen if len(seen) == len(ids) else [*seen, last[row, ids[-1]].item()])
        return rows


@contextmanager
def record_log_probs(model: nn.Module, temperature: float) -> Iterator[_Recorded]:
    """Record log q of every token that `model.generate` samples inside the block, at `temperature`.

    One float per token is kept; the cost is a log-softmax per step. Yields an object whose `of(completion_ids)` gives
    the log-probabilities after the block.
    """
    recorded = _Recorded(temperature)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = inner.register_forward_hook(recorded.observe, with_kwargs=True)
    try:
        yield recorded
    finally:
        handle.remove()


@contextmanager
def without_generation_defaults(model: nn.Module) -> Iterator[None]:
    """Inside the block the model has an empty generation config, so `generate` must be given its end tokens."""
    from transformers import GenerationConfig

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = kept


def checked_rollouts(rollout_func: Callable) -> Callable:
    """`rollout_func` with its answer checked."""
    name = getattr(rollout_func, "__name__", type(rollout_func).__name__)

    def checked(prompts: list, trainer: Any) -> dict[str, Any]:
        check_weights(trainer)
        output = rollout_func(prompts, trainer)
        missing = {"prompt_ids", "completion_ids", "logprobs"} - output.keys()
        if missing:
            raise RolloutError(f"rollout_func {name} returned no {', '.join(sorted(missing))}")
        check_completions(output["completion_ids"], output["logprobs"], len(prompts), f"rollout_func {name}")
        return output

    return checked


def check_completions(ids: list, log_probs: list | None, prompts: int, source: str) -> None:
    """Refuse what is not one completion, with a token at least and a log-probability each, per prompt."""
    if len(ids) != prompts:
        raise RolloutError(
            f"{source} returned {len(ids)} completions for {prompts} prompts (prompts come repeated num_generations "
            "times): one completion per prompt is due"
        )
    for number, completion in enumerate(ids):
        if not len(completion):
            raise RolloutError(
                f"{source} returned an empty completion for prompt {number} of the batch: a completion holds at least "
                "its end-of-sequence token; check min_tokens, stop strings and the server's context length"
            )
    for number, (completion, values) in enumerate(zip(ids, log_probs or [None] * prompts, strict=True)):
        if values is not None and len(values) != len(completion):
            raise RolloutError(
                f"{source} returned {len(values)} log-probabilities for the {len(completion)} tokens of completion "
                f"{number}: ask the server for the log-probability of every sampled token"
            )
        if values is not None and any(value is None for value in values):
            raise RolloutError(
                f"{source} returned no log-probability for a token of completion {number}: look at the engine's log"
            )


class RolloutRecorder:
    """A `rollout_func` that samples with the trainer's own back end and writes each rollout as a JSON line.

    One line: prompt, sample (its index among the samples of that prompt, over all processes), prompt_ids,
    completion_ids, logprobs. Only the main process writes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._counts: Counter[str] = Counter()

    def __call__(self, prompts: list, trainer: Any) -> dict[str, Any]:
        from accelerate.utils import gather_object

        prompt_ids, images, fields = trainer._tokenize_prompts(prompts)
        count = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
        completion_ids, log_probs = trainer._generate_single_turn(prompt_ids, images, fields, count)
        rows = gather_object(list(zip(prompts, prompt_ids, completion_ids, log_probs, strict=True)))
        if trainer.accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                for prompt, ids, completion, values in rows:
                    key = _prompt_key(prompt)
                    record = {"prompt": prompt, "sample": self._counts[key], "prompt_ids": ids}
                    file.write(sealed_line({**record, "completion_ids": completion, "logprobs": values}))
                    self._counts[key] += 1
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": log_probs}


class RecordedRollouts:
    """A `rollout_func` that answers with recorded completions, by (prompt, sample index).

    The n-th time a prompt is asked for, over all processes in rank order, it gets sample n of its record; so the same
    record gives the same global batch on one process and on several.

    Args:
        records: mappings with prompt, sample, prompt_ids, completion_ids and logprobs (or None); or the path of a file
            that `RolloutRecorder` wrote.

    Raises:
        RolloutError: (when called) a prompt that was not recorded, or asked for more often than it was.
    """

    def __init__(self, records: str | Path | Iterable[dict[str, Any]]) -> None:
        if isinstance(records, (str, Path)):
            records = _recorded(Path(records))
        self._samples: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        for record in records:
            self._samples[_prompt_key(record["prompt"])][record["sample"]] = record
        self._counts: Counter[str] = Counter()

    def __call__(self, prompts: list, trainer: Any) -> dict[str, Any]:
        from accelerate.utils import gather_object

        keys = [_prompt_key(prompt) for prompt in prompts]
        everyone = gather_object([(trainer.accelerator.process_index, key) for key in keys])
        mine = []
        for process, key in everyone:
            if process == trainer.accelerator.process_index:
                mine.append(self._find(key))
            self._counts[key] += 1
        return {
            "prompt_ids": [record["prompt_ids"] for record in mine],
            "completion_ids": [record["completion_ids"] for record in mine],
            "logprobs": None if mine[0]["logprobs"] is None else [record["logprobs"] for record in mine],
        }

    def _find(self, key: str) -> dict[str, Any]:
        recorded, wanted = self._samples.get(key), self._counts[key]
        if recorded is None or wanted not in recorded:
            have = "none" if recorded is None else str(len(recorded))
            raise RolloutError(f"sample {wanted} of prompt {key[:80]} was not recorded ({have} were): record more")
        return recorded[wanted]


def _recorded(path: Path) -> list[dict[str, Any]]:
    """The records of a file: our own, whose lines hold their digests, or another's, one JSON object a line."""
    lines = SealedLines.read(path, "record the rollouts again")
    if not lines.checked:
        info(f"{path}: {NO_DIGEST}")
        return read_json_lines(path)
    if lines.torn:
        info(f"{path}: its last line was cut off and is left out")
    return lines.items


def _prompt_key(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def token_mask(batch: dict[str, Tensor]) -> Tensor:
    """`[B, C]`, 1 on the tokens the policy wrote; tokens of tools and environments are not its choice."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def model_inputs(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """Token ids and attention mask `[B, P + C]`, and C."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return ids, attention_mask, batch["completion_ids"].size(1)


def checked_log_probs(batch: dict[str, Tensor]) -> Tensor | None:
    """`[B, C]` log q of the sampled tokens, recorded by the back end; None where it records none.

    Raises:
        RolloutError: one of them is not finite.
    """
    recorded = batch.get("sampling_per_token_logps")
    if recorded is not None and not torch.isfinite(recorded[token_mask(batch).bool()]).all():
        raise RolloutError(
            "the rollout back end returned a log-probability that is not finite: the engine's weights or its numbers "
            "are broken; look at its log, and try float32 or another attention back end there"
        )
    return recorded


@contextmanager
def without_trl_reference(args: GRPOConfig, **others: Any) -> Iterator[None]:
    """While `GRPOTrainer` is constructed: β = 0, so that it loads no reference model, which is ours to make.

    Args:
        args: the trainer's own copy of its options. others: further options that hold meanwhile.
    """
    meanwhile = {"beta": 0.0, **others}
    stated = {name: getattr(args, name) for name in meanwhile}
    vars(args).update(meanwhile)
    try:
        yield
    finally:
        vars(args).update(stated)
