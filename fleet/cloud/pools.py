"""Where to look for instances, in which order, and what each refusal says about the other places. Asks nobody."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from fleet.cloud import quotas
from fleet.cloud.price_table import SPOT


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """What one RunInstances call can draw from."""

    type: str
    market: str
    region: str
    zone: str

    def __str__(self) -> str:
        return f"{self.type} {self.market} in {self.zone}"


class Rule(StrEnum):
    """What follows from an error of RunInstances."""

    NEXT = "next pool"
    """Nothing is to be had here, now."""
    FAMILY = "no more of this quota"
    """The account may not have more of this family in this market and region."""
    NO_SPOT = "no more spot in this region"
    MARKET = "next market"
    """Not of this type at what spot may cost."""
    WAIT = "wait, then the same pool"
    """Too many calls, or something that was just made is not known everywhere."""
    STOP = "stop, and take everything back"


_RULES: Mapping[Rule, frozenset[str]] = {
    Rule.NEXT: frozenset(
        {
            "InsufficientInstanceCapacity",
            "InsufficientHostCapacity",
            "InsufficientReservedInstanceCapacity",
            "InsufficientCapacity",
            "InsufficientVolumeCapacity",
            "InsufficientFreeAddressesInSubnet",
            "InsufficientAddressCapacity",
            "UnfulfillableCapacity",
            # The zone is named in offerings and has none of it all the same.
            "Unsupported",
            # Of the volumes that would come with it, in this region.
            "VolumeLimitExceeded",
            "MaxIOPSLimitExceeded",
        }
    ),
    Rule.FAMILY: frozenset({"VcpuLimitExceeded", "InstanceLimitExceeded"}),
    # The second: the account has never had spot instances, and the user may not make the role that they need.
    Rule.NO_SPOT: frozenset({"MaxSpotInstanceCountExceeded", "AuthFailure.ServiceLinkedRoleCreationNotPermitted"}),
    Rule.MARKET: frozenset({"SpotMaxPriceTooLow"}),
    Rule.WAIT: frozenset(
        {
            "RequestLimitExceeded",
            "Throttling",
            "ThrottlingException",
            "RequestThrottled",
            "RequestThrottledException",
            "TooManyRequestsException",
            "BandwidthLimitExceeded",
            "EC2ThrottledException",
            "InvalidGroup.NotFound",
            "InvalidGroupId.NotFound",
            "InvalidKeyPair.NotFound",
        }
    ),
}


def rule(code: str) -> Rule:
    """The one rule for an error code; what nobody has thought of stops everything."""
    return next((found for found, codes in _RULES.items() if code in codes), Rule.STOP)


def ordered(
    types: Iterable[str], markets: Iterable[str], regions: Iterable[str], zones: Callable[[str, str], Iterable[str]]
) -> tuple[Pool, ...]:
    """Every pool, the best first: a type in each market, region and zone before the next type.

    `zones` says where a type is to be had in a region, the best first.
    """
    markets, regions = tuple(markets), tuple(regions)
    return tuple(
        Pool(type=kind, market=market, region=region, zone=zone)
        for kind in types
        for market in markets
        for region in regions
        for zone in zones(kind, region)
    )


class Openings:
    """Which pools may still be asked; shared by all entries, for what one of them is told holds for the others."""

    def __init__(self) -> None:
        self._pools: dict[Pool, str] = {}
        self._families: dict[tuple[str, str, str], str] = {}
        self._regions: dict[str, str] = {}
        self._kinds: dict[tuple[str, str], str] = {}

    def shut(self, pool: Pool, found: Rule, cause: str) -> None:
        """Ask no more where a refusal says that it is of no use."""
        self._pools.setdefault(pool, cause)
        if found is Rule.FAMILY:
            self._families.setdefault(_family(pool), cause)
        elif found is Rule.NO_SPOT:
            self._regions.setdefault(pool.region, cause)
        elif found is Rule.MARKET:
            self._kinds.setdefault((pool.type, pool.market), cause)

    def why_shut(self, pool: Pool) -> str:
        """Why a pool is not asked any more; empty for one that may be."""
        return (
            self._pools.get(pool, "")
            or self._families.get(_family(pool), "")
            or (self._regions.get(pool.region, "") if pool.market == SPOT else "")
            or self._kinds.get((pool.type, pool.market), "")
        )

    def first(self, pools: Iterable[Pool]) -> Pool | None:
        """The best of the pools that may still be asked."""
        return next((pool for pool in pools if not self.why_shut(pool)), None)

    def why_none(self, pools: Iterable[Pool]) -> str:
        """Each cause once, for a host that got nothing."""
        return "; ".join(dict.fromkeys(filter(None, map(self.why_shut, pools)))) or "no zone to launch it in"


def _family(pool: Pool) -> tuple[str, str, str]:
    # A family without a known quota is told by its first letters.
    return (
        pool.region,
        pool.market,
        quotas.code(pool.type, pool.market) or pool.type.partition(".")[0].rstrip("0123456789"),
    )
