"""When two answers are equal, and where an answer stands: tables of kinds, and families made from them.

The worker's own functions are called in this process; test_rewards_math.py goes through the pool.
"""

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fdiv.rl.rewards.math import comparison, verifier
from fdiv.rl.rewards.math.extraction import boxed, final_answer, gold_answer
from fdiv.rl.rewards.math.reading import read

grader = pytest.importorskip("math_verify.grader")

EQUAL = r"""
\frac12 @ \frac12
\frac{1}{2} @ \dfrac12
\frac{5}{6} @ \frac 5 6
2\sqrt{3} @ 2\sqrt3
$\frac13$ @ \frac13
10000 @ 10\,000
\frac\pi2 @ \frac{\pi}{2}
\sqrt\pi @ \sqrt{\pi}
\frac{\sqrt3}2 @ \frac{\sqrt{3}}{2}
\frac1{2} @ 0.5
\frac{1}2 @ 1/2
\tfrac{3}{4} @ 0.75
10 000 @ 10000
10\ 000 @ 10000
1{,}000 @ 1000
1,\!000 @ 1000
1,000 @ 1000
1,234,567 @ 1234567
12,000 @ 12 000
0.\overline{3} @ \frac13
0.\overline{36} @ \frac{4}{11}
0.1\overline{6} @ \frac16
1.2e5 @ 120000
1.2\times10^5 @ 120000
1.5\cdot 10^{-8} @ 0.000000015
3\frac12 @ 3.5
3 1/2 @ \frac72
\pm 2 @ 2,-2
\{1,2\} @ \{2,1\}
1,2 @ 2, 1
1, 3 @ 1,3
1,2 @ x=1 \text{ or } x=2
50\% @ 50%
50\% @ 0.5
60^\circ @ 60
60 @ 60^{\circ}
60° @ 60\text{ degrees}
45\degree @ 45
\$18 @ 18
18 @ \$18.00
18 @ 18\text{ dollars}
18 @ 18 dollars
18 @ 18 apples
5 @ 5m
5\text{ cm} @ 5
5 @ 5\text{ cm}
5\text{ cm} @ 5 cm
5\text{ cm} @ 50\text{ mm}
5 \text{ cm}^2 @ 5\text{ square centimeters}
2\text{ hours} @ 120\text{ minutes}
x=5 @ 5
5 @ x = 5
5 @ x=2+3=5
f(x)=x+1 @ x+1
x+1 @ 1+x
(x+1)^2 @ x^2+2x+1
x^10 @ x^{10}
C @ (C)
C @ \text{C}
C @ \textbf{(C)}
C @ C) 12
(C) @ C
\text{Tuesday} @ Tuesday
north @ \text{North}
\text{yes} @ Yes
\text{odd} @ \mathrm{odd}
5. @ 5
5 @ 5.
5.0 @ 5
05 @ 5
.5 @ 0.5
-5 @ −5
½ @ 0.5
x² @ x^2
√2 @ \sqrt{2}
2π @ 2\pi
3×4 @ 12
(−∞, 2) @ (-\infty,2)
x \leq 2 @ x ≤ 2
21_4 @ 21_4
21_4 @ 21_{4}
2516_8 @ 2516_{\text{eight}}
21_4 @ 21
21_{4} @ (21)_4
\frac{1}{3} @ 0.333333
\frac13 @ 0.33333333
\pi @ 3.14159265
\sqrt2 @ 1.41421356
2^{10} @ 1024
5! @ 120
\binom52 @ 10
\dbinom{5}{2} @ 10
(1,2) @ (1, 2)
\left(1,2\right) @ (1,2)
\left(-\frac53,0\right) @ (-\frac{5}{3},0)
x>2 @ (2,\infty)
\begin{pmatrix}1\\2\end{pmatrix} @ \begin{pmatrix} 1 \\ 2 \end{pmatrix}
1+2i @ 2i+1
$48$, $384$ @ 384, 48
$2$ or $-2$ @ \pm2
20 $cm^{2}$ @ 20
$145$solution: @ 145
$22.1cm^{2}$ @ 22.1
\frac{13}{12} @ 1\frac{1}{12}
1.1\% @ 1.1\%
$120,000$ @ 120000
x\in[1,2] @ [1,2]
[2,+\infty) @ [2,\infty)
4:30p.. @ 4:30p..
\{x|-2\leq x < 1\} @ \{x|-2\leq x < 1\}
b > a > c @ b > a > c
$Quadrant I$ @ \text{Quadrant I}
$1 \frac{3}{4}$ @ 1.75
y=\frac{e}{4}x+\frac{e}{4} @ \frac{e}{4}(x+1)
9\sqrt{2} @ \sqrt{162}
100, 200, 300 @ 100,200,300
2\text{ and }3 @ 2,3
\infty @ +\infty
e^{-1} @ \frac{1}{e}
1:2 @ \frac12
2s @ 2s
4t @ 4t
ab+ab^{2}+b @ b(a+ab+1)
\frac{2}{7} \sqrt{53} @ \frac{2\sqrt{53}}{7}
\log_2 8 @ 3
\lfloor 2.5\rfloor @ 2
|x| @ \left|x\right|
-\frac12 @ \frac{-1}{2}
\frac{-1}{2} @ -0.5
12\text{ cm} @ 12\,\text{cm}
12 @ 12\,\mathrm{cm}
3 hours @ 3
37.50 @ \$37.5
\text{(A)} @ A
6\text{ units} @ 6
\cos x @ \cos(x)
\text{A} @ A.
1/2 @ 1 / 2
10^{100} @ 10^{100}
9^{9^{9}} @ 9^{9^9}
"""

