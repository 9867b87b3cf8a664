"""What an instance costs an hour: the Pricing API's word, spot history's, else a dated table; never a guess without its source.

One Pricing call tells of a type in every region, one call for spot history of every type in a region. Both are kept in
$XDG_CACHE_HOME/mlperf-fleet/prices.json. What was downloaded or kept is not trusted: an entry that is odd is no price.
"""

import contextlib
import datetime as dt
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from fleet.cloud import aws
from fleet.cloud.price_table import DEAREST, Price, Usd, table
from fleet.errors import CloudError

PRICING_REGION = "us-east-1"
"""The Pricing API is in three regions and tells of all of them."""
FRESH_S = 24 * 3600.0
"""So long a kept price on demand is taken for today's. One that is older serves where nobody answers; its date is shown."""
SPOT_FRESH_S = 3600.0
"""Spot prices move within the day."""
_FILTERS = {
    "operatingSystem": "Linux",
    "tenancy": "Shared",
    "capacitystatus": "Used",
    "preInstalledSw": "NA",
}


class _OnDemand(BaseModel):
    at: float
    regions: dict[str, Usd]


class _Spot(BaseModel):
    at: float
    zones: dict[str, tuple[Usd, dt.date]]


class _Kept(BaseModel):
    """prices.json."""

    on_demand: dict[str, _OnDemand] = {}
    """By instance type."""
    spot: dict[str, dict[str, _Spot]] = {}
    """By region, then type."""


@dataclass(slots=True)
class Prices:
    """Prices as they are asked for: kept ones first, then AWS's, then the table's."""

    given: Mapping[str, float] = field(default_factory=dict)
    """`cloud.prices` of the campaign: what the user says he pays, by type."""
    trouble: list[str] = field(default_factory=list)
    """Why AWS told no prices, for people; one line each."""
    _kept: _Kept = field(default_factory=lambda: _read(cache_file()))
    _silent: bool = False

    def on_demand(self, kind: str, region: str) -> Price | None:
        """Of a type in a region; None when nobody knows one."""
        if kind in self.given:
            return Price(usd_per_hour=self.given[kind], source="fleet.yml", date=_day(time.time()))
        kept = self._kept.on_demand.get(kind)
        if (kept is None or not _fresh(kept.at, FRESH_S)) and not self._silent:
            try:
                kept = _OnDemand(at=time.time(), regions=_asked(kind))
            except CloudError as error:
                _let_pass(error, self.trouble)
                self._silent = True
            else:
                self._kept.on_demand[kind] = kept
        if kept is not None and region in kept.regions:
            return Price(usd_per_hour=kept.regions[region], source="pricing-api", date=_day(kept.at))
        return table().price(kind, region)

    def spot(self, kinds: tuple[str, ...], region: str) -> dict[str, dict[str, Price]]:
        """Type to zone to its last price in a region; types that are not to be had as spot have no zones."""
        kept = self._kept.spot.setdefault(region, {})
        if stale := [kind for kind in kinds if kind not in kept or not _fresh(kept[kind].at, SPOT_FRESH_S)]:
            try:
                kept |= _asked_spot(stale, region)
            except CloudError as error:
                _let_pass(error, self.trouble)
        return {
            kind: {
                zone: Price(usd_per_hour=usd, source="spot-history", date=str(day))
                for zone, (usd, day) in (kept[kind].zones if kind in kept else {}).items()
            }
            for kind in kinds
        }

    def keep(self) -> None:
        """Write what was learnt for next time; a cache that cannot be written is no reason to stop."""
        path = cache_file()
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Several fleets at once: each writes a file of its own, and the last one's stays.
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=path.parent, prefix=f"{path.name}.", delete=False
            ) as partial:
                partial.write(self._kept.model_dump_json(indent=1))
            Path(partial.name).replace(path)


def cache_file() -> Path:
    """Where prices are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mlperf-fleet" / "prices.json"


def _read(path: Path) -> _Kept:
    try:
        return TypeAdapter(_Kept).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return _Kept()


def _fresh(at: float, seconds: float) -> bool:
    """Neither old nor from a clock that ran ahead."""
    return 0 <= time.time() - at < seconds


def _let_pass(error: CloudError, trouble: list[str]) -> None:
    """Note it: there is another source. But without credentials nothing else will work either."""
    if error.code == aws.NO_CREDENTIALS or error.code in aws.EXPIRED:
        raise error
    trouble.append(error.message)


def _asked(kind: str) -> dict[str, float]:
    """Region to price of a type, from the Pricing API.

    Raises CloudError.
    """
    filters = [
        {"Type": "TERM_MATCH", "Field": name, "Value": value}
        for name, value in ({"instanceType": kind} | _FILTERS).items()
    ]
    found: dict[str, float] = {}
    pages = aws.client("pricing", PRICING_REGION).every(
        "get_products", "PriceList", ServiceCode="AmazonEC2", FormatVersion="aws_v1", Filters=filters
    )
    for item in pages:
        for region, usd in _offers(item, kind):
            # Two offers for the same thing: the dearer one is the safe one.
            found[region] = max(usd, found.get(region, 0.0))
    return found


def _offers(item: Any, kind: str) -> Iterator[tuple[str, float]]:
    """Region and dollars an hour of one product, which is JSON in a string; nothing for what is not understood."""
    try:
        product = json.loads(item) if isinstance(item, str) else item
        told = product["product"]["attributes"]
        terms = product["terms"]["OnDemand"].values()
        dimensions = [dimension for term in terms for dimension in term["priceDimensions"].values()]
        # Filters that a service ignores must not make a Windows price ours.
        if any(told.get(name) != value for name, value in ({"instanceType": kind} | _FILTERS).items()):
            return
        region = told["regionCode"]
        prices = [float(each["pricePerUnit"]["USD"]) for each in dimensions if each["unit"] == "Hrs"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    for usd in prices:
        # Reservations that are used stand there at 0.
        if isinstance(region, str) and math.isfinite(usd) and 0 < usd < DEAREST:
            yield region, usd


def _asked_spot(kinds: list[str], region: str) -> dict[str, _Spot]:
    """Type to its last price in each zone.

    Raises CloudError.
    """
    now = dt.datetime.now(dt.UTC)
    latest: dict[tuple[str, str], tuple[dt.datetime, float]] = {}
    # From now on: EC2 answers with the price that holds, which may be hours old.
    pages = aws.client("ec2", region).every(
        "describe_spot_price_history",
        "SpotPriceHistory",
        InstanceTypes=kinds,
        ProductDescriptions=["Linux/UNIX"],
        StartTime=now,
    )
    for item in pages:
        try:
            key, at, usd = (item["InstanceType"], item["AvailabilityZone"]), item["Timestamp"], float(item["SpotPrice"])
            known = latest.get(key)
            if 0 < usd < DEAREST and (known is None or at > known[0]):
                latest[key] = (at, usd)
        except (KeyError, ValueError, TypeError):
            continue
    return {
        kind: _Spot(
            at=now.timestamp(),
            zones={zone: (usd, at.date()) for (named, zone), (at, usd) in latest.items() if named == kind},
        )
        for kind in kinds
    }


def _day(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).date().isoformat()
