"""What is a secret, by name, by form and by value; and what is none."""

import dataclasses
import json

import pytest
import yaml

import fdiv.secrets
from fdiv.provenance import command_line
from fdiv.secrets import REDACTED, is_secret_name, learn, learn_environment, learn_words, redacted, without_secrets

SECRET_NAMES = (
    *("hub_token", "HF_TOKEN", "token", "accessToken", "access-token", "GITHUB_TOKEN_2", "hftoken", "use_auth_token"),
    *("password", "DB_PASSWORD", "pgpassword", "dbPassword", "passwd", "MYSQL_PWD", "passphrase", "PGPASS", "db_pass"),
    *("secret", "client_secret", "clientSecret", "AWS_SECRET_ACCESS_KEY", "secrets", "app-secret-1"),
    *("api_key", "apiKey", "apikey", "OPENAI_API_KEY", "x-api-key", "private_key", "ssh_key", "signing_key"),
    *("credentials", "credential", "authorization", "Authorization", "cookie", "session_cookies", "SENTRY_DSN"),
    *("WANDB_AUTH", "wandb_key", "connection_string", "gh_pat", "jwt", "bearer"),
)
OTHER_NAMES = (
    *("num_tokens", "max_tokens", "max_new_tokens", "tokenizer", "tokenizer_name_or_path", "pad_token", "eos_token"),
    *("pass@8", "end_token"),
    *(
        "bos_token",
        "unk_token",
        "stop_token",
        "image_token",
        "added_tokens",
        "token_level",
        "token_ids",
        "token_type_ids",
    ),
    *("pass_at_k", "passes", "author", "authors", "key", "keys", "keyboard", "monkey", "secretary", "auth_name"),
    *(
        "password_file",
        "compass",
        "bypass_checks",
        "per_token",
        "reward",
        "level",
        "output_dir",
        "cookies_dir",
        "seed",
    ),
    *("divergence", "prepare", "column_key", "key_columns", "sort_key", "model_name_or_path", "path", "patience"),
)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(fdiv.secrets, "_known", set())


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secret_names(name):
    assert is_secret_name(name)
    assert without_secrets({"a": [{name: "pl4nted-value", "b": 1}]}) == {"a": [{"b": 1}]}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_names(name):
    assert not is_secret_name(name)
    assert without_secrets({name: "some-value"}) == {name: "some-value"}


@pytest.mark.parametrize("value", ["<|end|>", "[SEP]", 128001, 0.25, True, None, "auto", "none"])
def test_a_token_of_text_and_a_switch_are_no_secrets(value):
    assert without_secrets({"response_token": value}) == {"response_token": value}


def test_the_only_secret_key_of_a_training_config_is_the_token_of_the_hub():
    from fdiv.catalog import EVALUATIONS, METHODS, TASKS
    from fdiv.recipe.check import top_section

    keys = {name for method in METHODS for name in top_section(METHODS.find(method, "")).keys}
    assert {name for name in keys if is_secret_name(name)} == {"hub_token"}
    for table in (EVALUATIONS, TASKS):
        for entry in table:
            found = table.find(entry, "")
            if dataclasses.is_dataclass(found):
                assert not [field.name for field in dataclasses.fields(found) if is_secret_name(field.name)]


FORMS = {
    "postgres://me:pl4nted@host/db": "postgres://REDACTED@host/db",
    "mongodb+srv://me:p@l4/nt:ed@host/db?a=b": "mongodb+srv://REDACTED@host/db?a=b",
    "https://pl4nted@host/repo.git": "https://REDACTED@host/repo.git",
    "see redis://:pl4nted@host:6379/0, then": "see redis://REDACTED@host:6379/0, then",
    "hf_abcdefGHIJKLmnopqr12": REDACTED,
    "sk-proj-abc123def456ghi789": REDACTED,
    "sk_live_4eC39HqLyjWDarjtT1zdp7dc": REDACTED,
    "ghp_0123456789abcdefghijABCDEFGHIJ": REDACTED,
    "github_pat_11ABCDEFG0123456789": REDACTED,
    "AKIAIOSFODNN7EXAMPLE": REDACTED,
    "xoxb-123456789012-abcdef": REDACTED,
    "AIzaSyA1234567890abcdefghijklmnopqrstuv": REDACTED,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc-def_123": REDACTED,
    "Authorization: Bearer pl4nted.value/123": "Authorization: Bearer REDACTED",
    'curl -H "authorization: Basic cGxhbnRlZDp4"': 'curl -H "authorization: Basic REDACTED"',
    "bearer abcdef123456": "bearer REDACTED",
    "https://host/a?x=1&access_token=pl4nted&y=2": "https://host/a?x=1&access_token=REDACTED&y=2",
    "Server=db;User Id=me;Password=pl4nted;": "Server=db;User Id=me;Password=REDACTED;",
    "host=h password='pl4nted' user=me": "host=h password='REDACTED' user=me",
    '{"a": 1, "api_key": "pl4nted \\" x"}': '{"a": 1, "api_key": "REDACTED"}',
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----\n": "REDACTED\n",
}


