"""What a benchmark and a backend must be; loadgen.py, qsl.py and sut.py know only these."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Features:
    """One tokenised sample, unpadded: both arrays are int64 of shape [length]."""

    input_ids: npt.NDArray[np.int64]
    token_type_ids: npt.NDArray[np.int64]


class Benchmark(Protocol):
    """Dataset, pre- and post-processing and accuracy of one benchmark family.

    A module of harness/benchmarks has a function `open(name: str, assets: Path) -> Benchmark` for what
    `prepare(name: str, assets: Path) -> dict[str, str]` left in `assets`; prepare is idempotent, writes
    each file by rename, returns file name to sha256, and needs nothing but the standard library, numpy and tokenizers.
    """

    @property
    def sample_count(self) -> int:
        """Samples in the whole dataset."""

    @property
    def model_dir(self) -> Path:
        """Hugging Face folder: config.json, model.safetensors."""

    @property
    def model(self) -> dict[str, str]:
        """The five texts of measurements.json plus weights_sha256."""

    def features(self, index: int) -> Features:
        """Sample `index`, tokenised."""

    def response(self, output: npt.NDArray[np.float32]) -> bytes:
        """What goes to LoadGen for a backend's `output`; what `evaluate` reads back."""

    def evaluate(self, accuracy_log: Path, sample_count: int) -> dict[str, float]:
        """Metrics over the first `sample_count` samples from mlperf_log_accuracy.json.

        Raises ValueError when a sample is missing from the log or appears with a wrong size.
        """

    def accuracy_text(self, metrics: dict[str, float]) -> str:
        """accuracy.txt in the shape that the official checker parses."""


class Backend(Protocol):
    """An inference engine with a model loaded.

    A module of harness/backends has `open(benchmark: Benchmark, options: dict[str, Any]) -> Backend`.
    """

    @property
    def batch_size(self) -> int:
        """Samples that `predict` takes best at once in Offline and Server."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What a reader must know: `simulated` for the null backend, `random weights`."""

    @property
    def model(self) -> dict[str, str]:
        """What this backend does to the weights: overrides of Benchmark.model, may be empty."""

    def versions(self) -> dict[str, str]:
        """Package and device software versions."""

    def predict(self, samples: Sequence[Features]) -> Sequence[npt.NDArray[np.float32]]:
        """Start and end logits, one array of shape [length, 2] per sample, in order."""


Options = dict[str, Any]
