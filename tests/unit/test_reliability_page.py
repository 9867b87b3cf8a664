"""docs/reliability.md explains every state and reason there is, and says of each what is really done about it."""

import re
from pathlib import Path

from fleet import retries
from fleet.campaign import load_text
from fleet.terms import HostState, Reason, UnitState

PAGE = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
CAMPAIGN = load_text(
    "submitter: ExampleLab\nbenchmarks: [{name: tiny-bert}]\nhosts: [{name: a, kind: server}]\n", "fleet.yml"
)


def tables() -> list[dict[str, list[str]]]:
    """Each table of the page as its first cell, without the code marks, to the other cells."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, flags=re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|\n ").split(" | ")] for line in block.splitlines()[2:]]
        found.append({cells[0].strip("`"): cells[1:] for cells in rows})
    return found


def test_every_state_and_reason_is_explained_and_nothing_else() -> None:
    units, hosts, reasons, *_ = tables()
    assert list(units) == [str(state) for state in UnitState]
    assert list(hosts) == [str(state) for state in HostState]
    assert list(reasons) == [str(reason) for reason in Reason if reason is not Reason.NONE]
    assert [name for table in (units, hosts) for name, cells in table.items() if len(cells) != 2 or "" in cells] == []
    assert [name for name, cells in reasons.items() if len(cells) != 3 or "" in cells] == []


def test_what_is_tried_again_is_the_policy() -> None:
    _, _, reasons, *_ = tables()
    assert {name: cells[1] for name, cells in reasons.items()} == {name: policy(Reason(name)) for name in reasons}


def policy(reason: Reason) -> str:
    found = retries.policy(CAMPAIGN, reason)
    if not found.times:
        return "no"
    after = f"after {found.after_s:.0f} s" if found.after_s else "at once"
    return f"{found.times} time{'s' if found.times > 1 else ''}, {after}"


def test_there_is_one_place_for_the_table_of_faults() -> None:
    assert len(re.findall(r"<!-- faults:begin -->.*?<!-- faults:end -->", PAGE, flags=re.DOTALL)) == 1
    assert PAGE.count("<!-- faults:") == 2
