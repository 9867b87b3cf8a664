"""What would be launched, where it is to be had, and the most that it can cost: before anything is launched.

`fleet up --dry-run` prints it, and `up` itself makes the same plan first. Some calls per region and one per type,
however many hosts. Everything is asked anew but prices.
"""

import difflib
import itertools
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fleet.campaign import BenchmarkEntry, Campaign
from fleet.cloud import aws, image, leases, quotas, spend
from fleet.cloud.price_table import ON_DEMAND, SPOT, Price, table
from fleet.cloud.prices import Prices
from fleet.cloud.quotas import Quota
from fleet.cloud_settings import CloudSettings, InstanceEntry
from fleet.errors import CloudError
from fleet.mlperf import expected, rules
from fleet.session import Session
from fleet.terms import Mode, Scenario

MARKETS = {"on-demand": (ON_DEMAND,), "spot": (SPOT,), "spot-then-on-demand": (SPOT, ON_DEMAND)}
"""The markets of an entry, in the order in which they are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One type in one region, as a candidate for an entry of `cloud.instances`."""

    instances: str
    """The entry's name."""
    count: int
    """Hosts of the entry that want an instance."""
    type: str
    region: str
    markets: tuple[str, ...]
    zones: tuple[str, ...] = ()
    """That offer the type and that the campaign lets in."""
    vcpus: int = 0
    architecture: str = ""
    """`x86_64` or `arm64`: which image it boots."""
    image: str = ""
    """`ami-…`, which is the newest now."""
    gpus: int = 0
    gpu: str = ""
    """`A10G`, as DescribeInstanceTypes names it."""
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    """By market."""
    on_demand: Price | None = None
    spot: Mapping[str, Price] = field(default_factory=dict)
    """By zone."""
    besides_usd_per_hour: float = 0.0
    """Volume and public address of one, by the table."""
    most_usd: float | None = None
    """For all of `count`, should they all come from here and run until their leases end."""
    cause: str = ""
    """Why nothing can be launched from here; empty when it can."""

    @property
    def ceiling(self) -> float | None:
        """US dollars an hour that one can cost at most, its volume and address beside it; None when unknown.

        Spot prices move, but without a bid of one's own never above the price on demand.
        """
        known = [price.usd_per_hour for price in (*self._spot(), *([self.on_demand] if self.on_demand else []))]
        return max(known) + self.besides_usd_per_hour if known else None

    def _spot(self) -> Iterable[Price]:
        return self.spot.values() if SPOT in self.markets else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """cloud/plan.json: every candidate, and the sum of it."""

    made_at: float
    """Unix seconds."""
    hosts: tuple[str, ...]
    """Which want an instance."""
    rows: tuple[Row, ...]
    expected_hours: float
    """Of one host's units, by a slow machine's figures where no target is given; neither boot nor set-up is in it."""
    lease_hours: float
    spent_usd: float
    """What earlier leases of the session have cost, or can still cost until they end."""
    most_usd: float
    """`spent_usd` and what these hosts can cost at most, until their leases end."""
    max_cost: float
    refusal: str = ""
    """Why nothing of this is launched; empty when it may be."""
    hint: str = ""
    warnings: tuple[str, ...] = ()
    schema: int = 1

    def price(self, kind: str, region: str, zone: str, market: str) -> Price:
        """What one instance costs an hour there; without a zone, in the dearest one.

        A spot price that nobody tells is taken to be at most that on demand, and its source says so.
        Raises CloudError for what is not in the plan.
        """
        row = next((row for row in self.rows if (row.type, row.region) == (kind, region)), None)
        if row is not None and market == SPOT and row.spot:
            dearest = max(row.spot.values(), key=lambda price: price.usd_per_hour)
            return row.spot.get(zone, dearest)
        if row is None or row.on_demand is None:
            raise CloudError(f"no price of {kind} in {region} is known", hint=_price_hint(kind))
        if market == SPOT:
            own = row.on_demand
            return Price(usd_per_hour=own.usd_per_hour, source=f"at most {own.source}", date=own.date)
        return row.on_demand

    def check(self) -> None:
        """Raise CloudError when this plan must not be carried out."""
        if self.refusal:
            raise CloudError(self.refusal, hint=self.hint)


