"""How an ended unit's archive gets here: over the connection to its host, or by way of the campaign's bucket.

Either way it is one archive, which the host has announced by size and sha256, and which is held to both. A transfer that
broke off goes on where it stopped, whichever way it came until then.
"""

import glob
import hashlib
import json
import os
import shlex
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from fleet import answers
from fleet.errors import CloudError
from fleet.inventory import reach
from fleet.terms import HostState

if TYPE_CHECKING:
    from fleet.cloud.bucket import Bucket

BYTE_LIMIT = 4 * 2**30
"""Bytes that one unit may have."""
PACK_TIMEOUT, STALLED_S = 600.0, 15.0
"""Seconds that packing may take; without a sign of life."""
PUT_LIMIT = 5 * 10**9
"""Bytes that S3 takes at once; a larger archive comes by ssh."""
PUSH_TIMEOUT = 1800.0
"""Seconds that a host may take to put an archive into the bucket."""
PACKED_A_SECOND = 16 * 2**20
"""Bytes that a slow host packs in a second: it makes an archive anew up to the place where a transfer goes on."""
AT_ONCE = 4
"""Transfers side by side: they share one controller and its network."""
SIGN_OF_LIFE = "while sleep 2 </dev/null >/dev/null 2>&1; do echo; done & beat=$!; {}; code=$?; kill $beat; exit $code"
"""Empty lines before the JSON of a command that takes long: a frozen host is told from a busy one."""


class Packed(BaseModel):
    """What `pack` on a host says; the digest becomes part of a file name here."""

    size: NonNegativeInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Transfers:
    """Fetches archives, a few at a time; safe to call from several threads."""

    def __init__(self, incoming: Path, token: str, bucket: "Bucket | None", note: Callable[[str], None]) -> None:
        """`incoming` is the folder for archives, `token` the session's name; `note` is told what goes another way."""
        self._incoming, self._token, self._bucket, self._note = incoming, token, bucket, note
        self._flowing = threading.BoundedSemaphore(AT_ONCE)
        self._by_ssh: set[str] = set()
        """Hosts that could not use the bucket; they are not asked to again."""

    def fetch(self, connection: reach.Connection, work_dir: str, host: str, unit: str) -> Path:
        """The unit's archive, whole.

        Raises Unreachable when the host falls silent, and ValueError when it sends anything else than it announced.
        """
        harness = [f"{work_dir}/venv/bin/python", f"{work_dir}/harness/current"]
        where = [work_dir, self._token, unit]
        answer = _patiently(connection, [*harness, "pack", *where], timeout=PACK_TIMEOUT)
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
        push = [*harness, "push", *where]
        if self._came_by_bucket(connection, push, host=host, unit=unit, packed=packed, archive=archive):
            return archive
        with archive.open("ab") as sink:
            at = sink.tell()
            send = shlex.join([*harness, "send", *where, str(at)])
            self._flow(
                lambda: connection.copy(send, sink, limit=packed.size - at, stalled=STALLED_S + at / PACKED_A_SECOND)
            )
        if archive.stat().st_size < packed.size:
            raise reach.Unreachable(HostState.UNREACHABLE, "the transfer broke off")
        _hold(archive, packed)
        return archive

    def _came_by_bucket(
        self, connection: reach.Connection, push: list[str], *, host: str, unit: str, packed: Packed, archive: Path
    ) -> bool:
        """Whether the archive is here by way of the bucket; why it is not is noted, once for each host.

        Raises Unreachable when the host falls silent.
        """
        bucket = self._bucket
        if bucket is None or host in self._by_ssh or packed.size > PUT_LIMIT:
            return False
        had = archive.stat().st_size if archive.exists() else 0
        try:
            self._push(bucket, connection, push, unit, packed)
            with archive.open("ab") as sink:
                self._flow(lambda: bucket.fetch(unit, packed.sha256, sink, packed.size))
            _hold(archive, packed)
        except (CloudError, ValueError) as error:
            cause = error.message if isinstance(error, CloudError) else str(error)
            self._by_ssh.add(host)
            if archive.exists():
                # What somebody else may have put there is no beginning of anything.
                os.truncate(archive, had)
            self._note(f"{host}: not by way of s3://{bucket.name}: {cause}; its files come by ssh")
            return False
        return True

    def _push(self, bucket: "Bucket", connection: reach.Connection, push: list[str], unit: str, packed: Packed) -> None:
        """Have the host put it there. Raises ValueError when it could not, and CloudError."""
        address = bucket.address(unit, packed.sha256, packed.size)
        told = {"address": address, "size": packed.size, "sha256": packed.sha256}
        answer = _patiently(connection, push, timeout=PUSH_TIMEOUT, stdin=json.dumps(told).encode())
        if answer.rc:
            said = answer.err.strip().splitlines() or [f"pushing ended with {answer.rc}"]
            words = answers.one_line(said[-1])
            # Whatever a host says, nobody reads the address here.
            raise ValueError("it cannot push" if "amz-" in words.lower() or "signature" in words.lower() else words)

    def _flow(self, transfer: Callable[[], None]) -> None:
        # A place taken by a host that has just fallen silent is waited for no longer than that is noticed.
        slot = self._flowing.acquire(timeout=STALLED_S)
        try:
            transfer()
        finally:
            if slot:
                self._flowing.release()


def _patiently(connection: reach.Connection, command: list[str], *, timeout: float, stdin: bytes = b"") -> reach.Answer:
    text = SIGN_OF_LIFE.format(shlex.join(command))
    return connection.run(text, timeout=timeout, stdin=stdin, stalled=STALLED_S)


def _hold(archive: Path, packed: Packed) -> None:
    """Raise ValueError, the archive gone, when it is not what was announced."""
    with archive.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() == packed.sha256:
            return
    archive.unlink()
    raise ValueError("its sha256 is not the one announced")


def _read_packed(text: str) -> Packed:
    """What `pack` said. Raises ValueError, in one line that repeats nothing of it, when it cannot be read."""
    try:
        return Packed.model_validate_json(text)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = "".join(f"{part}: " for part in wrong["loc"])
        raise ValueError(f"the host's answer cannot be read: {where}{wrong['msg']}") from error