DIFFERENT = r"""
1/2^{99} @ 1/2^{98}
\frac{1}{2^{99}} @ \frac{1}{2^{100}}
10^{-20} @ 10^{-21}
\sqrt{2}+10^{-20} @ \sqrt{2}
10^{30}+1.5 @ 10^{30}
\pi\cdot10^{-20} @ \pi\cdot 10^{-21}
e^{-50} @ e^{-51}
0.0000001 @ 0.0000002
0.0000001 @ 0
0 @ 0.0000001
0.0123456 @ 0.0123457
0.5000001 @ 0.5
\{1,10^{-20}\} @ \{1,10^{-21}\}
(1,10^{-20}) @ (1,10^{-21})
x+10^{-20} @ x
\begin{pmatrix}10^{-20}\end{pmatrix} @ \begin{pmatrix}10^{-21}\end{pmatrix}
y=x/2^{99} @ y=x/2^{98}
21_3 @ 21_4
21_4 @ 9
21_4 @ 100_3
21_4 @ 22_4
2516_8 @ 2516_9
10\,000 @ 20\,000
10 000 @ 20 000
10000 @ 10
10000 @ 1000
2t @ 2
2t @ 2h
2t @ 3t
4t @ 4
5\text{ cm} @ 5\text{ m}
5 \text{ cm}^2 @ 6\text{ cm}^2
2\text{ hours} @ 2\text{ minutes}
north @ thorn
\text{north} @ \text{thorn}
north @ \text{thorn}
\text{Tuesday} @ Monday
\text{even} @ neve
0.\overline{3} @ 0.3
0.\overline{3} @ 0.33
3\frac12 @ \frac32
\pm 2 @ 2
1,2 @ 1
1,2 @ 1,2,3
1 @ 1,2
x_1 @ x_2
4 @ 5=4
5 @ 2x=10
4 @ x^2=4
\frac12 @ \frac13
\frac12 @ \frac{12}{1}
\frac12 @ 12
2\sqrt3 @ 2\sqrt2
2\sqrt3 @ \sqrt3
C @ D
C @ C or D
C @ A) C)
C @ C. D.
(1,2) @ (2,1)
(1,2) @ [1,2]
(2,1) @ (3,1)
[1,2) @ [1,2]
(1,2,3) @ (3,2,1)
1.2e5 @ 1.2e6
\frac13 @ 0.33
\frac13 @ 0.333334
\pi @ 3.14
50\% @ 5
-3 @ 3
2 @ -2
y=2x+1 @ y=2x+2
x=5 @ y=5
\log_2 3 @ \log_3 2
e^{2} @ e^{3}
i @ -i
1+2i @ 1-2i
1:2 @ 2:1
5! @ 5
12 @ 1 2
1000000000000000000001 @ 1000000000000000000002
1.0000000000000001 @ 1
5 @ 5x
5 @ 5xyz
x @ y
10^{100} @ 10^{101}
60^\circ @ 61
\text{yes} @ \text{no}
\infty @ -\infty
\emptyset @ \{0\}
12,000 @ 12
12,000 @ 12,0
100 @ 1
\sin x @ \cos x
x^2 @ x^3
x^10 @ x
|x| @ x
\lfloor 2.5\rfloor @ 3
5 @ \text{five}
2^{10} @ 2^{11}
9^{9^{9}} @ 9^{9^{8}}
7\pi @ 7
18 @ 18 000
18 @ 1.8
3250 @ 3.250
0.05 @ 0.5
(2,\infty) @ x<2
x>2 @ x\geq 2
"""


