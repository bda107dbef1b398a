"""The documentation: every public name has a docstring, the reference builds, examples in the guides run."""

import importlib.util
import inspect
import os
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from tests.support.browser import NAMES, WIDTHS, Browser, find_browser
from tests.support.processes import run_script, run_well


@pytest.fixture(scope="module")
def builder(repository):
    spec = importlib.util.spec_from_file_location("build_docs", repository / "scripts" / "build_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def modules(builder):
    return [import_module(name) for name in builder.with_submodules(builder.documented_packages())]


def _is_ours(value):
    return value.__module__ == "fdiv" or value.__module__.startswith("fdiv.")


def _public_members(cls):
    """Methods and properties that a class of ours defines itself."""
    for name, member in vars(cls).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if not name.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
            yield name


def test_every_public_name_has_a_docstring(modules):
    missing = []
    for module in modules:
        if not inspect.getdoc(module):
            missing.append(module.__name__)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if not (inspect.isfunction(value) or inspect.isclass(value)):
                continue
            if not inspect.getdoc(value):
                missing.append(f"{module.__name__}.{name}")
            if inspect.isclass(value) and _is_ours(value):
                # getdoc follows the inheritance: an override may rest on the docstring of what it overrides.
                undocumented = [
                    member for member in _public_members(value) if not inspect.getdoc(getattr(value, member))
                ]
                missing += [f"{value.__module__}.{value.__qualname__}.{member}" for member in undocumented]
    assert not missing, f"no docstring: {sorted(set(missing))}"


def test_packages_list_what_is_public(builder):
    for package in map(import_module, builder.documented_packages()):
        listed = getattr(package, "__all__", [])
        assert len(set(listed)) == len(listed), f"{package.__name__}.__all__ repeats a name"
        for name in listed:
            assert hasattr(package, name), f"{package.__name__}.__all__ names {name!r}, which does not resolve"
        public = {name for name, value in vars(package).items() if inspect.isfunction(value) or inspect.isclass(value)}
        public -= {"attach"}  # the helper of the packages whose names are imported on first use
        unlisted = {name for name in public - set(listed) if _is_ours(getattr(package, name)) and name[0] != "_"}
        assert not unlisted, f"{package.__name__} offers {sorted(unlisted)}, which its __all__ does not list"


@pytest.fixture(scope="module")
def site(builder, tmp_path_factory):
    """All guides, and the reference of two packages; links, anchors and navigation are checked by the build itself."""
    folder = tmp_path_factory.mktemp("site")
    builder.build(folder, ["fdiv.divergences", "fdiv.alignment.f_dpo"])
    return folder


@pytest.mark.slow
def test_reference_renders_names_formulas_and_sources(site):
    page = (site / "api" / "fdiv.divergences.html").read_text()
    for name in ("registry.get_divergence", "registry.register_divergence", "base.Divergence.inverse_derivative"):
        assert f'id="fdiv.divergences.{name}"' in page
    assert "D_f(P‖Q) = E_Q[f(t)]" in page
    loss = (site / "api" / "fdiv.alignment.f_dpo.html").read_text()
    assert 'id="fdiv.alignment.f_dpo.loss.f_dpo_loss"' in loss
    assert "Source code in" in loss
    assert "Raises" in loss


def test_reference_covers_mapped_packages_and_submodules(builder):
    names = builder.with_submodules(builder.documented_packages())
    assert {
        "fdiv",
        "fdiv.models.tiny",
        "fdiv.alignment",
        "fdiv.alignment.f_dpo.loss",
        "fdiv.unlearning.losses",
    } <= set(names)
    assert len(set(names)) == len(names)
    assert not [name for name in names if name.startswith("fdiv.recipes") or name.endswith("__main__")]


def test_reference_needs_every_public_name_to_resolve(builder, monkeypatch):
    import fdiv.divergences

    builder.resolve_exports(["fdiv.divergences"])
    monkeypatch.setattr(fdiv.divergences, "__all__", [*fdiv.divergences.__all__, "no_such_name"])
    with pytest.raises(AttributeError, match="no_such_name"):
        builder.resolve_exports(["fdiv.divergences"])


def test_links_become_links_between_pages(builder, repository, tmp_path):
    pages = builder.guide_pages()
    builder.stage_guides(pages, tmp_path)
    index = (tmp_path / "index.md").read_text()
    assert "](getting_started.md)" in index
    assert "](contributing.md#how-to-add-a-divergence)" in index
    assert "](../metrics.md)" in (tmp_path / "tutorials" / "unlearning.md").read_text()
    experiment = (tmp_path / "results" / "tofu_forget10.md").read_text()
    assert "](../files/results/tofu_forget10/trajectories.png)" in experiment
    assert (tmp_path / "files" / "results" / "tofu_forget10" / "trajectories.png").stat().st_size > 1_000
    assert "](../files/results/tofu_forget10/experiment.yaml)" in experiment


def test_a_broken_link_is_named(builder, tmp_path):
    source = tmp_path / "docs" / "page.md"
    source.parent.mkdir()
    source.write_text("`[code](none.md)`, [`self`](page.md#part), [`other`](missing.md)\n```\n[x](none.md)\n```\n")
    with pytest.raises(FileNotFoundError, match=r"docs/page.md links to missing.md"):
        builder.stage_guides({source: "page.md"}, tmp_path / "out", tmp_path)
    source.write_text(source.read_text().replace("missing.md", "."))
    builder.stage_guides({source: "a/page.md"}, tmp_path / "out", tmp_path)
    assert (tmp_path / "out" / "a" / "page.md").read_text() == (
        "`[code](none.md)`, [`self`](page.md#part), `other`\n```\n[x](none.md)\n```\n"
    )


@pytest.mark.slow
def test_pages_load_nothing_from_outside(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        for tag in re.findall(r"<(?:script|link|img|iframe)[^>]*>", text):
            found = re.search(r'(?:src|href)="(https?:)?//', tag)
            assert not found or 'rel="canonical"' in tag, f"{page.name}: {tag}"


@pytest.mark.slow
def test_every_divergence_has_its_pictures(site):
    from fdiv.divergences import list_divergences

    text = (site / "divergence_pictures.html").read_text()
    for name in list_divergences():
        for view in ("f(t)", "f′(t)", "t·f″(t)"):
            assert f'aria-label="{view} of {name}"' in text
    assert "NaN" not in text and "nan" not in re.findall(r' d="([^"]*)"', text)


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason=f"no browser: none of {', '.join(NAMES)}")
def test_pages_are_readable_on_a_phone_and_in_the_dark(site, tmp_path):
    pages = (
        "index",
        "divergence_pictures",
        "metrics",
        "tutorials/rl",
        "api/fdiv.alignment.f_dpo",
        "results/tofu_forget10",
    )
    with Browser(find_browser(), tmp_path) as browser:
        for width in WIDTHS.values():
            for dark in (False, True):
                browser.size(width, dark)
                for page in pages:
                    seen = browser.open((site / f"{page}.html").as_uri())
                    assert seen.errors == [], page
                    assert all(address.startswith(("file:", "data:", "blob:")) for address in seen.requests), page
                    assert browser.too_wide() == [], f"{page} at {width}"
                    colour = browser.evaluate(
                        "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)"
                    )
                    assert (sum(colour[:3]) < 200) == dark, f"{page}: {colour}"


def test_mkdocs_names_pages_that_exist(builder, repository):
    named = set(re.findall(r"[\w/]+\.md", (repository / "mkdocs.yml").read_text()))
    pages = {page for page in builder.guide_pages().values() if not page.startswith("results/")}
    assert len(named) > 25
    assert named <= pages | {"divergence_pictures.md"}  # others stand under "More"


def test_index_has_a_row_for_every_method(repository):
    from fdiv.catalog import METHODS

    index = (repository / "docs" / "index.md").read_text()
    for name, path in METHODS.items():
        method, trainer = METHODS.find(name), path.rpartition(":")[2]
        assert method.paper in index, f"docs/index.md has no row for the paper of {name} ({method.paper})"
        assert trainer in index, f"docs/index.md does not name the trainer of {name} ({trainer})"


def test_index_links_every_page(repository):
    docs = repository / "docs"
    linked = set(re.findall(r"\]\(([a-z_0-9/]+\.md)", (docs / "index.md").read_text()))
    assert linked == {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")} - {"index.md"}


def test_index_names_things_that_exist(repository):
    index = (repository / "docs" / "index.md").read_text()
    names = re.findall(r"`(fdiv\.[a-z_.]+\.[A-Za-z_]+)`", index)
    assert "fdiv.alignment.f_dpo_loss" in names
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), f"docs/index.md: {name} does not exist"
    for recipe in re.findall(r"`(recipes/[^`]+)`", index):
        assert (repository / recipe).exists(), f"docs/index.md: {recipe} does not exist"


BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def blocks(path):
    """(language, code) of every block of a page, without its indentation."""
    found = BLOCK.findall(path.read_text())
    return [(language, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)) for indent, language, code in found]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/getting_started.md"])
