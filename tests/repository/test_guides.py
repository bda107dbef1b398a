"""Commands and files that the guides name: every verb, flag, recipe and key exists, and their YAML is a plan."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fdiv.cli.command import build_parser
from fdiv.recipe.load import find_recipe, load_recipe
from fdiv.run.sweep import plan_sweep

GUIDES = ("compare_methods", "replay")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of every `fdiv` command in a bash block, environment variables and comments left out."""
    found = []
    for line in "\n".join(blocks(page, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        while words and "=" in words[0] and not words[0].startswith("-"):
            words.pop(0)
        if words:
            assert words[0] == "fdiv", line
            found.append(words[1:])
    return found


@pytest.fixture(params=GUIDES)
def guide(request, repository) -> Path:
    return repository / "docs" / f"{request.param}.md"


def test_every_command_is_one(guide, monkeypatch, repository):
    """Verb and flags are the parser's; what it leaves over of `run` and `sweep` are keys of the recipe."""
    monkeypatch.setenv("FDIV_SHARED", "/shared")
    monkeypatch.chdir(repository)
    assert commands(guide)
    for words in commands(guide):
        args, rest = build_parser().parse_known_args(words)
        if args.verb not in ("run", "sweep"):
            assert not rest, words
        elif Path(args.recipe).suffix != ".yaml" or (repository / args.recipe).is_file():
            find_recipe(args.recipe)
            if args.verb == "run":
                load_recipe(args.recipe, rest)  # refuses a key that there is not


def test_links_lead_somewhere(guide):
    for target, anchor in re.findall(r"\]\(([\w/.]+\.md)(?:#([\w-]+))?\)", guide.read_text()):
        page = guide.parent / target
        assert page.is_file(), target
        titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}
        assert not anchor or anchor in anchors, f"{target}#{anchor}"


def test_the_comparison_is_a_plan(repository, tmp_path, tiny_model_dir, monkeypatch):
    """`compare.yaml` of the guide, with data and models of its names: 36 cells that its configs accept."""
    (text,) = blocks(repository / "docs" / "compare_methods.md", "yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compare.yaml").write_text(text)
    (tmp_path / "models").mkdir()
    for name in ("tuned", "retrained"):
        (tmp_path / "models" / name).symlink_to(tiny_model_dir)
    (tmp_path / "data").mkdir()
    for name in ("forget", "retain"):
        rows = [f'{{"question": "What is {name} {n}?", "answer": "It is {n}."}}\n' for n in range(8)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(rows))
    plan = plan_sweep("compare.yaml", [])
    cells = list(plan.cells())
    assert len([cell for cell in cells if cell.stage == "run"]) == 36
    for cell in cells:
        plan.plan(cell)
    methods = {plan.plan(cell).recipe.method_name for cell in cells if cell.stage == "run"}
    assert methods == {"grad_diff", "npo", "flat", "jensun_pp", "shred"}
