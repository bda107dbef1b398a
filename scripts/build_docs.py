"""Build the documentation into site/: guides, experiments, pictures of the divergences and the reference.

    .venv/bin/python scripts/build_docs.py [OUTPUT_DIR]         (make docs)

MkDocs with the theme Material, mkdocstrings for the reference; mkdocs.yml has the look and the navigation. Everything
is static: no page loads anything from the network, and the folder can be read without a server.
"""

from __future__ import annotations

import inspect
import logging
import os
import pkgutil
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
# Code comes first, where there is some: a link in it is code. The text of a link may hold code.
_LINK = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]+`)|(?P<opening>!?\[[^\]]*\]\()(?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)",
    re.MULTILINE | re.DOTALL,
)
_STYLE = """
[data-md-color-scheme="default"] {{ {light} }}
[data-md-color-scheme="slate"] {{ {dark} }}
.plots {{ display: grid; gap: .4rem 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }}
.md-typeset .plots figure {{ margin: 0; width: auto; max-width: none; min-width: 0; }}
.md-typeset .plots figcaption {{ margin: 0; font-style: normal; max-width: none; text-align: left; }}
.plots svg {{ width: 100%; height: auto; display: block; }}
.plots svg text {{ font-family: inherit !important; }} .plots svg text:not([style*="fill"]) {{ fill: var(--text); }}
.md-typeset img {{ background: #fff; border-radius: 4px; }}
.md-typeset .doc-heading code, .md-typeset h1 {{ overflow-wrap: anywhere; }}
.md-typeset .doc-contents {{ padding-left: 0; }}
.md-typeset table:not([class]) th, .md-typeset table:not([class]) td {{ min-width: 3rem; padding: .5em .75em; }}
.md-typeset td code {{ word-break: normal; overflow-wrap: normal; }}
.md-typeset .doc-signature code {{ white-space: pre-wrap; }}
"""


# ---------------------------------------------------------------- what there is
def documented_packages(root: Path = ROOT) -> list[str]:
    """The import names of all packages that pyproject.toml installs, without those that hold data only."""
    with (root / "pyproject.toml").open("rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["packages"]
    return [name for name in packages if name != "fdiv.recipes" and not name.startswith("fdiv.recipes.")]


def with_submodules(packages: list[str]) -> list[str]:
    """The packages and every public module in their folders; sub-packages only as far as they are listed."""
    names = list(packages)
    for package in packages:
        for module in pkgutil.iter_modules(import_module(package).__path__, f"{package}."):
            hidden = module.name.rpartition(".")[2].startswith("_")
            if not (module.ispkg or hidden or module.name in names):
                names.append(module.name)
    return names


def resolve_exports(module_names: list[str]) -> None:
    """Put every name of an `__all__` into its module: packages export their trainers lazily.

    Raises:
        AttributeError: a name that its module does not have.
    """
    for module in map(import_module, module_names):
        for name in getattr(module, "__all__", ()):
            vars(module).setdefault(name, getattr(module, name))


def guide_pages(root: Path = ROOT) -> dict[Path, str]:
    """File → page of the site: docs/, pages of the root, the experiments' READMEs."""
    docs = root / "docs"
    pages = {file: file.relative_to(docs).as_posix() for file in sorted(docs.rglob("*.md"))}
    pages |= {root / f"{name}.md": f"{name.lower()}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG")}
    return pages | {file: f"results/{file.parent.name}.md" for file in sorted((root / "results").glob("*/README.md"))}


# ---------------------------------------------------------------- staging
def stage_guides(pages: Mapping[Path, str], folder: Path, root: Path = ROOT) -> None:
    """Write the guides below `folder`, links between them changed to where they stand there; other files that a page
    links to or shows are copied to `files/`, in the order of the repository.

    Raises:
        FileNotFoundError: a link to a file that does not exist.
    """
    for source, page in pages.items():
        text = source.read_text(encoding="utf-8")

        def changed(match: re.Match[str], source: Path = source, page: str = page) -> str:
            opening, target, anchor = match["opening"], match["target"], match["anchor"] or ""
            if match["code"] or not target or re.match(r"[a-z]+:", target):
                return match.group()
            file = Path(os.path.normpath(source.parent / target))
            if not file.exists():
                raise FileNotFoundError(f"{source.relative_to(root)} links to {target}, which does not exist")
            if file.is_dir():  # a folder of the repository: there is no page to go to
                return opening[1:-2]
            place = pages.get(file) or _copied(file, folder, root)
            return f"{opening}{os.path.relpath(place, PurePosixPath(page).parent)}{anchor})"

        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text(_LINK.sub(changed, text), encoding="utf-8")


def _copied(file: Path, folder: Path, root: Path) -> str:
    place = f"files/{file.relative_to(root).as_posix()}"
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / place)
    return place


def own_names(name: str) -> list[str]:
    """What a module offers: its `__all__`, or the public functions and classes it defines."""
    module = import_module(name)
    found = {key for key, value in vars(module).items() if getattr(value, "__module__", None) == name}
    return list(getattr(module, "__all__", sorted(key for key in found if not key.startswith("_"))))


def reference_page(package: str, modules: Sequence[str]) -> str:
    """The Markdown of a package: what it exports, with a link each, then its modules in full."""
    module = import_module(package)
    lines = [f"# {package}", "", inspect.getdoc(module) or "", ""]
    exported = [(name, getattr(module, name)) for name in getattr(module, "__all__", ())]
    elsewhere = [pair for pair in exported if getattr(pair[1], "__module__", None) != package]
    if elsewhere:
        lines += ["| Name | |", "|---|---|"]
        for name, value in elsewhere:
            ours = hasattr(value, "__qualname__") and value.__module__.startswith("fdiv")
            link = f"[`{name}`][{value.__module__}.{value.__qualname__}]" if ours else f"`{name}`"
            text = inspect.getdoc(value) if hasattr(value, "__qualname__") else ""
            first = (text or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
            lines.append(f"| {link} | {first} |")
        lines.append("")
    for name in modules:
        own = own_names(name)
        if name == package:
            own = [exported for exported in own if (exported, getattr(module, exported)) not in elsewhere]
        if own:
            members = "".join(f"\n        - {member}" for member in own)
            heading = "false" if name == package else "true"
            lines += [
                f"::: {name}",
                "    options:",
                f"      show_root_heading: {heading}",
                f"      members:{members}",
                "",
            ]
    return "\n".join(lines)


def stage_reference(packages: Sequence[str], folder: Path) -> list[dict[str, str]]:
    """Write a page for every package below `folder/api`; returns their entries of the navigation."""
    (folder / "api").mkdir(parents=True, exist_ok=True)
    names, entries = with_submodules(list(packages)), []
    lines = ["# Reference", "", "A page for each package, made from the docstrings.", "", "| Package | |", "|---|---|"]
    for package in sorted(packages):
        modules = [name for name in names if name == package or name.rpartition(".")[0] == package]
        modules = [name for name in modules if name == package or name not in packages]
        (folder / "api" / f"{package}.md").write_text(reference_page(package, modules), encoding="utf-8")
        first = (inspect.getdoc(import_module(package)) or "").partition("\n")[0]
        lines.append(f"| [`{package}`]({package}.md) | {first} |")
        entries.append({package: f"api/{package}.md"})
    (folder / "api" / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return entries


def source_tree(folder: Path, root: Path = ROOT) -> Path:
    """A folder in which every package stands under its import name: they are installed from other folders."""
    with (root / "pyproject.toml").open("rb") as file:
        places = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    (folder / "fdiv").mkdir(parents=True)
    for entry in (root / "fdiv").iterdir():
        (folder / "fdiv" / entry.name).symlink_to(entry)
    for name, place in places.items():
        if name != "fdiv":
            (folder / Path(*name.split("."))).symlink_to(root / place)
    return folder


def style() -> str:
    """The style sheet: the colours of the plots in both schemes."""
    from fdiv.report.drawing import DARK, LIGHT

    light, dark = (" ".join(f"--{name}: {colour};" for name, colour in found.items()) for found in (LIGHT, DARK))
    return _STYLE.format(light=light, dark=dark)


# ---------------------------------------------------------------- building
def build(output_dir: Path, packages: Iterable[str] | None = None) -> None:
    """Stage and build all of it; `packages` limits the reference.

    Raises:
        FileNotFoundError: see `stage_guides`.
        mkdocs.exceptions.Abort: a broken link or anchor, a page that is in no menu, a docstring that is not read.
    """
    from divergence_pictures import page as pictures
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "docs"
        pages = guide_pages()
        stage_guides(pages, folder)
        (folder / "divergence_pictures.md").write_text(pictures(), encoding="utf-8")
        shutil.copytree(ROOT / "docs" / "javascripts", folder / "javascripts")
        (folder / "stylesheets").mkdir()
        (folder / "stylesheets" / "fdiv.css").write_text(style(), encoding="utf-8")
        reference = stage_reference(list(packages or documented_packages()), folder)
        config: Any = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(folder), site_dir=str(output_dir))
        experiments = [page for page in pages.values() if page.startswith("results/")]
        named = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
        others = [page for page in pages.values() if page not in named and page not in experiments]
        more = [{"More": others}] if others else []  # a page that is new, and has no place yet
        config.nav = [*config.nav, *more, {"Experiments": experiments}, {"Reference": ["api/index.md", *reference]}]
        handler = config.plugins["mkdocstrings"].config.handlers["python"]
        handler["options"]["extensions"] = [str(ROOT / "scripts" / "option_docs.py")]
        handler["paths"] = [str(source_tree(Path(temporary) / "source"))]
        build_site(config)


def check_references(output_dir: Path) -> None:
    """Every name that a page of the whole reference links to has its place in it.

    Raises:
        ValueError: one that has none, with its page.
    """
    for page in sorted((output_dir / "api").glob("*.html")):
        lost = re.findall(r"\]\[(fdiv[\w.]+)\]", page.read_text(encoding="utf-8"))
        if lost:
            raise ValueError(f"api/{page.name} links to {', '.join(sorted(set(lost)))}, which no page describes")


def main(output_dir: Path) -> None:
    """Build all of it, and say on stderr what is wrong with it."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    build(output_dir.resolve())
    check_references(output_dir)
    print(f"documentation: {output_dir / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site")
