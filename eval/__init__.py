"""Evaluation: one scoring pass, one generation pass, and the metrics on top of them.

The metrics are pure functions of per-item values and imported with the package; evaluations, which need transformers,
are imported on first use. `fdiv eval tofu`, `fdiv eval muse`, `fdiv eval lm_eval`, `fdiv eval preferences` and
`fdiv eval passk` are the same from the shell.
"""

if __name__ != "fdiv.eval":
    raise ImportError("this folder is installed as fdiv.eval: use `import fdiv.eval`, not `import eval`")

from fdiv import lazy
from fdiv.eval.benchmark.presets import PRESETS, Preset, get_preset
from fdiv.eval.metrics.membership import auc, gradnorm_score, min_k_plus_plus_score, min_k_score, privleak, zlib_score
from fdiv.eval.metrics.memorization import exact_memorization, extraction_strength
from fdiv.eval.metrics.text_overlap import ngram_entropy, rouge_scores
from fdiv.eval.metrics.truth import (
    closer_to_one,
    forget_quality,
    knowledge_share,
    model_utility,
    option_probability,
    sequence_probability,
    true_better,
    truth_ratio,
)
from fdiv.eval.pass_at_k.metrics import (
    bootstrap_standard_error,
    g_pass_at_k,
    keep_and_explore,
    majority_at_n,
    mean_at_n,
    mg_pass_at_k,
    pass_at_k,
    pass_hat_k,
)

_LAZY = {
    "EvalContext": "fdiv.evaluation",
    "EvalLog": "fdiv.eval.benchmark.log",
    "MuseEvalConfig": "fdiv.eval.muse.evaluation",
    "MuseEvaluation": "fdiv.eval.muse.evaluation",
    "PassKEvalConfig": "fdiv.eval.pass_at_k.evaluation",
    "TofuEvalConfig": "fdiv.eval.tofu.evaluation",
    "TofuEvaluation": "fdiv.eval.tofu.evaluation",
    "aggregate_muse": "fdiv.eval.muse.aggregate",
    "aggregate_tofu": "fdiv.eval.tofu.aggregate",
    "generate_texts": "fdiv.inference.greedy",
    "read_eval_log": "fdiv.eval.benchmark.log",
    "score_texts": "fdiv.inference.scoring",
    "write_eval_log": "fdiv.eval.benchmark.log",
}
"""Where the names that need more than numpy are."""


__getattr__, __dir__ = lazy.attach(__name__, _LAZY)


__all__ = [
    "PRESETS",
    "EvalContext",
    "EvalLog",
    "MuseEvalConfig",
    "MuseEvaluation",
    "PassKEvalConfig",
    "Preset",
    "TofuEvalConfig",
    "TofuEvaluation",
    "aggregate_muse",
    "aggregate_tofu",
    "auc",
    "bootstrap_standard_error",
    "closer_to_one",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "g_pass_at_k",
    "generate_texts",
    "get_preset",
    "gradnorm_score",
    "keep_and_explore",
    "knowledge_share",
    "majority_at_n",
    "mean_at_n",
    "mg_pass_at_k",
    "min_k_plus_plus_score",
    "min_k_score",
    "model_utility",
    "ngram_entropy",
    "option_probability",
    "pass_at_k",
    "pass_hat_k",
    "privleak",
    "read_eval_log",
    "rouge_scores",
    "score_texts",
    "sequence_probability",
    "true_better",
    "truth_ratio",
    "write_eval_log",
    "zlib_score",
]
