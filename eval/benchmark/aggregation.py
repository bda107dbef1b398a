"""What TOFU's and MUSE's aggregation share: a result that says why a value is missing, ROUGE, attacks and PrivLeak."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fdiv.errors import DataError
from fdiv.eval.benchmark.log import EvalLog
from fdiv.eval.benchmark.presets import Preset
from fdiv.eval.metrics.membership import ATTACKS, auc, privleak
from fdiv.eval.metrics.text_overlap import needs_unicode_words, ngram_entropy, rouge_scores
from fdiv.sealed import NO_DIGEST
from fdiv.stamps import compare_stamps

__all__ = ["REQUIRED_KEYS", "Aggregates", "check_retain_log"]

REQUIRED_KEYS = ("forget_quality", "forget_truth_ratio", "model_utility", "privleak", "extraction_strength")
"""Keys every `out.json` has, whichever the benchmark."""


@dataclass
class Aggregates:
    """Aggregated values of one log: `values[name]` is a number or None, and then `notes[name]` says why.

    `log` is the input log with every `agg_value` filled in, ready for `write_eval_log`.
    """

    preset: Preset
    log: EvalLog
    values: dict[str, float | None] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def compare_retain(self, lines: Sequence[str]) -> None:
        """Keep what was said of the retain log, and of a log that was read without a digest."""
        if lines:
            self.notes["retain_log"] = "; ".join(lines)
        if not self.log.checked:
            self.notes["log"] = NO_DIGEST

    def put(self, name: str, value: float | None, note: str | None = None) -> None:
        """Store a value; None and non-finite numbers are stored as None and need a note."""
        if value is not None and not math.isfinite(value):
            note, value = f"not a finite number ({value}){'; ' + note if note else ''}", None
        if value is None and not note:
            raise ValueError(f"{name} is null without a reason")
        self.values[name] = None if value is None else float(value)
        self.notes.pop(name, None)
        if note:
            self.notes[name] = note
        if value is not None:
            self.log.metrics.setdefault(name, {})["agg_value"] = float(value)

    def missing(self, name: str, needed: str | None = None) -> None:
        """Record that the log cannot give `name`, with the reason the run stamped where there is one."""
        reasons = self.log.stamp.get("missing", {})
        reason = reasons.get(name) or reasons.get(name.split("_")[0])
        self.put(name, None, reason or f"the log holds no per-item values of {needed or name}")

    def mean(self, name: str, column: dict[int, Any], dropped: int = 0) -> None:
        """Store the mean over rows (of the mean within a row for lists)."""
        if not column:
            self.missing(name)
            return
        note = f"{dropped} rows without a value are left out" if dropped else None
        self.put(name, float(np.mean([np.mean(v) for v in column.values()])), note)

    def rouge(self, name: str, field_name: str, max_rows: int | None = None) -> None:
        """Mean ROUGE of a metric under the preset's stemming; recomputed from text where the log was made with the
        other."""
        from fdiv.eval.benchmark.presets import get_preset

        rows = self.log.items(name, max_rows=max_rows)
        if not rows:
            self.missing(name)
            return
        made_with = self.log.stamp.get("use_stemmer", get_preset(self.log.preset).use_stemmer)
        with_text = {i: row for i, row in rows.items() if "generation" in row and "ground_truth" in row}
        # Other tools' logs hold 0 for an answer of another script, or without a word: computed again from the text.
        other_script = [i for i, row in with_text.items() if needs_unicode_words(row["ground_truth"])]
        if made_with == self.preset.use_stemmer:
            column = self.log.column(name, field_name, max_rows=max_rows)
            wordless = [i for i, row in with_text.items() if not re.search(r"[^\W_]", row["ground_truth"])]
            again = [*other_script, *wordless]
        elif len(with_text) == len(rows):
            column, again = {}, list(rows)
        else:
            word = "with" if made_with else "without"
            self.put(name, None, f"the log's ROUGE was made {word} stemming and its text is not kept to redo it")
            return
        for i in again:
            row = with_text[i]
            scores = rouge_scores(row["ground_truth"], row["generation"], use_stemmer=self.preset.use_stemmer)
            column[i] = scores[field_name]
        defined = {i: column[i] for i in sorted(column) if column[i] is not None}
        if not defined:
            self.put(name, None, "no true answer has a word that ROUGE could count")
            return
        notes = []
        if other_script:
            notes.append(
                f"{len(other_script)} of {len(rows)} true answers are not in Latin letters: their ROUGE counts the "
                "words of Unicode, single characters where a script puts no spaces"
            )
        if len(defined) < len(rows):
            notes.append(f"{len(rows) - len(defined)} rows without a value are left out")
        self.put(name, float(np.mean(list(defined.values()))) * self.preset.rouge_scale, "; ".join(notes) or None)

    def fluency(self, name: str, rouge_name: str) -> None:
        """Mean n-gram entropy of a metric's generations."""
        texts = [r["generation"] for r in self.log.items(rouge_name).values() if "generation" in r]
        if not texts:
            self.put(name, None, "the log keeps no generated text")
            return
        entropies = [e for e in map(ngram_entropy, texts) if e is not None]
        short = len(texts) - len(entropies)
        if not entropies:
            self.put(name, None, "every generation is shorter than three words")
        else:
            self.put(
                name, float(np.mean(entropies)), f"{short} generations under three words left out" if short else None
            )

    def classifier(self, name: str) -> None:
        """Mean score of the gibberish classifier; null with the reason where it was not run."""
        column = self.log.column(name, "score")
        if column:
            self.mean(name, column)
        else:
            reason = self.log.stamp.get("missing", {}).get(name)
            self.put(name, None, reason or "the log holds no scores of the gibberish classifier")

    def attacks(self, max_rows: int | None = None) -> None:
        """AUC of every membership attack, `mia_<attack>`, from per-item scores."""
        for attack in ATTACKS:
            name = f"mia_{attack}"
            sides = {s: self.log.column(name, "score", s, max_rows) for s in ("forget", "holdout")}
            empty = [s for s, column in sides.items() if not column]
            if empty:
                reason = self.log.stamp.get("missing", {}).get(name)
                self.put(name, None, reason or f"the log holds no {' and no '.join(empty)} scores of {name}")
                continue
            for side, column in sides.items():
                self.log.metrics[name][side]["agg_value"] = float(np.mean(list(column.values())))
            value = auc(list(sides["forget"].values()), list(sides["holdout"].values()))
            few = [f"{len(column)} {side}" for side, column in sides.items() if len(column) < 2]
            note = f"an AUC of {' and '.join(few)} text says next to nothing" if few else None
            self.put(name, value, note)
            self.log.metrics[name]["auc"] = value

    def privleak(self, retain: Aggregates | None, corpus: str = "") -> None:
        """PrivLeak on Min-40%, against the retain log or, said in the notes, the preset's assumed retain AUC."""
        own, note = self.values.get("mia_min_k"), self.notes.get("mia_min_k")
        if own is None:
            self.put("privleak", None, f"needs the Min-K AUC: {self.notes['mia_min_k']}")
            self.put("privleak_retain_auc", None, self.notes["privleak"])
            return
        if retain is not None:
            reference = retain.values.get("mia_min_k")
            if reference is None:
                raise DataError(
                    f"{retain.log.source}: the retain log holds no Min-K scores, so PrivLeak has no reference; "
                    "make the retain log again with its holdout rows"
                )
        else:
            assumed = dict(self.preset.assumed_retain_auc)
            reference = assumed.get(corpus, assumed.get(""))
            if reference is None:
                reason = f"no retain log was given, and preset {self.preset.name} assumes no retain AUC"
                self.put("privleak", None, reason)
                self.put("privleak_retain_auc", None, reason)
                return
            few = f"; {note}" if note else ""
            note = (
                f"no retain log was given: the retain model's Min-K AUC is ASSUMED to be {reference} (preset "
                f"{self.preset.name}); give --retain_logs or --retain_model for a measured one{few}"
            )
        try:
            self.put("privleak", privleak(own, reference, epsilon=self.preset.epsilon), note)
        except ValueError as error:
            self.put("privleak", None, str(error))
        self.values["privleak_retain_auc"] = reference
        if retain is None:
            self.notes["privleak_retain_auc"] = "assumed, see privleak"


