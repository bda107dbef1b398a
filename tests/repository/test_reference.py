"""The reference says what a caller needs: every public function names its parameters and errors, one that takes or gives
tensors their shapes, a loss its formula, its unit and its paper."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from importlib import import_module

import pytest
from torch import Tensor

# Where the losses are: their functions are held to more.
LOSSES = (
    "fdiv.alignment.f_dpo.loss", "fdiv.alignment.d2o.loss", "fdiv.alignment.f_dpg.loss", "fdiv.rl.dph.loss",
    "fdiv.distillation.f_distill.loss", "fdiv.unlearning.losses", "fdiv.unlearning.vocabulary_losses",
)  # fmt: skip
SHAPE = re.compile(r"\[[A-Z0-9][^\]]*\]|\[…[^\]]*\]|\[\.\.\.[^\]]*\]|any shape|scalar|0-dim|one number")
FORMULA = re.compile(r"[=Σ∑·√∫∇²⁻−]|\bmean\b|\blog\b")
UNIT = re.compile(r"\bnats?\b|probabilit|no unit|f'|f\(", re.IGNORECASE)
PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}|et al")
POINTER = re.compile(r"(?:as|see|of|by) `[\w.]+`|Arguments as")


@pytest.fixture(scope="module")
def builder(repository):
    spec = importlib.util.spec_from_file_location("build_docs", repository / "scripts" / "build_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def faults(function, loss=False):
    """What the docstring of a function does not say."""
    text = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    pointer = bool(POINTER.search(text))
    found = [
        f"parameter {name}"
        for name, parameter in signature.parameters.items()
        if name not in ("self", "cls")
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text)
        and not pointer
    ]
    annotations = " ".join(str(p.annotation) for p in signature.parameters.values()) + str(signature.return_annotation)
    if re.search(r"\bTensor\b", annotations) and not (SHAPE.search(text) or pointer):
        found.append("shapes")
    found += [f"error {name}" for name in sorted(raised(function)) if name not in text and not pointer]
    if loss:
        found += [part for part, pattern in (("formula", FORMULA), ("unit", UNIT)) if not pattern.search(text)]
    return found


def raised(function):
    """The exceptions that a function raises itself, by name."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):
        return set()
    body = tree.body[0]
    inner = {id(node) for child in ast.walk(body) if child is not body and isinstance(child, ast.FunctionDef)
             for node in ast.walk(child)}  # fmt: skip
    return {
        node.exc.func.id
        for node in ast.walk(body)
        if id(node) not in inner and isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
    }  # fmt: skip


def public_functions(packages):
    """Name → function, for what the packages export, and the public methods of exported classes of ours."""
    found = {}
    for package in map(import_module, packages):
        for name in getattr(package, "__all__", ()):
            value = getattr(package, name)
            if not getattr(value, "__module__", "").startswith("fdiv"):
                continue
            if inspect.isfunction(value):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


def test_every_public_function_says_what_a_caller_needs(builder):
    functions = public_functions(builder.documented_packages())
    assert len(functions) > 60
    missing = {name: faults(function) for name, function in functions.items()}
    missing = {name: parts for name, parts in missing.items() if parts}
    assert not missing, "\n".join(f"{name}: {', '.join(parts)}" for name, parts in sorted(missing.items()))


@pytest.mark.parametrize("module", LOSSES)
def test_every_loss_has_formula_unit_and_paper(module):
    found = import_module(module)
    functions = {name: getattr(found, name) for name in found.__all__ if inspect.isfunction(getattr(found, name))}
    missing = {name: faults(function, loss=name.endswith("_loss")) for name, function in functions.items()}
    missing = {name: parts for name, parts in missing.items() if parts}
    assert not missing, "\n".join(f"{name}: {', '.join(parts)}" for name, parts in sorted(missing.items()))
    papers = inspect.getdoc(found) + "".join(inspect.getdoc(function) for function in functions.values())
    assert PAPER.search(papers), f"{module} names no paper"


def test_the_check_finds_what_is_missing():
    def bare(log_ratio: Tensor, beta: float) -> Tensor:
        """Something."""
        if beta < 0:
            raise ValueError("no")
        return log_ratio

    everything = ["parameter log_ratio", "parameter beta", "shapes", "error ValueError", "formula", "unit"]
    assert faults(bare, loss=True) == everything
    bare.__doc__ = """−beta·log_ratio, `[B]`, in nats.

    Raises:
        ValueError: beta below 0.
    """
    assert faults(bare, loss=True) == []
