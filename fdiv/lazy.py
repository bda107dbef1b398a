"""Names of a package that are imported on first use, so that importing the package stays light."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["attach"]


def attach(
    package: str, homes: Mapping[str, str], before: Callable[[], None] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package, for names that live in other modules.

        __getattr__, __dir__ = attach(__name__, {"FDPOTrainer": "fdiv.alignment.f_dpo.trainer"})

    Args:
        package: `__name__` of the package.
        homes: Name → module that defines it.
        before: called before such a module is imported; of what it depends on, something may be missing or other.
    """

    def get(name: str) -> Any:
        if name in homes:
            if before is not None:
                before()
            return getattr(import_module(homes[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
