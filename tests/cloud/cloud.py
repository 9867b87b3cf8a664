"""A test's hand on AWS as it is in the tests."""

import functools
import json
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import boto3

ROOT = Path(__file__).resolve().parents[2]
KEY = {"aws_access_key_id": "AKIAFLEETTESTS000000", "aws_secret_access_key": "not-a-secret"}


@functools.cache
def _session() -> Any:
    return boto3.session.Session()


class Cloud:
    """moto behind the middleware, at `url`; what is set here lasts until `reset`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, verb: str, **asked: Any) -> Any:
        """One request to the middleware itself: see Middleware._lab_…."""
        request = urllib.request.Request(f"{self.url}/_lab/{verb}", json.dumps(asked).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=120) as answer:
            said = json.load(answer)
        if "failed" in said:
            raise RuntimeError(said["failed"])
        return said["answer"]

    def environment(self) -> dict[str, str]:
        """What a process needs to have this for its AWS."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY["aws_access_key_id"],
            "AWS_SECRET_ACCESS_KEY": KEY["aws_secret_access_key"],
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self, service: str, region: str = "us-east-1") -> Any:
        """A boto3 client of its own, which tries once."""
        config = boto3.session.Config(retries={"total_max_attempts": 1}, read_timeout=60)
        return _session().client(
            service, region_name=region, endpoint_url=self.url, config=config, **KEY
        )  # fmt: skip

    @property
    def checkip(self) -> str:
        """Where one's own address can be asked for, as at checkip.amazonaws.com."""
        return f"{self.url}/_lab/checkip"

    # --- what was asked, and what is there

    def calls(self, action: str = "", service: str = "") -> list[dict[str, Any]]:
        """Calls so far, in order: service, region, action, parameters, status (none while under way), lost."""
        return [
            call for call in self.ask("calls") if action in {"", call["action"]} and service in {"", call["service"]}
        ]

    def counted(self) -> Counter[str]:
        """How often each action was asked for."""
        return Counter(call["action"] for call in self.calls())

    def forget_calls(self) -> None:
        """Begin the log anew."""
        self.ask("forget_calls")

    def standing(self, *, ours: bool = True) -> dict[str, list[str]]:
        """Ids of `instances` (not terminated), `key_pairs`, `groups`, `volumes` in all regions: with our tags, or all."""
        found: dict[str, list[str]] = self.ask("standing", ours=ours)
        return found

    def counts(self, *, ours: bool = True) -> dict[str, int]:
        """How many of each of `standing`."""
        return {sort: len(ids) for sort, ids in self.standing(ours=ours).items()}

    def instances(self) -> list[dict[str, Any]]:
        """Every instance ever: id, state, address, region, user_data, key, on_shutdown, lifecycle, type, zone."""
        found: list[dict[str, Any]] = self.ask("instances")
        return found

    # --- what breaks

    def fault(self, action: str, code: str = "", **more: Any) -> None:
        """Calls of `action` (regex) fail with AWS's `code`: see middleware.Fault for times, match, seconds and so on."""
        self.ask("fault", action=action, code=code, **more)

    def lose(self, action: str, **more: Any) -> None:
        """They are carried out, and the answer is lost: the connection is cut, or with status=500 that is said."""
        self.ask("fault", action=action, kind="lost", **more)

    def delay(self, action: str, seconds: float, **more: Any) -> None:
        """They take so long."""
        self.ask("fault", action=action, kind="delay", seconds=seconds, **more)

    def expire(self) -> None:
        """Credentials are good no more, until `heal`."""
        self.fault(".*", "RequestExpired", message="Request has expired.", service="ec2", times=None)
        self.fault(".*", "ExpiredTokenException", message="The security token has expired", times=None)

    def heal(self) -> None:
        """No faults any more."""
        self.ask("heal")

    def slow(self, **values: float) -> None:
        """pending_…, ending_…: how long instances take; hidden_…: how long new ones cannot be seen.

        Each in seconds (pending_s) or in looks at instances (pending_calls).
        """
        self.ask("slow", **values)

    def tokens(self, *, idempotent: bool) -> None:
        """Whether the same client token makes nothing twice, as with EC2, or is ignored, as by moto."""
        self.ask("tokens", idempotent=idempotent)

    def limit(self, vcpus: float, family: str = "g", market: str = "on-demand", region: str = "us-east-1") -> None:
        """A quota of vCPUs: seen at Service Quotas, and enforced. Families: standard, g, p."""
        self.ask("limit", region=region, family=family, market=market, vcpus=vcpus)

    def capacity(self, instance_type: str, left: int, zone: str = "", market: str = "") -> None:
        """So many more instances of a type are to be had there."""
        self.ask("capacity", type=instance_type, left=left, zone=zone, market=market)

    def end(self, instance: str, code: str = "Server.SpotInstanceTermination", message: str = "ended by EC2") -> None:
        """EC2 ends an instance."""
        self.ask("end", instance=instance, code=code, message=message)

    def pool(self, addresses: Sequence[str]) -> None:
        """Further private addresses for new instances, one after another; moto's own when all are given out."""
        self.ask("pool", addresses=list(addresses))

    def no_default_vpc(self, region: str = "us-east-1") -> None:
        """The account has none there."""
        self.ask("no_default_vpc", region=region)

    def come_from(self, address: str) -> None:
        """What checkip says."""
        self.ask("address", address=address)

    def reset(self) -> None:
        """An empty account, and nothing broken."""
        self.ask("reset")


class Server:
    """The process; a context manager. `enter` is put before its command, such as nsenter into a network."""

    def __init__(self, host: str = "127.0.0.1", enter: tuple[str, ...] = ()) -> None:
        self._command = [*enter, sys.executable, "-m", "tests.cloud.server", host]
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError("moto did not start")
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
