"""f-DPG: fit a policy to an unnormalised target p by any f-divergence, from samples (Go et al., arXiv:2302.08215).

`FDPGTrainer` is TRL's `GRPOTrainer` with the rollouts, rewards and data handling it has, and another objective: scores
become the density of a target, and each sample's log-probability is weighted by (π/q)·(f′(π/p) − baseline).
"""

import copy
import itertools
import json
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor, nn
from trl import GRPOTrainer

from fdiv.alignment.f_dpg.config import FDPGConfig
from fdiv.alignment.f_dpg.data import empty_prompts, given_log_z, log_z_checks, prompt_keys
from fdiv.alignment.f_dpg.loss import check_f_dpg_divergence, f_dpg_loss, leave_one_out_mean, leave_one_out_slopes
from fdiv.alignment.f_dpg.metrics import f_dpg_metrics, partition_metrics, prompt_columns, slope_columns
from fdiv.alignment.f_dpg.moments import fit_moments
from fdiv.alignment.f_dpg.partition import PartitionEstimates
from fdiv.alignment.f_dpg.proposal import AdaptiveProposal
from fdiv.alignment.f_dpg.targets import Target, build_target
from fdiv.alignment.scorers import check_finite, checked_scorer, prepare_scorer
from fdiv.divergences import get_divergence
from fdiv.errors import ScorerError
from fdiv.models.loading import load_second_model
from fdiv.models.reference import Reference, reference_of
from fdiv.statistics.diversity import diversity
from fdiv.training.data_checks import check_prompts, named_rows, with_checked
from fdiv.training.rollouts import (
    RolloutMixin,
    checked_log_probs,
    model_inputs,
    token_mask,
    without_trl_reference,
)
from fdiv.training.trainer import ObjectiveTrainerMixin, own_options

__all__ = ["FDPGConfig", "FDPGTrainer"]

#: Completions of each prompt behind the fit of λ.
_SAMPLES_PER_PROMPT = 128
_STATE_FILE = "f_dpg_state.json"
_PROPOSAL_FILE = "f_dpg_proposal.safetensors"


