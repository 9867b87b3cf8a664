"""What a host's answer means: nothing in it is trusted, and no clock that was set changes anything."""

import json
import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet import answers
from fleet.answers import Word
from fleet.handoff import UnitRecord
from fleet.harness.contract import Reason, SupervisorBeat, UnitState, UnitStatus, write_json
from tests.unit.fakes import answer, status


def beat(at: float | None, boot: str = "boot-1") -> SupervisorBeat:
    return SupervisorBeat(pid=7, boot_id=boot, heartbeat_at=0.0, beat_uptime=at)


def word(now: float = 1000.0, boot: str = "b", last: SupervisorBeat | None = None) -> Word:
    return Word(uptime=now, boot=boot, beat=last, statuses={})


def queued(at: float | None, boot: str = "b") -> UnitStatus:
    return status("u", UnitState.QUEUED, beat_uptime=at, boot_id=boot)


@pytest.mark.parametrize(
    ("given", "last", "state", "cause"),
    [
        # A unit waits for hours behind others: its supervisor's beat speaks for it.
        (queued(10.0), beat(999.0, "b"), UnitState.QUEUED, ""),
        (queued(10.0), beat(900.0, "b"), UnitState.FAILED, "its supervisor is silent"),
        (queued(10.0, "a"), beat(900.0, "a"), UnitState.INTERRUPTED, "rebooted"),
        # Queued after a reboot, beside the beat of the supervisor before it: the unit's own word is the newer one.
        (queued(990.0), beat(900.0, "a"), UnitState.QUEUED, ""),
        (queued(10.0, "a"), beat(999.0, "b"), UnitState.QUEUED, ""),
        (queued(990.0), None, UnitState.QUEUED, ""),
        (queued(900.0), None, UnitState.FAILED, "its supervisor is silent"),
        (queued(990.0, "a"), None, UnitState.INTERRUPTED, "rebooted"),
        (queued(None, ""), None, UnitState.QUEUED, ""),
        # A running unit has a heartbeat of its own, which no other session's or later supervisor's replaces.
        (status("u", UnitState.RUNNING, boot_id="b", beat_uptime=990.0), None, UnitState.RUNNING, ""),
        (status("u", UnitState.RUNNING, boot_id="a", beat_uptime=999.0), None, UnitState.INTERRUPTED, "rebooted"),
        (
            status("u", UnitState.RUNNING, boot_id="b", beat_uptime=900.0),
            None,
            UnitState.FAILED,
            "its supervisor is silent",
        ),
        (
            status("u", UnitState.RUNNING, boot_id="b", beat_uptime=900.0),
            beat(999.0, "b"),
            UnitState.FAILED,
            "its supervisor is silent",
        ),
        (status("u", UnitState.DONE, boot_id="a", beat_uptime=1.0), None, UnitState.DONE, ""),
        (status("u", UnitState.TIMEOUT, cause="late"), None, UnitState.TIMEOUT, "late"),
    ],
)
def test_judge(given: UnitStatus, last: SupervisorBeat | None, state: UnitState, cause: str) -> None:
    found, said, reason = answers.judge(given, word(last=last))
    assert found is state
    assert cause in said
    assert bool(cause) == bool(said)
    assert bool(reason) == (found in {UnitState.FAILED, UnitState.INTERRUPTED, UnitState.TIMEOUT})


def test_an_unknown_boot_or_time_is_no_verdict() -> None:
    running = status("u", UnitState.RUNNING, boot_id="b", beat_uptime=990.0)
    assert answers.judge(running, word(0.0, ""))[0] is UnitState.RUNNING


def test_parse_reads_what_the_shell_prints() -> None:
    found = answers.parse(answer(status("a"), status("b", UnitState.RUNNING, samples_done=7), beat=beat(999.0)))
    assert (found.uptime, found.boot, found.beat) == (1000.0, "boot-1", beat(999.0))
    assert {unit: item.state for unit, item in found.statuses.items()} == {"a": UnitState.DONE, "b": UnitState.RUNNING}
    assert found.statuses["b"].samples_done == 7


