"""systems/<system>.json against the rules. Source: system_check.py of the official checker, b66003e1."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fleet.mlperf.rules import Round
from fleet.submission.findings import Finding, Reporter
from fleet.submission.layout import SubmissionLayout
from fleet.terms import Availability

SYSTEM_TYPES = frozenset({"datacenter", "edge", "datacenter,edge", "edge,datacenter"})
_WHOLE_NUMBERS = ("number_of_nodes", "accelerators_per_node")
_HOW = "correct the owner's notes or the description, then run `fleet results` and `fleet submission`"


def check_system(
    path: Path, data: dict[str, Any], layout: SubmissionLayout, rules: Round, report: Reporter
) -> Iterator[Finding]:
    """One description, already read."""
    for key in rules.system_keys.required:
        yield from _check_key(path, key, data, rules, report)
    for key in _WHOLE_NUMBERS:
        value = data.get(key)
        if value not in (None, "") and not str(value).isdecimal():
            yield report.error(path, f"{key} is {value!r}, not a whole number: it crashes the checker", _HOW)
    if "status" in data and str(data["status"]).lower() not in set(Availability):
        yield report.error(path, f"status is {data['status']!r}, not one of {', '.join(Availability)}", _HOW)
    if "system_type" in data and str(data["system_type"]) not in SYSTEM_TYPES:
        yield report.error(path, f"system_type is {data['system_type']!r}, not edge, datacenter or both", _HOW)
    for key, folder in (("submitter", layout.submitter), ("division", layout.division)):
        if data.get(key) and str(data[key]).lower() != folder.lower():
            yield report.error(path, f"{key} is {data[key]!r}, but the folder is {folder}", _HOW)
    if layout.division != "network" and data.get("is_network"):
        yield report.error(path, "is_network, even false, makes the checker ask for 13 more keys", "leave it out")


def _check_key(path: Path, key: str, data: dict[str, Any], rules: Round, report: Reporter) -> Iterator[Finding]:
    if key not in data:
        yield report.error(path, f"{key} is missing", _HOW)
    elif not data[key] and key not in rules.system_keys.may_be_empty:
        zero = isinstance(data[key], int) and not isinstance(data[key], bool)
        yield report.error(path, f"{key} is empty" + (' to the checker: write the text "0"' if zero else ""), _HOW)
    elif not isinstance(data[key], str):
        yield report.warning(path, f"{key} is not text: checkers before v6 crash on it", _HOW)
