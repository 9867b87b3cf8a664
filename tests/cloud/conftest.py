"""AWS for tests: `cloud` is an empty account at the other end of boto3."""

from collections.abc import Callable, Iterator
from pathlib import Path

import botocore.loaders
import botocore.session
import pytest

from fleet import campaign as campaigns
from fleet import session as sessions
from fleet.campaign import Campaign
from fleet.cloud import aws
from fleet.session import Session
from tests.cloud.cloud import Cloud, Server

CAMPAIGN = """\
submitter: ExampleLab
benchmarks: [{name: tiny-bert, backend: "null", scenarios: [Offline]}]
cloud:
  max_cost: 100
  ssh_from: 203.0.113.7/32
  address: private
  instances:
    - {name: g5, count: 3, types: [g5.xlarge]}
"""
"""Three instances on demand."""


@pytest.fixture(scope="session")
def aws_server() -> Iterator[str]:
    """Its address; one process for all tests."""
    with Server() as server:
        yield server.url


_MODELS = botocore.loaders.Loader()
"""botocore's descriptions of services, read once: each test makes clients anew, and EC2's is megabytes."""


@pytest.fixture
def cloud(aws_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """An empty account that boto3 in this process uses; homes and state are below tmp_path."""
    monkeypatch.setattr(botocore.session, "create_loader", lambda _=None: _MODELS)
    made = Cloud(aws_server)
    made.reset()
    clear(monkeypatch)
    for name, value in made.environment().items():
        monkeypatch.setenv(name, value)
    for name, folder in homes(tmp_path).items():
        monkeypatch.setenv(name, folder)
    aws.client.cache_clear()
    aws._session.cache_clear()
    yield made
    aws.client.cache_clear()
    aws._session.cache_clear()


def clear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of whoever runs the tests."""
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)


def homes(folder: Path) -> dict[str, str]:
    """HOME and what XDG has in it."""
    found = {"HOME": "home", "XDG_STATE_HOME": "state", "XDG_CACHE_HOME": "cache", "XDG_CONFIG_HOME": "config"}
    for name in found.values():
        (folder / name).mkdir(exist_ok=True)
    return {key: str(folder / name) for key, name in found.items()}


MakeSession = Callable[..., tuple[Session, Campaign]]


@pytest.fixture
def make_session(tmp_path: Path) -> MakeSession:
    """A new session in tmp_path, of a campaign's text; `name` and `sessions` folder are settled by arguments."""

    def make(text: str = CAMPAIGN, name: str = "s1") -> tuple[Session, Campaign]:
        campaign = campaigns.load_text(text, "fleet.yml")
        return sessions.create(tmp_path / "sessions", text, name=name), campaign

    return make
