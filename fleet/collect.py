"""Bring finished units home and hold every file to the manifest. What comes from a host is not trusted."""

import hashlib
import lzma
import shutil
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pydantic import TypeAdapter, ValidationError

from fleet import handoff
from fleet.handoff import Collected, CollectedFile, UnitRecord
from fleet.harness.contract import FileEntry, RunManifest, RunSpec, UnitState, read_spec
from fleet.inventory import ssh_config
from fleet.plays import HostOutcome, PlayRequest, Plays
from fleet.session import Session
from fleet.terms import HostState
from fleet.watch import Watch

MEMBER_LIMIT, BYTE_LIMIT = 10_000, 4 * 2**30
"""Files and bytes that one host may send for one session."""


def collect(session: Session, plays: Plays, watch: Watch) -> dict[str, Collected]:
    """Fetch and verify the units that ran and are not home yet; one entry per planned unit."""
    watch.stage("collect", "files home, checked against their manifests")
    known, found = handoff.records(session), handoff.collected(session)
    wanted: dict[str, list[str]] = {}
    specs = {spec.unit: spec for spec in handoff.plan(session).units}
    for spec in specs.values():
        record = known.get(spec.unit)
        if spec.unit in found and found[spec.unit].complete and _is_of(session, found[spec.unit], spec):
            continue
        if record is not None and record.status is not None and record.state.ended:
            wanted.setdefault(spec.host, []).append(spec.unit)
        else:
            cause = (record.cause or str(record.state)) if record else "never started"
            found[spec.unit] = Collected(folder="", complete=False, cause=cause)
    outcomes = _fetch(session, plays, watch, wanted)
    for host, units in wanted.items():
        found.update(_unpack(session, host, units, outcomes[host], known))
        for unit in units:
            if found[unit].complete and not _is_of(session, found[unit], specs[unit]):
                found[unit] = replace(
                    found[unit], complete=False, cause="it ran by another spec than was planned: fleet run"
                )
        watch.host(host, f"{sum(found[unit].complete for unit in units)} of {len(units)} units verified", ended=True)
    session.write(session.collect / "collected.json", CollectedFile(units=found))
    return found


def _is_of(session: Session, home: Collected, spec: RunSpec) -> bool:
    """Whether what is home was made for this very spec: a unit may have run again since."""
    try:
        return handoff.same_run(read_spec(session.root / home.folder / "run_spec.json"), spec)
    except (OSError, ValueError, KeyError):
        return False


def _fetch(session: Session, plays: Plays, watch: Watch, wanted: dict[str, list[str]]) -> dict[str, HostOutcome]:
    incoming = session.collect / ".incoming"
    incoming.mkdir(parents=True, exist_ok=True)
    request = PlayRequest(
        playbook="collect",
        inventory=session.inventory / "hosts.yml",
        hosts=list(wanted),
        variables={
            "collect_session": session.token,
            "collect_units": wanted,
            "collect_incoming": str(incoming.resolve()),
        },
        folder=session.plays / "collect",
        ssh_arguments=ssh_config.ssh_arguments(),
    )
    return plays.run(request, lambda event: watch.host(event.host, event.task) if event.kind == "start" else None)


def _unpack(
    session: Session, host: str, units: list[str], outcome: HostOutcome, known: dict[str, UnitRecord]
) -> dict[str, Collected]:
    if outcome.state is not HostState.READY:
        return {unit: Collected(folder="", complete=False, cause=outcome.cause) for unit in units}
    archive = session.collect / ".incoming" / f"{host}.tar"
    staging = session.collect / ".incoming" / host
    shutil.rmtree(staging, ignore_errors=True)
    try:
        unpack(archive, staging, units)
    except (tarfile.TarError, OSError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        cause = f"the archive it sent cannot be used: {error}"
        return {unit: Collected(folder="", complete=False, cause=cause) for unit in units}
    finally:
        archive.unlink(missing_ok=True)
    found = {}
    for unit in units:
        source, target = staging / unit, session.collect / host / unit
        if not source.is_dir():
            found[unit] = Collected(folder="", complete=False, cause="the host has no files of it any more")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        source.replace(target)
        cause = verify(target) if known[unit].state is UnitState.DONE else known[unit].cause or str(known[unit].state)
        folder = target.relative_to(session.root).as_posix()
        found[unit] = Collected(folder=folder, complete=not cause, cause=cause)
    shutil.rmtree(staging, ignore_errors=True)
    return found


def unpack(archive: Path, target: Path, units: Iterable[str]) -> None:
    """Extract the regular files under the folders of `units`; nothing leaves `target`, no link is made.

    Raises ValueError when a member is anything else, or the archive exceeds the limits.
    """
    allowed = set(units)
    target.mkdir(parents=True)
    total = 0
    with tarfile.open(archive, "r:*") as opened:
        for number, member in enumerate(opened, start=1):
            parts = PurePosixPath(member.name).parts
            total += member.size
            if number > MEMBER_LIMIT or total > BYTE_LIMIT:
                raise ValueError(f"more than {MEMBER_LIMIT} files or {BYTE_LIMIT >> 30} GiB")
            if not (member.isfile() or member.isdir()):
                raise ValueError(f"{member.name!r} is neither file nor folder")
            if not parts or parts[0] not in allowed or ".." in parts or not member.name.isprintable():
                raise ValueError(f"{member.name!r} was not asked for")
            opened.extract(member, target, filter="data", set_attrs=False)


def verify(folder: Path) -> str:
    """Hold a unit's folder to its manifest; empty when every file matches, else the first difference."""
    try:
        manifest = TypeAdapter(RunManifest).validate_json((folder / "manifest.json").read_bytes())
    except FileNotFoundError:
        return "it has no manifest.json"
    except (ValidationError, OSError) as error:
        return f"manifest.json cannot be read: {str(error).splitlines()[0]}"
    if manifest.unit != folder.name:
        return f"manifest.json is of {manifest.unit!r}"
    if "run_spec.json" not in manifest.files or manifest.files["run_spec.json"].sha256 != manifest.spec_sha256:
        return "run_spec.json is not the one the manifest was written for"
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if unlisted := sorted(name for name in here - set(manifest.files) if not _is_supervisors(name)):
        return f"{unlisted[0]} is not in the manifest"
    return next(filter(None, (_difference(folder, name, entry) for name, entry in manifest.files.items())), "")


def _is_supervisors(name: str) -> bool:
    """Files that go on changing after the manifest was written, and the manifest itself."""
    return name in {"manifest.json", "status.json", "progress"} or name.endswith(".partial")


def _difference(folder: Path, name: str, entry: FileEntry) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return f"manifest.json names {name!r}"
    file = folder / name
    if not file.is_file():
        return f"{name} is in the manifest and not among the files"
    if file.stat().st_size != entry.size:
        return f"{name}: {file.stat().st_size} bytes, the manifest says {entry.size}"
    return "" if _sha256(file) == entry.sha256 else f"{name}: its sha256 is not the manifest's"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
