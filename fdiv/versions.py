"""Which releases of the packages below the trainers were tested together, and one warning outside them.

The sets stand in `fdiv/versions.json`, which scripts/setup_environment.py writes from the constraints files;
docs/versions.md shows them as a table.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["TABLE", "outside_tested", "tested_sets", "untested_message", "warn_if_untested"]

TABLE = "docs/versions.md"
_FILE = Path(__file__).with_name("versions.json")
_SAID = "FDIV_VERSIONS_SAID"  # in the environment: the processes of a launch say it once


@functools.cache
def tested_sets() -> dict[str, dict[str, str]]:
    """Name of each tested set (`oldest`, `vllm`, `pinned`, `newest`) → package → release."""
    return json.loads(_FILE.read_text(encoding="utf-8"))["sets"]


def outside_tested(installed: Mapping[str, str]) -> list[str]:
    """What of `installed` (package → release) lies below the oldest or above the newest tested release, in words.

    A release between two tested ones counts as tested, and so do a local build of one (`2.13.0+cpu`) and a later patch
    of the newest (5.24.1 after 5.24.0).
    """
    found = []
    for package, release in installed.items():
        tested = sorted({pins[package] for pins in tested_sets().values() if package in pins}, key=_key)
        if tested and not (_key(tested[0]) <= _key(release) and _key(release)[:2] <= _key(tested[-1])[:2]):
            span = tested[0] if len(tested) == 1 else f"{tested[0]} to {tested[-1]}"
            found.append(f"{package} {release} (tested: {span})")
    return found


def _key(release: str) -> tuple[int, ...]:
    """The numbers of a release, `2.13.0+cpu` → (2, 13, 0); a pre-release counts as its release."""
    return tuple(map(int, re.findall(r"\d+", re.match(r"[0-9.]*", release)[0])))


def untested_message() -> str | None:
    """The warning about what is installed here, None where all of it is tested or the warning was given already."""
    if os.environ.get(_SAID) or os.environ.get("RANK", "0") != "0":
        return None
    installed = {}
    for package in sorted({package for pins in tested_sets().values() for package in pins}):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    outside = outside_tested(installed)
    if not outside:
        return None
    os.environ[_SAID] = "1"
    return (
        f"not tested with {', '.join(outside)}: if something fails below, install one of the sets in {TABLE} "
        f"(here: {_FILE})"
    )


def warn_if_untested() -> None:
    """Give the warning as a `UserWarning`, once per launch."""
    message = untested_message()
    if message:
        warnings.warn(message, UserWarning, stacklevel=3)
