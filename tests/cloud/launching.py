"""What tests of `up` share: campaigns that differ in their cloud section, and looking at what came of it."""

import threading
import time
from collections.abc import Callable
from typing import Any, Self

import botocore.config
import pytest
import yaml

from fleet.cloud import access, arrivals, aws, down, launch, leases
from fleet.session import Session
from tests.cloud.cloud import Cloud
from tests.cloud.conftest import CAMPAIGN

HOSTS = ("g5-1", "g5-2", "g5-3")
PATIENCE_S = 60.0


def text(*, without: tuple[str, ...] = (), **cloud: Any) -> str:
    """CAMPAIGN with other values in its cloud section, and some taken out."""
    data = yaml.safe_load(CAMPAIGN)
    data["cloud"].update(cloud)
    for key in without:
        del data["cloud"][key]
    return yaml.safe_dump(data)


def entry(**values: Any) -> list[dict[str, Any]]:
    """cloud.instances of one entry, of three g5.xlarge."""
    return [{"name": "g5", "count": 3, "types": ["g5.xlarge"], **values}]


def launched(session: Session) -> dict[str, str]:
    """Host to the id of its instance, by the ledger."""
    return {host: leased.id for host, (_, leased) in leases.live(leases.read(session)).items()}


def running(cloud: Cloud) -> list[str]:
    """Ids of instances with our tags that are not terminated."""
    return sorted(cloud.standing()["instances"])


def nothing(cloud: Cloud) -> bool:
    """Whether nothing at all is left at AWS."""
    return not any(cloud.counts().values())


def places(session: Session) -> list[str]:
    """Type, market and zone of each host's instance, in the order of hosts."""
    found = leases.live(leases.read(session))
    return [f"{lease.type} {lease.market} {lease.zone}" for _, (lease, _) in sorted(found.items())]


def until(true: Callable[[], Any]) -> Any:
    """Wait for something to become true, and return it."""
    last = time.monotonic() + PATIENCE_S
    while not (found := true()):
        assert time.monotonic() < last, "it never came"
        time.sleep(0.02)
    return found


class Beside:
    """Something that runs in a thread; leaving the block joins it and raises what it raised."""

    def __init__(self, does: Callable[[], Any]) -> None:
        self._does = does
        self._thread = threading.Thread(target=self._run)
        self._error: BaseException | None = None
        self.came: Any = None

    def _run(self) -> None:
        try:
            self.came = self._does()
        except BaseException as error:  # noqa: BLE001 - raised where it is joined
            self._error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting takes hundredths of seconds, and calls are tried three times."""
    hasten(monkeypatch)


def hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `quick` does, for as long as the patch lasts."""
    for module, name in (
        (launch, "WAIT_S"), (launch, "LOOK_S"), (arrivals, "PAUSE_S"), (access, "LOOK_S"), (down, "PACE_S"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, 0.02)
    for module, name in (
        (launch, "WAIT_AT_MOST_S"), (launch, "LOOK_AT_MOST_S"), (arrivals, "PAUSE_AT_MOST_S"), (down, "SLOWEST_S"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, 0.2)
    for name, seconds in (("UNSEEN_S", 1.0), ("LOOK_S", 0.5), ("BOUND_S", 30.0)):
        monkeypatch.setattr(down, name, seconds)
    tries = {"mode": "standard", "total_max_attempts": 3}
    monkeypatch.setattr(aws, "_CONFIG", aws._CONFIG.merge(botocore.config.Config(retries=tries)))
