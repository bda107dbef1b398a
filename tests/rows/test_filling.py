"""One rule for format strings: fields, doubled braces, values with braces, and what is refused."""

import pytest

from fdiv.alignment import D2OConfig
from fdiv.errors import DataError
from fdiv.eval.pass_at_k.evaluation import PassKEvalConfig
from fdiv.eval.tofu.evaluation import TofuEvalConfig
from fdiv.filling import check_template, fill
from fdiv.inference.prompting import PromptFormat
from fdiv.recipes.tasks.negatives.safe_rlhf import SafeRLHFNegativesConfig
from fdiv.recipes.tasks.tofu.memorised import TofuMemorisedConfig
from fdiv.recipes.tasks.tofu.unlearning import TofuUnlearningConfig
from fdiv.unlearning import FLATConfig

QUIET = {"report_to": "none", "use_cpu": True, "bf16": False}

VALUES = ["x", "", "{", "}}", "{question}", "{0}", r"\boxed{4}", "%s", "{'a': {}}", "a\nb"]


@pytest.mark.parametrize("value", VALUES)
def test_values_are_put_in_as_they_are(value):
    assert fill("Q: {question}\nA:", question=value) == f"Q: {value}\nA:"
    assert fill("{question}{answer}{question}", question=value, answer="-") == f"{value}-{value}"
    assert fill(r"{question} in \boxed{{}}, {{question}}", question=value) == value + r" in \boxed{}, {question}"


WRONG = [
    "{",
    "}",
    "a {",
    "{}",
    "{0}",
    "{question.__class__}",
    "{question!r}",
    "{question:>9}",
    "{question[0]}",
    "{ question }",
]


@pytest.mark.parametrize("template", WRONG)
def test_braces_alone_are_refused_with_the_remedy(template):
    with pytest.raises(DataError, match=r"f='.*write \{\{ and \}\} for braces.*fields are \{question\}"):
        check_template("{question}" + template, ("question",), what="f")
    with pytest.raises(DataError):
        fill(template, question="x")


@pytest.mark.parametrize("field", ["Question", "prompt", "answer", "questions"])
def test_an_unknown_field_is_named_with_those_there_are(field):
    with pytest.raises(DataError, match=rf"the field \{{{field}\}}, which is not there: fields are \{{question\}}"):
        check_template(f"{{question}} {{{field}}}", ("question",), what="f")


def config_of(name, template, tmp_path):
    make = {
        "question_format": lambda: PromptFormat(question_format=template),
        "tofu": lambda: TofuEvalConfig(question_format=template),
        "passk": lambda: PassKEvalConfig(question_format=template, n=1, k=[1]),
        "prompt_format": lambda: FLATConfig(str(tmp_path), prompt_format=template, **QUIET),
        "memorised": lambda: TofuMemorisedConfig(model="m", data="d", question_format=template),
        "tofu_unlearning": lambda: TofuUnlearningConfig(question_format=template),
        "safe_rlhf": lambda: SafeRLHFNegativesConfig(prompt_format=template.replace("{question}", "{prompt}")),
        "anchors": lambda: D2OConfig(
            str(tmp_path), anchor_instruction_templates=[template.replace("{question}", "{prompt}")], **QUIET
        ),
    }
    return make[name]()


@pytest.mark.parametrize(
    "name",
    ["question_format", "tofu", "passk", "prompt_format", "memorised", "tofu_unlearning", "safe_rlhf", "anchors"],
)
def test_every_option_follows_the_rule(name, tmp_path):
    config_of(name, r"{question} in \boxed{{}}", tmp_path)
    for template, reason in [
        ("no field", "does not contain"),
        ("{question} {other}", "which is not there"),
        (r"{question} in \boxed{}", "braces in the text"),
        ("{{question}}", "does not contain"),
    ]:
        with pytest.raises(ValueError, match=reason):
            config_of(name, template, tmp_path)


def test_an_instruction_for_templates(tmp_path):
    options = {"template_source": "generated", **QUIET}
    FLATConfig(str(tmp_path), template_instruction="{question} {{x}} {answer}", **options)
    with pytest.raises(ValueError, match=r"template_instruction=.*fields are \{question\}, \{answer\}"):
        FLATConfig(str(tmp_path), template_instruction="{prompt}", **options)


def test_training_and_evaluation_fill_alike():
    from datasets import Dataset

    from fdiv.unlearning.data.rows import read_answers

    template, question = r"{question} {{x}}", r"Is {this} \boxed{4}?"
    rows = Dataset.from_list([{"question": question, "answer": "Yes {b}."}])
    (row,) = read_answers(rows, prompt_format=template, has_chat_template=False, what="forget")
    assert row.prompt == question + " {x}" == PromptFormat(question_format=template)._plain(question)
    assert row.completion == " Yes {b}."
