import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fleet.errors import SubmissionError
from fleet.session import Session
from fleet.submission.build import build
from fleet.submission.check import Severity, check
from fleet.submission.check_files import MAX_FILE_BYTES
from fleet.submission.layout import QUICK_NOTE
from fleet.submission.official import CHECKER, official

from . import example

HOME = Path("open/ExampleLab")
SYSTEM = HOME / "systems/alpha.json"
SS, OFFLINE = (HOME / "results/alpha/tiny-bert" / name for name in ("SingleStream", "Offline"))
PERF = "performance/run_1/mlperf_log_detail.txt"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Session:
    session, results = example.make(tmp_path_factory.mktemp("built"))
    build(session, results)
    return session


@pytest.fixture
def tree(built: Session, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built.submission, tmp_path / "tree"))


Defect = Callable[[Path], object]


def system(**values: object) -> Defect:
    """Change keys of the system description; None removes one."""

    def apply(root: Path) -> None:
        data = json.loads((root / SYSTEM).read_text()) | values
        (root / SYSTEM).write_text(json.dumps({k: v for k, v in data.items() if v is not None}))

    return apply


def logged(path: Path, key: str, value: object) -> Defect:
    """Give `key` another value in a detail log."""

    def apply(root: Path) -> None:
        text = (root / path).read_text()
        changed = re.sub(rf'("key": "{key}", "value": )[^,]+', lambda m: m[1] + json.dumps(value), text)
        assert changed != text
        (root / path).write_text(changed)

    return apply


def remove(path: Path) -> Defect:
    return lambda root: shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


def write(path: Path, text: str = "x") -> Defect:
    def apply(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)

    return apply


def huge(root: Path) -> None:
    with (root / HOME / "src/tiny-bert/weights.bin").open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)


def measurements(**values: object) -> Defect:
    def apply(root: Path) -> None:
        path = root / SS / "measurements.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


