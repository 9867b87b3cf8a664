"""Processes: which supervisor is alive, and how a unit is ended with everything it started.

A unit's processes are found in two ways. They descend from its supervisor, which adopts what loses its parent; and
each carries MARK in its environment, whoever its parent is by now. Neither a new session nor a double fork hides one.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL, and after that until a process counts as one that cannot be killed."""
MARK = "MLPERF_FLEET_UNIT"
"""Environment variable of a unit's processes: `<pid namespace> <supervisor's pid> <its start time> <unit's folder>`."""
OWNER = "MLPERF_FLEET_SUPERVISOR"
"""Environment variable of a unit's first process: its supervisor's pid."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_PROC = Path("/proc")


def boot_id() -> str:
    """The kernel's id of this boot."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def uptime() -> float:
    """Seconds since the boot, suspended ones too: no set clock can shift them."""
    return float((_PROC / "uptime").read_text(encoding="ascii").split()[0])


def entry() -> str:
    """The harness as started, its links resolved: a later provision must not swap the code under a running session."""
    started = Path(sys.argv[0])
    return str(started.resolve() if started.is_dir() else Path(__file__).with_name("__main__.py"))


def python() -> str:
    """The interpreter of the environment in use, its link resolved for the same reason."""
    found = Path(sys.prefix).resolve() / "bin" / Path(sys.executable).name
    return str(found) if sys.prefix != sys.base_prefix and found.exists() else sys.executable


def _prctl(option: int, value: int) -> None:
    # Other systems than Linux have no such thing; units are then ended by their supervisor alone.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def adopt() -> None:
    """Let this process become the parent of every descendant that loses its own."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_supervisor() -> None:
    """See that the kernel kills this process when its supervisor dies; without one in the environment, do nothing."""
    owner = os.environ.pop(OWNER, "")
    if not owner:
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(owner):
        os._exit(128 + signal.SIGKILL)  # It died before we asked.


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, …; empty when the process is gone."""
    try:
        return (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _born(pid: int) -> str:
    """Clock ticks from the boot to the process's start: with its number it names one process for good."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] not in "ZX" else ""


def lives(pid: int) -> bool:
    """Whether there is such a process; a zombie is none."""
    return bool(_born(pid))


def _pids() -> Iterator[int]:
    with os.scandir(_PROC) as entries:
        yield from (int(found.name) for found in entries if found.name.isdecimal())


def _namespace() -> str:
    return str((_PROC / "self/ns/pid").readlink())


def environment(folder: Path) -> dict[str, str]:
    """Variables for the processes of the unit in `folder`, which this process supervises."""
    pid = os.getpid()
    return {**os.environ, MARK: f"{_namespace()} {pid} {_born(pid)} {folder}", OWNER: str(pid)}


def _marked() -> Iterator[tuple[int, str, bool]]:
    """Pid, unit's folder and whether its supervisor lives, of each marked process of this user in this namespace."""
    here, key = _namespace(), f"{MARK}=".encode()
    for pid in _pids():
        try:
            variables = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for variable in variables:
            if not variable.startswith(key):
                continue
            words = variable[len(key) :].decode(errors="replace").split(" ", 3)
            if len(words) == 4 and words[0] == here and words[1].isdecimal() and _born(pid):  # noqa: PLR2004
                yield pid, words[3], bool(words[2]) and _born(int(words[1])) == words[2]


def end_orphans() -> None:
    """Kill what is left of units whose supervisor is dead, until nothing is."""
    _kill_while(lambda: [pid for pid, _, supervised in _marked() if not supervised and pid != os.getpid()])


def end_unit(folder: Path) -> None:
    """Kill every process of the unit in `folder`, whoever supervises it."""
    _kill_while(lambda: [pid for pid, of, _ in _marked() if of == str(folder) and pid != os.getpid()])


def _kill_while(find: Callable[[], list[int]]) -> bool:
    """SIGKILL for what `find` finds, again and again: a process may fork meanwhile. False when some cannot be killed."""
    end = time.monotonic() + GRACE_SECONDS
    while found := find():
        if time.monotonic() > end:
            return False
        for pid in found:
            _send(pid, signal.SIGKILL)
        time.sleep(0.02)
    return True


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _tree(first: int, spare: Collection[int]) -> list[int]:
    """Our living descendants but `first` and those in `spare`; our other children are reaped when dead."""
    children: dict[int, list[int]] = {}
    dead = set()
    for pid in _pids():
        if fields := _stat(pid):
            children.setdefault(int(fields[1]), []).append(pid)
            if fields[0] in "ZX":
                dead.add(pid)
    for pid in set(children.get(os.getpid(), [])) & dead - {first, *spare}:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    found, frontier = [], [os.getpid()]
    while frontier:
        below = [pid for pid in children.get(frontier.pop(), []) if pid not in spare]
        frontier += below
        found += [pid for pid in below if pid not in dead and pid != first]
    return found


def end(process: "subprocess.Popen[bytes]", folder: Path, spare: Collection[int] = ()) -> bool:
    """End a unit's first process and everything it started; True when nothing is left.

    `spare` are other children of this process. Those with a process of Popen's of their own must be among them.
    """

    def left() -> list[int]:
        # The first process is reaped by Popen alone, which must learn its exit status.
        process.poll()
        marked = [pid for pid, of, _ in _marked() if of == str(folder) and pid != os.getpid()]
        below = _tree(process.pid, spare)
        return [*([process.pid] if process.returncode is None else []), *{*marked, *below} - {process.pid, *spare}]

    for pid in left():
        _send(pid, signal.SIGTERM)
    until = time.monotonic() + GRACE_SECONDS
    while (still := left()) and time.monotonic() < until:
        wait(process, 0.05) if process.pid in still else time.sleep(0.05)
    return _kill_while(left)


def guard(supervisor: int) -> None:
    """Wait for the end of stdin, which `supervisor` holds open as long as it lives, and end what it leaves behind."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end = time.monotonic() + GRACE_SECONDS
    while _born(supervisor) and time.monotonic() < end:
        time.sleep(0.02)
    end_orphans()


def supervised(work: Path, session: str) -> bool:
    """Whether a supervisor of this session lives; one that is frozen does."""
    wanted = ["supervise", str(work), session]
    return any(_arguments(pid)[-3:] == wanted for pid in _pids())


def uses(path: Path) -> bool:
    """Whether a process was started with `path`, whole, as one of its arguments."""
    return any(str(path) in _arguments(pid) for pid in _pids())


def _arguments(pid: int) -> list[str]:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def wait(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Until the process has ended, for so many seconds at the most."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
