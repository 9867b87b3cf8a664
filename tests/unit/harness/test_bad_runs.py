"""Bad input and dying engines through the whole on-host path: the harness as hosts get it, its supervisor, LoadGen.

Each unit must end by itself, as failed, with a cause that names what is wrong; LoadGen's logs stay where its test began.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fleet import provision
from fleet.harness import loadgen, unit_queue
from fleet.harness.contract import Mode, Reason, RunSpec, Scenario, UnitState, UnitStatus
from fleet.mlperf import rules
from tests.unit.harness.benchmarks import articles, test_bert
from tests.unit.harness.units import TOP, measured, queue

LOCAL = ("pytorch", "onnxruntime", "tensorflow")
SAMPLES = 8
TARGETS = {
    Scenario.SINGLE_STREAM: "target_latency = 10", Scenario.OFFLINE: "target_qps = 20", Scenario.SERVER: "target_qps = 20",
}  # fmt: skip


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The on-host half, unpacked as the harness role does."""
    base = tmp_path_factory.mktemp("harness")
    path, _ = provision.harness_archive(base)
    with tarfile.open(path) as archive:
        archive.extractall(base / "current", filter="data")
    return base / "current"


def call(harness: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(harness), *arguments], capture_output=True, text=True, check=False, cwd="/"
    )


def prepare(harness: Path, work: Path, name: str) -> "subprocess.CompletedProcess[str]":
    return call(harness, "prepare", str(work), name, rules.load_benchmark(name).module, "digest")


@dataclass(frozen=True)
class Ended:
    """What a unit left."""

    status: UnitStatus
    folder: Path
    seconds: float

    def logged(self) -> list[str]:
        lines = (self.folder / "mlperf_log_detail.txt").read_text(encoding="utf-8").splitlines()
        return [json.loads(line.removeprefix(":::MLLOG "))["key"] for line in lines]


def run(harness: Path, work: Path, name: str, backend: str, **more: Any) -> Ended:
    """A unit under a supervisor, to its end."""
    rule = rules.load_benchmark(name)
    scenario = more.pop("scenario", Scenario.OFFLINE)
    text = f"*.{scenario}.min_duration = {more.pop('duration', 300)}\n*.{scenario}.{TARGETS[scenario]}\n"
    spec = RunSpec(
        unit="u", session="s", host="h", benchmark=name, module=rule.module, loadgen_model=rule.loadgen_model,
        scenario=scenario, mode=more.pop("mode", Mode.PERFORMANCE), backend=backend, backend_options=more,
        user_conf=text, sample_count=SAMPLES, performance_sample_count=SAMPLES, deadline_s=100, expected_s=5,
        work_dir=str(work), round="v6.1", loadgen_version=loadgen.version(), quick=True,
    )  # fmt: skip
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(harness)])
        patch.setenv("OMP_NUM_THREADS", "1")
        unit_queue.start(work, queue(spec))
    folder = work / "runs" / "s" / "u"
    while not ((status := unit_queue.read_status(folder)) and status.state.ended):
        assert time.monotonic() - began < 90, (folder / "harness.log").read_text(encoding="utf-8")
        time.sleep(0.05)
    return Ended(status, folder, time.monotonic() - began)


def options(backend: str) -> dict[str, Any]:
    return {"threads": 1} | ({"device": "cpu"} if backend == "pytorch" else {})


def failed(ended: Ended, *said: str) -> None:
    assert ended.status.state is UnitState.FAILED
    for text in said:
        assert text in ended.status.cause
    assert not (ended.folder / "manifest.json").exists()


@pytest.fixture
def bert(harness: Path, tmp_path: Path) -> Path:
    """A work folder with bert-99 over a small checkpoint, prepared."""
    source = test_bert.make_source(tmp_path / "assets" / "bert-99")
    save_file(test_bert.weights(), source / "model.safetensors")
    done = prepare(harness, tmp_path, "bert-99")
    assert done.returncode == 0, done.stderr
    return tmp_path


