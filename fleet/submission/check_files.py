"""Names, sizes and kinds of the files in a submission tree, in the strict form that every round takes.

Source: the structure rules of the checkers v3.1 to v5.1. v6.1's checker no longer calls them; they are still rules.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from fleet.submission.findings import Finding, Reporter

DIVISIONS = frozenset({"closed", "open", "network"})
MAX_FILE_BYTES = 50 * 1024 * 1024
_ROOT_FILES = frozenset({".md", ".pdf"})


def check_files(report: Reporter) -> Iterator[Finding]:
    """Every file and folder below the root, links not followed."""
    for folder, folders, files in os.walk(report.root):
        folders.sort()
        here = Path(folder)
        if not folders and not files and here != report.root:
            yield report.error(here, "the folder is empty", "remove it")
        for name in [*folders, *sorted(files)]:
            yield from _check_name(here / name, report)
    yield from _check_top(report)


def _check_name(path: Path, report: Reporter) -> Iterator[Finding]:
    name = path.name
    if name.startswith("."):
        yield report.error(path, "the name starts with a dot", "remove it")
    if any(letter.isspace() for letter in name):
        yield report.error(path, "the name has a space in it", "rename it")
    if name == "__pycache__":
        yield report.error(path, "Python's cache does not belong into a submission", "remove it")
    if path.is_symlink():
        yield report.error(path, "it is a symbolic link", "put the file itself there")
    elif path.is_file() and (size := path.stat().st_size) > MAX_FILE_BYTES:
        yield report.error(path, f"it has {size / 2**20:.0f} MiB, more than 50", "remove or shorten it")


def _check_top(report: Reporter) -> Iterator[Finding]:
    for path in sorted(report.root.iterdir()):
        if path.is_file() and path.suffix not in _ROOT_FILES:
            yield report.error(path, "only .md and .pdf files may lie at the root", "move it into documentation/")
        elif path.is_dir() and path.name not in DIVISIONS:
            yield report.warning(path, "no division has this name, so nobody looks into it", "remove it")
        elif path.is_dir():
            for inner in sorted(path.iterdir()):
                if inner.is_file():
                    yield report.error(
                        inner, "no file may lie directly below a division", "move it into documentation/"
                    )
