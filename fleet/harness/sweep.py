"""Old things in a work folder: removed before the first unit is measured. What is not home is never touched."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fleet.harness import processes
from fleet.harness.unit_queue import locked

DAY = 86400.0
KEEP_DAYS = 14.0
"""For so long a session stays after all of it is home."""


def sweep(work: Path) -> None:
    """Remove temporary files, half-written ones, harnesses that nobody uses, and old sessions that are home.

    Whatever cannot be removed stays.
    """
    for path in [*_older(work / "tmp", DAY), *_partials(work)]:
        _remove(path)
    for path in _harnesses(work):
        _remove(path)
    for session in _older(work / "runs", KEEP_DAYS * DAY):
        # Under its lock nobody can be putting a unit there.
        with suppress(OSError), locked(session / "queue.lock"):
            if is_home(session):
                _remove(session)


def is_home(session: Path) -> bool:
    """Whether every unit of a session, measured anew or not, has been marked as home."""
    if not (session / "queue.json").is_file():
        return False
    units = [*_folders(session), *_folders(session / ".earlier")]
    return all((unit / "home").exists() for unit in units if unit.name != ".earlier")


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with suppress(OSError), os.scandir(folder) as entries:
        yield from entries


def _folders(folder: Path) -> list[Path]:
    return [Path(found.path) for found in _entries(folder) if found.is_dir(follow_symlinks=False)]


def _older(folder: Path, seconds: float) -> list[Path]:
    """What in `folder` was last changed so long ago."""
    before, found = time.time() - seconds, []
    for entry in _entries(folder):
        with suppress(OSError):
            if entry.stat(follow_symlinks=False).st_mtime < before:
                found.append(Path(entry.path))
    return found


def _partials(work: Path) -> list[Path]:
    """Files that were being written when their writer died, in the sessions that are there."""
    before, found = time.time() - DAY, []
    for session in _folders(work / "runs"):
        for folder in [session, *_folders(session)]:
            for entry in _entries(folder):
                with suppress(OSError):
                    if entry.name.endswith(".partial") and entry.stat(follow_symlinks=False).st_mtime < before:
                        found.append(Path(entry.path))
    return found


def _harnesses(work: Path) -> list[Path]:
    """Unpacked harnesses that are neither current nor run by anybody, and were not unpacked just now."""
    current = (work / "harness" / "current").resolve()
    # By the inode's time: unpacking sets the folder's own to what the archive says.
    old = [path for path in _folders(work / "harness") if path.lstat().st_ctime < time.time() - DAY]
    return [path for path in old if path.resolve() != current and not processes.uses(path.resolve())]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
