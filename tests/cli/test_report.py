"""Reports: the page needs nothing else, shows the numbers that were measured, and plots whatever a method logged."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from fdiv.cli import main
from fdiv.report.comparison import frontier
from fdiv.report.curves import panels, training_curves
from fdiv.report.records import RunRecord, read_records
from fdiv.terminal import divergence_label, number


class Page(HTMLParser):
    """Tags, sources and text of a page; unbalanced tags are an error."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.cells, self.words, self.tags = [], [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def history(steps=3, **extra):
    return [
        {"step": s, "epoch": 0.1 * s, "loss": 1.0 / s, "rewards/chosen": s, "rewards/rejected": -s, **extra}
        for s in range(1, steps + 1)
    ]


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run-a"
    folder.mkdir()
    result = {
        "recipe": "x & y", "method": "f_dpo", "divergence": {"name": "alpha", "alpha": 0.3}, "beta": 0.1, "seed": 1,
        "steps": 3, "train_seconds": 2.0, "unmet_requirements": ["a has not improved: 1 before training, 1 after"],
        "summary_metrics": ["accuracy", "tv"], "notes": {"tv": "the world has <no> optimum"},
        "before/accuracy": 0.5, "after/accuracy": 0.8125, "before/tv": None, "after/tv": None,
        "before/extra": 12345.678, "after/extra": 0.000012345,
    }  # fmt: skip
    environment = {
        "command": "fdiv run x --beta 0.1",
        "versions": {"trl": "1.16.0"},
        "git": {"revision": "a" * 40, "dirty": True},
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history()))
    (folder / "recipe_resolved.yaml").write_text("method: f_dpo  # <x>\n")
    return folder


def test_a_run_as_one_page(run_folder, tmp_path):
    output = tmp_path / "pages" / "report.html"
    assert main(["report", str(run_folder), "--output", str(output), "--title", "A <b> title"]) == 0
    text = output.read_text()
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe"}
    assert not re.search(r"(src|href)=[\"']?(http|/)", text)
    cells = page.cells
    row = cells.index("accuracy")
    assert cells[row : row + 4] == ["accuracy", "0.5000", "0.8125", "+0.3125"]
    row = cells.index("tv")
    assert cells[row : row + 4] == ["tv", "–", "–", "–"]
    row = cells.index("extra")
    assert cells[row : row + 3] == ["extra", "12346", "1.23e-05"]
    words = "".join(page.words)
    for expected in (
        "A <b> title",
        "the world has <no> optimum",
        "required, but a has not improved",
        "fdiv run x --beta 0.1",
        "trl 1.16.0",
        "git aaaaaaaaaaaa with local changes",
        "method: f_dpo  # <x>",
        "alpha(alpha=0.3)",
    ):
        assert expected in words
    files = {path.name: path.read_bytes() for path in (output.parent / "plots").iterdir()}
    assert set(files) == {"curves.png", "before_after.png"}
    inline = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.images]
    assert sorted(inline) == sorted(files.values())
    assert all(image["alt"] for image in page.images)
    from PIL import Image

    for name in files:
        with Image.open(output.parent / "plots" / name) as image:
            image.load()
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(maxcolors=1_000_000)) > 10  # not a blank sheet


def test_an_unfinished_run_still_has_its_curves(run_folder, tmp_path):
    (run_folder / "result.json").unlink()
    assert main(["report", str(run_folder), "--output", str(tmp_path / "r.html")]) == 0
    assert "unfinished" in (tmp_path / "r.html").read_text()
    assert (tmp_path / "plots" / "curves.png").is_file()


def test_a_directory_that_holds_nothing(tmp_path, fails):
    message = fails("report", tmp_path, "--output", tmp_path / "r.html", code=1)
    assert message.endswith("no result.json or results.json")
    assert not (tmp_path / "r.html").exists()


def record(name, setting, entries):
    return RunRecord(name, None, {}, {}, entries, "", setting)


