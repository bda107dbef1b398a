"""Distillation of a student towards a teacher under any divergence, on own samples, given completions, or both.

`FDistillTrainer` is TRL's `DistillationTrainer` (generalised knowledge distillation, Agarwal et al. 2024,
arXiv:2306.13649) with two more ideas: `divergence` and `on_policy_share`.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl import DistillationTrainer

from fdiv.distillation.f_distill.config import FDistillConfig
from fdiv.distillation.f_distill.data import check_rows, completion_tokens, samples_itself
from fdiv.distillation.f_distill.metrics import reduce_rows, row_columns
from fdiv.distillation.teachers import load_teacher, shared_tokens, teacher_tokenizer
from fdiv.divergences import get_divergence
from fdiv.errors import DataError
from fdiv.models.fingerprints import weights_fingerprint
from fdiv.models.loading import check_fits, checked_tokenizer, context_length
from fdiv.models.reference import placed
from fdiv.models.vocabulary import Head, check_head, last_hidden_states, model_head, score_vocabulary
from fdiv.rows.report import RowReport
from fdiv.rows.sources import source_of
from fdiv.training.data_checks import named_rows, report_name, row_variables, with_checked
from fdiv.training.rollouts import (
    EpochOrder,
    check_completions,
    check_padding,
    check_room,
    checked_rollouts,
    model_inputs,
    token_mask,
    without_generation_defaults,
)
from fdiv.training.trainer import ObjectiveTrainerMixin, own_options

__all__ = ["FDistillConfig", "FDistillTrainer"]


class FDistillTrainer(ObjectiveTrainerMixin, DistillationTrainer):
    r"""Trains D_f(student‖teacher) of every next-token distribution, averaged over the tokens of the global batch.

    Rows have `prompt` and, where `on_policy_share` is below 1, `completion`, as text or messages. The student samples
    the completion of a share λ of the rows (all: on-policy, none: off-policy). Neither model's logits are ever made in
    full (`fdiv.models.vocabulary`); the gradient goes to the student alone.

    Args:
        model: the student: path, hub id, model or `PeftModel`; as for `DistillationTrainer`.
        teacher_model: path, hub id or model; None: `teacher_model_name_or_path` of `args`. It must speak of the
            student's tokens; heads of one tokenizer may be padded to different widths.
        rollout_func: TRL's, to sample by other means (`fdiv.training.rollouts`); one completion for each prompt.

    Logged beside TRL's `completions/*`, over every row since the last log on all processes: `divergence/<f>` ± `_se`
    per token, `entropy` of the student and `teacher_entropy`, `on_policy_fraction`, and over answers the quantiles
    `log_ratio/tokens_p05|p50|p95` of the mean log(student/teacher) per token and `density_weight/tokens_…` of t·f″(t).

    Raises:
        DataError: data, tokenizers or models that cannot be used.
        RolloutError: the rollout back end failed or gave an empty completion.
        NonFiniteLossError: a NaN or infinite loss, before the optimizer step.
    """

    config_class = FDistillConfig
    title = "distillation towards a teacher under any f-divergence, on own samples or given completions"
    paper = "arXiv:2306.13649"
    columns = ("prompt",)
    optional_columns = ("completion",)
    check_divergence = staticmethod(get_divergence)
    _tag_names = ["trl", "fdiv", "f-distill"]
    _name = "f-distill"

    def __init__(
        self,
        model,
        teacher_model=None,
        args: FDistillConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        rollout_func=None,
    ) -> None:
        args = own_options(type(self), args, model)
        self.divergence = args.resolve_divergence()
        if hasattr(processing_class, "tokenizer"):
            raise DataError("FDistillTrainer trains on text: pass a tokenizer, not a multimodal processor")
        processing_class = checked_tokenizer(processing_class, model, padding_side="left")
        given = args.on_policy_share < 1
        datasets = named_rows(train_dataset, eval_dataset)
        datasets = {"train_dataset": train_dataset, **datasets}  # a missing one is refused
        datasets = {name: check_rows(rows, name, given) for name, rows in datasets.items()}
        train_dataset, eval_dataset = with_checked(datasets, eval_dataset)
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        if teacher_model is None:
            raise DataError("there is no teacher: set teacher_model_name_or_path, or pass teacher_model")
        self.rollouts = rollout_func if rollout_func is not None else args.server_rollouts()
        self.rollouts = None if self.rollouts is None else checked_rollouts(self.rollouts)
        self._rows: list[dict[str, Any]] = []
        self.encoding = args.encoding()
        super().__init__(
            model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        check_padding(self.model)
        self._take_teacher(teacher_model)
        for name, rows in datasets.items():
            self._report(rows, name, given)

    def _take_teacher(self, teacher: Any) -> None:
        """Load the teacher, compare vocabularies and heads, and place it as the backend wants it."""
        args = self.args
        if isinstance(teacher, str):
            loading = {"trust_remote_code": args.trust_remote_code, **(args.teacher_model_init_kwargs or {})}
            tokenizer = teacher_tokenizer(teacher, trust_remote_code=args.trust_remote_code)
            self.teacher_name = teacher
            teacher = load_teacher(teacher, args.teacher_model_revision, **loading)
        elif args.teacher_model_init_kwargs is not None:
            raise DataError("teacher_model_init_kwargs load a teacher from its name, but teacher_model is a model")
        else:
            tokenizer = teacher_tokenizer(teacher, trust_remote_code=args.trust_remote_code)
            self.teacher_name = getattr(teacher.config, "_name_or_path", "") or type(teacher).__name__
        widths = [model.config.get_text_config().vocab_size for model in (self.model, teacher)]
        self.shared_tokens = shared_tokens(self._tokenizer, tokenizer, *widths)
        check_head(self.model)
        check_head(teacher)
        self.teacher_fingerprint = weights_fingerprint(teacher)
        self.teacher_model = placed(self, teacher.requires_grad_(False).eval())

    # ---------------------------------------------------------------- what the run is
    def objective_settings(self) -> dict[str, Any]:
        """The divergence, the temperature, λ and the teacher."""
        return {
            "divergence": self.args.divergence,
            "normalized": self.args.normalized,
            "temperature": self.temperature,
            "on_policy_share": self.args.on_policy_share,
            "teacher": self.teacher_name,
        }

    def run_identity(self) -> dict[str, Any]:
        """Data, batch and divergence; and the teacher's weights."""
        return super().run_identity() | {"teacher": self.teacher_fingerprint}

    # ---------------------------------------------------------------- completions
    def _get_train_sampler(self, dataset=None):
        return EpochOrder(super()._get_train_sampler(dataset), self)

    def _tokenize_prompts(self, prompts: list):
        """By the common encoding; a prompt that leaves no room for the completion is refused."""
        prompt_ids = [self.encoding.encode_prompt(self._tokenizer, prompt) for prompt in prompts]
        check_room(self, prompts, prompt_ids)
        return prompt_ids, None, {}

    def _report(self, rows: Any, name: str, given: bool) -> None:
        """Report the prompts and given completions of a data path, and refuse prompts that are too long."""
        if not hasattr(rows, "__len__"):
            return
        room, limit = self.max_completion_length, context_length(self.model)
        prompts, answers = [], []
        for row in rows:
            if given:
                prompt, answer = completion_tokens(self._tokenizer, row, self.encoding, self.eos_token_ids)
                answers.append(len(answer))
            else:
                prompt = self.encoding.encode_prompt(self._tokenizer, row["prompt"], **row_variables(row))
            prompts.append(len(prompt))
        long = [number for number, tokens in enumerate(prompts) if limit is not None and tokens + room > limit]
        if long:
            check_fits(
                prompts[long[0]] + room,
                self.model,
                f"{source_of(rows, name).row(long[0])}: the prompt with max_completion_length={room}",
                f"{len(long)} of {len(rows)} prompts are too long; shorten them or leave them out, or lower "
                "max_completion_length",
            )
        self.report_rows(RowReport(report_name(name, "prompts"), len(rows), longest=max(prompts), unit="prompts"))
        if given:
            cut = sum(tokens > room for tokens in answers)
            name = report_name(name, "completions")
            self.report_rows(RowReport(name, len(rows), max_length=room, cut=cut, longest=max(answers)))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        output = super()._generate_and_score_completions([{"prompt": row["prompt"]} for row in inputs])
        output["own"] = torch.tensor(self._own(), device=self.accelerator.device)
        return output

    def _own(self) -> list[bool]:
        """Of the rows at hand, whether the student samples the completion; evaluation takes given ones if it can."""
        share, seed = self.args.on_policy_share, self.args.seed
        if not self.model.training:
            return [share == 1.0] * len(self._rows)
        epoch = int(self.state.epoch or 0)
        return [samples_itself(row["prompt"], share, seed, epoch) for row in self._rows]

    def _generate(self, prompts: list):
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        own = self._own()
        # Given completions, cut to the length that own ones may have.
        completion_ids = [None if mine else self._given_tokens(i) for i, mine in enumerate(own)]
        chosen = self._prompts_to_sample(own)
        if chosen:
            samples = self._sample([prompts[i] for i in chosen], [prompt_ids[i] for i in chosen])
            for i, sample in zip(chosen, samples, strict=True):
                if own[i]:
                    completion_ids[i] = list(sample)
        self._log_lengths(prompt_ids, completion_ids)
        return prompt_ids, completion_ids, None, None, []

    def _given_tokens(self, number: int) -> list[int]:
        _, ids = completion_tokens(self._tokenizer, self._rows[number], self.encoding, self.eos_token_ids)
        return ids[: self.max_completion_length]

    def _prompts_to_sample(self, own: list[bool]) -> list[int]:
        """Rows to sample for: the own ones. Where one has any, all processes take part, for weights are gathered."""
        mine = [number for number, sampled in enumerate(own) if sampled]
        if self.args.on_policy_share == 1.0 or self.accelerator.num_processes == 1:
            return mine
        most = max(gather_object([len(mine)]))
        least = most if self.use_vllm else min(most, 1)  # vLLM takes the same number from each process
        return mine + [0] * (least - len(mine))

    def _sample(self, prompts: list, prompt_ids: list[list[int]]) -> list[list[int]]:
        if self.rollouts is not None:
            return self.rollouts(prompts, self)["completion_ids"]
        model = self.accelerator.unwrap_model(self.model_wrapped)
        with without_generation_defaults(model):
            completion_ids = self._generate_single_turn(prompt_ids, None, {})
        check_completions(completion_ids, None, len(prompts), "the generation back end")
        return completion_ids

    def _log_lengths(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> None:
        """TRL's metrics of lengths, over all processes."""
        mode = "train" if self.model.training else "eval"
        ended = [ids[-1] in (*self.eos_token_ids, self._tokenizer.pad_token_id) for ids in completion_ids]
        lengths = [(len(p), len(c), e) for p, c, e in zip(prompt_ids, completion_ids, ended, strict=True)]
        table = self.accelerator.gather(torch.tensor(lengths, device=self.accelerator.device)).double()
        if mode == "train":
            self.state.num_input_tokens_seen += int(table[:, :2].sum())
        self._metrics[mode]["num_tokens"] = [self.state.num_input_tokens_seen]
        self._metrics[mode]["completions/mean_length"].append(table[:, 1].mean().item())
        self._metrics[mode]["completions/min_length"].append(table[:, 1].min().item())
        self._metrics[mode]["completions/max_length"].append(table[:, 1].max().item())
        self._metrics[mode]["completions/clipped_ratio"].append(1 - table[:, 2].mean().item())

    # ---------------------------------------------------------------- the loss
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of D_f over the tokens here, over the mean number that a process has in the global batch."""
        mask = token_mask(inputs).bool()
        tokens = inputs["num_items_in_batch"] / self.accelerator.num_processes if self.model.training else mask.sum()
        student = self.accelerator.unwrap_model(model)
        # Backbone and head run inside the wrapper's forward: DDP, FSDP and DeepSpeed prepare their gradients there.
        scores = self._forward_redirection(model, student, self._scores, student, inputs, mask)
        self.record_examples(row_columns(scores, mask, inputs["own"], self.divergence))
        loss = scores.divergence.sum() / tokens.clamp(min=1)
        return (loss, None) if return_outputs else loss

    def _scores(self, student: nn.Module, inputs: dict[str, Tensor], mask: Tensor):
        """Student and teacher on prompt and completion, compared at the completion's tokens."""
        ids, attention_mask, length = model_inputs(inputs)
        hidden = last_hidden_states(student, ids, attention_mask, length)
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():
            teacher_hidden = self._forward_redirection(
                self.teacher_model, teacher, last_hidden_states, teacher, ids, attention_mask, length
            )
        return score_vocabulary(
            hidden[mask],
            self._head(student),
            teacher_hidden[mask].to(hidden.device),
            self._head(teacher),
            inputs["completion_ids"][mask],
            self.divergence,
            temperature=self.temperature,
        )

    def _head(self, model: nn.Module) -> Head:
        """The LM head, whole under FSDP and cut to the tokens that both models have."""
        head = model_head(model)
        whole = [part.full_tensor() if hasattr(part, "full_tensor") else part for part in head[:2]]
        if self.shared_tokens is not None:
            if hasattr(head.weight, "ds_status"):
                raise DataError(
                    "heads of two widths cannot be cut while ZeRO-3 shards them: resize the student's embeddings to "
                    "the teacher's (model.resize_token_embeddings), or use ZeRO-2"
                )
            whole = [None if part is None else part[: self.shared_tokens] for part in whole]
        return head._replace(weight=whole[0], bias=whole[1])

    def reduce_examples(self, examples: dict[str, Tensor], mode: str) -> dict[str, float]:
        """See the class; in evaluation the loss, too, over all tokens."""
        metrics = reduce_rows(examples, self.divergence)
        if mode == "eval":
            metrics["loss"] = metrics[f"divergence/{self.divergence.label}"]
        return metrics
