"""Build the documentation into site/: the API reference from the docstrings (pdoc) and the guides in docs/ (Markdown).

    .venv/bin/python scripts/build_docs.py [OUTPUT_DIR]         (make docs)

Everything is static and self-contained: no page loads anything from the network.
"""

from __future__ import annotations

import pkgutil
import re
import shutil
import sys
import tomllib
import warnings
from html import escape
from importlib import import_module
from pathlib import Path

import markdown2
import pdoc
import pdoc.extract
import pdoc.render

ROOT = Path(__file__).resolve().parent.parent
MARKDOWN_EXTRAS = ["fenced-code-blocks", "tables", "header-ids", "code-friendly"]
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ border: 1px solid #d0d7de; padding: .35rem .7rem; text-align: left; vertical-align: top; }}
code {{ background: #f3f4f6; padding: .1em .25em; }} pre {{ background: #f3f4f6; padding: .8rem; overflow-x: auto; }}
pre code {{ padding: 0; }}
</style></head><body><nav><a href="index.html">fdiv</a> · <a href="api/index.html">API</a></nav>
{body}</body></html>
"""


def documented_packages(root: Path = ROOT) -> list[str]:
    """The import names of all packages that pyproject.toml installs, without those that hold data only."""
    with (root / "pyproject.toml").open("rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["packages"]
    return [name for name in packages if name != "fdiv.recipes" and not name.startswith("fdiv.recipes.")]


def with_submodules(packages: list[str]) -> list[str]:
    """The packages and every public module in their folders; sub-packages only as far as they are listed themselves.

    pdoc's own search leaves out the submodules of a package with an `__all__`.
    """
    names = list(packages)
    for package in packages:
        for module in pkgutil.iter_modules(import_module(package).__path__, f"{package}."):
            hidden = module.name.rpartition(".")[2].startswith("_")
            if not (module.ispkg or hidden or module.name in names):
                names.append(module.name)
    return names


def resolve_exports(module_names: list[str]) -> None:
    """Put every name of an `__all__` into its module: packages export their trainers lazily, which pdoc cannot see.

    Raises:
        AttributeError: a name that its module does not have.
    """
    for module in map(import_module, module_names):
        for name in getattr(module, "__all__", ()):
            vars(module).setdefault(name, getattr(module, name))


def build_api(packages: list[str], output_dir: Path) -> None:
    """Render packages, each with its submodules, below `output_dir`; one page per module and a search index.

    Raises:
        AttributeError: see `resolve_exports`.
        ImportError: a module that cannot be imported.
    """
    names = with_submodules(packages)
    resolve_exports(names)
    pdoc.render.configure(docformat="google", footer_text="fdiv")
    with warnings.catch_warnings():
        # Names that are imported for type checkers only stay as text.
        warnings.filterwarnings("ignore", message="Error parsing type annotation")
        # Modules of a package without `__all__` are found by pdoc, too.
        warnings.filterwarnings("ignore", message="The module specification")
        pdoc.pdoc(*names, output_directory=output_dir)


def page_name(source: Path) -> str:
    """The page of a Markdown file: its stem, and for the README of an experiment the name of its folder."""
    return source.parent.name if source.stem == "README" else source.stem


def build_guides(sources: list[Path], output_dir: Path) -> None:
    """Render Markdown files to HTML pages beside each other; links between them become links between pages, and other
    files beside one that it links to or shows are copied to `PAGE-FILE`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    pages = {source.resolve() for source in sources}
    for source in sources:
        text, page = source.read_text(encoding="utf-8"), page_name(source)
        body = markdown2.markdown(text, extras=MARKDOWN_EXTRAS)
        for name in set(re.findall(r'(?:src|href)="([^"/#:]+)"', body)):
            beside = source.parent / name
            if beside.resolve() not in pages:
                copied = f"{page}-{name}".replace(".md", ".txt")
                shutil.copyfile(beside, output_dir / copied)
                body = body.replace(f'="{name}"', f'="{copied}"')
        body = re.sub(r'href="(?!https?:)[^"#]*?([^"/#]+)/README\.md(#[^"]*)?"', r'href="\1.html\2"', body)
        body = re.sub(r'href="(?!https?:)(?:[^"#]*/)?([^"/#]+)\.md(#[^"]*)?"', r'href="\1.html\2"', body)
        heading = re.search(r"^# (.+)$", text, re.MULTILINE)
        title = heading.group(1) if heading else page
        (output_dir / f"{page}.html").write_text(PAGE.format(title=escape(title), body=body), encoding="utf-8")


def guide_sources(root: Path = ROOT) -> list[Path]:
    """The hand-written pages: docs/, the contributors' page from the root, and the READMEs of the experiments."""
    experiments = sorted((root / "results").glob("*/README.md"))
    return [*sorted((root / "docs").glob("*.md")), root / "CONTRIBUTING.md", *experiments]


def main(output_dir: Path) -> None:
    """Build all of it."""
    build_api(documented_packages(), output_dir / "api")
    build_guides(guide_sources(), output_dir)
    print(f"documentation: {output_dir / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site")
