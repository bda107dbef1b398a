"""Every attack of an evaluation's settings on one model, measured with the evaluation's own passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fdiv.eval.benchmark.rows import selected_rows
from fdiv.eval.metrics.leakage import secrets_of
from fdiv.eval.unlearning.attacks.attacked import Attacked, NotApplicable, Sampling
from fdiv.eval.unlearning.attacks.build import NamedAttack, attack_all
from fdiv.eval.unlearning.attacks.rows import answered, asked
from fdiv.inference.cache import ItemCache, fingerprint
from fdiv.inference.processes import process_state
from fdiv.inference.sampling import SamplingRequest, sample_completions
from fdiv.models.loading import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fdiv.eval.benchmark.evaluation import ModelEvaluation

__all__ = ["run_attacks"]

Metrics = dict[str, dict[str, Any]]


def run_attacks(
    evaluation: ModelEvaluation, model: PreTrainedModel, title: str
) -> tuple[Metrics, dict[str, dict[str, Any]], dict[str, str]]:
    """Attack `model` with everything that the evaluation's settings name, and measure each; call it on all processes.

    Returns:
        Per-item metrics, called `attack/LABEL/METRIC`; what a reader of them has to know, by label; and why an attack
        was not made, by `attack/LABEL`.
    """
    rows = evaluation.attack_rows()
    metrics: Metrics = {}
    about: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for named in evaluation.config.build_attacks(**evaluation.attack_context()):
        seed = evaluation.config.attack_seed
        for label, attacked in attack_all([named], model, evaluation.tokenizer, rows, seed=seed):
            try:
                if isinstance(attacked, NotApplicable):
                    raise attacked
                found, about[label] = _measure(evaluation, model, attacked, named, label, f"{title}: {label}")
            except NotApplicable as reason:
                missing[f"attack/{label}"] = str(reason)
                continue
            metrics |= {f"attack/{label}/{name}": node for name, node in found.items()}
    return metrics, about, missing


def _measure(
    evaluation: ModelEvaluation,
    model: PreTrainedModel,
    attacked: Attacked,
    named: NamedAttack,
    label: str,
    title: str,
) -> tuple[Metrics, dict[str, Any]]:
    """Per-item metrics of one attacked model, and what is to be known of them."""
    weights = attacked.model is not model
    if weights:
        attacked.model.eval()
    chosen = _chosen(evaluation, attacked, named.max_items)
    view = evaluation.under_attack(attacked.rows, chosen, weights)
    fitting = _fitting(evaluation, view, chosen, attacked.model)
    if not fitting:
        raise NotApplicable(f"no row fits the model's context of {context_length(attacked.model)} tokens")
    notes = list(attacked.notes)
    if len(fitting) < len(chosen):
        notes.append(f"{len(chosen) - len(fitting)} rows are longer than the model's context and left out")
        view = evaluation.under_attack(attacked.rows, fitting, weights)
    # A scaled adapter has the same weights as one that is not: what is cached depends on the attack as well.
    view.salt = fingerprint(label, sorted(map(str, named.resolved.items())), evaluation.config.attack_seed)
    if attacked.sampling is not None:
        found = {"leak": {"value_by_index": _leaks(view, attacked, attacked.sampling, title)}}
    else:
        found = _greedy(view, attacked.model, title)
    facts = {
        "settings": {**named.settings, "seed": evaluation.config.attack_seed},
        "weights": weights,
        "sampled": attacked.sampling is not None,
        "rows": len(fitting),
        "of": len(attacked.rows),
        "trained_on": list(attacked.trained_on),
        "notes": notes,
    }
    stage = label.removeprefix(f"{named.name}_")
    if stage != label and stage.isdecimal():
        facts["curve"] = {"name": named.name, "step": int(stage)}
    return found, facts


def _chosen(evaluation: ModelEvaluation, attacked: Attacked, most: int | None) -> list[int]:
    """Numbers of the rows that are measured: of those that the evaluation measures without attack, the ones that were
    not trained on, thinned evenly."""
    plan = evaluation.plan
    keys = [request.key for request in (*plan.scoring, *plan.generation)]
    measured = {number for key in keys if (number := evaluation.attack_row(key)) is not None}
    left = sorted(measured - {*attacked.trained_on}) or sorted(measured)
    return [left[position] for position in selected_rows(len(left), None, most)]


def _fitting(
    evaluation: ModelEvaluation, view: ModelEvaluation, chosen: Sequence[int], model: PreTrainedModel
) -> list[int]:
    """The rows whose texts, and prompts with the bound on their answers, the model's context holds."""
    limit = context_length(model)
    if limit is None:
        return list(chosen)
    lengths = [(request.key, len(request.text.input_ids)) for request in view.plan.scoring]
    lengths += [(r.key, len(r.prompt_ids) + r.max_new_tokens) for r in view.plan.generation]
    long = {evaluation.attack_row(key) for key, length in lengths if length > limit}
    return [number for number in chosen if number not in long]


def _greedy(view: ModelEvaluation, model: PreTrainedModel, title: str) -> Metrics:
    """What the evaluation measures of the forget rows, by scoring and greedy answers."""
    records = view.score(model, view.plan.scoring, f"{title}: scoring")
    generations = view.generate(model, title, records) if view.config.generate else None
    metrics = view.build_metrics(records, generations, None, None)
    return {name: node for name, node in metrics.items() if name in view.attacked_metrics}


def _leaks(view: ModelEvaluation, attacked: Attacked, sampling: Sampling, title: str) -> dict[str, dict[str, Any]]:
    """By row: how many of the samples hold its secret."""
    requests = {
        number: request for request in view.plan.generation if (number := view.attack_row(request.key)) is not None
    }
    model, rows = attacked.model, attacked.rows
    limit = context_length(model)
    samples = []
    for number, request in requests.items():
        # Half as long again as the true answer, where its length is known: what is not said by then was not meant.
        enough = request.expected_tokens * 3 // 2 + 8 if request.expected_tokens else request.max_new_tokens
        bound = min(request.max_new_tokens, enough)
        bound = bound if limit is None else min(bound, limit - len(request.prompt_ids))
        samples += [
            SamplingRequest(f"{number}/{draw}", request.prompt_ids, bound, stream=(number, draw))
            for draw in range(sampling.samples)
        ]
    cache = view.cache_of(model)
    digest = fingerprint(cache["model_digest"], [[r.key, list(r.prompt_ids), r.max_new_tokens] for r in samples])
    answers = sample_completions(
        model,
        view.tokenizer,
        samples,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=view.config.attack_seed,
        batch_size=view.config.generation_batch_size,
        cache=ItemCache(cache["cache_dir"], "samples", digest, process_state().process_index),
        title=f"{title}: sampling",
        progress=cache["progress"],
    )
    secrets = secrets_of([asked(row) for row in rows], [answered(row) for row in rows], [_given(row) for row in rows])
    found = {}
    for number in requests:
        texts = [
            view.tokenizer.decode(list(answers[f"{number}/{draw}"]), skip_special_tokens=True)
            for draw in range(sampling.samples)
        ]
        held = [secrets[number].held_by(text) for text in texts]
        example = texts[held.index(True)] if any(held) else texts[0]
        found[str(number)] = {"leaked": sum(held), "samples": sampling.samples, "example": example.strip()}
    return found


def _given(row: Mapping[str, Any]) -> list[str]:
    """The secrets that came with a row: a text or a list of texts in the column `secret` or `secrets`."""
    given = row.get("secret") or row.get("secrets") or []
    return [given] if isinstance(given, str) else list(given)
