"""Fixtures that every kind of test may use: above all the lab of real ssh hosts."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from tests.lab import rootfs
from tests.lab.hosts import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

# Started in the background by a shell without job control, Python ignores SIGINT, and so would every command that the
# tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

WHEELHOUSE = "/opt/wheelhouse"  # where every host of ``lab`` has it
_REQUIREMENTS = Path(__file__).parent.parent / "requirements"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What must not run beside its like: lab hosts are many processes, and the harness holds the processor's lock."""
    for item in items:
        place = Path(item.location[0])
        if "lab" in item.keywords:
            group = "lab"
        elif place.is_relative_to("tests/unit/harness"):
            group = "harness"
        else:
            group = str(place)
        item.add_marker(pytest.mark.xdist_group(group))


class MakeLab(Protocol):
    """Starts a lab of its own for one test: the arguments are those of Lab."""

    def __call__(self, count: int = 3, **options: Any) -> Lab: ...


@pytest.fixture(scope="session")
def lab_possible() -> None:
    """Skip where the lab cannot run; in CI that is a failure, for there it must run."""
    if reason := rootfs.missing():
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def wheelhouse() -> Path:
    """A directory with the wheels that the harness needs on a host; downloaded once, about 240 MB."""
    files = [_REQUIREMENTS / "harness.txt", _REQUIREMENTS / "backend-pytorch.txt"]
    return rootfs.wheelhouse(file for file in files if file.exists())


@pytest.fixture(scope="session")
def lab(lab_possible: None, wheelhouse: Path) -> Iterator[Lab]:  # noqa: ARG001 - it skips
    """Three hosts, h01 to h03, for all tests; what a test does to them is undone after it."""
    with Lab(3, mounts={wheelhouse: WHEELHOUSE}) as started:
        yield started


@pytest.fixture(autouse=True)
def _healed_lab(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "lab" in request.fixturenames:
        request.getfixturevalue("lab").heal()


@pytest.fixture
def make_lab(lab_possible: None) -> Iterator[MakeLab]:  # noqa: ARG001 - it skips
    """A factory for tests that need a lab of their own; all are taken down after the test."""
    with ExitStack() as labs:

        def make(count: int = 3, **options: Any) -> Lab:
            return labs.enter_context(Lab(count, **options))

        yield make
