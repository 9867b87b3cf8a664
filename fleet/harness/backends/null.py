"""A backend that answers after a fixed latency and computes nothing: for trying a fleet, never for a submission."""

import time
from collections.abc import Sequence

import numpy as np

from fleet.harness.interfaces import Benchmark, Features, Options, Output


class NullBackend:
    """Sleeps `latency_ms` per call of predict, whatever the number of samples, and answers zeros."""

    by_length = False
    labels: tuple[str, ...] = ("simulated",)

    def __init__(self, latency_ms: float, tokens: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self._seconds = latency_ms / 1000
        self._logits: dict[int, Output] = {}
        self._tokens: Output | None = np.zeros(tokens, dtype=np.int64) if tokens else None

    @property
    def model(self) -> dict[str, str]:
        """No weights are used."""
        return {"starting_weights_filename": "none", "weight_transformations": "none, answers are simulated"}

    def versions(self) -> dict[str, str]:
        """Nothing beside the harness."""
        return {}

    def predict(self, samples: Sequence[Features]) -> Sequence[Output]:
        """Zeros after the latency: of shape [length, 2] per sample, or as many tokens as a benchmark allows."""
        if self._seconds:
            time.sleep(self._seconds)
        if self._tokens is not None:
            return [self._tokens] * len(samples)
        lengths = [len(sample.input_ids) for sample in samples]
        for length in set(lengths) - self._logits.keys():
            self._logits[length] = np.zeros((length, 2), dtype=np.float32)
        return [self._logits[length] for length in lengths]

    def close(self) -> None:
        """Nothing to end."""


def open(benchmark: Benchmark, options: Options) -> NullBackend:  # noqa: A001 - every backend's door has this name
    """A null backend; options `latency_ms` (default 1) and `batch_size` (default 32, so about 30,000 samples/s).

    Raises ValueError for any other option.
    """
    if unknown := set(options) - {"batch_size", "latency_ms"}:
        raise ValueError(f"the null backend has no option {min(unknown)!r}; it has batch_size, latency_ms")
    tokens = benchmark.generation.max_new_tokens if benchmark.generation else 0
    return NullBackend(float(options.get("latency_ms", 1.0)), tokens, int(options.get("batch_size", 32)))
