"""Dollars in words, the same in tables, report and submission. Pure."""

from fleet.results.records import Cost, UnitResult

EXACT = 0.1
"""Dollars from which two decimals say enough."""
NOT_IN_IT = "traffic, taxes and discounts are not in it"


def dollars(usd: float | None) -> str:
    """`$4.02`, `$0.0031`; a dash for what is not known."""
    if usd is None:
        return "-"
    return f"${usd:,.2f}" if usd >= EXACT or usd == 0 else f"${usd:.2g}"


def hourly(usd: float) -> str:
    """`$1.006`: prices have more digits than sums."""
    return f"${usd:.4g}"


def per_million(unit: UnitResult | None) -> str:
    """`$0.31 / M samples`; a dash where there is no such number."""
    if unit is None or unit.usd_per_million is None:
        return "-"
    return f"{dollars(unit.usd_per_million)} / M {unit.million_of}"


def lines(cost: Cost) -> list[str]:
    """The session's sum first, then what is in it and what is not."""
    if not cost.instances:
        found = [f"{dollars(cost.usd)} for the time of the units"]
    else:
        many = "1 instance" if cost.instances == 1 else f"{cost.instances} instances"
        found = [
            f"{dollars(cost.usd)}, of which units ran for {dollars(cost.measured_usd)}",
            f"{many}, from launch to end, idle time too: {dollars(cost.instances_usd)}; {NOT_IN_IT}",
            f"their volumes and addresses, beside it: about {dollars(cost.besides_usd)} ({cost.besides_source})",
        ]
        if cost.own_usd:
            found.append(f"other hosts, for the time of their units: {dollars(cost.own_usd)}")
    if cost.open:
        found.append(f"not seen to be gone, so the sum may still grow: {', '.join(cost.open)}")
    if cost.unpriced:
        found.append(f"without a price, so not in the sum: {', '.join(cost.unpriced)}")
    return found
