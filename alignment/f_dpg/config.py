"""Configuration of f-DPG."""

import warnings
from dataclasses import dataclass, fields
from typing import Any

from trl import GRPOConfig

from fdiv.alignment.f_dpg.loss import check_f_dpg_divergence
from fdiv.alignment.f_dpg.partition import Z_MODES
from fdiv.alignment.f_dpg.targets import Target, build_target
from fdiv.divergences import Divergence
from fdiv.memory.step_shape import StepShape, rollout_tokens, sampled_at_once
from fdiv.training.config import (
    CappedDivergenceOptions,
    check_options,
    divergence_option,
    named_divergence,
    option,
    refuse,
)
from fdiv.training.rollouts import GRPO_LOSS_KEYS, RolloutConfig

__all__ = ["FDPGConfig"]

# TRL keys that would change the objective or the sampling distribution, and keys of GRPO's loss, which do nothing.
_REFUSED = dict.fromkeys(GRPO_LOSS_KEYS, "it belongs to GRPO's loss, and f-DPG has its own") | {
    "beta": "it only makes TRL keep the base model; the beta of a·exp(r/beta) is `target: {beta: …}`",
    "entropy_coef": "the target is the objective; an entropy bonus would change its optimum",
    "importance_sampling_level": "f-DPG weights whole sequences",
    "mask_truncated_completions": "a truncated completion has its own probability under policy and target",
    "min_p": "the proposal must cover the policy",
    "multi_objective_aggregation": "the target says how scores combine",
    "off_policy_mask_threshold": "use importance_weight_cap",
    "repetition_penalty": "the proposal's probabilities must be those of a model",
    "reward_weights": "the target says how scores combine",
    "scale_rewards": "f-DPG has no advantages to scale",
    "sync_ref_model": "the base model of the target must not change",
    "temperature": "t = pi/p is that of the untempered model",
    "top_entropy_quantile": "the gradient is that of the whole sequence",
    "top_k": "the proposal must cover the policy",
    "top_p": "the proposal must cover the policy",
    "use_adaptive_entropy": "the target is the objective; an entropy bonus would change its optimum",
    "vllm_importance_sampling_correction": "f-DPG forms its own weights pi/q from the rollout's log-probs",
}
# Keys of `generation_kwargs` (transformers' and vLLM's) that do not change the distribution of the samples.
_HARMLESS_GENERATION_KEYS = frozenset(
    {"stop_strings", "stop", "stop_token_ids", "include_stop_str_in_output", "cache_implementation", "cache_config",
     "use_cache", "max_time", "disable_compile", "compile_config", "prefill_chunk_size", "seed", "low_memory"}
)  # fmt: skip
# α-DPG (arXiv:2512.05962) besides divergence and scale: reward min((p/π)^(1−α) − 1, 10), Z from the step's own group.
_ALPHA_DPG = {"pseudo_reward_clip": 10.0, "z_estimate": "group", "z_max": 1.0, "z_floor": 1e-4, "baseline": "loo"}


