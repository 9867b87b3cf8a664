"""TensorFlow on CPUs and NVIDIA GPUs: BERT from weights, a frozen graph or a SavedModel, and GPT-J's generation.

Each model is one tf.function for any number of rows and tokens, so nothing is traced twice.
tests/unit/harness/test_tensorflow.py holds the logits to transformers'.
"""

import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fleet.harness import batching, convert, decoding
from fleet.harness.interfaces import (
    NO_WEIGHTS,
    RANDOM_WEIGHTS,
    Backend,
    Benchmark,
    Features,
    Options,
    Output,
    generation_of,
)
from fleet.harness.models.tf_bert import FROZEN, SAVED, Bert, Given, frozen, saved
from fleet.harness.models.tf_gptj import GptJ

# Otherwise a page of messages on what this build could do for this CPU, before the first line of ours.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

OPTIONS = {
    "bert": {"batch_size", "device", "length", "model", "threads", "weights"},
    "gptj": {"batch_size", "beams", "device", "layers", "threads", "weights"},
}
CPU_BATCH, GPU_BATCH = 8, 128
"""Samples computed at once; they come sorted by length, so little of a batch is padding."""


def _model_of(benchmark: Benchmark, options: Options) -> Bert | Given:
    """What option `model` names; else the weights, the frozen graph or the SavedModel of the benchmark's folders."""
    if options.get("weights"):
        return Bert(benchmark.config, None)
    folders = [benchmark.model_dir, benchmark.model_dir.parent / "source"]
    length = None if "length" not in options else _whole(options, "length", 0)
    if "model" in options:
        wanted = str(options["model"])
        # An absolute path stays what it is when joined.
        places = [place for folder in folders if (place := folder / Path(wanted).expanduser()).exists()]
        if not places:
            raise ValueError(f"model {wanted}: no such file or folder, nor in {folders[0]} or {folders[1]}")
        return _opened(places[0], benchmark, length)
    if convert.find(benchmark.model_dir)[0]:
        return _opened(benchmark.model_dir, benchmark, length)
    for folder in folders:
        for name in (FROZEN, SAVED):
            if (folder / name).exists():
                return _opened(folder / name, benchmark, length)
    raise ValueError(
        f"{benchmark.model_dir}: neither model.safetensors nor {FROZEN} nor {SAVED}/, run `fleet provision`;"
        " or weights: random"
    )


def _opened(path: Path, benchmark: Benchmark, length: int | None) -> Bert | Given:
    """A file is a frozen graph; a folder a SavedModel or Hugging Face's."""
    if path.is_file():
        return frozen(path, length)
    if (path / "saved_model.pb").is_file():
        return saved(path, length)
    if length is not None:
        raise ValueError(f"length {length}: only a graph has one; {path} holds weights, run at each batch's own length")
    return Bert(benchmark.config, path)


@dataclass(frozen=True, slots=True)
class _Settings:
    """What both models are told."""

    device: str
    batch_size: int
    labels: tuple[str, ...]


