"""Where every file of a submission lies, per round: one table."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fleet.errors import SubmissionError

QUICK_NOTE = "NOT_SUBMITTABLE.md"
"""At the root of a tree built from a quick session; the rules allow .md files there."""
MODEL_MAPPING = "model_mapping.json"

_SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")

_V6 = {
    "system": "systems/{system}.json",
    "source": "src/{benchmark}",
    "results": "results",
    "measurements": "results/{system}/{benchmark}/{scenario}/measurements.json",
    "notes": "results/{system}/{benchmark}/{scenario}",
    "performance": "results/{system}/{benchmark}/{scenario}/performance/run_1",
    "accuracy": "results/{system}/{benchmark}/{scenario}/accuracy",
    "documentation": "documentation",
}
"""README.md and user.conf lie in `notes`, whatever folder that is."""

LAYOUTS: dict[str, dict[str, str]] = {"v6": _V6}
"""Round layout name to templates under <division>/<submitter>/. The layout of v3.1 to v5.1 would be one more row:
`code/` for `src/`, and `measurements/<system>/…` for measurements.json, README.md and user.conf."""


@dataclass(frozen=True, slots=True)
class SubmissionLayout:
    """Paths of one submitter's part of a submission tree. Source: submission_checker/constants.py, b66003e1."""

    root: Path
    """The folder that holds the divisions."""
    division: str
    submitter: str
    name: str = "v6"
    """A key of LAYOUTS."""

    @property
    def home(self) -> Path:
        """<division>/<submitter>."""
        return self.root / self.division / self.submitter

    @property
    def results_dir(self) -> Path:
        """The folder with one folder per system."""
        return self._path("results")

    @property
    def documentation(self) -> Path:
        """Notes for reviewers."""
        return self._path("documentation")

    @property
    def model_mapping(self) -> Path:
        """Custom benchmark name to official one; open division only."""
        return self.home / MODEL_MAPPING

    def system_json(self, system: str) -> Path:
        """The description of a system."""
        return self._path("system", system=system)

    def source_dir(self, benchmark: str) -> Path:
        """How to reproduce a benchmark."""
        return self._path("source", benchmark=benchmark)

    def measurements(self, system: str, benchmark: str, scenario: str) -> Path:
        """The model facts of one result."""
        return self._path("measurements", system=system, benchmark=benchmark, scenario=scenario)

    def notes_dir(self, system: str, benchmark: str, scenario: str) -> Path:
        """The folder of README.md and user.conf of one result."""
        return self._path("notes", system=system, benchmark=benchmark, scenario=scenario)

    def performance_dir(self, system: str, benchmark: str, scenario: str) -> Path:
        """The logs of the one performance run."""
        return self._path("performance", system=system, benchmark=benchmark, scenario=scenario)

    def accuracy_dir(self, system: str, benchmark: str, scenario: str) -> Path:
        """The logs of the accuracy run, and accuracy.txt."""
        return self._path("accuracy", system=system, benchmark=benchmark, scenario=scenario)

    def scenarios(self) -> Iterator[tuple[str, str, str]]:
        """(system, benchmark, scenario) of every result in the tree, sorted."""
        for path in sorted(self.results_dir.glob("*/*/*")):
            if path.is_dir():
                yield path.parts[-3], path.parts[-2], path.parts[-1]

    def _path(self, kind: str, **names: str) -> Path:
        return self.home / LAYOUTS[self.name][kind].format(**names)


def safe_name(text: str, what: str) -> str:
    """`text`, when it can be a folder of a submission.

    Raises SubmissionError, with a name that would do, when it has anything but A-Z a-z 0-9 . _ - or a leading dot.
    """
    if _SAFE.fullmatch(text):
        return text
    better = re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip(".").strip("_") or "name"
    raise SubmissionError(
        f"{what} {text!r} cannot be a folder name in a submission: use letters, digits, '.', '_' and '-'",
        hint=f"call it {better} in fleet.yml, then run `fleet results` and `fleet submission` again",
    )
