"""What units and the session cost: recorded prices times wall time. Pure; an unknown price stays unknown.

Prices come from fleet.yml for hosts of one's own, and from the leases of instances (cloud/spend.json).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from fleet.handoff import InstanceSpend, Spend
from fleet.results.records import Cost, LoadgenSummary, Price, UnitResult
from fleet.terms import Scenario

OWN = "own"
"""The market of a host that nobody rents by the hour."""
LONGEST_S = 30 * 24 * 3600.0
"""Wall seconds of a unit: what is longer is a host's clock that was set."""
SAMPLES_A_QUERY = {Scenario.SINGLE_STREAM: 1, Scenario.MULTI_STREAM: 8}
"""Of the scenarios whose metric is a latency."""
MILLION = 1e6
_THINGS = {"Samples/s": "samples", "Queries/s": "samples", "Tokens/s": "tokens"}
"""What a rate counts; a query of Server is one sample."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What each host costs an hour, and when."""

    own: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    """Host to `usd_per_hour` of fleet.yml."""
    spend: Spend | None = None

    def price(self, host: str, at: float | None = None) -> Price | None:
        """Of a host at a time: spot hosts may have been replaced by dearer ones; None when nobody said one."""
        mine = sorted((item for item in self._instances() if item.host == host), key=lambda item: item.launched_at)
        if mine:
            # A host's clock and EC2's differ by little; a unit before all launches is the first instance's.
            then = [item for item in mine if at is None or item.launched_at <= at] or mine[:1]
            return Price(usd_per_hour=then[-1].usd_per_hour, source=then[-1].price_source, market=then[-1].market)
        usd = self.own.get(host)
        return None if usd is None else Price(usd_per_hour=usd, source="fleet.yml", market=OWN)

    def _instances(self) -> Sequence[InstanceSpend]:
        return self.spend.instances if self.spend else ()


def seconds(started_at: float | None, ended_at: float | None) -> float | None:
    """Wall seconds of a unit by its host's clock; None when that makes no sense."""
    if started_at is None or ended_at is None:
        return None
    wall = ended_at - started_at
    return wall if math.isfinite(wall) and 0 <= wall <= LONGEST_S else None


def per_million(price: Price | None, summary: LoadgenSummary | None) -> tuple[float | None, str]:
    """US dollars for a million samples (or tokens, where the metric counts those) at a VALID metric, and of what.

    A latency stands for one query after the other, each taking as long as the metric says: an upper bound.
    """
    metric = summary.metric if summary is not None and summary.valid else None
    if price is None or summary is None or metric is None or not metric.value > 0:
        return None, ""
    if metric.unit in _THINGS:
        rate, things = metric.value, _THINGS[metric.unit]
    elif metric.unit == "ms" and summary.scenario in SAMPLES_A_QUERY:
        rate, things = SAMPLES_A_QUERY[summary.scenario] * 1000 / metric.value, "samples"
    else:
        return None, ""
    return price.usd_per_hour / 3600 / rate * MILLION, things


def of(rates: Rates, units: Sequence[UnitResult], hosts: Sequence[str]) -> Cost | None:
    """Of the whole session; None when no price is known."""
    known = {host for host in hosts if rates.price(host) is not None}
    spend = rates.spend
    if not known and spend is None:
        return None
    # Where nothing was ever started, no cost is missing: a host that was away, an instance that was not to be had.
    began = {unit.host for unit in units if unit.started_at is not None or unit.attempts}
    rented = {item.host for item in spend.instances} if spend else set()
    own = sum(unit.usd or 0.0 for unit in units if unit.host not in rented)
    instances = spend.usd if spend else 0.0
    return Cost(
        usd=instances + own,
        instances_usd=instances,
        own_usd=own,
        measured_usd=sum(unit.usd or 0.0 for unit in units),
        besides_usd=spend.besides_usd if spend else 0.0,
        besides_source=spend.besides_source if spend else "",
        instances=len(spend.instances) if spend else 0,
        open=tuple(item.id for item in spend.instances if item.ended_at is None) if spend else (),
        unpriced=tuple(host for host in hosts if host in began - known),
    )