class FDPGTrainer(RolloutMixin, ObjectiveTrainerMixin, GRPOTrainer):
    r"""f-DPG on TRL's `GRPOTrainer`.

    Args (those of `GRPOTrainer` not listed are passed on):
        model: the policy's start; path, hub name or model object.
        args: an `FDPGConfig`.
        train_dataset: rows with `prompt` (plain or conversational); None: no prompts, every sample starts from the bos
            token (`max_steps` sets the length).
        target: a `Target` or mapping for `build_target`; None takes `args.target`.
        base_model: the base a of the target; None: with PEFT the model with the adapter off (the adapter's starting
            copy when training continues one), else the policy as passed.

    Per generation Ẑ of each prompt and the baselines are computed once, over all processes, so micro-batches may split
    groups; the coefficient itself is formed from the policy's current log-probabilities in the loss, in the one
    gradient-enabled forward. log q comes with the rollouts (`fdiv.training.rollouts`); a `rollout_func` that returns
    none costs one more forward.

    Logged: see `fdiv.alignment.f_dpg.metrics.f_dpg_metrics`; `z/*` per generation; `distinct_*`, `self_bleu_*` of the
    completions of the last generation; `proposal/*` with `proposal: adaptive`.

    Raises:
        ValueError: no target; a divergence that is not valid for it; options that cannot be honoured.
        ScorerError: a scorer raised, or gave a wrong number of scores or one that is not finite.
        MomentError: moments of a distributional target that are out of reach.
        NonFiniteLossError: a NaN or infinite loss, before the optimizer step.
    """

    config_class = FDPGConfig
    title = "distributional policy gradient to a target density, every f-divergence"
    paper = "arXiv:2302.08215"
    columns = ("prompt",)
    optional_columns = ("log_z",)
    check_divergence = staticmethod(check_f_dpg_divergence)
    why_no_empty_places = (
        "the completions of a generation are shuffled into its micro-batches, and Ẑ, λ and the proposal are estimated "
        "over all prompts"
    )
    _tag_names = ["trl", "fdiv", "f-dpg"]
    _name = "f-DPG"
    _paper = {
        "title": "Aligning Language Models with Preferences through f-divergence Minimization",
        "id": "2302.08215",
        "citation": """\
@inproceedings{go2023aligning,
    title     = {{Aligning Language Models with Preferences through f-divergence Minimization}},
    author    = {Dongyoung Go and Tomasz Korbak and Germ{\\'a}n Kruszewski and Jos Rozen and Nahyeon Ryu and Marc Dymetman},
    year      = 2023,
    booktitle = {Proceedings of the 40th International Conference on Machine Learning},
    eprint    = {2302.08215}
}""",  # noqa: E501
    }

    def __init__(
        self,
        model,
        args: FDPGConfig | None = None,
        train_dataset=None,
        *,
        target: Target | dict[str, Any] | None = None,
        base_model: nn.Module | str | None = None,
        peft_config=None,
        rollout_func=None,
        **kwargs: Any,
    ) -> None:
        args = own_options(type(self), args, model)
        given = args.target if target is None else target
        if given is None:
            raise ValueError("no target: set `target: {name: …}` in the config, or pass target")
        self.target = build_target(given)
        self.divergence = args.resolve_divergence(self.target)
        for function in self.target.functions:
            prepare_scorer(function)
        own_rows = named_rows(train_dataset, kwargs.get("eval_dataset"))
        for name, rows in own_rows.items():
            own_rows[name] = check_prompts(rows, name, "f-DPG", blank=True, more=log_z_checks(args, rows))
        train_dataset, kwargs["eval_dataset"] = with_checked(own_rows, kwargs.get("eval_dataset"))
        train_dataset = empty_prompts(args) if train_dataset is None else train_dataset
        in_memory = not isinstance(model, str) and not is_peft_model(model) and peft_config is None
        attach = in_memory or base_model is not None
        # TRL would load the base by the model's name; where it is another one, ours is attached below.
        with without_trl_reference(args) if attach else nullcontext():
            super().__init__(
                model,
                args=args,
                train_dataset=train_dataset,
                reward_funcs=[checked_scorer(function) for function in self.target.functions],
                peft_config=peft_config,
                rollout_func=rollout_func or args.server_rollouts(),
                **kwargs,
            )
        if self._is_vlm:
            raise ValueError("f-DPG trains on text: pass a tokenizer as processing_class, not a multimodal processor")
        self.prompts_to_report = own_rows
        if attach:
            self._attach_base(base_model, kwargs.get("quantization_config"))
        self.estimates = PartitionEstimates(args.z_estimate, z_max=args.z_max, z_floor=args.z_floor)
        self._recent_slopes: deque[float] = deque(maxlen=args.baseline_window)
        self._adaptive = self._make_proposal() if args.proposal == "adaptive" else None
        self._last_check = 0

    # ---------------------------------------------------------------- construction
    def _attach_base(self, base: nn.Module | str | None, quantization: Any = None) -> None:
        """Make `base`, or a frozen copy of the current policy, the reference that `GRPOTrainer` scores with."""
        if isinstance(base, str):
            loading = {} if quantization is None else {"quantization_config": quantization}
            base = load_second_model(base, **(self.args.model_init_kwargs or {}), **loading)
        self.ref_model = Reference(self, base).model
        self.beta = self.args.beta  # not 0: `GRPOTrainer` scores the base along with the rollouts

    @contextmanager
    def base_model(self) -> Iterator[nn.Module]:
        """The base a of the target, to call: the reference, or the policy with its adapter off."""
        unwrap = self.accelerator.unwrap_model
        reference = None if self.ref_model is None else unwrap(self.ref_model)
        with reference_of(unwrap(self.model), reference) as base:
            yield base

    def _make_proposal(self) -> AdaptiveProposal:
        engine = self.use_vllm or self.args.rollout_server_url is not None
        if not engine and (self.rollout_func is not None or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "proposal: adaptive with transformers rollouts keeps a copy of the weights, which DeepSpeed and FSDP "
                "shard and a rollout_func of one's own does not use: take vLLM rollouts, or proposal: policy"
            )
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return AdaptiveProposal(None if engine else trainable, self.args.proposal_metric, self.args.proposal_margin)

    def objective_settings(self) -> dict[str, Any]:
        """Divergence, target, and how Z, baseline and proposal are made."""
        names = ("divergence", "divergence_scale", "z_estimate", "baseline", "pseudo_reward_clip", "max_exponent")
        settings = {name: getattr(self.args, name) for name in (*names, "proposal")}
        scorers = ", ".join(self.reward_func_names)
        settings["target"] = f"{self.target.kind}({scorers})"
        if self.target.coefficients is not None:
            settings["coefficients"] = [round(value, 6) for value in self.target.coefficients]
        return settings

    # ---------------------------------------------------------------- rollouts
    def _tokenize_prompts(self, prompts: list):
        """As TRL's; an empty prompt becomes the bos (or eos) token, since a model cannot start from nothing."""
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        start = self._tokenizer.bos_token_id if self._tokenizer.bos_token_id is not None else self.eos_token_ids[0]
        return [ids if len(ids) else [start] for ids in prompt_ids], images, fields

    def rollout_version(self) -> int:
        """Which weights rollouts must come from: the proposal's version, or the optimizer step of the policy."""
        return self.state.global_step if self._adaptive is None else self._adaptive.version

    def _generate_single_turn(self, *args, **kwargs):
        if self._adaptive is None:
            return super()._generate_single_turn(*args, **kwargs)
        if self.use_vllm:  # TRL hands weights over when the step differs from the last one it did so
            held = getattr(self, "_version_in_engine", None) == self._adaptive.version
            self._last_loaded_step = self.state.global_step if held else -1
            self._version_in_engine = self._adaptive.version
        with self._adaptive.in_place():
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        scores = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if not torch.isfinite(scores).all():  # from a reward model or an asynchronous function; others were checked
            for name, column in zip(self.reward_func_names, self.my_part(scores, len(prompts)).unbind(1), strict=True):
                check_finite(name, column.tolist(), completions)
            raise ScorerError("a scorer returned a score that is not finite on another process")
        self._scores = scores.double()
        return scores

    def _generate_and_score_completions(self, inputs):
        self.ensure_fitted()
        batch = super()._generate_and_score_completions(inputs)
        samples = self._sample_log_probs(batch)
        return batch | self._score_samples(inputs, batch, samples)

    @torch.no_grad()
    def _sample_log_probs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`[B]` float64 log a, log q and log π (of now) of the sampled completions."""
        mask = token_mask(batch)

        def summed(per_token: Tensor) -> Tensor:
            return (per_token.double() * mask).sum(-1)

        recorded = checked_log_probs(batch)
        log_policy = None
        if recorded is None or self._adaptive is not None:
            per_token, _, _ = self._get_per_token_logps_and_entropies(
                self.model, *model_inputs(batch), batch_size=self.args.per_device_train_batch_size
            )
            log_policy = summed(per_token)
        log_q = log_policy if recorded is None else summed(recorded)
        return {
            "log_base": summed(batch["ref_per_token_logps"]),
            "log_proposal": log_q,
            "log_policy": log_q if log_policy is None else log_policy,
        }

    def _score_samples(self, inputs: list[dict], batch: dict[str, Tensor], samples: dict[str, Tensor]) -> dict:
        """The tensors the loss needs, one row per completion; reductions are over all processes."""
        training, rows = self.model.training, len(inputs)
        # log P = log a + the target's potential; then the samples of all processes in one table.
        scores = self.my_part(self._scores, rows)
        log_target = samples["log_base"] + self.target.log_potential(scores)
        columns = [log_target, samples["log_proposal"], samples["log_policy"]]
        if self.args.z_estimate == "given":
            columns.append(given_log_z(inputs, self.args.log_z).to(log_target))
        table = self.accelerator.gather(torch.stack(columns, dim=1))
        prompts = self.accelerator.gather(prompt_keys(batch))
        log_p, log_q, log_policy = table[:, :3].unbind(1)
        given = table[:, 3] if self.args.z_estimate == "given" else None
        # log Ẑ of each prompt from P/q of its samples; 0 leaves the prompt out.
        log_z = self.estimates.update(prompts, log_p - log_q, given=given, store=training)
        skipped = torch.isneginf(log_z)
        log_t = torch.where(skipped, 0.0, log_policy - log_p + log_z)
        for name, values in partition_metrics(prompts, log_p - log_q, log_z).items():
            self._metrics["train" if training else "eval"][name] += values
        # An adaptive proposal follows the policy when it has come closer to p.
        if self._adaptive is not None and training:
            kept = ~skipped
            self._adaptive.observe(
                log_t[kept], (log_q - log_p + log_z)[kept], (log_policy - log_q)[kept], prompts[kept]
            )
            self._maybe_replace_proposal()
        # The baseline of f′(t), and what TRL's table of completions shows.
        slope = self._slope(log_t)
        baseline = self._baseline(slope, prompts, ~skipped, training)
        if self.args.z_estimate == "loo" and self.args.baseline == "loo":
            baseline = leave_one_out_slopes(self._slope, log_policy - log_p, log_z, prompts)
        self.show_advantages((baseline - slope).masked_fill(skipped, 0.0))
        finite_log_z = self.my_part(log_z, rows).masked_fill(self.my_part(skipped, rows), 0.0)
        return {
            "scores": scores,
            "log_base": samples["log_base"],
            "log_proposal": samples["log_proposal"],
            "log_target": log_target - finite_log_z,
            "log_z": finite_log_z,
            "prompt": self.my_part(prompts, rows),
            "baseline": self.my_part(baseline, rows),
            "skipped": self.my_part(skipped, rows),
        }

    def _slope(self, log_t: Tensor) -> Tensor:
        """f′(t) as the loss uses it."""
        return slope_columns(self.divergence, log_t, self.args.max_exponent, self.args.pseudo_reward_clip)["slope"]

    def _baseline(self, slope: Tensor, prompts: Tensor, counted: Tensor, training: bool) -> Tensor:
        """What is subtracted from f′(t) of each sample: never the sample's own f′(t), so with Z known it adds no bias.

        With an estimated Z the f′(t) of the others hold Ẑ, and Ẑ (but for `z_estimate: loo`) holds the sample.
        """
        if self.args.baseline == "loo":
            return leave_one_out_mean(slope, prompts, counted)
        if self.args.baseline == "none":
            return torch.zeros_like(slope)
        before = sum(self._recent_slopes) / len(self._recent_slopes) if self._recent_slopes else 0.0
        if training:
            self._recent_slopes.extend(slope[counted].tolist())
        return torch.full_like(slope, before)

    def _maybe_replace_proposal(self) -> None:
        if self.state.global_step - self._last_check < self.args.proposal_check_every:
            return
        self._last_check = self.state.global_step
        for name, value in self._adaptive.decide().items():
            self._metrics["train"][name].append(value)

    # ---------------------------------------------------------------- lambda
    def ensure_fitted(self) -> None:
        """Fit λ of a distributional target if that is still to be done; training does it before the first step.

        The samples are those of the current policy (at the start: the base), weighted to the base. Call it on every
        process.

        Raises:
            MomentError: moments that are out of reach.
            ValueError: a streamed dataset, which cannot be sampled for prompts.
        """
        if not self.target.needs_fit:
            return
        if not isinstance(self.train_dataset, Dataset):
            raise ValueError("a streamed dataset cannot be sampled for the moments: give the target's coefficients")
        kept_metrics = copy.deepcopy(self._metrics)
        features, weights, prompts = self._moment_samples()
        self._metrics = kept_metrics
        first = len(self.target.scorers)
        names = self.reward_func_names[first:]
        fit = fit_moments(features, self.target.moments, weights, prompts=prompts, names=names)
        self.target = self.target.with_coefficients(fit.coefficients)
        metrics = self._metrics["train" if self.model.training else "eval"]
        rows = zip(self.target.features, fit.coefficients, fit.proposal_moments, fit.moments, strict=True)
        for name, value, base, target in rows:
            metrics[f"moments/{name.__name__}/lambda"].append(value)
            metrics[f"moments/{name.__name__}/base"].append(base)
            metrics[f"moments/{name.__name__}/target"].append(target)
        metrics["moments/effective_samples"].append(fit.effective_samples)

    def _moment_samples(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """φ `[N, K]`, log a·b − log q `[N]` and prompt keys `[N]` of `moment_samples` completions.

        The prompts are a random part of the data, with about `_SAMPLES_PER_PROMPT` completions each: λ is matched
        within each prompt, where a few samples would not show a rare feature.
        """
        generator = torch.Generator().manual_seed(self.args.seed + self.accelerator.process_index)
        group = self.num_generations if self.model.training else self.num_generations_eval
        groups = max(1, self.args.per_device_train_batch_size * self.args.steps_per_generation // group)
        wanted = self.args.moment_samples // (_SAMPLES_PER_PROMPT * self.accelerator.num_processes)
        pool = torch.randperm(len(self.train_dataset), generator=generator)[: max(groups, wanted)].tolist()
        turn = itertools.cycle(pool)
        features, weights, prompts, drawn = [], [], [], 0
        while drawn < self.args.moment_samples:
            chosen = list(itertools.islice(turn, groups))
            inputs = [dict(self.train_dataset[number]) for number in chosen for _ in range(group)]
            batch = super()._generate_and_score_completions(inputs)
            samples = self._sample_log_probs(batch)
            log_weight = self.accelerator.gather(samples["log_base"] - samples["log_proposal"])
            weights.append(log_weight + self.target.log_potential(self._scores, without_features=True))
            features.append(self._scores[:, len(self.target.scorers) :])
            prompts.append(self.accelerator.gather(prompt_keys(batch)))
            drawn += len(log_weight)
        return tuple(torch.cat(parts).cpu().numpy() for parts in (features, weights, prompts))

    # ---------------------------------------------------------------- loss
    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        r"""The mean over samples x ~ q of the score-function surrogate

            (π(x)/q(x)) · ( f′(π(x)/p(x)) − baseline ) · log π(x)

        whose gradient is that of D_f(π‖p), with p = P/Ẑ (arXiv:2302.08215, theorem 1). The factors before log π are
        detached. log P, Ẑ, log q and the baseline came with the rollouts (`_score_samples`); π is the policy of this
        micro-step. Nothing of `GRPOTrainer`'s loss is used.
        """
        args = self.args
        # 1. log π of the completions, in one forward with gradient.
        per_token, entropy, aux_loss = self._get_per_token_logps_and_entropies(
            model, *model_inputs(inputs), compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        mask, skipped = token_mask(inputs), inputs["skipped"]
        log_policy = (per_token * mask).sum(-1)
        # 2. log t = log π/p, and the importance weight log π/q, capped; the samples of a prompt whose Ẑ is 0 get
        #    weight 0.
        now = log_policy.detach().double()
        log_t, log_weight = now - inputs["log_target"], now - inputs["log_proposal"]
        cap = math.log(args.importance_weight_cap) if args.importance_weight_cap else math.inf
        capped = log_weight > cap
        log_weight = log_weight.clamp(max=cap)
        # 3. The coefficient of each sample times log π, with the baseline fixed at rollout time.
        losses = f_dpg_loss(
            log_policy,
            log_t.masked_fill(skipped, 0.0),
            self.divergence,
            log_weight=log_weight.masked_fill(skipped, -math.inf),
            baseline=inputs["baseline"],
            clip=args.pseudo_reward_clip,
            max_exponent=args.max_exponent,
        ) / args.length_normalizer  # fmt: skip
        loss = losses.mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss
        # 4. What is logged of each sample.
        scores = {f"score/{n}": c for n, c in zip(self.reward_func_names, inputs["scores"].unbind(1), strict=True)}
        self.record_examples({
            "loss": losses, "log_t": log_t, "log_weight": log_weight, "weight_capped": capped,
            "log_policy": log_policy, "entropy": (entropy * mask).sum(-1), "tokens": mask.sum(-1),
            "log_base": inputs["log_base"], "log_z": inputs["log_z"], "skipped": skipped, **scores,
            **prompt_columns(inputs["prompt"]),
            **slope_columns(self.divergence, log_t, args.max_exponent, args.pseudo_reward_clip),
        })  # fmt: skip
        # 5. GRPOTrainer tells Trainer that the loss is scaled for accumulation already.
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1.0)

    def reduce_examples(self, examples: dict[str, Tensor], mode: str) -> dict[str, float]:
        """See `fdiv.alignment.f_dpg.metrics.f_dpg_metrics`; and the diversity of the last generation's completions."""
        metrics = f_dpg_metrics(
            examples,
            get_divergence(self.args.divergence),
            self.reward_func_names,
            exact_z=self.args.z_estimate == "given",
        )
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in self._logs["completion"]]
        return metrics | diversity(texts, max_texts=self.args.diversity_samples)

    # ---------------------------------------------------------------- checkpoints
    def save_method_state(self, folder: Path) -> None:
        """Z of each prompt, baseline, λ and proposal."""
        super().save_method_state(folder)
        if self.args.should_save:
            state = {
                "z": self.estimates.state_dict(),
                "baseline": list(self._recent_slopes),
                "coefficients": self.target.coefficients,
                "last_check": self._last_check,
                "proposal": None if self._adaptive is None else self._adaptive.state_dict(),
            }
            (folder / _STATE_FILE).write_text(json.dumps(state))
            if self._adaptive is not None:
                self._adaptive.save_weights(folder / _PROPOSAL_FILE)

    def load_method_state(self, folder: Path) -> None:
        """Read them back."""
        super().load_method_state(folder)
        state = json.loads((folder / _STATE_FILE).read_text())
        self.estimates.load_state_dict(state["z"])
        self._recent_slopes.extend(state["baseline"])
        if state["coefficients"] is not None:
            self.target = self.target.with_coefficients(state["coefficients"])
        self._last_check = state["last_check"]
        if self._adaptive is not None and state["proposal"] is not None:
            self._adaptive.load_state_dict(state["proposal"])
            self._adaptive.load_weights(folder / _PROPOSAL_FILE)
