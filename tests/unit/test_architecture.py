"""The house's own rules: who may import whom, and how long anything may get."""

import ast
import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
SOURCES = sorted((TOP / "fleet").rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 500, 80


def name_of(path: Path) -> str:
    parts = path.relative_to(TOP).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = [name_of(path) for path in SOURCES if path.name != "__main__.py"]

# One interpreter imports its share of the modules, each as if it were alone: what fleet had loaded is forgotten before
# each, so that a cycle shows, while the big libraries stay.
EACH_ALONE = """
import importlib, sys
for name in sys.argv[1:]:
    for loaded in [loaded for loaded in sys.modules if loaded == "fleet" or loaded.startswith("fleet.")]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except BaseException as error:
        sys.exit(f"{name}: {type(error).__name__}: {error}")
"""


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter says when it ends badly; nothing when it does not."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=TOP, check=False
    )
    return done.stderr.strip() or str(done.returncode) if done.returncode else ""


def test_every_module_can_be_imported_first() -> None:
    assert len(MODULES) > 60
    # TensorFlow after Triton: the other order aborts the interpreter, for both bring an LLVM.
    shares = [["fleet.harness.models.kernels", *MODULES[first::2]] for first in range(2)]
    with ThreadPoolExecutor() as pool:
        said = list(pool.map(lambda share: python(EACH_ALONE, *share), shares))
    assert said == ["", ""]


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("folder", ["fleet", "tests", "roles", "playbooks", "benchmarks"])
def test_no_file_is_too_long(folder: str) -> None:
    files = [path for kind in ("*.py", "*.yml", "*.j2") for path in (TOP / folder).rglob(kind)]
    assert {str(path.relative_to(TOP)): lines_of(path) for path in files if lines_of(path) > FILE_LINES} == {}


def test_no_function_is_too_long() -> None:
    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION_LINES:
                    long[f"{path.relative_to(TOP)}:{node.lineno} {node.name}"] = length
    assert long == {}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def test_the_contract_needs_only_the_standard_library() -> None:
    roots = {name.partition(".")[0] for name in imported(TOP / "fleet" / "harness" / "contract.py")}
    assert roots <= sys.stdlib_module_names


# The controller must work where none of the host's packages are installed.
BLOCKED = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ImportError(f"{name} must not be imported")
REFUSED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Refuse())
import importlib
for name in sys.argv[2:]:
    importlib.import_module(name)
"""
ON_HOST = "torch,mlperf_loadgen,transformers,tokenizers,safetensors,pynvml"
ON_CONTROLLER = (
    "ansible_runner,ansible,pandas,click,rich,pydantic,paramiko,yaml,jinja2,plotly,ClusterShell,filelock,boto3"
)


def words(name: str) -> set[str]:
    return set(name.rpartition(".")[2].split("_"))


def test_the_controller_runs_without_the_hosts_packages() -> None:
    controller = [name for name in MODULES if not name.startswith("fleet.harness.")]
    assert "fleet.cli.bench" in controller
    assert python(BLOCKED, ON_HOST, "fleet.harness.contract", *controller) == ""


def test_the_harness_runs_without_the_controllers_packages() -> None:
    # TensorFlow's own Keras needs rich, so that package is on those hosts by itself.
    harness = [name for name in MODULES if name.startswith("fleet.harness") and not {"tensorflow", "tf"} & words(name)]
    assert "fleet.harness.supervise" in harness
    assert python(BLOCKED, ON_CONTROLLER, *harness) == ""


def test_supervising_needs_nothing_but_python() -> None:
    modules = ("fleet.harness.supervise", "fleet.harness.__main__", "fleet.harness.describe", "fleet.harness.assets")
    assert python(BLOCKED, f"{ON_HOST},{ON_CONTROLLER},numpy", *modules) == ""


def test_the_blocking_finder_blocks() -> None:
    assert "torch must not be imported" in python(BLOCKED, "torch", "torch")


def test_import_linter_agrees() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        capture_output=True, text=True, cwd=TOP, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_every_public_thing_is_explained() -> None:
    silent = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree) and path.name != "__main__.py":
            silent.append(str(path.relative_to(TOP)))
        silent += [
            f"{path.relative_to(TOP)}:{node.lineno} {node.name}"
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ]
    assert silent == []


def test_the_verbs_are_the_files_of_cli() -> None:
    verbs = importlib.import_module("fleet.cli.main").VERBS
    shared = {"__init__", "main", "options", "output", "tables", "cloud_tables"}
    assert {path.stem for path in (TOP / "fleet" / "cli").glob("*.py")} - shared == set(verbs)