def make(session: Session, campaign: Campaign, hosts: Collection[str], *, quick: bool = False) -> Plan:
    """The plan for these hosts of `cloud.instances`, written to cloud/plan.json.

    Raises CloudError when AWS cannot be asked, for a region, type or image that does not exist, and for a type without a price.
    """
    settings = _settings(campaign)
    wanted = [(name, entry) for name, entry in settings.hosts() if name in hosts]
    counts = Counter(entry.name for _, entry in wanted)
    entries = [entry for entry in settings.instances if counts[entry.name]]
    prices = Prices(given=settings.prices)
    markets = _Market(entries, settings, prices)
    rows = tuple(
        _row(entry, settings, markets, asked=(counts[entry.name], kind, region))
        for entry in entries
        for kind, region in itertools.product(entry.types, entry.regions or settings.regions)
    )
    prices.keep()
    rows = _with_images(rows, entries, settings)
    now = time.time()
    spent = spend.most(leases.read(session), now, without=hosts)
    most = spent + sum(_most(entry, rows) for entry in entries)
    hours = expected_hours(campaign, quick=quick)
    refusal, hint = _refusal(entries, rows, settings, most)
    made = Plan(
        made_at=now,
        hosts=tuple(name for name, _ in wanted),
        rows=rows,
        expected_hours=hours,
        lease_hours=settings.lease_hours,
        spent_usd=spent,
        most_usd=most,
        max_cost=settings.max_cost,
        refusal=refusal,
        hint=hint,
        warnings=_warnings(rows, prices, hours, settings),
    )
    session.write(session.cloud / "plan.json", made)
    return made


def expected_hours(campaign: Campaign, *, quick: bool) -> float:
    """How long all units of one host take, one after another."""
    return (
        sum(
            _unit_s(campaign, benchmark, scenario, mode, quick=quick)
            for benchmark in campaign.benchmarks
            for scenario, mode in itertools.product(benchmark.scenarios, benchmark.modes)
        )
        / 3600
    )


def _unit_s(campaign: Campaign, benchmark: BenchmarkEntry, scenario: Scenario, mode: Mode, *, quick: bool) -> float:
    rule = rules.load_benchmark(benchmark.name)
    given = benchmark.user_conf.get(scenario)
    settings = given.model_dump(exclude_none=True) if given else {}
    least = settings.get("min_duration", rules.load_round(campaign.round).min_duration_ms)
    return expected.seconds(
        rule,
        scenario,
        mode,
        settings,
        min_duration_ms=campaign.run.quick_seconds * 1000 if quick else least,
        samples=expected.few(rule, rule.samples) if quick else rule.samples,
    )


def _settings(campaign: Campaign) -> CloudSettings:
    if campaign.cloud is None:
        raise CloudError("the campaign has no `cloud:` section", hint="name instances in fleet.yml, see docs/cloud.md")
    return campaign.cloud


class _Market:
    """What AWS says about the types of a campaign, region by region."""

    def __init__(self, entries: list[InstanceEntry], settings: CloudSettings, prices: Prices) -> None:
        self._prices = prices
        asked: dict[str, dict[str, set[str]]] = {}
        for entry in entries:
            for region, kind in itertools.product(entry.regions or settings.regions, entry.types):
                asked.setdefault(region, {}).setdefault(kind, set()).update(MARKETS[entry.market])
        self._facts = {region: _types(region, list(kinds)) for region, kinds in asked.items()}
        self._zones = {region: _zones(region, list(facts)) for region, facts in self._facts.items()}
        self._quotas = {region: self._limits(region, kinds) for region, kinds in asked.items()}
        self._spot = {
            region: prices.spot(
                tuple(kind for kind in kinds if SPOT in kinds[kind] and kind in self._facts[region]), region
            )
            for region, kinds in asked.items()
        }

    def _limits(self, region: str, kinds: Mapping[str, set[str]]) -> dict[str, Quota]:
        facts = self._facts[region]
        codes = {quotas.code(kind, market) for kind, markets in kinds.items() if kind in facts for market in markets}
        return quotas.look(region, codes, {kind: _vcpus(facts[kind]) for kind in facts})

    def facts(self, kind: str, region: str) -> Mapping[str, Any] | None:
        """DescribeInstanceTypes' word; None for a type that is not in the region."""
        return self._facts[region].get(kind)

    def zones(self, kind: str, region: str) -> tuple[str, ...]:
        """Zones that offer it."""
        return self._zones[region].get(kind, ())

    def quota(self, kind: str, region: str, market: str) -> Quota:
        """What its instances count against."""
        code = quotas.code(kind, market)
        return self._quotas[region].get(code) or Quota(code="", cause="no quota of this family is known")

    def on_demand(self, kind: str, region: str) -> Price | None:
        """By the hour."""
        return self._prices.on_demand(kind, region)

    def spot(self, kind: str, region: str) -> dict[str, Price]:
        """By zone."""
        return self._spot[region].get(kind, {})


