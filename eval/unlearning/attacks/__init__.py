"""Attacks on unlearning: what brings the forgotten rows back?

    attack = build_attack("int4")                      # a name of `fdiv.catalog.ATTACKS`, or module:attribute
    attacked = attack(model, tokenizer, rows, seed=0)  # Attacked(model, rows); `model` itself is not changed

An attack changes the weights (relearning, quantisation, an adapter taken off), the prompts (paraphrases, prefixes,
shots, noise) or how answers come about (sampling); `attack_all` runs several, one after the other.
"""

from fdiv import lazy
from fdiv.eval.unlearning.attacks.attacked import Attack, Attacked, NotApplicable, Sampling
from fdiv.eval.unlearning.attacks.build import NamedAttack, attack_all, build_attack, build_attacks

_LAZY = {
    "AdapterRemoval": "fdiv.eval.unlearning.attacks.adapters",
    "AdapterScaling": "fdiv.eval.unlearning.attacks.adapters",
    "AnswerPrefix": "fdiv.eval.unlearning.attacks.prompts",
    "Noise": "fdiv.eval.unlearning.attacks.noise",
    "Paraphrase": "fdiv.eval.unlearning.attacks.prompts",
    "Prefix": "fdiv.eval.unlearning.attacks.prompts",
    "Priming": "fdiv.eval.unlearning.attacks.prompts",
    "Quantization": "fdiv.eval.unlearning.attacks.quantization",
    "Relearning": "fdiv.eval.unlearning.attacks.relearning",
    "SampledAnswers": "fdiv.eval.unlearning.attacks.sampling",
    "Translation": "fdiv.eval.unlearning.attacks.rewriting",
    "curve_area": "fdiv.eval.unlearning.attacks.curves",
    "encode": "fdiv.eval.unlearning.attacks.rows",
    "prompt_rows": "fdiv.eval.unlearning.attacks.rows",
}

__getattr__, __dir__ = lazy.attach(__name__, _LAZY)

__all__ = [
    "Attack",
    "Attacked",
    "NamedAttack",
    "NotApplicable",
    "Sampling",
    "attack_all",
    "build_attack",
    "build_attacks",
    *_LAZY,
]
