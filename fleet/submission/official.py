"""Run MLCommons' own submission checker from a clone that the user has. Its code is called, never copied."""

import csv
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fleet.errors import SubmissionError
from fleet.mlperf.rules import Round
from fleet.submission.findings import Finding, Severity

CHECKER = Path("tools/submission/submission_checker/main.py")
TIMEOUT_S = 900
_OK = "SUMMARY: submission looks OK"
_BAD = "SUMMARY: submission has errors"
_NO_RESULTS = re.compile(r"NoResults (\S.*)$", re.MULTILINE)
_ERROR = re.compile(r"\bERROR\b\W*(\S.*)$", re.MULTILINE)
_NO_NEWS = ("NoResults", "SUMMARY", "Checks failed for")
"""Error lines that only repeat a verdict."""
_MAX_LINES = 20


@dataclass(frozen=True, slots=True)
class OfficialVerdict:
    """What the official checker says, after counting its results."""

    findings: tuple[Finding, ...]
    """Empty when it is content with as many results as were expected."""
    rows: int
    """Results in its csv."""
    output: str
    """All it printed, with paths relative to the tree."""


def official(root: Path, checkout: Path, rules: Round, expected: int) -> OfficialVerdict:
    """Run the checker of `checkout`, a clone of mlcommons/inference, over the tree in `root`.

    `expected` is Built.performance_results: the checker calls an empty or mis-laid-out tree OK.
    Raises SubmissionError when the clone has no checker or it runs longer than TIMEOUT_S seconds.
    """
    program = checkout.resolve() / CHECKER
    if not program.is_file():
        raise SubmissionError(
            f"{checkout}: no {CHECKER} in it", hint="clone https://github.com/mlcommons/inference and name that folder"
        )
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / "summary.csv"
        # Without -B the checker's own folder would fill with caches; --version because its default is an old round.
        command = [sys.executable, "-B", str(program), "--input", str(root.resolve())]
        command += ["--version", rules.name, "--csv", str(table)]
        try:
            done = subprocess.run(
                command, cwd=scratch, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, errors="replace"
            )
        except subprocess.TimeoutExpired as error:
            raise SubmissionError(f"the official checker ran longer than {TIMEOUT_S} s and was stopped") from error
        rows = _rows(table)
    output = (done.stdout + done.stderr).replace(f"{root.resolve()}/", "")
    return OfficialVerdict(tuple(_findings(output, done.returncode, rows, expected)), rows, output)


def _rows(table: Path) -> int:
    if not table.is_file():
        return 0
    with table.open(encoding="utf-8", newline="") as stream:
        return sum(1 for _ in csv.DictReader(stream))


def _findings(output: str, code: int, rows: int, expected: int) -> list[Finding]:
    fix = "read the checker's output; fleet's own check names most causes in plain words"
    findings = [
        Finding(Severity.ERROR, path.strip(), "the official checker refuses this result", fix)
        for path in _NO_RESULTS.findall(output)
    ]
    if _OK not in output and _BAD not in output:
        last = (output.strip().splitlines() or ["no output"])[-1]
        findings.append(Finding(Severity.ERROR, ".", f"the official checker crashed: {last}", fix))
    elif (code or _BAD in output) and not findings:
        findings.append(Finding(Severity.ERROR, ".", "the official checker says the submission has errors", fix))
    if findings:
        said = [line for line in _ERROR.findall(output) if not any(words in line for words in _NO_NEWS)]
        findings += [Finding(Severity.ERROR, ".", f"official checker: {line}", fix) for line in said[:_MAX_LINES]]
    if rows != expected:
        message = f"the official checker counts {rows} results, the tree should have {expected}"
        findings.append(Finding(Severity.ERROR, ".", message, fix))
    return findings
