"""What a recipe or the command line can name: methods, builders of data, evaluations, rewards, advantages.

Each table maps a name to the `module:attribute` that is imported when the name is looked up; in place of a name, every
one takes `module:attribute` of your own. A method's title, paper, columns, options and check stand on its trainer
class (`fdiv.training.trainer.ObjectiveTrainerMixin`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fdiv.named import Table, bind_arguments, load, lookup, split_spec

__all__ = [
    "ATTACKS",
    "EVALUATIONS",
    "EVAL_COMMANDS",
    "METHODS",
    "PREPARE",
    "REWARDS",
    "TASKS",
    "TEACHERS",
    "Method",
    "build_reward",
    "load",
    "lookup",
]


def _is_method(found: Any) -> bool:
    return inspect.isclass(found) and all(hasattr(found, name) for name in ("config_class", "columns", "step_shape"))


METHODS = Table(
    "method",
    "a trainer class, derived from fdiv.training.ObjectiveTrainerMixin, with a config_class",
    _is_method,
    {
        "f_dpo": "fdiv.alignment.f_dpo.trainer:FDPOTrainer",
        "d2o": "fdiv.alignment.d2o.trainer:D2OTrainer",
        "f_dpg": "fdiv.alignment.f_dpg.trainer:FDPGTrainer",
        "dph": "fdiv.rl.dph.trainer:DPHTrainer",
        "f_distill": "fdiv.distillation.f_distill.trainer:FDistillTrainer",
        "flat": "fdiv.unlearning.methods.flat:FLATTrainer",
        "grad_ascent": "fdiv.unlearning.methods.grad_ascent:GradAscentTrainer",
        "grad_diff": "fdiv.unlearning.methods.grad_diff:GradDiffTrainer",
        "kl_retain": "fdiv.unlearning.methods.kl_retain:KLRetainTrainer",
        "npo": "fdiv.unlearning.methods.npo:NPOTrainer",
        "simnpo": "fdiv.unlearning.methods.simnpo:SimNPOTrainer",
        "idk_dpo": "fdiv.unlearning.methods.idk_dpo:IdkDPOTrainer",
        "alt_po": "fdiv.unlearning.methods.alt_po:AltPOTrainer",
        "rmu": "fdiv.unlearning.methods.rmu:RMUTrainer",
        "undial": "fdiv.unlearning.methods.undial:UNDIALTrainer",
        "ce_u": "fdiv.unlearning.methods.ce_u:CEUTrainer",
        "wga": "fdiv.unlearning.methods.wga:WGATrainer",
        "sat_imp": "fdiv.unlearning.methods.sat_imp:SatImpTrainer",
        "pdu": "fdiv.unlearning.methods.pdu:PDUTrainer",
        "jensun": "fdiv.unlearning.methods.jensun:JensUnTrainer",
        "jensun_pp": "fdiv.unlearning.methods.jensun_pp:JensUnPPTrainer",
        "shred": "fdiv.unlearning.methods.shred:SHREDTrainer",
    },
)
"""`method:` of a recipe."""


def _is_dataclass_with(method: str) -> Callable[[Any], bool]:
    def is_one(found: Any) -> bool:
        return inspect.isclass(found) and dataclasses.is_dataclass(found) and callable(getattr(found, method, None))

    return is_one


TASKS = Table(
    "builder",
    "a dataclass with a method `build(output_dir) -> dict`",
    _is_dataclass_with("build"),
    {
        "arithmetic": "fdiv.recipes.tasks.arithmetic:ArithmeticTaskConfig",
        "chinook": "fdiv.recipes.tasks.sql.chinook:ChinookTaskConfig",
        "tiny_texts": "fdiv.recipes.tasks.tiny.texts:TinyTextsConfig",
        "empty_prompts": "fdiv.recipes.tasks.tiny.texts:EmptyPromptsConfig",
        "tiny_distillation": "fdiv.recipes.tasks.tiny.distillation:TinyDistillationConfig",
        "tiny_preferences": "fdiv.recipes.tasks.tiny.preferences:TinyPreferencesConfig",
        "tofu_preferences": "fdiv.recipes.tasks.tofu.preferences:TofuPreferencesConfig",
        "rehearsal": "fdiv.recipes.tasks.rehearsal:RehearsalConfig",
        "hh_negatives": "fdiv.recipes.tasks.negatives.hh:HHNegativesConfig",
        "safe_rlhf_negatives": "fdiv.recipes.tasks.negatives.safe_rlhf:SafeRLHFNegativesConfig",
        "tiny_authors": "fdiv.recipes.tasks.tiny.authors:TinyAuthorsConfig",
        "novels_unlearning": "fdiv.recipes.tasks.novels.unlearning:NovelsUnlearningConfig",
        "taught": "fdiv.recipes.tasks.taught:TaughtConfig",
        "sampled_preferences": "fdiv.recipes.tasks.sampled_preferences:SampledPreferencesConfig",
        "thinned_student": "fdiv.recipes.tasks.novels.distillation:ThinnedStudentConfig",
        "tofu_distillation": "fdiv.recipes.tasks.tofu.distillation:TofuDistillationConfig",
        "own_rows": "fdiv.unlearning.request.builder:OwnRowsConfig",
        "tofu_memorised": "fdiv.recipes.tasks.tofu.memorised:TofuMemorisedConfig",
        "tofu_unlearning": "fdiv.recipes.tasks.tofu.unlearning:TofuUnlearningConfig",
    },
)
"""`prepare: {name: …}`: a dataclass with `build(output_dir) -> dict` of the recipe keys it sets."""

TEACHERS = Table(
    "teacher",
    "a dataclass derived from fdiv.distillation.teachers.Teacher",
    lambda found: _is_dataclass_with("read")(found) and _is_dataclass_with("score")(found),
    {
        "local": "fdiv.distillation.teachers.local:LocalTeacher",
        "start": "fdiv.distillation.teachers.own:StartTeacher",
        "ema": "fdiv.distillation.teachers.own:EMATeacher",
        "cache": "fdiv.distillation.teachers.cached:CachedTeacher",
        "server": "fdiv.distillation.teachers.served:ServedTeacher",
    },
)
"""`teacher:` of distillation."""

PREPARE = TASKS  # its name in release 0.1

# Name → (what `eval: {name: …}` of a recipe makes, what `fdiv eval NAME` runs).
_EVALUATIONS: dict[str, tuple[str | None, str | None]] = {
    "target": ("fdiv.alignment.f_dpg.evaluation:TargetEvalConfig", None),
    "to_teacher": ("fdiv.distillation.evaluation:ToTeacherEvalConfig", None),
    "preferences": ("fdiv.eval.preferences.evaluation:PreferencesEvalConfig", "fdiv.eval.preferences.command"),
    "passk": ("fdiv.eval.pass_at_k.evaluation:PassKEvalConfig", "fdiv.eval.pass_at_k.command"),
    "tofu": ("fdiv.eval.tofu.evaluation:TofuEvalConfig", "fdiv.eval.tofu.command"),
    "muse": ("fdiv.eval.muse.evaluation:MuseEvalConfig", "fdiv.eval.muse.command"),
    "unlearning": ("fdiv.eval.unlearning.evaluation:UnlearningEvalConfig", "fdiv.eval.unlearning.command"),
    "tiny_world": ("fdiv.recipes.tasks.tiny.optimum:TinyWorldEvalConfig", None),
    "answer_likelihood": ("fdiv.eval.preferences.answer_likelihood:AnswerLikelihoodConfig", None),
    "benchmark": ("fdiv.eval.layouts.evaluation:BenchmarkEvalConfig", "fdiv.eval.layouts.command"),
    "lm_eval": ("fdiv.eval.lm_eval.evaluation:LmEvalConfig", "fdiv.eval.lm_eval.command"),
}

EVALUATIONS = Table(
    "evaluation",
    "a dataclass with a method `evaluate(model, tokenizer, datasets, context) -> dict`",
    _is_dataclass_with("evaluate"),
    {name: config for name, (config, _) in _EVALUATIONS.items() if config is not None},
)
"""`eval: {name: …}`: a dataclass with `evaluate(model, tokenizer, datasets, context) -> dict[str, float | None]`.

