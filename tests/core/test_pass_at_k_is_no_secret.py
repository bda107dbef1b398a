"""`require: {pass@1: improved}` is a metric and a direction, neither a password."""

import pytest

from fdiv.secrets import is_secret_name, without_secrets


@pytest.mark.parametrize("name", ["pass@1", "pass^4", "g_pass@8", "own/pass@64"])
def test_metrics_of_pass_at_k_are_kept(name):
    assert not is_secret_name(name)
    require = {name: "improved", "score": "improved"}
    assert without_secrets({"require": require}) == {"require": require}
