"""Write docs/licences.md: the licence of every package of the pinned set, from its installed metadata.

    .venv/bin/python scripts/licences.py            rewrite docs/licences.md
    .venv/bin/python scripts/licences.py --check    exit 1 when a pinned package is missing from it

Standard library only; run by `make licences`. A package that states no licence is listed as "not stated".
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "licences.md"
HEAD = """# Licences of the dependencies

fdiv is Apache-2.0. It ships none of these packages; `pip` installs them. The list is the pinned set
(`constraints.txt`) on Linux without an accelerator, with what each package says of itself; `make licences` writes it.

| package | version | licence |
|---|---|---|
"""


def pinned(path: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """Name → version of every pin."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = (re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line) for line in lines)
    return {match[1]: match[2] for match in pins if match}


def licence(name: str) -> str:
    """What the package states: its licence expression, its classifiers, or the first line of its licence field."""
    try:
        found = metadata(name)
    except PackageNotFoundError:
        return "not installed here"
    classifiers = [
        line.rpartition(" :: ")[2] for line in found.get_all("Classifier", []) if line.startswith("License ::")
    ]
    field = (found.get("License") or "").strip().splitlines()
    stated = found.get("License-Expression") or ", ".join(classifiers) or (field[0] if field else "")
    return stated.replace("|", "/")[:80] or "not stated"


def page(pins: dict[str, str]) -> str:
    """The Markdown page."""
    rows = (
        f"| {name} | {version} | {licence(name)} |\n"
        for name, version in sorted(pins.items(), key=lambda p: p[0].lower())
    )
    return HEAD + "".join(rows)


def main(arguments: list[str]) -> None:
    """Entry point; see the module's docstring."""
    pins = pinned()
    if arguments == ["--check"]:
        listed = set(re.findall(r"^\| ([A-Za-z0-9._-]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
        missing = sorted(pins.keys() - listed)
        raise SystemExit(f"docs/licences.md lacks {', '.join(missing)}: run `make licences`" if missing else None)
    if arguments:
        raise SystemExit(__doc__)
    PAGE.write_text(page(pins), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