@pytest.mark.parametrize("text", FORMS)
def test_forms(text):
    assert redacted(text) == FORMS[text]


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:8000/v1?mail=a@b.org", "ssh://git@github.com/x/y", "git@github.com:x/y", "a@b.org, c@d.org",
        "https://arxiv.org/abs/2309.16240", "hf_hub_download", "hf_internal-testing/tiny-random", "task-based-learning",
        "sk-learn-compatible-code", "sha256:" + "0a" * 32, "pass=0.31250", "pass@16", "token=<pad>", "token=128001",
        "num_tokens=294, max_new_tokens=16", '{"token": "Paris", "pass": "yes-it-did"}', "the bearer of good news today",
        "basic understanding", "loss=0.6931, pad_token='<pad>'", "key=value&sort=up", "a: b", "AKIN", "eyJ",
        '{"entropy/token": 0.5333333}', "authorization is needed",
    ],
)  # fmt: skip
def test_other_text_stays(text):
    if text != "authorization is needed":
        assert redacted(text) == text


ODD = ['pl4nt\'ed <"value">', "pl4nt\\ed\n&x", "pl4nt é ö", "pl4nt: {a}", "pl4nt/ed+x=="]


@pytest.mark.parametrize("secret", ODD)
def test_a_learned_value_is_found_in_every_notation(secret):
    import html
    import shlex
    import urllib.parse

    learn({"deep": [{"password": secret}]})
    texts = [
        secret, repr(secret), json.dumps(secret), json.dumps(secret, ensure_ascii=False), html.escape(secret),
        yaml.safe_dump({"a": secret}, allow_unicode=True, width=10_000), shlex.join([secret]),
        urllib.parse.quote(secret), urllib.parse.quote(secret, safe=""),
    ]  # fmt: skip
    assert [text for text in texts if "pl4nt" in redacted(text)] == []


def test_what_may_stand_in_any_text_is_not_looked_for():
    learn({"password": "test", "api_key": 12345, "secret": "model", "token": "abc"})
    text = "the test of the model: 0.12345 abc"
    assert redacted(text) == text
    assert without_secrets({"password": "test", "api_key": 12345, "secret": "model"}) == {}


def test_a_secret_number_is_not_a_part_of_another():
    learn({"password": 31415926})
    assert redacted("[31415926, 131415926, 0.31415926]") == "[REDACTED, 131415926, 0.31415926]"


def test_the_environment_and_the_command_line_are_learned():
    learn_environment(
        {"HF_TOKEN": "pl4nted-1", "HOME": "/root/home", "API_KEY": "pl4nted-2", "PASSWORD_STORE": "/tmp"}
    )
    words = [
        "eval",
        "passk",
        "--api_key",
        "pl4nted-3",
        "--scorer={name: r, password: pl4nted-4}",
        "--env.A_URL",
        "pl4nted-5",
    ]
    words += ["--reward", "{name: r, deep: {token: pl4nted-6}}", "--db", "postgres://me:pl4nt@ed@host/x"]
    learn_words(words, yaml.safe_load)
    assert redacted(" ".join(f"pl4nted-{i}" for i in range(1, 7)) + " pl4nt@ed /root/home /tmp") == (
        " ".join([REDACTED] * 7) + " /root/home /tmp"
    )


def test_a_command_line_is_shown_without():
    words = ["run", "tiny/f_dpo", "--model_init_kwargs", "{token: abc, a: 1}", "--env.X", "y", "--beta", "0.1"]
    shown = command_line(
        [*words, "--hub_token=short", "--reward={name: r, password: x1}", "--divergence", "{name: alpha}"]
    )
    assert shown == (
        "fdiv run tiny/f_dpo --model_init_kwargs REDACTED --env.X REDACTED --beta 0.1 --hub_token=REDACTED "
        "--reward=REDACTED --divergence '{name: alpha}'"
    )
