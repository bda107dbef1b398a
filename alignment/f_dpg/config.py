"""Configuration of f-DPG."""

from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig

from fdiv.alignment.f_dpg.loss import check_f_dpg_divergence
from fdiv.alignment.f_dpg.partition import Z_MODES
from fdiv.alignment.f_dpg.targets import Target, build_target
from fdiv.divergences import Divergence, get_divergence
from fdiv.memory.step_shape import StepShape, rollout_tokens, sampled_at_once
from fdiv.training.rollouts import GRPO_LOSS_KEYS, RolloutConfig

__all__ = ["FDPGConfig"]

# Keys of GRPO's loss do nothing here. Why, where there is more to say:
_GRPO_REASONS = {
    "entropy_coef": "the target is the objective; an entropy bonus would change its optimum",
    "importance_sampling_level": "f-DPG weights whole sequences",
    "mask_truncated_completions": "a truncated completion has its own probability under policy and target",
    "multi_objective_aggregation": "the target says how scores combine",
    "off_policy_mask_threshold": "use importance_weight_cap",
    "reward_weights": "the target says how scores combine",
    "scale_rewards": "f-DPG has no advantages to scale",
    "sync_ref_model": "the base model of the target must stay as it is",
    "top_entropy_quantile": "the gradient is that of the whole sequence",
    "use_adaptive_entropy": "the target is the objective; an entropy bonus would change its optimum",
}
# Further TRL keys that would change the objective or the sampling distribution: name → (neutral value, reason).
_REFUSED_OPTIONS: dict[str, tuple[Any, str]] = {
    "beta": (1.0, "it only makes TRL keep the base model; the beta of a·exp(r/beta) is `target: {beta: …}`"),
    "vllm_importance_sampling_correction": (False, "f-DPG forms its own weights pi/q from the rollout's log-probs"),
    "temperature": (1.0, "t = pi/p is that of the untempered model"),
    "top_p": (1.0, "the proposal must cover the policy"),
    "top_k": (0, "the proposal must cover the policy"),
    "min_p": (None, "the proposal must cover the policy"),
    "repetition_penalty": (1.0, "the proposal's probabilities must be those of a model"),
}
# Keys of `generation_kwargs` (transformers' and vLLM's) that leave the distribution of the samples as it is.
_HARMLESS_GENERATION_KEYS = frozenset(
    {"stop_strings", "stop", "stop_token_ids", "include_stop_str_in_output", "cache_implementation", "cache_config",
     "use_cache", "max_time", "disable_compile", "compile_config", "prefill_chunk_size", "seed", "low_memory"}
)  # fmt: skip
# α-DPG (arXiv:2512.05962) besides divergence and scale: reward min((p/π)^(1−α) − 1, 10), Z from the step's own group.
_ALPHA_DPG = {"pseudo_reward_clip": 10.0, "z_estimate": "group", "z_max": 1.0, "z_floor": 1e-4, "baseline": "loo"}


