"""ONNX Runtime on CPUs and NVIDIA GPUs: BERT and GPT-J from the same weights, by our own export, or a given BERT graph.

tests/unit/harness/test_onnxruntime.py holds logits and tokens to the pytorch backend's.
"""

import hashlib
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from fleet.harness import batching, decoding, export_onnx
from fleet.harness.batching import whole
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

OPTIONS = {
    "bert": {"batch_size", "cache", "dtype", "model", "provider", "threads", "weights"},
    "gptj": {"batch_size", "beams", "cache", "provider", "threads", "weights"},
}
PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
"""Option `provider` to ONNX Runtime's name, the fastest first."""
CPU_BATCH, GPU_BATCH = 8, 128
"""Samples computed at once; they come sorted by length, so little of a batch is padding."""
GIVEN = "model.onnx"
INPUTS = {
    "input_ids": ("input_ids",),
    "attention_mask": ("attention_mask", "input_mask"),
    "token_type_ids": ("token_type_ids", "segment_ids"),
}
"""A graph's inputs by Hugging Face's names, and by those of MLPerf's published BERT."""
OUTPUTS = (["logits"], ["start_logits", "end_logits"], ["output_start_logits", "output_end_logits"])


def _provider(options: Options) -> str:
    """The provider asked for, or the fastest there is; ValueError with those there are."""
    there = ort.get_available_providers()
    wanted = options.get("provider")
    if wanted is None:
        # TensorRT builds an engine for minutes: only for who asks for it.
        return "cuda" if PROVIDERS["cuda"] in there else "cpu"
    if wanted not in PROVIDERS:
        raise ValueError(f"provider {wanted!r}: one of {', '.join(PROVIDERS)}")
    if PROVIDERS[str(wanted)] not in there:
        names = ", ".join(name for name, provider in PROVIDERS.items() if provider in there)
        raise ValueError(
            f"provider {wanted}: this ONNX Runtime has {names}; for NVIDIA GPUs: pip install onnxruntime-gpu"
        )
    return str(wanted)


