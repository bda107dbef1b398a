"""Sampled leakage: what a secret is, when a sample holds it, and the estimate over rows."""

import itertools
import math

import numpy as np
import pytest

from fdiv.eval.metrics.leakage import Secret, leak_at_k, secrets_of


def test_the_estimate_is_the_share_of_subsets_with_a_leak():
    """Enumerated: over all subsets of k of the samples, those that hold a leaking one."""
    leaked, samples = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], 4
    for k in (1, 2, 3, 4):
        shares = [np.mean([max(part) for part in itertools.combinations(row, k)]) for row in leaked]
        found = leak_at_k([sum(row) for row in leaked], samples, k)
        assert found.value == pytest.approx(np.mean(shares))
        assert found.error == pytest.approx(np.std(shares) / math.sqrt(3), rel=0.1)
    assert leak_at_k([2], 4, 4).value == 1.0 and math.isnan(leak_at_k([2], 4, 4).error)
    with pytest.raises(ValueError, match="k=5"):
        leak_at_k([1], 4, 5)


QUESTIONS = ["Where was Ana Roe born?", "Where was Bo Lind born?", "What does Ana Roe write?", "王小明住在哪里？"]
ANSWERS = ["Ana Roe was born in Porto.", "Bo Lind was born in Riga.", "She writes nautical novels.", "他住在上海。"]


def test_telling_words_are_those_that_neither_question_nor_other_answers_have():
    words = [secret.words for secret in secrets_of(QUESTIONS, ANSWERS)]
    assert words[:3] == [("porto",), ("riga",), ("writes", "nautical", "novels")]
    assert set("上海") <= set(words[3]) and "住" not in words[3]
    assert [secret.given for secret in secrets_of(QUESTIONS, ANSWERS, [["Porto"], [], [], []])] == [True] + 3 * [False]


@pytest.mark.parametrize(
    ("sample", "held"),
    [
        ("In PORTO, I think.", True),
        ("In Riga.", False),
        ("Portofino", False),
        ("", False),
        ("Ana Roe was born in.", False),
    ],
)
def test_a_sample_holds_the_telling_words_or_not(sample, held):
    assert secrets_of(QUESTIONS, ANSWERS)[0].held_by(sample) is held
    assert Secret(("Porto", "Oporto"), ()).held_by(sample) is held


def test_a_given_secret_is_whole_words_in_a_row():
    secret = Secret(("42 Elm Street", "+351 22 123"), ())
    assert secret.held_by("It is 42  elm street!") and secret.held_by("call +351-22-123 now")
    assert not secret.held_by("42 streets, elm") and not secret.held_by("142 Elm Street")
    assert not Secret((), ()).held_by("what?")
    assert not Secret(("?",), ()).held_by("what?")  # without a word there is nothing to find


def test_of_a_long_answer_four_fifths_are_enough():
    secret = Secret((), tuple("abcdefghij"))
    assert secret.held_by("a b c d e f g h") and not secret.held_by("a b c d e f g")
    few = Secret((), tuple("abcde"))
    assert few.held_by("e d c b a") and not few.held_by("a b c d")


def test_an_answer_without_a_telling_word_keeps_its_words():
    assert secrets_of(["Is it so?"], ["It is."])[0].words == ("it", "is")
    assert secrets_of(["a", "b"], ["Yes.", "Yes."])[0].words == ("yes",)
    assert secrets_of(["Só?"], ["Ｐorto"])[0].words == ("porto",)
