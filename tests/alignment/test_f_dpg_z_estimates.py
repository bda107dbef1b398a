"""Estimates of Z on the enumerable world: the table of docs/f_dpg.md, and what is said below it."""

import re
from pathlib import Path

import pytest

from tests.support.z_estimates import COLUMNS, WORLDS, World, errors

PAGE = Path(__file__).parents[2] / "docs" / "f_dpg.md"


def table() -> dict[tuple[str, int, int], dict[str, list[float]]]:
    """The lines of the page: (target, samples, prompts) → column → errors after each step."""
    lines = re.findall(r"^\| (soft, β = 1|soft, β = ½|hard) \| (\d+) \| (\d+) \| (.*) \|$", PAGE.read_text(), re.M)
    return {
        (target, int(samples), int(prompts)): {
            name: [float(value) for value in cell.split("/")]
            for name, cell in zip(COLUMNS, cells.split("|"), strict=True)
        }
        for target, samples, prompts, cells in lines
    }


def test_the_page_has_every_line():
    assert list(table()) == [(world.target, world.samples, world.prompts) for world in WORLDS]


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: f"{world.target}-{world.samples}-{world.prompts}")
def test_the_page_says_what_is_measured(world):
    written = table()[world.target, world.samples, world.prompts]
    for name, values in errors(world).items():
        # Two digits; another processor's rounding may change a draw.
        assert values == pytest.approx(written[name], rel=0.15, abs=2e-3), name


def test_pooled_history_is_far_better_than_a_step_alone():
    found = errors(World("soft, β = 1", 16, 1, 24))
    for name in ("history", "pooled"):
        assert all(mine < 0.8 * alone for mine, alone in zip(found[name], found["group"], strict=True))
