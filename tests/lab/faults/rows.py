"""Rows of the table of faults: written by the tests as they pass, and made into docs/reliability.md from there.

python -m tests.lab.faults.rows     writes the table between the marks of docs/reliability.md
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_ROOT = Path(__file__).resolve().parents[3]
FILE = _ROOT / "build" / "reliability.json"
PAGE = _ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults:begin -->", "<!-- faults:end -->"
SEEN_LETTERS = 170
_COLUMNS = ("fault", "what the user sees", "state", "noticed after", "missing until the next bench", "lost")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault that was injected, and what became of it. A row exists only where nothing was lost."""

    fault: str
    sees: str
    """The command's own line, or nothing where it has nothing to tell."""
    state: str
    """Of the host's units when the bench that saw it had ended."""
    noticed_s: float | None
    lacking: int
    """Units that this bench had to do without; the next one had them all."""


def save(rows: Iterable[Row], file: Path = FILE) -> None:
    """Add the rows to those of earlier runs; the newest of a fault counts."""
    known = {row.fault: row for row in [*load(file), *rows]}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps([asdict(row) for row in known.values()], indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def load(file: Path = FILE) -> list[Row]:
    """The rows that were saved; none when there is no such file."""
    if not file.exists():
        return []
    return [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))]


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, by the name of the fault."""
    lines = [_line(_COLUMNS), _line("---" for _ in _COLUMNS)]
    for row in sorted(rows, key=lambda row: row.fault):
        seen = (
            f"`{row.sees if len(row.sees) <= SEEN_LETTERS else row.sees[:SEEN_LETTERS] + '…'}`"
            if row.sees
            else "nothing"
        )
        after = "-" if row.noticed_s is None else f"{row.noticed_s:.0f} s"
        lacking = f"{row.lacking} units" if row.lacking != 1 else "1 unit"
        lines.append(_line([row.fault, seen, row.state or "-", after, lacking if row.lacking else "-", "nothing"]))
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    # A bar would end the cell, even inside code.
    return f"| {' | '.join(cell.replace('|', chr(0x2502)) for cell in cells)} |"


def put(page: str, made: str) -> str:
    """The page with the table between its marks. Raises ValueError when it has no marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no place for the table: {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{made}\n{END}{after}"


def main() -> int:
    """Bring the page up to date from the saved rows."""
    rows = load()
    if not rows:
        print(f"{FILE}: no rows; next: make test-faults", file=sys.stderr)
        return 1
    PAGE.write_text(put(PAGE.read_text(encoding="utf-8"), table(rows)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
