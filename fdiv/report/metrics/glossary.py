"""The glossary: a line for every metric that an evaluation or a trainer of this package produces."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["GLOSSARY", "LABELLED", "Better", "Metric"]

Better = Literal["higher", "lower", "zero"]


@dataclass(frozen=True)
class Metric:
    """An entry.

    Args:
        name: Of the metric. `*` stands for any text, `K` for a number.
        meaning: One line.
        range: The values it can take, with their unit.
        better: Which way is better; None: neither, it says what happens.
        method: The method in whose runs the name means this; None: all that have no entry of their own.
    """

    name: str
    meaning: str
    range: str
    better: Better | None = None
    method: str | None = None


_SHARE = "0 to 1"
_NATS = "≥ 0 nats"
_ANY_NATS = "any, nats"
_LOG_PROB = "≤ 0 nats"
_D_F = "0 to f(0⁺) + f′(∞)"
_ROUGE = "0 to 1; 0 to 100 under `muse_original`"

_RUN = (
    Metric("loss", "what the optimizer minimises; comparable within one objective only", "any"),
    Metric("train_loss", "mean of the training loss over all steps", "any"),
    Metric("grad_norm", "norm of the gradient before clipping", "≥ 0"),
    Metric("learning_rate", "learning rate of the step", "≥ 0"),
    Metric("aux_loss", "load-balancing loss of a mixture of experts", "≥ 0"),
    Metric("entropy", "entropy of the policy's next token, mean over tokens", _NATS),
    Metric(
        "mean_token_accuracy", "share of tokens of the chosen (or trained) answers that the policy ranks first", _SHARE
    ),
    Metric(
        "clamped_fraction",
        "share of examples with an exponent beyond `max_exponent`, where the overflow policy acts",
        _SHARE,
    ),
    Metric("best_metric", "best value of `metric_for_best_model` during training", "that of the metric"),
    Metric("best_epoch", "epoch of the best evaluation during training", "≥ 0"),
    Metric(
        "selection",
        "score that chooses the epoch: forget quality above the utility floor, negative below it",
        "-1 to 1",
        "higher",
    ),
    Metric("selection_by_epoch", "`selection` of each epoch", "-1 to 1", "higher"),
    Metric("step", "optimizer steps", "≥ 0"),
    Metric("epoch", "passes over the training data", "≥ 0"),
    Metric("num_tokens", "tokens trained on", "≥ 0"),
    Metric("num_input_tokens_seen", "tokens trained on", "≥ 0"),
    Metric("total_flos", "floating-point operations, estimated", "≥ 0"),
    Metric("step_time", "seconds of a step", "≥ 0 s"),
    Metric("runtime", "seconds of an evaluation", "≥ 0 s"),
    Metric("*_per_second", "speed", "≥ 0"),
    Metric("steps", "optimizer steps of the run", "≥ 0"),
    Metric("*_runtime", "seconds of training or evaluation", "≥ 0 s"),
    Metric("train_seconds", "seconds of training", "≥ 0 s"),
    Metric("wall_seconds", "seconds of the run with its evaluations", "≥ 0 s"),
    Metric("cpu_seconds", "seconds of processor time", "≥ 0 s"),
    Metric("peak_mib", "largest memory of the process", "≥ 0 MiB"),
)

_DIVERGENCE = (
    Metric("divergence/*", "D_f(π‖π_ref) of the policy from its reference, by the named f", _D_F),
    Metric("divergence/*_to_pos", "D_f of the policy from the reference of the rejected answer", _D_F, method="d2o"),
    Metric("divergence/*_to_neg", "D_f of the policy from the reference of the anchors", _D_F, method="d2o"),
    Metric(
        "mean_f/*", "mean of f(π/π_ref) over rows of the data; they are no samples of π_ref, so no divergence", "any"
    ),
    Metric("log_ratio/*_pK", "quantile (5, 50 or 95 %) of log π/π_ref of the named answers", _ANY_NATS),
    Metric("density_weight/*_pK", "quantile (5, 50 or 95 %) of t·f″(t), t = π/π_ref: whom f listens to", "≥ 0"),
    Metric("divergence", "D_f(π‖π_ref) of the policy from its reference, f being the run's", _D_F),
    Metric(
        "divergence/*",
        "D_f(student‖teacher) of the next token, mean over tokens, by the named f",
        _D_F,
        "lower",
        method="f_distill",
    ),
    Metric("to_teacher/*", "D_f(student‖teacher) per token of held-out completions, by the named f", _D_F, "lower"),
    Metric("to_teacher/agreement", "share of held-out tokens where both would say the same", _SHARE, "higher"),
    Metric("teacher_entropy", "entropy of the teacher's next-token distribution, mean over tokens", _NATS),
    Metric("sinkhorn", "cost of carrying the student's distributions to the teacher's (Sinkhorn)", "0 to 2", "lower"),
    Metric(
        "sinkhorn_row_error",
        "how far the weights of the transport's rows are from 1; 0: enough iterations",
        "≥ 0",
        "zero",
    ),
    Metric("gate", "weight of the forward member of a gated divergence, mean over tokens", _SHARE),
    Metric("on_policy_fraction", "share of rows whose completion the student sampled itself", _SHARE),
    Metric(
        "log_ratio/tokens_pK",
        "quantile (5, 50 or 95 %) over answers of the mean log(student/teacher) per token",
        _ANY_NATS,
        method="f_distill",
    ),
    Metric(
        "density_weight/tokens_pK",
        "quantile (5, 50 or 95 %) over answers of the mean t·f″(t) per token, t = student/teacher",
        "≥ 0",
        method="f_distill",
    ),
    Metric("forward_kl", "KL(π_ref‖π) of the reference from the policy", _NATS),
    Metric("reverse_kl", "KL(π‖π_ref) of the policy from its reference", _NATS),
    Metric("reference_ess", "effective share of the reference's samples when weighted to the policy", _SHARE),
)

_PREFERENCES = (
    Metric("rewards/accuracies", "share of pairs whose implicit rewards are in the right order", _SHARE, "higher"),
    Metric(
        "rewards/margins",
        "implicit reward of the chosen answer (D²O: the anchors) less that of the rejected one",
        "any",
        "higher",
    ),
    Metric("rewards_raw/margins", "the same with β·log π/π_ref as reward, whatever f is", "any", "higher"),
    Metric("rewards/chosen", "implicit reward β·f′(π/π_ref) of the chosen answers", "any"),
    Metric("rewards/rejected", "implicit reward of the rejected answers (D²O: with α)", "any"),
    Metric("rewards/anchors", "implicit reward of the anchors, mean over those of a prompt", "any"),
    Metric("rewards_raw/*", "β·log π/π_ref of the named answers (D²O: α for the rejected)", "any"),
    Metric("logps/*", "log-probability of the named answers, summed over tokens", _LOG_PROB),
    Metric("logits/*", "mean logit of the named answers", "any"),
    Metric(
        "preference_accuracy",
        "share of pairs whose chosen answer is likelier per token, a tie counting ½",
        _SHARE,
        "higher",
    ),
    Metric("preference_accuracy_sum", "share of pairs whose chosen answer is likelier as a whole", _SHARE, "higher"),
    Metric(
        "reward_accuracy",
        "share of pairs whose implicit rewards are in the right order, a tie counting ½",
        _SHARE,
        "higher",
    ),
    Metric("reward_margin", "implicit reward of the chosen answer less that of the rejected one", "any", "higher"),
    Metric("reward_margin_raw", "the same with β·log π/π_ref as reward", "any", "higher"),
    Metric(
        "ece_length_normalised",
        "calibration error of the pair's likelihoods per token, read as a preference",
        _SHARE,
        "lower",
    ),
    Metric(
        "ece_margin",
        "calibration error of σ(reward margin) as the chance that the chosen answer is preferred",
        _SHARE,
        "lower",
    ),
    Metric("chosen_log_ratio", "mean log π/π_ref of the chosen answers", _ANY_NATS),
    Metric("rejected_log_ratio", "mean log π/π_ref of the rejected answers", _ANY_NATS),
    Metric("score", "mean score of own samples by the evaluation's scorer", "that of the scorer", "higher"),
)

_LIKELIHOOD = (
    Metric("*_rejected_log_prob", "log-probability of the rejected answers of a split", _LOG_PROB, "lower"),
    Metric("*_chosen_log_prob", "log-probability of the chosen answers of a split", _LOG_PROB, "higher"),
    Metric("*_rejected_change", "change of the rejected answers' log-probability since the start", _ANY_NATS, "lower"),
    Metric("*_chosen_change", "change of the chosen answers' log-probability since the start", _ANY_NATS, "higher"),
    Metric(
        "*_margin_change",
        "change of the chosen answers' log-probability less that of the rejected ones'",
        _ANY_NATS,
        "higher",
    ),
    Metric(
        "*_preference_accuracy", "share of a split's pairs whose chosen answer is likelier per token", _SHARE, "higher"
    ),
    Metric(
        "sample_start_log_prob",
        "log-probability per token of own samples under the start model; low: gibberish",
        _LOG_PROB,
    ),
    Metric("sample_distinct_2", "different word pairs over words in own samples", _SHARE, "higher"),
    Metric("sample_tokens", "tokens of an own sample", "≥ 0"),
    Metric("sample_harmfulness", "mean harmfulness of own samples by the scorer", "that of the scorer", "lower"),
    Metric("sample_harmful_share", "share of own samples that the scorer calls harmful", _SHARE, "lower"),
)

_D2O = (
    Metric("anchors/online", "share of prompts whose anchors the policy of this step sampled", _SHARE),
    Metric("anchors/mean_length", "tokens of an anchor", "≥ 0"),
    Metric("anchors/clipped_ratio", "share of anchors cut at the longest length", _SHARE),
    Metric("harmfulness/anchors", "mean harmfulness of the anchors by the scorer", "that of the scorer", "lower"),
    Metric("harmfulness/harmful_share", "share of anchors that the scorer calls harmful", _SHARE, "lower"),
    Metric("harmfulness/unscored", "anchors without a score", "≥ 0", "zero"),
)

_F_DPG = (
    Metric(
        "divergence/uncorrected_fraction",
        "share of prompts whose divergence has the bias of an estimated Z",
        _SHARE,
        "zero",
        "f_dpg",
    ),
    Metric("divergence/*", "D_f(π‖p) of the policy from the target, by the named f", _D_F, "lower", "f_dpg"),
    Metric("forward_kl", "KL(p‖π) of the target from the policy", _NATS, "lower", "f_dpg"),
    Metric(
        "reverse_kl",
        "KL(π‖p) of the policy from the target; null: π has samples that p rules out",
        _NATS,
        "lower",
        "f_dpg",
    ),
    Metric("total_variation", "total variation distance of policy and target", _SHARE, "lower", "f_dpg"),
    Metric(
        "jensen_shannon",
        "Jensen–Shannon divergence of policy and target, twice the textbook's",
        "0 to 2 log 2 nats",
        "lower",
        "f_dpg",
    ),
    Metric("score", "expectation under the policy of the target's first scorer", "that of the scorer", method="f_dpg"),
    Metric("score/*", "expectation under the policy of the named scorer", "that of the scorer", method="f_dpg"),
    Metric("log_ratio/target_pK", "quantile (5, 50 or 95 %) of log π/p over samples", _ANY_NATS, method="f_dpg"),
    Metric(
        "density_weight/target_pK",
        "quantile (5, 50 or 95 %) of t·f″(t), t = π/p, over samples: whom f listens to",
        "≥ 0",
        method="f_dpg",
    ),
    Metric("kl_to_base", "KL(π‖a) of the policy from the base model", _NATS),
    Metric("sequence_entropy", "entropy of whole completions", _NATS),
    Metric("moment_gap", "largest distance of an expectation from the one that the target asks for", "≥ 0", "lower"),
    Metric("moments/*/lambda", "coefficient λ of the named feature, which makes the target meet its moment", "any"),
    Metric("moments/*/base", "expectation of the named feature under the base model", "that of the feature"),
    Metric("moments/*/target", "expectation of the named feature under the fitted target", "that of the feature"),
    Metric("moments/effective_samples", "effective number of samples behind the fit of λ", "≥ 1", "higher"),
    Metric("z", "partition function Z of the target, mean over prompts", "≥ 0"),
    Metric("z_ess", "effective number of samples behind Z, mean over prompts", "≥ 0", "higher"),
    Metric("z/mean", "estimate of Z, mean over prompts", "≥ 0"),
    Metric("z/log_mean", "log of the estimate of Z, mean over prompts where it is not 0", _ANY_NATS),
    Metric("z/ess", "effective number of a generation's samples behind Z", "≥ 0", "higher"),
    Metric("z/skipped_prompts", "prompts of a generation without a sample in the target's support", "≥ 0", "zero"),
    Metric("z/skipped_fraction", "share of samples of such prompts, which do not train", _SHARE, "zero"),
    Metric("pseudo_reward", "expectation under the policy of the pseudo-reward -f′(π/p)", "any"),
    Metric("off_support_fraction", "share of the policy's samples that the target rules out", _SHARE, "lower"),
    Metric("clipped_fraction", "share of samples whose pseudo-reward was clipped", _SHARE),
    Metric("importance_weight/mean", "mean of π/q over samples; 1 where it is not capped", "≥ 0"),
    Metric("importance_weight/max", "largest π/q of a sample", "≥ 0"),
    Metric("importance_weight/ess_fraction", "effective share of the samples when weighted by π/q", _SHARE, "higher"),
    Metric("importance_weight/capped_fraction", "share of samples whose weight was capped", _SHARE),
    Metric(
        "proposal/improvement", "D(q‖p) - D(π‖p): how much closer to the target the policy is than its proposal", "any"
    ),
    Metric("proposal/replaced", "whether the policy replaced its proposal", "0 or 1"),
)

_DIVERSITY = (
    Metric("distinct_K", "different n-grams over words in samples", _SHARE, "higher"),
    Metric("self_bleu_K", "mean BLEU of a sample against all others; 1 is no diversity", _SHARE, "lower"),
    Metric("distinct_texts", "share of samples that differ from each other", _SHARE, "higher"),
)

_RL = (
    Metric("reward", "mean reward of the sampled completions", "that of the reward", "higher"),
    Metric("reward_std", "standard deviation of the reward within a group, mean over groups", "≥ 0"),
    Metric("frac_reward_zero_std", "share of groups with equal rewards, which teach nothing", _SHARE),
    Metric("rewards/*/mean", "mean of the named reward (f-DPG: score)", "that of the reward"),
    Metric("rewards/*/std", "standard deviation of the named reward", "≥ 0"),
    Metric("reward/unscored_fraction", "share of completions that no reward could score", _SHARE, "zero"),
    Metric("*/not_scored", "share of the completions that the named reward could not score", _SHARE, "zero"),
    Metric("advantage/skipped_fraction", "share of groups with too few scored completions", _SHARE, "zero"),
    Metric("kl", "KL penalty against the reference, mean over tokens", "any"),
    Metric("kl/*", "KL penalty against the reference by the named estimator", "any"),
    Metric("explore_loss", "clipped policy-gradient loss of the sampled completions", "any"),
    Metric("rehearsal/loss", "D_f on the rehearsal rows before its weight η", "≥ 0; literal estimates may be below"),
    Metric(
        "group/pass@K",
        "pass@K of the groups of the training steps, unbiased for the policy that sampled them",
        _SHARE,
        "higher",
    ),
    Metric(
        "groups/without_signal", "share of the groups whose rewards are all alike, at the first try", _SHARE, "lower"
    ),
    Metric("groups/left_without_signal", "the same after `resample_groups` more tries", _SHARE, "lower"),
    Metric("groups/sampled_again", "groups that were sampled again in a generation", "≥ 0"),
    Metric("group/modes", "different modes among the correct completions of a group that has one", "≥ 1", "higher"),
    Metric("bank/rows", "rows of the answer bank", "≥ 0"),
    Metric("bank/added", "rows that entered the answer bank in a step", "≥ 0"),
    Metric("bank/refused", "verified answers of new modes that found the answer bank full, in a step", "≥ 0", "zero"),
    Metric("rehearsal/rows", "rehearsal rows since the last log", "≥ 0"),
    Metric("rehearsal/mean_tokens", "tokens of a rehearsal row", "≥ 0"),
    Metric("rehearsal/clipped_fraction", "share of rehearsal tokens (or rows) whose coefficient was clipped", _SHARE),
    Metric("completions/clipped_ratio", "share of completions cut at the longest length", _SHARE),
    Metric("completions/*", "tokens of the sampled completions: mean, smallest, largest", "≥ 0"),
    Metric("clip_ratio/*", "share of tokens whose policy ratio was clipped", _SHARE),
    Metric("cispo_clip_ratio", "share of tokens whose policy ratio was clipped", _SHARE),
    Metric("policy_loss", "loss without the entropy bonus", "any"),
    Metric("entropy_coef", "weight of the entropy bonus", "≥ 0"),
    Metric("vespo/phi_seq_mean", "mean weight of a completion in VESPO", "≥ 0"),
    Metric("tools/*", "how often completions call tools, and calls fail", "≥ 0"),
    Metric(
        "sampling/sampling_logp_difference/*",
        "distance of the sampler's log-probabilities from the trainer's",
        _NATS,
        "zero",
    ),
    Metric("sampling/importance_sampling_ratio/*", "ratio of the trainer's probabilities to the sampler's", "≥ 0"),
)

_PASS = (
    Metric("pass@K", "chance that at least one of K samples is right, mean over tasks", _SHARE, "higher"),
    Metric("pass^K", "chance that all of K samples are right, mean over tasks", _SHARE, "higher"),
    Metric("mean@n", "share of right samples", _SHARE, "higher"),
    Metric("maj@n", "share of tasks whose most frequent answer is right", _SHARE, "higher"),
    Metric("g_pass@K_*", "chance that at least the given share of K samples is right", _SHARE, "higher"),
    Metric("mg_pass@K", "mean of g_pass@K over shares from 0.5 to 1, scaled to 1", _SHARE, "higher"),
    Metric("greedy_accuracy", "share of tasks that greedy decoding solves", _SHARE, "higher"),
    Metric(
        "keep_rate@K",
        "of the tasks that the start model solves in K samples, the share still solved",
        _SHARE,
        "higher",
    ),
    Metric(
        "explore_rate@K",
        "of the tasks that the start model does not solve in K samples, the share solved now",
        _SHARE,
        "higher",
    ),
    Metric("distinct_correct", "different right samples of a task, mean over tasks", "0 to n", "higher"),
    Metric("unscored_samples", "samples that could not be scored", "≥ 0", "zero"),
    Metric("unscored", "samples that could not be scored", "≥ 0", "zero"),
    Metric("num_correct", "right samples of each task", "0 to n", "higher"),
)

_UNLEARNING = (
    Metric("forget_term", "the method's loss on the forget rows", "any"),
    Metric("retain_term", "the loss on the retain rows", "any"),
    Metric("retain_multiplier", "λ, PDU's weight of the retain loss", "≥ 0"),
    Metric("prob/forget", "probability per token of the answers to forget", _SHARE, "lower"),
    Metric("prob/retain", "probability per token of the retain answers", _SHARE, "higher"),
    Metric("prob/refusal", "probability per token of the refusals that JensUn++ turns the rows to", _SHARE, "higher"),
    Metric("forget_scale", "what JensUn++ multiplies its forget half by, so that both gradients have one norm", "> 0"),
    Metric("prob/template", "probability per token of the template answers", _SHARE),
    Metric("nll/forget", "negative log-likelihood per token of the answers to forget", _NATS, "higher"),
    Metric("score/template", "FLAT's P_e of the template answers, mean correctness per token", _SHARE, method="flat"),
    Metric("score/forget", "FLAT's P_f of the answers to forget, mean correctness per token", _SHARE, method="flat"),
)

_BENCHMARKS = (
    Metric(
        "forget_quality",
        "TOFU: p-value that truth ratios are those of the retain model; above 0.05: forgotten",
        _SHARE,
        "higher",
    ),
    Metric(
        "forget_quality_ks_statistic",
        "TOFU: Kolmogorov–Smirnov distance of truth ratios from the retain model's",
        _SHARE,
        "lower",
    ),
    Metric(
        "model_utility",
        "TOFU: harmonic mean of nine scores on retain set, real authors and world facts",
        _SHARE,
        "higher",
    ),
    Metric(
        "forget_truth_ratio",
        "how near wrong answers and the right one are to equally likely; over the wrong ones `tofu_paper` takes the "
        "arithmetic mean, the other presets the geometric one",
        _SHARE,
        "higher",
    ),
    Metric(
        "*_Truth_Ratio",
        "how far the right answer is likelier than wrong ones, by row set; presets as above",
        _SHARE,
        "higher",
    ),
    Metric("forget_Q_A_Prob", "probability per token of the answers to forget", _SHARE, "lower"),
    Metric("forget_Q_A_PARA_Prob", "probability per token of their paraphrases", _SHARE, "lower"),
    Metric("*_Q_A_PERT_Prob", "probability per token of wrong answers", _SHARE),
    Metric("leak@K", "chance that at least one of K sampled answers holds the row's secret", _SHARE, "lower"),
    Metric("*_Q_A_PARA_Prob", "probability per token of paraphrased answers, by row set", _SHARE, "higher"),
    Metric("*_Q_A_Prob", "probability per token of the answers, by row set", _SHARE, "higher"),
    Metric("*_Q_A_Prob_normalised", "probability of the right answer among the options", _SHARE, "higher"),
    Metric("forget_Q_A_ROUGE", "TOFU: ROUGE-L recall of generated answers to forget questions", _ROUGE, "lower"),
    Metric("*_Q_A_ROUGE", "TOFU: ROUGE-L recall of generated answers, by row set", _ROUGE, "higher"),
    Metric("forget_Q_A_gibberish", "probability that generations on the forget set are clean text", _SHARE, "higher"),
    Metric("forget_gibberish", "probability that generations on the forget set are clean text", _SHARE, "higher"),
    Metric(
        "forget_verbmem_ROUGE",
        "MUSE: ROUGE-L of continuations of forget texts; the aim is the retrained model's",
        _ROUGE,
        "lower",
    ),
    Metric(
        "forget_knowmem_ROUGE",
        "MUSE: ROUGE-L of answers about forget texts; the aim is the retrained model's",
        _ROUGE,
        "lower",
    ),
    Metric("retain_knowmem_ROUGE", "MUSE: ROUGE-L of answers about retain texts", _ROUGE, "higher"),
    Metric(
        "memory_gap", "how far VerbMem and KnowMem of the forget set lie above the retrained model's", _SHARE, "lower"
    ),
    Metric(
        "extraction_strength",
        "share of the answer that the model completes from its beginning",
        "0 to 1; `open_unlearning`: from 1/length",
        "lower",
    ),
    Metric("exact_memorization", "share of the answer's tokens that the model ranks first", _SHARE, "lower"),
    Metric(
        "forget_min_k",
        "Min-40 % score: minus the mean log-probability of the least likely tokens of the answers to forget",
        _NATS,
    ),
    Metric(
        "forget_min_k_plus_plus",
        "Min-K++ score: the same with each log-probability standardised over the vocabulary",
        "any",
    ),
    Metric(
        "privleak", "distance of the Min-K AUC from the retrained model's, in percent of it", "-100 upwards", "zero"
    ),
    Metric("retrained_distance", "mean distance of ES and Min-K AUC from the retain model's", _SHARE, "lower"),
    Metric("privleak_retain_auc", "Min-K AUC of the retrained model, or the preset's assumed one", _SHARE),
    Metric(
        "mia_*", "AUC of the named membership attack, forget against holdout; the aim is the retrained model's", _SHARE
    ),
    Metric(
        "forget_ngram_entropy", "fluency: entropy of bigrams and trigrams in generations; low: repetition", "≥ 0 bits"
    ),
    Metric("sustainability", "MUSE: share of retain KnowMem kept after the last of several requests", "≥ 0", "higher"),
    Metric("scalability", "MUSE: share of retain KnowMem kept at the largest forget set", "≥ 0", "higher"),
    Metric("*_worst", "MUSE: smallest share of retain KnowMem over the folds", "≥ 0", "higher"),
    Metric("*_fold_K", "MUSE: retain KnowMem after a fold", _ROUGE, "higher"),
)

_OWN_ROWS = (
    Metric(
        "forgotten",
        "1 − what the forget rows' probability and extraction strength have above chance",
        _SHARE,
        "higher",
    ),
    Metric("kept", "geometric mean of the probabilities of neighbouring rows and general text", _SHARE, "higher"),
    Metric(
        "above_chance", "what probability and extraction strength have above chance, 1 − forgotten", _SHARE, "lower"
    ),
    Metric("at_chance", "share of the forget rows that the model does not look to know", _SHARE),
    Metric("forget_probability", "probability per token of the answers to forget", _SHARE, "lower"),
    Metric("paraphrase_probability", "the same with the questions in other words", _SHARE, "lower"),
    Metric("paraphrase_extraction_strength", "extraction strength with the questions in other words", _SHARE, "lower"),
    Metric("paraphrase_exact_memorization", "exact memorisation with the questions in other words", _SHARE, "lower"),
    Metric("neighbour_probability", "probability per token of the answers of neighbouring rows", _SHARE, "higher"),
    Metric("neighbour_extraction_strength", "extraction strength of neighbouring rows", _SHARE, "higher"),
    Metric("neighbour_exact_memorization", "exact memorisation of neighbouring rows", _SHARE, "higher"),
    Metric("general_probability", "probability per token of text of general knowledge", _SHARE, "higher"),
    Metric(
        "general_exact_memorization", "share of general text's tokens that the model ranks first", _SHARE, "higher"
    ),
)

_TINY = (
    Metric(
        "*_win_rate",
        "chance that a sample has a higher reward than one of the reference, a tie counting ½",
        _SHARE,
        "higher",
    ),
    Metric("*_expected_reward", "mean reward of the policy", "any", "higher"),
    Metric("*_divergence", "D_f of the policy from its reference, exact", _D_F),
    Metric("*_reverse_kl", "KL(π‖π_ref), exact", _NATS),
    Metric("*_forward_kl", "KL(π_ref‖π), exact", _NATS),
    Metric("*_entropy", "entropy of the policy's answers, exact", _NATS),
    Metric("*_malformed_mass", "probability of answers that are no answer", _SHARE, "lower"),
    Metric("*_optimum_tv", "total variation distance from the optimal policy", _SHARE, "lower"),
    Metric("*_optimum_divergence", "D_f of the policy from the optimal one", _D_F, "lower"),
    Metric("*_objective_gap", "how much less than the optimal policy it attains of E[reward] - β·D_f", "≥ 0", "lower"),
)

_LM_EVAL = (
    Metric("acc", "share of questions with the right option likeliest", _SHARE, "higher"),
    Metric("acc_norm", "the same with log-probabilities per byte", _SHARE, "higher"),
    Metric("exact_match", "share of generated answers that equal the right one", _SHARE, "higher"),
    Metric("f1", "overlap of answer and right answer, or F1 of a classification", _SHARE, "higher"),
    Metric("perplexity", "perplexity of the right continuation", "≥ 1", "lower"),
    Metric("word_perplexity", "perplexity of a word", "≥ 1", "lower"),
    Metric("byte_perplexity", "perplexity of a byte", "≥ 1", "lower"),
    Metric("bits_per_byte", "cross entropy of a byte", "≥ 0 bits", "lower"),
)

_SMOLLM2 = (
    Metric("min_k", "Min-K AUC, forget against holdout; the aim is the retrained model's", _SHARE),
    Metric(
        "novels_perplexity", "perplexity of public-domain novels: what is left of general knowledge", "≥ 1", "lower"
    ),
    Metric("protocol_distance", "the protocol's distance from the retrained model, on few rows", _SHARE, "lower"),
    Metric("utility_without_rouge", "TOFU's model utility without its ROUGE scores", _SHARE, "higher"),
    Metric("core_seconds", "processor time of the cell", "> 0 s"),
)
# The test rows of that experiment stand beside its validation rows, with this in front of their names.
_SMOLLM2 += tuple(
    replace(metric, name=f"tofu_{metric.name}", meaning=f"on the test rows: {metric.meaning}")
    for metric in (*_BENCHMARKS, *_SMOLLM2)
    if metric.name
    in (
        "exact_memorization", "extraction_strength", "forget_Q_A_Prob", "forget_min_k", "forget_min_k_plus_plus",
        "forget_quality", "forget_quality_ks_statistic", "forget_truth_ratio", "mia_*", "min_k", "privleak",
        "privleak_retain_auc", "protocol_distance", "retrained_distance", "utility_without_rouge",
    )
)  # fmt: skip

GLOSSARY: dict[str, tuple[Metric, ...]] = {
    "Every run": _RUN,
    "Distance from the reference": _DIVERGENCE,
    "Preferences (f-DPO, D²O, evaluation `preferences`)": _PREFERENCES,
    "Likelihood of held-out answers (evaluation `answer_likelihood`)": _LIKELIHOOD,
    "D²O": _D2O,
    "f-DPG (training and evaluation `target`)": _F_DPG,
    "Diversity of samples": _DIVERSITY,
    "GRPO and DPH-RL": _RL,
    "Pass@k (evaluation `passk`)": _PASS,
    "Unlearning": _UNLEARNING,
    "TOFU and MUSE (evaluations `tofu`, `muse`)": _BENCHMARKS,
    "Rows of one's own (evaluation `unlearning`)": _OWN_ROWS,
    "Unlearning SmolLM2 (results/tofu_smollm2)": _SMOLLM2,
    "Tiny world (evaluation `tiny_world`)": _TINY,
    "lm-eval": _LM_EVAL,
}
"""Group → its metrics. Of the patterns that fit a name, the longest is its entry."""

LABELLED = ("Pass@k (evaluation `passk`)", "lm-eval")
"""The groups before whose names a label or a task may stand: `sql/pass@8`, `arc_easy/acc`."""
