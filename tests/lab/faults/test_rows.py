"""The table of faults as it is written: from rows to the page."""

from pathlib import Path

import pytest

from tests.lab.faults import rows

LINK = rows.Row(fault="link down", sees="h02: no answer | a", state="unreachable", noticed_s=15.2, lacking=1)
CLOCK = rows.Row(fault="clock", sees="", state="done", noticed_s=None, lacking=0)


def test_the_newest_row_of_a_fault_counts(tmp_path: Path) -> None:
    file = tmp_path / "build" / "rows.json"
    assert rows.load(file) == []
    rows.save([LINK, rows.Row(fault="clock", sees="x", state="failed", noticed_s=1.0, lacking=6)], file)
    rows.save([CLOCK], file)
    assert rows.load(file) == [LINK, CLOCK]


def test_the_table_takes_the_place_between_the_marks() -> None:
    page = f"# Title\n\n{rows.BEGIN}\nold\n{rows.END}\n\nmore\n"
    made = rows.put(page, rows.table([LINK, CLOCK]))
    assert rows.put(made, rows.table([LINK, CLOCK])) == made
    assert made.splitlines() == [
        "# Title",
        "",
        rows.BEGIN,
        "",
        "| fault | what the user sees | state | noticed after | missing until the next bench | lost |",
        "| --- | --- | --- | --- | --- | --- |",
        "| clock | nothing | done | - | - | nothing |",
        "| link down | `h02: no answer │ a` | unreachable | 15 s | 1 unit | nothing |",
        "",
        rows.END,
        "",
        "more",
    ]


def test_a_page_without_a_place_is_left_alone() -> None:
    with pytest.raises(ValueError, match="no place for the table"):
        rows.put("# Title\n", rows.table([LINK]))
