"""MUSE evaluation of one model: VerbMem, KnowMem, PrivLeak, extraction strength and the other attacks."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from fdiv.eval.benchmark.aggregation import Aggregates
from fdiv.eval.benchmark.evaluation import ModelEvaluation, Records, evaluate_in_memory, evaluation_mode
from fdiv.eval.benchmark.items import attack_rows, memorization_rows
from fdiv.eval.benchmark.log import EvalLog
from fdiv.eval.benchmark.rows import selected_rows, set_reports
from fdiv.eval.benchmark.settings import EvaluationSettings
from fdiv.eval.metrics.text_overlap import cut_at, rouge_scores
from fdiv.eval.muse.aggregate import aggregate_muse
from fdiv.eval.muse.data import MuseRows, load_muse_rows
from fdiv.eval.unlearning.attacks.rows import encode, left_to_say
from fdiv.evaluation import EvalContext
from fdiv.inference.greedy import GenerationRequest
from fdiv.inference.prompting import PromptFormat
from fdiv.inference.scoring import ScoringRequest
from fdiv.models.loading import context_length
from fdiv.rows.report import RowReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MuseEvalConfig", "MuseEvaluation"]

STOP_WORDS = ("\n\n", "\nQuestion", "Question:")
VERBATIM_TOKENS, ANSWER_TOKENS = 128, 32


@dataclass
class MuseEvalConfig(EvaluationSettings):
    """Settings of a MUSE evaluation; as `eval: {name: muse, …}` of a recipe it runs before and after training.

    Args:
        corpus: `News`, `Books`, or the name of one's own; it also chooses `muse_original`'s published retain AUC.
        data: hub dataset (default `muse-bench/MUSE-CORPUS`) or local folder, see `fdiv.eval.muse.data`.
        max_length: tokens kept of each attacked or verbatim text.

    The other settings are those of `EvaluationSettings`.
    """

    presets: ClassVar[tuple[str, ...]] = ("open_unlearning", "muse_original")
    summary_metrics: ClassVar[tuple[str, ...]] = (
        *("forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "retain_knowmem_ROUGE", "privleak", "extraction_strength"),
    )

    corpus: str = "News"
    max_length: int = 2048
    question_format: str = "Question: {question}\nAnswer: "
    answer_format: str = "{answer}"

    def rows(self) -> MuseRows:
        """The rows of all parts, checked."""
        return load_muse_rows(self.corpus, self.data)

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, datasets: Any, context: EvalContext
    ) -> dict[str, Any]:
        """Evaluate a model in memory (the recipe's `eval:` step); also writes `muse_STAGE/MUSE_EVAL.json`.

        Returns the values by name, None where one is not defined, and under `notes` the reasons.
        """
        return evaluate_in_memory(MuseEvaluation, self, model, tokenizer, context)


@dataclass
class MusePlan:
    """Requests of a MUSE evaluation; scoring keys are `verbatim/i`, `forget/i`, `holdout/i`, generation keys
    `METRIC/i`. `lengths` are tokens of the scored texts before the cut to `max_length`."""

    rows: MuseRows
    preset_name: str
    scoring: list[ScoringRequest] = field(default_factory=list)
    generation: list[GenerationRequest] = field(default_factory=list)
    prompts: dict[str, str] = field(default_factory=dict)
    truths: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)

    def attacked(self) -> list[ScoringRequest]:
        """Forget and holdout texts."""
        return [r for r in self.scoring if r.key.split("/")[0] in ("forget", "holdout")]

    def likelihoods(self) -> list[ScoringRequest]:
        """What a retain log needs: the attacked texts, for PrivLeak."""
        return self.attacked()

    def scored_answer(self, key: str) -> str | None:
        """Key of the scored continuation of a verbatim prompt; None for a question, whose answer is not scored."""
        name, index = key.split("/")
        return f"verbatim/{index}" if name == "forget_verbmem_ROUGE" else None

    def empty_log(self) -> EvalLog:
        """A log of the forget questions without values, to check a retain log before any model is loaded."""
        rows = {
            key.split("/")[1]: {"ground_truth": truth}
            for key, truth in self.truths.items()
            if key.startswith("forget_knowmem_ROUGE/")
        }
        metrics = {"forget_knowmem_ROUGE": {"value_by_index": rows}} if rows else {}
        return EvalLog(metrics, "muse", self.preset_name, "this evaluation")


class MuseEvaluation(ModelEvaluation):
    """A MUSE evaluation; see `ModelEvaluation`."""

    benchmark = "muse"
    attacked_metrics = (
        *("forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "retain_knowmem_ROUGE"),
        *("extraction_strength", "exact_memorization"),
    )
    retain_metric = "forget_knowmem_ROUGE"
    fluency = ("forget_verbmem_ROUGE", "forget_gibberish", 512)
    config: MuseEvalConfig
    plan: MusePlan

    def _prepare(self) -> None:
        self.rows = self.config.rows()
        self.missing = dict(self.rows.missing)
        if "forget" in self.missing:
            self.missing.setdefault("holdout", self.missing["forget"])
        self.plan = MusePlan(self.rows, self.preset.name)
        self._plan_verbatim(self._verbatim_rows(), self._selected(self.rows.verbmem))
        for name in ("forget_knowmem", "retain_knowmem"):
            rows = getattr(self.rows, name)
            self._plan_questions(name, rows, self._selected(rows))
        if "holdout" not in self.missing:
            for side in ("forget", "holdout"):
                rows = getattr(self.rows, side)
                for i in self._selected(rows):
                    self._plan_text(f"{side}/{i}", "", rows[i]["text"])

    def _selected(self, rows: Sequence[Any]) -> list[int]:
        return selected_rows(len(rows), None, self.config.max_items)

    def _verbatim_rows(self) -> list[dict[str, Any]]:
        """The verbatim prompts under the trainers' columns."""
        return [{"prompt": row["prompt"], "completion": row["gt"]} for row in self.rows.verbmem]

    def _plan_text(self, key: str, prefix: str, text: str) -> tuple[int, ...]:
        """Score `text` after `prefix`; the tokens that its labels follow."""
        encoded = PromptFormat.encode_continuation(self.tokenizer, prefix, text, self.config.max_length)
        group = "verbatim" if key.startswith("verbatim") else "attacked"
        self.plan.scoring.append(ScoringRequest(key, encoded, True, group))
        kept = len(encoded.input_ids)
        if kept >= self.config.max_length:  # perhaps cut: the whole text's length, beside the prefix
            whole = PromptFormat.encode_continuation(self.tokenizer, prefix, text, sys.maxsize)
            kept = self.config.max_length + len(whole.input_ids) - kept
        self.plan.lengths[key] = kept
        self.plan.texts[key] = self.tokenizer.decode(list(encoded.label_ids), skip_special_tokens=True)
        return encoded.prompt_ids

    def _plan_verbatim(self, rows: Sequence[Mapping[str, Any]], chosen: Sequence[int]) -> None:
        for i in chosen:
            row, key = rows[i], f"forget_verbmem_ROUGE/{i}"
            shots = "".join(f"{prompt}{answer}\n\n" for prompt, answer in row.get("examples", ()))
            prompt = shots + row["prompt"] + (row.get("given") or "")
            truth = left_to_say(row["completion"], row.get("given"))
            scored_after = self._plan_text(f"verbatim/{i}", prompt, truth)
            self.plan.generation.append(GenerationRequest(key, scored_after, VERBATIM_TOKENS))
            prompt_ids = self.tokenizer(prompt)["input_ids"]
            if self.preset.verbatim_truth_tokens is not None:
                kept = self.tokenizer(truth)["input_ids"][: self.preset.verbatim_truth_tokens]
                truth = self.tokenizer.decode(kept, skip_special_tokens=True)
            else:
                space = " " if self.preset.verbatim_space else ""
                ids = self.tokenizer(prompt + space + truth)["input_ids"][len(prompt_ids) :]
                truth = self.tokenizer.decode(ids[: self.config.max_length], skip_special_tokens=True)
            self.plan.prompts[key], self.plan.truths[key] = row["prompt"], truth.strip()

    def _plan_questions(self, name: str, rows: Sequence[Mapping[str, Any]], chosen: Sequence[int]) -> None:
        shots = self._shots(name)
        for i in chosen:
            row, key = rows[i], f"{name}_ROUGE/{i}"
            asked = {"question": row["question"], "answer": row["answer"], "given": row.get("given")}
            examples = [*shots, *row.get("examples", ())]
            ids = encode({**asked, "examples": examples}, self.tokenizer, self.config.prompt()).prompt_ids
            self.plan.generation.append(GenerationRequest(key, ids, ANSWER_TOKENS))
            self.plan.prompts[key] = row["question"]
            self.plan.truths[key] = left_to_say(row["answer"], row.get("given")).strip()

    def _shots(self, name: str) -> list[tuple[str, str]]:
        """The benchmark's own examples before the questions of a set."""
        examples = getattr(self.rows, name.replace("_knowmem", "_examples"))
        return [(example["question"], example["answer"]) for example in examples]

    def attack_rows(self) -> list[dict[str, Any]]:
        """The verbatim prompts with their continuations, then the forget questions."""
        questions = self.rows.forget_knowmem
        return [*self._verbatim_rows(), *({"question": r["question"], "answer": r["answer"]} for r in questions)]

    def attack_context(self) -> dict[str, Any]:
        """The prompt format; the retain questions as neighbours, where there are any."""
        rows = [{"question": row["question"], "answer": row["answer"]} for row in self.rows.retain_knowmem]
        return {"prompt": self.config.prompt()} | ({"neighbours": rows} if rows else {})

    def attack_row(self, key: str) -> int | None:
        """The number among verbatim prompts and, after them, forget questions."""
        name, number = key.split("/")
        first = {"verbatim": 0, "forget_verbmem_ROUGE": 0, "forget_knowmem_ROUGE": len(self.rows.verbmem)}
        return first[name] + int(number) if name in first else None

    def under_attack(self, rows: Sequence[Mapping[str, Any]], chosen: Sequence[int], weights: bool) -> MuseEvaluation:
        """With the attacked prompts and questions, and as many retain questions where the weights were attacked."""
        view, border = copy.copy(self), len(self.rows.verbmem)
        view.plan = MusePlan(self.rows, self.preset.name)
        view._plan_verbatim(rows[:border], [number for number in chosen if number < border])
        view._plan_questions("forget_knowmem", rows[border:], [n - border for n in chosen if n >= border])
        if weights:
            retain = self.rows.retain_knowmem
            view._plan_questions("retain_knowmem", retain, selected_rows(len(retain), None, len(chosen)))
        return view

    def row_stamp(self) -> dict[str, Any]:
        """Corpus and fingerprint of the forget side."""
        return {"split": self.config.corpus, "forget_rows": self.rows.forget_digest()}

    def row_reports(self, model: PreTrainedModel) -> list[RowReport]:
        """Of the questions, the verbatim prompts and the attacked texts."""
        sets = {
            "forget_knowmem": ("muse forget questions", len(self.rows.forget_knowmem)),
            "retain_knowmem": ("muse retain questions", len(self.rows.retain_knowmem)),
            "verbatim": ("muse verbatim prompts", len(self.rows.verbmem)),
            "forget": ("muse forget texts", len(self.rows.forget)),
            "holdout": ("muse holdout texts", len(self.rows.holdout)),
        }
        questions = [request for request in self.plan.generation if "knowmem" in request.key]
        return set_reports(
            sets, self.plan.scoring, questions, context_length(model), max_length=self.config.max_length,
            lengths=self.plan.lengths,
        )  # fmt: skip

    def build_metrics(
        self, records: Records, generations: Records | None, reference: Records | None, gradnorms: Records | None
    ) -> dict[str, dict[str, Any]]:
        """The metric tree of per-item values from the passes' results."""

        def grouped(source: Records) -> dict[str, dict[int, Any]]:
            groups: dict[str, dict[int, Any]] = {}
            for key, record in source.items():
                name, index = key.split("/")
                groups.setdefault(name, {})[int(index)] = record
            return {name: dict(sorted(group.items())) for name, group in groups.items()}

        scored, metrics = grouped(records), {}
        if "verbatim" in scored:
            metrics |= memorization_rows(scored["verbatim"], self.preset)
        if "forget" in scored and "holdout" in scored:
            sides = {side: scored[side] for side in ("forget", "holdout")}
            texts = {side: {i: self.plan.texts[f"{side}/{i}"] for i in sides[side]} for side in sides}
            metrics |= attack_rows(sides, texts, self.preset, grouped(reference) if reference else None)
            if gradnorms is not None:
                metrics["mia_gradnorm"] = {
                    side: {"value_by_index": {str(i): {"score": r["score"]} for i, r in rows.items()}}
                    for side, rows in grouped(gradnorms).items()
                }
        for key, record in (generations or {}).items():
            name, index = key.split("/")
            words = STOP_WORDS if "knowmem" in name else ()
            text, truth = cut_at(record["generation"], words), self.plan.truths[key]
            row = rouge_scores(truth, text, use_stemmer=self.preset.use_stemmer)
            row |= {"input": self.plan.prompts[key], "ground_truth": truth, "generation": text}
            metrics.setdefault(name, {"value_by_index": {}})["value_by_index"][index] = row
        return metrics

    def retain_knowmem(self, model: PreTrainedModel, title: str) -> float:
        """KnowMem on the retain questions alone, for a model of a fold (percent under `muse_original`)."""
        requests = [r for r in self.plan.generation if r.key.startswith("retain_knowmem_ROUGE/")]
        with evaluation_mode(model):
            records = self._generate(model, title, requests)
        metrics = self.build_metrics({}, records, None, None)
        log = EvalLog(metrics, "muse", self.preset.name, title, self.stamp(model))
        return aggregate_muse(log, self.preset).values["retain_knowmem_ROUGE"]

    def aggregate(self, log: EvalLog) -> Aggregates:
        """Aggregates of a log of this evaluation against its retain log."""
        return aggregate_muse(log, self.preset, self._retain, corpus=self.config.corpus)
