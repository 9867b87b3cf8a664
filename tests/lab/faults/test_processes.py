"""kill -9 of what takes part in an outing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab.faults.outing import COMPLETE, FIRST, SECOND, WORK

if TYPE_CHECKING:
    from tests.lab.faults.conftest import MakeOuting

pytestmark = pytest.mark.lab


@pytest.mark.faults
def test_the_controller_while_units_run(outing: MakeOuting) -> None:
    out = outing()
    out.start()
    out.until_running("h02")
    out.inject(out.kill_controller)
    for host in out.hosts:
        out.until_ended(host, FIRST)
        out.until_ended(host, SECOND)
    assert out.again() == COMPLETE
    out.check_first()
    out.check_settled()
    out.keep(out.row("kill -9 of the controller, units running", "h02"))


@pytest.mark.faults
def test_the_controller_while_hosts_are_made_ready(outing: MakeOuting) -> None:
    out = outing()
    out.lab["h03"].sh(f"rm -rf {WORK}/venv {WORK}/venvs")
    out.start()
    out.until_process("h03", "pip install")
    out.inject(out.kill_controller)
    assert out.again() == COMPLETE, out.text
    out.check_first()
    out.check_settled()
    out.keep(out.row("kill -9 of the controller, hosts being provisioned", "h03"))


@pytest.mark.faults
def test_the_supervisor(outing: MakeOuting) -> None:
    out = outing()
    out.start()
    out.until_running("h02")
    out.inject(lambda: out.lab["h02"].kill(" supervise "))
    out.end()
    noticed = out.noticed("h02", "supervisor|kill|again")
    assert noticed is not None, out.text
    assert noticed < 30
    out.recover("kill -9 of the supervisor", "h02", "supervisor|kill|again", missing=["h02"])


def test_the_loadgen_process(outing: MakeOuting) -> None:
    out = outing()
    out.start()
    out.until_running("h02")
    out.inject(lambda: out.lab["h02"].kill(f" run {WORK}"))
    out.end()
    assert out.told("h02", "SIGKILL"), out.text
    out.recover("kill -9 of the LoadGen process", "h02", "SIGKILL", missing=["h02"])


@pytest.mark.faults
def test_sshd_and_all_its_sessions(outing: MakeOuting) -> None:
    out = outing()
    out.start()
    out.until_running("h02")
    out.inject(lambda: out.lab["h02"].kill_sshd(sessions=True))
    out.end()
    noticed = out.noticed("h02", "no answer|refused|lost")
    assert noticed is not None, out.text
    assert noticed < 30
    out.recover("kill -9 of sshd and its sessions", "h02", "no answer|refused|lost", missing=["h02"])


@pytest.mark.faults
def test_sshd_that_is_started_again_at_once(outing: MakeOuting) -> None:
    out = outing()

    def restart() -> None:
        out.lab["h02"].kill_sshd(sessions=True)
        out.lab["h02"].start_sshd()

    out.start()
    out.until_running("h02")
    out.inject(restart)
    assert out.end() == COMPLETE, out.text
    out.recover("kill -9 of sshd, started again", "h02", "no answer|refused|lost")
