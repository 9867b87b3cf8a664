"""The query sample library: holds tokenised samples while LoadGen wants them in memory."""

from collections.abc import Sequence

from fleet.harness.interfaces import Benchmark, Features


class Samples:
    """Features by QSL index, loaded and unloaded at LoadGen's word."""

    def __init__(self, benchmark: Benchmark) -> None:
        self._benchmark = benchmark
        self._held: dict[int, Features] = {}

    def load(self, indices: Sequence[int]) -> None:
        """Bring samples into memory."""
        for index in indices:
            self._held[index] = self._benchmark.features(index)

    def unload(self, indices: Sequence[int]) -> None:
        """Drop samples from memory."""
        for index in indices:
            self._held.pop(index, None)

    def __getitem__(self, index: int) -> Features:
        return self._held[index]
