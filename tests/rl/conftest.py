"""What the tests of the rewards share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def bubblewrap() -> None:
    """Skips, with the reason, where programs cannot be run in bubblewrap."""
    from fdiv.errors import SandboxError
    from fdiv.rl.rewards.sandbox import check_sandbox

    try:
        check_sandbox("bubblewrap")
    except SandboxError as error:
        pytest.skip(str(error))
