"""The passes over one model: likelihoods, sampled answers, a few greedy ones, and the same after each attack."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.eval.benchmark.evaluation import evaluation_mode, selected_rows
from fdiv.eval.unlearning import aggregate
from fdiv.eval.unlearning.aggregate import RowScores
from fdiv.eval.unlearning.attacks.attacked import Attacked, Sampling
from fdiv.eval.unlearning.attacks.build import NamedAttack, attack_all
from fdiv.eval.unlearning.attacks.curves import curve_area
from fdiv.eval.unlearning.attacks.rows import encode
from fdiv.eval.unlearning.sets import RowSets
from fdiv.inference.cache import ItemCache, fingerprint
from fdiv.inference.greedy import GenerationRequest, generate_texts
from fdiv.inference.processes import process_state
from fdiv.inference.prompting import PromptFormat
from fdiv.inference.sampling import SamplingRequest, sample_completions
from fdiv.inference.scoring import ScoringRequest, score_texts
from fdiv.models.fingerprints import weights_fingerprint
from fdiv.models.loading import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["AttackResult", "Measured", "Measurement", "attack_values"]

_CURVED = ("forget_probability", "extraction_strength", "above_chance")
_SCORES = ("probability", "extraction_strength", "exact_memorization")


@dataclass
class AttackResult:
    """What is measured after an attack.

    Attributes:
        name: of the attack, with its stage. values: `forget_probability`, `extraction_strength`, `exact_memorization`
            and `above_chance`, or `leak@K`: means over the measured rows, with standard errors.
        unattacked: the same of these rows before the attack. rows: how many were measured.
        notes: what a reader has to know. reason: why it could not be made; None where it was.
        curve: name of the curve that this is a point of, step by step; None: of none.
    """

    name: str
    values: dict[str, float | None] = field(default_factory=dict)
    unattacked: dict[str, float | None] = field(default_factory=dict)
    rows: int = 0
    notes: list[str] = field(default_factory=list)
    reason: str | None = None
    seconds: float = 0.0
    curve: str | None = None


@dataclass
class Measured:
    """Everything measured on one model.

    Attributes:
        rows: scores of each forget row, with `leaked` where answers were sampled. chance: the same answers under other
            questions, of the model before unlearning. values: the means, by name. answers: greedy ones, by row number.
        notes: why a value is not defined. attacks: see `AttackResult`. seconds: what it took.
    """

    rows: list[dict[str, Any]]
    chance: list[RowScores]
    values: dict[str, float | None] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    attacks: list[AttackResult] = field(default_factory=list)
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """As plain types."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Measured:
        """What `record` wrote down."""
        attacks = [AttackResult(**result) for result in record["attacks"]]
        return cls(**{**record, "attacks": attacks})

    @property
    def unknown(self) -> list[int]:
        """Numbers of the rows at chance."""
        return aggregate.at_chance(self.rows, self.chance)


