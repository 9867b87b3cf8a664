"""What a price is, and prices.yml: the dated table for when nobody answers. Needs no AWS."""

import datetime as dt
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field

ON_DEMAND, SPOT = "on-demand", "spot"
DEAREST = 10_000.0
"""US dollars an hour: nothing that EC2 sells costs so much, so such a figure is a misunderstanding."""
HOURS_A_MONTH = 730.0
"""As AWS counts for volumes."""
Usd = Annotated[float, Field(gt=0, lt=DEAREST, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """US dollars an hour of one instance, and who says so."""

    usd_per_hour: float
    source: str
    """`pricing-api`, `spot-history`, `fleet.yml`, `table`, or `table of us-east-1` for another region."""
    date: str
    """ISO day on which it was said."""

    @property
    def cited(self) -> str:
        """Source and date, as it stands beside the number: `table 2026-08-17`."""
        return f"{self.source} {self.date}"


class Table(BaseModel):
    """prices.yml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    date: dt.date
    region: str
    usd_per_hour: Mapping[str, Usd]
    volume_usd_per_gib_month: Usd
    address_usd_per_hour: Usd

    def price(self, kind: str, region: str) -> Price | None:
        """On demand, marked when it is another region's; None for a type that is not in it."""
        usd = self.usd_per_hour.get(kind)
        source = "table" if region == self.region else f"table of {self.region}"
        return None if usd is None else Price(usd_per_hour=usd, source=source, date=str(self.date))

    def besides(self, volume_gib: int, *, public: bool) -> float:
        """US dollars an hour of a volume, and of a public address; traffic is not in it."""
        volume = volume_gib * self.volume_usd_per_gib_month / HOURS_A_MONTH
        return volume + (self.address_usd_per_hour if public else 0.0)

    @property
    def cited(self) -> str:
        """Source and date of what it says."""
        return f"table {self.date}"


@functools.cache
def table() -> Table:
    """The table that comes with fleet."""
    text = (resources.files("fleet.cloud") / "prices.yml").read_text(encoding="utf-8")
    return Table.model_validate(yaml.safe_load(text))
