"""Fixtures that every kind of test may use: above all the lab of real ssh hosts."""

from __future__ import annotations

import os
import re
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.lab import rootfs
from tests.lab.hosts import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

# Started in the background by a shell without job control, Python ignores SIGINT, and so would every command that the
# tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

WHEELHOUSE = "/opt/wheelhouse"  # where every host of ``lab`` has it
_REQUIREMENTS = Path(__file__).parent.parent / "requirements"


LAB = re.compile("tests/(lab/|cloud/test_(bridge|end_to_end))")
"""Tests of lab hosts: one lab for all of them, and no second one beside it."""


class ByPlace(LoadScopeScheduling):  # type: ignore[misc]  # xdist is not typed for strictness
    """Tests that must not run beside their like: the lab's, and the harness', which holds the processor's lock."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if LAB.match(file):
            return "lab"
        return "harness" if file.startswith("tests/unit/harness/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByPlace:
    """How `make test` shares tests out among its two processes."""
    return ByPlace(config, log)


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
