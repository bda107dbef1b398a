"""Secrets stay out of records: what a recipe or a command line gives away is redacted by value, everywhere."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["REDACTED", "is_secret_name", "is_setting", "learn", "redacted", "without_secrets"]

REDACTED = "REDACTED"
_NAME = re.compile(
    r"(^|[_.-])(secret|password|passwd|passphrase|pass|credentials?|bearer|dsn|(api|access|private|secret|auth|ssh)_?key"
    r"|(?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)(?<!stop_)(?<!image_)"
    r"(?<!(?<![a-z])end_)token|auth)$",  # not `backend_token`
    re.IGNORECASE,
)
_NAME_IN_ENV = re.compile(r"TOKEN|KEY|SECRET|PASS|AUTH|CRED|DSN|UR[IL]$", re.IGNORECASE)
_COMMON = {"true", "false", "null", "none", "auto", "default"}
_FORMS = (
    (re.compile(r'(\w+://)[^\s/@"]+@'), rf"\1{REDACTED}@"),  # postgres://user:password@host
    (re.compile(r"\b(hf_|gh[pousr]_|sk-|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}"), REDACTED),  # tokens of known services
)
_known: set[str] = set()


def is_secret_name(name: str) -> bool:
    """Whether a key's name says that its value is a secret: `hub_token`, `password`, `api_key`; not `pad_token`."""
    return bool(_NAME.search(name))


def is_setting(value: Any) -> bool:
    """Whether the value of an environment variable can be no secret: a switch or a small number."""
    return str(value).lower() in _COMMON or bool(re.fullmatch(r"-?[\d.]{0,5}", str(value)))


def learn(values: Any) -> None:
    """Remember the secrets in the values of a recipe, `env:` included, for `redacted`."""
    _known.update(_secrets(values, ""))


def _secrets(values: Any, name: str, in_env: bool = False) -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _secrets(value, str(key), in_env or (name == "" and key == "env"))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _secrets(value, name, in_env)
    elif isinstance(values, (str, int)) and not is_setting(values) and len(str(values)) >= 4:
        if is_secret_name(name) or (in_env and _NAME_IN_ENV.search(name)):
            yield str(values)


def redacted(text: str) -> str:
    """The text without learned secrets, credentials of connection strings, and tokens of known services."""
    for secret in sorted(_known, key=len, reverse=True):
        for form in {secret, json.dumps(secret)[1:-1], html.escape(secret), secret.replace("'", "''")}:
            text = text.replace(form, REDACTED)
    for pattern, replacement in _FORMS:
        text = pattern.sub(replacement, text)
    return text


def without_secrets(value: Any) -> Any:
    """A nested value without the entries whose key says that they are secret, and with other secrets replaced."""
    if isinstance(value, dict):
        kept = {key: entry for key, entry in value.items() if not _is_secret(str(key), entry)}
        return {key: without_secrets(entry) for key, entry in kept.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(without_secrets(entry) for entry in value)
    return redacted(value) if isinstance(value, str) else value


def _is_secret(name: str, value: Any) -> bool:
    return isinstance(value, (str, int)) and is_secret_name(name) and not is_setting(value)