def _session(path: Path, provider: str, threads: int) -> Any:
    """Raises ValueError for a file that is no ONNX model, and for a provider that would quietly be another."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(path), settings, providers=[PROVIDERS[provider]])
    except Exception as error:  # its errors share no other class
        raise ValueError(f"{path}: ONNX Runtime cannot use it: {str(error).splitlines()[0]}") from error
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise ValueError(
            f"provider {provider} could not be started; ONNX Runtime fell back to {session.get_providers()[0]}"
        )
    return session


def _digest(path: Path) -> str:
    """sha256 of a graph and of the weights that lie beside it."""
    digest = hashlib.sha256(path.read_bytes())
    for part in sorted(path.parent.glob(f"{path.name}.data*")):
        with part.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def quantised(path: Path, cache: Path) -> Path:
    """The model of `path` with its products in int8, in `cache`: weights by channel now, activations as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    place = cache / "onnx-int8" / f"{_digest(path)[:32]}.onnx"
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f"{place.name}.partial-{os.getpid()}")
        quantize_dynamic(
            path, partial, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"],
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
        partial.replace(place)
    return place


class _Common:
    """What BERT and GPT-J share as backends."""

    by_length = True
    """A batch is padded to its longest sample."""
    model: dict[str, str]

    def __init__(self, options: Options) -> None:
        self._provider = _provider(options)
        self._threads = whole(options, "threads", 0)
        self.batch_size = whole(options, "batch_size", CPU_BATCH if self._provider == "cpu" else GPU_BATCH) or 1
        self.labels: tuple[str, ...] = (RANDOM_WEIGHTS,) if options.get("weights") else ()
        self._cache = export_onnx.cache_folder(str(options["cache"]) if "cache" in options else None)

    def versions(self) -> dict[str, str]:
        """Onnxruntime and what it computes on."""
        return {"onnxruntime": ort.__version__, "provider": self._provider, "machine": platform.machine()}

    def predict(self, samples: Sequence[Features]) -> Iterator[Output]:
        """One output per sample; in smaller batches for good where memory is short.

        Raises ValueError for tokens and lengths that the model does not have, and when not one sample fits.
        """
        at = 0
        while at < len(samples):
            group = samples[at : at + self.batch_size]
            try:
                outputs = self._outputs(group)
            except Exception as error:  # out of memory is told by words alone
                if not batching.memory_is_short(str(error)):
                    raise
                longest = max(len(sample.input_ids) for sample in group)
                self.batch_size = batching.halved(len(group), self._provider, longest, error)
                continue
            yield from outputs
            at += len(group)

    def _outputs(self, samples: Sequence[Features]) -> Sequence[Output]:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to end."""


class BertBackend(_Common):
    """BERT: start and end logits float32 [length, 2] of each sample."""

    def __init__(self, benchmark: Benchmark, options: Options) -> None:
        super().__init__(options)
        dtype = str(options.get("dtype", "float32"))
        if dtype not in {"float32", "int8"}:
            raise ValueError(f"dtype {dtype!r}: one of float32, int8")
        path, told = self._path(benchmark, options)
        if dtype == "int8":
            if self._provider != "cpu":
                raise ValueError("dtype int8 is for the cpu provider")
            path = quantised(path, self._cache)
        self.model = {"weight_data_types": {"float32": "fp32", "int8": "int8"}[dtype]}
        if dtype == "int8":
            self.model["weight_transformations"] = "quantised to int8 by onnxruntime, dynamically"
        self.model |= told
        self._session = _session(path, self._provider, self._threads)
        self._names, self._answers = self._signature(path)
        self._vocabulary = int(benchmark.config["vocab_size"])
        self._longest = int(benchmark.config["max_position_embeddings"])

    def _path(self, benchmark: Benchmark, options: Options) -> tuple[Path, dict[str, str]]:
        """The graph, and what measurements.json must say of it when it is not the benchmark's own weights."""
        if "model" in options:
            path = Path(str(options["model"])).expanduser()
            if not path.is_file():
                raise ValueError(f"model {path}: no such file")
            return path, {"starting_weights_filename": path.name, "weights_sha256": _digest(path)}
        given = benchmark.model_dir / GIVEN
        if not self.labels and given.is_file():
            return given, {"starting_weights_filename": given.name, "weights_sha256": _digest(given)}
        if self.labels:
            return export_onnx.exported(benchmark.config, None, self._cache), NO_WEIGHTS
        return export_onnx.exported(benchmark.config, benchmark.model_dir, self._cache), {}

    def _signature(self, path: Path) -> tuple[dict[str, tuple[str, Any]], list[str]]:
        """What the graph calls its inputs, with their types, and its outputs."""
        there = {
            given.name: np.int32 if given.type == "tensor(int32)" else np.int64 for given in self._session.get_inputs()
        }
        names = {}
        for role, known in INPUTS.items():
            found = next((name for name in known if name in there), None)
            if found is None:
                raise ValueError(f"{path}: no input {' or '.join(known)}; it has {', '.join(sorted(there))}")
            names[role] = (found, there[found])
        made = {output.name for output in self._session.get_outputs()}
        for wanted in OUTPUTS:
            if made.issuperset(wanted):
                return names, wanted
        raise ValueError(f"{path}: no output logits; it has {', '.join(sorted(made))}")

    def _outputs(self, samples: Sequence[Features]) -> Sequence[Output]:
        ids, mask, types = batching.padded(samples, vocabulary=self._vocabulary, longest=self._longest)
        values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        fed = {name: values[role].astype(kind, copy=False) for role, (name, kind) in self._names.items()}
        found = self._session.run(self._answers, fed)
        logits = found[0] if len(found) == 1 else np.stack(found, axis=-1)
        return [logits[row, : len(sample.input_ids)] for row, sample in enumerate(samples)]


class GptJBackend(_Common):
    """GPT-J: the new tokens int64 [count] of each sample, the end token among them."""

    def __init__(self, benchmark: Benchmark, options: Options) -> None:
        super().__init__(options)
        self._generation, labels = generation_of(benchmark, options)
        config = dict(benchmark.config)
        path = export_onnx.exported(config, None if self.labels else benchmark.model_dir, self._cache)
        self.labels = (*labels, *self.labels)
        self.model = {"weight_data_types": "fp32"} | (NO_WEIGHTS if options.get("weights") else {})
        self._session = _session(path, self._provider, self._threads)
        self._vocabulary, self._positions = int(config["vocab_size"]), int(config["n_positions"])
        self._past = [given.name for given in self._session.get_inputs() if given.name.startswith("past_key_values.")]
        self._heads, self._size = int(config["n_head"]), int(config["n_embd"]) // int(config["n_head"])
        self._answers = ["logits", *(name.replace("past_key_values.", "present.") for name in self._past)]

    def _step(self, tokens: Any, attention_mask: Any, position_ids: Any, cache: Any, reorder: Any) -> tuple[Any, Any]:
        """See decoding.Step."""
        if cache is None:
            cache = [np.zeros((len(tokens), self._heads, 0, self._size), dtype=np.float32)] * len(self._past)
        rows = np.arange(len(tokens), dtype=np.int64) if reorder is None else reorder
        logits, *present = self._session.run(
            self._answers,
            {
                "input_ids": tokens,
                "position_ids": position_ids,
                "attention_mask": attention_mask,
                "reorder": rows,
                **dict(zip(self._past, cache, strict=True)),
            },
        )
        return logits[:, -1], present

    def _outputs(self, samples: Sequence[Features]) -> Sequence[Output]:
        most = self._positions - self._generation.max_new_tokens
        prompts = [np.asarray(sample.input_ids, dtype=np.int64) for sample in samples]
        if (longest := max(map(len, prompts))) > most:
            raise ValueError(f"a prompt of {longest} tokens: this model reads 1 to {most} of them")
        return decoding.generate(self._step, prompts, self._generation, vocab_size=self._vocabulary)


def open(benchmark: Benchmark, options: Options) -> Backend:  # noqa: A001 - every backend's door has this name
    """The benchmark's model, exported and loaded.

    Raises ValueError for unknown options, models other than BERT and GPT-J, providers that are not there, and weights
    or graphs that are missing, truncated or another model's.
    """
    kind = str(benchmark.config.get("model_type", "bert"))
    if kind not in OPTIONS:
        raise ValueError(f"the onnxruntime backend runs {' and '.join(OPTIONS)}, not {kind}: take pytorch or openai")
    if unknown := set(options) - OPTIONS[kind]:
        raise ValueError(
            f"the onnxruntime backend has no option {min(unknown)!r} for {kind}; it has {sorted(OPTIONS[kind])}"
        )
    if options.get("weights", "random") != "random":
        raise ValueError(f"weights {options['weights']!r}: leave it out, or `random`")
    return BertBackend(benchmark, options) if kind == "bert" else GptJBackend(benchmark, options)
