"""Where instances are looked for, and the one rule per refusal."""

import pytest

from fleet.cloud.pools import Openings, Pool, Rule, ordered, rule

ZONES = {
    ("g5.xlarge", "us-east-1"): ["us-east-1b", "us-east-1a"],
    ("g6.xlarge", "us-east-1"): ["us-east-1a"],
    ("g5.xlarge", "us-west-2"): ["us-west-2a"],
}


def pools() -> tuple[Pool, ...]:
    return ordered(
        ["g5.xlarge", "g6.xlarge"],
        ["spot", "on-demand"],
        ["us-east-1", "us-west-2"],
        lambda kind, region: ZONES.get((kind, region), []),
    )


def names(found: tuple[Pool, ...], openings: Openings) -> list[str]:
    return [str(pool) for pool in found if not openings.why_shut(pool)]


def test_a_type_is_sought_in_every_market_and_place_before_the_next() -> None:
    assert [str(pool) for pool in pools()] == [
        "g5.xlarge spot in us-east-1b",
        "g5.xlarge spot in us-east-1a",
        "g5.xlarge spot in us-west-2a",
        "g5.xlarge on-demand in us-east-1b",
        "g5.xlarge on-demand in us-east-1a",
        "g5.xlarge on-demand in us-west-2a",
        "g6.xlarge spot in us-east-1a",
        "g6.xlarge on-demand in us-east-1a",
    ]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("InsufficientInstanceCapacity", Rule.NEXT),
        ("InsufficientHostCapacity", Rule.NEXT),
        ("InsufficientFreeAddressesInSubnet", Rule.NEXT),
        ("Unsupported", Rule.NEXT),
        ("VcpuLimitExceeded", Rule.FAMILY),
        ("MaxSpotInstanceCountExceeded", Rule.NO_SPOT),
        ("SpotMaxPriceTooLow", Rule.MARKET),
        ("RequestLimitExceeded", Rule.WAIT),
        ("Throttling", Rule.WAIT),
        ("InvalidGroup.NotFound", Rule.WAIT),
        ("UnauthorizedOperation", Rule.STOP),
        ("InvalidAMIID.NotFound", Rule.STOP),
        ("", Rule.STOP),
        ("SomethingNew", Rule.STOP),
    ],
)
def test_one_rule_per_code(code: str, found: Rule) -> None:
    assert rule(code) is found


@pytest.mark.parametrize(
    ("found", "left"),
    [
        (Rule.NEXT, pools()[1:]),
        # The quota of G spot instances in us-east-1: of both types, and of no other market or region.
        (Rule.FAMILY, tuple(pool for pool in pools() if (pool.market, pool.region) != ("spot", "us-east-1"))),
        (Rule.NO_SPOT, tuple(pool for pool in pools() if (pool.market, pool.region) != ("spot", "us-east-1"))),
        (Rule.MARKET, tuple(pool for pool in pools() if (pool.market, pool.type) != ("spot", "g5.xlarge"))),
    ],
)
def test_what_a_refusal_says_of_other_pools(found: Rule, left: tuple[Pool, ...]) -> None:
    openings = Openings()
    openings.shut(pools()[0], found, "no")
    assert names(pools(), openings) == [str(pool) for pool in left]
    assert openings.first(pools()) == left[0]


def test_the_quota_of_one_family_is_not_that_of_another() -> None:
    openings = Openings()
    of = {
        kind: Pool(type=kind, market="on-demand", region="us-east-1", zone="us-east-1a")
        for kind in ("g5.xlarge", "g6.xlarge", "p5.48xlarge", "c7i.large", "u7i-6tb.112xlarge", "mac2.metal")
    }
    openings.shut(of["g5.xlarge"], Rule.FAMILY, "no")
    openings.shut(of["u7i-6tb.112xlarge"], Rule.FAMILY, "no")
    assert {kind for kind, pool in of.items() if not openings.why_shut(pool)} == {
        "p5.48xlarge",
        "c7i.large",
        "mac2.metal",
    }


def test_a_host_without_instance_has_every_cause_once() -> None:
    openings = Openings()
    assert openings.why_none([]) == "no zone to launch it in"
    for pool in pools()[:3]:
        openings.shut(pool, Rule.NEXT, "none of it")
    openings.shut(pools()[3], Rule.FAMILY, "the quota is used up")
    assert openings.why_none(pools()[:5]) == "none of it; the quota is used up"
    assert openings.first(pools()[:5]) is None
