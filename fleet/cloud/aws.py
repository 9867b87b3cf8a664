"""The only way to AWS: clients, whole lists, and what AWS says as CloudError.

Credentials, profile and endpoints are boto3's own business: environment, ~/.aws, instance role, AWS_ENDPOINT_URL.
"""

import difflib
import functools
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import boto3
import botocore.config
import botocore.exceptions
import botocore.parsers

from fleet.errors import CloudError

_CONFIG = botocore.config.Config(
    connect_timeout=10,
    read_timeout=60,
    # Throttling (RequestLimitExceeded too), 5xx and broken connections are botocore's to repeat.
    retries={"mode": "adaptive", "total_max_attempts": 8},
    user_agent_extra="mlperf-fleet",
)
_S3 = _CONFIG.merge(
    botocore.config.Config(
        # Presigned for the bucket's own region: of its global name S3 sends on, which nobody follows with a PUT.
        signature_version="s3v4",
        s3={"addressing_style": "virtual", "us_east_1_regional_endpoint": "regional"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
)
_LOGIN = "aws configure, or set AWS_PROFILE"
_HINTS = {
    "AuthFailure": _LOGIN,
    "UnrecognizedClientException": _LOGIN,
    "InvalidClientTokenId": _LOGIN,
    "SignatureDoesNotMatch": _LOGIN,
    "ExpiredToken": "aws sso login, or renew your credentials, then the same command again",
    "ExpiredTokenException": "aws sso login, or renew your credentials, then the same command again",
    "RequestExpired": "renew your credentials or set this machine's clock, then the same command again",
    "UnauthorizedOperation": "ask for the permissions that docs/cloud.md lists",
    "AccessDenied": "ask for the permissions that docs/cloud.md lists",
    "AccessDeniedException": "ask for the permissions that docs/cloud.md lists",
    "AuthFailure.ServiceLinkedRoleCreationNotPermitted": (
        "aws iam create-service-linked-role --aws-service-name spot.amazonaws.com, once for the account"
    ),
    "OptInRequired": "enable the region for your account, or name another under cloud.regions",
}
EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired"})
"""Codes of credentials that were good and are not any more."""
TOO_MUCH = "TooMuch"
PIECE = 1 << 17
"""Bytes of a download that are in memory at once."""
NO_CREDENTIALS = "NoCredentials"
NO_ANSWER = "NoAnswer"
"""Our own codes, where AWS was not asked or did not answer: nobody knows whether the call was carried out."""


class Client:
    """One AWS service in one region; its methods are those of the API, and raise CloudError."""

    def __init__(self, service: str, region: str) -> None:
        self.service, self.region = service, region
        self._client = self._made(_S3 if service == "s3" else _CONFIG)

    def _made(self, config: botocore.config.Config) -> Any:
        # Not thread-safe while a client is made; the clients themselves are.
        with _said(f"{self.service} in {self.region}"), _MAKING:
            try:
                return _session().client(self.service, region_name=self.region, config=config)
            except ValueError as error:
                raise CloudError(
                    f"{self.service} in {self.region}: {error}", hint="look at AWS_ENDPOINT_URL"
                ) from error

    def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """One call, such as `run_instances`; its answer without metadata.

        Raises CloudError with AWS's code, or NO_ANSWER where it is not known whether it was carried out.
        """
        with _said(f"{operation} in {self.region}"):
            answer: dict[str, Any] = getattr(self._client, operation)(**arguments)
        answer.pop("ResponseMetadata", None)
        return answer

    def once(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """The same, tried once: for what has rules of its own for errors that botocore repeats, such as want of capacity.

        Raises CloudError.
        """
        with _said(f"{operation} in {self.region}"):
            answer: dict[str, Any] = getattr(self._impatient, operation)(**arguments)
        answer.pop("ResponseMetadata", None)
        return answer

    @functools.cached_property
    def _impatient(self) -> Any:
        return self._made(_CONFIG.merge(botocore.config.Config(retries={"mode": "standard", "total_max_attempts": 1})))

    def every(self, operation: str, key: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Every item under `key` of a paginated call, page after page.

        Raises CloudError.
        """
        with _said(f"{operation} in {self.region}"):
            for page in self._client.get_paginator(operation).paginate(**arguments):
                yield from page.get(key, ())

    def download(self, sink: BinaryIO, *, limit: int, **arguments: Any) -> None:
        """Write what `get_object` answers into `sink`, as it comes: `limit` bytes at the most.

        Raises CloudError; what came until then is in `sink`.
        """
        doing = f"get_object in {self.region}"
        with _said(doing):
            pieces = self._client.get_object(**arguments)["Body"].iter_chunks(PIECE)
        left = limit
        while True:
            with _said(doing):
                piece: bytes = next(pieces, b"")
            left -= len(piece)
            if left < 0:
                raise CloudError(f"{doing}: it sends more than it should", code=TOO_MUCH)
            if not piece:
                return
            sink.write(piece)

    def presigned(self, operation: str, *, seconds: int, **arguments: Any) -> str:
        """An address that does one call for whoever has it, for some time: a secret.

        Raises CloudError.
        """
        with _said(f"{operation} in {self.region}"):
            address: str = self._client.generate_presigned_url(operation, Params=arguments, ExpiresIn=seconds)
        return address


_MAKING = threading.RLock()


@functools.cache
def _session() -> Any:
    return boto3.session.Session()


@functools.cache
def client(service: str, region: str) -> Client:
    """The client of a service in a region; made once.

    Raises CloudError when there is no such region, or no credentials.
    """
    with _MAKING:
        with _said(f"{service} in {region}"):
            session = _session()
            # Of a partition's services some are in one region only; EC2 is in all, so its list is that of regions.
            known = session.get_available_regions("ec2")
            if region not in known and known and service == "ec2":
                close = difflib.get_close_matches(region, known, n=1)
                near = f", did you mean {close[0]}?" if close else ""
                text = f"there is no region {region}{near}"
                raise CloudError(text, hint=f"known: {', '.join(known)}", code="NoRegion")
            if session.get_credentials() is None:
                raise CloudError("no AWS credentials", hint=_LOGIN, code=NO_CREDENTIALS)
        return Client(service, region)


def home_region() -> str:
    """The region of environment or ~/.aws; where none is named, the oldest one."""
    return default_region() or "us-east-1"


def identity() -> str:
    """Who we are to AWS, in a word that may be a tag: the last part of the ARN.

    Raises CloudError.
    """
    arn = str(client("sts", home_region()).call("get_caller_identity")["Arn"])
    *path, name = arn.rsplit(":", 1)[-1].split("/")
    if path and path[0] == "assumed-role" and re.fullmatch(r"botocore-session-\d+|i-[0-9a-f]+", name):
        # Made up anew by every process, or the controller's own instance: the role is who launched, and reaps elsewhere.
        name = path[-1]
    # Names of IAM users may have commas; tags of EC2 may not.
    return name.replace(",", "_")


def default_region() -> str:
    """The region of the user's own environment or ~/.aws; empty when neither says one. AWS_REGION, as other SDKs read it.

    Raises CloudError when the profile that is asked for is not there.
    """
    with _said("your AWS configuration"), _MAKING:
        return str(os.environ.get("AWS_REGION") or _session().region_name or "")


@contextmanager
def _said(doing: str) -> Iterator[None]:
    """What boto3 raises, as CloudError."""
    try:
        yield
    except botocore.exceptions.ClientError as error:
        told: Mapping[str, Any] = error.response.get("Error", {})
        code = str(told.get("Code", ""))
        raise CloudError(f"{doing}: {code}: {told.get('Message', '')}", hint=_HINTS.get(code, ""), code=code) from error
    except (
        botocore.exceptions.NoCredentialsError,
        botocore.exceptions.PartialCredentialsError,
        botocore.exceptions.ProfileNotFound,
        botocore.exceptions.TokenRetrievalError,
    ) as error:
        raise CloudError(f"no AWS credentials ({error})", hint=_LOGIN, code=NO_CREDENTIALS) from error
    except (botocore.exceptions.BotoCoreError, botocore.parsers.ResponseParserError) as error:
        raise CloudError(f"{doing}: {error}", hint="the same command again", code=NO_ANSWER) from error
