"""One outing of the fleet that something happens to, and the invariants that must hold whatever it was.

Everything is seen as a user sees it: what the command prints and ends with, the session's files, the hosts' processes
and disks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.lab.faults.rows import Row
from tests.lab.outing import NULL, Fleet

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.lab.host import HostProcess
    from tests.lab.hosts import Lab

SESSION = "one"
UNITS = ("tiny-bert.Offline.accuracy", "tiny-bert.Offline.performance")
"""What each host has to do: about a second, and then about four."""
FIRST, SECOND = UNITS
QUICK_SECONDS = 4
LOST_AFTER_S = 25.0
"""A silent host is given up after so long, in every outing here; the promise is 30 s."""
WORK = "/home/bench/.mlperf-fleet"
COMPLETE = 5
"""Exit code of a bench that measured everything: what the null backend answers is never submitted, and that is code 5."""
MISSING = 3
ENDED = {"done", "failed", "timeout", "interrupted", "unreachable", "not-ready", "left-out"}
"""The names a unit's state may have when an outing is over."""
OURS = ("mlperf-fleet", "fleet.harness", "ansible", "pip install")
"""In the command line of whatever fleet starts on a host."""
_OURS_HERE = ("-m fleet", "ansible-playbook")
"""And at the controller's place, where ssh's connection masters may stay."""
_TOLD = re.compile(r"^\s*(?:\d+\.\ds)?\s*(.*?)\s*$")
_BAR = "│"
"""Between the cells of a table, as fleet prints it."""
_MOMENT = 60.0
_GRACE = 10.0
_SPARED = "! -name status.json ! -name progress ! -name home"
"""Files of a unit that go on changing when it is done, and the host's note that its files are home."""


@dataclass(frozen=True)
class Line:
    """A line that the command printed, and when it came (monotonic seconds)."""

    at: float
    text: str


