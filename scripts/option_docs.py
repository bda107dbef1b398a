"""For the reference: an option of a config (`fdiv.training.config.option`) shows its default, its help and its bounds.

A griffe extension, loaded by scripts/build_docs.py; without it the signature would show the calls that declare them.
"""

from __future__ import annotations

import ast
from typing import Any

import griffe

_DECLARED = ("option", "divergence_option", "retain_option")
_BOUNDS = {"above": "above", "least": "at least", "most": "at most", "below": "below", "choices": "one of"}


class OptionDocs(griffe.Extension):
    """Gives an attribute that an option declares the option's default and help."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        """Runs for every attribute, before the signatures of dataclasses are made from them."""
        call = getattr(node, "value", None)
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            return
        if call.func.id in _DECLARED and call.args:
            words = [_text(call.args[1])] if len(call.args) > 1 else []
            bounds = [(_BOUNDS[k.arg], ast.unparse(k.value)) for k in call.keywords if k.arg in _BOUNDS]
            words += [f"({', '.join(f'{text} {value}' for text, value in bounds)})"] if bounds else []
            attr.value = ast.unparse(call.args[0])
        elif call.func.id == "field":
            found = {keyword.arg: keyword.value for keyword in call.keywords}.get("metadata")
            keys = [ast.literal_eval(key) for key in found.keys] if isinstance(found, ast.Dict) else []
            words = [_text(found.values[keys.index("help")])] if "help" in keys else []
        else:
            return
        if words and attr.docstring is None:
            attr.docstring = griffe.Docstring(" ".join(filter(None, words)), parent=attr, lineno=node.lineno)


def _text(node: ast.expr) -> str:
    """The text of a literal; nothing for a name or a format, which are known at run time only."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