@pytest.fixture(scope="module")
def summaries(harness: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Assets of tiny-gptj, to be linked."""
    work = tmp_path_factory.mktemp("summaries")
    assert prepare(harness, work, "tiny-gptj").returncode == 0
    return work / "assets"


@pytest.fixture
def gptj(summaries: Path, tmp_path: Path) -> Path:
    """A work folder with tiny-gptj, prepared."""
    shutil.copytree(summaries, tmp_path / "assets")
    return tmp_path


@pytest.fixture
def own_harness(harness: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage: the demo models are part of it."""
    return Path(shutil.copytree(harness, tmp_path / "harness"))


@pytest.mark.parametrize("backend", LOCAL)
def test_good_input_runs(harness: Path, bert: Path, backend: str) -> None:
    ended = run(harness, bert, "bert-99", backend, **options(backend))
    assert ended.status.state is UnitState.DONE, (ended.folder / "harness.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("backend", LOCAL)
def test_truncated_weights(harness: Path, bert: Path, backend: str) -> None:
    weights = bert / "assets" / "bert-99" / "source" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    ended = run(harness, bert, "bert-99", backend, **options(backend))
    failed(ended, "model.safetensors")
    assert "fetch it again" in ended.status.cause or "then: fleet provision" in ended.status.cause


@pytest.mark.parametrize("backend", LOCAL)
def test_truncated_weights_of_a_model_that_generates(own_harness: Path, gptj: Path, backend: str) -> None:
    weights = own_harness / "fleet" / "harness" / "benchmarks" / "tiny_gptj" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    failed(run(own_harness, gptj, "tiny-gptj", backend, **options(backend)), "model.safetensors")


@pytest.mark.parametrize("backend", LOCAL)
def test_no_weights(harness: Path, bert: Path, backend: str) -> None:
    (bert / "assets" / "bert-99" / "source" / "model.safetensors").unlink()
    failed(run(harness, bert, "bert-99", backend, **options(backend)), "model.safetensors", "fleet provision")


@pytest.mark.parametrize("backend", LOCAL)
def test_weights_of_another_vocabulary(harness: Path, bert: Path, backend: str) -> None:
    folder = bert / "assets" / "bert-99" / "model"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"vocab_size": 20}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    name = "bert.embeddings.word_embeddings.weight"
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {name: weights[name][:20].copy()}, bert / "assets" / "bert-99" / "source" / "model.safetensors")
    ended = run(harness, bert, "bert-99", backend, **options(backend))
    failed(ended, "is none of the model's 20: vocabulary and weights do not match")
    assert "effective_scenario" in ended.logged()


@pytest.mark.parametrize("scenario", [Scenario.SINGLE_STREAM, Scenario.OFFLINE])
@pytest.mark.parametrize("backend", LOCAL)
def test_prompts_of_another_vocabulary(harness: Path, gptj: Path, backend: str, scenario: Scenario) -> None:
    path = gptj / "assets" / "tiny-gptj" / "input_ids.npy"
    ids = np.load(path)
    ids[:] = 60_000
    np.save(path, ids)
    ended = run(harness, gptj, "tiny-gptj", backend, scenario=scenario, **options(backend))
    failed(ended, "60000")
    assert "effective_scenario" in ended.logged()


def lose(path: Path, *keys: Any) -> None:
    data = holder = json.loads(path.read_text(encoding="utf-8"))
    for key in keys[:-1]:
        holder = holder[key]
    del holder[keys[-1]]
    path.write_text(json.dumps(data), encoding="utf-8")


def test_a_dataset_with_a_missing_field(harness: Path, tmp_path: Path) -> None:
    """Where provision prepares it: the last line is what the role hands on as the cause."""
    source = test_bert.make_source(tmp_path / "assets" / "bert-99")
    lose(source / "dev-v1.1.json", "data", 0, "paragraphs", 1, "qas", 0, "answers")
    done = prepare(harness, tmp_path, "bert-99")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "article 1 paragraph 2 question 1" in last
    assert "has no 'answers': fetch the file again" in last
    assert not (tmp_path / "assets" / "bert-99" / ".complete").exists()