@pytest.fixture(scope="module", autouse=True)
def corrected():
    names = ("sympy_numeric_eq", "sympy_symbolic_eq")
    kept = {name: getattr(grader, name) for name in names}
    verifier.prepare({"answers": "boxed"})
    yield
    for name, function in kept.items():
        setattr(grader, name, function)


def verdict(gold, completion):
    return verifier.answer({"gold": gold, "completion": completion, "opened": False})["verdict"]


def rows(table):
    return [tuple(line.split(" @ ")) for line in table.strip().splitlines()]


@pytest.mark.parametrize(("gold", "answer"), rows(EQUAL))
def test_equal_answers(gold, answer):
    assert verdict(gold, rf"\boxed{{{answer}}}") == "correct"


@pytest.mark.parametrize(("gold", "answer"), rows(DIFFERENT))
def test_different_answers(gold, answer):
    assert verdict(gold, rf"\boxed{{{answer}}}") == "wrong"


# ---------------------------------------------------------------- families
def fraction_forms(a, b):
    digits = rf"\frac{a}{b}" if 0 < a < 10 and b < 10 else rf"\frac{{{a}}}{{{b}}}"
    return [
        rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{a}}}{{{b}}}", rf"\tfrac{{{a}}}{{{b}}}", f"{a}/{b}", f"{a} / {b}",
        rf"\frac {a} {b}" if a > 0 else f"{a}/{b}", digits, rf"\frac{{{2 * a}}}{{{2 * b}}}", rf"{a}\div {b}",
    ]  # fmt: skip


def root_forms(a, b):
    digit = rf"{a}\sqrt{b}" if b < 10 else rf"{a}\sqrt{{{b}}}"
    return [
        rf"{a}\sqrt{{{b}}}",
        rf"{a} \sqrt {{{b}}}",
        digit,
        rf"{a}\cdot\sqrt{{{b}}}",
        f"{a}√{{{b}}}",
        f"{a}*sqrt({b})",
    ]


def grouped_forms(a, b):
    whole, rest = f"{a % 999 + 1}", f"{b % 1000:03d}"
    return [f"{whole}{mark}{rest}" for mark in ("", ",", "{,}", r"\,", r"\ ", r",\!", " ", "\u2009", "~")]


def numeral_forms(a, b):
    digits, base = "".join(str(int(digit) % b) for digit in str(a + b)), min(b + 2, 16)
    return [
        f"{digits}_{{{base}}}",
        f"({digits})_{{{base}}}",
        rf"{digits}_{{\text{{{base}}}}}",
        rf"${digits}_{{{base}}}$",
    ]


def decimal_forms(a, b):
    return [f"{a}.{b:02d}", f"{a}.{b:02d}0", f"0{a}.{b:02d}", f"{a}.{b:02d}\\text{{ cm}}", f"{100 * a + b}/100"]


def power_forms(a, b):
    return [f"1/{b}^{{{a + 60}}}", rf"\frac{{1}}{{{b}^{{{a + 60}}}}}", f"{b}^{{-{a + 60}}}", f"{b}^{{-{a + 59}}}/{b}"]


def pair_forms(a, b):
    return [f"({a}, {b})", f"({a},{b})", rf"\left({a}, {b}\right)", rf"$({a},\,{b})$"]


def set_forms(a, b):
    return [
        f"{a}, {a + b}",
        f"{a + b},{a}",
        rf"\{{{a}, {a + b}\}}",
        rf"${a}$ and ${a + b}$",
        rf"{a} \text{{ or }} {a + b}",
    ]


