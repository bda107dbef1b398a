"""The README says what the repository holds: tables equal their files, paths exist, its Python runs."""

import json
import re

import pytest

from fdiv.catalog import METHODS


@pytest.fixture
def readme(repository):
    return (repository / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_results(repository, readme, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    import readme_tables

    assert len(re.findall("<!-- table: ", readme)) >= 1
    for page in readme_tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert readme_tables.filled(text) == text
    with pytest.raises(SystemExit, match="no Markdown table"):
        readme_tables.table_of(repository / "LICENSE")


def test_linked_files_exist(repository, readme):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", readme) if not link.startswith("http")]
    assert len(links) > 5
    assert [link for link in links if not (repository / link).exists()] == []


def test_python_blocks_run(readme):
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})  # our own text, not data


def test_make_targets_and_commands_exist(repository, readme):
    targets = set(re.findall(r"^make ([a-z-]+)", readme, re.MULTILINE))
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_first_screen_has_a_picture_an_installation_and_its_use(repository, readme):
    screen = readme.partition("## Three ways in")[0]
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", screen)
    assert (repository / picture).stat().st_size < 100_000
    for line in ("fdiv sweep", "f_dpo_loss(", "pip install", "make demo", "make test"):
        assert line in screen, line
    assert "<!-- table: " not in screen and "|---" not in screen


def test_trainer_snippets_name_what_exists(readme):
    """The blocks marked `py` need a model of the reader's: they are not run, but their names are ours."""
    import fdiv.alignment

    blocks = re.findall(r"```py\n(.*?)```", readme, re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
        names = re.findall(r"\b(FDPO\w+)", block)
        assert names and set(names) <= set(fdiv.alignment.__all__)


def test_the_figures_of_the_fuzz_suite_are_those_of_its_run(repository, readme):
    found = json.loads((repository / "benchmarks" / "results" / "fuzz.json").read_text(encoding="utf-8"))
    line = next(line for line in readme.replace("\n  ", " ").splitlines() if "`make fuzz MINUTES=" in line)
    tried, faults = (int(number.replace(",", "")) for number in re.findall(r"\*\*([\d,]+)\*\*", line))
    assert tried == sum(found["tried"].values())
    assert faults == found["sum_of_faults"]


def test_the_number_of_unlearning_methods_is_that_of_the_catalog(repository, readme):
    others = sum("unlearning" in str(METHODS[name]) for name in METHODS) - 1  # without FLAT
    assert others == 16
    for text in (readme, (repository / "docs" / "index.md").read_text()):
        assert set(re.findall(r"and (\d+) methods to compare with", text)) == {str(others)}
    assert "sixteen unlearning methods beside them" in readme
