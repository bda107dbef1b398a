"""The documentation: every public name has a docstring, the reference builds, examples in the guides run."""

import importlib.util
import inspect
import re
from importlib import import_module

import pytest

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


def test_reference_renders_names_and_formulas(builder, tmp_path):
    builder.build_api(["fdiv.divergences"], tmp_path)
    page = (tmp_path / "fdiv" / "divergences.html").read_text()
    for name in ("get_divergence", "register_divergence", "Divergence.inverse_derivative"):
        assert f'id="{name}"' in page
    assert "D_f(P‖Q) = E_Q[f(t)]" in page
    assert (tmp_path / "index.html").exists()


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


def test_guides_link_to_each_other_and_show_tables(builder, repository, tmp_path):
    builder.build_guides(builder.guide_sources(), tmp_path)
    index = (tmp_path / "index.html").read_text()
    assert 'href="getting_started.html"' in index
    assert 'href="CONTRIBUTING.html"' in index
    assert "<th>Paper</th>" in index
    pages = {page.name for page in tmp_path.iterdir()} | {"api/index.html"}
    for page in tmp_path.glob("*.html"):
        for target in re.findall(r'href="([^"#]+)', page.read_text()):
            assert target.startswith("https://") or target in pages, (
                f"{page.name} links to {target}, which is not built"
            )


def test_index_has_a_row_for_every_method(repository):
    from fdiv.catalog import METHODS

    index = (repository / "docs" / "index.md").read_text()
    for name, path in METHODS.items():
        method, trainer = METHODS.find(name), path.rpartition(":")[2]
        assert method.paper in index, f"docs/index.md has no row for the paper of {name} ({method.paper})"
        assert trainer in index, f"docs/index.md does not name the trainer of {name} ({trainer})"


def test_index_links_every_page(repository):
    linked = set(re.findall(r"\]\(([a-z_0-9]+\.md)", (repository / "docs" / "index.md").read_text()))
    assert linked == {page.name for page in (repository / "docs").glob("*.md")} - {"index.md"}


def test_index_names_things_that_exist(repository):
    index = (repository / "docs" / "index.md").read_text()
    names = re.findall(r"`(fdiv\.[a-z_.]+\.[A-Za-z_]+)`", index)
    assert "fdiv.alignment.f_dpo_loss" in names
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), f"docs/index.md: {name} does not exist"
    for recipe in re.findall(r"`(recipes/[^`]+)`", index):
        assert (repository / recipe).exists(), f"docs/index.md: {recipe} does not exist"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/getting_started.md"])
def test_python_examples_in_the_guides_run(repository, tmp_path, page):
    text = (repository / page).read_text()
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    code = "\n".join(re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in blocks)
    (tmp_path / "blocks.py").write_text(code)
    run_well(run_script, tmp_path / "blocks.py", tmp_path)