Class attributes it may carry: `summary_metrics` (names for the end-of-run table, in order; all when absent),
`lower_is_better` (names that the glossary does not know, `fdiv.report.metrics`, for which smaller is an improvement),
`frontier` ((divergence metric, reward metric)).
"""


def _is_command(found: Any) -> bool:
    return callable(getattr(found, "add_arguments", None)) and callable(getattr(found, "run", None))


EVAL_COMMANDS = Table(
    "evaluation",
    "a module with `add_arguments(parser)` and `run(args) -> int`",
    _is_command,
    {name: module for name, (_, module) in _EVALUATIONS.items() if module is not None},
)
"""`fdiv eval NAME`: a module with `add_arguments(parser)` and `run(args) -> int`; its docstring is the help.

It may have `one_process(args)`: why several processes cannot share the evaluation, None where they can.
"""

REWARDS = Table(
    "reward",
    "a reward function with TRL's signature, or a class or function that makes one",
    callable,
    {
        "math": "fdiv.rl.rewards.math.reward:MathReward",
        "sql": "fdiv.rl.rewards.sql.reward:SQLReward",
        "code": "fdiv.rl.rewards.code_reward:CodeReward",
        "exact": "fdiv.eval.pass_at_k.scoring:exact_match",
        "classifier": "fdiv.alignment.scorers:classifier",
        "compiles": "fdiv.alignment.scorers:compiles",
        "contains_words": "fdiv.alignment.scorers:contains_words",
        "sentiment": "fdiv.alignment.scorers:lexicon_sentiment",
        "vader": "fdiv.alignment.scorers:vader",
    },
)
"""What scores a completion: `reward:`, `scorers:`, `harmfulness_scorer:` of a recipe, `--scorer` of `fdiv eval passk`.

