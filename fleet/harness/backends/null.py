"""A backend that answers after a fixed latency and computes nothing: for trying a fleet, never for a submission."""

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fleet.harness.interfaces import Benchmark, Features, Options


class NullBackend:
    """Sleeps `latency_ms` per call of predict, whatever the number of samples, and answers zeros."""

    batch_size = 1024
    labels: tuple[str, ...] = ("simulated",)

    def __init__(self, latency_ms: float) -> None:
        self._seconds = latency_ms / 1000

    @property
    def model(self) -> dict[str, str]:
        """No weights are used."""
        return {"starting_weights_filename": "none", "weight_transformations": "none, answers are simulated"}

    def versions(self) -> dict[str, str]:
        """Nothing beside the harness."""
        return {}

    def predict(self, samples: Sequence[Features]) -> Sequence[npt.NDArray[np.float32]]:
        """Zeros of shape [length, 2] per sample, after the latency."""
        time.sleep(self._seconds)
        return [np.zeros((len(sample.input_ids), 2), dtype=np.float32) for sample in samples]


def open(benchmark: Benchmark, options: Options) -> NullBackend:  # noqa: A001 - every backend's door has this name
    """A null backend; option `latency_ms` (default 1).

    Raises ValueError for any other option.
    """
    del benchmark
    if unknown := set(options) - {"latency_ms"}:
        raise ValueError(f"the null backend has no option {min(unknown)!r}; it has latency_ms")
    return NullBackend(float(options.get("latency_ms", 1.0)))
