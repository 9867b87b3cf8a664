"""Bring ended units home and hold every file to the manifest. What comes from a host is not trusted.

A unit is fetched over the poll's own connection as soon as it ends, while its host works on the next; the collect
stage fetches what that left, say from a host that was away.
"""

import glob
import hashlib
import shlex
import shutil
import tarfile
import threading
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import BaseModel, Field, NonNegativeInt, TypeAdapter, ValidationError

from fleet import handoff
from fleet.handoff import Collected, CollectedFile, UnitRecord
from fleet.harness.contract import FileEntry, RunManifest, RunSpec, UnitState, read_spec
from fleet.inventory import files, reach
from fleet.inventory.hosts import Host
from fleet.session import Session
from fleet.subset import EVERYTHING, Subset
from fleet.terms import HostState
from fleet.watch import Watch

MEMBER_LIMIT, BYTE_LIMIT = 10_000, 4 * 2**30
"""Files and bytes that one unit may have."""
PACK_TIMEOUT = 600.0
AT_ONCE = 4
"""Hosts fetched from side by side: the transfers share one controller and its network."""


class _Packed(BaseModel):
    """What `pack` on a host says; the digest becomes part of a file name here."""

    archive: str
    size: NonNegativeInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Collector:
    """Brings units home one by one, over whatever connection is open; safe to call from several threads."""

    def __init__(self, session: Session, planned: Mapping[str, RunSpec] | None = None) -> None:
        """`planned` by unit instead of the plan's own, where it is still growing."""
        self._session = session
        self._incoming = session.collect / ".incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        self._specs = {spec.unit: spec for spec in handoff.plan(session).units} if planned is None else planned
        self._lock = threading.Lock()
        self.found = handoff.collected(session)

    def is_home(self, unit: str) -> bool:
        """Whether the unit's files are here, verified, and made for the spec that is planned now."""
        return unit in self.found and self.found[unit].complete and self._is_of(unit, self.found[unit])

    def _is_of(self, unit: str, home: Collected) -> bool:
        try:
            spec = read_spec(self._session.root / home.folder / "run_spec.json")
        except (OSError, ValueError, KeyError):
            return False
        return handoff.same_run(spec, self._specs[unit])

    def note(self, unit: str, home: Collected) -> Collected:
        """Keep what is known of a unit's files, in memory and on disk."""
        with self._lock:
            self.found[unit] = home
            self._session.write(self._session.collect / "collected.json", CollectedFile(units=self.found))
        return home

    def bring(self, connection: reach.Connection, work_dir: str, record: UnitRecord) -> Collected:
        """Fetch, unpack and verify one ended unit; what goes wrong is the answer's cause, never an exception."""
        unit = record.unit
        try:
            archive = self._fetch(connection, work_dir, unit)
            home = self._unpack(archive, record)
        except reach.Unreachable as error:
            home = Collected(folder="", complete=False, cause=f"while its files were fetched: {error.cause}")
        except (tarfile.TarError, OSError, ValueError, EOFError, zlib.error) as error:
            home = Collected(folder="", complete=False, cause=f"the archive it sent cannot be used: {error}")
        return self.note(unit, home)

    def _fetch(self, connection: reach.Connection, work_dir: str, unit: str) -> Path:
        """The unit's archive, whole; a transfer that broke off goes on where it stopped.

        Raises Unreachable when the host falls silent, and ValueError when it sends anything else than it announced.
        """
        command = [f"{work_dir}/venv/bin/python", f"{work_dir}/harness/current", "pack", work_dir]
        answer = connection.run(shlex.join([*command, self._session.token, unit]), timeout=PACK_TIMEOUT)
        if answer.rc:
            raise ValueError((answer.err.strip().splitlines() or [f"packing ended with {answer.rc}"])[-1][:300])
        packed = _read_packed(answer.out)
        if packed.size > BYTE_LIMIT:
            raise ValueError(f"more than {BYTE_LIMIT >> 30} GiB")
        # The digest is in the name, so that a part of other content is never gone on with.
        archive = self._incoming / f"{unit}.{packed.sha256}.tar"
        for other in self._incoming.glob(f"{glob.escape(unit)}.*.tar"):
            if other != archive:
                other.unlink()
        with archive.open("ab") as sink:
            at = sink.tell()
            connection.copy(f"tail -c +{at + 1} {shlex.quote(packed.archive)}", sink, limit=packed.size - at)
        if archive.stat().st_size < packed.size:
            raise reach.Unreachable(HostState.UNREACHABLE, "the transfer broke off")
        if _sha256(archive) != packed.sha256:
            archive.unlink()
            raise ValueError("its sha256 is not the one announced")
        connection.run(f"rm -f {shlex.quote(packed.archive)}", timeout=PACK_TIMEOUT)
        return archive

    def _unpack(self, archive: Path, record: UnitRecord) -> Collected:
        unit, session = record.unit, self._session
        staging = self._incoming / unit
        shutil.rmtree(staging, ignore_errors=True)
        try:
            unpack(archive, staging, [unit])
            if not (staging / unit).is_dir():
                return Collected(folder="", complete=False, cause="the host has no files of it any more")
            target = session.collect / record.host / unit
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            (staging / unit).replace(target)
        finally:
            archive.unlink(missing_ok=True)
            shutil.rmtree(staging, ignore_errors=True)
        cause = verify(target) if record.state is UnitState.DONE else record.cause or str(record.state)
        home = Collected(folder=target.relative_to(session.root).as_posix(), complete=not cause, cause=cause)
        if home.complete and not self._is_of(unit, home):
            return replace(home, complete=False, cause="it ran by another spec than was planned: fleet run")
        return home


