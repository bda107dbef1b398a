"""Copy the committed result tables into the README and the guides. Standard library only; run by `make readme`.

    python scripts/readme_tables.py            rewrite README.md and docs/robustness.md
    python scripts/readme_tables.py --check    exit 1 when a table in them differs from its file

Between `<!-- table: PATH -->` and `<!-- end of table -->` stands the Markdown table of PATH (its first block of lines
that begin with `|`), which the command named in the result's JSON has written.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "robustness.md")
_PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def table_of(path: Path) -> str:
    """The first block of table lines of a Markdown file; SystemExit when it has none."""
    block = re.search(r"(?:^\|.*\n)+", path.read_text(encoding="utf-8") + "\n", re.MULTILINE)
    if block is None:
        raise SystemExit(f"{path}: no Markdown table in it")
    return block.group(0)


def filled(text: str, root: Path = ROOT) -> str:
    """`text` with every marked table replaced by the one of its file."""
    return _PLACE.sub(lambda match: match.group(1) + table_of(root / match.group(2)) + match.group(3), text)


def main(arguments: list[str]) -> None:
    """Entry point; see the module's docstring."""
    if arguments not in ([], ["--check"]):
        raise SystemExit(__doc__)
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if arguments and before != after:
            raise SystemExit(f"{page.name}: a table differs from its file; run `make readme`")
        if not arguments:
            page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
