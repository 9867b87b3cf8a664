"""Bring ended units home and hold every file to the manifest. What comes from a host is not trusted.

A unit is fetched over the poll's own connection as soon as it ends, while its host works on the next; the collect
stage fetches what that left, say from a host that was away, and asks such a host what became of its units.

Nothing that came home is ever deleted: what makes room for a later attempt goes to collect/.earlier/.
"""

import errno
import glob
import hashlib
import shlex
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from fleet import answers, handoff, retries, threads
from fleet import campaign as campaigns
from fleet.errors import ResultsError
from fleet.handoff import Collected, CollectedFile, UnitRecord
from fleet.harness.contract import FileEntry, Reason, RunManifest, RunSpec, UnitState
from fleet.inventory import files, reach
from fleet.inventory.hosts import Host
from fleet.results import loadgen_log
from fleet.results.home import MAX_FILE_BYTES
from fleet.session import Session
from fleet.subset import EVERYTHING, Subset
from fleet.terms import HostState
from fleet.transfers import BYTE_LIMIT, Transfers
from fleet.watch import Watch

if TYPE_CHECKING:
    from fleet.cloud.bucket import Bucket

MEMBER_LIMIT, DEPTH_LIMIT, ASK_S = 10_000, 32, 15.0
"""Files that one unit may have, folders that one may lie in; seconds that a question may take."""
OURS = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
}  # fmt: skip
"""What is the matter with this machine; every other error of files is made by the names and kinds that a host sends."""
READ_WHOLE = ("manifest.json", "run_spec.json", "mlperf_log_detail.txt")
_SPEC = TypeAdapter(RunSpec)