class Outing:
    """A `fleet bench` of some hosts in one session, started in the background and looked at while it runs."""

    def __init__(
        self, lab: Lab, folder: Path, rows: list[Row], *, hosts: Sequence[str], kind: str = "server", **changes: Any
    ) -> None:
        self.lab = lab
        self.hosts = tuple(hosts)
        self.lines: list[Line] = []
        self._rows = rows
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._injected = 0.0
        self._kept: dict[str, str] = {}
        self._first: list[dict[str, Any]] = []
        self._code: int | None = None
        run = {"quick_seconds": QUICK_SECONDS, "lost_after_s": LOST_AFTER_S, **changes.pop("run", {})}
        listed = [{"name": name, "kind": kind, "user": lab.user} for name in hosts]
        self.fleet = Fleet(lab, folder, **{"benchmarks": NULL, "hosts": listed, "run": run, **changes})

    # --- start, watch, end

    @property
    def session(self) -> Path:
        """The session's folder, there or not."""
        return self._folder / "sessions" / SESSION

    @property
    def text(self) -> str:
        """What the last command has printed so far."""
        return "\n".join(line.text for line in self.lines)

    def start(self, *arguments: str) -> None:
        """Start `fleet …`, by default a quick bench, in the session; what it prints is kept with the time it came."""
        given = arguments or ("bench", "--quick")
        self.lines = []
        # A file and not a pipe: ssh's connection masters outlive the command and would hold it open.
        path = self._folder / "said"
        with path.open("w", encoding="utf-8") as stream:
            self._process = self.fleet.start(
                *given, "--session", SESSION, stdout=stream, stderr=stream, start_new_session=True
            )
        threading.Thread(target=self._follow, args=(path, self._process, self.lines), daemon=True).start()

    @staticmethod
    def _follow(path: Path, process: subprocess.Popen[str], lines: list[Line]) -> None:
        with path.open(encoding="utf-8", errors="replace") as stream:
            part = ""
            while True:
                ended = process.returncode is not None
                part += stream.read()
                *whole, part = part.split("\n")
                lines.extend(Line(time.monotonic(), text) for text in whole)
                if ended:
                    return
                time.sleep(0.02)

    def until(self, what: str, moment: Callable[[], bool], timeout: float = _MOMENT) -> None:
        """Wait for a moment; fails when it does not come or the command ends before."""
        assert self._process is not None
        end = time.monotonic() + timeout
        while not moment():
            if self._process.poll() is not None:
                pytest.fail(f"the command ended with {self._process.returncode} before {what}:\n{self.text}")
            if time.monotonic() > end:
                pytest.fail(f"not seen within {timeout:.0f} s: {what}\n{self.text}")
            time.sleep(0.02)

    def until_running(self, host: str, unit: str = SECOND) -> None:
        """Wait until the controller knows that the unit runs, and LoadGen is at it: it has begun its log."""
        self.until(f"{host}.{unit} running", lambda: self.state(f"{host}.{unit}") == "running")
        self._until_there(host, unit, "mlperf_log_detail.txt")

    def until_ended(self, host: str, unit: str = SECOND) -> None:
        """Wait until the unit's manifest is on its host: the controller may not know it yet, or not be there."""
        self._until_there(host, unit, "manifest.json")

    def _until_there(self, host: str, unit: str, file: str) -> None:
        end = time.monotonic() + _MOMENT
        place = f"{WORK}/runs/{self.token}/{host}.{unit}/{file}"
        while self.lab[host].exec(["test", "-e", place]).returncode:
            if time.monotonic() > end:
                pytest.fail(f"no {file} of {host}.{unit} within {_MOMENT:.0f} s")
            time.sleep(0.1)

    def until_said(self, text: str) -> None:
        """Wait until the command has printed it."""
        self.until(f"it says {text!r}", lambda: text in self.text)

    def until_process(self, host: str, word: str) -> None:
        """Wait until a process with the word in its command line runs on the host."""
        self.until(f"{word!r} runs on {host}", lambda: any(word in item.command for item in self.lab[host].processes()))

    def inject(self, fault: Callable[[], object]) -> None:
        """Let it happen. Units that are measured by now, wherever their files are, must survive it as they are."""
        self._kept = {name: digest for host in self.hosts for name, digest in self._manifests(host).items()}
        self._injected = time.monotonic()
        fault()

    def kill_controller(self) -> None:
        """kill -9 of the command."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def interrupt(self) -> None:
        """Ctrl-C."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)

    def end(self, timeout: float = 150.0) -> int:
        """Wait for the command; returns its exit code, and fails when it ends with a traceback."""
        assert self._process is not None
        self._code = self._process.wait(timeout)
        time.sleep(0.1)  # for the last lines
        assert "Traceback" not in self.text, self.text
        return self._code

    def close(self) -> None:
        """Leave nothing to the next test: no command, no fault, no process of ours anywhere."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
        self.lab.heal()
        for process in [*self._left_here(), *(process for host in self.hosts for process in self._left(host))]:
            with suppress(ProcessLookupError):
                os.kill(process.machine_pid, signal.SIGKILL)

    # --- what is known

    def read(self, *parts: str) -> Any:
        """A JSON file of the session."""
        return json.loads(self.session.joinpath(*parts).read_text(encoding="utf-8"))

    @property
    def token(self) -> str:
        """The session's name on its hosts."""
        return str(self.read("session.json")["token"])

    def state(self, unit: str) -> str:
        """What the controller knows of the unit by now; empty before it knows of any."""
        try:
            return str(self.read("run", "units", f"{unit}.json")["state"])
        except (OSError, ValueError):
            return ""

    def results(self) -> list[dict[str, Any]]:
        """The units of results.json."""
        return list(self.read("results", "results.json")["units"])

    def states(self, host: str) -> tuple[str, ...]:
        """The states of the host's units in results.json."""
        return tuple(unit["state"] for unit in self.results() if unit["host"] == host)

    def cause(self, host: str) -> str:
        """Why the first unit of the host that is not done is not."""
        return str(next(unit["cause"] for unit in self.results() if unit["host"] == host and unit["state"] != "done"))

    def told(self, host: str, pattern: str) -> Line | None:
        """The first line about the host since the fault that the pattern fits; None when there is none.

        A row of a table is one line here, however it was folded.
        """
        for line in [*(line for line in self.lines if _BAR not in line.text), *self._table_rows()]:
            if line.at >= self._injected and host in line.text and re.search(pattern, line.text):
                return line
        return None

    def _table_rows(self) -> list[Line]:
        """Host and last cell of each row of the tables that were printed, unfolded."""
        found: list[Line] = []
        for line in self.lines:
            first, *others = [cell.strip() for cell in line.text.split(_BAR)]
            if others and first:
                found.append(Line(line.at, f"{first}: {others[-1]}"))
            elif others and found:
                found[-1] = Line(found[-1].at, f"{found[-1].text} {others[-1]}".strip())
        return found

    def noticed(self, host: str, pattern: str) -> float | None:
        """Seconds from the fault to the line that tells of it."""
        line = self.told(host, pattern)
        return None if line is None else line.at - self._injected

    def _manifests(self, host: str) -> dict[str, str]:
        """Digest of the manifest of each of the host's units that has one, by unit."""
        if not (self.session / "session.json").exists():
            return {}
        # From its disk, for it may be frozen.
        runs = self.lab[host].upper / WORK.lstrip("/") / "runs" / self.token
        return {
            path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in runs.glob("*/manifest.json")
        }

    # --- what must hold

    def check_first(self, *, missing: Sequence[str] = ()) -> None:
        """Every unit of the bench that ended last is in a named state, with a cause where it is not done.

        Its first line counts what was measured, and its exit code agrees. `missing` are the hosts that may lack
        something; all others must have been measured.
        """
        self._first = self.results()
        assert sorted(unit["unit"] for unit in self._first) == self._planned()
        for unit in self._first:
            assert unit["state"] in ENDED, unit
            assert unit["state"] == "done" or unit["cause"], unit
            assert unit["state"] == "done" or unit["host"] in missing, unit
        lacking = [unit["host"] for unit in self._first if not _measured(unit)]
        assert set(lacking) <= set(missing)
        whole, done = len(self.hosts) - len(set(lacking)), len(self._first) - len(lacking)
        assert f"{whole} of {len(self.hosts)} hosts, {done} of {len(self._first)} units" in self.text, self.text
        assert self._code == (MISSING if lacking else COMPLETE), f"exit code {self._code}\n{self.text}"

    def _planned(self) -> list[str]:
        return sorted(f"{host}.{unit}" for host in self.hosts for unit in UNITS)

    def again(self, *, timeout: float = 150.0) -> int:
        """Run `fleet bench` once more in the session, with everything mended; returns its exit code."""
        self.lab.heal()
        self.start()
        return self.end(timeout)

    def check_settled(self, *, spoilt: Sequence[str] = ()) -> None:
        """After the last bench: everything is measured once, what survived is as it was, and nothing is left running.

        `spoilt` are units whose files the fault itself has damaged: they alone need not have survived.
        """
        units = self.results()
        assert sorted(unit["unit"] for unit in units) == self._planned()
        assert [unit["unit"] for unit in units if not _measured(unit)] == []
        self._check_files(units)
        for name, digest in self._kept.items():
            if name not in spoilt:
                host = name.split(".")[0]
                assert self._manifests(host)[name] == digest, f"{name} was measured, and then again"
        self.check_readable()
        self._until_nothing(lambda: [process for host in self.hosts for process in self._left(host)], "on a host")
        self._until_nothing(self._left_here, "at the controller's place")

    def check_readable(self) -> None:
        """Fleet's own files in the session are whole; what is a host's or Ansible's is not its business."""
        for path in self.session.rglob("*.json"):
            inner = path.relative_to(self.session).parts
            if inner[0] != "plays" and not (inner[0] == "collect" and len(inner) > 2):
                json.loads(path.read_text(encoding="utf-8"))

    def _check_files(self, units: list[dict[str, Any]]) -> None:
        """Files at home are the host's own byte for byte, and the numbers are those of the logs."""
        for host in self.hosts:
            script = f"cd {WORK}/runs/{self.token} && find . -type f {_SPARED} -exec sha256sum {{}} +"
            there = sorted(self.lab[host].sh(script).splitlines())
            script = f"cd {self.session}/collect/{host} && find . -type f {_SPARED} -exec sha256sum {{}} +"
            here = self.lab.run(["sh", "-c", script], check=True).stdout.splitlines()
            units_there = [line for line in there if f"./{host}." in line]
            assert sorted(here) == units_there
        for unit in units:
            metric = unit["summary"]["metric"]
            if unit["mode"] == "performance":
                log = (self.session / unit["folder"] / "mlperf_log_detail.txt").read_text(encoding="utf-8")
                found = re.search(rf'"key": "{metric["key"]}", "value": ([0-9.e+]+)', log)
                assert found is not None
                assert metric["value"] == float(found[1])

    def _left(self, host: str) -> list[HostProcess]:
        return [item for item in self.lab[host].processes() if any(word in item.command for word in OURS)]

    def _left_here(self) -> list[HostProcess]:
        return [item for item in self.lab.processes() if any(word in item.command for word in _OURS_HERE)]

    @staticmethod
    def _until_nothing(left: Callable[[], list[HostProcess]], where: str) -> None:
        end = time.monotonic() + _GRACE
        while found := left():
            assert time.monotonic() < end, f"left running {where}: {found}"
            time.sleep(0.2)

    def recover(self, fault: str, host: str, pattern: str = "", *, missing: Sequence[str] = ()) -> None:
        """The usual rest: check the bench that ended, mend everything, bench again, check, and keep the row."""
        self.check_first(missing=missing)
        row = self.row(fault, host, pattern)
        code = self.again()
        assert code == COMPLETE, self.text
        self.check_settled()
        self.keep(row)

    def row(self, fault: str, host: str, pattern: str = "") -> Row:
        """What is to be told of the fault, from the bench that ended last; not yet kept."""
        line = self.told(host, pattern) if pattern else None
        results = self.session / "results" / "results.json"
        units = self._first or (self.results() if results.is_file() else [])
        states = [unit["state"] for unit in units if unit["host"].startswith(host)]
        # Where the fault has ended the command before there were any results.
        states = states or [self.state(unit) for unit in self._planned()]
        missing = sum(not _measured(unit) for unit in units) if units else len(self._planned())
        return Row(
            fault=fault,
            sees=_TOLD.sub(r"\1", line.text) if line else "",
            state=", ".join(dict.fromkeys(filter(None, states))),
            noticed_s=None if line is None else round(line.at - self._injected, 1),
            lacking=missing,
        )

    def keep(self, row: Row) -> None:
        """Put the row into the table: only when everything has held, so that it can say that nothing was lost."""
        self._rows.append(row)


def _measured(unit: dict[str, Any]) -> bool:
    return unit["state"] == "done" and unit["summary"] is not None
