"""Fixtures of several unit tests."""

import pytest

from fleet import poll
from tests.unit.polling import Asked, asker


@pytest.fixture
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is a hundredth of one, as far as the poll asks hosts; what hosts do takes as long as they say."""
    for name, value in {"USUAL_S": 0.01, "SETTLED_USUAL_S": 0.05, "ROUND_S": 0.02, "HOSTS_A_SECOND": 1000}.items():
        monkeypatch.setattr(poll, name, value)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Polls the hosts behind the connections given, each with the unit HOST.u unless `units` says otherwise."""
    return asker(monkeypatch)