class Collector:
    """Brings units home one by one, over whatever connection is open; safe to call from several threads."""

    def __init__(
        self,
        session: Session,
        planned: Mapping[str, RunSpec] | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`planned` by unit instead of the plan's own, where it is still growing; `note` is told what a person is to know."""
        self.session = session
        self._incoming = session.collect / ".incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        self._specs = {spec.unit: spec for spec in handoff.plan(session).units} if planned is None else planned
        self._lock = threading.Lock()
        self._transfers = Transfers(self._incoming, session.token, _bucket(session), note)
        self.found = handoff.collected(session)

    def is_home(self, unit: str) -> bool:
        """Whether files of any of the unit's starts are here, verified, and made for the spec that is planned now."""
        home = self.found.get(unit)
        return home is not None and home.complete and self._spec(unit, home.folder) is not None

    def has(self, record: UnitRecord) -> bool:
        """The same of the very start that `record` is of."""
        return self.is_home(record.unit) and handoff.is_from(self.found[record.unit], record)

    def _spec(self, unit: str, folder: str) -> RunSpec | None:
        """What the files were made for; None when that is not what is planned now."""
        try:
            spec = _SPEC.validate_json((self.session.root / folder / "run_spec.json").read_bytes())
            return spec if unit in self._specs and handoff.same_run(spec, self._specs[unit]) else None
        except (OSError, ValueError, RecursionError):
            return None

    def note(self, unit: str, home: Collected) -> Collected:
        """Keep what is known of a unit's files, in memory and on disk."""
        with self._lock:
            if not home.folder and unit in self.found:
                # Logs of a failed unit that came home earlier are still there.
                home = replace(home, folder=self.found[unit].folder)
            self.found[unit] = home
            self.session.write(self.session.collect / "collected.json", CollectedFile(units=self.found))
        return home

    def bring(self, connection: reach.Connection, work_dir: str, record: UnitRecord) -> Collected:
        """Fetch, unpack and verify one ended unit; what goes wrong is the answer's cause, never an exception.

        Whether LoadGen says VALID is looked at as well: a complete unit may have the reason INVALID_RESULT.
        """
        unit = record.unit
        try:
            archive = self._transfers.fetch(connection, work_dir, record.host, unit)
            home = self._unpack(archive, record)
            if home.complete or (home.folder and record.state is not UnitState.DONE):
                self._tell_host(connection, work_dir, unit)
        except reach.Unreachable as error:
            cause = f"while its files were fetched: {error.cause}"
            home = Collected(folder="", complete=False, cause=cause, reason=Reason.UNREACHABLE)
        except Exception as error:  # noqa: BLE001 - whatever a host's files provoke, it ends no other unit
            home = self._not_taken(error)
        with suppress(OSError):
            # What is here stays known, whatever became of a further attempt.
            if home.complete or not self.is_home(unit):
                self.note(unit, home)
        return home

    def _not_taken(self, error: Exception) -> Collected:
        """Why files could not be taken: what is the matter with this machine, or with what its host sent."""
        if _is_ours(error):
            # Not the host's fault, and no reason to stop asking the others.
            cause = (
                f"on this machine: {getattr(error, 'strerror', '') or error}: free some space in {self.session.collect}"
            )
            return Collected(folder="", complete=False, cause=cause, reason=Reason.NO_SPACE)
        cause = answers.one_line(f"the archive it sent cannot be used: {str(error) or type(error).__name__}")
        reason = Reason.NO_SPACE if "No space left" in cause else Reason.CORRUPT_FILES
        return Collected(folder="", complete=False, cause=cause, reason=reason)

    def missing(self, unit: str, cause: str, reason: Reason = Reason.NONE) -> None:
        """Keep why a unit's files are not here, unless they are."""
        if not self.is_home(unit):
            self.note(unit, Collected(folder="", complete=False, cause=cause, reason=reason))

    def _tell_host(self, connection: reach.Connection, work_dir: str, unit: str) -> None:
        """That the unit's files are here, so that the host may delete them some day; it need not have heard."""
        python, harness = f"{work_dir}/venv/bin/python", f"{work_dir}/harness/current"
        with suppress(reach.Unreachable):
            command = ["nice", "-n", "19", python, harness, "home", work_dir, self.session.token, unit]
            connection.run(shlex.join(command), timeout=ASK_S)

    def _unpack(self, archive: Path, record: UnitRecord) -> Collected:
        """Put a unit's files where they belong. Raises OSError when there is no room, what was there being there still."""
        unit, session = record.unit, self.session
        staging = self._incoming / unit
        shutil.rmtree(staging, ignore_errors=True)
        try:
            unpack(archive, staging, [unit])
            fresh = staging / unit
            if not fresh.is_dir():
                cause = "the host has no files of it any more"
                archive.unlink()
                return Collected(folder="", complete=False, cause=cause, reason=Reason.CORRUPT_FILES)
            cause = verify(fresh) if record.state is UnitState.DONE else record.cause or str(record.state)
            target = session.collect / record.host / unit
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = target.relative_to(session.root).as_posix()
            if target.is_dir() and _digests(target) == _digests(fresh):
                shutil.rmtree(target)
            elif target.is_dir():
                if cause and self.is_home(unit):
                    # An attempt that failed never takes the place of one that did not.
                    if not self._is_kept(unit, fresh):
                        fresh.replace(self._earlier(unit, fresh))
                    archive.unlink()
                    return self.found[unit]
                target.replace(self._earlier(unit, target))
            fresh.replace(target)
            archive.unlink()
        except Exception as error:
            if not _is_ours(error):
                archive.unlink(missing_ok=True)
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if cause:
            reason = Reason.CORRUPT_FILES if record.state is UnitState.DONE else record.reason
            return Collected(folder=folder, complete=False, cause=cause, reason=reason)
        if (spec := self._spec(unit, folder)) is None:
            other = "it ran by another spec than was planned: fleet run"
            return Collected(folder=folder, complete=False, cause=other, reason=Reason.LOCK_CHANGED)
        invalid = _invalid(target)
        reason = Reason.INVALID_RESULT if invalid else Reason.NONE
        return Collected(folder=folder, complete=True, cause=invalid, reason=reason, attempt=max(1, spec.attempt))

    def _is_kept(self, unit: str, folder: Path) -> bool:
        """Whether the same files lie in collect/.earlier/ already, as those of a host that is asked again."""
        kept, fresh = (self.session.collect / ".earlier").glob(f"{glob.escape(unit)}.*"), _digests(folder)
        return any(_digests(other) == fresh for other in kept)

    def _earlier(self, unit: str, folder: Path) -> Path:
        """A free place for files of `unit` that make room: collect/.earlier/<unit>.<sha256 of its spec, 12>.<number>."""
        parent = self.session.collect / ".earlier"
        parent.mkdir(exist_ok=True)
        spec = folder / "run_spec.json"
        digest = _sha256(spec)[:12] if spec.is_file() else "unknown"
        number = 1
        while (place := parent / f"{unit}.{digest}.{number}").exists():
            number += 1
        return place


def _is_ours(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in OURS


def _digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in folder.rglob("*") if path.is_file()}


def _invalid(folder: Path) -> str:
    """Why LoadGen says INVALID of a unit; empty when it does not, or was not asked, or its log is the results' affair."""
    try:
        summary = loadgen_log.summarise(
            (folder / "mlperf_log_detail.txt").read_text(encoding="utf-8", errors="replace")
        )
    except (OSError, ResultsError):
        return ""
    return answers.one_line(f"INVALID: {'; '.join(summary.invalid_reasons)}") if summary.valid is False else ""


def _bucket(session: Session) -> "Bucket | None":
    """Where hosts put archives, if the session's campaign says so."""
    text = campaigns.read_text(session.campaign_file)
    settings = campaigns.load_text(text, session.campaign_file.name).cloud
    if settings is None or settings.results is None:
        return None
    # Importing boto3 takes a while, and few campaigns need it here.
    from fleet.cloud import bucket

    return bucket.of_settings(settings, session.token)


def collect(session: Session, watch: Watch, subset: Subset = EVERYTHING) -> dict[str, Collected]:
    """Fetch and verify what ran and is not home yet; one entry per planned unit. Only hosts of `subset` are asked.

    A host that was lost, or that nobody watched to the end, is asked anew what became of its units.
    """
    watch.stage("collect", "files home, checked against their manifests")
    collector = Collector(session, note=watch.note)
    known = handoff.records(session)
    wanted: dict[str, list[UnitRecord]] = {}
    for spec in handoff.plan(session).units:
        record = known.get(spec.unit)
        if collector.is_home(spec.unit) if record is None else collector.has(record) and not _may_be_there(record):
            continue
        if cause := subset.left_out(spec.host):
            if spec.unit not in collector.found:
                collector.note(spec.unit, Collected(folder="", complete=False, cause=cause))
            continue
        if record is not None and (_may_be_there(record) or (record.status is not None and record.state.ended)):
            wanted.setdefault(spec.host, []).append(record)
        else:
            cause = (record.cause or str(record.state)) if record else "never started"
            collector.missing(spec.unit, cause, record.reason if record else Reason.NONE)
    work_dirs = {item.host: item.work_dir for item in handoff.readiness(session)} if wanted else {}
    hosts = [host for host in files.hosts(session) if host.name in wanted] if wanted else []

    def fetch(host: Host) -> None:
        specs = {spec.unit: spec for spec in handoff.plan(session).units if spec.host == host.name}
        work_dir = work_dirs.get(host.name) or next(iter(specs.values())).work_dir
        _from_host(collector, host, work_dir, wanted[host.name], watch)

    for _ in threads.each(fetch, hosts):
        pass
    return collector.found


def _may_be_there(record: UnitRecord) -> bool:
    """Whether a host may have run a unit although this side never heard of it.

    Among them units that it had been given, and that this side then left out, or found it not ready to go on with.
    """
    if record.state in {UnitState.NOT_READY, UnitState.LEFT_OUT}:
        return record.status is not None
    return record.state in {UnitState.QUEUED, UnitState.RUNNING, UnitState.UNREACHABLE}


def _from_host(collector: Collector, host: Host, work_dir: str, records: list[UnitRecord], watch: Watch) -> None:
    left = [record.unit for record in records]
    verified = 0
    try:
        connection = reach.connect(host)
        try:
            for number, record in enumerate(_asked_anew(connection, collector.session, work_dir, records)):
                watch.host(host.name, f"fetching {record.unit}", fraction=number / len(records))
                # What becomes of it is kept from here on, also when the host then falls silent.
                left.remove(record.unit)
                _fetch(collector, connection, work_dir, record)
                verified += collector.has(record)
        finally:
            connection.close()
    except reach.Unreachable as error:
        for unit in left:
            collector.missing(unit, error.cause, Reason.UNREACHABLE)
        if len(left) == len(records):
            watch.host(host.name, error.cause, ended=True)
            return
    watch.host(host.name, f"{verified} of {len(records)} units verified", ended=True)


def _fetch(collector: Collector, connection: reach.Connection, work_dir: str, record: UnitRecord) -> None:
    """Bring one unit. Raises Unreachable when the host has fallen silent."""
    if not record.state.ended:
        wait = f"fleet bench --session {collector.session.id}"
        collector.missing(record.unit, f"still {record.state} there, as far as is known: {wait}", record.reason)
    elif not collector.has(record):
        home = collector.bring(connection, work_dir, record)
        if home.reason is Reason.UNREACHABLE:
            # One transfer may break off; a host that says nothing at all is not asked for each unit that is left.
            connection.run("true", timeout=ASK_S)


def _asked_anew(
    connection: reach.Connection, session: Session, work_dir: str, records: list[UnitRecord]
) -> list[UnitRecord]:
    """The records, brought up to date where the host was not heard to the end. Raises Unreachable when it is silent."""
    asked = [record.unit for record in records if not record.state.ended or _may_be_there(record)]
    if not asked:
        return records
    question = answers.question(f"{work_dir}/runs/{session.token}", asked)
    word = answers.parse(connection.run(question, timeout=ASK_S).out)
    if not word.uptime:
        raise reach.Unreachable(HostState.UNREACHABLE, "its answer cannot be read")
    found = []
    for record in records:
        updated = record
        # Of a unit that never came to the host there is nothing to say but what is known.
        if record.unit in asked and record.unit in word.statuses:
            # What this side called an end was none of the host's.
            updated = answers.update(replace(record, state=UnitState.UNREACHABLE), word)
            updated = retries.settled(updated) if updated.state.ended else updated
            if updated != record:
                session.write(session.run / "units" / f"{record.unit}.json", updated)
        found.append(updated)
    return found


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
            if member.size < 0:
                raise ValueError(f"{member.name!r} has {member.size} bytes")
            if number > MEMBER_LIMIT or total > BYTE_LIMIT:
                raise ValueError(f"more than {MEMBER_LIMIT} files or {BYTE_LIMIT >> 30} GiB")
            if not (member.isfile() or member.isdir()):
                raise ValueError(f"{member.name!r} is neither file nor folder")
            if len(parts) > DEPTH_LIMIT:
                raise ValueError(f"a file in more than {DEPTH_LIMIT} folders")
            if not parts or parts[0] not in allowed or ".." in parts or not member.name.isprintable():
                raise ValueError(f"{member.name!r} was not asked for")
            opened.extract(member, target, filter="data", set_attrs=False)


def verify(folder: Path) -> str:
    """Hold a unit's folder to its manifest; empty when every file matches, else the first difference."""
    if long := [path for name in READ_WHOLE if (path := folder / name).is_file() and _size(path) > MAX_FILE_BYTES]:
        return f"{long[0].name} has {_size(long[0])} bytes, more than {MAX_FILE_BYTES}"
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
    unlisted = (name for name in sorted(here - set(manifest.files)) if not _is_supervisors(name))
    found = (_difference(folder, name, entry) for name, entry in manifest.files.items())
    return next(chain((f"{name} is not in the manifest" for name in unlisted), filter(None, found)), "")


def _size(path: Path) -> int:
    return path.stat().st_size


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
    if _size(file) != entry.size:
        return f"{name}: {_size(file)} bytes, the manifest says {entry.size}"
    return "" if _sha256(file) == entry.sha256 else f"{name}: its sha256 is not the manifest's"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
