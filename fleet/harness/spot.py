"""Whether EC2 takes this instance back: asked of the instance metadata service (IMDSv2) while units run.

A notice comes two minutes before the instance ends. A recommendation to rebalance is none, and is not asked for.
"""

import json
import os
import threading
import urllib.error
import urllib.request
from http import HTTPStatus

from fleet.harness.contract import Market

ENDPOINT = "http://169.254.169.254"
ENDPOINT_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
"""Another address of the metadata service, as AWS's own tools take it."""
ASK_SECONDS = 5.0
TIMEOUT_S = 1.0
"""The service is on the machine itself, or not at all."""
TOKEN_SECONDS = 6 * 3600
ANSWER_LIMIT = 4096
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Whatever proxy a host uses, it is not the way to its own metadata."""


class Metadata:
    """IMDSv2. Every method raises OSError when the service does not answer, or says no."""

    def __init__(self, endpoint: str = "") -> None:
        self._endpoint = (endpoint or os.environ.get(ENDPOINT_VARIABLE) or ENDPOINT).rstrip("/")
        self._token = ""

    def read(self, path: str) -> str | None:
        """The text at `path` below latest/meta-data/; None where there is nothing."""
        for _ in range(2):
            if not self._token:
                lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
                self._token = self._ask("PUT", "api/token", lifetime)
            try:
                return self._ask("GET", f"meta-data/{path}", {"X-aws-ec2-metadata-token": self._token})
            except urllib.error.HTTPError as error:
                if error.code == HTTPStatus.NOT_FOUND:
                    return None
                if error.code != HTTPStatus.UNAUTHORIZED:
                    raise
                self._token = ""  # It has run out.
        raise PermissionError("the metadata service takes no token")

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> str:
        # http as AWS has it, or as this machine's own environment says.
        request = urllib.request.Request(f"{self._endpoint}/latest/{path}", method=method, headers=headers)  # noqa: S310
        with _DIRECT.open(request, timeout=TIMEOUT_S) as answer:
            text: bytes = answer.read(ANSWER_LIMIT)
            return text.decode("utf-8", "replace")


class Watcher:
    """Asks in a thread of its own, of the supervisor: nothing waits for it, and a unit's process knows nothing of it."""

    def __init__(self, metadata: Metadata | None = None) -> None:
        self._metadata = metadata or Metadata()
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self.notice = ""
        """`spot interruption notice, action terminate at 2026-11-25T05:00:00Z`; empty as long as there is none."""

    def want(self, market: Market) -> None:
        """Begin to ask, if units are on a spot instance, or where nobody but the instance can tell."""
        if self._thread is None and market in {Market.SPOT, Market.UNKNOWN}:
            self._thread = threading.Thread(target=self._loop, args=(market is Market.SPOT,), name="spot", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ask no more; the thread is not waited for."""
        self._ended.set()

    def _loop(self, known: bool) -> None:
        """Until there is a notice, or the instance says that it is none of these."""
        while True:
            try:
                known = known or self._metadata.read("instance-life-cycle") == Market.SPOT
                if not known:
                    return
                self.notice = read_notice(self._metadata.read("spot/instance-action"))
            except (OSError, ValueError):
                pass  # It is asked again: one question without an answer says nothing.
            if self.notice or self._ended.wait(ASK_SECONDS):
                return


def read_notice(text: str | None) -> str:
    """The service's answer in words; empty for None, which is what it says nearly always.

    Raises ValueError when it cannot be read.
    """
    if text is None:
        return ""
    try:
        told = json.loads(text)
        return f"spot interruption notice, action {told['action']} at {told['time']}"
    except (KeyError, TypeError) as error:
        raise ValueError("no notice") from error