FAMILIES = {
    "fraction": fraction_forms, "root": root_forms, "grouped": grouped_forms, "numeral": numeral_forms,
    "decimal": decimal_forms, "power": power_forms, "pair": pair_forms, "set": set_forms,
}  # fmt: skip
WRAPPINGS = [
    r"\boxed{%s}", r"so $\boxed{%s}$.", "thus\n\\[\n\\boxed{%s}\n\\]\n", r"<think>\boxed{0}</think>\n**Answer:** \(\boxed{ %s }\)",
    r"The final answer is $%s$.", r"\boxed{1}, no: wait, this is wrong, and so \fbox{%s}", "\\boxed{%s}\r\n\r\nDone.",
]  # fmt: skip
numbers = st.tuples(st.integers(1, 40), st.integers(2, 9))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@given(pair=numbers, other=numbers, data=st.data())
@settings(max_examples=12, deadline=None)
def test_every_form_of_a_number_is_that_number_and_no_other(family, pair, other, data):
    forms = family(*pair)
    gold, answer = data.draw(st.sampled_from(forms)), data.draw(st.sampled_from(forms))
    wrapping = data.draw(st.sampled_from(WRAPPINGS))
    if "answer is" in wrapping:
        answer = answer.replace(r"\$", "").replace("$", "")
    assert verdict(gold, wrapping.replace("%s", answer)) == "correct"
    neighbour = data.draw(st.sampled_from(family(*other)))
    if not same_value(family, pair, other):
        assert verdict(gold, rf"\boxed{{{neighbour}}}") == "wrong"


def same_value(family, first, second):
    """Whether two pairs give one number, by arithmetic on integers."""
    (a, b), (c, d) = first, second
    return {
        fraction_forms: a * d == b * c, root_forms: a * a * b == c * c * d,
        grouped_forms: (a, b) == (c, d), decimal_forms: (a, b) == (c, d),
        numeral_forms: numeral_forms(a, b)[0].lstrip("0") == numeral_forms(c, d)[0].lstrip("0"),
        power_forms: b ** (a + 60) == d ** (c + 60), pair_forms: (a, b) == (c, d),
        set_forms: {a, a + b} == {c, c + d},
    }[family]  # fmt: skip


@given(st.integers(-(10**9), 10**9), st.integers(1, 12), st.integers(-3, 3))
@example(10001, 8, 1)  # one last digit apart and four digits alike: 1e-8 in binary lies below 1e-8
@example(205291881, 12, -1)  # a zero at the end is a place
@example(-10011, 8, 1)
@settings(max_examples=15, deadline=None)
def test_decimals_are_exact(number, places, step):
    """A decimal equals itself in every form, and no other decimal of as many places."""

    def text(value):
        sign, digits = "-" if value < 0 else "", f"{abs(value):0{places + 1}d}"
        return f"{sign}{digits[:-places]}.{digits[-places:]}"

    first, second = text(number), text(number + step)
    assert verdict(first, rf"\boxed{{{second}}}") == ("correct" if step == 0 else "wrong")
    assert verdict(first, rf"\boxed{{{number}/10^{{{places}}}}}") == "correct"


PIECES = [*r"\{}^_$()[],. 0123456789abxfrcsqt", r"\frac", r"\boxed{", r"\text{"]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
@settings(max_examples=60, deadline=None)
def test_any_text_has_a_verdict_and_matches_itself_unless_it_is_missing(text):
    content = boxed(rf"\boxed{{{text}}}") or ""
    assert verdict("1", rf"\boxed{{{text}}}") in ("correct", "wrong", "no_answer")
    gold = read(gold_answer(content))
    if not gold.missing and content:
        assert comparison.equal(gold, read(content))


