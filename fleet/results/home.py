"""What came home of a unit, held to its manifest and to the plan. Files of hosts are not trusted.

A file that is missing, broken, too big, outside the session or not what the manifest says is the unit's cause, never an
exception and never a number.
"""

import dataclasses
import hashlib
from pathlib import Path, PurePosixPath

from fleet import handoff
from fleet.errors import ResultsError, SessionError
from fleet.handoff import Collected, UnitRecord
from fleet.harness.contract import FileEntry, RunManifest, RunSpec
from fleet.results import accuracy, loadgen_log
from fleet.results.records import LoadgenSummary
from fleet.session import Session
from fleet.terms import Mode, Reason

MAX_FILE_BYTES = 256 * 2**20
"""Of a file that is read whole. Detail logs of the models here are below 1 MB; one full of errors is not this long."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UnitFiles:
    """All there is of one unit, read but not judged."""

    run: UnitRecord | None = None
    """What the run stage last knew of it; None when it never looked."""
    folder: str = ""
    cause: str = ""
    """Why the collected files are missing or cannot be used; empty when they can."""
    reason: Reason = Reason.NONE
    """The same for machines."""
    manifest: RunManifest | None = None
    summary: LoadgenSummary | None = None
    accuracy: dict[str, float] = dataclasses.field(default_factory=dict)


def read(session: Session, spec: RunSpec, run: UnitRecord | None, collected: Collected | None) -> UnitFiles:
    """Everything that is known of a unit; what is wrong with its files is the answer's cause."""
    if collected is None:
        return UnitFiles(run=run, cause="not collected", reason=Reason.OTHER)
    another_lock = collected.reason is Reason.LOCK_CHANGED
    if not collected.complete and not another_lock:
        cause = f"not collected: {collected.cause or 'files are missing or changed'}"
        reason = Reason.CORRUPT_FILES if collected.folder else Reason.OTHER
        return UnitFiles(run=run, folder=collected.folder, cause=cause, reason=collected.reason or reason)
    relative = ""
    try:
        folder = _inside(session, collected.folder)
        relative = collected.folder
        changed = handoff.difference(session.read(_file(session, folder / "run_spec.json"), RunSpec), spec)
        if changed or another_lock:
            cause = f"it ran under another lock than is planned now: {changed or collected.cause}"
            return UnitFiles(run=run, folder=relative, cause=cause, reason=Reason.LOCK_CHANGED)
        manifest = session.read(_file(session, folder / "manifest.json"), RunManifest)
        _hold(session, folder, manifest.files)
        return UnitFiles(
            run=run,
            folder=relative,
            manifest=manifest,
            summary=loadgen_log.summarise(_text(session, folder / "mlperf_log_detail.txt")),
            accuracy=_accuracy(session, folder) if spec.mode is Mode.ACCURACY else {},
        )
    except (ResultsError, SessionError, OSError) as error:
        message = error.message if isinstance(error, ResultsError | SessionError) else str(error)
        cause = f"collected, but {message}"
        return UnitFiles(run=run, folder=relative, cause=cause, reason=Reason.CORRUPT_FILES)


def _hold(session: Session, folder: Path, files: dict[str, FileEntry]) -> None:
    """Raise ResultsError when a file is not what the manifest says: disks lose data after files came home, too."""
    for name, entry in files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ResultsError(f"its manifest names {name!r}")
        path = _plain(session, folder / name)
        if (size := path.stat().st_size) != entry.size:
            cut = "is cut off" if size < entry.size else "has grown"
            raise ResultsError(f"{name} {cut}: {size} bytes, the manifest says {entry.size}")
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:
                raise ResultsError(f"{name} was changed: its sha256 is not the manifest's")


def _accuracy(session: Session, folder: Path) -> dict[str, float]:
    path = folder / "accuracy.txt"
    return accuracy.parse(_text(session, path)) if path.exists() else {}


def _inside(session: Session, relative: str) -> Path:
    folder = session.root / relative
    if not folder.resolve().is_relative_to(session.collect.resolve()):
        raise ResultsError(f"{relative!r} is not inside collect/")
    return folder


def _plain(session: Session, path: Path) -> Path:
    """The path, when it is a plain file of the session: a host may have sent a link."""
    if not path.is_file():
        raise ResultsError(f"{path.name} is missing")
    if not path.resolve().is_relative_to(session.collect.resolve()):
        raise ResultsError(f"{path.name} points outside the session")
    return path


def _file(session: Session, path: Path) -> Path:
    """A plain file of bounded size."""
    if (size := _plain(session, path).stat().st_size) > MAX_FILE_BYTES:
        raise ResultsError(f"{path.name} has {size} bytes, more than {MAX_FILE_BYTES}")
    return path


def _text(session: Session, path: Path) -> str:
    # LoadGen writes ASCII; anything else becomes a replacement sign instead of a reason to lose the unit
    return _file(session, path).read_text(encoding="utf-8", errors="replace")
