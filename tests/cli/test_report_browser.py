"""The report in a real browser: no script error, nothing from outside, no sideways scrolling, prints."""

import json

import pytest

from fdiv.cli import main
from fdiv.evaluation import EvalContext
from tests.support.browser import NAMES, WIDTHS, Browser, find_browser

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason=f"no browser: none of {', '.join(NAMES)} (apt-get install chromium-headless-shell)"
)


def write_run(folder, shift):
    """A run with everything a report shows, and with words, names and numbers that are hard to place."""
    names = ["pass@1", "pass@8", "privleak", "a_very_long_name_of_a_metric_that_never_ends_" * 3]
    result = {
        "recipe": "recipes/" + "deep/" * 30 + "name", "method": "dph", "divergence": {"name": "alpha", "alpha": 0.3},
        "seed": 1, "steps": 3, "train_seconds": 2.0, "summary_metrics": names, "notes": {"tv": "word " * 80 + "x" * 200},
        "unmet_requirements": ["pass@1 has not improved: " + "y" * 300],
    }  # fmt: skip
    for place, name in enumerate(names):
        result |= {f"before/{name}": 0.25, f"after/{name}": 0.5 + shift, f"after/{name}_se": 0.01 * place}
        result |= {f"before/{name}_se": 0.01, f"before/pass@{2**place}": 0.5, f"after/pass@{2**place}": 0.75}
    history = [
        {"step": s, "loss": 1 / s + shift, "rewards/chosen": s, "rewards/rejected": -s, "clamped_fraction": 0.0,
         "eval_loss": 2 / s, "divergence/reverse_kl": s, "divergence/reverse_kl_se": 0.1}
        for s in range(1, 5)
    ]  # fmt: skip
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "environment.json").write_text(
        json.dumps({"command": "fdiv run " + "--key value " * 60, "versions": {}})
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    (folder / "recipe_resolved.yaml").write_text("key: " + "z" * 400 + "\n")
    for stage in ("before", "after"):
        context = EvalContext(None, folder / "eval" / stage, stage=stage)
        context.output_dir.mkdir(parents=True)
        texts = ["<script>throw 1</script>", "w" * 500, "short", "for x in y:\n    pass\n" * 20, stage]
        context.keep_examples("tasks", [{"prompt": "Q" * 90, "completion": text + stage} for text in texts])
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory, repository):
    folder = tmp_path_factory.mktemp("pages")
    one, two = write_run(folder / "one", 0.0), write_run(folder / "two", 0.125)
    made = {"run": [one], "comparison": [one, two], "sweep": [repository / "results" / "tofu_forget10"]}
    for name, directories in made.items():
        assert main(["report", *map(str, directories), "--output", str(folder / name / "report.html")]) == 0
    return {name: folder / name / "report.html" for name in made}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(find_browser(), tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS.values())
def test_pages_load_alone_and_fit(browser, pages, width, dark):
    for name, path in pages.items():
        browser.size(width, dark)
        seen = browser.open(path.as_uri())
        assert seen.errors == [], name
        assert set(seen.requests) <= {path.as_uri()}, name
        browser.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert browser.too_wide() == [], f"{name} at {width}"
        red, green, blue = browser.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)"
        )
        assert (red + green + blue < 200) == dark
        # Words in plots and on the page stand out from it, in both schemes: WCAG's 4.5, here of the muted text.
        assert browser.evaluate(CONTRAST) > 4.5, name


CONTRAST = """(() => {
  const light = colour => { const [r, g, b] = colour.match(/[0-9.]+/g).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const page = light(getComputedStyle(document.body).backgroundColor);
  const all = [...document.querySelectorAll('p, li, td, th, h2, figcaption, svg text')].map(one =>
    light(getComputedStyle(one)[one.closest('svg') ? 'fill' : 'color']));
  return Math.min(...all.map(one => (Math.max(one, page) + 0.05) / (Math.min(one, page) + 0.05)));
})()"""


def test_the_legend_hides_a_run_in_every_plot(browser, pages):
    browser.size(WIDTHS["desktop"])
    browser.open(pages["comparison"].as_uri())
    count = "[...document.querySelectorAll('[id*=\"s0-\"]')].filter(one => one.getBoundingClientRect().width).length"
    before = browser.evaluate(count)
    assert before > 2
    browser.evaluate("document.querySelector('.legend input').click()")
    assert browser.evaluate(count) == 0
    others = browser.evaluate(count.replace("s0-", "s1-"))
    assert others == before


def test_ids_of_a_page_are_unique(browser, pages):
    for path in pages.values():
        browser.open(path.as_uri())
        ids = browser.evaluate(
            "[...document.querySelectorAll('[id]')].map(one => one.id).filter(id => /^(k|part)/.test(id))"
        )
        assert len(set(ids)) == len(ids)


def test_it_prints(browser, pages):
    for path in pages.values():
        browser.size(WIDTHS["desktop"], dark=True)
        browser.open(path.as_uri())
        pdf = browser.pdf()
        assert pdf.startswith(b"%PDF-") and len(pdf) > 10_000


def erasure(folder):
    """An erasure report with names and answers that are hard to place."""
    from fdiv.eval.unlearning.report import write_report

    place = "/a/folder/" + "of_a_name_without_end" * 12 + "/forget.jsonl"
    pair = {"before": 0.9375, "after": 0.0625, "before_se": 0.01, "after_se": 0.02, "chance": 0.03125}
    attack = {"without_attack": 0.0625, "attacked": 0.25, "retrained": 0.125}
    row = {"row": 3, "number": 3, "probability": pair, "extraction_strength": pair, "chance": {"probability": 0.5}}
    answer = {"question": "Q" * 90, "answer": "word " * 60, "before": "w" * 300, "after": None, "number": 0}
    shown = [{"question": "q" * 300, "answer": "a"}]
    asked = {
        "rows": 2,
        "measured_rows": 3,
        "source": place,
        "digest": "d" * 64,
        "secrets_given": 1,
        "first_rows": shown,
    }
    epoch = {"epoch": 1.0, "forgotten": 0.5, "kept": 0.25, "forget_probability": 0.5, "extraction_strength": 0.1}
    content = {
        "model": {"measured": place, "before": place}, "in_short": [f"No word of {place} came out."],
        "asked": {**asked, "secrets_from_words_of_the_answer": 1},
        "measured": {"forget_probability": pair, "leak@8": pair, "neighbour_probability": pair},
        "attacks": [{"name": f"relearn_{n}", "rows": 3, "notes": ["x" * 200], "forget_probability": attack} for n in (1, 5)],
        "examples": [answer], "rows": [row], "notes": {"at_chance": place},
        "training": {"method": {"method": "NPO"}, "epochs": [{**epoch, "selection": 0.5, "taken": True}], "stopping_rule": "r"},
        "not_measured": [place], "cannot_prove": [place], "command": "fdiv unlearn " + "--key value " * 40,
        "environment": {"versions": {"torch": "2"}}, "settings": {"forget": place},
    }  # fmt: skip
    return write_report(folder, content)


@pytest.mark.parametrize("width", WIDTHS.values())
def test_an_erasure_report_loads_alone_and_fits(browser, tmp_path, width):
    path = erasure(tmp_path)
    browser.size(width)
    seen = browser.open(path.as_uri())
    assert seen.errors == []
    assert {address for address in seen.requests if not address.startswith("data:")} == {path.as_uri()}
    browser.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert browser.too_wide() == []
    # Beside a measure its first number stands in the window, also of a phone.
    assert browser.evaluate("document.querySelector('table td:nth-child(2)').getBoundingClientRect().right") < width