def test_python_examples_in_the_guides_run(repository, tmp_path, page):
    code = [code for language, code in blocks(repository / page) if language == "python"]
    assert code
    (tmp_path / "blocks.py").write_text("\n".join(code))
    run_well(run_script, tmp_path / "blocks.py", tmp_path)


def follow(page, folder):
    """For `run`: every block of a tutorial in order, in one folder; a command line in this process."""
    import shlex

    from fdiv.cli import main

    os.chdir(folder)
    names = {"__name__": "tutorial"}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, f"{page.name}, a block", "exec"), names)
        for line in code.splitlines() if language == "sh" else ():
            words = shlex.split(line)
            assert words[0] == "fdiv"
            assert main(words[1:]) == 0, line
    for lost in set(re.findall(r"`(runs/[^`]+)`", page.read_text())):
        assert (folder / lost).exists(), f"{page.name} speaks of {lost}, which its blocks do not write"


VERBS = re.compile(r'verbs\.add_parser\(\s*"(\w+)"')
TUTORIALS = sorted((Path(__file__).resolve().parents[2] / "docs" / "tutorials").glob("*.md"))


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_does_what_it_says(page, tmp_path):
    run_well(follow, page, tmp_path)


def test_there_is_a_tutorial_for_every_family():
    assert {page.stem for page in TUTORIALS} == {"alignment", "unlearning", "rl", "distillation"}


def test_code_blocks_of_all_guides_are_code(repository, builder):
    """Python parses, YAML loads, and a command line names a verb that there is."""
    verbs = set(VERBS.findall((repository / "fdiv" / "cli" / "command.py").read_text()))
    for page in builder.guide_pages():
        for language, code in blocks(page):
            if language == "python":
                compile(code, str(page), "exec")
            elif language in ("yaml", "yml"):
                yaml.safe_load(code)
            elif language == "sh":
                named = set(re.findall(r"(?:^|[ /])fdiv ([a-z]+)", code, re.MULTILINE))
                assert named <= verbs, f"{page.name}: {named - verbs}"