def check_retain_log(log: EvalLog, retain: EvalLog, metric: str) -> list[str]:
    """Refuse a retain log that was not made on the same rows, with the same definitions and the same encoding.

    Returns:
        Notes: what differs and may be fine (the number type), what could not be compared.

    Raises:
        ValueError: another benchmark, preset, split, number of rows or set of true answers; another chat template,
            prompt format, system prompt, date or end token.
    """
    where = f"retain log {retain.source}"
    if retain.benchmark != log.benchmark:
        raise DataError(f"{where}: a {retain.benchmark} log, the model's is a {log.benchmark} log")
    if retain.preset != log.preset:
        raise DataError(
            f"{where}: made with preset {retain.preset}, the model's values with preset {log.preset}; evaluate "
            "the retain model with the same preset"
        )
    ours, theirs = log.split(), retain.split()
    if ours and theirs and ours != theirs:
        raise DataError(f"{where}: made on split {theirs}, the model's values on {ours}; use {ours}'s retain log")
    own_rows, retain_rows = log.items(metric), retain.items(metric)
    subset = log.stamp.get("max_items") is not None and own_rows.keys() <= retain_rows.keys()
    if own_rows and retain_rows and own_rows.keys() != retain_rows.keys() and not subset:
        raise DataError(
            f"{where}: {len(retain_rows)} rows of {metric}, the model's log has {len(own_rows)}: "
            "it is of another split"
        )
    ours, theirs = log.stamp.get("forget_rows"), retain.stamp.get("forget_rows")
    if ours and theirs and ours != theirs:
        raise DataError(f"{where}: made on other forget rows than the model's values (fingerprints {theirs}, {ours})")
    own_truths, retain_truths = log.truths(), retain.truths()
    if own_truths and retain_truths and not subset:
        same = sum(a == b for a, b in zip(own_truths, retain_truths, strict=False))
        if same < 0.5 * max(len(own_truths), len(retain_truths)):
            raise DataError(f"{where}: its true answers are not those of the model's log, so it is of another split")
    remedy = "evaluate the retain model with these settings, or the model with those of the retain log"
    notes = compare_stamps(log.made_with(), retain.made_with(), where, remedy)
    return notes if retain.checked else [*notes, f"{where}: {NO_DIGEST}"]


def fresh(log: EvalLog) -> EvalLog:
    """A copy whose aggregates may be overwritten: per-item rows are shared, the metric nodes are not."""
    metrics = {}
    for name, node in log.metrics.items():
        metrics[name] = {k: copy.copy(v) if k in ("forget", "holdout") else v for k, v in node.items()}
    return replace(log, metrics=metrics, stamp=dict(log.stamp))
