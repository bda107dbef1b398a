"""The rules that keep the layout: floors, doors, packages instead of prefixes (CONTRIBUTING, "The layout")."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "fdiv": "fdiv",
    "alignment": "fdiv.alignment",
    "unlearning": "fdiv.unlearning",
    "rl": "fdiv.rl",
    "distillation": "fdiv.distillation",
    "eval": "fdiv.eval",
    "recipes": "fdiv.recipes",
}
# Ground first. A module imports from its own package, from lower floors, and from packages of its floor as long as no
# circle comes of it. `fdiv` itself is the version.
FLOORS = (
    (
        "fdiv",
        "lazy",
        "moved",
        "versions",
        "errors",
        "filling",
        "interrupts",
        "secrets",
        "named",
        "bounds",
        "divergences",
    ),
    ("terminal", "files", "sealed", "stamps", "rows", "lock", "provenance", "catalog", "evaluation", "statistics"),
    ("inference", "models", "recipe", "report", "testing"),
    ("training", "memory"),
    ("run", "alignment", "distillation"),
    ("unlearning", "rl", "eval"),
    ("recipes", "cli", "integrations"),
    ("__main__",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
# Objective folders have the first three, benchmark folders the others.
OBJECTIVES = ("alignment/f_dpo", "alignment/d2o", "alignment/f_dpg", "rl/dph", "distillation/f_distill")
OBJECTIVE_DOORS = ("loss.py", "config.py", "trainer.py")
BENCHMARKS = ("eval/tofu", "eval/muse", "eval/pass_at_k", "eval/unlearning")
BENCHMARK_DOORS = ("data.py", "aggregate.py", "evaluation.py", "command.py")


@cache
def modules() -> dict[str, Path]:
    """Module name → file, for everything that is installed."""
    found = {}
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts])
            found[name.removesuffix(".__init__")] = file
    return found


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports() -> dict[str, dict[str, int]]:
    """Module → the modules of ours it imports, inside functions too, with a line of each; typing-only ones left out."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for name, file in modules().items():
        typing_only = {
            id(inner)
            for node in ast.walk(tree(file))
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree(file)):
            if id(node) in typing_only:
                continue
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fdiv":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found[name][inner if inner in modules() else str(node.module)] = node.lineno
            elif isinstance(node, ast.Import):
                found[name].update({alias.name: node.lineno for alias in node.names if alias.name in modules()})
    return found


def package_of(module: str) -> str:
    """`fdiv.eval.tofu.data` → `eval`; `fdiv` → `fdiv`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected groups of two or more (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in list(edges):
        if node not in index:
            visit(node)
    return found


def test_every_package_has_a_floor():
    assert {package_of(name) for name in modules()} <= set(FLOOR)


def test_contributing_shows_the_floors():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d) \| ([^|]+) \|", text.partition("\n## The layout\n")[2], re.MULTILINE))
    shown = {name: int(number) - 1 for number, cell in rows.items() for name in re.findall(r"`(?:fdiv/)?(\w+)", cell)}
    packages = {package_of(name) for name, file in modules().items() if file.name == "__init__.py"} - {"fdiv"}
    assert packages - set(shown) == set()
    assert {name: FLOOR[name] for name in shown} == shown


def test_no_import_goes_up():
    up = [
        f"{modules()[name].relative_to(ROOT)}:{line} imports {other}"
        for name, others in imports().items()
        for other, line in others.items()
        if FLOOR[package_of(other)] > FLOOR[package_of(name)]
    ]
    assert not up, "\n".join(up)


def test_packages_have_no_circle():
    edges: dict[str, set[str]] = defaultdict(set)
    for name, others in imports().items():
        edges[package_of(name)] |= {package_of(other) for other in others} - {package_of(name)}
    assert circles(edges) == []


def test_modules_have_no_circle_outside_the_divergences():
    edges = {
        name: {other for other in others if not other.startswith("fdiv.divergences")}
        for name, others in imports().items()
    }
    assert circles(edges) == []


def test_the_circle_finder_finds_circles():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


@pytest.mark.parametrize("folder", OBJECTIVES)
def test_an_objective_has_its_doors(folder):
    assert [door for door in OBJECTIVE_DOORS if not (ROOT / folder / door).is_file()] == []


@pytest.mark.parametrize("folder", BENCHMARKS)
def test_a_benchmark_has_its_doors(folder):
    assert [door for door in BENCHMARK_DOORS if not (ROOT / folder / door).is_file()] == []


@pytest.mark.parametrize("folder", OBJECTIVES)
def test_a_loss_needs_torch_and_divergences_only(folder):
    allowed = {"__future__", "collections", "math", "typing", "warnings", "torch", "fdiv"}
    for node in ast.walk(tree(ROOT / folder / "loss.py")):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.split(".")[0] in allowed, name
            if name.startswith("fdiv."):
                assert name.startswith("fdiv.divergences") or name.endswith(".loss"), name


def test_a_prefix_is_a_package():
    """Two siblings `x_a.py` and `x_b.py`, or `x.py` and `x_b.py`, are a package `x/` that is missing."""
    found = []
    for folder in sorted({file.parent for file in modules().values()}):
        stems = [file.stem for file in sorted(folder.glob("*.py")) if file.stem != "__init__"]
        heads: dict[str, list[str]] = defaultdict(list)
        for stem in stems:
            heads[stem.split("_")[0]].append(stem)
        found += [
            f"{folder.relative_to(ROOT)}: {', '.join(members)}"
            for head, members in heads.items()
            if len(members) > 1 and head not in METHODS_BY_THEIR_NAMES.get(str(folder.relative_to(ROOT)), ())
        ]
    assert not found, "\n".join(found)


# Methods are called what their papers call them.
METHODS_BY_THEIR_NAMES = {
    "unlearning/methods": ("grad", "jensun"),
}


def test_no_module_is_called_utils():
    assert [str(file) for file in modules().values() if file.stem in ("utils", "helpers", "common", "misc")] == []


def test_options_are_declared_not_checked():
    """Help and bounds of a key stand in its `option`: no `field(…)` and no check of one key's range beside it."""
    files = [
        file
        for folder in ("alignment", "rl", "unlearning", "distillation")
        for file in sorted((ROOT / folder).rglob("config.py"))
    ]
    files += sorted((ROOT / "unlearning" / "methods").glob("*.py"))
    bounds = ("must be above", "must be at least", "must be below", "must be at most", "must be one of", "must lie in")
    assert len(files) > 20
    for file in files:
        for definition in ast.walk(tree(file)):
            if not isinstance(definition, ast.ClassDef):
                continue
            for node in ast.walk(definition):
                where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.Call):
                    assert ast.unparse(node.func) not in ("field", "dataclasses.field"), f"{where}: use option(…)"
                elif isinstance(node, ast.Raise):
                    text = ast.unparse(node)
                    assert not [words for words in bounds if words in text], f"{where}: give the bound to option(…)"


