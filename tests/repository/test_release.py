"""What a release needs beside the code: licences of the dependencies, community files."""

from __future__ import annotations

import importlib.util
import re

import pytest
import yaml


@pytest.fixture(scope="module")
def licences(repository):
    spec = importlib.util.spec_from_file_location("licences", repository / "scripts" / "licences.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_pinned_package_is_listed_with_its_version(licences, repository):
    text = (repository / "docs" / "licences.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| ([A-Za-z0-9._-]+) \| (\S+) \|", text, re.MULTILINE))
    assert listed.pop("package") == "version"
    assert listed == licences.pinned(), "run `make licences`"


def test_what_a_package_states(licences):
    assert licences.licence("pyyaml") == "MIT License"
    assert licences.licence("no-such-package") == "not installed here"


def test_issue_templates_are_forms(repository):
    for path in (repository / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.stem != "config":
            assert {"name", "description", "body"} <= form.keys(), path.name
            ids = [field["id"] for field in form["body"]]
            assert len(set(ids)) == len(ids) and any(f.get("validations", {}).get("required") for f in form["body"])
