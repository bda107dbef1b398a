"""`kind: heatmap`: a number for every pair of values of two axes, and blanks where nothing was run."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from fdiv.errors import RecipeError
from fdiv.recipe.sweep import Panel, parse_sweep
from fdiv.report.plots import _figure, _heatmap, write_plots
from fdiv.report.table import aggregate

PANEL = Panel(kind="heatmap", x="retain_divergence", y="divergence", value="score")
AXES = {"divergence": ["a", {"name": "alpha", "alpha": 0.5}], "retain_divergence": ["u", "v", "w"]}


def results(values, screen=None, chosen=(), **settings):
    """`results.json` of the finished cells (x, y, seed) → score."""
    cells = [
        {
            "name": str(place), "stage": "run", "status": "finished",
            "settings": {"divergence": place[1], "retain_divergence": place[0], "seed": place[2], **settings},
            "values": {"method": "flat", "after/score": score},
        }
        for place, score in values.items()
    ]  # fmt: skip
    return {"cells": cells, "aggregate": aggregate(cells), "screen": screen, "chosen": list(chosen), "start": None}


def drawn(content, panel=PANEL):
    axis = Figure().subplots()
    assert _heatmap(axis, content, panel, None)
    texts = {(text.get_position()[0], text.get_position()[1]): text.get_text() for text in axis.texts}
    ticks = [[label.get_text() for label in labels] for labels in (axis.get_xticklabels(), axis.get_yticklabels())]
    return np.array(axis.images[0].get_array().filled(np.nan)), texts, ticks


def test_means_and_errors_stand_in_the_cells_and_missing_ones_are_blank():
    image, texts, ticks = drawn(results({
        ("u", "a", 0): 1.0, ("u", "a", 1): 3.0, ("v", "a", 0): 5.0, ("w", "b", 0): 0.25,
    }))  # fmt: skip
    assert ticks == [["u", "v", "w"], ["a", "b"]]
    np.testing.assert_array_equal(image, [[2.0, 5.0, math.nan], [math.nan, math.nan, 0.25]])
    assert texts == {(0, 0): "2.0\n± 1.0", (1, 0): "5.0", (2, 1): "0.2500"}


def test_values_can_be_mappings_and_p_values_are_logarithms():
    values = {("u", "a", 0): 1e-3, ("u", 0, 0): 0.0}
    content = results(values)
    content["cells"][1]["settings"]["divergence"] = {"name": "alpha", "alpha": 0.5}
    content["aggregate"] = aggregate(content["cells"])
    panel = Panel(kind="heatmap", x="retain_divergence", y="divergence", value="score", value_scale="log")
    image, texts, ticks = drawn(content, panel)
    assert ticks[1] == ["a", "alpha(alpha=0.5)"]
    assert image.tolist() == [[1e-3], [1e-60]]  # a p-value of 0 has no logarithm
    assert texts[(0, 1)] == "0.0"


def test_of_screened_values_the_chosen_ones_are_shown():
    values = {("u", "a", 0): 1.0, ("v", "a", 0): 2.0}
    slow, fast = results(values, learning_rate=1e-4), results(dict.fromkeys(values, 9.0), learning_rate=1e-3)
    cells = slow["cells"] + fast["cells"]
    chosen = [{"settings": {"divergence": "a", "retain_divergence": x, "learning_rate": 1e-4}} for x in "uv"]
    content = {
        **slow,
        "cells": cells,
        "aggregate": aggregate(cells),
        "screen": {"key": "learning_rate"},
        "chosen": chosen,
    }
    assert drawn(content)[0].tolist() == [[1.0, 2.0]]


def test_the_file_is_written_and_nothing_where_there_is_nothing(tmp_path):
    two = {"two.png": [PANEL, PANEL]}
    assert write_plots(results({("u", "a", 0): 1.0}), two, tmp_path) == [tmp_path / "two.png"]
    assert (tmp_path / "two.png").stat().st_size > 1000
    other = Panel(kind="heatmap", x="retain_divergence", y="divergence", value="other")
    assert write_plots(results({("u", "a", 0): 1.0}), {"none.png": [other]}, tmp_path) == []


@pytest.mark.parametrize(
    ("panel", "more", "said"),
    [
        ({"x": "divergence", "y": "retain_divergence"}, {}, "a heatmap needs `value`, the metric of a cell"),
        (
            {"x": "beta", "y": "divergence", "value": "s"},
            {},
            "two axes of the sweep (divergence, retain_divergence), got 'beta'",
        ),
        ({"x": "divergence", "y": "divergence", "value": "s"}, {}, "must be two axes of the sweep"),
        (
            {"x": "divergence", "y": "retain_divergence", "value": "s"},
            {"beta": [1, 2]},
            "has no place for the axis 'beta'",
        ),
        ({"x": "divergence", "y": "seed", "value": "s"}, {"seed": [1, 2]}, "got 'seed'"),
        ({"y": "divergence", "value": "s"}, {}, "a plot of kind heatmap needs `x`"),
    ],
)
def test_what_has_no_place_in_a_heat_map_is_refused(panel, more, said):
    with pytest.raises(RecipeError) as error:
        parse_sweep({**AXES, **more, "plots": {"grid.png": {"kind": "heatmap", **panel}}}, ".".join)
    assert said in str(error.value)


def test_rows_with_labels_can_be_an_axis():
    values = {"method": ["flat", "npo"], "beta": [1, 2], "seed": [0]}
    block = parse_sweep(
        {**values, "plots": {"g.png": {"kind": "heatmap", "x": "beta", "y": "method", "value": "s"}}}, ".".join
    )
    assert block.plots["g.png"][0].value == "s"


@pytest.mark.parametrize("count", [1, 20, 28, 70])
def test_a_legend_of_many_rows_stays_inside_the_picture(count):
    cells = [
        {
            "name": str(row), "stage": "run", "status": "finished", "settings": {"method": f"method {row}", "seed": 0},
            "values": {"method": "flat", "after/x": float(row), "after/score": 1.0},
        }
        for row in range(count)
    ]  # fmt: skip
    content = {"cells": cells, "aggregate": aggregate(cells), "screen": None, "chosen": [], "start": None}
    figure = _figure(content, [Panel(x="x", y="score")])
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == count
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
