"""Evaluation after each epoch, the rule that picks one, and the builders of the TOFU recipes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.catalog import EVALUATIONS
from fdiv.recipes.tasks.tiny.authors import TinyAuthorsConfig
from fdiv.recipes.tasks.tofu.unlearning import TofuUnlearningConfig
from fdiv.training.evaluation import build_evaluation
from fdiv.unlearning.selection import selection_score
from tests.support.runs.unlearning import forget_rows, history, make_trainer
from tests.support.same_run import weights


def test_selection_score_by_hand():
    """Above the floor 0.9·0.5 = 0.45 it is forget quality; below, utility/0.45 − 1."""
    assert selection_score(0.3, 0.46, 0.5, 0.9) == 0.3
    assert selection_score(1e-20, 0.45, 0.5, 0.9) == 1e-20
    assert selection_score(0.99, 0.225, 0.5, 0.9) == pytest.approx(-0.5)
    assert selection_score(0.99, 0.0, 0.5, 0.9) == -1.0
    # no epoch below the floor beats one above it, and the more useful of two below wins
    assert selection_score(1.0, 0.4499, 0.5, 0.9) < selection_score(0.0, 0.45, 0.5, 0.9)
    assert selection_score(0.0, 0.4, 0.5, 0.9) > selection_score(1.0, 0.3, 0.5, 0.9)


@dataclass
class ScriptedEvaluation:
    """Gives the n-th call the n-th pair of (forget quality, model utility)."""

    calls: ClassVar[list[tuple[float | None, float]]] = []
    script: list[Any] = field(default_factory=list)

    def evaluate(self, model, tokenizer, datasets, context):
        assert not model.training
        quality, utility = self.script[len(self.calls)]
        self.calls.append((quality, utility))
        return {"forget_quality": quality, "model_utility": utility, "notes": {}}


@pytest.fixture
def scripted(monkeypatch):
    ScriptedEvaluation.calls.clear()
    monkeypatch.setitem(EVALUATIONS, "scripted", f"{__name__}:ScriptedEvaluation")
    return {"name": "scripted"}


def test_selection_by_the_distance_from_the_retrained_model(tmp_path):
    """0.8 and 0.9 keep the floor 0.9·0.8 = 0.72: the nearer wins; 0.6 is below it, its ratio to the floor minus 1."""
    from types import SimpleNamespace

    from fdiv.unlearning.selection import evaluate_epoch

    script = [(0.5, 0.8), (0.2, 0.75), (0.0, 0.6)]

    class Distances:
        def evaluate(self, model, tokenizer, datasets, context):
            distance, utility = script.pop(0)
            return {"forget_quality": 1e-30, "retrained_distance": distance, "model_utility": utility}

    module = torch.nn.Linear(1, 1)
    args = SimpleNamespace(
        selection_by="retrained_distance",
        utility_floor=0.9,
        metric_for_best_model="selection",
        seed=0,
        output_dir=str(tmp_path),
    )
    trainer = SimpleNamespace(
        args=args, model=module, processing_class=None, row_reports=[], state=SimpleNamespace(log_history=[]),
    )  # fmt: skip
    scores = []
    for _ in range(3):
        metrics = evaluate_epoch(trainer, Distances())
        trainer.state.log_history.append(metrics)
        scores.append(metrics["eval_selection"])
    assert scores == pytest.approx([0.5, 0.8, 0.6 / 0.72 - 1])


SELECTING = {
    "eval_strategy": "epoch", "eval_on_start": True, "save_strategy": "best", "metric_for_best_model": "selection",
    "load_best_model_at_end": True, "max_steps": -1, "num_train_epochs": 3,
}  # fmt: skip


def test_the_best_epoch_is_what_remains(scripted, tiny_model_dir, tmp_path):
    """Start, then epochs with FQ .2, .9 (utility lost) and .4: the third is kept, and its weights are loaded."""
    script = [(0.0, 0.5), (0.2, 0.5), (0.9, 0.1), (0.4, 0.46)]
    options = SELECTING | {"epoch_evaluation": scripted | {"script": script}}
    trainer = make_trainer("GradDiff", str(tiny_model_dir), tmp_path / "a", **options)
    trainer.train()
    assert history(trainer, "eval_selection").tolist() == pytest.approx([0.0, 0.2, 0.1 / 0.45 - 1, 0.4])
    assert trainer.state.best_global_step == 9 and ScriptedEvaluation.calls == script
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)  # no rows of its own were asked for

    ScriptedEvaluation.calls.clear()
    options["epoch_evaluation"] = scripted | {"script": [(0.0, 0.5), (0.6, 0.5), (0.9, 0.1), (0.4, 0.46)]}
    earlier = make_trainer("GradDiff", str(tiny_model_dir), tmp_path / "b", eval_dataset=forget_rows(5), **options)
    earlier.train()
    assert earlier.state.best_global_step == 3
    assert len(history(earlier, "eval_loss")) == 4
    assert (weights(trainer) == _weights_after_epochs(3, tiny_model_dir, tmp_path / "c")).all()
    assert (weights(earlier) != weights(trainer)).any()


def _weights_after_epochs(count, model_dir, folder):
    """The same run without any evaluation."""
    plain = make_trainer("GradDiff", str(model_dir), folder, max_steps=-1, num_train_epochs=count)
    plain.train()
    return weights(plain)


def test_a_missing_metric_is_an_error_at_the_start(scripted, tiny_model_dir, tmp_path):
    options = SELECTING | {"epoch_evaluation": scripted | {"script": [(None, 0.5)]}}
    trainer = make_trainer("GradDiff", str(tiny_model_dir), tmp_path, **options)
    with pytest.raises(ValueError, match="selection needs forget_quality"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_bad_epoch_evaluations(scripted, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="epoch_evaluation: unknown evaluation 'tufo'"):
        build_evaluation({"name": "tufo"})
    with pytest.raises(ValueError, match="sript"):
        build_evaluation(scripted | {"sript": []})
    for options, message in [
        ({"epoch_evaluation": scripted}, "eval_strategy is no"),
        ({"epoch_evaluation": "tofu", "eval_strategy": "epoch"}, "mapping"),
        ({"utility_floor": 0.0}, "utility_floor=0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_trainer("GradDiff", str(tiny_model_dir), tmp_path, **options)


def test_tofu_builder_settles_the_data(tmp_path):
    for name in ("forget05", "retain95"):
        (tmp_path / f"{name}.json").write_text('{"question": "a", "answer": "b"}\n')
    config = TofuUnlearningConfig(data=str(tmp_path), split="forget05", retain="retain95")
    assert config.build(tmp_path / "out") == {
        "dataset_name": str(tmp_path / "forget05.json"),
        "retain_dataset_name": str(tmp_path / "retain95.json"),
    }
    hub = TofuUnlearningConfig(split="forget01", retain="retain99").build(tmp_path / "hub")
    assert hub["dataset_name"] == hub["retain_dataset_name"] == "locuslab/TOFU"
    assert (hub["dataset_config"], hub["retain_dataset_config"]) == ("forget01", "retain99")
    with pytest.raises(FileNotFoundError, match="forget10"):
        TofuUnlearningConfig(data=str(tmp_path)).build(tmp_path / "out")
    with pytest.raises(ValueError, match="max_items=1"):
        TofuUnlearningConfig(max_items=1)


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("authors")
    return folder, TinyAuthorsConfig(authors=6, forget_authors=2, train_steps=80).build(folder)


def test_tiny_authors_are_what_tofus_evaluation_reads(authors):
    from fdiv.eval.tofu.data import load_tofu_rows

    folder, keys = authors
    rows = load_tofu_rows("forget", str(folder / "data"), "holdout")
    assert not rows.missing
    assert (len(rows.forget), len(rows.retain)) == (2 * 4, 4 * 4)
    assert all(len(set(row["perturbed_answer"])) == 3 for row in rows.forget)
    assert all(row["paraphrased_answer"] not in row["perturbed_answer"] for row in rows.forget + rows.retain)
    forget = [json.loads(line) for line in open(keys["dataset_name"]).read().splitlines()]
    assert [row["answer"] for row in forget] == [row["answer"] for row in rows.forget]
    assert json.loads((folder / "retain_log" / "TOFU_EVAL.json").read_text())


def test_the_model_knows_the_authors_and_the_retain_model_does_not(authors):
    """Length-normalised probability of the forget answers: high in one model, low in the other; retain high in both."""
    folder, keys = authors

    def probability(model, rows):
        model_dir = str(folder / model)
        trainer = make_trainer(
            "GradAscent", AutoModelForCausalLM.from_pretrained(model_dir), folder / "x", rows=_rows(rows),
            tokenizer=AutoTokenizer.from_pretrained(model_dir), eval_dataset=_rows(rows),
        )  # fmt: skip
        return trainer.evaluate()["eval_prob/forget"]

    assert probability("model", keys["dataset_name"]) > 0.8
    assert probability("retain_model", keys["dataset_name"]) < 0.5
    assert probability("model", keys["retain_dataset_name"]) > 0.8
    assert probability("retain_model", keys["retain_dataset_name"]) > 0.8


def _rows(path):
    from fdiv.unlearning.data import load_rows

    return load_rows(path)


def test_muse_epochs_are_selected_by_the_memory_gap(scripted, tiny_model_dir, tmp_path, monkeypatch):
    """Gaps .8, .3 (KnowMem of the retain set lost), .1, 0 and 0: the first epoch without a gap is kept."""
    script = [(0.8, 0.9), (0.3, 0.45), (0.1, 0.85), (0.0, 0.82), (0.0, 0.9)]

    def evaluate(self, model, tokenizer, datasets, context):
        gap, kept = self.script[len(self.calls)]
        self.calls.append((gap, kept))
        return {"memory_gap": gap, "retain_knowmem_ROUGE": kept, "forget_quality": None}

    monkeypatch.setattr(ScriptedEvaluation, "evaluate", evaluate)
    options = SELECTING | {"epoch_evaluation": scripted | {"script": script}, "num_train_epochs": 4}
    trainer = make_trainer("GradDiff", str(tiny_model_dir), tmp_path, **options)
    trainer.train()
    assert history(trainer, "eval_selection").tolist() == pytest.approx([0.2, 0.45 / 0.81 - 1, 0.9, 1.0, 1.0])
    assert trainer.state.best_global_step == 9