@dataclass
class Measurement:
    """The passes; every model is measured on the same texts with the same random numbers.

    Args:
        sets: the rows. tokenizer: of the models. prompt: how questions are asked.
        samples: answers of each row at temperature 1; 0: none. leak_rows: rows that are sampled, evenly spaced; None:
            all. examples: greedy answers, of evenly spaced rows. paraphrased: measure the rows in other words too.
        max_new_tokens: bound on an answer.
        batch_size, generation_batch_size: of the passes. seed: of the samples and attacks.
        cache_dir: where finished items are kept for a continued run; None: nowhere. progress: show bars.
    """

    sets: RowSets
    tokenizer: PreTrainedTokenizerBase
    prompt: PromptFormat
    samples: int = 8
    leak_rows: int | None = None
    examples: int = 3
    paraphrased: bool = True
    max_new_tokens: int = 128
    batch_size: int = 32
    generation_batch_size: int = 64
    seed: int = 0
    cache_dir: Path | None = None
    progress: bool = True

    # ---------------------------------------------------------------- likelihoods
    def likelihoods(self, model: PreTrainedModel, chance: Sequence[RowScores] | None = None) -> Measured:
        """The scoring pass alone.

        Args:
            model: in memory. chance: of the model before unlearning; None: this is that model.
        """
        began = time.monotonic()
        which = {"chance": chance is None, "paraphrased": self.paraphrased}
        requests = self.sets.requests(self.tokenizer, self.prompt, **which)
        with evaluation_mode(model):
            records = self._scored(model, requests)
        found: dict[str, list[RowScores]] = {}
        for request in requests:
            scores = aggregate.row_scores(records[request.key])
            found.setdefault(request.key.split("/")[0], []).append(scores)
        own = found["forget"]
        measured = Measured(own, list(chance) if chance is not None else found["chance"])
        self._put_likelihoods(measured, found)
        measured.seconds = time.monotonic() - began
        return measured

    def _put_likelihoods(self, measured: Measured, found: Mapping[str, Sequence[RowScores]]) -> None:
        values, missing = measured.values, self.sets.missing
        values |= aggregate.set_values("forget_", measured.rows, ("probability",))
        values |= aggregate.set_values("", measured.rows, ("extraction_strength", "exact_memorization"))
        values |= {
            f"forget_{name}": aggregate.defined_mean([row[name] for row in measured.rows])[0]
            for name in ("min_k", "min_k_plus_plus")
        }
        if self.paraphrased:
            values |= aggregate.set_values("paraphrase_", found["paraphrase"], _SCORES)
        neighbours, general = found.get("neighbour", []), found["general"]
        values |= aggregate.set_values("neighbour_", neighbours, _SCORES)
        values |= aggregate.set_values("general_", general, ("probability", "exact_memorization"))
        values |= aggregate.membership(measured.rows, found.get("holdout", []))
        values["forgotten"] = aggregate.forgotten(measured.rows, measured.chance)
        values["kept"] = aggregate.kept(neighbours, general)
        values["at_chance"] = len(measured.unknown) / len(measured.rows)
        for name in values:
            of = "neighbours" if name.startswith("neighbour_") else "holdout" if name.startswith("mia_") else None
            if of in missing:
                measured.notes[name] = missing[of]

    def _scored(
        self, model: PreTrainedModel, requests: Sequence[ScoringRequest], cached: bool = True
    ) -> Mapping[str, Any]:
        pad_id = self.tokenizer.pad_token_id
        cache = self.cache_dir if cached else None
        return score_texts(
            model,
            requests,
            pad_id=0 if pad_id is None else pad_id,
            batch_size=self.batch_size,
            cache_dir=cache,
            model_digest=weights_fingerprint(model) if cache is not None else "",
            progress=self.progress,
        )

    # ---------------------------------------------------------------- answers
    def speak(self, model: PreTrainedModel, measured: Measured) -> None:
        """Sample answers, count the rows that leak, and take a few greedy answers; added to `measured`."""
        began = time.monotonic()
        with evaluation_mode(model):
            if self.samples:
                rows = selected_rows(len(self.sets.asked), None, self.leak_rows)
                leaked = self.leaked(model, self.sets.asked, rows, Sampling(self.samples))
                for number, count in leaked.items():
                    measured.rows[number]["leaked"] = count
                measured.values |= aggregate.leak_values(list(leaked.values()), self.samples, self.seed)
            if self.examples:
                measured.answers = self._answers(model)
        measured.seconds += time.monotonic() - began

    def leaked(
        self,
        model: PreTrainedModel,
        rows: Sequence[Mapping[str, Any]],
        numbers: Sequence[int],
        sampling: Sampling,
        cached: bool = True,
    ) -> dict[int, int]:
        """Row number → how many of its samples hold its secret."""
        folder = self.cache_dir if cached else None
        requests = []
        for number in numbers:
            prompt_ids, bound = self._prompt(model, rows[number])
            for sample in range(sampling.samples):
                key = f"{number}/{sample}"
                requests.append(SamplingRequest(key, prompt_ids, bound, bound, stream=(number, sample)))
        texts = [[r.key, list(r.prompt_ids), r.max_new_tokens] for r in requests]
        digest = weights_fingerprint(model) if folder is not None else ""
        digest = fingerprint(digest, texts, asdict(sampling), self.seed, str(next(model.parameters()).dtype))
        drawn = sample_completions(
            model,
            self.tokenizer,
            requests,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=self.seed,
            batch_size=self.generation_batch_size,
            cache=ItemCache(folder, "samples", digest, process_state().process_index),
            progress=self.progress,
        )
        said = {key: self.tokenizer.decode(list(ids), skip_special_tokens=True) for key, ids in drawn.items()}
        return {
            number: sum(self.sets.secrets[number].held_by(said[f"{number}/{s}"]) for s in range(sampling.samples))
            for number in numbers
        }

    def _answers(self, model: PreTrainedModel) -> dict[str, str]:
        numbers = selected_rows(len(self.sets.asked), None, self.examples)
        requests = []
        for number in numbers:
            prompt_ids, bound = self._prompt(model, self.sets.asked[number])
            requests.append(GenerationRequest(str(number), prompt_ids, bound, bound))
        made = generate_texts(
            model, self.tokenizer, requests, batch_size=self.generation_batch_size, progress=self.progress
        )
        return {key: record["generation"].strip() for key, record in made.items()}

    def _prompt(self, model: PreTrainedModel, row: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
        """Token ids of a row's prompt, and the bound on an answer: twice the true one and a little more."""
        text = encode(row, self.tokenizer, self.prompt)
        limit = context_length(model)
        bound = min(self.max_new_tokens, 2 * text.label_count + 8)
        room = bound if limit is None else limit - len(text.prompt_ids)
        return text.prompt_ids, max(1, min(bound, room))

    # ---------------------------------------------------------------- attacks
    def attack(self, model: PreTrainedModel, attacks: Sequence[NamedAttack], measured: Measured) -> list[AttackResult]:
        """Every attack on the model, measured and let go of before the next; what was done before is not done again.

        What is measured of an attacked model is not kept by its weights: an attack may change something else.
        """
        digest = self._attack_digest(model, attacks, measured) if self.cache_dir is not None else ""
        cache = ItemCache(self.cache_dir, "attacks", digest, process_state().process_index)
        results = []
        for attack in attacks:
            if attack.name not in cache.items:
                found = [asdict(result) for result in self._stages(model, attack, measured)]
                cache.add([{"key": attack.name, "results": found}])
            results += [AttackResult(**result) for result in cache.items[attack.name]["results"]]
        return results

    def _attack_digest(self, model: PreTrainedModel, attacks: Sequence[NamedAttack], measured: Measured) -> str:
        """Of all that the results of attacks depend on: the model and its type, the rows and how they are asked,
        the attacks with what the evaluation filled in, and what they are compared with."""
        about = [[attack.name, sorted(map(str, attack.resolved.items())), attack.max_items] for attack in attacks]
        rows = [list(map(str, row.items())) for row in self.sets.asked]
        texts = [encode(row, self.tokenizer, self.prompt).input_ids for row in self.sets.asked]
        return fingerprint(
            weights_fingerprint(model), str(next(model.parameters()).dtype), rows, list(map(list, texts)),
            repr(self.prompt), about, measured.chance, self.max_new_tokens, self.seed,
        )  # fmt: skip

    def _stages(self, model: PreTrainedModel, attack: NamedAttack, measured: Measured) -> list[AttackResult]:
        found, began = [], time.monotonic()
        for name, attacked in attack_all([attack], model, self.tokenizer, self.sets.asked, seed=self.seed):
            if not isinstance(attacked, Attacked):
                result = AttackResult(name, reason=str(attacked))
            else:
                try:
                    result = self._measured(name, attacked, measured, attack.max_items)
                except DataError as error:  # a longer prompt beyond the model's context
                    result = AttackResult(name, reason=str(error))
            result.seconds = time.monotonic() - began
            result.curve = attack.name if hasattr(attack.attack, "stages") else None
            found.append(result)
            began = time.monotonic()
        return found

    def _measured(self, name: str, attacked: Attacked, measured: Measured, most: int | None) -> AttackResult:
        left = attacked.measured
        numbers = [left[place] for place in selected_rows(len(left), None, most)]
        result = AttackResult(name, rows=len(numbers), notes=list(attacked.notes))
        if set(numbers) <= set(attacked.trained_on):
            result.notes.append("measured on the rows that the attacker trained on, for there are no others")
        with evaluation_mode(attacked.model):
            if attacked.sampling is not None:
                leaked = self.leaked(attacked.model, attacked.rows, numbers, attacked.sampling, cached=False)
                counts = list(leaked.values())
                result.values = aggregate.leak_values(counts, attacked.sampling.samples, self.seed)
                return result
            requests = []
            for number in numbers:
                text = encode(attacked.rows[number], self.tokenizer, self.prompt)
                requests.append(ScoringRequest(str(number), text, hits=True))
            records = self._scored(attacked.model, requests, cached=False)
        scores = [aggregate.row_scores(records[str(number)]) for number in numbers]
        chance = [measured.chance[number] for number in numbers]
        before = [measured.rows[number] for number in numbers]
        result.values = _values(scores, chance)
        result.unattacked = _values(before, chance)
        return result


def _values(rows: Sequence[RowScores], chance: Sequence[RowScores]) -> dict[str, float | None]:
    values = aggregate.set_values("forget_", rows, ("probability",))
    values |= aggregate.set_values("", rows, ("extraction_strength", "exact_memorization"))
    return values | {"above_chance": 1.0 - aggregate.forgotten(rows, chance)}


def attack_values(results: Sequence[AttackResult]) -> dict[str, float | None]:
    """`attack/NAME/METRIC` of every attack, and `attack/CURVE/METRIC_area`, the mean height of a curve of steps that
    begins at 0 steps with the value without the attack."""
    found: dict[str, float | None] = {}
    curves: dict[str, list[tuple[int, AttackResult]]] = {}
    for result in results:
        found |= {f"attack/{result.name}/{name}": value for name, value in result.values.items()}
        steps = result.name.rpartition("_")[2]
        if result.curve is not None and steps.isdecimal() and result.unattacked:
            curves.setdefault(result.curve, []).append((int(steps), result))
    for curve, points in curves.items():
        points.sort(key=lambda point: point[0])
        for name in _CURVED:
            heights = [points[0][1].unattacked[name], *(result.values[name] for _, result in points)]
            if None not in heights:
                area = curve_area([0, *(step for step, _ in points)], heights)
                found[f"attack/{curve}/{name}_area"] = area
    return found
