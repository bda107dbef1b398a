"""Configuration of DPH-RL."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from fdiv.divergences import Divergence
from fdiv.divergences.saturation import check_max_exponent
from fdiv.memory.step_shape import StepShape, rollout_tokens, sampled_at_once
from fdiv.rl.advantages import Advantage, resolve_advantage
from fdiv.rl.dph.loss import REHEARSAL_LEVELS, check_rehearsal_divergence
from fdiv.rl.kl_estimators import KLEstimator, list_kl_estimators, resolve_kl
from fdiv.training.rollouts import RolloutConfig

__all__ = ["DPHConfig"]

_CHOICES: dict[str, Sequence[str]] = {
    "level": REHEARSAL_LEVELS,
    "rehearsal_weighting": ("literal", "pooled"),
    "rehearsal_form": ("generator", "definition"),
    "definition_gradient": ("score", "pathwise"),
}


@dataclass
class DPHConfig(RolloutConfig, GRPOConfig):
    r"""Configuration of `DPHTrainer`: every key of TRL's `GRPOConfig` (the exploring part is its loss, of any
    `loss_type`, with beta = 0), the rollout keys of `RolloutConfig`, and those below.

    The loss of an optimizer step with N completions and R rehearsal rows is

        L_explore + w·(1/R) Σ_rows loss_f(row),    w = η (`literal`) or η·R/N (`pooled`)

    with η = `rehearsal_coefficient`. `literal` is the objective as the paper writes it. `pooled` is one average over
    all N + R rows, as the released code takes it, up to the common factor N/(N + R); with its 256 rows beside 2,048
    completions a published η is worth η/8 here: JS at η = 0.2 is `literal` with 0.025.

    Args:
        divergence: The f of D_f(π‖π_ref) on rehearsal rows: a registry name, or a mapping with its parameters.
            `jensen_shannon` is the released DPH-JS (twice the textbook's), `forward_kl` DPH-F.
        rehearsal_cache: File of verified reference samples with their log-probabilities, made by `fdiv presample`.
            None: plain GRPO.
        rehearsal_coefficient: η. At 0 the rows are scored for the log only.
        rehearsal_weighting: `literal` or `pooled`, see above.
        rehearsal_batch_size: R, rows per optimizer step over all processes. None: an eighth of the step's completions
            (256 beside 2,048 in the release), at least one and at most the cache.
        level: `token` (f of each token's ratio, averaged over the row) or `sequence` (f of the completion's ratio).
        coefficient_clip: Upper bound of |u·f′(u)|, the weight with which a token is pulled; its value stays exact.
        max_exponent: Overflow cap on the exponents in f, in (0, 80]. None: the registry's own, 60.
        rehearsal_form: `generator` (f on cached rows, no reference model), or `definition`: Jensen-Shannon as
            KL(π_ref‖m) on the cached rows plus KL(π‖m) on the rollouts, which needs a live reference.
        definition_gradient: For `definition`: `score` (the gradient of KL(π‖m)) or `pathwise` (autograd through its
            estimate, as released, which is another gradient; see `fdiv.rl.dph.loss.js_on_policy`).
        reward: What scores completions: a mapping `{name: …}` for `fdiv.rl.rewards.build_reward`. May be left out when
            the trainer is given `reward_funcs`.
        advantage: How rewards of a group become advantages: `{name: pkpo, k: 4}` and the like, see
            `fdiv.rl.advantages`. None: TRL's own (`scale_rewards`).
        kl: Penalty on the KL to a live reference, estimated on rollouts, see `fdiv.rl.kl_estimators`. None: no penalty
            and no reference. `k3_loss` is GRPO's.
        kl_coefficient: β, what the penalty is multiplied by.

    Raises:
        ValueError: an unknown divergence, advantage or estimator, a value outside its range, or options that exclude
            each other.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "divergence", "reward", "advantage"]

    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Dropout would make pi in the log-ratio another model than the one that was sampled."},
    )
    divergence: dict[str, Any] | str | None = field(
        default="jensen_shannon",
        metadata={"help": "The f of D_f on rehearsal rows: a name, or a mapping. `fdiv divergences` lists them."},
    )
    rehearsal_cache: str | None = field(
        default=None, metadata={"help": "File of reference samples from `fdiv presample`. Not set: plain GRPO."}
    )
    rehearsal_coefficient: float = field(
        default=0.025, metadata={"help": "Weight of the divergence on rehearsal rows; 0: it is only logged."}
    )
    rehearsal_weighting: str = field(
        default="literal",
        metadata={
            "help": "literal: coefficient x mean over rehearsal rows. pooled: as released, x rows / completions.",
            "choices": list(_CHOICES["rehearsal_weighting"]),
        },
    )
    rehearsal_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rehearsal rows per optimizer step, all processes. Not set: completions of the step / 8."},
    )
    level: str = field(default="token", metadata={"help": "Where f is taken.", "choices": list(REHEARSAL_LEVELS)})
    coefficient_clip: float | None = field(
        default=None, metadata={"help": "Upper bound of |u f'(u)|, the weight with which a token is pulled."}
    )
    max_exponent: float | None = field(
        default=None, metadata={"help": "Overflow cap on exponents in f, in (0, 80]. Not set: the registry's own, 60."}
    )
    rehearsal_form: str = field(
        default="generator",
        metadata={
            "help": "generator: cached rows only. definition: Jensen-Shannon by definition, with a live reference.",
            "choices": list(_CHOICES["rehearsal_form"]),
        },
    )
    definition_gradient: str = field(
        default="score",
        metadata={
            "help": "For the definition form: the right gradient (score), or the released one (pathwise).",
            "choices": list(_CHOICES["definition_gradient"]),
        },
    )
    reward: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "What scores completions: {name: math | sql | code | ..., options}."}
    )
    advantage: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Advantages from a group's rewards: {name: pkpo, k: 4}. Not set: TRL's."}
    )
    kl: str | None = field(
        default=None,
        metadata={"help": "KL penalty with a live reference. Not set: none.", "choices": list_kl_estimators()},
    )
    kl_coefficient: float = field(default=0.01, metadata={"help": "What the KL penalty is multiplied by."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}")
        for name in ("rehearsal_batch_size", "coefficient_clip", "kl_coefficient"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be above 0")
        if not self.rehearsal_coefficient >= 0:
            raise ValueError(f"rehearsal_coefficient={self.rehearsal_coefficient}: must be 0 or above")
        check_max_exponent(self.max_exponent)
        if isinstance(self.divergence, Divergence):
            raise ValueError("a config holds names of divergences, so that it can be written beside the result")
        self.resolve_divergence()
        self.resolve_kl()
        self._check_reference()
        self._check_advantage()

    def _check_reference(self) -> None:
        if self.beta != 0.0 or self.sync_ref_model:
            raise ValueError(
                f"beta={self.beta}, sync_ref_model={self.sync_ref_model}: the exploring part has no KL of its own. "
                "For GRPO's penalty set kl: k3_loss and kl_coefficient, and leave these two out"
            )
        if self.rehearsal_form == "definition" and (
            self.resolve_divergence().name != "jensen_shannon"
            or self.coefficient_clip is not None
            or self.max_exponent is not None
        ):
            raise ValueError(
                "rehearsal_form: definition is that of jensen_shannon, without coefficient_clip and max_exponent "
                f"(divergence={self.divergence!r}, coefficient_clip={self.coefficient_clip}, "
                f"max_exponent={self.max_exponent}): take rehearsal_form: generator"
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
    def resolve_divergence(self) -> Divergence:
        """The `Divergence` of the rehearsal term.

        Raises:
            ValueError: none, or one that is unknown or lacks a parameter.
        """
        if self.divergence is None:
            raise ValueError("divergence must be set: give a name, for instance jensen_shannon")
        return check_rehearsal_divergence(self.divergence, self.level)

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

    def rehearsal_rows(self, available: int, completions: int) -> int:
        """R: rehearsal rows per optimizer step, of `available` cached ones, beside `completions` rollouts.

        Raises:
            ValueError: `rehearsal_batch_size` above `available`.
        """
        if self.rehearsal_batch_size is None:
            return min(available, max(1, completions // 8))
        if self.rehearsal_batch_size > available:
            raise ValueError(
                f"rehearsal_batch_size={self.rehearsal_batch_size}, but the rehearsal cache holds {available} rows: "
                f"set it to at most {available}, or pre-sample more prompts"
            )
        return self.rehearsal_batch_size

    def step_shape(self, *, peft: bool, processes: int, prompt_tokens: int | None = None) -> StepShape:
        """Completions and this micro-step's rehearsal rows; a reference for a KL penalty or the definition form."""
        tokens, note = rollout_tokens(self, prompt_tokens)
        rows = self.per_device_train_batch_size
        slots = processes * self.gradient_accumulation_steps
        if self.rehearsal_cache is not None:
            available = max(rows * slots, self.rehearsal_batch_size or 0)  # the cache is not read
            rows += -(-self.rehearsal_rows(available, rows * slots) // slots)
        live = self.kl is not None or (self.rehearsal_form == "definition" and self.rehearsal_cache is not None)
        drawn = sampled_at_once(self, self.per_device_train_batch_size * self.steps_per_generation)
        return StepShape(rows, tokens, note, int(live and not peft), sampled_rows=drawn, sampled_tokens=tokens)
