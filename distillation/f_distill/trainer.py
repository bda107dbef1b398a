"""Distillation of a student towards a teacher under any divergence, on own samples, given completions, or both.

`FDistillTrainer` is TRL's `DistillationTrainer` (generalised knowledge distillation, Agarwal et al. 2024,
arXiv:2306.13649) with two more ideas: `divergence` and `on_policy_share`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback
from trl import DistillationTrainer

from fdiv.distillation.f_distill.config import FDistillConfig
from fdiv.distillation.f_distill.data import TEACHER_PROMPT, check_rows, completion_tokens, samples_itself
from fdiv.distillation.f_distill.metrics import reduce_rows, row_columns
from fdiv.distillation.f_distill.sinkhorn import sinkhorn_term
from fdiv.distillation.teachers.base import Encoded, Teacher
from fdiv.distillation.teachers.local import cut_head
from fdiv.distillation.teachers.vocabularies import check_known_tokens
from fdiv.distillation.transport import TransportCosts
from fdiv.divergences import get_distance
from fdiv.errors import DataError
from fdiv.models.loading import check_fits, checked_tokenizer, context_length
from fdiv.models.vocabulary import VocabularyScores, last_hidden_states
from fdiv.rows.report import RowReport
from fdiv.rows.sources import source_of
from fdiv.training.data_checks import named_rows, report_name, row_variables, with_checked
from fdiv.training.places import EMPTY, held_rows, with_empty_places
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
    full (`fdiv.models.vocabulary`); the gradient goes to the student alone. A column `teacher_prompt` is what the
    teacher reads in place of `prompt`. Other teachers than a model in memory: `fdiv.distillation.teachers`.

    Args:
        model: the student: path, hub id, model or `PeftModel`; as for `DistillationTrainer`.
        teacher_model: path, hub id or model; None: what `teacher` and `teacher_model_name_or_path` of `args` say. It
            must speak of the student's tokens; heads of one tokenizer may be padded to different widths.
        rollout_func: TRL's, to sample by other means (`fdiv.training.rollouts`); one completion for each prompt.

    Logged beside TRL's `completions/*`, over every row since the last log on all processes: `divergence/<f>` ± `_se`
    per token, `entropy` of the student and `teacher_entropy`, `on_policy_fraction`, and over answers the quantiles
    `log_ratio/tokens_p05|p50|p95` of the mean log(student/teacher) per token and `density_weight/tokens_…` of t·f″(t),
    where there is an f; `gate`, the mean weight of the forward member, of a `gated` divergence; with `sinkhorn_weight`
    `sinkhorn`, the mean cost of the transport, and `sinkhorn_row_error`, how far its rows are from their weights.

    Raises:
        DataError: data, tokenizers or models that cannot be used.
        RolloutError: the rollout back end failed or gave an empty completion.
        NonFiniteLossError: a NaN or infinite loss, before the optimizer step.
    """

    config_class = FDistillConfig
    title = "distillation towards a teacher under any f-divergence, on own samples or given completions"
    paper = "arXiv:2306.13649"
    columns = ("prompt",)
    optional_columns = ("completion", "teacher_prompt")
    leaves_places_empty = True
    check_divergence = staticmethod(get_distance)
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
        self.teacher = args.make_teacher()
        own = self.teacher.title if self.teacher.own_weights else None
        datasets = {name: check_rows(rows, name, given, own) for name, rows in datasets.items()}
        train_dataset, eval_dataset = with_checked(datasets, eval_dataset)
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        self.starting_adapter = not isinstance(model, str) and is_peft_model(model)
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
        self.teacher.attach(self, teacher_model)
        self.sinkhorn = sinkhorn_term(args, self._tokenizer, self.teacher.shared)
        self._sample_shared_tokens()
        self.add_callback(_AfterStep(self.teacher))
        for name, rows in datasets.items():
            self._report(rows, name, given)

    # ---------------------------------------------------------------- what the run is
    def objective_settings(self) -> dict[str, Any]:
        """The divergence, the temperature, λ and the teacher."""
        return {
            "divergence": self.args.divergence,
            "normalized": self.args.normalized,
            "temperature": self.temperature,
            "on_policy_share": self.args.on_policy_share,
            "teacher": self.teacher.settings(),
            **self.args.sinkhorn_settings(),
        }

    def run_identity(self) -> dict[str, Any]:
        """Data, batch and divergence; and what is known of the teacher."""
        return super().run_identity() | {"teacher": self.teacher.identity()}

    def save_method_state(self, folder: Path) -> None:
        """What the teacher needs beside its own weights."""
        super().save_method_state(folder)
        self.teacher.save(folder)

    def load_method_state(self, folder: Path) -> None:
        """Read it back."""
        super().load_method_state(folder)
        self.teacher.load(folder)

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
        prompts, answers, taught, read = [], [], [], []
        for row in rows:
            answer: list[int] = []
            if given:
                prompt, answer = completion_tokens(self._tokenizer, row, self.encoding, self.eos_token_ids)
                answers.append(len(answer))
                taught.append(Encoded(self._teacher_prompt(row) or prompt, answer[:room]))
            else:
                prompt = self.encoding.encode_prompt(self._tokenizer, row["prompt"], **row_variables(row))
            own = self._teacher_prompt(row) or []
            prompts.append(max(len(prompt), len(own)))
            if self.teacher.shared is not None:
                read.append([*prompt, *own, *answer[:room]])
        check_known_tokens(read, self._tokenizer, self.teacher.shared, name)
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
            self.teacher.check_rows(taught, name)

    def _teacher_prompt(self, row: Mapping[str, Any]) -> list[int] | None:
        """What the teacher reads in place of the prompt; None where the row does not say."""
        if row.get(TEACHER_PROMPT) is None:
            return None
        return self.encoding.encode_prompt(self._tokenizer, row[TEACHER_PROMPT], **row_variables(row))

    def _with_teacher_prompts(self, output: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch with what the teacher reads, padded on the left as prompts are."""
        if TEACHER_PROMPT not in rows[0]:
            return output
        ids = [torch.tensor(self._teacher_prompt(row)) for row in rows]
        for name, parts, value in (
            ("ids", ids, self._tokenizer.pad_token_id),
            ("mask", [torch.ones_like(part) for part in ids], 0),
        ):
            padded = pad_sequence(parts, batch_first=True, padding_value=value, padding_side="left")
            output[f"{TEACHER_PROMPT}_{name}"] = padded.to(self.accelerator.device)
        return output

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = held_rows(inputs)
        output = super()._generate_and_score_completions([{"prompt": row["prompt"]} for row in self._rows])
        output["own"] = torch.tensor(self._own(), device=self.accelerator.device)
        output = self._with_teacher_prompts(output, self._rows)
        return with_empty_places(output, inputs, self._tokenizer.pad_token_id)

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
        read = [[*asked, *answer] for asked, answer in zip(prompt_ids, completion_ids, strict=True)]
        check_known_tokens(read, self._tokenizer, self.teacher.shared, "this batch, with what was sampled")
        self._log_lengths(prompt_ids, completion_ids)
        return prompt_ids, completion_ids, None, None, []

    def _sample_shared_tokens(self) -> None:
        """Take tokens that the teacher lacks out of what transformers samples.

        Raises:
            DataError: all the student's end tokens are among them, so that no sample would end.
        """
        shared, width = self.teacher.shared, self.model.config.get_text_config().vocab_size
        if shared is None or shared >= width or self.args.on_policy_share == 0:
            return
        if all(token >= shared for token in self.eos_token_ids):
            check_known_tokens([self.eos_token_ids], self._tokenizer, shared, "the end tokens of the student")
        known = self.generation_config.suppress_tokens or []
        self.generation_config.suppress_tokens = sorted({*known, *range(shared, width)})

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
        """The sum of D_f over the tokens here, over the mean number that a process has in the global batch.

        With `sinkhorn_weight` λ the sum is of D_f + λ·⟨P, C⟩, the transport being that of this micro-batch.
        """
        mask = token_mask(inputs).bool()
        tokens = inputs["num_items_in_batch"] / self.accelerator.num_processes if self.model.training else mask.sum()
        student = self.accelerator.unwrap_model(model)
        said = self.teacher.read(inputs, mask)
        # Backbone and head run inside the wrapper's forward: DDP, FSDP and DeepSpeed prepare their gradients there.
        scores, carried = self._forward_redirection(model, student, self._scores, student, inputs, mask, said)
        columns = row_columns(scores, mask, inputs["own"], self.divergence, carried)
        if EMPTY in inputs:
            columns = {name: values[~inputs[EMPTY]] for name, values in columns.items()}
        if len(columns["loss"]):
            self.record_examples(columns)
        total = scores.divergence.sum()
        if carried is not None and len(carried[0]):
            total = total + self.sinkhorn.weight * mask.sum() * carried[1].cost.mean()
        loss = total / tokens.clamp(min=1)
        return (loss, None) if return_outputs else loss

    def _scores(
        self, student: nn.Module, inputs: dict[str, Tensor], mask: Tensor, said: Any
    ) -> tuple[VocabularyScores, tuple[Tensor, TransportCosts] | None]:
        """The student on prompt and completion, compared with what the teacher said of the completion's tokens; and,
        with a Sinkhorn term, the rows of its costs and these."""
        ids, attention_mask, length = model_inputs(inputs)
        hidden = last_hidden_states(student, ids, attention_mask, length)
        hidden, head = hidden[mask], cut_head(student, self.teacher.shared)
        carried = None
        if self.sinkhorn is not None:
            carried = self.sinkhorn.costs(hidden, head, said.hidden, said.head, mask)
        # Every token weighs the same in the loss, so its gradients can be made in the first pass.
        return self.teacher.score(said, hidden, head, inputs["completion_ids"][mask], True), carried

    def reduce_examples(self, examples: dict[str, Tensor], mode: str) -> dict[str, float]:
        """See the class; in evaluation the loss, too, over all tokens."""
        metrics = reduce_rows(examples, self.divergence)
        if mode == "eval":
            metrics["loss"] = metrics[f"divergence/{self.divergence.label}"]
            if self.sinkhorn is not None and "sinkhorn" in metrics:
                metrics["loss"] += self.sinkhorn.weight * metrics["sinkhorn"]
        return metrics


class _AfterStep(TrainerCallback):
    """Tells the teacher that the student has moved."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After every optimizer step."""
        self.teacher.after_step()
