"""What a TOFU evaluation asks of a model, and how the answers become a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fdiv.eval.benchmark.items import attack_rows, memorization_rows, probability_row
from fdiv.eval.benchmark.log import EvalLog
from fdiv.eval.benchmark.presets import Preset
from fdiv.eval.benchmark.rows import selected_rows
from fdiv.eval.metrics.text_overlap import rouge_scores
from fdiv.eval.tofu.data import TofuRows
from fdiv.eval.tofu.rows import Row, encode_row
from fdiv.eval.unlearning.attacks.rows import left_to_say
from fdiv.inference.greedy import GenerationRequest
from fdiv.inference.prompting import PromptFormat
from fdiv.inference.scoring import ScoringRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TofuPlan", "build_metrics", "plan_tofu"]

Records = Mapping[str, Mapping[str, Any]]


@dataclass
class TofuPlan:
    """Every text to score once and every prompt to continue once, with what is needed to read the answers.

    Attributes:
        scoring: keys are `METRIC/index`, for perturbed answers `METRIC/index/k`, for holdout rows `holdout/index`.
        generation: keys are `SET_Q_A_ROUGE/index`.
        questions, truths: by generation key.
        answer_texts: decoded label text by scoring key of forget answers and holdout rows, for ZLIB.
    """

    preset: Preset
    rows: TofuRows
    scoring: list[ScoringRequest] = field(default_factory=list)
    generation: list[GenerationRequest] = field(default_factory=list)
    questions: dict[str, str] = field(default_factory=dict)
    truths: dict[str, str] = field(default_factory=dict)
    answer_texts: dict[str, str] = field(default_factory=dict)

    def attacked(self) -> list[ScoringRequest]:
        """The forget answers and holdout rows."""
        return [request for request in self.scoring if request.token_level]

    def likelihoods(self) -> list[ScoringRequest]:
        """What forget quality and PrivLeak need: truth ratios of the forget rows and the attacked texts."""
        return [r for r in self.scoring if r.token_level or r.key.startswith("forget_")]

    def scored_answer(self, key: str) -> str | None:
        """Key of the scored true answer to a generation's question."""
        return key.replace("_Q_A_ROUGE/", "_Q_A_Prob/")

    @property
    def forget_metric(self) -> str:
        """The metric whose rows a retain log must share: of the paraphrases where there are any, else the answers."""
        paraphrased = any("paraphrased_answer" in row for row in self.rows.forget)
        return "forget_Q_A_PARA_Prob" if paraphrased else "forget_Q_A_Prob"

    def empty_log(self) -> EvalLog:
        """A log of the forget rows without values, to check a retain log before any model is loaded."""
        prefix = f"{self.forget_metric}/"
        indices = [request.key.split("/")[1] for request in self.scoring if request.key.startswith(prefix)]
        truths = {i: {"ground_truth": self.rows.forget[int(i)]["answer"]} for i in indices}
        metrics = {self.forget_metric: {"value_by_index": {i: {} for i in indices}}}
        metrics["forget_Q_A_ROUGE"] = {"value_by_index": truths}
        return EvalLog(metrics, "tofu", self.preset.name, "this evaluation")