DEFECTS: dict[str, tuple[Defect, Path, str]] = {
    "no system json": (remove(SYSTEM), SYSTEM, "the file is missing"),
    "system json broken": (write(SYSTEM, "{"), SYSTEM, "not readable as JSON"),
    "system json a list": (write(SYSTEM, "[]"), SYSTEM, "not a JSON object"),
    "system key missing": (system(cooling=None), SYSTEM, "cooling is missing"),
    "system key empty": (system(framework=""), SYSTEM, "framework is empty"),
    "accelerators integer 0": (system(accelerators_per_node=0), SYSTEM, 'write the text "0"'),
    "accelerators N/A": (system(accelerators_per_node="N/A"), SYSTEM, "not a whole number"),
    "nodes as word": (system(number_of_nodes="one"), SYSTEM, "not a whole number"),
    "nodes superscript": (system(number_of_nodes="\u00b2"), SYSTEM, "not a whole number"),
    "type a list": (system(system_type=["edge"]), SYSTEM, "not edge, datacenter or both"),
    "status": (system(status="released"), SYSTEM, "status is 'released'"),
    "system type": (system(system_type="laptop"), SYSTEM, "system_type is 'laptop'"),
    "other submitter": (system(submitter="Other"), SYSTEM, "submitter is 'Other', but the folder is ExampleLab"),
    "other division": (system(division="closed"), SYSTEM, "division is 'closed', but the folder is open"),
    "is_network false": (system(is_network="false"), SYSTEM, "13 more keys"),
    "no mapping": (remove(HOME / "model_mapping.json"), HOME / "results", "is no official benchmark"),
    "mapping to nothing": (
        write(HOME / "model_mapping.json", '{"tiny-bert": "gptj-99"}'),
        HOME / "model_mapping.json",
        "no benchmark of v6.1",
    ),
    "no src": (remove(HOME / "src"), HOME / "src", "the folder is missing"),
    "no measurements": (remove(SS / "measurements.json"), SS / "measurements.json", "the file is missing"),
    "measurement empty": (measurements(retraining=""), SS / "measurements.json", "retraining is empty"),
    "no user.conf": (remove(SS / "user.conf"), SS / "user.conf", "the file is missing"),
    "empty readme": (write(SS / "README.md", ""), SS / "README.md", "the file is empty"),
    "scenario name": (
        lambda root: (root / SS).rename(root / SS.parent / "Burst"),
        SS.parent / "Burst",
        "Burst is no scenario",
    ),
    "swapped logs": (
        lambda root: shutil.copyfile(root / OFFLINE / PERF, root / SS / PERF),
        SS / PERF,
        "the log is of Offline, the folder of SingleStream",
    ),
    "accuracy log as performance": (
        lambda root: shutil.copyfile(root / SS / "accuracy/mlperf_log_detail.txt", root / SS / PERF),
        SS / PERF,
        "the log is of mode AccuracyOnly",
    ),
    "no performance log": (remove(SS / PERF), SS / PERF, "the log is missing"),
    "no summary": (
        remove(SS / "accuracy/mlperf_log_summary.txt"),
        SS / "accuracy/mlperf_log_summary.txt",
        "the log is missing",
    ),
    "no marker": (
        lambda root: (root / SS / PERF).write_text("hello\n" + (root / SS / PERF).read_text()),
        SS / PERF,
        "the first line lacks :::MLLOG",
    ),
    "broken line": (
        lambda root: (root / SS / PERF).write_text((root / SS / PERF).read_text() + ':::MLLOG {"key'),
        SS / PERF,
        "is not JSON",
    ),
    "seed": (logged(SS / PERF, "effective_schedule_rng_seed", 7), SS / PERF, "schedule_rng_seed is 7"),
    "invalid": (logged(SS / PERF, "result_validity", "INVALID"), SS / PERF, "the run is INVALID"),
    "early stopping": (logged(SS / PERF, "early_stopping_met", value=False), SS / PERF, "early stopping was not met"),
    "sample count": (
        logged(OFFLINE / PERF, "effective_performance_sample_count", 100),
        OFFLINE / PERF,
        "performance_sample_count is 100",
    ),
    "errors": (logged(OFFLINE / PERF, "num_errors", 3), OFFLINE / PERF, "LoadGen logged 3 errors"),
    "no result": (logged(OFFLINE / PERF, "result_samples_per_second", 0), OFFLINE / PERF, "holds no result"),
    "short": (
        logged(SS / PERF, "effective_min_duration_ms", 60000),
        Path(),
        "not submittable: 1 of 4 performance runs are short, the shortest was asked for 60 s and v6.1 demands 600 s",
    ),
    "coverage": (
        logged(SS / "accuracy/mlperf_log_detail.txt", "effective_accuracy_sample_count", 500),
        SS / "accuracy/mlperf_log_detail.txt",
        "covers 500 samples of 10833",
    ),
    "metric": (
        write(SS / "accuracy/accuracy.txt", "f1 = 88\nhash=aa\n"),
        SS / "accuracy/accuracy.txt",
        "no line that the checker reads as F1",
    ),
    "hash": (
        write(SS / "accuracy/accuracy.txt", example.ACCURACY_TXT),
        SS / "accuracy/accuracy.txt",
        "no hash= line",
    ),
    "not truncated": (
        write(SS / "accuracy/mlperf_log_accuracy.json", "x" * 10241),
        SS / "accuracy/mlperf_log_accuracy.json",
        "not truncated",
    ),
    "no accuracy json": (
        remove(SS / "accuracy/mlperf_log_accuracy.json"),
        SS / "accuracy/mlperf_log_accuracy.json",
        "the file is missing",
    ),
    "dot file": (write(HOME / "src/.gitkeep"), HOME / "src/.gitkeep", "starts with a dot"),
    "space": (write(HOME / "src/read me.md"), HOME / "src/read me.md", "has a space"),
    "cache": (write(HOME / "src/__pycache__/a.pyc"), HOME / "src/__pycache__", "Python's cache"),
    "empty folder": (lambda root: (root / HOME / "src/empty").mkdir(), HOME / "src/empty", "the folder is empty"),
    "link": (
        lambda root: (root / HOME / "src/link").symlink_to("nowhere"),
        HOME / "src/link",
        "it is a symbolic link",
    ),
    "too large": (huge, HOME / "src/tiny-bert/weights.bin", "more than 50"),
    "root file": (write(Path("notes.txt")), Path("notes.txt"), "at the root"),
    "division file": (write(Path("open/notes.md")), Path("open/notes.md"), "directly below a division"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_one_defect_is_one_error_at_its_place(tree: Path, name: str) -> None:
    defect, path, message = DEFECTS[name]
    defect(tree)
    found = [finding for finding in check(tree, example.ROUND) if finding.severity is Severity.ERROR]
    assert [finding.path for finding in found] == [path.as_posix()]
    assert message in found[0].message
    assert found[0].fix


WARNINGS: dict[str, tuple[Defect, str]] = {
    "inferred": (
        lambda root: shutil.copyfile(root / SS / PERF, root / OFFLINE / PERF),
        "inferred from a SingleStream run",
    ),
    "system without results": (write(HOME / "systems/gamma.json", "{}"), "the system has no results"),
    "no recipe": (lambda root: (root / HOME / "src/tiny-bert").rename(root / HOME / "src/x"), "the folder is missing"),
    "unknown division": (write(Path("attic/a.md")), "no division has this name"),
    "number": (system(host_processor_core_count=8), "host_processor_core_count is not text"),
    "datacenter": (system(system_type="datacenter"), "not among the scenarios of bert-99 for datacenter systems"),
    "few offline samples": (
        logged(OFFLINE / PERF, "effective_samples_per_query", 500),
        "Offline issued 500 samples, bert-99 has 10833",
    ),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_what_the_checker_accepts_today_is_a_warning(tree: Path, name: str) -> None:
    defect, message = WARNINGS[name]
    defect(tree)
    found = check(tree, example.ROUND)
    assert {finding.severity for finding in found} == {Severity.WARNING}
    assert any(message in finding.message for finding in found)


def test_a_quick_session_is_one_finding_in_plain_words(tmp_path: Path) -> None:
    session, results = example.make(tmp_path, quick=True)
    assert build(session, results).performance_results == 4
    assert "Not submittable" in (session.submission / QUICK_NOTE).read_text()
    log = session.submission / SS / PERF
    log.write_text(log.read_text().replace('"effective_performance_sample_count", "value": 10833', '"x", "value": 1'))
    found = check(session, example.ROUND)
    assert [(finding.severity, finding.path) for finding in found] == [(Severity.ERROR, ".")]
    assert found[0].message == (
        "a quick run, not submittable: 4 of 4 performance runs are short, "
        "the shortest was asked for 4 s and v6.1 demands 600 s"
    )
    assert "without --quick" in found[0].fix


def test_a_short_run_hides_only_what_it_explains(tree: Path) -> None:
    shutil.copyfile(example.LOGS / "offline-invalid/mlperf_log_detail.txt", tree / OFFLINE / PERF)
    logged(OFFLINE / PERF, "effective_min_duration_ms", 1000)(tree)
    logged(OFFLINE / PERF, "effective_performance_sample_count", 1)(tree)
    messages = [finding.message for finding in check(tree, example.ROUND) if finding.severity is Severity.ERROR]
    assert len(messages) == 2
    assert not any("INVALID" in message for message in messages)


def test_a_genuine_invalid_run_says_why(tree: Path) -> None:
    shutil.copyfile(example.LOGS / "offline-invalid/mlperf_log_detail.txt", tree / OFFLINE / PERF)
    messages = [finding.message for finding in check(tree, example.ROUND)]
    assert any("Increase expected QPS" in message for message in messages)


@pytest.mark.parametrize("make", [False, True])
def test_an_empty_tree_is_no_success(tmp_path: Path, make: bool) -> None:
    root = tmp_path / "tree"
    if make:
        (root / "open/Lab/results").mkdir(parents=True)
    found = check(root, example.ROUND)
    assert any("no results" in finding.message for finding in found)


FAKE = (
    "import argparse\np = argparse.ArgumentParser()\n[p.add_argument(a) for a in ('--input', '--version', '--csv')]\n"
)


def checkout(tmp_path: Path, rows: int, code: str) -> Path:
    """A stand-in for the official checker: writes `rows` results, then runs `code`."""
    program = tmp_path / "clone" / CHECKER
    program.parent.mkdir(parents=True)
    table = "a = p.parse_args()\nassert a.version == 'v6.1'\n"
    table += f"open(a.csv, 'w').write('Model\\n' + 'x\\n' * {rows})\n"
    program.write_text(FAKE + table + code)
    return tmp_path / "clone"


LOOKS_OK = "import sys; print('INFO:main:SUMMARY: submission looks OK', file=sys.stderr)"


@pytest.mark.parametrize(
    ("rows", "code", "messages"),
    [
        (4, LOOKS_OK, []),
        (0, LOOKS_OK, ["the official checker counts 0 results, the tree should have 4"]),
        (4, "1 / 0", ["the official checker crashed: ZeroDivisionError: division by zero"]),
        (
            3,
            (
                "print('x ERROR] bad seed\\nERROR] NoResults open/x\\nERROR] SUMMARY: submission has errors')\n"
                "raise SystemExit(1)"
            ),
            [
                "the official checker refuses this result",
                "official checker: bad seed",
                "the official checker counts 3 results, the tree should have 4",
            ],
        ),
        (4, "print('SUMMARY: submission has errors')", ["the official checker says the submission has errors"]),
    ],
)
def test_the_official_checkers_word_is_counted(
    tmp_path: Path, tree: Path, rows: int, code: str, messages: list[str]
) -> None:
    verdict = official(tree, checkout(tmp_path, rows, code), example.ROUND, 4)
    assert [finding.message for finding in verdict.findings] == messages
    assert verdict.rows == rows


def test_a_clone_without_the_checker_is_named(tmp_path: Path) -> None:
    with pytest.raises(SubmissionError, match="no tools/submission"):
        official(tmp_path, tmp_path, example.ROUND, 1)
