"""Files on a host that are not what they should be: whatever they are, they end as a named state or are made anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab.faults.outing import COMPLETE, FIRST, SECOND, WORK, Outing

if TYPE_CHECKING:
    from tests.lab.faults.conftest import MakeOuting

pytestmark = [pytest.mark.lab, pytest.mark.faults]
UNIT = f"h02.{SECOND}"


def measured_but_not_home(outing: MakeOuting) -> Outing:
    """Every unit is done on its host, and the controller, killed early, has none of the last ones."""
    out = outing()
    out.start()
    out.until_running("h02")
    out.kill_controller()
    for host in out.hosts:
        out.until_ended(host)
    return out


def made_anew(out: Outing, fault: str, pattern: str) -> None:
    """The unit that was spoilt is told of, and is measured again by this bench or the next; the others are kept."""
    out.start()
    out.end()
    assert out.told("h02", pattern), out.text
    out.check_first(missing=["h02"])
    row = out.row(fault, "h02", pattern)
    assert out.again() == COMPLETE, out.text
    out.check_settled(spoilt=[UNIT])
    out.keep(row)


def test_a_manifest_that_lies(outing: MakeOuting) -> None:
    out = measured_but_not_home(outing)
    log = f"{WORK}/runs/{out.token}/{UNIT}/mlperf_log_detail.txt"
    out.inject(lambda: out.lab["h02"].sh(f'sed -i \'s/result_samples_per_second", "value": /&9/\' {log}'))
    made_anew(out, "a manifest that lies", "mlperf_log_detail.txt")


def test_a_log_that_a_crash_has_truncated(outing: MakeOuting) -> None:
    out = measured_but_not_home(outing)
    log = f"{WORK}/runs/{out.token}/{UNIT}/mlperf_log_detail.txt"

    def crash() -> None:
        out.lab["h02"].sh(f"truncate -s 1000 {log}")
        out.lab["h02"].reboot()

    out.inject(crash)
    made_anew(out, "a log truncated by a crash", "mlperf_log_detail.txt")


def test_a_file_whose_name_has_a_newline(outing: MakeOuting) -> None:
    out = measured_but_not_home(outing)
    folder = f"{WORK}/runs/{out.token}/{UNIT}"
    out.inject(lambda: out.lab["h02"].sh(f"cd {folder}; touch \"$(printf 'mlperf\\nlog')\""))
    made_anew(out, "a file name with a newline", "was not asked for|not in the manifest|name")


def test_an_archive_that_leaves_the_session_folder(outing: MakeOuting) -> None:
    """Python on the host is made to answer `../` in place of each name that it puts into an archive."""
    out = measured_but_not_home(outing)
    # Not sitecustomize: Debian has one of its own, which comes first.
    site = f"{WORK}/venv/lib/python3.11/site-packages"
    evil = (
        "import tarfile\n"
        "real = tarfile.TarFile.gettarinfo\n"
        "def lies(self, *given, **named):\n"
        "    found = real(self, *given, **named)\n"
        f"    if {SECOND!r} in found.name: found.name = '../../../../escaped'\n"
        "    return found\n"
        "tarfile.TarFile.gettarinfo = lies\n"
    )

    def possess() -> None:
        out.lab["h02"].exec(["tee", f"{site}/evil.py"], input=evil, check=True)
        out.lab["h02"].exec(["tee", f"{site}/evil.pth"], input="import evil\n", check=True)

    out.inject(possess)
    try:
        out.start()
        out.end()
        assert out.told("h02", "was not asked for"), out.text
        out.check_first(missing=["h02"])
        row = out.row("an archive with ../ in it", "h02", "was not asked for")
    finally:
        out.lab["h02"].sh(f"rm {site}/evil.p*")
    assert not list(out.session.parents[1].rglob("escaped"))
    assert not (out.session.parents[2] / "escaped").exists()
    assert out.again() == COMPLETE, out.text
    out.check_settled(spoilt=[UNIT])
    out.keep(row)


def test_a_link_to_a_file_outside(outing: MakeOuting) -> None:
    out = measured_but_not_home(outing)
    folder = f"{WORK}/runs/{out.token}/{UNIT}"
    out.inject(lambda: out.lab["h02"].sh(f"cd {folder}; rm user.conf; ln -s /etc/passwd user.conf"))
    made_anew(out, "a link in place of a file", "user.conf")


def test_files_that_were_lost_on_the_host_after_they_came_home(outing: MakeOuting) -> None:
    out = outing()
    out.start()
    assert out.end() == COMPLETE
    out.check_first()
    folder = out.session / "collect" / "h02" / f"h02.{FIRST}"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    out.inject(lambda: out.lab["h02"].sh(f"rm -rf {WORK}/runs/{out.token}"))
    out.start()
    assert out.end() == COMPLETE, out.text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert out.results() == out._first
    out.keep(out.row("a host's run folder is deleted, files home", "h02"))
