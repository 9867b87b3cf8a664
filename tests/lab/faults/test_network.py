"""What becomes of an outing when the network or a host's identity changes under it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab.faults.outing import COMPLETE, LOST_AFTER_S, MISSING, SECOND

if TYPE_CHECKING:
    from tests.lab.faults.conftest import MakeOuting

pytestmark = pytest.mark.lab


@pytest.mark.faults
def test_a_cable_that_is_out_for_ten_seconds(outing: MakeOuting) -> None:
    out = outing()
    out.start()
    out.until_running("h02")
    out.inject(lambda: out.lab["h02"].cut(10))
    assert out.end() == COMPLETE, out.text
    out.recover("link down for 10 s", "h02", "no answer|lost")


@pytest.mark.faults
def test_a_cable_that_stays_out(outing: MakeOuting) -> None:
    out = outing()
    out.start()
    out.until_running("h02")
    out.inject(lambda: out.lab["h02"].link(up=False))
    assert out.end() == MISSING
    assert set(out.states("h02")) <= {"done", "unreachable"}
    noticed = out.noticed("h02", "no answer|lost")
    assert noticed is not None, out.text
    assert noticed < 30
    out.recover("link down for good", "h02", "no answer|lost", missing=["h02"])


@pytest.mark.faults
def test_a_cable_that_is_out_before_anything_starts(outing: MakeOuting) -> None:
    out = outing()
    out.inject(lambda: out.lab["h02"].link(up=False))
    out.start()
    assert out.end() == MISSING
    assert set(out.states("h02")) == {"unreachable"}
    out.recover("link down from the start", "h02", "no answer", missing=["h02"])


@pytest.mark.faults
def test_a_slow_cable_that_loses_frames(outing: MakeOuting) -> None:
    out = outing()
    out.inject(lambda: out.lab["h02"].slow(latency_ms=200, loss=0.05))
    out.start()
    assert out.end() == COMPLETE, out.text
    out.recover("200 ms latency and 5 % loss", "h02", "no answer|lost")


@pytest.mark.faults
def test_a_cable_that_is_cut_while_files_come_home(outing: MakeOuting) -> None:
    out = outing()
    out.start()
    out.until_running("h02")
    out.lab["h02"].slow(latency_ms=200, loss=0.05)
    out.until("files of h02 come home", lambda: any((out.session / "collect/.incoming").glob(f"h02.{SECOND}*")))
    out.inject(lambda: out.lab["h02"].link(up=False))
    assert out.end() == MISSING, out.text
    out.recover("link down for good, files coming home", "h02", "no answer|lost|fetched", missing=["h02"])


@pytest.mark.faults
def test_another_host_key_in_the_middle(outing: MakeOuting) -> None:
    out = outing()
    known = (out.lab.ssh_dir / "known_hosts").read_text(encoding="utf-8")

    def replace() -> None:
        out.lab["h02"].change_host_key(sessions=True)
        (out.lab.ssh_dir / "known_hosts").write_text(known, encoding="utf-8")

    out.start()
    out.until_running("h02")
    out.inject(replace)
    assert out.end() == MISSING
    said = " ".join(out.text.split())
    assert "host key" in said, "the user is told what it is, not just that there is no answer"
    assert "ssh-keygen" in said, "and what to do"
    noticed = out.noticed("h02", "host key")
    assert noticed is not None
    assert noticed < LOST_AFTER_S, "a changed key is no silence: nobody needs to wait for it"
    out.check_first(missing=["h02"])
    row = out.row("host key changed mid-session", "h02", "host key")
    # As long as the user has not accepted the key, the host stays out, and the others are not measured again.
    out.start()
    assert out.end() == MISSING
    out.check_first(missing=["h02"])
    assert out.again() == COMPLETE, out.text
    out.check_settled()
    out.keep(row)
