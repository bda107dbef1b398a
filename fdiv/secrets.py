"""Secrets stay out of records: what a recipe, a command line or the environment gives away is redacted everywhere.

A secret is known by the name of its key (`hub_token`, `apiKey`, `DB_PASSWORD`), by its form (a token of a known
service, the password in a URL, a private key), and from then on by its value, wherever that turns up: in records,
reports, model cards, logs and error lines.
"""

from __future__ import annotations

import html
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

__all__ = [
    "REDACTED",
    "is_secret_name",
    "is_setting",
    "learn",
    "learn_environment",
    "learn_words",
    "redacted",
    "without_secrets",
]

REDACTED = "REDACTED"

# ---------------------------------------------------------------- names
_ENDS = ("password", "passwd", "passphrase", "passcode", "pwd", "secret")  # of a word: `pgpassword`
_ANYWHERE = {
    *_ENDS,
    *"secrets credential credentials creds authorization bearer cookie cookies dsn".split(),
    *"apikey accesskey privatekey".split(),
}
_KEYS = set(
    "api access private secret auth ssh account encryption signing deploy master client service shared license wandb "
    "openai storage".split()
)
_AT_THE_END = ("token", "auth", "pass", "pgpass", "pat", "jwt")
#: Words before `token` that make it a token of text.
_OF_TEXT = set(
    "pad eos bos unk sep cls mask stop start end image audio video special begin beginning new next last first per by "
    "prefix suffix middle think thinking sub each every one boi eoi bot eot fim tool boundary separator forward "
    "backward fill of level assistant".split()
)
#: Last words of what is about a secret and none itself.
_ABOUT = ("name", "names", "file", "files", "path", "dir", "folder", "env", "type", "policy", "length")
_TEXT_WORDS = ("subtoken", "pretoken", "detoken", "nontoken")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def is_secret_name(name: str) -> bool:
    """Whether a key's name says that its value is a secret: `hub_token`, `dbPassword`, `api_key`; not `pad_token`."""
    return _is_strong(name) or _is_weak(name)


def _words(name: str) -> list[str]:
    """The words of a name in lower case, a number at its end left out."""
    words = [word.lower() for word in _WORD.findall(name)]
    while words and words[-1].isdigit():
        words.pop()
    return words


def _is_strong(name: str) -> bool:
    """Whether a name can mean nothing else."""
    words = _words(name)
    if not words or words[-1] in _ABOUT:
        return False
    before, last = words[-2] if len(words) > 1 else "", words[-1]
    if any(word in _ANYWHERE or (len(word) > 5 and word.endswith(_ENDS)) for word in words):
        return True
    return (last == "key" and before in _KEYS) or (last == "string" and before == "connection")


def _is_weak(name: str) -> bool:
    """Whether a name may also mean text (`token`) or a number (`pass`): the value decides."""
    words = _words(name)
    if not words or (len(words) > 1 and words[-2] in _OF_TEXT) or _PASS_AT_K.search(name):
        return False
    return words[-1] in _AT_THE_END or (words[-1].endswith("token") and words[-1] not in _TEXT_WORDS)


_PASS_AT_K = re.compile(r"pass[@^]\w+$")  # the metric
_OTHER_VALUE = re.compile(r"<.*>|\[.*\]|\W*|[-+]?[\d.]+(?:[eE][-+]?\d+)?%?", re.DOTALL)  # `<pad>`, a number


_NAME_IN_ENV = re.compile(r"TOKEN|KEY|SECRET|PASS|AUTH|CRED|DSN|COOKIE|UR[IL]$", re.IGNORECASE)
_COMMON = {"true", "false", "null", "none", "auto", "default", "", "improved", "increased", "decreased"}


def is_setting(value: Any) -> bool:
    """Whether the value of an environment variable can be no secret: a switch or a small number."""
    return str(value).lower() in _COMMON or bool(re.fullmatch(r"-?[\d.]{0,5}", str(value)))