@dataclass
class FDPGConfig(RolloutConfig, GRPOConfig):
    r"""Configuration of `FDPGTrainer`: the keys of TRL's `GRPOConfig` about data, generation and training, and those
    below. GRPO's own objective (clipping, advantages, KL penalty) has no part in f-DPG; keys of it are refused.

    Args:
        divergence: The f of D_f(π‖p): a registry name or a mapping with its parameters. A hard target needs f′(∞) < ∞.
        divergence_scale: D_f is multiplied by it.
        alpha_dpg: Preset of α-DPG (arXiv:2512.05962) with its α in (0, 1), 0 forward KL, 1 reverse KL. Settles
            `divergence` (`alpha` at 1 − α), `divergence_scale` (1 − α, which its reward leaves out),
            `pseudo_reward_clip` 10, `z_estimate` group, `z_max` 1, `z_floor` 1e-4 and `baseline` loo.
        target: What p is: `{name: pointwise | filter | reward | distributional | hybrid, …}`, see
            `fdiv.alignment.f_dpg.targets`. May be left out when the trainer is given a target.
        z_estimate: How Z of each prompt is known: `history` (mean over all samples so far), `group` (this step's),
            `given` (`log_z`, or a dataset column `log_z`).
        log_z: log Z of every prompt, for `z_estimate: given`.
        z_max: Upper bound on an estimate of Z.
        z_floor: What an estimate below it becomes. None: samples of a prompt with Ẑ = 0 are skipped and counted.
        baseline: `loo` (mean pseudo-reward of the prompt's other samples), `history` (mean of the last
            `baseline_window`, of earlier steps), `none`.
        baseline_window: Number of pseudo-rewards behind `baseline: history`.
        pseudo_reward_clip: Upper bound of the pseudo-reward −f′(t) (α-DPG: 10). Biased.
        max_exponent: Overflow cap on exp-type f′, in (0, 80]. None: the registry's own, 60.
        importance_weight_cap: Upper bound of the weight π/q. Biased.
        proposal: `policy` (sample from π) or `adaptive` (sample from a frozen q, replaced by π when π is measurably
            closer to p).
        proposal_check_every: Optimizer steps between comparisons of π and q.
        proposal_metric: The divergence to p that is compared.
        proposal_margin: How many standard errors the improvement must exceed.
        moment_samples: Samples of the base model from which λ of a distributional target is fitted.
        length_normalizer: The loss is divided by this constant.
        diversity_samples: Completions that enter distinct-n and self-BLEU at each log.

    Raises:
        ValueError: a divergence that is not lawful with the target, a value outside its range, or a TRL option that
            f-DPG cannot honour.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "divergence", "target", "proposal_metric"]

    beta: float = field(default=1.0, metadata={"help": "Stays 1: it makes TRL keep the base model of the target."})
    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "Stays false: f-DPG weights samples by pi/q itself."}
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Dropout would make pi(x) in the loss another model than the one sampled from."},
    )
    divergence: dict[str, Any] | str | None = field(
        default="jensen_shannon",
        metadata={"help": "The f of D_f(pi||p): a name, or a mapping with parameters. `fdiv divergences` lists them."},
    )
    divergence_scale: float = field(default=1.0, metadata={"help": "D_f is multiplied by it."})
    alpha_dpg: float | None = field(
        default=None,
        metadata={"help": "alpha-DPG's alpha, in (0, 1): settles divergence, its scale, clip, Z and baseline."},
    )
    target: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "The target: {name: pointwise | filter | reward | distributional | hybrid, scorers: [...]}"},
    )
    z_estimate: str = field(
        default="history", metadata={"help": "How Z of a prompt is known.", "choices": list(Z_MODES)}
    )
    log_z: float | None = field(default=None, metadata={"help": "log Z of every prompt, for `z_estimate: given`."})
    z_max: float | None = field(default=None, metadata={"help": "Upper bound on an estimate of Z."})
    z_floor: float | None = field(
        default=None,
        metadata={
            "help": "What an estimate of Z below it becomes. Not set: prompts with an estimate of 0 are skipped."
        },
    )
    baseline: str = field(
        default="loo",
        metadata={"help": "What is subtracted from the pseudo-reward.", "choices": ["loo", "history", "none"]},
    )
    baseline_window: int = field(default=1024, metadata={"help": "Pseudo-rewards behind `baseline: history`."})
    pseudo_reward_clip: float | None = field(
        default=None, metadata={"help": "Upper bound of the pseudo-reward -f'(t); biased. alpha-DPG: 10."}
    )
    max_exponent: float | None = field(
        default=None, metadata={"help": "Overflow cap on exp-type f', in (0, 80]. Not set: the registry's own, 60."}
    )
    importance_weight_cap: float | None = field(
        default=None, metadata={"help": "Upper bound of the weight pi/q; biased."}
    )
    proposal: str = field(
        default="policy",
        metadata={"help": "Whom to sample from.", "choices": ["policy", "adaptive"]},
    )
    proposal_check_every: int = field(
        default=16, metadata={"help": "Optimizer steps between comparisons of policy and proposal."}
    )
    proposal_metric: dict[str, Any] | str | None = field(
        default="forward_kl", metadata={"help": "The divergence to p by which policy and proposal are compared."}
    )
    proposal_margin: float = field(
        default=1.0, metadata={"help": "How many standard errors closer the policy must be to become the proposal."}
    )
    moment_samples: int = field(
        default=10240, metadata={"help": "Samples of the base from which lambda of a distributional target is fitted."}
    )
    length_normalizer: float = field(default=1.0, metadata={"help": "The loss is divided by this constant."})
    diversity_samples: int = field(
        default=500, metadata={"help": "Completions that enter distinct-n and self-BLEU at each log."}
    )

    def __post_init__(self) -> None:
        self._settle_alpha_dpg()
        self._refuse_options()  # before TRL fills in what depends on them
        super().__post_init__()
        for name, choices in {
            "z_estimate": Z_MODES,
            "baseline": ("loo", "history", "none"),
            "proposal": ("policy", "adaptive"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}")
        for name in (
            "divergence_scale", "z_max", "z_floor", "baseline_window", "pseudo_reward_clip", "importance_weight_cap",
            "proposal_check_every", "moment_samples", "length_normalizer",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: must be above 0")
        if self.z_max is not None and self.z_floor is not None and self.z_floor > self.z_max:
            raise ValueError(f"z_floor={self.z_floor} is above z_max={self.z_max}: no estimate is both")
        if self.diversity_samples < 2 or self.proposal_margin < 0:
            raise ValueError(
                f"diversity_samples={self.diversity_samples} must be at least 2 and "
                f"proposal_margin={self.proposal_margin} at least 0"
            )
        if self.log_z is not None and self.z_estimate != "given":
            raise ValueError(f"log_z={self.log_z} is only used with z_estimate: given")
        if isinstance(self.divergence, Divergence) or isinstance(self.proposal_metric, Divergence):
            raise ValueError("a config holds names of divergences, so that it can be written beside the result")
        if isinstance(self.target, str):
            raise ValueError(f"target={self.target!r}: a mapping is due, {{name: …, scorers: […]}}")
        self.resolve_divergence(None if self.target is None else build_target(self.target))

    def _settle_alpha_dpg(self) -> None:
        """Set what `alpha_dpg` stands for; a key beside it may only say the same."""
        alpha = self.alpha_dpg
        if alpha is None:
            return
        if isinstance(alpha, bool) or not 0 < alpha < 1:
            raise ValueError(f"alpha_dpg={alpha}: must lie strictly between 0 (forward_kl) and 1 (reverse_kl)")
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
        defaults = {entry.name: entry.default for entry in fields(GRPOConfig)}
        grpo_only = {
            name: (defaults[name], _GRPO_REASONS.get(name, "it belongs to GRPO's loss, and f-DPG has its own"))
            for name in GRPO_LOSS_KEYS
        }
        for name, (neutral, reason) in {**_REFUSED_OPTIONS, **grpo_only}.items():
            value = getattr(self, name)
            if value != neutral:
                raise ValueError(f"{name}={value!r} cannot be honoured by f-DPG: {reason}. Leave it at {neutral!r}")
        for name in self.generation_kwargs or {}:
            if name not in _HARMLESS_GENERATION_KEYS:
                raise ValueError(
                    f"generation_kwargs: {name!r} cannot be honoured by f-DPG: it changes what is sampled, and the "
                    "proposal's probabilities must be those of a model. It takes "
                    + ", ".join(sorted(_HARMLESS_GENERATION_KEYS))
                )

    def resolve_divergence(self, target: Target | None) -> Divergence:
        """The `Divergence` of the loss, if it (and `proposal_metric`) is lawful with `target`.

        Raises:
            ValueError: it is not; or `max_exponent` is outside its range.
        """
        import torch

        if self.divergence is None or self.proposal_metric is None:
            raise ValueError("divergence and proposal_metric must be set: give names, for instance jensen_shannon")
        hard = target is not None and target.hard
        divergence = check_f_dpg_divergence(self.divergence, hard_target=hard)
        divergence.score(torch.zeros(1), self.max_exponent)
        if self.proposal == "adaptive":
            check_f_dpg_divergence(self.proposal_metric, hard_target=hard)
        return divergence if self.divergence_scale == 1.0 else get_divergence(divergence).scaled(self.divergence_scale)

    def step_shape(self, *, peft: bool, prompt_tokens: int | None = None, **_: Any) -> StepShape:
        """The completions; the base model, and the weights of an adaptive proposal that no engine holds."""
        tokens, note = rollout_tokens(self, prompt_tokens)
        drawn = sampled_at_once(self, self.per_device_train_batch_size * self.steps_per_generation)
        references = 0 if peft else 1 + int(self.proposal == "adaptive" and drawn > 0)
        return StepShape(
            self.per_device_train_batch_size, tokens, note, references, sampled_rows=drawn, sampled_tokens=tokens
        )
