"""What a host leaves of a unit, honest or not, and archives of it."""

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from fleet.handoff import Plan, UnitRecord
from fleet.harness.contract import FileEntry, RunManifest, RunSpec, UnitState, UnitStatus, write_json
from fleet.session import Session
from tests.unit.fakes import scene
from tests.unit.results.session_files import Unit
from tests.unit.results.session_files import spec as make_spec

UNIT = "h01.tiny-bert.Offline.performance"


def member(name: str, data: bytes = b"x", **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    for key, value in more.items():
        setattr(entry, key, value)
    return entry, data


def packed(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for entry, data in members:
            archive.addfile(entry, io.BytesIO(data) if entry.isreg() else None)
    return path


def unit_folder(folder: Path, unit: str | None = None, **changes: Any) -> RunManifest:
    """A unit as its host leaves it."""
    (folder / "sub").mkdir(parents=True)
    write_json(folder / "run_spec.json", spec_of(unit or folder.name))
    (folder / "mlperf_log_detail.txt").write_bytes(b":::MLLOG {}\n" * 5)
    (folder / "sub" / "empty").write_bytes(b"")
    manifest = RunManifest(
        unit=unit or folder.name, spec_sha256=entry(folder / "run_spec.json").sha256, started_at=1.0, finished_at=2.0, loadgen_s=1.0,
        versions={}, accuracy={}, model={}, labels=(),
        files={
            path.relative_to(folder).as_posix(): entry(path) for path in sorted(folder.rglob("*")) if path.is_file()
        },
    )  # fmt: skip
    manifest = replace(manifest, **changes)
    write_json(folder / "manifest.json", manifest)
    return manifest


def entry(path: Path) -> FileEntry:
    return FileEntry(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size)


def spec_of(unit: str) -> RunSpec:
    return replace(make_spec("h01", Unit()), unit=unit)


def planned(base: Path, *units: str, state: UnitState = UnitState.DONE) -> Session:
    """A session whose run stage has been; `units` by full name."""
    session = scene(base).session
    session.write(session.run / "plan.json", Plan(quick=False, units=tuple(spec_of(unit) for unit in units)))
    for unit in units:
        record(session, unit, state)
    return session


def record(session: Session, unit: str, state: UnitState, cause: str = "") -> None:
    """What run left of a unit."""
    value = UnitRecord(
        unit=unit, host="h01", state=state, cause=cause,
        status=None if state is UnitState.NOT_READY else UnitStatus(unit=unit, state=state),
    )  # fmt: skip
    session.write(session.run / "units" / f"{unit}.json", value)


def archive_of(folder: Path, unit: str) -> bytes:
    """What the host's `pack` makes of a unit's folder."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for path in sorted((folder / unit).rglob("*")):
            archive.add(path, arcname=f"{unit}/{path.relative_to(folder / unit)}", recursive=False)
    return stream.getvalue()