GARBAGE = ["", "\n\n\n", "bash: date: not found\n", "garbage\ngarbage\ngarbage{{{", "1 b\n\x1e[]", '1 b\n\x1e{"unit": 3}',
           "\0\0", "1 b\n\x1e" + "[" * 100_000, "\x1e" * 100]  # fmt: skip


@pytest.mark.parametrize("text", GARBAGE, ids=range(len(GARBAGE)))
def test_parse_takes_nothing_from_garbage(text: str) -> None:
    found = answers.parse(text)
    assert (found.statuses, found.beat) == ({}, None)


@pytest.mark.parametrize(
    "first", ["² b", "١٢ b", "-1 b", "1e3 b", "nan b", "", "0x1 b", "1", "1 b c", "1 b/c", "9" * 13 + " b"]
)
def test_parse_takes_only_a_plain_uptime_and_boot(first: str) -> None:
    assert (answers.parse(f"{first}\n").uptime, answers.parse(f"{first}\n").boot) == (0.0, "")


def test_parse_passes_over_what_a_login_shell_says_first() -> None:
    found = answers.parse("Welcome to box!\n\n" + answer(status("a"), gone=7))
    assert (found.uptime, found.boot, found.gone, set(found.statuses)) == (1000.0, "boot-1", 7, {"a"})


def test_parse_keeps_what_came_before_a_truncation() -> None:
    whole = answer(status("a"), status("b"), beat=beat(1.0))
    for end in range(len(whole)):
        assert set(answers.parse(whole[:end]).statuses) <= {"a", "b"}
    found = answers.parse(whole[:-5])
    assert (set(found.statuses), found.beat) == ({"a"}, beat(1.0))


@pytest.mark.parametrize("broken", ['{"unit": "x", "sta\n', '{"unit": "x", "state": "flying"}\n', "", "\0", "}{"])
def test_parse_goes_on_after_a_broken_status(broken: str) -> None:
    assert set(answers.parse(answer(status("a"), broken, status("b"))).statuses) == {"a", "b"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.text(), st.builds(lambda at: json.dumps(asdict(queued(at))), st.floats()))), st.text())
def test_nothing_a_host_says_is_an_error(documents: list[str], first: str) -> None:
    found = answers.parse("\x1e".join([first, *documents]))
    for item in found.statuses.values():
        assert isinstance(answers.judge(item, found)[0], UnitState)


RUNNING = status("u", UnitState.RUNNING, boot_id="b", beat_uptime=999.0)


@pytest.mark.parametrize(
    ("given", "last", "gone", "reason"),
    [
        (RUNNING, beat(999.0, "b"), 7, Reason.SUPERVISOR_DIED),
        (RUNNING, beat(999.0, "b"), 0, Reason.NONE),
        # Asked about one that was replaced meanwhile, or one of an earlier boot.
        (RUNNING, beat(999.0, "b"), 6, Reason.NONE),
        (RUNNING, beat(999.0, "a"), 7, Reason.NONE),
        (RUNNING, None, 7, Reason.NONE),
        (queued(990.0), beat(999.0, "b"), 7, Reason.SUPERVISOR_DIED),
        # Queued after that one's last beat: another is on its way.
        (queued(999.5), beat(999.0, "b"), 7, Reason.NONE),
        (status("u", UnitState.DONE), beat(999.0, "b"), 7, Reason.NONE),
    ],
)
def test_a_supervisor_whose_process_is_gone_is_dead_at_once(
    given: UnitStatus, last: SupervisorBeat | None, gone: int, reason: Reason
) -> None:
    assert answers.judge(given, replace(word(last=last), gone=gone))[2] is reason


