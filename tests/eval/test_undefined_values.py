"""No number where none is defined: ROUGE of other scripts, PrivLeak against an AUC of 1, values no metric can have."""

import pytest

from fdiv.errors import DataError
from fdiv.eval.benchmark.aggregation import Aggregates
from fdiv.eval.benchmark.log import EvalLog
from fdiv.eval.benchmark.presets import get_preset
from fdiv.eval.metrics.membership import privleak
from fdiv.eval.metrics.text_overlap import needs_unicode_words, rouge_scores
from fdiv.eval.metrics.truth import closer_to_one, model_utility, true_better
from fdiv.unlearning.selection import selection_score

OPEN = get_preset("open_unlearning")
SCRIPTS = {
    "Chinese": ("王小明住在上海", "王小明住在北京", 5 / 7),
    "Japanese": ("彼は東京に住む", "彼は大阪に住む", 5 / 7),
    "Thai": ("กขคง", "กขคจ", 3 / 4),
    "Russian": ("Она живёт в Москве", "Она живёт в Киеве", 3 / 4),
    "Greek": ("Η Μαρία ζει εδώ", "η μαρία ζει εκεί", 3 / 4),
    "Arabic": ("هي تسكن في القاهرة", "هي تسكن في بغداد", 3 / 4),
    "Hebrew": ("היא גרה בחיפה", "היא גרה ביפו", 2 / 3),
    "Hindi": ("वह दिल्ली में रहती है", "वह मुंबई में रहती है", 4 / 5),
    "Korean": ("그는 서울에 산다", "그는 부산에 산다", 2 / 3),
    "with a number": ("Она родилась в 1984", "Она родилась в 1985", 3 / 4),
    "mixed": ("Dr. 王 lives", "Dr. 李 lives", 2 / 3),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("use_stemmer", [True, False])
def test_rouge_in_every_script(script, use_stemmer):
    """Recall counts the words (or unspaced characters) of the truth, by hand; a copy has 1, nothing has 0."""
    truth, near, recall = SCRIPTS[script]
    assert needs_unicode_words(truth)
    for text, expected in ((truth, 1.0), (near, recall), ("", 0.0)):
        scores = rouge_scores(truth, text, use_stemmer=use_stemmer)
        assert scores["rougeL_recall"] == scores["rouge1_recall"] == pytest.approx(expected)
    assert rouge_scores(truth, truth.swapcase())["rougeL_f1"] == 1.0


@pytest.mark.parametrize("truth", ["", "  ", "…", "?!", "—", "🙂", "。"])
def test_a_truth_without_words_has_no_rouge(truth):
    assert set(rouge_scores(truth, "anything").values()) == {None}


@pytest.mark.parametrize("truth", ["José Ortega’s book", "Zürich – 1984", "plain words, 12", "naïve “quotes”"])
def test_latin_text_keeps_the_numbers_of_rouge_score(truth):
    from rouge_score.rouge_scorer import RougeScorer

    assert not needs_unicode_words(truth)
    theirs = RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(truth, "Jose wrote a plain word in 1984")
    ours = rouge_scores(truth, "Jose wrote a plain word in 1984")
    assert ours["rougeL_recall"] == theirs["rougeL"].recall and ours["rougeL_f1"] == theirs["rougeL"].fmeasure


def rouge_log(truths, value=0.0):
    rows = {
        str(i): {"rougeL_recall": value, "ground_truth": truth, "generation": truth} for i, truth in enumerate(truths)
    }
    return Aggregates(OPEN, EvalLog({"forget_Q_A_ROUGE": {"value_by_index": rows}}, "tofu", "open_unlearning", "x"))


def test_zeros_of_other_tools_are_computed_again_and_noted():
    """Two of four answers are in another script (1 each, not the log's 0), one has no word: (0 + 1 + 1) / 3."""
    result = rouge_log(["plain text", "王小明", "Москва", "…"])
    result.rouge("forget_Q_A_ROUGE", "rougeL_recall")
    assert result.values["forget_Q_A_ROUGE"] == pytest.approx(2 / 3)
    note = result.notes["forget_Q_A_ROUGE"]
    assert "2 of 4 true answers are not in Latin letters" in note and "1 rows without a value are left out" in note


def test_rouge_of_wordless_truths_is_null_with_its_reason():
    result = rouge_log(["…", "?"])
    result.rouge("forget_Q_A_ROUGE", "rougeL_recall")
    assert result.values["forget_Q_A_ROUGE"] is None
    assert result.notes["forget_Q_A_ROUGE"] == "no true answer has a word that ROUGE could count"


@pytest.mark.parametrize("preset", ["open_unlearning", "muse_original"])
@pytest.mark.parametrize("own", [0.0, 0.5, 1.0])
def test_privleak_against_a_retain_auc_of_one(preset, own):
    ours, retain = (Aggregates(get_preset(preset), EvalLog({}, "muse", preset, "x")) for _ in range(2))
    ours.put("mia_min_k", own)
    retain.put("mia_min_k", 1.0)
    ours.privleak(retain, "News")
    assert ours.values["privleak"] is None and ours.values["privleak_retain_auc"] == 1.0
    assert "the retain model's AUC is 1" in ours.notes["privleak"]


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("quality", [0.0, 1.0])
def test_a_collapsed_epoch_never_wins(start, quality):
    """Utility 0 scores -1, the least there is, whatever the start had; any useful epoch beats it."""
    assert selection_score(quality, 0.0, start, 0.9) == -1.0
    assert selection_score(0.0, 0.01, start, 0.9) > -1.0


IMPOSSIBLE = [
    ("forget_Q_A_Prob", "prob", 1.5, "forget_Q_A_Prob, row 3: prob is 1.5, a probability outside"),
    ("forget_Q_A_Prob", "prob", -0.1, "row 3: prob is -0.1, a probability outside"),
    ("ra_Q_A_PERT_Prob", "prob", [0.2, 2.0], "row 3: prob is 2.0, a probability outside"),
    ("forget_Q_A_PARA_Prob", "avg_loss", -2.0, "row 3: avg_loss is -2.0, below 0"),
    ("forget_Q_A_ROUGE", "rougeL_recall", 40.0, "row 3: rougeL_recall is 40.0, a share outside"),
    ("extraction_strength", "score", -1.0, "row 3: score is -1.0, a share outside"),
]


@pytest.mark.parametrize(("metric", "name", "value", "message"), IMPOSSIBLE)
def test_a_log_with_impossible_values_is_refused_by_name(metric, name, value, message):
    log = EvalLog({metric: {"value_by_index": {"3": {name: value}}}}, "tofu", "open_unlearning", "old.json")
    with pytest.raises(DataError, match=f"old.json: .*{message}"):
        log.column(metric, name)


def test_rounding_of_a_probability_of_one_is_no_fault():
    log = EvalLog({"a_Prob": {"value_by_index": {"0": {"prob": 1.00001}}}}, "tofu", "open_unlearning", "old.json")
    assert log.column("a_Prob", "prob") == {0: 1.00001}


NOT_DEFINED = [
    (lambda: privleak(0.5, 1 - 1e-16), "the retain model's AUC is 1"),
    (lambda: privleak(0.5, 1 - 1e-12), "the retain model's AUC is 1"),
    (lambda: privleak(float("nan"), 0.5), "the AUC of the model is nan"),
    (lambda: privleak(0.5, -0.1), "the AUC of the retain model is -0.1"),
    (lambda: model_utility({"a": 0.5, "b": None}), "part b is None"),
    (lambda: true_better([]), "at least one"),
    (lambda: true_better([0.5, float("nan")]), "negative or NaN"),
    (lambda: closer_to_one([]), "at least one"),
    (lambda: closer_to_one([-0.1]), "negative or NaN"),
]


@pytest.mark.parametrize(("value", "message"), NOT_DEFINED)
def test_what_is_not_defined_has_no_number(value, message):
    with pytest.raises(ValueError, match=message):
        value()
