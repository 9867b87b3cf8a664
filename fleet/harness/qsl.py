"""The query sample library: holds tokenised samples while LoadGen wants them in memory."""

from collections.abc import Sequence

import numpy as np

from fleet.harness.interfaces import Benchmark, Features


class Samples:
    """Features by QSL index, loaded and unloaded at LoadGen's word."""

    def __init__(self, benchmark: Benchmark) -> None:
        self._benchmark = benchmark
        self.held: dict[int, Features] = {}
        """By QSL index, what is in memory now."""
        self.lengths = np.zeros(benchmark.sample_count, dtype=np.int32)
        """Tokens of each sample that was ever loaded, by QSL index."""

    def load(self, indices: Sequence[int]) -> None:
        """Bring samples into memory."""
        for index in indices:
            features = self._benchmark.features(index)
            self.held[index] = features
            self.lengths[index] = len(features.input_ids)

    def unload(self, indices: Sequence[int]) -> None:
        """Drop samples from memory."""
        for index in indices:
            self.held.pop(index, None)

    def __getitem__(self, index: int) -> Features:
        return self.held[index]
