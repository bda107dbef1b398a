"""DPH-RL: reinforcement learning with verifiable rewards that rehearses what the reference already masters
(Li et al. 2025, arXiv:2509.07430).

`DPHTrainer` is TRL's `GRPOTrainer` with its loss on rollouts (no KL term, no reference model) and, in the same
forward, an f-divergence on cached samples of the reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl import GRPOTrainer

from fdiv.divergences import Divergence
from fdiv.errors import DataError, FdivError
from fdiv.inference.encoding import encoding_stamp
from fdiv.inference.prompting import completion_text
from fdiv.models.fingerprints import data_fingerprint
from fdiv.models.reference import Reference
from fdiv.rl.dph.bank import BankMixin
from fdiv.rl.dph.batches import explore_mean, group_advantages, join, rows_of_slot, rows_of_step
from fdiv.rl.dph.config import DPHConfig
from fdiv.rl.dph.groups import correct_of, group_statistics
from fdiv.rl.dph.loss import (
    check_rehearsal_divergence,
    growth,
    js_on_policy,
    js_on_reference,
    rehearsal_loss,
    rehearsal_weight,
)
from fdiv.rl.dph.metrics import dph_metrics, gathered_log_ratios, rehearsal_columns
from fdiv.rl.dph.rehearsal import RehearsalBatch, RehearsalCache
from fdiv.rl.dph.resampling import resample_groups
from fdiv.rl.modes import mode_of, resolve_mode
from fdiv.terminal import info
from fdiv.training.data_checks import check_prompts, gold_checks, named_rows, with_checked
from fdiv.training.evaluation import PeriodicEvaluationMixin
from fdiv.training.rollouts import RolloutMixin, checked_log_probs, model_inputs, token_mask
from fdiv.training.trainer import ObjectiveTrainerMixin, own_options

__all__ = ["DPHConfig", "DPHTrainer"]

GRADED_FILE = "graded_rewards"


class DPHTrainer(BankMixin, PeriodicEvaluationMixin, RolloutMixin, ObjectiveTrainerMixin, GRPOTrainer):
    r"""DPH-RL on TRL's `GRPOTrainer`: L_explore + w·(mean of f over rehearsal rows); see `DPHConfig` for w.

    Args (those of `GRPOTrainer` not listed are passed on):
        model: the policy's start, which must be the reference of the rehearsal cache; path, hub name or model object.
        args: a `DPHConfig`.
        train_dataset: rows to explore: `prompt` (plain or conversational) and the columns the reward needs.
        reward_funcs: as for `GRPOTrainer`; None takes `args.reward`. None as a reward means "not scored": the
            completion gets advantage 0, takes no part in its group, and is counted.
        rehearsal: a `RehearsalCache`; None loads `args.rehearsal_cache`, if that is set.

    Every optimizer step rehearses R rows, spread evenly over micro-steps and processes; which, follows from
    (seed, step). Rollouts and rehearsal rows share the one gradient-enabled forward of a micro-step. Cached
    log-probabilities stand for the reference, so no reference model is held, unless `kl` or `rehearsal_form:
    definition` ask for one (under PEFT: the policy with the adapter off).

    Logged: see `fdiv.rl.dph.metrics.dph_metrics`; `kl/<estimator>`; `reward/unscored_fraction`,
    `advantage/skipped_fraction` (groups with too few scored samples); and what GRPO logs.

    Raises:
        ValueError: no reward; options that exclude each other; more rehearsal rows per step than there are.
        DataError: a cache that is empty, damaged, or of another tokenizer, model or temperature.
        RolloutError: the rollout back end failed, or gave a log-probability that is not finite.
        NonFiniteLossError: a NaN or infinite loss, before the optimizer step.
    """

    config_class = DPHConfig
    title = "verifiable rewards with rehearsal of reference samples, every f-divergence"
    paper = "arXiv:2509.07430"
    columns = ("prompt",)
    check_divergence = staticmethod(check_rehearsal_divergence)
    why_no_empty_places = (
        "the completions of a generation are shuffled into its micro-batches, and its rehearsal rows come from a "
        "cache that was sampled for all prompts"
    )
    _tag_names = ["trl", "fdiv", "dph-rl"]
    _name = "DPH-RL"
    _paper = {
        "title": "The Choice of Divergence: A Neglected Key to Mitigating Diversity Collapse in Reinforcement "
        "Learning with Verifiable Reward",
        "id": "2509.07430",
    }

    def __init__(
        self,
        model,
        args: DPHConfig | None = None,
        train_dataset=None,
        *,
        reward_funcs=None,
        rehearsal: RehearsalCache | None = None,
        rollout_func=None,
        eval_dataset=None,
        **kwargs: Any,
    ) -> None:
        args = own_options(type(self), args, model)
        rewards = _rewards(reward_funcs, args)
        own_rows = named_rows(train_dataset, eval_dataset)
        for name, rows in own_rows.items():
            own_rows[name] = check_prompts(rows, name, "DPH", more=gold_checks(rewards))
        train_dataset, eval_dataset = with_checked(own_rows, eval_dataset)
        self.divergence, self.kl, self.advantage = (
            args.resolve_divergence(), args.resolve_kl(), args.resolve_advantage()
        )  # fmt: skip
        self.rehearsal = _loaded(args) if rehearsal is None else rehearsal
        self._mode = resolve_mode(args.mode)
        self._completions_per_step = (
            args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        )
        self._rows_per_step = self._checked_rows(args)
        starting_adapter = not isinstance(model, str) and is_peft_model(model)
        super().__init__(
            model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=self._with_evaluation(args, train_dataset, eval_dataset),
            reward_funcs=rewards,
            rollout_func=rollout_func or args.server_rollouts(),
            **kwargs,
        )
        self.prompts_to_report = own_rows
        self._stop_early()
        # A row of weight 1 counts as in release 0.2, which had no weights and whose checkpoints go on.
        rows = [row[:-1] if row.weight == 1 else row for row in self.rehearsal or ()]
        self._rehearsal_at_start = data_fingerprint(rows)
        if self.rehearsal is not None:
            self._check_rehearsal(self.rehearsal)
        if args.bank != "none":
            self.rehearsal = self._make_bank()
            self._rows_per_step = args.rehearsal_rows(len(self.rehearsal), self._completions_per_step)
        self._rows_at_start = len(self.rehearsal or ())
        self.reference: Reference | None = None
        if self.kl is not None or (args.rehearsal_form == "definition" and self.rehearsal is not None):
            self.reference = Reference(self, copy_adapter=starting_adapter, temperature=self.temperature)
            self.ref_model = self.reference.model
        self._joining: RehearsalBatch | None = None
        self._scored: tuple[Tensor, Tensor | None] | None = None
        self._log_ratios: list[Tensor] = []
        self._correct: Tensor | None = None
        self._graded = False
        self._window = (-1, 0)

    def _check_rehearsal(self, cache: RehearsalCache) -> None:
        """Refuse a cache of another tokenizer, model, temperature or encoding; say what may be fine."""
        chat = not isinstance(cache[0].prompt, str)
        made_with = encoding_stamp(self._tokenizer, self.encoding, chat=chat)
        made_with["dtype"] = str(next(self.model.parameters()).dtype)
        notes = cache.check(
            tokenizer=self._tokenizer, model=self.model, temperature=self.temperature, made_with=made_with
        )
        self.note("rehearsal", notes)

    def _checked_rows(self, args: DPHConfig) -> int:
        if self.rehearsal is None:
            return args.rehearsal_rows(0, self._completions_per_step) if args.rehearses else 0
        self.rehearsal.check(temperature=args.temperature)  # the rest needs the model
        if not len(self.rehearsal):
            raise DataError(
                f"{self.rehearsal.name} holds no rows: the reference has no near-perfect prompt, so there is nothing "
                "to rehearse. Pre-sample with a lower threshold, or leave rehearsal_cache out"
            )
        return args.rehearsal_rows(len(self.rehearsal), self._completions_per_step)

    def objective_settings(self) -> dict[str, Any]:
        """The exploring loss, the advantage, the KL penalty and the rehearsal term."""
        names = ("loss_type", "scale_rewards", "advantage", "kl", "num_generations", "temperature", "reward_threshold")
        settings = {name: getattr(self.args, name) for name in names}
        settings["resample_groups"] = self.args.resample_groups or None  # as in a checkpoint that knows of none
        if self.kl is not None:
            settings["kl_coefficient"] = self.args.kl_coefficient
        if self.rehearsal is None:
            return settings | {"rehearsal": "none"}
        names = ("divergence", "rehearsal_coefficient", "rehearsal_weighting", "level", "rehearsal_form")
        settings |= {name: getattr(self.args, name) for name in (*names, "coefficient_clip", "max_exponent")}
        if self.args.bank != "none":
            settings |= {"bank": self.args.bank, "bank_limit": self.args.bank_limit, "mode": self.args.mode}
        return settings | {"rehearsal_rows_per_step": self._rows_per_step, "rehearsal_rows": self._rows_at_start}

    def overflow_exponents(self, divergence: Divergence) -> tuple[float, ...]:
        """Those of f, which holds u itself; none without rehearsal."""
        if self.rehearsal is None or self.args.rehearsal_form == "definition":
            return ()
        up, down = growth(divergence)
        return (up, -down)

    def run_identity(self) -> dict[str, Any]:
        """Also the rehearsal rows."""
        return super().run_identity() | {
            "rehearsal cache": self._rehearsal_at_start,
            "bank": None if self.args.bank == "none" else self.args.bank,
            "mode of the bank": None if self.args.bank == "none" else self.args.mode,
        }

    # ---------------------------------------------------------------- rollouts, rewards, advantages
    def _generate_and_score_completions(self, inputs):
        batch = self._generation(inputs)
        if self.model.training and self.args.resample_groups:
            batch = resample_groups(self, inputs, batch, self._generation)
        return batch

    def _generation(self, inputs: list[Any]) -> dict[str, Any]:
        """TRL's batch, with our advantages, the reference's log-probabilities and which completions are correct."""
        batch = super()._generate_and_score_completions(inputs)
        checked_log_probs(batch)
        if self.reference is not None:
            with self.reference.active() as model:
                batch["ref_per_token_logps"] = self._score(model, batch)
        if self.advantage is not None:
            batch["advantages"] = self._group_advantages(batch)
        if self._correct is not None and self.args.bank == "policy":
            batch["correct"] = self.my_part(self._correct, len(batch["advantages"]))
        return batch

    @torch.no_grad()
    def _score(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """`[B, C]` log-probabilities of the completions under `model`."""
        size = self.args.per_device_train_batch_size
        return self._get_per_token_logps_and_entropies(model, *model_inputs(batch), batch_size=size)[0]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        infinite = rewards.isinf().any(dim=0).tolist()
        if any(infinite):
            name = self.reward_func_names[infinite.index(True)]
            raise FdivError(f"reward {name!r} is infinite: rewards are finite numbers, or None for 'not scored'")
        unscored = rewards.isnan().all(dim=1)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["reward/unscored_fraction"].append(unscored.float().mean().item())
        total = (rewards * self.reward_weights.to(rewards)).nansum(dim=1)
        self._rewards = total.masked_fill(unscored, torch.nan)
        self._correct = self._checked_correct()
        if self._correct is not None:
            self._record_groups(completions, mode)
        return rewards

    def _checked_correct(self) -> Tensor | None:
        """Which completions are correct; None once a reward was neither 0 nor 1 and no threshold says more.

        The groups that hold no such reward would be counted otherwise, and they are no fair sample of all groups.
        """
        correct = correct_of(self._rewards, self.args.reward_threshold)
        if correct is None and not self._graded:
            self._graded = True
            info(
                "a reward is neither 0 nor 1: group/pass@K and group/modes are not logged from now on; set "
                "reward_threshold, the reward from which on a completion is correct"
            )
        return None if self._graded else correct

    def _record_groups(self, completions: list[Any], mode: str) -> None:
        """Pass@k and modes of the groups of this generation, from counts that are there anyway."""
        right = self.my_part(self._correct, len(completions)).tolist()
        function, texts = self._mode, map(completion_text, completions)
        modes = [
            mode_of(function, text, "a completion") if ok else None for text, ok in zip(texts, right, strict=True)
        ]
        size = self.num_generations if mode == "train" else self.num_generations_eval
        found = group_statistics(self._correct, ~self._rewards.isnan(), size, gather_object(modes))
        for name, value in found.items():
            self._metrics[mode][name].append(value)

    def _group_advantages(self, batch: dict[str, Tensor]) -> Tensor:
        """This process's part of the advantages, from the rewards of all processes."""
        mode = "train" if self.model.training else "eval"
        size = self.num_generations if mode == "train" else self.num_generations_eval
        if size < self.advantage.least:  # evaluation with fewer samples: nothing to compare
            return torch.zeros_like(batch["advantages"])
        rewards = self._rewards
        if self.kl is not None and self.kl.enters == "reward":
            penalty = self.accelerator.gather((self.kl(self._rollout_log_ratio(batch)) * token_mask(batch)).sum(-1))
            self._metrics[mode][f"kl/{self.kl.name}"].append(penalty.mean().item())
            rewards = rewards - self.args.kl_coefficient * penalty
        advantages, skipped = group_advantages(rewards, size, self.advantage)
        self._metrics[mode]["advantage/skipped_fraction"].append(skipped.float().mean().item())
        self.show_advantages(advantages)
        return self.my_part(advantages, len(batch["advantages"]))

    def _rollout_log_ratio(self, batch: dict[str, Tensor]) -> Tensor:
        """log π − log π_ref of the sampled tokens under the weights they were sampled with, `[B, C]`."""
        log_policy = batch.get("old_per_token_logps", batch.get("sampling_per_token_logps"))
        if log_policy is None:
            log_policy = self._score(self.model, batch)
        return log_policy - batch["ref_per_token_logps"]

    # ---------------------------------------------------------------- the one forward
    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """As TRL's. While the loss is formed, the rehearsal rows ride along, and log-probabilities are kept."""
        score = super()._get_per_token_logps_and_entropies
        rows = self._joining
        if rows is None:
            result = score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
            self._scored = (result[0], None)
            return result
        if kwargs.get("pixel_values") is not None:
            raise ValueError("rehearsal rows hold no images: leave rehearsal_cache out, or train on text")
        pad = self._tokenizer.pad_token_id
        joint = join(input_ids, attention_mask, logits_to_keep, rows, pad, self.pad_to_multiple_of)
        log_probs, entropy, aux_loss = score(
            model, joint.input_ids, joint.attention_mask, joint.completion_length, *args, **kwargs
        )
        self._scored = joint.split(log_probs)
        return self._scored[0], None if entropy is None else joint.split(entropy)[0], aux_loss

    def _next_rows(self) -> RehearsalBatch | None:
        """The rehearsal rows of this micro-step on this process; None where it has none."""
        if self._window[0] != self.state.global_step:
            self._fill_bank()  # a step is rehearsed from one bank
        step, index = self.state.global_step, self._window[1] if self._window[0] == self.state.global_step else 0
        self._window = (step, index + 1)
        processes = self.accelerator.num_processes
        window = self.current_gradient_accumulation_steps
        rows = rows_of_step(len(self.rehearsal), self._rows_per_step, step, self.args.seed) if self.rehearsal else []
        mine = rows_of_slot(
            rows, (index % window) * processes + self.accelerator.process_index, window * processes
        )  # fmt: skip
        if not mine:
            return None
        batch = self.rehearsal.batch(mine, self._tokenizer.pad_token_id)
        self._row_numbers = mine
        return RehearsalBatch(*(tensor.to(self.accelerator.device) for tensor in batch))

    # ---------------------------------------------------------------- loss
    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        r"""GRPO's loss on the rollouts, and beside it a divergence on cached samples of the reference:

            L = L_GRPO + β·KL + w·(1/R) Σ_r w_r ℓ_f(r),    ℓ_f(r) = mean over the tokens of row r of f(π_θ/π_ref)

        (arXiv:2509.07430; `level: sequence` takes f of the whole row's ratio, `kl` is off unless asked for, and w
        follows from `rehearsal_coefficient` and `rehearsal_weighting`; w_r is the row's weight in the cache, 1 unless
        pre-sampling weighed prompts or modes). R rows belong to an optimizer step; this
        micro-step on this process scores its share of them.
        """
        args, training = self.args, self.model.training
        steps = self.current_gradient_accumulation_steps if training else 1
        processes, rehearses = self.accelerator.num_processes, training and self.rehearsal is not None
        # 1. TRL's loss on the rollouts. Its forward scores the rehearsal rows of this micro-step too
        #    (`_get_per_token_logps_and_entropies`), so there is one pass with gradient.
        self._joining = rows = self._next_rows() if rehearses else None
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._joining = None
        (log_policy, log_rehearsal), self._scored = self._scored, None
        if training and args.bank == "policy":
            self._note_found(inputs, log_policy)
        shared, columns = {"explore_loss": loss.detach() * steps}, {}
        # 2. The KL penalty of the baselines, with GRPO's own normaliser.
        if self.kl is not None and self.kl.enters == "loss":
            loss = loss + args.kl_coefficient * self._kl_mean(log_policy, inputs)
        if not rehearses:
            if training:
                self._record(inputs, log_policy, {"loss": loss * steps, **shared}, {}, rows=1)
            return loss
        # 3. w·mean of ℓ_f over the R rows. Gradients are averaged over processes and summed over micro-steps, and
        #    rows differ in number, so the share of these rows is their sum × processes / R.
        weight = rehearsal_weight(
            args.rehearsal_coefficient, args.rehearsal_weighting, self._rows_per_step, self._completions_per_step
        )
        rehearsed = log_policy.new_zeros(())
        if rows is not None:
            log_ratio, mask = log_rehearsal - rows.reference_log_probs, rows.completion_mask
            row_losses = rows.weights * self._row_losses(log_ratio, mask)
            rehearsed = weight * row_losses.sum() * processes / self._rows_per_step
            columns = self._rehearsal_columns(row_losses, log_ratio.detach(), mask)
        # 4. Jensen–Shannon by definition has a second half, on the policy's own samples.
        if args.rehearsal_form == "definition":
            log_ratio = log_policy - inputs["ref_per_token_logps"]
            on_policy = js_on_policy(log_ratio, token_mask(inputs), args.level, gradient=args.definition_gradient)
            rehearsed = rehearsed + weight * on_policy.mean() / steps
        # 5. For the log, and for the stop on a loss that is not finite; at η = 0 the rows are scored for the log only.
        shared["loss"] = (loss.detach() + rehearsed) * steps
        self._record(inputs, log_policy, shared, columns, rows=-(-self._rows_per_step // (steps * processes)))
        return loss + rehearsed if args.rehearsal_coefficient else loss

    def _kl_mean(self, log_policy: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The KL estimator's mean, in the place and with the normaliser of GRPO's own; logged as `kl/NAME`."""
        mask = token_mask(inputs)
        old = inputs.get("old_per_token_logps", log_policy.detach())
        per_token = self.kl(log_policy - inputs["ref_per_token_logps"], log_policy - old)
        totals = torch.stack([(per_token.detach() * mask).sum(), mask.sum().to(per_token)])
        total, count = self.accelerator.reduce(totals, reduction="sum").tolist()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][f"kl/{self.kl.name}"].append(total / max(count, 1.0))
        return explore_mean(per_token, mask, inputs, self)

    def _row_losses(self, log_ratio: Tensor, mask: Tensor) -> Tensor:
        """`[R]`, what is averaged over rehearsal rows."""
        args = self.args
        if args.rehearsal_form == "definition":
            return js_on_reference(log_ratio, mask, args.level)
        return rehearsal_loss(
            log_ratio, mask, self.divergence, args.level, max_exponent=args.max_exponent,
            coefficient_clip=args.coefficient_clip,
        )  # fmt: skip

    def _rehearsal_columns(self, row_losses: Tensor, log_ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """`[R]` values of the rehearsal rows for the log; their log-ratios are kept for the quantiles."""
        token_level = self.args.level == "token"
        values = log_ratio[mask.bool()] if token_level else (log_ratio * mask).sum(-1)
        self._log_ratios.append(values.cpu())  # tokens of many steps: not where memory is scarce
        columns = rehearsal_columns(log_ratio, mask, self.divergence, self.args.level)
        return {"rehearsal_loss": row_losses, **columns, "row": torch.tensor(self._row_numbers, device=mask.device)}

    # ---------------------------------------------------------------- metrics
    @torch.no_grad()
    def _record(self, inputs, log_policy: Tensor, shared: dict, columns: dict[str, Tensor], rows: int) -> None:
        """One table row per rehearsal row, `rows` on every process; `shared` are values of the whole micro-step."""
        recorded = inputs.get("sampling_per_token_logps")
        if recorded is not None:
            now = inputs.get("old_per_token_logps", log_policy)
            shared["sampling_difference"] = ((now - recorded).abs() * token_mask(inputs)).max()
        have = next(iter(columns.values())).size(0) if columns else 0
        table = {name: value.float().expand(rows) for name, value in shared.items()}
        table["counted"] = (torch.arange(rows, device=log_policy.device) < have).float()
        for name in (
            ("rehearsal_loss", "divergence", "forward_kl", "tokens", "row") if self.rehearsal is not None else ()
        ):
            filled = log_policy.new_zeros(rows)
            if have:
                filled[:have] = columns[name].to(filled)
            table[name] = filled
        self.record_examples(table)

    def reduce_examples(self, examples: dict[str, Tensor], mode: str) -> dict[str, float]:
        """See `fdiv.rl.dph.metrics.dph_metrics`."""
        if self.rehearsal is None:
            return dph_metrics(examples, torch.empty(0), self.divergence, self.args)
        log_ratio = gathered_log_ratios(self.accelerator, self._log_ratios)
        self._log_ratios = []
        return dph_metrics(examples, log_ratio, self.divergence, self.args)

    # ---------------------------------------------------------------- checkpoints
    def save_method_state(self, folder: Path) -> None:
        """The log-ratios of this process that are not logged yet, and whether rewards other than 0 and 1 were seen."""
        super().save_method_state(folder)
        if self._graded and self.args.should_save:
            (folder / GRADED_FILE).write_text("rewards other than 0 and 1 were seen\n", encoding="utf-8")
        if self._log_ratios:
            save_file({"log_ratios": torch.cat(self._log_ratios)}, self._log_ratios_file(folder))

    def load_method_state(self, folder: Path) -> None:
        """Read them back."""
        super().load_method_state(folder)
        self._graded = (folder / GRADED_FILE).is_file()
        path = self._log_ratios_file(folder)
        self._log_ratios = [load_file(path)["log_ratios"]] if path.is_file() else []

    def _log_ratios_file(self, folder: Path) -> Path:
        return folder / f"log_ratios_{self.accelerator.process_index}.safetensors"


def _loaded(args: DPHConfig) -> RehearsalCache | None:
    if args.rehearsal_cache is None:
        return None
    try:
        return RehearsalCache.load(Path(args.rehearsal_cache))
    except FileNotFoundError as error:
        raise DataError(str(error)) from error


def _rewards(reward_funcs: Any, args: DPHConfig) -> Any:
    if reward_funcs is not None:
        return reward_funcs
    if args.reward is None:
        raise ValueError("no reward: set `reward: {name: …}` in the config, or pass reward_funcs")
    from fdiv.rl.rewards import build_reward

    return build_reward(args.reward)