def _row(entry: InstanceEntry, settings: CloudSettings, market: _Market, *, asked: tuple[int, str, str]) -> Row:
    count, kind, region = asked
    markets = MARKETS[entry.market]
    row = Row(instances=entry.name, count=count, type=kind, region=region, markets=markets)
    facts = market.facts(kind, region)
    if facts is None:
        elsewhere = any(market.facts(kind, other) for other in entry.regions or settings.regions)
        near = "" if elsewhere else nearest(kind, region)
        return replace(row, cause=f"there is no {kind} in {region}{near}")
    on_demand, spot = market.on_demand(kind, region), market.spot(kind, region)
    if on_demand is None:
        # Of spot too: its price may rise up to this one.
        raise CloudError(f"no price of {kind} in {region} is known", hint=_price_hint(kind))
    zones = market.zones(kind, region)
    allowed = tuple(zone for zone in zones if zone in entry.zones) if entry.zones else zones
    cause = "" if allowed else f"no zone of {region} offers {kind}"
    if zones and not allowed:
        cause = f"of the zones named none offers {kind}; {', '.join(zones)} of {region} do"
    gpus = facts.get("GpuInfo", {}).get("Gpus", [])
    row = replace(
        row,
        zones=allowed,
        vcpus=_vcpus(facts),
        architecture="arm64" if "arm64" in _architectures(facts) else "x86_64",
        gpus=sum(int(gpu.get("Count", 0)) for gpu in gpus),
        gpu=", ".join(dict.fromkeys(str(gpu.get("Name", "")) for gpu in gpus)),
        quotas={name: market.quota(kind, region, name) for name in markets},
        on_demand=on_demand,
        spot=spot,
        besides_usd_per_hour=table().besides(
            entry.volume_gib or settings.volume_gib, public=settings.address != "private"
        ),
        cause=cause,
    )
    return replace(row, most_usd=None if row.ceiling is None else row.ceiling * count * settings.lease_hours)


def _with_images(rows: tuple[Row, ...], entries: list[InstanceEntry], settings: CloudSettings) -> tuple[Row, ...]:
    """Rows with what they would boot: `up` asks again, and takes what is newest then.

    Raises CloudError for a parameter or image that is not there.
    """
    named = {entry.name: entry.image_parameter or settings.image_parameter for entry in entries}
    found: dict[tuple[str, str], str] = {}
    made = []
    for row in rows:
        parameter = named[row.instances] or image.parameter(row.architecture)
        if not row.cause and (row.region, parameter) not in found:
            found[row.region, parameter] = image.find(row.region, parameter).id
        made.append(row if row.cause else replace(row, image=found[row.region, parameter]))
    return tuple(made)


def _most(entry: InstanceEntry, rows: Iterable[Row]) -> float:
    """Every host of the entry from its dearest candidate: any of them may be what there is."""
    mine = [row.most_usd for row in rows if row.instances == entry.name and not row.cause and row.most_usd is not None]
    return max(mine, default=0.0)


def _refusal(
    entries: Iterable[InstanceEntry], rows: tuple[Row, ...], settings: CloudSettings, most: float
) -> tuple[str, str]:
    free: dict[tuple[str, str], int] = {}
    placed = 0
    short: list[tuple[str, str]] = []
    for entry in entries:
        mine = [row for row in rows if row.instances == entry.name]
        usable = [row for row in mine if not row.cause]
        if not usable:
            why = "; ".join(dict.fromkeys(row.cause for row in mine))
            return f"cloud.instances {entry.name}: {why}", "name other types, zones or regions under cloud.instances"
        left = _place(usable, free)
        placed += usable[0].count - left
        if left:
            short.append(_too_few(entry.name, usable, left))
    if short and (not settings.partial or not placed):
        return "; ".join(text for text, _ in short), short[0][1]
    if placed and most > settings.max_cost:
        return (
            f"this can cost ${most:,.2f} until the leases end, cloud.max_cost is ${settings.max_cost:,.2f}",
            "raise cloud.max_cost, or lower cloud.lease_hours or the number of instances",
        )
    return "", ""