class _Common:
    """What BERT and GPT-J share as backends."""

    by_length = True
    """A batch is padded to its longest sample."""
    model: dict[str, str]

    def __init__(self, settings: _Settings) -> None:
        self._device = settings.device
        self.batch_size = settings.batch_size
        self.labels = settings.labels

    def versions(self) -> dict[str, str]:
        """tensorflow, and CUDA where it is used."""
        found = {"tensorflow": tf.__version__, "device": self._device, "machine": platform.machine()}
        if self._device.startswith("GPU"):
            gpu = tf.config.list_physical_devices("GPU")[int(self._device.partition(":")[2])]
            found["cuda"] = str(tf.sysconfig.get_build_info().get("cuda_version"))
            found["gpu"] = str(tf.config.experimental.get_device_details(gpu).get("device_name"))
            peak = tf.config.experimental.get_memory_info(self._device)["peak"]
            found["gpu_peak_memory_gib"] = f"{peak / 2**30:.2f}"
        return found

    def predict(self, samples: Sequence[Features]) -> Iterator[Output]:
        """One output per sample, a batch later than asked for; of what, the subclass says.

        Raises ValueError for tokens that the model has no embedding for, for samples that are too long, and when not
        even one sample fits into memory.
        """
        at = 0
        while at < len(samples):
            group = samples[at : at + self.batch_size]
            try:
                with tf.device(self._device):
                    outputs = self._outputs(group)
            except tf.errors.ResourceExhaustedError as error:
                longest = max(len(sample.input_ids) for sample in group)
                self.batch_size = batching.halved(len(group), self._device, longest, error)
                continue
            yield from outputs
            at += len(group)

    def _outputs(self, samples: Sequence[Features]) -> Sequence[Output]:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to end."""


class BertBackend(_Common):
    """BERT: start and end logits float32 [length, 2] of each sample."""

    def __init__(self, benchmark: Benchmark, options: Options, settings: _Settings) -> None:
        super().__init__(settings)
        with tf.device(settings.device):
            self._bert = _model_of(benchmark, options)
        self.model = dict(self._bert.told)
        self._vocabulary = int(benchmark.config["vocab_size"])
        self._longest = self._bert.length or int(benchmark.config["max_position_embeddings"])
        if self._bert.rows is not None:
            self.batch_size = self._bert.rows

    def _outputs(self, samples: Sequence[Features]) -> Sequence[Output]:
        # A GPU would read zeros for ids that the model has no embedding for and say nothing.
        ids, mask, types = batching.padded(
            samples,
            vocabulary=self._vocabulary,
            longest=self._longest,
            rows=self._bert.rows or 0,
            length=self._bert.length or 0,
            dtype=np.int32,
        )
        logits = self._bert(ids, mask, types)
        return [logits[row, : len(sample.input_ids)] for row, sample in enumerate(samples)]


class GptJBackend(_Common):
    """GPT-J: the new tokens int64 [count] of each sample, the end token among them."""

    def __init__(self, benchmark: Benchmark, options: Options, settings: _Settings) -> None:
        self._generation, labels = generation_of(benchmark, options)
        super().__init__(settings)
        self.labels = (*labels, *settings.labels)
        config = dict(benchmark.config)
        folder = None if options.get("weights") else benchmark.model_dir
        if folder is not None:
            if "layers" in options:
                raise ValueError("option layers goes with `weights: random` only: a checkpoint has the layers it has")
            config |= _config(folder / "config.json")
        elif (layers := _whole(options, "layers", config["n_layer"])) != config["n_layer"]:
            if layers > config["n_layer"]:
                raise ValueError(f"layers {layers}: the model has {config['n_layer']}")
            self.labels = (*self.labels, f"{layers} of {config['n_layer']} layers")
            config["n_layer"] = layers
        self.model = {"weight_data_types": "fp32"} | ({} if folder else NO_WEIGHTS)
        self._vocabulary, self._positions = int(config["vocab_size"]), int(config["n_positions"])
        with tf.device(settings.device):
            self._gptj = GptJ(config, folder)

    def _outputs(self, samples: Sequence[Features]) -> Sequence[Output]:
        most = self._positions - self._generation.max_new_tokens
        prompts = [np.asarray(sample.input_ids, dtype=np.int64) for sample in samples]
        if (longest := max(map(len, prompts))) > most:
            raise ValueError(f"a prompt of {longest} tokens: this model reads 1 to {most} of them")
        return decoding.generate(self._gptj, prompts, self._generation, vocab_size=self._vocabulary)


def _config(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file, run `fleet provision`") from error
    return found


def _whole(options: Options, name: str, default: int) -> int:
    found = options.get(name, default)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{name} {found!r}: a whole number from 1 on")
    return found


def _device(options: Options) -> str:
    """`CPU:0` or `GPU:<number>`; the first GPU where there is one and nothing else is asked for."""
    gpus = tf.config.list_physical_devices("GPU")
    wanted = str(options.get("device") or ("cuda" if gpus else "cpu"))
    kind, _, number = wanted.lower().partition(":")
    place = int(number) if number.isdigit() else 0
    if kind == "cpu":
        return "CPU:0"
    if kind not in {"cuda", "gpu"}:
        raise ValueError(f"device {wanted}: cpu, cuda or cuda:<number>")
    if place >= len(gpus):
        built = (
            "" if tf.test.is_built_with_cuda() else "; this TensorFlow is the CPU build, install `tensorflow[and-cuda]`"
        )
        raise ValueError(f"device {wanted}: TensorFlow sees {len(gpus)} GPUs{built}")
    return f"GPU:{place}"


def _settle(options: Options, device: str) -> None:
    """Threads, and GPUs as a guest should use them. TensorFlow takes these only before its first operation."""
    try:
        if "threads" in options:
            tf.config.threading.set_intra_op_parallelism_threads(_whole(options, "threads", 1))
        # A model is one chain of operations: more would only take cores from each other.
        tf.config.threading.set_inter_op_parallelism_threads(1)
        if device.startswith("CPU"):
            tf.config.set_visible_devices([], "GPU")
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)  # noqa: FBT003 - its own way
    except RuntimeError as error:
        raise ValueError(f"TensorFlow runs in this process already, with other options: {error}") from error
    # Its products have 10 bits; what is called fp32 should have 23.
    tf.config.experimental.enable_tensor_float_32_execution(False)  # noqa: FBT003


def open(benchmark: Benchmark, options: Options) -> Backend:  # noqa: A001 - every backend's door has this name
    """The benchmark's model, loaded.

    Raises ValueError for unknown options, models other than BERT and GPT-J, and weights or graphs that are missing,
    truncated or another model's.
    """
    kind = str(benchmark.config.get("model_type", "bert"))
    if kind not in OPTIONS:
        raise ValueError(f"the tensorflow backend runs {' and '.join(OPTIONS)}, not {kind}: take pytorch or openai")
    if unknown := set(options) - OPTIONS[kind]:
        raise ValueError(
            f"the tensorflow backend has no option {min(unknown)!r} for {kind}; it has {sorted(OPTIONS[kind])}"
        )
    if options.get("weights", "random") != "random":
        raise ValueError(f"weights {options['weights']!r}: leave it out, or `random`")
    device = _device(options)
    batch_size = _whole(options, "batch_size", CPU_BATCH if device.startswith("CPU") else GPU_BATCH)
    _settle(options, device)
    settings = _Settings(device, batch_size, (RANDOM_WEIGHTS,) if options.get("weights") else ())
    make = BertBackend if kind == "bert" else GptJBackend
    return make(benchmark, options, settings)