def _is_secret(name: str, value: Any) -> bool:
    """Whether a key with this name and value is withheld."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or str(value).lower() in _COMMON:
        return False
    return _is_strong(name) or (_is_weak(name) and not _OTHER_VALUE.fullmatch(str(value)))


# ---------------------------------------------------------------- forms
_URL = re.compile(
    r"(\w+://)(?!git@)[^\s/@:\"'<>]*(?::(?!\d+(?:/|\s|$))[^\s\"'<>]*)?@"
)  # user:password@, not host:80/a@b
_ASSIGNED = re.compile(r"(?<![\w.-])(--)?([A-Za-z][\w.-]*)(=)([\"']?)([^\s&;,\"')}\]]+)")  # password=…, ?token=…
_QUOTED = re.compile(r"(\"([A-Za-z][\w.-]*)\"\s*:\s*)\"((?:[^\"\\]|\\.)*)\"")  # "password": "…"
_FORMS = (
    re.compile(r"\bhf_(?=[A-Za-z]*[A-Z0-9])[A-Za-z0-9]{12,}"),
    re.compile(
        r"\b(?:api_org_|npm_|dop_v1_|pypi-|glpat-|gh[opusr]_|github_pat_|xox[abeoprs]-|xapp-)[A-Za-z0-9_-]{12,}"
    ),
    re.compile(r"\b(?:sk-|[srp]k_(?:live|test)_)(?=[\w-]*\d)[A-Za-z0-9_-]{12,}"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b|\bAIza[A-Za-z0-9_-]{24,}|\bya29\.[A-Za-z0-9_-]{12,}"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]+)?"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"),
)
_BEARER = re.compile(r"(\bbearer\s+)(?=[\w.~+/=-]*\d)[\w.~+/=-]{8,}", re.IGNORECASE)
_HEADER = re.compile(
    r"(\b(?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?(?:basic\s+|bearer\s+|token\s+)?)[^\s\"',}]+", re.I
)


def _assigned(found: re.Match[str]) -> str:
    flag, name, equals, quote, value = found.groups()
    secret = _is_secret(name, value) and not is_setting(value)
    return f"{flag or ''}{name}{equals}{quote}{REDACTED}" if secret else found[0]


def _quoted(found: re.Match[str]) -> str:
    secret = _is_strong(found[2]) and not is_setting(found[3])  # a weak one may be text: `"token": "Paris"`
    return f'{found[1]}"{REDACTED}"' if secret else found[0]


def _without_forms(text: str) -> str:
    """Credentials of connection strings, tokens of known services, private keys, `password=…`."""
    for pattern in _FORMS:
        text = pattern.sub(REDACTED, text)
    for pattern in (_URL, _BEARER, _HEADER):
        text = pattern.sub(rf"\1{REDACTED}{'@' if pattern is _URL else ''}", text)
    return _QUOTED.sub(_quoted, _ASSIGNED.sub(_assigned, text))


# ---------------------------------------------------------------- values
_known: set[str] = set()


def learn(values: Any) -> None:
    """Remember the secrets in the values of a recipe, `env:` included, for `redacted`."""
    for secret in _secrets(values, ""):
        _remember(secret)


def learn_environment(variables: Mapping[str, str]) -> None:
    """Remember the secrets in environment variables, by their names."""
    for name, value in variables.items():
        if _is_secret(name, value) and not os.path.exists(value):
            _remember(value)


def learn_words(words: Sequence[str], parse: Callable[[str], Any]) -> None:
    """Remember the secrets of a command line: `--hub_token X`, `--env.NAME=X`, `--reward '{name: r, api_key: X}'`.

    `parse` reads a value that is written as YAML.
    """
    flag = ""
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            flag = name[2:].replace("-", "_")
        if not word.startswith("--") or equals:
            given = value if word.startswith("--") else word
            parsed = parse(given) if given.lstrip().startswith(("{", "[")) else given
            in_env = flag == "env" or flag.startswith("env.")
            for secret in _secrets(parsed, flag.rpartition(".")[2], in_env):
                _remember(secret)


def _remember(secret: str) -> None:
    """A word that may stand in any text (`test`, `1234`) is withheld where it stands as a secret, not everywhere."""
    if len(secret) >= 8 or (len(secret) >= 5 and not secret.isalpha() and not secret.isdigit()):
        _known.add(secret)


def _secrets(values: Any, name: str, in_env: bool = False) -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _secrets(value, str(key), in_env or (name == "" and key == "env"))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _secrets(value, name, in_env)
    elif isinstance(values, (str, int)) and not is_setting(values):
        if _is_secret(name, values) or (in_env and _NAME_IN_ENV.search(name)):
            yield str(values)
        if isinstance(values, str) and "://" in values and "@" in values:
            yield from _password(values)


def _password(url: str) -> Iterator[str]:
    """The password of `scheme://user:password@host`, as written and decoded; it may hold any character."""
    credentials = url.partition("://")[2].rpartition("@")[0]
    _, colon, password = credentials.partition(":")
    if colon and not re.match(r"\d+/", password):
        yield password
        yield urllib.parse.unquote(password)


def redacted(text: str) -> str:
    """The text without learned secrets, credentials of connection strings, and tokens of known services."""
    for secret in sorted(_known, key=len, reverse=True):
        if secret.isdigit():  # not a part of a longer number
            text = re.sub(rf"(?<![\d.]){secret}(?![\d.])", REDACTED, text)
            continue
        for form in _written(secret):
            text = text.replace(form, REDACTED)
        if "\n" in secret:  # YAML folds lines
            text = re.sub(r"\s+".join(map(re.escape, secret.split())), REDACTED, text)
    return _without_forms(text)


_NOTATIONS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: repr(text)[1:-1],
    lambda text: text.replace("'", "''"),  # YAML, SQL
    lambda text: text.replace("'", "'\"'\"'"),  # a shell
    html.escape,
    lambda text: html.escape(text, quote=False),
    urllib.parse.quote,
    lambda text: urllib.parse.quote(text, safe=""),
)


@cache
def _written(secret: str) -> tuple[str, ...]:
    """The secret in every notation, and in one inside another (a dictionary's text in JSON), longest first."""
    forms = {outer(inner(secret)) for inner in _NOTATIONS for outer in _NOTATIONS}
    return tuple(sorted(forms, key=len, reverse=True))


def without_secrets(value: Any) -> Any:
    """A nested value without the entries whose key says that they are secret, and with other secrets replaced."""
    if isinstance(value, dict):
        kept = {key: entry for key, entry in value.items() if not _is_secret(str(key), entry)}
        return {key: without_secrets(entry) for key, entry in kept.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(without_secrets(entry) for entry in value)
    return redacted(value) if type(value) is str else value  # an enumeration stays one