@dataclass
class FDPGConfig(CappedDivergenceOptions, RolloutConfig, GRPOConfig):
    """Configuration of `FDPGTrainer`: the keys of TRL's `GRPOConfig` about data, generation and training,
    `divergence`, `normalized`, `max_exponent`, and those below. Keys of GRPO's own objective (clipping, advantages, KL
    penalty) are refused.

    `alpha_dpg: α` is the preset of α-DPG (arXiv:2512.05962): it sets `divergence` (`alpha` at 1 − α), the factor
    1 − α that its reward leaves out, `pseudo_reward_clip` 10, `z_estimate` group, `z_max` 1, `z_floor` 1e-4 and
    `baseline` loo.

    Raises:
        ValueError: a divergence that cannot be used with the target, a value outside its range, or a TRL key that
            cannot be honoured.
    """

    beta: float = option(1.0, "Stays 1: it makes TRL keep the base model of the target")
    vllm_importance_sampling_correction: bool = option(False, "Stays false: f-DPG weights samples by π/q itself")
    disable_dropout: bool = option(
        True, "Train without dropout, which would make π(x) in the loss another model than the one sampled from"
    )
    divergence: dict[str, Any] | str | None = divergence_option(
        "jensen_shannon", "The f of D_f(π‖p); a hard target needs f'(∞) < ∞"
    )
    divergence_scale: float = option(1.0, "Deprecated: D_f is multiplied by it", above=0)
    alpha_dpg: float | None = option(
        None,
        "α of the preset α-DPG, from forward_kl (0) to reverse_kl (1): sets divergence, its scale, clip, Z and "
        "baseline",
        above=0,
        below=1,
    )
    target: dict[str, Any] | str | None = option(
        None,
        "What p is: {name: pointwise | filter | reward | distributional | hybrid, scorers: […]}, see "
        "`fdiv.alignment.f_dpg.targets`; may be left out when the trainer is given a target",
    )
    z_estimate: str = option(
        "history",
        "How Z of each prompt is known: `history` (mean over all samples so far), `pooled` (the same, steps whose "
        "proposal was nearer to p weigh more), `group` (this step's), `loo` (for each sample this step's others), "
        "`given` (`log_z`, or a dataset column `log_z`)",
        choices=Z_MODES,
    )
    log_z: float | None = option(None, "log Z of every prompt, for `z_estimate: given`")
    z_max: float | None = option(None, "Upper bound on an estimate of Z", above=0)
    z_floor: float | None = option(
        None,
        "What an estimate of Z below it becomes; not set: samples of a prompt with an estimate of 0 are skipped and "
        "counted",
        above=0,
    )
    baseline: str = option(
        "loo",
        "What is subtracted from the pseudo-reward: `loo` (mean of the prompt's other samples), `history` (mean of "
        "the last `baseline_window`, of earlier steps) or `none`",
        choices=("loo", "history", "none"),
    )
    baseline_window: int = option(1024, "Pseudo-rewards behind `baseline: history`", least=1)
    pseudo_reward_clip: float | None = option(
        None, "Upper bound of the pseudo-reward −f'(t) (α-DPG: 10); biased", above=0
    )
    importance_weight_cap: float | None = option(None, "Upper bound of the weight π/q; biased", above=0)
    proposal: str = option(
        "policy",
        "What is sampled from: `policy` (π), or `adaptive` (a frozen q, replaced by π when that is measurably closer "
        "to p)",
        choices=("policy", "adaptive"),
    )
    proposal_check_every: int = option(16, "Optimizer steps between comparisons of π and q", least=1)
    proposal_metric: dict[str, Any] | str | None = divergence_option(
        "forward_kl", "The divergence to p by which π and q are compared"
    )
    proposal_margin: float = option(1.0, "How many standard errors closer π must be to become the proposal", least=0)
    moment_samples: int = option(
        10240, "Samples of the base model from which λ of a distributional target is fitted", least=1
    )
    length_normalizer: float = option(1.0, "The loss is divided by this constant", above=0)
    diversity_samples: int = option(500, "Completions that enter distinct-n and self-BLEU at each log", least=2)

    def __post_init__(self) -> None:
        check_options(self)
        self._settle_alpha_dpg()
        if self.alpha_dpg is None and self.divergence_scale != 1.0:
            warnings.warn(
                f"divergence_scale={self.divergence_scale} is deprecated and goes in the next release: use normalized "
                "(one first step for every divergence) or scale learning_rate",
                FutureWarning,
                stacklevel=3,
            )
        self._refuse_options()  # before TRL fills in what depends on them
        super().__post_init__()
        if self.z_max is not None and self.z_floor is not None and self.z_floor > self.z_max:
            raise ValueError(f"z_floor={self.z_floor} is above z_max={self.z_max}: no estimate is both")
        if self.log_z is not None and self.z_estimate != "given":
            raise ValueError(f"log_z={self.log_z} is only used with z_estimate: given")
        if isinstance(self.target, str):
            raise ValueError(f"target={self.target!r}: a mapping is due, {{name: …, scorers: […]}}")
        if self.target is not None:
            self.resolve_divergence(build_target(self.target))

    def _settle_alpha_dpg(self) -> None:
        """Set what `alpha_dpg` stands for; a key beside it may only say the same."""
        alpha = self.alpha_dpg
        if alpha is None:
            return
        ours = 1.0 - alpha
        settled = {"divergence": {"name": "alpha", "alpha": ours}, "divergence_scale": ours, **_ALPHA_DPG}
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name, value in settled.items():
            given = getattr(self, name)
            if given not in (defaults[name], value):
                raise ValueError(
                    f"{name}={given!r} beside alpha_dpg={alpha}, which sets it to {value!r}: leave one of them "
                    "out (the preset is these keys: " + ", ".join(settled) + ")"
                )
            setattr(self, name, value)

    def _refuse_options(self) -> None:
        refuse(self, _REFUSED)
        for name in self.generation_kwargs or {}:
            if name not in _HARMLESS_GENERATION_KEYS:
                raise ValueError(
                    f"generation_kwargs: {name!r} cannot be honoured by f-DPG: it changes what is sampled, and the "
                    "proposal's probabilities must be those of a model. It takes "
                    + ", ".join(sorted(_HARMLESS_GENERATION_KEYS))
                )

    def check_divergence(self, divergence: Divergence, *, hard_target: bool = False) -> Divergence:
        """`divergence`, where f-DPG can use it with such a target; ValueError with the reason elsewhere."""
        return check_f_dpg_divergence(divergence, hard_target=hard_target)

    def resolve_divergence(self, target: Target | None = None) -> Divergence:
        """The `Divergence` of the loss, if it (and `proposal_metric`) can be used with `target`.

        Raises:
            ValueError: it cannot.
        """
        hard = target is not None and target.hard
        divergence = self.check_divergence(named_divergence(self.divergence, "divergence"), hard_target=hard)
        metric = named_divergence(self.proposal_metric, "proposal_metric")
        if self.proposal == "adaptive":
            self.check_divergence(metric, hard_target=hard)
        divergence = divergence.normalized() if self.normalized else divergence
        return divergence if self.divergence_scale == 1.0 else divergence.scaled(self.divergence_scale)

    def step_shape(self, *, peft: bool, prompt_tokens: int | None = None, **_: Any) -> StepShape:
        """The completions; the base model, and the weights of an adaptive proposal that no engine holds."""
        tokens, note = rollout_tokens(self, prompt_tokens)
        drawn = sampled_at_once(self, self.per_device_train_batch_size * self.steps_per_generation)
        references = 0 if peft else 1 + int(self.proposal == "adaptive" and drawn > 0)
        return StepShape(
            self.per_device_train_batch_size, tokens, note, references, sampled_rows=drawn, sampled_tokens=tokens
        )
