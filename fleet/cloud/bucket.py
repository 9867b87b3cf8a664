"""Results by way of S3: hosts put archives of ended units into a bucket, and the controller fetches them from there.

An address that lets a host put an archive is a secret as long as it is good. It is good for that one archive, goes to
the host over the control channel's standard input, and is written nowhere.
"""

import base64
import hashlib
import http.client
import io
import re
import secrets
import urllib.error
import urllib.request
from typing import BinaryIO

from fleet.cloud import aws
from fleet.cloud_settings import CloudSettings, ResultsBucket
from fleet.errors import CloudError

ADDRESS_S = 3600
"""So long an address is good: a transfer must begin within it."""
CHECK_S = 20.0
"""Seconds that the tiny object of a check may take."""
_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,60})</Code>")


class Bucket:
    """Where a session's archives lie; no AWS is asked before the first use."""

    def __init__(self, settings: ResultsBucket, region: str, token: str) -> None:
        """`token` is the session's name; `region` the bucket's."""
        self.name, self.region = settings.bucket, region
        prefix = settings.prefix.strip("/")
        self._folder = f"{prefix}/{token}" if prefix else token

    def key(self, unit: str, sha256: str) -> str:
        """Where the archive with this digest lies in the bucket."""
        return f"{self._folder}/{unit}/{sha256}.tar"

    def address(self, unit: str, sha256: str, size: int) -> str:
        """Where exactly this archive may be put, with Content-Length and x-amz-checksum-sha256 as it has them: a secret.

        Raises CloudError.
        """
        return self._address(self.key(unit, sha256), sha256, size)

    def _address(self, key: str, sha256: str, size: int) -> str:
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        return self._s3.presigned(
            "put_object", seconds=ADDRESS_S, Bucket=self.name, Key=key, ContentLength=size, ChecksumSHA256=checksum
        )

    def fetch(self, unit: str, sha256: str, sink: BinaryIO, size: int) -> None:
        """Append what `sink` lacks of an archive of `size` bytes; a connection that breaks is gone on with.

        Raises CloudError when S3 refuses, has no such archive, or one of another size.
        """
        while (at := sink.tell()) < size:
            try:
                self._s3.download(
                    sink, limit=size - at, Bucket=self.name, Key=self.key(unit, sha256), Range=f"bytes={at}-"
                )
            except CloudError as error:
                if error.code != aws.NO_ANSWER or sink.tell() == at:
                    raise
            if sink.tell() == at:
                raise CloudError(f"s3://{self.name}: less than was announced")

    def check(self) -> None:
        """Put a tiny object as a host would, fetch it, and delete it.

        Raises CloudError that says what is wrong with the bucket, and what helps.
        """
        data = secrets.token_hex(16).encode()
        digest = hashlib.sha256(data).hexdigest()
        key = f"{self._folder}/check-{digest[:16]}"
        try:
            _put(self._address(key, digest, len(data)), data, digest)
            sink = io.BytesIO()
            self._s3.download(sink, limit=len(data), Bucket=self.name, Key=key)
            self._s3.call("delete_object", Bucket=self.name, Key=key)
        except CloudError as error:
            raise self._explained(error) from error
        if sink.getvalue() != data:
            raise CloudError(f"s3://{self.name} gives back something else than was put there")

    @property
    def _s3(self) -> aws.Client:
        return aws.client("s3", self.region)

    def _explained(self, error: CloudError) -> CloudError:
        where = f"cloud.results: s3://{self.name}"
        if error.code == "NoSuchBucket":
            hint = f"aws s3 mb s3://{self.name} --region {self.region}, or name another one"
            return CloudError(f"{where}: there is no such bucket", hint=hint, code=error.code)
        if error.code in {"AccessDenied", "AllAccessDisabled", "Forbidden"}:
            hint = f"allow s3:PutObject, s3:GetObject and s3:DeleteObject on arn:aws:s3:::{self.name}/*"
            return CloudError(f"{where}: access denied ({error.message})", hint=hint, code=error.code)
        if error.code in {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed"}:
            hint = "set cloud.results.region to the bucket's own"
            return CloudError(f"{where}: it is not in {self.region}", hint=hint, code=error.code)
        return CloudError(f"{where}: {error.message}", hint=error.hint, code=error.code)


def of_settings(settings: CloudSettings | None, token: str) -> Bucket | None:
    """The bucket that the campaign names; None where it names none."""
    if settings is None or settings.results is None:
        return None
    return Bucket(settings.results, settings.results.region or settings.regions[0], token)


def check(settings: CloudSettings | None) -> None:
    """See that results can go by way of the campaign's bucket, if it names one: before anything costs money.

    Raises CloudError.
    """
    if (bucket := of_settings(settings, "mlperf-fleet")) is not None:
        bucket.check()


def _put(address: str, data: bytes, sha256: str) -> None:
    """As a host does it. Raises CloudError, in words that do not repeat the address."""
    checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
    headers = {"x-amz-checksum-sha256": checksum, "Content-Type": "application/octet-stream"}
    request = urllib.request.Request(address, data=data, method="PUT", headers=headers)  # noqa: S310 - made by boto3
    try:
        with urllib.request.urlopen(request, timeout=CHECK_S):  # noqa: S310 - as above
            return
    except urllib.error.HTTPError as error:
        found = _CODE.search(error.read(4096))
        code = found[1].decode() if found else {301: "PermanentRedirect", 307: "TemporaryRedirect"}.get(error.code, "")
        raise CloudError(f"{error.code} {code}".strip(), code=code) from None
    except urllib.error.URLError as error:
        raise CloudError(f"no answer ({error.reason})", code=aws.NO_ANSWER) from None
    except (OSError, http.client.HTTPException) as error:
        raise CloudError(f"no answer ({type(error).__name__})", code=aws.NO_ANSWER) from None
