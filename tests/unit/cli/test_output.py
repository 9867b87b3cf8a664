"""Tables, lines and progress: what goes where, and that hosts cannot write control characters."""

import pytest

from fleet.cli import output, tables
from fleet.errors import ExitCode
from fleet.handoff import Readiness, UnitRecord
from fleet.terms import HostState, UnitState


def test_a_table_shows_every_cell_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table("2 of 3", ["host", "cause"], [["h01", "x" * 150], ["h02", "[bold]no markup[/bold]\r\n"]])
    said = capsys.readouterr()
    assert said.out.startswith("2 of 3")
    assert said.out.replace("\n", "").count("x") >= 150
    assert "[bold]no markup[/bold]??" in said.out
    assert said.err == ""


def test_words_go_to_stderr_and_data_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    output.say("hello [you]\x07")
    output.show("data")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("data\n", "hello [you]?\n")


def test_plain_progress_says_new_things_once(capsys: pytest.CaptureFixture[str]) -> None:
    with output.watching(quiet=False) as watch:
        watch.stage("run", "units")
        for count in range(5):
            watch.host("h01", f"unit (1/2), {count} samples", fraction=0.25)
        watch.host("h01", "unit (2/2), 0 samples")
        watch.host("h01", "2 of 2 units done", ended=True)
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line.split("s ", 1)[1].strip() for line in said.err.splitlines()]
    assert lines == [
        "run: units",
        "h01: unit (1/2), 0 samples [25%]",
        "h01: unit (2/2), 0 samples",
        "h01: 2 of 2 units done",
    ]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with output.watching(quiet=True) as watch:
        watch.stage("run", "units")
        watch.host("h01", "x", ended=True)
    assert capsys.readouterr() == ("", "")


def test_titles_count_and_codes_follow() -> None:
    hosts = [Readiness(host="a", state=HostState.READY), Readiness(host="b", state=HostState.FAILED, cause="c")]
    assert tables.hosts_title(hosts) == "1 of 2 hosts ready"
    assert tables.hosts(hosts) == (["host", "state", "cause"], [["a", "ready", ""], ["b", "failed", "c"]])
    assert tables.hosts_code(hosts) is ExitCode.MISSING
    assert tables.hosts_code(hosts[:1]) is ExitCode.OK
    units = [
        UnitRecord(unit="u", host="a", state=UnitState.DONE),
        UnitRecord(unit="v", host="a", state=UnitState.QUEUED),
    ]
    assert tables.units_title(units) == "1 of 2 units done"
    assert tables.units_code(units) is ExitCode.MISSING


def test_what_a_host_needs_next_stands_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    command = "ssh -F " + "/a/long/folder" * 20 + " h02 true"
    hosts = [Readiness(host="h01", state=HostState.READY), Readiness(host="h02", state=HostState.FAILED, hint=command)]
    output.print_hosts(hosts, *tables.hosts(hosts), tables.hosts_title(hosts))
    said = capsys.readouterr()
    assert said.out.startswith("1 of 2 hosts ready")
    assert command not in said.out
    assert said.err == f"h02: next: {command}\n"


def test_the_worst_code_wins() -> None:
    order = [ExitCode.LEAK, ExitCode.INTERRUPTED, ExitCode.USAGE, ExitCode.ERROR, ExitCode.MISSING, ExitCode.INVALID]
    for at, code in enumerate(order):
        assert ExitCode.worst(reversed(order[at:])) is code
    assert ExitCode.worst([]) is ExitCode.OK
