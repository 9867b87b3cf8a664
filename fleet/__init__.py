"""mlperf-fleet: MLPerf Inference on many machines with one command."""

__version__ = "0.1.0"
