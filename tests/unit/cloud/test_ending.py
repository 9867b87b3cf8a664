"""Batches, one bad id among many, and what EC2 says of an instance's end."""

from typing import Any

import pytest

from fleet.cloud import aws, described, ending, leases
from fleet.cloud.described import Described
from fleet.errors import CloudError


class _Ec2:
    """Refuses a call in which any id is bad, and ends none of the others then, as EC2 does."""

    def __init__(self, bad: set[str], code: str) -> None:
        self.bad, self.code = bad, code
        self.calls: list[list[str]] = []
        self.ended: set[str] = set()

    def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        assert operation == "terminate_instances"
        asked = arguments["InstanceIds"]
        self.calls.append(asked)
        if self.bad & set(asked):
            raise CloudError("no", code=self.code)
        self.ended |= set(asked)
        return {}


def put(monkeypatch: pytest.MonkeyPatch, bad: set[str], code: str) -> _Ec2:
    made = _Ec2(bad, code)
    monkeypatch.setattr(aws, "client", lambda service, region: made)  # noqa: ARG005 - as it is called
    return made


IDS = [f"i-{number:04}" for number in range(1001)]


def test_five_hundred_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ec2 = put(monkeypatch, set(), "")
    assert ending.terminate("us-east-1", IDS) == {}
    assert [len(call) for call in ec2.calls] == [500, 500, 1]
    assert ec2.ended == set(IDS)


def test_one_that_is_unknown_costs_no_call_per_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    ec2 = put(monkeypatch, {"i-0123"}, "InvalidInstanceID.NotFound")
    assert list(ending.terminate("us-east-1", IDS)) == ["i-0123"]
    assert ec2.ended == set(IDS) - {"i-0123"}
    assert len(ec2.calls) < 25


def test_what_is_the_matter_with_all_is_not_asked_again_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    ec2 = put(monkeypatch, {"i-0123"}, "RequestExpired")
    assert len(ending.terminate("us-east-1", IDS)) == 500
    assert len(ec2.calls) == 3


@pytest.mark.parametrize(
    ("code", "said", "expires_at", "why"),
    [
        ("Server.SpotInstanceTermination", "", 0, "spot interruption"),
        ("Server.SpotInstanceShutdown", "", 0, "spot interruption"),
        ("Client.InstanceInitiatedShutdown", "", 0, "lease expired"),
        ("Client.InstanceInitiatedShutdown", "User initiated (2026-11-25 12:00:20 GMT)", "2026-11-25T12:00:00Z", "lease expired"),
        ("Client.InstanceInitiatedShutdown", "User initiated (2026-11-25 11:00:00 GMT)", "2026-11-25T12:00:00Z", "shut itself down"),
        ("Client.UserInitiatedShutdown", "User initiated (2026-11-25 11:00:00 GMT)", "2026-11-25T12:00:00Z", "terminated through EC2"),
        ("Client.UserInitiatedShutdown", "User initiated (2026-11-25 13:00:00 GMT)", "2026-11-25T12:00:00Z", "lease expired, terminated through EC2"),
        ("Server.InternalError", "", 0, "Server.InternalError"),
        ("", "", 0, "terminated, EC2 does not say why"),
    ],
)  # fmt: skip
def test_why_an_instance_ended(code: str, said: str, expires_at: str | int, why: str) -> None:
    gone = Described(id="i-1", region="us-east-1", state="terminated", reason_code=code, reason=said)
    at = leases.expiry(expires_at) if isinstance(expires_at, str) else None
    assert described.why_ended(gone, at) == why


def test_when_an_instance_ended() -> None:
    gone = Described(id="i", region="r", state="terminated", reason="User initiated (2026-11-25 12:00:00 GMT)")
    assert described.ended_at(gone) == leases.expiry("2026-11-25T12:00:00Z")
    assert described.ended_at(Described(id="i", region="r", state="terminated", reason="User initiated")) is None


@pytest.mark.parametrize("text", ["", "tomorrow", "1764072000", "2026-11-25", "2026-11-25T12:00:00+00:00", "\n"])
def test_an_expiry_that_is_no_time(text: str) -> None:
    assert leases.expiry(text) is None


def test_an_expiry_is_read_as_it_was_written() -> None:
    assert leases.expiry(leases.expiry_text(1764072000.9)) == 1764072000
