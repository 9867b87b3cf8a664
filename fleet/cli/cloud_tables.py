"""Rows for what EC2 costs, before and after. Nothing here prints."""

from collections.abc import Mapping

from fleet.cloud.leases import Lease, Leased, end_of, expiry_text
from fleet.cloud.plan import Plan, Row
from fleet.cloud.price_table import SPOT, Price
from fleet.cloud.quotas import Quota
from fleet.errors import ExitCode
from fleet.handoff import Spend
from fleet.results.dollars import NOT_IN_IT, dollars

MOST = (
    "most: from the dearest candidate until the lease ends, spot at the price on demand, with volume and public address; "
    "traffic out of AWS is not in it"
)


def plan(found: Plan) -> tuple[list[str], list[list[str]]]:
    """One row per entry of `cloud.instances`, type and region, in the order in which they are tried."""
    columns = [
        "instances",
        "type",
        "GPU",
        "region",
        "zones",
        "vCPUs",
        "quota",
        "on demand $/h",
        "spot $/h",
        "expected h",
        "lease h",
        "most $",
    ]
    return columns, [_plan_row(row, found) for row in found.rows]


def plan_title(found: Plan) -> str:
    """How many instances, and the most that they can cost: the first thing said."""
    many = len(found.hosts)
    text = f"{many} instance{'' if many == 1 else 's'}, at most {dollars(found.most_usd)} of {dollars(found.max_cost)}"
    return f"{text}, {dollars(found.spent_usd)} of it from earlier leases" if found.spent_usd else text


def plan_lines(found: Plan) -> list[str]:
    """What must be read beside the table."""
    return [
        *found.warnings,
        *dict.fromkeys(f"image: {row.image} in {row.region}" for row in found.rows if row.image),
        MOST,
    ]


def plan_code(found: Plan) -> ExitCode:
    """1 for a plan that would be refused."""
    return ExitCode.ERROR if found.refusal else ExitCode.OK


def up(found: Mapping[str, tuple[Lease, Leased]], causes: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """One row per host: its instance, or why it has none."""
    columns = ["host", "instance", "type", "market", "zone", "address", "$/h", "ends itself at"]
    rows = [
        [
            name,
            leased.id,
            lease.type,
            lease.market,
            leased.zone,
            leased.public_address or leased.private_address,
            f"{lease.usd_per_hour:.4g} ({lease.price_source})",
            expiry_text(end_of(lease, leased)),
        ]
        for name, (lease, leased) in found.items()
    ]
    return columns, rows + [[name, "none", cause, *["-"] * 5] for name, cause in causes.items()]


def up_title(found: Mapping[str, tuple[Lease, Leased]], causes: Mapping[str, str]) -> str:
    """How many have one: the first thing said."""
    rate = sum(lease.usd_per_hour for lease, _ in found.values())
    return f"{len(found)} of {len(found) + len(causes)} instances run, {dollars(rate)} an hour"


def spent(found: Spend | None) -> str:
    """What the session's instances cost so far, in a line; empty where there were none."""
    if found is None or not found.instances:
        return ""
    open_ = [item.id for item in found.instances if item.ended_at is None]
    grows = f", and growing: {len(open_)} of {len(found.instances)} not seen to be gone" if open_ else ""
    return (
        f"cost: {dollars(found.usd)} for {len(found.instances)} instance{'' if len(found.instances) == 1 else 's'}, about "
        f"{dollars(found.besides_usd)} for volumes and addresses ({found.besides_source}){grows}; {NOT_IN_IT}"
    )


def _plan_row(row: Row, found: Plan) -> list[str]:
    name = f"{row.count} x {row.instances}"
    if row.cause:
        return [name, row.type, "-", row.region, row.cause, *"-------"]
    return [
        name,
        row.type,
        f"{row.gpus} x {row.gpu}" if row.gpus else "none",
        row.region,
        ", ".join(zone.removeprefix(row.region) for zone in row.zones),
        str(row.vcpus),
        "; ".join(f"{_quota(row.quotas[market])} {market}" for market in row.markets),
        _price(row.on_demand),
        _spot(row),
        f"{found.expected_hours:.2g}",
        f"{found.lease_hours:g}",
        dollars(row.most_usd),
    ]


def _quota(quota: Quota) -> str:
    if quota.limit is None:
        return "unknown"
    return f"{'?' if quota.used is None else quota.used} of {quota.limit} in use"


def _price(price: Price | None) -> str:
    return "unknown" if price is None else f"{price.usd_per_hour:.4g} ({price.cited})"


def _spot(row: Row) -> str:
    if SPOT not in row.markets and not row.spot:
        return "-"
    if not row.spot:
        return "unknown"
    low = min(row.spot.values(), key=lambda price: price.usd_per_hour)
    high = max(row.spot.values(), key=lambda price: price.usd_per_hour)
    span = f"{low.usd_per_hour:.4g}"
    if high.usd_per_hour != low.usd_per_hour:
        span += f"-{high.usd_per_hour:.4g}"
    return f"{span} ({high.cited})"