A function with TRL's signature, `(prompts, completions, **columns) -> list[float]`, or what makes one of the keys.
"""


ATTACKS = Table(
    "attack",
    "a function (model, tokenizer, rows, *, seed) -> Attacked, or a class or function that makes one",
    callable,
    {
        "relearn": "fdiv.eval.unlearning.attacks.relearning:Relearning",
        "relearn_unrelated": "fdiv.eval.unlearning.attacks.relearning:relearn_unrelated",
        "int8": "fdiv.eval.unlearning.attacks.quantization:int8",
        "int4": "fdiv.eval.unlearning.attacks.quantization:int4",
        "nf4": "fdiv.eval.unlearning.attacks.quantization:nf4",
        "paraphrase": "fdiv.eval.unlearning.attacks.prompts:Paraphrase",
        "prefix": "fdiv.eval.unlearning.attacks.prompts:Prefix",
        "answer_prefix": "fdiv.eval.unlearning.attacks.prompts:AnswerPrefix",
        "priming": "fdiv.eval.unlearning.attacks.prompts:Priming",
        "noise": "fdiv.eval.unlearning.attacks.noise:Noise",
        "translation": "fdiv.eval.unlearning.attacks.rewriting:Translation",
        "sampling": "fdiv.eval.unlearning.attacks.sampling:SampledAnswers",
        "adapter_removal": "fdiv.eval.unlearning.attacks.adapters:AdapterRemoval",
        "adapter_scaling": "fdiv.eval.unlearning.attacks.adapters:AdapterScaling",
    },
)
"""`attacks:` of an evaluation of unlearning: what tries to bring the forgotten rows back."""


Reward = Callable[..., Sequence[float | None]]


def build_reward(spec: str | Mapping[str, Any] | Reward, what: str = "reward") -> Reward:
    """A reward function from a callable, a name, or a mapping `{name: …, argument: value, …}`.

    A name is one of `REWARDS` or `module:attribute` of your own: a reward function with TRL's signature, which has no
    further keys, or a class or function that makes one of them. `as` renames it in the logs.

    Args:
        spec: see above; a callable is returned unchanged. what: the word for it in errors.

    Raises:
        ValueError: an unknown name, an unknown or missing argument; what the class or function refuses.
    """
    if callable(spec):
        return spec
    name, keys = split_spec(spec, what)
    made = REWARDS.find(name, what=what)
    shown, title = keys.pop("as", None), f"{what} {name!r}"
    if _scores(made):
        if keys:
            raise ValueError(f"{title} takes no {', '.join(keys)} here: it is a reward function, which has no keys")
        return made if shown is None else _renamed(made, shown)
    takes_name = "name" in inspect.signature(made).parameters
    keys = {**keys, "name": shown} if shown is not None and takes_name else keys
    bind_arguments(made, keys, title)
    reward = made(**keys)
    if not callable(reward):
        raise ValueError(f"{title} made a {type(reward).__name__}: it must make a function with TRL's signature")
    return reward if shown is None or takes_name else _renamed(reward, shown)


def _scores(found: Callable[..., Any]) -> bool:
    """Whether it is a reward function itself: it takes `completions`, by name or among `**columns`."""
    if inspect.isclass(found):
        return False
    parameters = inspect.signature(found).parameters
    return "completions" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _renamed(reward: Reward, shown: str) -> Reward:
    @functools.wraps(reward)
    def renamed(**columns: Any) -> Sequence[float | None]:
        return reward(**columns)

    renamed.__name__ = shown
    return renamed


def Method(*, trainer: str, **_: Any) -> str:
    """What `METHODS` held in release 0.1; what its further arguments said stands on the trainer class now."""
    return trainer