@pytest.mark.parametrize("shift", [-86400.0, 0.0, 86400.0])
def test_a_clock_that_is_set_changes_no_verdict(shift: float) -> None:
    for said, last in [(RUNNING, None), (queued(10.0), beat(999.0, "b")), (queued(900.0), None)]:
        moved = replace(said, heartbeat_at=1e9 + shift, started_at=1e9)
        beaten = replace(last, heartbeat_at=1e9 - shift) if last else None
        assert answers.judge(moved, word(last=beaten)) == answers.judge(said, word(last=last))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (status("u", UnitState.FAILED, cause="x"), Reason.OTHER),
        (status("u", UnitState.FAILED, cause="x", reason=Reason.OUT_OF_MEMORY), Reason.OUT_OF_MEMORY),
        (status("u", UnitState.TIMEOUT), Reason.TIMEOUT),
        (status("u", UnitState.INTERRUPTED), Reason.INTERRUPTED),
        (status("u", UnitState.DONE, reason=Reason.OTHER), Reason.NONE),
    ],
)
def test_an_end_has_a_reason(given: UnitStatus, reason: Reason) -> None:
    assert answers.judge(given, word())[2] is reason


def test_words_of_a_host_have_an_end() -> None:
    loud = status(
        "u", UnitState.FAILED, cause="a\nb\x1b[31m" + "c" * 10_000, samples_done=10**30,
        conditions={f"{number:0<100}": 1.0 for number in range(100)},
    )  # fmt: skip
    found = answers.parse(answer(loud)).statuses["u"]
    assert len(found.cause) == answers.CAUSE_LIMIT
    assert found.cause.startswith("a b?[31mccc")
    assert found.samples_done == answers.COUNT_LIMIT
    assert len(found.conditions) == answers.CONDITIONS_LIMIT
    assert all(len(name) <= 40 for name in found.conditions)


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        ('motd\n{"queued": ["a"], "refused": {"b": "no\\nroom"}}\n', {"b": "no room"}),
        ('{"queued": ["a"]}', {}),
        ('{"refused": ["b"]}', {}),
        ("", {}),
        ("[" * 100_000, {}),
    ],
)
def test_a_start_says_which_units_it_did_not_take(printed: str, found: dict[str, str]) -> None:
    assert answers.refused(printed) == found


def test_only_a_lost_host_may_take_a_units_end_back() -> None:
    lost = UnitRecord(unit="u", host="h", state=UnitState.UNREACHABLE, cause="gone", reason=Reason.UNREACHABLE)
    said = answers.parse(answer(status("u")))
    back = answers.update(lost, said)
    assert (back.state, back.cause, back.reason, back.status) == (UnitState.DONE, "", Reason.NONE, status("u"))
    for state in (UnitState.FAILED, UnitState.DONE, UnitState.INTERRUPTED):
        ended = replace(lost, state=state)
        assert answers.update(ended, said) == ended


def test_a_shell_says_what_the_question_asks(tmp_path: Path) -> None:
    folder = tmp_path / "r u n"
    for name in ("a", "it's"):
        (folder / name).mkdir(parents=True)
        write_json(folder / name / "status.json", status(name, UnitState.RUNNING, samples_done=3))
    write_json(folder / "supervisor.json", SupervisorBeat(pid=os.getpid(), boot_id="b", heartbeat_at=0.0))

    def ask(supervisor: int) -> Word:
        command = answers.question(str(folder), ["a", "it's", "gone"], supervisor)
        done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
        return answers.parse(done.stdout)

    found = ask(os.getpid())
    assert set(found.statuses) == {"a", "it's"}
    assert found.beat is not None
    assert found.beat.pid == os.getpid()
    assert found.uptime > 0
    assert found.boot == Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    assert found.gone == 0
    assert ask(2**30).gone == 2**30
    # A session that the host does not know: it is alive all the same.
    folder.rename(tmp_path / "away")
    assert (ask(0).uptime > 0, ask(0).statuses) == (True, {})