# One of each: what is written in one place, as a pattern, and the places where it may be.
ONE_OF_EACH = {
    "did you mean": (r"get_close_matches", {"fdiv/named.py"}),
    # The two besides return tensors, with a gradient.
    "a mean ± s.e.": (
        r"\.std\(correction=1\)",
        {"fdiv/statistics/estimates.py", "fdiv/divergences/base.py", "alignment/f_dpg/estimate.py"},
    ),
    "a mean ± s.e. by name": (r"^def _?mean_and_error\(", {"fdiv/statistics/estimates.py"}),
    # The second hashes any parts: its callers name the weights, texts and settings.
    "a fingerprint": (r"^def _?\w*fingerprint\(", {"fdiv/models/fingerprints.py", "fdiv/inference/cache.py"}),
    "a checked tokenizer": (r"^def _?checked_tokenizer\(", {"fdiv/models/loading.py"}),
    "the formats of data files": (r'"\.jsonl": "json"', {"fdiv/files.py"}),
    "a table of rewards": (r"^_?(REWARDS|SCORERS)\b.*[{(]$", {"fdiv/catalog.py"}),
}


@pytest.mark.parametrize("what", ONE_OF_EACH)
def test_there_is_one_of_each(what):
    pattern, homes = ONE_OF_EACH[what]
    found = {
        str(file.relative_to(ROOT))
        for file in modules().values()
        if re.search(pattern, file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert found == homes


def test_the_catalog_holds_paths_only():
    """A name is one line, `"npo": "module:Class"`; all else stands on the class, and the line is true."""
    from fdiv.catalog import EVAL_COMMANDS, EVALUATIONS, METHODS, REWARDS, TASKS

    for table in (METHODS, TASKS, EVALUATIONS, EVAL_COMMANDS, REWARDS):
        for path in table.values():
            module, _, attribute = path.partition(":")
            assert module in modules(), path
            if attribute:
                defined = {node.name for node in tree(modules()[module]).body if hasattr(node, "name")}
                assert attribute in defined, path


def test_results_hold_no_code():
    assert sorted(str(file.relative_to(ROOT)) for file in (ROOT / "results").rglob("*.py")) == []


# Tables of options and loops over pages: longer, and not harder to read.
LONG = {
    "fdiv.cli.command.build_parser",
    "fdiv.alignment.f_dpg.moments.fit_moments",
    "fdiv.inference.sampling.sample_completions",
}


def test_a_function_fits_on_a_screen():
    """At most 60 lines without the docstring."""
    long = set()
    for name, file in modules().items():
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                document = node.body[0] if ast.get_docstring(node) is not None else None
                lines = node.end_lineno - node.lineno + 1
                lines -= 0 if document is None else document.end_lineno - document.lineno + 1
                if lines > 60:
                    long.add(f"{name}.{node.name}")
    assert long <= LONG, sorted(long - LONG)


def test_no_one_assigns_to_options():
    """The options are the caller's: a trainer works on `own_options`, and nothing writes to them after that."""
    found = []
    for name, file in modules().items():
        if name.startswith("fdiv.cli"):  # args of argparse, made here
            continue
        for node in ast.walk(tree(file)):
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else targets
            for target in targets:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) in ("args", "self.args"):
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not found, "\n".join(found)
