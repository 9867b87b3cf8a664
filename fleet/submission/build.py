"""From results to a submission tree: built beside the old one, then swapped by rename."""

import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fleet.errors import SubmissionError
from fleet.mlperf.rules import load_round
from fleet.results.records import SessionResults
from fleet.session import Session
from fleet.submission import notes
from fleet.submission.layout import QUICK_NOTE, SubmissionLayout, safe_name
from fleet.submission.select import LOGS, MODEL_FACTS, Entry, Left, select
from fleet.submission.truncate import ACCURACY_LOG, ACCURACY_TEXT, truncate
from fleet.terms import Division

_PARTIAL = ".submission-"
_OLD = ".submission-old"


@dataclass(frozen=True, slots=True)
class Built:
    """A submission tree that is in place."""

    root: Path
    """The folder with the divisions in it: what the checker's --input takes."""
    systems: tuple[str, ...]
    """System ids with at least one result."""
    scenario_count: int
    performance_results: int
    """Rows the official checker must write to its csv: an empty tree `looks OK` to it."""
    left: tuple[Left, ...]
    """Every unit that is not in the tree, and why."""


def build(session: Session, results: SessionResults) -> Built:
    """Write `session.submission`; an older tree there is replaced only when the new one is complete.

    A quick session is built as well, to be looked at, and says at its root that it is not submittable.
    Raises SubmissionError naming every reason when no scenario has both its runs, or when a name cannot be a folder.
    """
    rules = load_round(results.round)
    submitter = safe_name(results.submitter, "submitter")
    selection = select(results, session.root)
    if not selection.entries:
        lines = "\n".join(_grouped(selection.left)) or "  the session has no units"
        raise SubmissionError(
            f"session {results.session}: no result can be submitted\n{lines}", hint="fleet run, then fleet results"
        )
    for entry in selection.entries:
        safe_name(entry.system.system_id, f"system id of host {entry.system.host}")
    _recover(session)
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=session.root))
    try:
        partial.chmod(0o755)
        layout = SubmissionLayout(partial, results.division, submitter, rules.layout)
        _fill(layout, results, selection.entries, selection.left, session.root)
        _swap(partial, session)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    count = len(selection.entries)
    systems = tuple(dict.fromkeys(entry.system.system_id for entry in selection.entries))
    return Built(session.submission, systems, count, count, selection.left)


def _grouped(left: Iterable[Left]) -> list[str]:
    """A line per reason with the units it holds for: a whole fleet often has one and the same."""
    units: dict[str, list[str]] = {}
    for one in left:
        units.setdefault(one.reason, []).append(one.unit)
    return [f"  {', '.join(names)}: {reason}" for reason, names in units.items()]


def _fill(
    layout: SubmissionLayout, results: SessionResults, entries: tuple[Entry, ...], left: tuple[Left, ...], source: Path
) -> None:
    for entry in entries:
        _write_entry(layout, results, entry, source)
    for system in {entry.system.system_id: entry.system for entry in entries}.values():
        _write_json(layout.system_json(system.system_id), dict(system.description))
    benchmarks = {entry.benchmark.name: entry.benchmark for entry in entries}
    for rule in benchmarks.values():
        mine = tuple(entry for entry in entries if entry.benchmark.name == rule.name)
        _write(layout.source_dir(rule.name) / "README.md", notes.source(results, rule, mine))
    mapping = {rule.name: rule.official for rule in benchmarks.values() if rule.name != rule.official}
    if mapping and results.division == Division.OPEN:
        _write_json(layout.model_mapping, mapping)
    _write(layout.documentation / "README.md", notes.documentation(results, entries, left))
    if results.quick:
        _write(layout.root / QUICK_NOTE, notes.quick(results))


def _write_entry(layout: SubmissionLayout, results: SessionResults, entry: Entry, source: Path) -> None:
    key = (entry.system.system_id, entry.benchmark.name, str(entry.scenario))
    facts = {name: entry.performance.model[name] for name in MODEL_FACTS}
    _write_json(layout.measurements(*key), facts)
    _write(layout.notes_dir(*key) / "README.md", notes.entry(results, entry))
    performance, accuracy = source / entry.performance.folder, source / entry.accuracy.folder
    _copy(performance, layout.notes_dir(*key), ["user.conf"])
    _copy(performance, layout.performance_dir(*key), LOGS)
    _copy(accuracy, layout.accuracy_dir(*key), [*LOGS, ACCURACY_LOG, ACCURACY_TEXT])
    truncate(layout.accuracy_dir(*key))


def _copy(source: Path, target: Path, names: Iterable[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_json(path: Path, value: dict[str, str]) -> None:
    _write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _recover(session: Session) -> None:
    """Clear what a killed build left behind; its old tree comes back if the swap was half done."""
    old = session.root / _OLD
    if old.is_dir() and not session.submission.exists():
        old.rename(session.submission)
    for path in session.root.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path)


def _swap(new: Path, session: Session) -> None:
    old = session.root / _OLD
    had_old = session.submission.exists()
    if had_old:
        session.submission.rename(old)
    try:
        new.rename(session.submission)
    except OSError:
        if had_old:
            old.rename(session.submission)
        raise
    if had_old:
        shutil.rmtree(old)
