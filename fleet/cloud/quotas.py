"""How many vCPUs an account may run of a family and market in a region, and how many it runs. Unknown is said, not guessed."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from fleet.cloud import aws
from fleet.cloud.price_table import ON_DEMAND, SPOT
from fleet.errors import CloudError

_CODES = {
    # Family of quotas: on demand, spot. As list-service-quotas names them.
    "standard": ("L-1216C47A", "L-34B43A08"),
    "G and VT": ("L-DB2E81BA", "L-3819A6DF"),
    "P": ("L-417A185B", "L-7212CCBC"),
    "P5": ("L-417A185B", "L-C4BD4855"),
    "newer P": ("L-417A185B", ""),
    "F": ("L-74FC7D96", "L-88CF9481"),
    "Inf": ("L-1945791B", "L-B5D1601B"),
    "Trn": ("L-2C3B7624", "L-6B0D517C"),
    "X": ("L-7295265B", "L-E3A00192"),
    "DL": ("L-6E869C2A", "L-85EED4F7"),
}
_FAMILIES = {
    **dict.fromkeys(("a", "c", "d", "h", "i", "im", "is", "m", "r", "t", "z"), "standard"),
    **dict.fromkeys(("g", "gr", "vt"), "G and VT"),
    "f": "F",
    "inf": "Inf",
    "trn": "Trn",
    "x": "X",
    "dl": "DL",
}
_P = {"p2": "P", "p3": "P", "p4": "P", "p5": "P5"}
"""As spot these are counted apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """vCPUs of one family and market in one region."""

    code: str
    """`L-DB2E81BA`; empty for a family without a known quota."""
    limit: int | None = None
    used: int | None = None
    """By what runs now, ours or not."""
    cause: str = ""
    """Why one of the two is unknown."""

    @property
    def free(self) -> int | None:
        """How many vCPUs can still be launched; None when that is unknown."""
        return None if self.limit is None or self.used is None else max(0, self.limit - self.used)


def code(kind: str, market: str) -> str:
    """The quota that an instance of a type counts against: instances that share it share its vCPUs; empty if unknown."""
    found = re.match(r"[a-z]+(?=\d)", kind)
    letters = found.group() if found else ""
    family = _P.get(kind[:2], "newer P") if letters == "p" else _FAMILIES.get(letters, "")
    return _CODES[family][market == SPOT] if family else ""


def look(region: str, wanted: set[str], vcpus: dict[str, int]) -> dict[str, Quota]:
    """Quota code to what is known of it; one call per code and a paginated one for what runs.

    `vcpus` by type where known already; other types are counted by the options of their instances.
    Raises CloudError for want of credentials.
    """
    used, why = _used(region, vcpus)
    found = {}
    for each in sorted(wanted - {""}):
        try:
            answer = aws.client("service-quotas", region).call("get_service_quota", ServiceCode="ec2", QuotaCode=each)
            limit, cause = int(answer["Quota"]["Value"]), why
        except CloudError as error:
            _raise_without_credentials(error)
            limit, cause = None, error.message
        except (KeyError, TypeError, ValueError):
            limit, cause = None, f"get_service_quota in {region}: an answer without a value"
        found[each] = Quota(code=each, limit=limit, used=None if used is None else used[each], cause=cause)
    return found


def _used(region: str, vcpus: dict[str, int]) -> tuple[Counter[str] | None, str]:
    used: Counter[str] = Counter()
    states = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    try:
        for reservation in aws.client("ec2", region).every("describe_instances", "Reservations", Filters=states):
            for instance in reservation["Instances"]:
                market = SPOT if instance.get("InstanceLifecycle") == "spot" else ON_DEMAND
                kind = str(instance.get("InstanceType", ""))
                used[code(kind, market)] += vcpus.get(kind) or _threads(instance)
    except CloudError as error:
        _raise_without_credentials(error)
        return None, error.message
    return used, ""


def _threads(instance: dict[str, Any]) -> int:
    options = instance.get("CpuOptions", {})
    return int(options.get("CoreCount", 0)) * int(options.get("ThreadsPerCore", 1))


def _raise_without_credentials(error: CloudError) -> None:
    if error.code == aws.NO_CREDENTIALS or error.code in aws.EXPIRED:
        raise error
