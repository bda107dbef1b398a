"""Reports: the page needs nothing else, shows the numbers that were measured, and plots whatever a method logged."""

import json
import re
from html.parser import HTMLParser

import pytest

from fdiv.cli import main
from fdiv.errors import DataError
from fdiv.evaluation import EvalContext
from fdiv.report.comparison import frontier
from fdiv.report.curves import constant_curves, curve_plot, panels, training_curves
from fdiv.report.examples import read_examples
from fdiv.report.records import RunRecord, read_records
from fdiv.terminal import divergence_label, number


class Page(HTMLParser):
    """Tags, sources and text of a page; unbalanced tags are an error."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.cells, self.words, self.tags = [], [], [], [], set()
        self.best, self.hovers = [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "svg":
            self.images.append(dict(attrs))
        self.attributes = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)
            if self.attributes.get("class") == "best":
                self.best.append(data)
            if "title" in self.attributes:
                self.hovers[data] = self.attributes["title"]


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
    shown = [image["aria-label"] for image in page.images]
    assert shown == [
        "Metrics before and after training: accuracy", "Training curves: loss", "Training curves: rewards",
    ]  # fmt: skip
    assert all(image["role"] == "img" and image["viewbox"] for image in page.images)
    colours = set(re.findall(r"#[0-9a-f]{6}", text[text.index("<svg") :]))
    assert not colours, f"{colours} do not follow the colour scheme"
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


def _copy(run_folder, folder, **changes):
    folder.mkdir(parents=True)
    for file in run_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    result = json.loads((folder / "result.json").read_text()) | changes
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_runs_in_folders_of_one_name_are_told_apart(run_folder, tmp_path, capsys):
    """`fdiv report A/run B/run`: one left the comparison without a word, and their curves were averaged as seeds."""
    folders = [_copy(run_folder, tmp_path / group / "run", **{"after/accuracy": value})
               for group, value in (("one", 0.25), ("two", 0.75))]  # fmt: skip
    runs, _ = read_records([*folders, run_folder])
    assert [run.name for run in runs] == [run.setting for run in runs] == ["one/run", "two/run", "run-a"]
    output = tmp_path / "r.html"
    main(["report", *map(str, [*folders, folders[0] / ".." / "run", run_folder]), "--output", str(output)])
    page = Page(output.read_text())
    place = page.cells.index("after training")
    assert page.cells[place + 1 : place + 4] == ["one/run", "two/run", "run-a"]
    place = page.cells.index("accuracy")
    assert page.cells[place + 1 : place + 4] == ["0.2500", "0.7500", "0.8125"]
    assert "4 directories, of which 3 are different" in capsys.readouterr().err


def test_runs_of_other_methods_are_named_by_folder_and_a_comparison_of_nothing_is_left_out(run_folder, tmp_path):
    plain = {"after/accuracy": None, "before/accuracy": None, "summary_metrics": []}
    other = _copy(run_folder, tmp_path / "b", method="flat", divergence="forward_kl", **plain)
    assert [run.setting for run in read_records([run_folder, other])[0]] == ["run-a", "b"]
    bare = [_copy(other, tmp_path / name) for name in ("c", "d")]
    for folder in bare:
        result = json.loads((folder / "result.json").read_text())
        kept = {key: value for key, value in result.items() if not key.startswith(("before/", "after/"))}
        (folder / "result.json").write_text(json.dumps(kept))
    main(["report", *map(str, bare), "--output", str(tmp_path / "r.html")])
    assert ">Comparison<" not in (tmp_path / "r.html").read_text()
    main(["report", str(run_folder), str(other), "--output", str(tmp_path / "r.html")])
    assert ">Comparison<" in (tmp_path / "r.html").read_text()


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


def test_the_better_value_is_marked_and_names_say_what_they_mean(run_folder, tmp_path):
    result = json.loads((run_folder / "result.json").read_text())
    result |= {"before/pass@1": 0.25, "after/pass@1": 0.5, "before/self_bleu_5": 0.5, "after/self_bleu_5": 0.75}
    result |= {"before/privleak": -2.0, "after/privleak": 40.0, "before/grad_norm": 1.0, "after/grad_norm": 2.0}
    result |= {"before/repeat_rate": 0.125, "after/repeat_rate": 0.125}
    (run_folder / "result.json").write_text(json.dumps(result))
    main(["report", str(run_folder), "--output", str(tmp_path / "r.html")])
    page = Page((tmp_path / "r.html").read_text())
    # Higher, lower and nearest to 0 is best; no mark without a better way, and none for a tie.
    assert page.best == [number(value) for value in (0.5, 0.5, -2.0)]
    assert page.hovers["pass@1 ↑"].endswith("0 to 1; higher is better")


def test_a_comparison_has_a_column_for_each_run(run_folder, tmp_path):
    twin = tmp_path / "run-b"
    twin.mkdir()
    for file in run_folder.iterdir():
        (twin / file.name).write_bytes(file.read_bytes())
    for folder, value, error in ((run_folder, 0.25, 0.01), (twin, 0.5, 0.02)):
        result = json.loads((folder / "result.json").read_text())
        result |= {"after/pass@1": value, "after/pass@1_se": error, "after/pass@8": value, "after/pass@8_se": 0.25}
        (folder / "result.json").write_text(json.dumps(result))
    main(["report", str(run_folder), str(twin), "--output", str(tmp_path / "r.html")])
    page = Page((tmp_path / "r.html").read_text())
    first = page.cells.index("after training")
    assert page.cells[first : first + 3] == ["after training", "run-a", "run-b"]
    row = page.cells.index("pass@1 ↑")
    assert page.cells[row : row + 3] == ["pass@1 ↑", "0.2500 ± 0.0100", "0.5000 ± 0.0200"]
    words = "".join(page.words)
    assert "pass@1 ↑: best under run-b (0.5000), ahead of run-a beyond its error" in words
    assert "pass@8 ↑: best under run-b (0.5000); not told apart from run-a" in words


def test_curves_that_never_change_are_folded_away(run_folder, tmp_path):
    entries = history(4, **{"clamped_fraction": 0.0, "log_ratio/chosen_p50": 1.0, "rewards/margins": 2.0})
    for step, entry in enumerate(entries):
        entry |= {"log_ratio/chosen_p05": -1.0 * step, "log_ratio/chosen_p95": 2.0}
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    main(["report", str(run_folder), "--output", str(tmp_path / "r.html")])
    text = (tmp_path / "r.html").read_text()
    titles = re.findall(r'aria-label="Training curves: ([^"]*)"', text)
    assert titles == ["loss", "log_ratio", "rewards"]  # the median stands still, its band moves
    folded = Page(text[text.index("2 curves never change") :].partition("</summary>")[2].partition("</details>")[0])
    assert folded.cells == [
        "metric",
        "value",
        "logged",
        "rewards/margins ↑",
        "2.0",
        "4",
        "clamped_fraction",
        "0.0",
        "4",
    ]


def test_a_setting_that_stands_still_is_compared_with_one_that_moves():
    still = record("a", "a", [{"step": s, "accuracy": 0.5} for s in (1, 2)])
    moves = record("b", "b", [{"step": s, "accuracy": 0.25 * s} for s in (1, 2)])
    moving, constant = constant_curves(panels([still, moves]))
    assert [curve.label for curve in moving["accuracy"]] == ["a", "b"]
    assert constant == {}
    other = record("c", "c", [{"step": s, "accuracy": 0.75} for s in (1, 2)])
    moving, constant = constant_curves(panels([still, other]))
    assert (moving, [curve.label for curve in constant["accuracy"]]) == ({}, ["a", "c"])
    plot = curve_plot([still, moves])
    assert plot.legend == {}  # one panel: it has its own
    both = curve_plot([record(n, n, history(3)) for n in ("a", "b")])
    assert list(both.legend) == ["a", "b"]
    assert len(set(both.legend.values())) == 2


def answers(folder, stage, group, texts, prompts=None):
    context = EvalContext(None, folder / "eval" / stage, stage=stage)
    context.output_dir.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt": prompts[index] if prompts else f"<q{index}>",
            "completion": text,
            "truth": "T & t",
            "score": index % 2 == 0,
        }
        for index, text in enumerate(texts)
    ]
    context.keep_examples(group, rows)


def test_answers_stand_side_by_side_changed_ones_first(run_folder, tmp_path):
    answers(run_folder, "before", "tasks/a", ["same", "<b>old</b>", "x" * 2_000])
    answers(run_folder, "after", "tasks/a", ["same", "new", "x" * 2_000])
    (found,) = read_examples(read_records([run_folder])[0]).values()
    assert [question.prompt for question in found] == ["<q1>", "<q0>", "<q2>"]
    assert [(answer.heading, answer.text, answer.score) for answer in found[0].answers] == [
        ("before", "<b>old</b>", False), ("after", "new", False),
    ]  # fmt: skip
    main(["report", str(run_folder), "--output", str(tmp_path / "r.html")])
    words = "".join(Page((tmp_path / "r.html").read_text()).words)
    for expected in (
        "<b>old</b>",
        "right answer: T & t",
        "… (500 more characters)",
        "3 questions",
        "1 answers differ",
    ):
        assert expected in words


def test_evenly_spaced_answers_are_kept(run_folder):
    answers(run_folder, "after", "many", [str(index) for index in range(100)])
    (found,) = read_examples(read_records([run_folder])[0]).values()
    assert [int(question.answers[0].text) for question in found] == [index * 100 // 12 for index in range(12)]


def test_damaged_answers_are_named(run_folder):
    answers(run_folder, "after", "g", ["a"])
    (run,), _ = read_records([run_folder])
    file = run_folder / "eval" / "after" / "examples_g.jsonl"
    file.write_text(file.read_text().replace('"a"', '"b"'))
    with pytest.raises(DataError, match="examples_g.jsonl: its content does not agree with digests.json"):
        read_examples([run])
    (file.parent / "digests.json").unlink()
    whole = {"group": "g", "index": 0, "prompt": "p", "completion": "c"}
    for line, place in (
        (json.dumps({"group": "g"}), "line 1.index"), ("[1]", "line 1"), (json.dumps({**whole, "group": 3}), "line 1.group"),
        (json.dumps({**whole, "score": "x"}), "line 1.score"), ('{"group": "g"', "line 1"),
    ):  # fmt: skip
        file.write_text(line + "\n")
        with pytest.raises(DataError, match=place):
            read_examples([run])
