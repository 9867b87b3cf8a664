"""Run a command to its end without being held up by what it leaves running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from typing import IO, TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class LabError(Exception):
    """The lab, or a command that a test depends on, does not work: never what a test wants to see."""


@contextlib.contextmanager
def readable_files() -> Iterator[None]:
    """Files made inside are for everyone to read, as an installed system's are, whatever the tests' own umask."""
    own = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(own)


class Starter(Protocol):
    """Starts the command with these files and in a session of its own."""

    def __call__(
        self, *, stdin: IO[str], stdout: IO[str], stderr: IO[str], start_new_session: bool
    ) -> subprocess.Popen[str]: ...


def finish(
    start: Starter, args: Sequence[object], given: str, timeout: float, *, check: bool
) -> subprocess.CompletedProcess[str]:
    """Start it, wait for it alone, and kill its process group if it takes longer than ``timeout``.

    Files, not pipes: a job in the background, or the master that ssh leaves behind, holds a pipe open, and reading
    to its end would wait for that.
    """
    with (
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryFile("w+", errors="replace") as stdout,
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
    ):
        stdin.write(given)
        stdin.seek(0)
        process = start(stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)
        expired = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            expired = True
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
        stdout.seek(0)
        stderr.seek(0)
        done = subprocess.CompletedProcess(list(map(str, args)), process.returncode, stdout.read(), stderr.read())
    if expired:
        raise subprocess.TimeoutExpired(done.args, timeout, done.stdout, done.stderr)
    if check and done.returncode:
        said = f"{done.stdout}{done.stderr}".strip()
        raise LabError(f"{' '.join(done.args)} ended with {done.returncode}: {said}")
    return done