def plan_tofu(
    rows: TofuRows,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptFormat,
    preset: Preset,
    max_items: int | None = None,
    chosen: Sequence[int] | None = None,
) -> TofuPlan:
    """Encode everything the metrics need, each text once.

    `max_items` keeps that many evenly spaced rows of every set, a cheap look at a model during training; indices stay
    those of the full set. `chosen`: the forget rows that count instead.
    """
    plan = TofuPlan(preset, rows)

    def score(key: str, row: Row, answer: str, token_level: bool = False) -> tuple[int, ...]:
        text = encode_row(row, answer, prompt, tokenizer)
        group = "attacked" if token_level else key.split("_")[0]
        # The true answers' argmax hits tell how the greedy answers begin.
        plan.scoring.append(ScoringRequest(key, text, token_level, group, hits="_Q_A_Prob" in key))
        if token_level:
            plan.answer_texts[key] = tokenizer.decode(list(text.label_ids), skip_special_tokens=True)
        return text.prompt_ids

    for name in ("forget", "retain", "ra", "wf"):
        row_set = getattr(rows, name)
        limit = preset.max_rows if name in ("forget", "retain") else None
        every = name != "forget" or chosen is None
        for i in selected_rows(len(row_set), limit, max_items) if every else chosen or ():
            row = row_set[i]
            # The greedy answer goes on from where the labels of the true one begin.
            prompt_ids = score(f"{name}_Q_A_Prob/{i}", row, row["answer"], token_level=name == "forget")
            if name in ("forget", "retain") and "paraphrased_answer" in row:
                score(f"{name}_Q_A_PARA_Prob/{i}", row, row["paraphrased_answer"])
            for k, wrong in enumerate(row.get("perturbed_answer", ())):
                score(f"{name}_Q_A_PERT_Prob/{i}/{k}", row, wrong)
            key = f"{name}_Q_A_ROUGE/{i}"
            bound = preset.answer_tokens - (len(prompt_ids) if preset.answer_bound == "total" else 0)
            left = left_to_say(row["answer"], row.get("given"))
            expected = len(tokenizer(left, add_special_tokens=False)["input_ids"])
            plan.generation.append(GenerationRequest(key, prompt_ids, max(0, bound), expected))
            plan.questions[key], plan.truths[key] = row["question"], left.strip()
    for i in selected_rows(len(rows.holdout), preset.max_rows, max_items):
        score(f"holdout/{i}", rows.holdout[i], rows.holdout[i]["answer"], token_level=True)
    return plan


def _by_metric(records: Records) -> dict[str, dict[int, Any]]:
    """Records by metric and index; perturbed answers become lists."""
    metrics: dict[str, dict[int, Any]] = {}
    for key, record in records.items():
        metric, index, *answer = key.split("/")
        node = metrics.setdefault(metric, {})
        if answer:
            node.setdefault(int(index), {})[int(answer[0])] = record
        else:
            node[int(index)] = record
    for node in metrics.values():
        for index, value in node.items():
            if 0 in value:
                node[index] = [value[k] for k in sorted(value)]
    return metrics


def build_metrics(
    plan: TofuPlan,
    records: Records,
    generations: Records | None = None,
    reference: Records | None = None,
    gradnorms: Records | None = None,
) -> dict[str, dict[str, Any]]:
    """open-unlearning's metric tree of per-item values, without aggregates.

    Args:
        plan: what was asked.
        records: `score_texts` of `plan.scoring` (or of a part of it).
        generations: `generate_texts` of `plan.generation`.
        reference: the reference model's `score_texts` of `plan.attacked()`.
        gradnorms: `gradient_norms` of `plan.attacked()`.
    """
    scored = _by_metric(records)
    metrics: dict[str, dict[str, Any]] = {}
    for name, node in scored.items():
        if name != "holdout":
            metrics[name] = {"value_by_index": {str(i): probability_row(node[i]) for i in sorted(node)}}
    keys = {"forget": "forget_Q_A_Prob", "holdout": "holdout"}
    sides = {side: scored[key] for side, key in keys.items() if scored.get(key)}
    if "forget" in sides:
        metrics |= memorization_rows(sides["forget"], plan.preset)
        texts = {side: {i: plan.answer_texts[f"{keys[side]}/{i}"] for i in sides[side]} for side in sides}
        other = None
        if reference is not None:
            grouped = _by_metric(reference)
            other = {side: grouped[keys[side]] for side in sides}
        metrics |= attack_rows(sides, texts, plan.preset, other)
        if gradnorms is not None:
            grouped = _by_metric(gradnorms)
            metrics["mia_gradnorm"] = {
                side: {"value_by_index": {str(i): {"score": r["score"]} for i, r in grouped[keys[side]].items()}}
                for side in sides
            }
    for key, record in (generations or {}).items():
        metric, index = key.split("/")
        text, truth = record["generation"].strip(), plan.truths[key]
        row = rouge_scores(truth, text, use_stemmer=plan.preset.use_stemmer)
        row |= {"input": plan.questions[key], "ground_truth": truth, "generation": text}
        metrics.setdefault(metric, {"value_by_index": {}})["value_by_index"][index] = row
    return metrics
