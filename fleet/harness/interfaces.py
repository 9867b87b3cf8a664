"""What a benchmark and a backend must be; loadgen.py, qsl.py and sut.py know only these."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fleet.harness import contract

Output = npt.NDArray[Any]
"""Logits float32 [length, 2] (start, end), or the newly generated tokens int64 [count] without prompt and padding."""


@dataclass(frozen=True, slots=True)
class Features:
    """One tokenised sample, unpadded: both arrays are int64 of shape [length]."""

    input_ids: npt.NDArray[np.int64]
    token_type_ids: npt.NDArray[np.int64]
    """Question 0, context 1; all zeros for a prompt."""
    text: str = ""
    """A prompt as text, for endpoints that tokenise themselves; empty where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How a generative benchmark wants its answers made."""

    beams: int
    min_new_tokens: int
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    early_stopping: bool = True
    """Beam search ends when it has as many finished answers as beams."""


class Benchmark(Protocol):
    """Dataset, pre- and post-processing and accuracy of one benchmark family.

    A module of harness/benchmarks has a function `open(name: str, assets: Path) -> Benchmark` for what
    `prepare(name: str, assets: Path) -> dict[str, str]` left in `assets`; prepare is idempotent, writes
    each file by rename, returns file name to sha256, and needs nothing but the standard library, numpy and tokenizers.
    The assets role has put what had to be downloaded into `assets / "source"` before.
    """

    @property
    def sample_count(self) -> int:
        """Samples in the whole dataset."""

    @property
    def model_dir(self) -> Path:
        """Hugging Face folder: config.json, model.safetensors (or shards with model.safetensors.index.json)."""

    @property
    def config(self) -> dict[str, Any]:
        """The model's Hugging Face configuration; known without any weights, so that random ones can be run."""

    @property
    def generation(self) -> Generation | None:
        """How answers are generated; None for a benchmark that wants logits."""

    @property
    def model(self) -> dict[str, str]:
        """The five texts of measurements.json plus weights_sha256."""

    def features(self, index: int) -> Features:
        """Sample `index`, tokenised."""

    def response(self, output: Output) -> bytes:
        """What goes to LoadGen for a backend's `output`; what `evaluate` reads back."""

    def evaluate(self, accuracy_log: Path, sample_count: int) -> dict[str, float]:
        """Metrics over the first `sample_count` samples from mlperf_log_accuracy.json.

        Raises ValueError when a sample is missing from the log or appears with a wrong size.
        """

    def accuracy_text(self, metrics: dict[str, float]) -> str:
        """accuracy.txt in the shape that the official checker parses."""


class Backend(Protocol):
    """An inference engine with a model loaded.

    A module of harness/backends has `open(benchmark: Benchmark, options: dict[str, Any]) -> Backend`. It raises
    ValueError, naming what there is, for an option it does not know and for a benchmark it cannot run.
    Options that every backend of real models knows: `weights: random` (no checkpoint is read; label `random weights`),
    and for generative benchmarks `beams`; see `generation_of`.
    """

    @property
    def batch_size(self) -> int:
        """The most samples that `predict` is given at once in Offline and Server; it may split them as it likes."""

    @property
    def by_length(self) -> bool:
        """Whether `predict` wants samples of like length together."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What a reader must know: `simulated` for the null backend, `random weights`."""

    @property
    def model(self) -> dict[str, str]:
        """What this backend does to the weights: overrides of Benchmark.model, may be empty."""

    def versions(self) -> dict[str, str]:
        """Package and device software versions."""

    def predict(self, samples: Sequence[Features]) -> Iterable[Output]:
        """One output per sample, in order; a generator may hand out early ones while later ones are computed.

        In Offline and Server `samples` come sorted by length where `by_length` says so.
        """

    def close(self) -> None:
        """End processes and connections; nothing is asked afterwards."""


@runtime_checkable
class StreamingBackend(Protocol):
    """A Backend that answers samples independently of each other, token by token: a serving engine."""

    @property
    def concurrency(self) -> int:
        """Samples in flight at once; each is asked for in a thread of its own."""

    def stream(self, sample: Features, first: Callable[[Output], None]) -> Output:
        """The whole answer's tokens; calls `first` with the first one as soon as it is there."""


Options = dict[str, Any]
RANDOM_WEIGHTS = contract.RANDOM_WEIGHTS
"""The label of a run without a checkpoint."""
NO_WEIGHTS = {"starting_weights_filename": "none", "weight_transformations": "none, the weights are random"}
"""What measurements.json says of random weights."""


def generation_of(benchmark: Benchmark, options: Options) -> tuple[Generation, tuple[str, ...]]:
    """How to generate, with option `beams` over the benchmark's own, and the label that a deviation needs.

    Raises ValueError when the benchmark generates nothing or `beams` is no positive number.
    """
    wanted = benchmark.generation
    if wanted is None:
        raise ValueError("this benchmark generates no text")
    beams = options.get("beams", wanted.beams)
    if not isinstance(beams, int) or beams < 1:
        raise ValueError(f"beams {beams!r}: a whole number from 1 on")
    labels = () if beams == wanted.beams else (f"beam {beams} instead of {wanted.beams}",)
    return replace(wanted, beams=beams), labels