@pytest.mark.parametrize("name", ["gptj-99", "llama3.1-8b-edge"])
def test_articles_with_a_missing_field(harness: Path, tmp_path: Path, name: str) -> None:
    source = tmp_path / "assets" / name / "source"
    source.mkdir(parents=True)
    file, count, tokenizer = {
        "gptj-99": ("cnn_eval.json", 13_368, articles.byte_tokenizer(50_257, 50_256)),
        "llama3.1-8b-edge": (
            "sample_cnn_eval_5000.json",
            5_000,
            articles.byte_tokenizer(128_256, 128_009, begin=128_000),
        ),
    }[name]
    entries = [{"instruction": "Do it.", "input": "Rain.", "output": "Rain ."} for _ in range(count)]
    del entries[3]["output"]
    articles.write_articles(source / file, entries)
    articles.splitter_archive(source / "punkt_tab.zip")
    (source / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    done = prepare(harness, tmp_path, name)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert ".json: entry 3" in last
    assert "'output'" in last


def test_a_vocabulary_of_another_model(harness: Path, tmp_path: Path) -> None:
    source = test_bert.make_source(tmp_path / "assets" / "bert-99")
    (source / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n", encoding="utf-8")
    done = prepare(harness, tmp_path, "bert-99")
    assert done.returncode != 0
    assert "vocab.txt: 4 tokens, the model has" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["examples.json", "rows.npy"])
def test_a_prepared_dataset_that_is_damaged(harness: Path, bert: Path, name: str) -> None:
    path = bert / "assets" / "bert-99" / name
    path.write_bytes(path.read_bytes()[:50])
    ended = run(harness, bert, "bert-99", "pytorch", mode=Mode.ACCURACY, **options("pytorch"))
    failed(ended, "provision")


# What each framework raises, put in where it computes: for more than two samples, or for any.
SHORT = {
    ("tiny-bert", "pytorch"): (
        "import torch\n"
        "from fleet.harness.backends.pytorch import BertBackend as B\n"
        "make, name, error = B._compute, '_compute', torch.OutOfMemoryError('CUDA out of memory')\n"
    ),
    ("tiny-gptj", "pytorch"): (
        "import torch\n"
        "from fleet.harness.models.beam_search import Batch as B\n"
        "make, name, error = B.begin, 'begin', torch.OutOfMemoryError('CUDA out of memory')\n"
    ),
}  # fmt: skip
for _benchmark, _class in (("tiny-bert", "BertBackend"), ("tiny-gptj", "GptJBackend")):
    SHORT[_benchmark, "onnxruntime"] = (
        f"from fleet.harness.backends.onnxruntime import {_class} as B\n"
        "make, name, error = B._outputs, '_outputs', RuntimeError('Failed to allocate memory for requested buffer')\n"
    )
    SHORT[_benchmark, "tensorflow"] = (
        f"from fleet.harness.backends.tensorflow import {_class} as B, tf\n"
        "make, name = B._outputs, '_outputs'\n"
        "error = tf.errors.ResourceExhaustedError(None, None, 'OOM when allocating tensor')\n"
    )
PATCH = """
def short(self, samples, *rest):
    if len(samples) > MOST:
        raise error
    return make(self, samples, *rest)
setattr(B, name, short)
"""


@pytest.mark.parametrize(("name", "backend"), list(SHORT))
@pytest.mark.parametrize("most", [2, 0])
def test_out_of_memory(  # noqa: PLR0917 - fixtures and parameters
    harness: Path, summaries: Path, tmp_path: Path, name: str, backend: str, most: int
) -> None:
    shutil.copytree(summaries, tmp_path / "assets")
    if name == "tiny-bert":
        assert prepare(harness, tmp_path, name).returncode == 0
    rule = rules.load_benchmark(name)
    spec = RunSpec(
        unit="u", session="s", host="h", benchmark=name, module=rule.module, loadgen_model=rule.loadgen_model,
        scenario=Scenario.OFFLINE, mode=Mode.ACCURACY, backend=backend, backend_options=options(backend), user_conf="",
        sample_count=SAMPLES, performance_sample_count=SAMPLES, deadline_s=100, expected_s=5, work_dir=str(tmp_path),
        round="v6.1", loadgen_version=loadgen.version(), quick=True,
    )  # fmt: skip
    code, folder = measured(tmp_path / "runs", spec, more=SHORT[name, backend] + PATCH.replace("MOST", str(most)))
    log = (folder / "harness.log").read_text(encoding="utf-8")
    assert (folder / "mlperf_log_detail.txt").stat().st_size > 0
    if most:
        assert code == 0, log
        assert (folder / "accuracy.txt").is_file()
    else:
        assert code == 1, log
        cause = json.loads((folder / "error.json").read_text(encoding="utf-8"))["cause"]
        assert "out of" in cause
        assert "memory" in cause


def test_a_process_that_is_killed_in_the_middle(harness: Path, bert: Path) -> None:
    """In the middle of LoadGen's test, and not by the kernel: its count of those killed for memory has not grown."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TOP))
        ended_by = _killer(bert / "runs" / "s" / "u")
        ended = run(harness, bert, "bert-99", "pytorch", scenario=Scenario.SINGLE_STREAM, duration=30_000, device="cpu")
        assert ended_by.wait(timeout=30) == 0
    assert (ended.status.state, ended.status.reason) == (UnitState.INTERRUPTED, Reason.INTERRUPTED)
    assert ended.status.cause == "killed by SIGKILL"
    assert ended.seconds < 25
    assert "effective_scenario" in ended.logged()


def _killer(folder: Path) -> "subprocess.Popen[bytes]":
    """Ends the unit of `folder` by its pid, once its test has begun."""
    code = (
        "import json, os, signal, sys, time\n"
        "from pathlib import Path\n"
        "folder = Path(sys.argv[1])\n"
        "while not (folder / 'progress').exists(): time.sleep(0.05)\n"
        "os.kill(json.loads((folder / 'status.json').read_text())['pid'], signal.SIGKILL)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(folder)])


class Engine:
    """A serving engine, started again when a test has killed it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self._endpoint = ""

    def endpoint(self) -> str:
        if self.process is None or self.process.poll() is not None:
            model = TOP / "fleet" / "harness" / "benchmarks" / "tiny_gptj"
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.serving", str(model)],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=TOP,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert self.process.stdout is not None
            self._endpoint = f"http://127.0.0.1:{self.process.stdout.readline().strip()}/v1"
        return self._endpoint


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    found = Engine()
    yield found
    if found.process is not None:
        found.process.kill()
        found.process.wait()


@pytest.mark.parametrize("scenario", [Scenario.SINGLE_STREAM, Scenario.OFFLINE, Scenario.SERVER])
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("silent", "has not begun to answer for 1 s (option timeout_s); is the engine stuck?"),
        ("comments", "has streamed no token for 1 s (option timeout_s); is the engine stuck?"),
        ("empty", "ended a stream without any token"),
        ("die", "in the middle of an answer"),
    ],
)
@pytest.mark.thorough
def test_an_endpoint_that_dies_or_streams_nothing(  # noqa: PLR0917 - fixtures and parameters
    harness: Path, gptj: Path, engine: Engine, scenario: Scenario, fault: str, cause: str
) -> None:
    ended = run(
        harness, gptj, "tiny-gptj", "openai", scenario=scenario, duration=60_000, endpoint=engine.endpoint(), timeout_s=1,
        concurrency=2, extra=json.dumps({"fault": fault}),
    )  # fmt: skip
    failed(ended, "127.0.0.1:")
    # Of several streams the one that the engine's death caught before its answer may be the first to say so.
    assert cause in ended.status.cause or (fault == "die" and "did the engine die?" in ended.status.cause)
    # LoadGen would have gone on for a minute.
    assert ended.seconds < 40
    assert "effective_scenario" in ended.logged()
    assert (ended.folder / "user.conf").is_file()
    assert (ended.folder / "harness.log").stat().st_size > 0