# ---------------------------------------------------------------- places
@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"\boxed 5", "5"),
        (r"so $\boxed5$.", "5"),
        (r"\boxed \frac{1}{2}.", r"\frac{1}{2}"),
        (r"\boxed\frac12", r"\frac12"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox{5}", "5"),
        (r"put it in \boxed{}: \boxed{5}; I put it in \boxed{}.", "5"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{4} and \boxed{2}", "4, 2"),
        (r"$x = \boxed{4}$, $y = \boxed{2}$", "4, 2"),
        (r"\boxed{4}. That is not so, it has to be \boxed{2}", "2"),
        (r"\boxed{5} \boxed{5}", "5"),
        (r"\boxed{4} and then \boxed{5", None),
        (r"\boxed{4} and then \boxed", None),
        (r"\boxed{4} and then \box", None),
        (r"\boxed{4} and then $\fbox{\frac{1}{2}", None),
        (r"<think>it is \boxed{4}", None),
        (r"<think>a</think> b <think>it is \boxed{4}", None),
        (r"<think>it is \boxed{4}</think>", None),
        (r"<thinking>\boxed{4}</thinking> \boxed{5}", "5"),
        (r"[THINK]\boxed{4}[/THINK] \boxed{5}", "5"),
        (r"it is \boxed{4}</think> \boxed{5}", "5"),
        (r"The final answer is \(18\).", "18"),
        (r"**Answer:** $18$%", r"18\%"),
        (r"The answers are $1$, $2$ and $3$.", "1, 2, 3"),
        (r"Answer: it costs $5 more", None),
        ("18", None),
        ("", None),
    ],
)
def test_where_the_answer_stands(completion, expected):
    assert final_answer(completion) == expected


def test_a_prompt_that_opened_the_reasoning():
    assert final_answer(r"it is \boxed{4}", opened=True) is None
    assert final_answer(r"it is \boxed{4}</think> \boxed{5}", opened=True) == "5"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("9 * 2 = 18\n#### 18", "18"),
        ("#### 18 dollars\n\nIs there a #", "18 dollars"),
        ("It makes 18 dollars", "18"),
        ("It makes $1,800.", "$1,800"),
        ("The answer is 18, which is 3 more than 15.", "18"),
        ("Answer: 1/2", "1/2"),
        ("<answer>18</answer>", "18"),
        ("<answer>18", None),
        ("so x = $y^2$", "y^2"),
        ("No idea.", None),
    ],
)
def test_where_a_plain_answer_stands(completion, expected):
    assert final_answer(completion, plain=True) == expected


@pytest.mark.parametrize(
    "unit",
    [r"\boxed{", r"\boxed{}", r"\boxed 1{", r"\fbox", "$", "$$", r"\(", r"\[", "$x$ ", "answer ", "answer $x$ ", "1+", "1,",
     "####", "<think>", "<answer>", "{", r"\{", "\n", r"\boxed{\boxed{}", "$a", "1 "],
)  # fmt: skip
def test_places_are_found_in_linear_time(unit):
    """Four times the text takes at most some eight times the time (quadratic: sixteen), and never a second per 20 KB.

    The least of three times: whatever else a processor does makes a time longer, never shorter.
    """

    def seconds(length):
        text = (unit * (length // len(unit) + 1))[:length]
        times = []
        for _ in range(3):
            began = time.process_time()
            final_answer(text, plain=True)
            times.append(time.process_time() - began)
        return min(times)

    small, large = seconds(20_000), seconds(80_000)
    assert large < 1.0
    assert large < 8 * small + 0.1


@pytest.mark.parametrize("gold", ["", "nan", "NaN", "N/A", "n/a", "<NA>", "[]", "####", "#### "])
def test_missing_golds(gold):
    assert verdict(gold, r"\boxed{5}") == verdict(gold, rf"\boxed{{{gold}}}") == "unusable_gold"


@pytest.mark.parametrize("gold", ["the one in the middle", "4:30p..", r"\frac{1}{", "It is not known yet"])
def test_golds_that_are_no_mathematics_match_their_own_letters_alone(gold):
    assert verdict(gold, r"\boxed{5}") == "unusable_gold"
    assert verdict(gold, "nothing") == "unusable_gold"
    if re.fullmatch(r"[^{}]*", gold):
        assert verdict(gold, rf"\boxed{{{gold}}}") == "correct"


def test_the_comparison_of_math_verify_is_wrong_without_the_correction():
    """Where it gets right what is corrected here, the correction can go."""
    import math_verify

    path = math_verify.grader.__file__
    source = {}
    exec(compile(open(path).read(), path, "exec"), source)
    a, b = read("1/2^{99}").readings[0], read("1/2^{98}").readings[0]
    assert source["sympy_numeric_eq"](a, b, 6, 15)
    assert not comparison.numbers_equal(a, b)
