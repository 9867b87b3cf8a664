"""Files on their way home from real hosts: while the run goes on, again when they are lost, and after a break."""

import hashlib
import io
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fleet.inventory import reach
from fleet.inventory.hosts import Host
from fleet.terms import HostKind
from tests.lab.hosts import Lab
from tests.lab.outing import NULL, Fleet, rows, said

pytestmark = pytest.mark.lab
HOSTS = ("h01", "h02", "h03")
FIRST, SECOND = "tiny-bert.Offline.accuracy", "tiny-bert.Offline.performance"


@dataclass(frozen=True)
class Ran:
    """A run of two units a host, and what was seen of it."""

    fleet: Fleet
    early: frozenset[str]
    """Hosts whose first unit was home, whole, while their second one ran."""
    collected: dict[str, Any]
    """collect/collected.json when the run had ended, before any `fleet collect`."""


@pytest.fixture(scope="module")
def ran(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """`fleet provision` and `fleet run` of units that compute nothing, the second of a host long enough to be seen."""
    folder = tmp_path_factory.mktemp("ran")
    fleet = Fleet(lab, folder, benchmarks=NULL, run={"quick_seconds": 3, "lost_after_s": 20})
    done = fleet("provision", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    early: set[str] = set()
    with (folder / "said").open("w+", encoding="utf-8") as stream:
        process = fleet.start("run", "--quick", stdout=stream, stderr=stream)
        while process.poll() is None:
            early |= {name for name in HOSTS if is_home(fleet, f"{name}.{FIRST}") and runs(fleet, f"{name}.{SECOND}")}
            time.sleep(0.1)
        stream.seek(0)
        assert process.returncode == 0, stream.read()
    rows(fleet, ["done"] * 6)
    return Ran(fleet, frozenset(early), fleet.read("collect", "collected.json")["units"])


def is_home(fleet: Fleet, unit: str) -> bool:
    path = fleet.session / "collect" / "collected.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["units"].get(unit, {}).get("complete", False)


def runs(fleet: Fleet, unit: str) -> bool:
    return bool(fleet.read("run", "units", f"{unit}.json")["state"] == "running")


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, without what later files made room for."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] != ".earlier"
    }


def test_units_come_home_while_their_host_works_on_the_next(ran: Ran) -> None:
    assert ran.early == set(HOSTS)


def test_after_a_run_everything_is_home_and_nothing_is_left_over(ran: Ran) -> None:
    units = [f"{name}.{unit}" for name in HOSTS for unit in (FIRST, SECOND)]
    assert {unit: ran.collected[unit]["complete"] for unit in ran.collected} == dict.fromkeys(units, True)
    assert list((ran.fleet.session / "collect" / ".incoming").iterdir()) == []
    for name in HOSTS:
        assert ran.fleet.lab[name].sh("ls -A /home/bench/.mlperf-fleet/tmp") == ""
        assert contents(ran.fleet.session / "collect" / name)


def test_files_that_are_home_need_no_host(ran: Ran) -> None:
    for name in HOSTS:
        ran.fleet.lab[name].link(up=False)
    done = ran.fleet("collect", timeout=20)
    assert done.returncode == 0
    said(done, "6 of 6 units home and verified")


def test_files_that_were_lost_here_are_fetched_again(ran: Ran) -> None:
    collect = ran.fleet.session / "collect"
    before = contents(collect)
    shutil.rmtree(collect)
    done = ran.fleet("collect", timeout=120)
    assert done.returncode == 0, done.stderr
    said(done, "6 of 6 units home and verified")
    assert contents(collect) == before


@pytest.fixture
def ballast(ran: Ran) -> Iterator[str]:
    """h01's first unit grows by 128 MiB that no manifest names, so that its files take a while."""
    token = ran.fleet.read("session.json")["token"]
    path = f"/home/bench/.mlperf-fleet/runs/{token}/h01.{FIRST}/ballast"
    ran.fleet.lab["h01"].sh(f"head -c {2**27} /dev/urandom > {path}")
    yield path
    ran.fleet.lab["h01"].sh(f"rm -f {path}")


def test_a_transfer_that_broke_off_goes_on_where_it_stopped(ran: Ran, tmp_path: Path, ballast: str) -> None:
    shutil.copytree(ran.fleet.folder / "sessions", tmp_path / "sessions")
    again, host = Fleet(ran.fleet.lab, tmp_path), ran.fleet.lab["h01"]
    shutil.rmtree(again.session / "collect")
    unit = f"h01.{FIRST}"
    with (tmp_path / "said").open("w", encoding="utf-8") as stream:
        process = again.start("collect", stdout=stream, stderr=stream)
    part = _part(again, 2**20)
    host.kill_sshd(sessions=True)
    assert process.wait(timeout=60) == 3
    cause = again.read("collect", "collected.json")["units"][unit]["cause"]
    assert cause.startswith("while its files were fetched: ")
    assert 2**20 <= part.stat().st_size < 2**27
    # The hosts that had no part in it are home.
    assert all(is_home(again, f"{name}.{which}") for name in HOSTS[1:] for which in (FIRST, SECOND))
    host.start_sshd()

    # Had it started over, the damage done here would be gone.
    with part.open("r+b") as stream_of_part:
        stream_of_part.seek(2**19)
        stream_of_part.write(b"damaged on the way")
    damaged = again("collect", timeout=120)
    assert damaged.returncode == 3
    said(damaged, "5 of 6 units home and verified", "its sha256 is not the one announced")
    assert not part.exists()

    # Now it comes whole, for only then can the file be found that no manifest names.
    whole = again("collect", timeout=120)
    said(whole, "5 of 6 units home and verified", "ballast is not in the manifest")
    host.sh(f"rm {ballast}")
    done = again("collect", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(again.session / "collect") == contents(ran.fleet.session / "collect")


def _part(fleet: Fleet, size: int) -> Path:
    """The part of an archive that is being fetched, once it has so many bytes."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for path in (fleet.session / "collect").glob(f".incoming/h01.{FIRST}.*.tar"):
            if path.stat().st_size >= size:
                return path
        time.sleep(0.005)
    pytest.fail("no transfer was seen within 60 s")


@pytest.fixture
def connection(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[reach.Connection]:
    """An ssh connection of this very process to h02."""
    monkeypatch.setenv("FLEET_SSH_CONFIG", str(lab.ssh_config))
    host = Host(name="h02", kind=HostKind.SERVER, connection="ssh", address="h02")
    opened = lab.inside(lambda: reach.connect(host))
    yield opened
    opened.close()


def test_what_a_host_prints_is_copied_byte_for_byte(lab: Lab, connection: reach.Connection) -> None:
    lab["h02"].sh("head -c 5000001 /dev/urandom > /tmp/sent")
    digest = lab["h02"].sh("sha256sum /tmp/sent").split()[0]
    sink = io.BytesIO()
    connection.copy("head -c 1234567 /tmp/sent", sink, limit=1234567)
    connection.copy("tail -c +1234568 /tmp/sent", sink, limit=5000001 - 1234567)
    assert hashlib.sha256(sink.getvalue()).hexdigest() == digest


def test_a_host_that_does_not_stop_is_cut_off_and_can_still_be_asked(connection: reach.Connection) -> None:
    sink = io.BytesIO()
    with pytest.raises(ValueError, match="it sends more than it announced"):
        connection.copy("cat /dev/zero", sink, limit=2**20)
    assert len(sink.getvalue()) <= 2**20
    assert connection.run("echo still here", timeout=10).out == "still here\n"


def test_a_host_that_hangs_in_the_middle_is_given_up(lab: Lab, connection: reach.Connection) -> None:
    class Freezes(io.BytesIO):
        def write(self, data: Any) -> int:
            if not self.tell():
                lab["h02"].freeze()
            return super().write(data)

    sink, begun = Freezes(), time.monotonic()
    with pytest.raises(reach.Unreachable, match="no answer in 1 s"):
        connection.copy("cat /dev/zero", sink, limit=2**40, stalled=1.0)
    assert time.monotonic() - begun < 20
    # What came before it hung is kept: a later transfer goes on behind it.
    assert sink.getvalue()
