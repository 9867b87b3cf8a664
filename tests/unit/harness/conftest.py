"""Fixtures of the harness's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.harness import hosting


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A work folder with real supervisors."""
    with hosting.host(tmp_path, monkeypatch) as folder:
        yield folder