def _place(usable: list[Row], free: dict[tuple[str, str], int]) -> int:
    """How many hosts of an entry find no vCPUs, when each goes to the first candidate with room; `free` is used up."""
    left = usable[0].count
    # In the order in which they are tried: a type in every market and region before the next type.
    kinds = dict.fromkeys(row.type for row in usable)
    tried = [(row, market) for kind in kinds for market in usable[0].markets for row in usable if row.type == kind]
    for row, market in tried:
        quota = row.quotas[market]
        if quota.free is None or not row.vcpus:
            return 0
        room = free.setdefault((row.region, quota.code), quota.free) // row.vcpus
        taken = min(room, left)
        free[row.region, quota.code] -= taken * row.vcpus
        left -= taken
    return left


def _too_few(name: str, usable: list[Row], left: int) -> tuple[str, str]:
    row = usable[0]
    market = row.markets[0]
    quota = row.quotas[market]
    tried = {(each.region, kind): each.quotas[kind] for each in usable for kind in each.markets}
    said = ", ".join(
        f"{limit.used} of {limit.limit} vCPUs in use {kind} in {region} ({limit.code})"
        for (region, kind), limit in tried.items()
    )
    text = (
        f"cloud.instances {name}: the quota is too small for {left} of {row.count}, of {row.vcpus} vCPUs each: {said}"
    )
    desired = (quota.used or 0) + row.count * row.vcpus
    hint = (
        f"aws service-quotas request-service-quota-increase --service-code ec2 --quota-code {quota.code} "
        f"--desired-value {desired} --region {row.region}, or set cloud.partial: true to go on with fewer"
    )
    return text, hint


def _warnings(rows: tuple[Row, ...], prices: Prices, hours: float, settings: CloudSettings) -> tuple[str, ...]:
    found = [f"{row.instances}: {row.cause}" for row in rows if row.cause]
    found += [f"prices: {text}" for text in dict.fromkeys(prices.trouble)]
    found += [
        f"{row.type} in {row.region}: its price is that of another region ({row.on_demand.cited})"
        for row in rows
        if row.on_demand and row.on_demand.source.startswith("table of")
    ]
    found += [
        f"quota {quota.code} in {row.region}: {quota.cause}" if quota.code else f"{row.type} {market}: {quota.cause}"
        for row in rows
        for market, quota in row.quotas.items()
        if quota.cause
    ]
    found += [
        f"{row.type} in {row.region}: no spot price; taken to be at most that on demand"
        for row in rows
        if SPOT in row.markets and not row.spot and not row.cause
    ]
    if hours > settings.lease_hours:
        found.append(
            f"the units of one host are expected to take {hours:.1f} h, longer than cloud.lease_hours "
            f"({settings.lease_hours:g}): give targets (fleet tune), a longer lease, or fleet extend in time"
        )
    return tuple(dict.fromkeys(found))


def _types(region: str, kinds: list[str]) -> dict[str, dict[str, Any]]:
    """Type to EC2's description; a type that is not in the region is left out, which a filter does and a list does not."""
    named = [{"Name": "instance-type", "Values": kinds}]
    found = aws.client("ec2", region).every("describe_instance_types", "InstanceTypes", Filters=named)
    return {str(item["InstanceType"]): item for item in found}


def _zones(region: str, kinds: list[str]) -> dict[str, tuple[str, ...]]:
    """Type to the zones that offer it."""
    found: dict[str, list[str]] = {}
    if kinds:
        named = [{"Name": "instance-type", "Values": kinds}]
        for item in aws.client("ec2", region).every(
            "describe_instance_type_offerings",
            "InstanceTypeOfferings",
            LocationType="availability-zone",
            Filters=named,
        ):
            found.setdefault(str(item["InstanceType"]), []).append(str(item["Location"]))
    return {kind: tuple(sorted(zones)) for kind, zones in found.items()}


def nearest(kind: str, region: str) -> str:
    """`, did you mean g5.xlarge?`, from what the region offers; empty when nothing is like it."""
    offered = aws.client("ec2", region).every(
        "describe_instance_type_offerings", "InstanceTypeOfferings", LocationType="region"
    )
    close = difflib.get_close_matches(kind, {str(item["InstanceType"]) for item in offered}, n=1)
    return f", did you mean {close[0]}?" if close and close[0] != kind else ""


def _vcpus(facts: Mapping[str, Any]) -> int:
    return int(facts.get("VCpuInfo", {}).get("DefaultVCpus", 0))


def _architectures(facts: Mapping[str, Any]) -> list[str]:
    return list(facts.get("ProcessorInfo", {}).get("SupportedArchitectures", ()))


def _price_hint(kind: str) -> str:
    return (
        f"allow pricing:GetProducts, or say what it costs in fleet.yml: cloud.prices: {{{kind}: <US dollars an hour>}}"
    )
