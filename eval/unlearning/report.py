"""The erasure report: one page and one record of what was asked to go, what was found before and after, and under
attack, what was not measured, and what such numbers cannot prove. It claims no more than was measured."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdiv.eval.unlearning.aggregate import defined_mean
from fdiv.eval.unlearning.attacks.rows import answered, asked
from fdiv.eval.unlearning.measurement import AttackResult, Measured, attack_values
from fdiv.eval.unlearning.sets import RowSets
from fdiv.eval.unlearning.statements import cannot_prove, in_short, not_measured
from fdiv.files import plain
from fdiv.inference.cache import fingerprint
from fdiv.provenance import command_line, environment
from fdiv.report.document import Page
from fdiv.report.metrics import hover, marked
from fdiv.sealed import write_record
from fdiv.terminal import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fdiv.eval.unlearning.evaluation import UnlearningEvalConfig
    from fdiv.evaluation import EvalContext

__all__ = ["About", "content_of", "settings_of", "show_table", "stopping_rule", "write_report"]

TITLE = "What was asked to go, and what was still found"
_SHOWN = 10  # forget rows on the page
_STYLE = (
    "td.text, th.text { text-align: left; white-space: normal; max-width: 30rem; } ul { margin-top: .3rem; } "
    "@media (max-width: 600px) { td:first-child, th:first-child { white-space: normal; min-width: 7rem; } }"
)
_MEASURES = {
    "forget_probability": "forget rows: probability per token",
    "extraction_strength": "forget rows: extraction strength",
    "exact_memorization": "forget rows: exact memorisation",
    "leak@1": "forget rows: one sampled answer holds the secret",
    "leak@K": "forget rows: one of {k} sampled answers holds the secret",
    "paraphrase_probability": "in other words: probability per token",
    "paraphrase_extraction_strength": "in other words: extraction strength",
    "forget_min_k": "forget rows: Min-K score",
    "mia_min_k": "Min-K against holdout rows, AUC",
    "forgotten": "forgotten: 1 − what is above chance",
    "neighbour_probability": "neighbours: probability per token",
    "neighbour_exact_memorization": "neighbours: exact memorisation",
    "general_probability": "general text: probability per token",
    "kept": "kept: neighbours and general text",
}
_CHANCE = {"forget_probability": "probability", "extraction_strength": "extraction_strength"}


@dataclass
class About:
    """What the numbers belong to.

    Attributes:
        model: what was measured. base: the name of the model before unlearning; None: the same folder.
        settings: of the evaluation. method, epochs, rule: of the training, where it was made in this run.
        command: that made it. environment: versions and machine. hide_texts: digests in place of texts.
    """

    model: str
    base: str | None
    settings: dict[str, Any]
    method: dict[str, Any] | None = None
    epochs: list[dict[str, Any]] = field(default_factory=list)
    rule: str | None = None
    command: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    hide_texts: bool = False

    @classmethod
    def of_run(cls, config: UnlearningEvalConfig, sets: RowSets, context: EvalContext) -> About:
        """Of a training run, at its end."""
        trainer, args = context.extra["trainer"], context.training_args
        state = trainer.state
        base = getattr(getattr(trainer.model, "config", None), "_name_or_path", None)
        keys = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
        method = {**plain(trainer.objective_settings()), **{key: plain(getattr(args, key)) for key in keys}}
        return cls(
            model=str(args.output_dir),
            base=base,
            settings=settings_of(config),
            method={name: value for name, value in method.items() if value is not None} | {"steps": state.global_step},
            epochs=_epochs(state),
            rule=stopping_rule(args),
            command=command_line(),
            environment=environment("", args.seed),
            hide_texts=config.hide_texts,
        )


def settings_of(config: Any) -> dict[str, Any]:
    """The settings of an evaluation that are set."""
    return {name: value for name, value in asdict(config).items() if value is not None}


def _epochs(state: Any) -> list[dict[str, Any]]:
    """What each evaluation while training found, and which epoch was taken."""
    names = ("forgotten", "kept", "forget_probability", "extraction_strength", "selection")
    found: dict[int, dict[str, Any]] = {}
    for entry in state.log_history:
        if "eval_forgotten" in entry:
            values = {name: entry.get(f"eval_{name}") for name in names}
            taken = state.best_global_step is not None and entry["step"] == state.best_global_step
            found[entry["step"]] = {"epoch": entry.get("epoch"), "step": entry["step"], **values, "taken": taken}
    return list(found.values())


def stopping_rule(args: Any) -> str | None:
    """The rule of a run, in words; None for one without."""
    if getattr(args, "metric_for_best_model", None) != "selection" or args.epoch_evaluation is None:
        return None
    parts = [
        f"after every epoch, forgotten is measured; an epoch counts where {args.utility_floor:.0%} of what is kept at "
        "the start is left, and the best such epoch is taken (where there is none, the one that keeps most)"
    ]
    if getattr(args, "stop_at", None) is not None:
        parts.append(f"training ends at the first epoch with forgotten of at least {args.stop_at:g}")
    if args.early_stopping_patience is not None:
        parts.append(f"or when {args.early_stopping_patience} epochs have brought no improvement")
    parts.append(f"or after {args.num_train_epochs:g} epochs")
    return "; ".join(parts)


# ---------------------------------------------------------------- the record
def content_of(
    sets: RowSets, before: Measured, after: Measured, about: About, retrained: Measured | None = None
) -> dict[str, Any]:
    """The content of `erasure.json`."""
    values: dict[str, Any] = {}
    for name, value in after.values.items():
        if name.endswith("_se"):
            continue
        entry = {"before": before.values.get(name), "after": value}
        if f"{name}_se" in after.values:
            entry |= {"before_se": before.values.get(f"{name}_se"), "after_se": after.values[f"{name}_se"]}
        if retrained is not None:
            entry["retrained"] = retrained.values.get(name)
        values[name] = entry
    for name, score in _CHANCE.items():
        values[name]["chance"] = defined_mean([row[score] for row in after.chance])[0]
    others = {} if retrained is None else {result.name: result for result in retrained.attacks}
    return {
        "report": TITLE,
        "in_short": in_short(before, after, others),
        "asked": _asked(sets, about),
        "model": {"measured": about.model, "before": about.base},
        "measured": values,
        "attacks": [_attack(result, others.get(result.name)) for result in after.attacks],
        "areas": {name: value for name, value in attack_values(after.attacks).items() if name.endswith("_area")},
        "rows": _rows(sets, before, after),
        "examples": _examples(sets, before, after, about),
        "training": {"method": about.method, "epochs": about.epochs, "stopping_rule": about.rule},
        "not_measured": not_measured(sets, after, about.settings, retrained is not None),
        "cannot_prove": cannot_prove(),
        "notes": {**before.notes, **after.notes, **{f"rows: {name}": text for name, text in sets.origins.items()}},
        "settings": about.settings,
        "seconds": {"before": round(before.seconds, 1), "after": round(after.seconds, 1)},
        "command": about.command,
        "environment": about.environment,
    }


def _asked(sets: RowSets, about: About) -> dict[str, Any]:
    given = sum(secret.given for secret in sets.secrets)
    return {
        "source": str(sets.forget.fdiv_source),
        "rows": len(sets.forget),
        "measured_rows": len(sets.asked),
        "digest": fingerprint([[asked(row), answered(row)] for row in sets.forget]),
        "secrets_given": given,
        "secrets_from_words_of_the_answer": len(sets.secrets) - given,
        "first_rows": [_text(sets, number, about) for number in range(min(_SHOWN, len(sets.asked)))],
    }


def _text(sets: RowSets, number: int, about: About) -> dict[str, str]:
    row = sets.asked[number]
    if about.hide_texts:
        return {"question": f"digest {fingerprint(asked(row))}", "answer": f"digest {fingerprint(answered(row))}"}
    return {"question": asked(row), "answer": answered(row).strip()}


def _rows(sets: RowSets, before: Measured, after: Measured) -> list[dict[str, Any]]:
    found = []
    for index, (old, new) in enumerate(zip(before.rows, after.rows, strict=True)):
        entry: dict[str, Any] = {"row": sets.asked[index]["row"], "number": index}
        for name in ("probability", "extraction_strength", "exact_memorization", "leaked"):
            if name in new:
                entry[name] = {"before": old.get(name), "after": new[name]}
        entry["chance"] = {name: after.chance[index][name] for name in ("probability", "extraction_strength")}
        found.append(entry)
    return found


def _attack(result: AttackResult, other: AttackResult | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": result.name, "rows": result.rows, "notes": result.notes}
    if result.reason is not None:
        return {**entry, "not_made": result.reason}
    for name, value in result.values.items():
        entry[name] = {"without_attack": result.unattacked.get(name), "attacked": value}
        if other is not None:
            entry[name]["retrained"] = other.values.get(name)
    return {**entry, "seconds": round(result.seconds, 1)}


def _examples(sets: RowSets, before: Measured, after: Measured, about: About) -> list[dict[str, Any]]:
    found = []
    for key in after.answers:
        answers = {"before": before.answers.get(key), "after": after.answers[key]}
        if about.hide_texts:
            held = sets.secrets[int(key)].held_by
            answers = {when: None if text is None else f"holds it: {held(text)}" for when, text in answers.items()}
        found.append({"number": int(key), **_text(sets, int(key), about), **answers})
    return found


# ---------------------------------------------------------------- the page
def write_report(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write `erasure.json` and `erasure.html` of `content_of` into `folder`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / "erasure.json", content)
    page = _ReportPage(folder / "erasure.html")
    page.head(content)
    page.before_and_after(content)
    page.attacks(content)
    page.plot(_relearning_plot(content["attacks"]), "erasure_relearning", "Forget rows after relearning, by steps")
    page.examples(content)
    page.remaining(content)
    page.training(content)
    page.statements("What was not measured", content["not_measured"])
    page.statements("What such numbers cannot prove", content["cannot_prove"])
    page.provenance(content)
    return page.write(TITLE, _STYLE)


def show_table(content: Mapping[str, Any]) -> None:
    """Before, after and chance on the terminal, with the summary below."""
    from fdiv.terminal import print_table

    rows = []
    for name, entry in content["measured"].items():
        title = _title(name)
        if title is not None and (entry["before"] is not None or entry["after"] is not None):
            cells = (_with_error(entry, "before"), _with_error(entry, "after"), number(entry.get("chance")))
            rows.append((marked(name, title=title), *cells))
    for entry in content["attacks"]:
        if "forget_probability" in entry:
            pair = entry["forget_probability"]
            cells = (number(pair["without_attack"]), number(pair["attacked"]), "")
            rows.append((f"{entry['name']}: probability without and under the attack", *cells))
    print_table(TITLE, ("", "before", "after", "chance"), rows, content["in_short"])


class _ReportPage(Page):
    """The parts of the report."""

    def head(self, content: Mapping[str, Any]) -> None:
        """The model, the summary in sentences, and what was asked to go."""
        model, what = content["model"], content["asked"]
        before = "" if model["before"] is None else f", before unlearning {model['before']}"
        self.add(f'<p class="sub">{html.escape(str(model["measured"]) + before)}</p>')
        self.statements("In short", content["in_short"])
        self.add("<h2>What was asked to go</h2>")
        cut = "" if what["rows"] == what["measured_rows"] else f", measured as {what['measured_rows']} passages"
        secrets = (
            f"Secrets: given for {what['secrets_given']}, read off the words of the answer for "
            f"{what['secrets_from_words_of_the_answer']}."
        )
        self.add(
            f"<p>{what['rows']} rows of {html.escape(what['source'])}{cut}, digest {what['digest']}. {secrets}</p>"
        )
        rows = [f"{row['question']}\n  → {row['answer']}" for row in what["first_rows"]]
        self.details(f"the first {len(rows)}", "\n".join(rows))

    def statements(self, title: str, lines: Sequence[str]) -> None:
        """A heading and a list."""
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        self.add(f"<h2>{html.escape(title)}</h2>\n<ul>{items}</ul>")

    def before_and_after(self, content: Mapping[str, Any]) -> None:
        """The means over rows."""
        measured = content["measured"]
        retrained = any("retrained" in entry for entry in measured.values())
        rows, hovers = [], {}
        for name, entry in measured.items():
            title = _title(name)
            if title is None or (entry["before"] is None and entry["after"] is None):
                continue
            shown = marked(name, title=title)
            hovers[shown] = hover(name)
            cells = [_with_error(entry, when) for when in ("before", "after")]
            cells += [number(entry.get("chance"))] + ([number(entry["retrained"])] if retrained else [])
            rows.append((shown, *cells))
        self.add("<h2>Before and after</h2>")
        self.table(("mean over rows", "before", "after", "chance", *(["retrained"] * retrained)), rows, hovers)
        self.add(
            '<p class="sub">± one standard error over rows. Chance: the same answers under the questions of other '
            "rows, before unlearning; there is nothing to gain below it.</p>"
        )
        self.notes(content["notes"].items())

    def attacks(self, content: Mapping[str, Any]) -> None:
        """What each attack brings back."""
        self.add("<h2>Under attack</h2>")
        if not content["attacks"]:
            self.add("<p>No attack was made.</p>")
            return
        rows, refused = [], []
        for entry in content["attacks"]:
            if "not_made" in entry:
                refused.append((entry["name"], entry["not_made"]))
                continue
            names = ("forget_probability", "extraction_strength", "above_chance")
            leak = next((name for name in entry if name.startswith("leak@") and not name.endswith("_se")), None)
            shown = [_attacked(entry[name]) if name in entry else "–" for name in names]
            shown.append("–" if leak is None else f"{leak}: {number(entry[leak]['attacked'])}")
            rows.append((entry["name"], str(entry["rows"]), *shown))
        self.table(("attack", "rows", "probability", "extraction strength", "above chance", "leakage"), rows, {})
        self.add(
            '<p class="sub">Of the same rows without the attack → under it (in brackets the retrained model under '
            "the same attack, where there is one). Rows that the attacker trained on are left out.</p>"
        )
        self.notes((entry["name"], note) for entry in content["attacks"] for note in entry["notes"])
        self.notes(refused)

    def examples(self, content: Mapping[str, Any]) -> None:
        """Greedy answers, of evenly spaced rows."""
        if not content["examples"]:
            return
        self.add(f"<h2>{len(content['examples'])} answers before and after</h2>")
        names = ("question", "answer", "before", "after")
        head = "".join(f'<th class="text">{name}</th>' for name in ("asked", "true answer", "before", "after"))
        body = ""
        for row in content["examples"]:
            cells = (html.escape(str("–" if row[name] is None else row[name])) for name in names)
            body += "<tr>" + "".join(f'<td class="text">{cell}</td>' for cell in cells) + "</tr>\n"
        self.add(f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>")
        self.add('<p class="sub">Greedy answers of evenly spaced rows, not chosen by what they say.</p>')

    def remaining(self, content: Mapping[str, Any]) -> None:
        """The rows of which most is left."""
        rows = sorted(content["rows"], key=lambda row: -(row["probability"]["after"] or 0.0))[:_SHOWN]
        self.add("<h2>The rows of which most is left</h2>")
        shown = [
            (
                str(row["row"]),
                *(number(row["probability"][when]) for when in ("before", "after")),
                number(row["chance"]["probability"]),
                *(number(row["extraction_strength"][when]) for when in ("before", "after")),
                number(row["leaked"]["after"]) if "leaked" in row else "–",
            )
            for row in rows
        ]
        head = (
            "row (from 0)",
            "P before",
            "P after",
            "P chance",
            "ES before",
            "ES after",
            "samples that hold the secret",
        )
        self.table(head, shown, {})

    def training(self, content: Mapping[str, Any]) -> None:
        """The method, and what each epoch gave."""
        training = content["training"]
        if training["method"] is None:
            return
        self.add("<h2>How it was unlearned</h2>")
        if training["stopping_rule"]:
            self.add(f"<p>Rule: {html.escape(training['stopping_rule'])}.</p>")
        names = ("forgotten", "kept", "forget_probability", "extraction_strength", "selection")
        rows = [
            (number(entry["epoch"]), *(number(entry[name]) for name in names), "taken" if entry["taken"] else "")
            for entry in training["epochs"]
        ]
        if rows:
            self.table(("epoch", *(marked(name) for name in names), ""), rows, {marked(n): hover(n) for n in names})
        self.details(
            "method and settings", "\n".join(f"{name}: {value}" for name, value in training["method"].items())
        )

    def provenance(self, content: Mapping[str, Any]) -> None:
        """How to get the same numbers again."""
        self.add(f"<h2>Reproduce</h2>\n<pre>{html.escape(content['command'])}</pre>")
        versions = content["environment"].get("versions", {})
        shown = " · ".join(f"{name} {version}" for name, version in versions.items() if version)
        self.add(f"<p>{html.escape(shown)}</p>")
        lines = "\n".join(f"{name}: {value}" for name, value in content["settings"].items())
        self.details("settings of the evaluation", lines)


def _title(name: str) -> str | None:
    if name in _MEASURES:
        return _MEASURES[name]
    return _MEASURES["leak@K"].format(k=name.partition("@")[2]) if name.startswith("leak@") else None


def _with_error(entry: Mapping[str, Any], when: str) -> str:
    error = entry.get(f"{when}_se")
    return number(entry[when]) + ("" if error is None else f" ± {number(error)}")


def _attacked(entry: Mapping[str, Any]) -> str:
    retrained = f" ({number(entry['retrained'])})" if "retrained" in entry else ""
    return f"{number(entry['without_attack'])} → {number(entry['attacked'])}{retrained}"


def _relearning_plot(attacks: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Probability over the steps of each relearning attack, 0 steps being the model without; None with fewer than two
    points."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in attacks:
        kind, _, steps = entry["name"].rpartition("_")
        if kind.startswith("relearn") and steps.isdigit() and "forget_probability" in entry:
            pair = entry["forget_probability"]
            curves.setdefault(kind, [(0, pair["without_attack"])]).append((int(steps), pair["attacked"]))
    if not any(len(points) > 2 for points in curves.values()):
        return None
    from fdiv.report.style import COLOURS, figure_grid, tidy

    figure, (axis,) = figure_grid(1, 1, 5.0, 3.0)
    for colour, (kind, points) in zip(COLOURS, curves.items(), strict=False):
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=kind)
    axis.set_ylim(bottom=0)
    tidy(axis, "relearning", "steps", "probability per token, forget rows", legend=len(curves) > 1)
    return figure
