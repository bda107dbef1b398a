"""What a recipe can name: training methods, builders of data, evaluations, and the kinds of `fdiv eval`.

Each table maps a name to a `module:attribute` path, imported only when a recipe asks for it. Adding a method, a
builder or an evaluation is one line here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fdiv.errors import RecipeError

__all__ = ["EVALUATIONS", "EVAL_COMMANDS", "METHODS", "PREPARE", "Method", "load", "lookup"]


@dataclass(frozen=True)
class Method:
    """One training method.

    Args:
        config: `module:Class` of the config dataclass, a subclass of `transformers.TrainingArguments`.
        trainer: `module:Class` of the trainer, constructed as TRL's: `(model, args=, train_dataset=, eval_dataset=,
            processing_class=, quantization_config=, peft_config=, callbacks=)`.
        family: `alignment`, `unlearning` or `rl`.
        title: A line for listings.
        paper: Where the method comes from, as `arXiv:NUMBER`.
        columns: Columns the training rows must have.
        optional_columns: Columns that are used when they are there.
        check_divergence: `module:function` that raises ValueError, with the reason, for an unlawful divergence.
    """

    config: str
    trainer: str
    family: str
    title: str
    paper: str
    columns: tuple[str, ...] = ()
    optional_columns: tuple[str, ...] = ()
    check_divergence: str | None = None


METHODS: dict[str, Method] = {
    "f_dpo": Method(
        config="fdiv.alignment.f_dpo.config:FDPOConfig",
        trainer="fdiv.alignment.f_dpo.trainer:FDPOTrainer",
        family="alignment",
        title="direct preference optimisation under any f-divergence",
        paper="arXiv:2309.16240",
        columns=("chosen", "rejected"),
        optional_columns=("prompt",),
        check_divergence="fdiv.alignment.f_dpo.loss:check_f_dpo_divergence",
    ),
    "d2o": Method(
        config="fdiv.alignment.d2o.config:D2OConfig",
        trainer="fdiv.alignment.d2o.trainer:D2OTrainer",
        family="alignment",
        title="distributional dispreference optimisation: rejected answers against own samples",
        paper="arXiv:2403.03419",
        columns=("prompt", "rejected"),
        optional_columns=("anchors",),
        check_divergence="fdiv.alignment.f_dpo.loss:check_f_dpo_divergence",
    ),
    "f_dpg": Method(
        config="fdiv.alignment.f_dpg.config:FDPGConfig",
        trainer="fdiv.alignment.f_dpg.trainer:FDPGTrainer",
        family="alignment",
        title="distributional policy gradient to a target density, every f-divergence",
        paper="arXiv:2302.08215",
        columns=("prompt",),
        optional_columns=("log_z",),
        check_divergence="fdiv.alignment.f_dpg.loss:check_f_dpg_divergence",
    ),
    "dph": Method(
        config="fdiv.rl.dph.config:DPHConfig",
        trainer="fdiv.rl.dph.trainer:DPHTrainer",
        family="rl",
        title="verifiable rewards with rehearsal of reference samples, every f-divergence",
        paper="arXiv:2509.07430",
        columns=("prompt",),
        check_divergence="fdiv.rl.dph.loss:check_rehearsal_divergence",
    ),
    "flat": Method(
        config="fdiv.unlearning.methods.flat:FLATConfig",
        trainer="fdiv.unlearning.methods.flat:FLATTrainer",
        family="unlearning",
        title="unlearning by loss adjustment with forget data only, every f-divergence",
        paper="arXiv:2410.11143",
        check_divergence="fdiv.divergences:get_divergence",
    ),
    "grad_ascent": Method(
        config="fdiv.unlearning.methods.grad_ascent:GradAscentConfig",
        trainer="fdiv.unlearning.methods.grad_ascent:GradAscentTrainer",
        family="unlearning",
        title="gradient ascent on the forget answers",
        paper="arXiv:2210.01504",
    ),
    "grad_diff": Method(
        config="fdiv.unlearning.methods.grad_diff:GradDiffConfig",
        trainer="fdiv.unlearning.methods.grad_diff:GradDiffTrainer",
        family="unlearning",
        title="gradient ascent on forget, descent on retain answers",
        paper="arXiv:2203.12817",
    ),
    "kl_retain": Method(
        config="fdiv.unlearning.methods.kl_retain:KLRetainConfig",
        trainer="fdiv.unlearning.methods.kl_retain:KLRetainTrainer",
        family="unlearning",
        title="gradient ascent with a divergence from the reference on retain answers",
        paper="arXiv:2401.06121",
    ),
    "npo": Method(
        config="fdiv.unlearning.methods.npo:NPOConfig",
        trainer="fdiv.unlearning.methods.npo:NPOTrainer",
        family="unlearning",
        title="negative preference optimisation",
        paper="arXiv:2404.05868",
    ),
    "simnpo": Method(
        config="fdiv.unlearning.methods.simnpo:SimNPOConfig",
        trainer="fdiv.unlearning.methods.simnpo:SimNPOTrainer",
        family="unlearning",
        title="NPO without a reference, length-normalised",
        paper="arXiv:2410.07163",
    ),
    "idk_dpo": Method(
        config="fdiv.unlearning.methods.idk_dpo:IdkDPOConfig",
        trainer="fdiv.unlearning.methods.idk_dpo:IdkDPOTrainer",
        family="unlearning",
        title="f-DPO of a refusal over the forget answer",
        paper="arXiv:2401.06121",
        check_divergence="fdiv.alignment.f_dpo.loss:check_f_dpo_divergence",
    ),
    "alt_po": Method(
        config="fdiv.unlearning.methods.alt_po:AltPOConfig",
        trainer="fdiv.unlearning.methods.alt_po:AltPOTrainer",
        family="unlearning",
        title="f-DPO of a made-up answer over the forget answer",
        paper="arXiv:2409.13474",
        check_divergence="fdiv.alignment.f_dpo.loss:check_f_dpo_divergence",
    ),
    "rmu": Method(
        config="fdiv.unlearning.methods.rmu:RMUConfig",
        trainer="fdiv.unlearning.methods.rmu:RMUTrainer",
        family="unlearning",
        title="steer one layer's activations to a random vector",
        paper="arXiv:2403.03218",
    ),
    "undial": Method(
        config="fdiv.unlearning.methods.undial:UNDIALConfig",
        trainer="fdiv.unlearning.methods.undial:UNDIALTrainer",
        family="unlearning",
        title="self-distillation with the answer's logit lowered",
        paper="arXiv:2402.10052",
    ),
    "ce_u": Method(
        config="fdiv.unlearning.methods.ce_u:CEUConfig",
        trainer="fdiv.unlearning.methods.ce_u:CEUTrainer",
        family="unlearning",
        title="cross-entropy to the own distribution without the answer token",
        paper="arXiv:2503.01224",
    ),
    "wga": Method(
        config="fdiv.unlearning.methods.wga:WGAConfig",
        trainer="fdiv.unlearning.methods.wga:WGATrainer",
        family="unlearning",
        title="gradient ascent weighted by token probability",
        paper="arXiv:2502.19301",
    ),
    "sat_imp": Method(
        config="fdiv.unlearning.methods.sat_imp:SatImpConfig",
        trainer="fdiv.unlearning.methods.sat_imp:SatImpTrainer",
        family="unlearning",
        title="gradient ascent weighted by saturation and importance",
        paper="arXiv:2505.11953",
    ),
    "pdu": Method(
        config="fdiv.unlearning.methods.pdu:PDUConfig",
        trainer="fdiv.unlearning.methods.pdu:PDUTrainer",
        family="unlearning",
        title="flattened logits under a constraint on the retain loss",
        paper="arXiv:2506.05314",
    ),
    "jensun": Method(
        config="fdiv.unlearning.methods.jensun:JensUnConfig",
        trainer="fdiv.unlearning.methods.jensun:JensUnTrainer",
        family="unlearning",
        title="token-level divergences to a refusal pattern and to the reference",
        paper="arXiv:2509.02820",
        check_divergence="fdiv.unlearning.losses:check_one_hot_divergence",
    ),
}
"""`method:` of a recipe."""

PREPARE: dict[str, str] = {
    "arithmetic": "fdiv.recipes.tasks.arithmetic:ArithmeticTaskConfig",
    "chinook": "fdiv.recipes.tasks.sql.chinook:ChinookTaskConfig",
    "tiny_texts": "fdiv.recipes.tasks.tiny.texts:TinyTextsConfig",
    "empty_prompts": "fdiv.recipes.tasks.tiny.texts:EmptyPromptsConfig",
    "tiny_preferences": "fdiv.recipes.tasks.tiny.preferences:TinyPreferencesConfig",
    "tofu_preferences": "fdiv.recipes.tasks.tofu.preferences:TofuPreferencesConfig",
    "rehearsal": "fdiv.recipes.tasks.rehearsal:RehearsalConfig",
    "hh_negatives": "fdiv.recipes.tasks.negatives.hh:HHNegativesConfig",
    "safe_rlhf_negatives": "fdiv.recipes.tasks.negatives.safe_rlhf:SafeRLHFNegativesConfig",
    "tiny_authors": "fdiv.recipes.tasks.tiny.authors:TinyAuthorsConfig",
    "novels_unlearning": "fdiv.recipes.tasks.novels.unlearning:NovelsUnlearningConfig",
    "tofu_memorised": "fdiv.recipes.tasks.tofu.memorised:TofuMemorisedConfig",
    "tofu_unlearning": "fdiv.recipes.tasks.tofu.unlearning:TofuUnlearningConfig",
}
"""`prepare: {name: …}`: a dataclass with `build(output_dir) -> dict` of the recipe keys it settles."""

EVALUATIONS: dict[str, str] = {
    "target": "fdiv.alignment.f_dpg.evaluation:TargetEvalConfig",
    "preferences": "fdiv.eval.preferences.evaluation:PreferencesEvalConfig",
    "passk": "fdiv.eval.pass_at_k.evaluation:PassKEvalConfig",
    "tofu": "fdiv.eval.tofu.evaluation:TofuEvalConfig",
    "muse": "fdiv.eval.muse.evaluation:MuseEvalConfig",
    "tiny_world": "fdiv.recipes.tasks.tiny.optimum:TinyWorldEvalConfig",
    "answer_likelihood": "fdiv.eval.preferences.answer_likelihood:AnswerLikelihoodConfig",
}
"""`eval: {name: …}`: a dataclass with `evaluate(model, tokenizer, datasets, context) -> dict[str, float | None]`.

Class attributes it may carry: `summary_metrics` (names for the end-of-run table, in order; all when absent),
`lower_is_better` (names for which smaller is an improvement), `frontier` ((divergence metric, reward metric)).
"""

EVAL_COMMANDS: dict[str, str] = {
    "preferences": "fdiv.eval.preferences.command:command",
    "passk": "fdiv.eval.pass_at_k.command:command",
    "tofu": "fdiv.eval.tofu.command:command",
    "muse": "fdiv.eval.muse.command:command",
    "lm_eval": "fdiv.eval.lm_eval.command:command",
}
"""`fdiv eval KIND`: an object with `add_arguments(parser)` and `run(args) -> int`."""


def load(path: str) -> Any:
    """Import `module:attribute`."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def lookup(table: Mapping[str, Any], name: object, what: str, origin: str) -> Any:
    """`table[name]`; a `RecipeError` that lists the names and the nearest one when it is not there."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(table))}"
    raise RecipeError(f"{origin}: unknown {what} {name!r}; {hint}")