def test_metrics_of_any_method_find_their_panels_by_prefix():
    entries = history(
        **{
            "forget/prob": 0.5, "retain/nll": 2.0, "divergence/reverse_kl": 1.0, "divergence/reverse_kl_se": 0.25,
            "log_ratio/chosen_p05": -1.0, "log_ratio/chosen_p50": 0.0, "log_ratio/chosen_p95": 2.0,
            "rewards/accuracies": 0.75, "clamped_fraction": 0.0, "learning_rate": 1e-5, "eval_loss": 0.9,
            "eval_runtime": 3.0, "num_tokens": 5,
        }
    )  # fmt: skip
    found = panels([record("a", "a", entries)])
    assert set(found) == {
        "loss", "rewards", "rewards/accuracies", "forget", "retain", "divergence", "log_ratio", "clamped_fraction",
    }  # fmt: skip
    assert next(iter(found)) == "loss"
    assert [curve.label for curve in found["loss"]] == ["loss", "loss (eval)"]
    assert found["loss"][0].values == [1.0, 0.5, pytest.approx(1 / 3)]
    assert [curve.label for curve in found["rewards"]] == ["chosen", "rejected"]
    (divergence,) = found["divergence"]
    assert (divergence.low, divergence.high) == ([0.75] * 3, [1.25] * 3)
    (ratio,) = found["log_ratio"]
    assert (ratio.values, ratio.low, ratio.high) == ([0.0] * 3, [-1.0] * 3, [2.0] * 3)


def test_seeds_of_a_setting_become_their_mean_and_standard_error():
    runs = [record(str(v), "kl", [{"step": 1, "loss": v}, {"step": 2, "loss": 2 * v}]) for v in (1.0, 3.0)]
    other = record("js", "js", [{"step": 1, "loss": 5.0}])
    (title,) = panels([*runs, other])
    mean, single = panels([*runs, other])[title]
    assert (mean.label, mean.values) == ("kl", [2.0, 4.0])
    assert mean.low == [1.0, 2.0]  # s.e. of {1, 3}: sqrt(2) / sqrt(2)
    assert (single.label, single.values, single.low) == ("js", [5.0], [])


def test_nothing_logged_gives_no_plot():
    assert training_curves([record("a", "a", [])]) is None
    assert training_curves([record("a", "a", [{"step": 1, "epoch": 1.0}])]) is None
    assert frontier({"axes": {}, "aggregate": [], "cells": []}) is None


def test_the_frontier_draws_means_with_errors_and_the_start():
    def group(name, x, y):
        metrics = {"after/kl": {"mean": x, "se": 0.1, "n": 2}, "after/reward": {"mean": y, "se": None, "n": 2}}
        return {"label": name, "settings": {"divergence": name, "beta": x}, "n": 2, "metrics": metrics}

    cell = {"settings": {"divergence": "js"}, "values": {"before/kl": 0.0, "before/reward": 0.5, "after/kl": 1.0}}
    results = {
        "axes": {"divergence": "kl", "reward": "reward"},
        "aggregate": [group("js", 2.0, 3.0), group("js", 1.0, 2.0), group("tv", 1.5, 1.0)],
        "cells": [cell],
    }
    (axis,) = frontier(results).axes
    lines = {tuple(map(float, line.get_xdata())): tuple(map(float, line.get_ydata())) for line in axis.lines}
    assert lines[(1.0, 2.0)] == (2.0, 3.0)  # one divergence over beta: joined, in order of x
    assert lines[(1.5,)] == (1.0,)
    assert lines[(0.0,)] == (0.5,)
    assert {text.get_text() for text in axis.texts} == {"beta 1.0", "beta 2.0"}  # the legend has the names
    assert axis.get_title(loc="left") == "reward against kl"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("kl", "reward ↑")


def test_runs_that_are_no_seeds_of_each_other_keep_their_names(run_folder, tmp_path):
    twin = tmp_path / "run-b"
    twin.mkdir()
    for file in run_folder.iterdir():
        (twin / file.name).write_bytes(file.read_bytes())
    runs, sweeps = read_records([run_folder, twin])
    assert [run.setting for run in runs] == ["run-a", "run-b"]
    assert sweeps == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.5, "0.5000"), (0.0, "0.0"), (12.3456, "12.35"), (1234.5678, "1235"), (-0.00012, "-0.00012"),
     (7, "7"), (1e9, "1e+09"), (float("nan"), "nan"), (3.0, "3.0"), (123.456, "123.5")],
)  # fmt: skip
def test_numbers_as_a_person_reads_them(value, text):
    assert number(value) == text


def test_labels_of_divergences():
    assert divergence_label(None) == "no divergence"
    assert divergence_label("reverse_kl") == "reverse_kl"
    assert divergence_label({"name": "alpha", "alpha": 0.3}) == "alpha(alpha=0.3)"