def _read_packed(text: str) -> _Packed:
    """What `pack` said. Raises ValueError, in one line that repeats nothing of it, when it cannot be read."""
    try:
        return _Packed.model_validate_json(text)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = "".join(f"{part}: " for part in wrong["loc"])
        raise ValueError(f"the host's answer cannot be read: {where}{wrong['msg']}") from error


def collect(session: Session, watch: Watch, subset: Subset = EVERYTHING) -> dict[str, Collected]:
    """Fetch and verify what ran and is not home yet; one entry per planned unit. Only hosts of `subset` are asked."""
    watch.stage("collect", "files home, checked against their manifests")
    collector = Collector(session)
    known = handoff.records(session)
    wanted: dict[str, list[UnitRecord]] = {}
    for spec in handoff.plan(session).units:
        record = known.get(spec.unit)
        if collector.is_home(spec.unit):
            continue
        if cause := subset.left_out(spec.host):
            collector.note(spec.unit, Collected(folder="", complete=False, cause=cause))
            continue
        if record is not None and record.status is not None and record.state.ended:
            wanted.setdefault(spec.host, []).append(record)
        else:
            cause = (record.cause or str(record.state)) if record else "never started"
            collector.note(spec.unit, Collected(folder="", complete=False, cause=cause))
    work_dirs = {item.host: item.work_dir for item in handoff.readiness(session)} if wanted else {}
    hosts = [host for host in files.hosts(session) if host.name in wanted] if wanted else []
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        list(pool.map(lambda host: _from_host(collector, host, work_dirs[host.name], wanted[host.name], watch), hosts))
    return collector.found


def _from_host(collector: Collector, host: Host, work_dir: str, records: list[UnitRecord], watch: Watch) -> None:
    try:
        connection = reach.connect(host)
    except reach.Unreachable as error:
        for record in records:
            collector.note(record.unit, Collected(folder="", complete=False, cause=error.cause))
        watch.host(host.name, error.cause, ended=True)
        return
    try:
        for number, record in enumerate(records):
            watch.host(host.name, f"fetching {record.unit}", fraction=number / len(records))
            collector.bring(connection, work_dir, record)
    finally:
        connection.close()
    verified = sum(collector.found[record.unit].complete for record in records)
    watch.host(host.name, f"{verified} of {len(records)} units verified", ended=True)


def unpack(archive: Path, target: Path, units: Iterable[str]) -> None:
    """Extract the regular files under the folders of `units`; nothing leaves `target`, no link is made.

    Raises ValueError when a member is anything else, or the archive exceeds the limits.
    """
    allowed = set(units)
    target.mkdir(parents=True)
    total = 0
    with tarfile.open(archive, "r:gz") as opened:
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
