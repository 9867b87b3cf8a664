"""Processes: where the harness was started from, who still lives, and how one is ended with all it started."""

import os
import signal
import subprocess
import sys
from pathlib import Path

GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""


def boot_id() -> str:
    """The kernel's id of this boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def entry() -> str:
    """The harness as started, its links resolved: a later provision must not swap the code under a running session."""
    started = Path(sys.argv[0])
    return str(started.resolve() if started.is_dir() else Path(__file__).with_name("__main__.py"))


def runs(pid: int, word: str) -> bool:
    """Whether process `pid` is there and has `word` among its arguments: numbers are reused."""
    try:
        return word in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False


def wait(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Until the process has ended, for so many seconds at the most."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return


def end(process: "subprocess.Popen[bytes]") -> None:
    """No process of the unit is left behind, whether it ended by itself or not."""
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        wait(process, seconds)
    process.wait()
