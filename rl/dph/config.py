"""Configuration of DPH-RL."""

from dataclasses import dataclass
from typing import Any

import torch
from trl import GRPOConfig

from fdiv.divergences import Divergence
from fdiv.memory.step_shape import StepShape, rollout_tokens, sampled_at_once
from fdiv.rl.advantages import Advantage, resolve_advantage
from fdiv.rl.dph.loss import REHEARSAL_LEVELS, check_rehearsal_divergence
from fdiv.rl.kl_estimators import KLEstimator, list_kl_estimators, resolve_kl
from fdiv.rl.modes import resolve_mode
from fdiv.training.config import CappedDivergenceOptions, divergence_option, option
from fdiv.training.evaluation import EvaluationOptions
from fdiv.training.rollouts import RolloutConfig

__all__ = ["DPHConfig"]

_GRPO_LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")


@dataclass
class DPHConfig(EvaluationOptions, CappedDivergenceOptions, RolloutConfig, GRPOConfig):
    """Configuration of `DPHTrainer`: every key of TRL's `GRPOConfig` (the exploring part is its loss, of any
    `loss_type`, with beta = 0), `divergence`, `normalized`, `max_exponent`, the rollout keys of `RolloutConfig`,
    and those below.

    The loss of an optimizer step with N completions and R rehearsal rows is

        L_explore + w·(1/R) Σ_rows loss_f(row),    w = η (`literal`) or η·R/N (`pooled`)

    with η = `rehearsal_coefficient`. `literal` is the objective as the paper writes it. `pooled` is one average over
    all N + R rows, as the released code takes it, up to the common factor N/(N + R); with its 256 rows beside 2,048
    completions a published η is worth η/8 here: JS at η = 0.2 is `literal` with 0.025.

    Raises:
        ValueError: an unknown divergence, advantage or estimator, a value outside its range, or options that exclude
            each other.
    """

    disable_dropout: bool = option(
        True, "Train without dropout, which would make π in the log-ratio another model than the one sampled from"
    )
    loss_type: str = option("dapo", "Loss of the exploring part, one of GRPO's, see TRL", choices=_GRPO_LOSSES)
    divergence: dict[str, Any] | str | None = divergence_option(
        "jensen_shannon",
        "The f of D_f(π‖π_ref) on rehearsal rows (`jensen_shannon` is the released DPH-JS, twice the textbook's, "
        "`forward_kl` is DPH-F)",
    )
    rehearsal_cache: str | None = option(
        None,
        "File of verified reference samples with their log-probabilities, made by `fdiv presample`; not set: plain "
        "GRPO",
    )
    rehearsal_coefficient: float = option(
        0.025, "η, the weight of the divergence on rehearsal rows; at 0 they are scored for the log only", least=0
    )
    rehearsal_weighting: str = option(
        "literal", "How η weighs the rehearsal rows, see above", choices=("literal", "pooled")
    )
    rehearsal_batch_size: int | None = option(
        None,
        "R, rehearsal rows per optimizer step over all processes; not set: an eighth of the step's completions (256 "
        "beside 2,048 in the release), at least one and at most the cache",
        least=1,
    )
    bank: str = option(
        "none",
        "Answer bank: one rehearsal row for each mode of each prompt. `cache`: of the rows of rehearsal_cache; "
        "`policy`: also the policy's own verified answers, as they come, held to the policy that found them",
        choices=("none", "cache", "policy"),
    )
    bank_limit: int = option(65_536, "Rows that the bank holds at most; later ones are refused and counted", least=1)
    mode: str = option(
        "answer",
        "What makes two correct completions the same, for the bank and for `group/modes`: answer, expression, sql, "
        "text, or `module:function` of a completion",
    )
    reward_threshold: float | None = option(
        None, "For a reward that is not 0/1: a completion is correct from this reward on (bank, `group/pass@K`)"
    )
    level: str = option(
        "token",
        "Where f is taken: `token` (each token's ratio, averaged over the row) or `sequence` (the completion's ratio)",
        choices=REHEARSAL_LEVELS,
    )
    coefficient_clip: float | None = option(
        None, "Upper bound of |u·f'(u)|, the weight with which a token is pulled; its value stays exact", above=0
    )
    rehearsal_form: str = option(
        "generator",
        "`generator`: f on cached rows, no reference model; `definition`: Jensen-Shannon as KL(π_ref‖m) on the cached "
        "rows plus KL(π‖m) on the rollouts, which needs a live reference",
        choices=("generator", "definition"),
    )
    definition_gradient: str = option(
        "score",
        "For `definition`: `score` (the gradient of KL(π‖m)) or `pathwise` (autograd through its estimate, as "
        "released, which is another gradient; see `fdiv.rl.dph.loss.js_on_policy`)",
        choices=("score", "pathwise"),
    )
    reward: dict[str, Any] | str | None = option(
        None,
        "What scores completions: {name: math | sql | code | …, options}; may be left out when the trainer is given "
        "`reward_funcs`",
    )
    advantage: dict[str, Any] | str | None = option(
        None,
        "How rewards of a group become advantages: {name: pkpo, k: 4} and the like, see `fdiv.rl.advantages`; not "
        "set: TRL's own (`scale_rewards`)",
    )
    resample_groups: int = option(
        0,
        "Dynamic sampling: how often a group whose rewards are all alike is sampled again. Rewards in the log stay "
        "those of the first try. Not with an advantage that learns from such groups (pkpo, nsr)",
        least=0,
    )
    kl: str | None = option(
        None,
        "Penalty on the KL to a live reference, estimated on rollouts, see `fdiv.rl.kl_estimators` (`k3_loss` is "
        f"GRPO's): {', '.join(list_kl_estimators())}; not set: no penalty and no reference",
    )
    kl_coefficient: float = option(0.01, "What the KL penalty is multiplied by", above=0)

    def __post_init__(self) -> None:
        if self.epoch_evaluation is not None and self.num_generations_eval is None:
            self.num_generations_eval = 1  # it samples no groups, and TRL asks for a batch of whole ones
        super().__post_init__()
        self.resolve_kl()
        resolve_mode(self.mode)
        self._check_reference()
        self._check_advantage()
        self._check_resampling()

    def _check_resampling(self) -> None:
        rows = self.per_device_train_batch_size * self.steps_per_generation
        if self.resample_groups and rows % self.num_generations:
            raise ValueError(
                f"resample_groups={self.resample_groups} needs whole groups on every process: "
                f"per_device_train_batch_size × steps_per_generation = {rows} is no multiple of "
                f"num_generations={self.num_generations}"
            )
        if self.resample_groups and self.scale_rewards == "batch":
            raise ValueError(
                f"resample_groups={self.resample_groups} and scale_rewards=batch exclude each other: the scale of a "
                "batch would be that of its last groups; take scale_rewards: group"
            )
        if self.resample_groups and (what := self._learns_from_alike()):
            raise ValueError(
                f"resample_groups={self.resample_groups} and {what} exclude each other: it learns from groups whose "
                "rewards are all alike, and sampling those again would bias its gradient; take resample_groups: 0, or "
                "an advantage that is 0 there (grpo, rloo, maxrl, pkpo_loo with k of at least 2, passk_analytic)"
            )

    def _learns_from_alike(self) -> str | None:
        """The advantage, or the penalty in the reward, by which a group whose rewards are all alike has a gradient."""
        if self.kl is not None and resolve_kl(self.kl).enters == "reward":
            return f"kl: {self.kl}"
        advantage = self.resolve_advantage()
        if advantage is None or self.num_generations < advantage.least:
            return None
        alike = torch.tensor([[0.0], [1.0]]).expand(2, self.num_generations)
        return f"advantage {advantage.name!r}" if bool((advantage(alike) != 0).any()) else None

    def _check_reference(self) -> None:
        if self.beta != 0.0 or self.sync_ref_model:
            raise ValueError(
                f"beta={self.beta}, sync_ref_model={self.sync_ref_model}: the exploring part has no KL of its own. "
                "For GRPO's penalty set kl: k3_loss and kl_coefficient, and leave these two out"
            )
        if self.rehearsal_form == "definition" and (
            self.resolve_divergence().name != "jensen_shannon"
            or self.normalized
            or self.coefficient_clip is not None
            or self.max_exponent not in (None, type(self).max_exponent)
        ):
            raise ValueError(
                "rehearsal_form: definition is that of jensen_shannon, without normalized, coefficient_clip and "
                f"max_exponent (divergence={self.divergence!r}, normalized={self.normalized}, "
                f"coefficient_clip={self.coefficient_clip}, max_exponent={self.max_exponent}): take "
                "rehearsal_form: generator"
            )

        if self.rehearsal_form == "definition" and self.bank == "policy":
            raise ValueError(
                "rehearsal_form: definition and bank: policy exclude each other: the definition is of one reference, "
                "and the bank's rows are held to the policies that found them; take rehearsal_form: generator"
            )

    def _check_advantage(self) -> None:
        advantage = self.resolve_advantage()
        if advantage is None:
            return
        what = f"advantage {advantage.name!r}" if self.advantage is not None else f"kl: {self.kl}"
        if self.advantage is not None and self.scale_rewards != "group":
            raise ValueError(f"{what} says how rewards are scaled: leave scale_rewards={self.scale_rewards!r} out")
        if self.scale_rewards == "batch" or self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"{what} works on the summed rewards of one group: scale_rewards={self.scale_rewards!r} and "
                f"multi_objective_aggregation={self.multi_objective_aggregation!r} cannot be honoured"
            )
        if self.num_generations < advantage.least:
            raise ValueError(
                f"{what} needs at least {advantage.least} completions per prompt: raise "
                f"num_generations={self.num_generations}"
            )

    # ---------------------------------------------------------------- what the keys name
    def check_divergence(self, divergence: Divergence) -> Divergence:
        """`divergence`, where the rehearsal term can use it at this level; ValueError with the reason elsewhere."""
        return check_rehearsal_divergence(divergence, self.level)

    def resolve_kl(self) -> KLEstimator | None:
        """The estimator of the KL penalty; None without one."""
        return None if self.kl is None else resolve_kl(self.kl)

    def resolve_advantage(self) -> Advantage | None:
        """The advantage; None where TRL's own stands, which it cannot where the reward holds a KL (`k1_reward`)."""
        if self.advantage is not None:
            return resolve_advantage(self.advantage)
        if self.kl is not None and resolve_kl(self.kl).enters == "reward":
            return resolve_advantage("grpo" if self.scale_rewards == "group" else "dr_grpo")
        return None

    @property
    def rehearses(self) -> bool:
        """Whether there is, or will be, something to rehearse."""
        return self.rehearsal_cache is not None or self.bank == "policy"

    def rehearsal_rows(self, available: int, completions: int) -> int:
        """R: rehearsal rows per optimizer step, of `available` cached ones, beside `completions` rollouts.

        A bank that grows is asked for the same number from the start; while it holds fewer, they come round again.

        Raises:
            ValueError: `rehearsal_batch_size` above `available`.
        """
        if self.bank == "policy":
            return self.rehearsal_batch_size or max(1, completions // 8)
        if self.rehearsal_batch_size is None:
            return min(available, max(1, completions // 8))
        if self.rehearsal_batch_size > available:
            what = "rehearsal cache" if self.bank == "none" else "answer bank, one for each mode of each prompt,"
            raise ValueError(
                f"rehearsal_batch_size={self.rehearsal_batch_size}, but the {what} holds {available} rows: "
                f"set it to at most {available}, or pre-sample more prompts"
            )
        return self.rehearsal_batch_size

    def step_shape(self, *, peft: bool, processes: int, prompt_tokens: int | None = None) -> StepShape:
        """Completions and this micro-step's rehearsal rows; a reference for a KL penalty or the definition form."""
        tokens, note = rollout_tokens(self, prompt_tokens)
        rows = self.per_device_train_batch_size
        slots = processes * self.gradient_accumulation_steps
        if self.rehearses:
            available = max(rows * slots, self.rehearsal_batch_size or 0)  # the cache is not read
            rows += -(-self.rehearsal_rows(available, rows * slots) // slots)
        live = self.kl is not None or (self.rehearsal_form == "definition" and self.rehearsal_cache is not None)
        drawn = sampled_at_once(self, self.per_device_train_batch_size * self.steps_per_generation)
        return StepShape(rows, tokens, note, int(live and not peft), sampled_rows=drawn, sampled_tokens=tokens)
