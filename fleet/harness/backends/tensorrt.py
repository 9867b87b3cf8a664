"""TensorRT on NVIDIA GPUs: BERT by an engine built from our own ONNX export, kept by GPU, version and weights.

Networks are strongly typed, the only kind that TensorRT 11 knows, and 10 knows it too: the export's types are the
engine's. What needs no library is held by tests/unit/harness/test_tensorrt.py, the rest by tests/gpu/test_tensorrt.py.
"""

import hashlib
import json
import os
import platform
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fleet.harness import batching, cuda_memory, export_onnx
from fleet.harness.cuda_memory import OutOfMemoryError
from fleet.harness.interfaces import NO_WEIGHTS, RANDOM_WEIGHTS, Backend, Benchmark, Features, Options, Output

VERSION = 1
"""Counts up when another engine is built from the same graph, or its file looks otherwise."""
OPTIONS = {"batch_size", "cache", "dtype", "weights", "workspace"}
WORDS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""Option `dtype` in the words of measurements.json."""
BATCH = 128
"""Samples computed at once; they come sorted by length, so little of a batch is padding."""
SLOTS, AHEAD = 2, 8
"""One batch is filled in while another is computed, so AHEAD of them are taken at once."""
STEP = 8
"""Batches are padded to a multiple of it: fewer shapes, and rows that matrix units like."""
USUAL = 192
"""Tokens that kernels are chosen for: SQuAD's windows have 178 on average."""
INPUTS, OUTPUT = ("input_ids", "attention_mask", "token_type_ids"), "logits"
ALIGNMENT = 256
"""Bytes: TensorRT wants tensors to begin at multiples of it."""
DIGEST = hashlib.sha256().digest_size

Shape = tuple[int, int]


def _library() -> Any:
    """TensorRT; ValueError where it is not installed or does not load."""
    try:
        import tensorrt
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise ValueError(f"tensorrt does not load here, {error.name} is missing; next: fleet provision") from error
        raise ValueError(
            "the tensorrt backend needs NVIDIA's Python package tensorrt-cu13, which is not installed here;"
            " next: fleet provision (by hand: pip install tensorrt-cu13)"
        ) from error
    except (ImportError, OSError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"tensorrt is installed here and does not load: {why}; next: fleet check") from error
    return tensorrt


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an engine is built from and for."""

    graph: str
    """What the export depends on: export_onnx.key_of."""
    dtype: str
    rows: int
    longest: int
    workspace: float
    """GiB that the builder may use beside the model, 0 without a limit."""

    @property
    def profiles(self) -> list[tuple[Shape, Shape, Shape]]:
        """Smallest, usual and largest [rows, length]: of one sample, and of several where there are any."""
        usual = min(USUAL, self.longest)
        found = [((1, 1), (1, usual), (1, self.longest))]
        if self.rows > 1:
            found.append(((2, 1), (self.rows, usual), (self.rows, self.longest)))
        return found

    def key(self, gpu: cuda_memory.Gpu, version: str) -> str:
        """Names the engine: one for another GPU or version of TensorRT cannot be loaded, or is slow."""
        told = [VERSION, version, gpu.name, gpu.capability, asdict(self), self.profiles]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def stored(place: Path) -> memoryview | None:
    """The engine in `place`, or None where there is none or it is not what was written."""
    try:
        data = place.read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.sha256(memoryview(data)[DIGEST:]).digest() != data[:DIGEST]:
        sys.stdout.write(f"{place}: the engine is damaged and is built anew\n")
        return None
    return memoryview(data)[DIGEST:]


def keep(place: Path, engine: Any) -> None:
    """Write an engine's bytes with their digest in front, by rename."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{place.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            stream.write(hashlib.sha256(engine).digest())
            stream.write(engine)
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


class _TensorRT:
    """The library with its log: it says what went wrong there, and returns None or False."""

    def __init__(self) -> None:
        self.library = trt = _library()
        base: Any = trt.ILogger

        class Log(base):  # type: ignore[misc]
            def __init__(self) -> None:
                base.__init__(self)
                self.errors: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity in {base.Severity.INTERNAL_ERROR, base.Severity.ERROR}:
                    self.errors.append(message)
                elif severity == base.Severity.WARNING:
                    sys.stdout.write(f"TensorRT: {message}\n")

        self._log: Any = Log()
        self._runtime = trt.Runtime(self._log)

    def failed(self, what: str, *more: str) -> Exception:
        """The exception for what could not be done, with the library's own words for it."""
        said = "; ".join([*more, *self._log.errors]).replace("\n", " ")
        self._log.errors.clear()
        if batching.memory_is_short(said):
            return OutOfMemoryError(said)
        return ValueError(f"TensorRT {self.library.__version__} cannot {what}: {said or 'it does not say why'}")

    def load(self, plan: Any) -> Any:
        """An engine from its bytes; raises OutOfMemoryError, and ValueError for what is none for this GPU and version."""
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self.failed("load the engine")
        return engine

    def build(self, graph: Path, wanted: Wanted) -> Any:
        """The bytes of an engine for the ONNX file `graph`; raises OutOfMemoryError, and ValueError with the cause."""
        trt = self.library
        builder = trt.Builder(self._log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse_from_file(str(graph)):
            causes = [str(parser.get_error(number).desc()) for number in range(parser.num_errors)]
            raise self.failed(f"read {graph}", *causes)
        config = builder.create_builder_config()
        # Its products have 10 bits; what is called fp32 should have 23.
        config.clear_flag(trt.BuilderFlag.TF32)
        if wanted.workspace:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(wanted.workspace * 2**30))
        for shapes in wanted.profiles:
            profile = builder.create_optimization_profile()
            for name in INPUTS:
                profile.set_shape(name, *shapes)
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self.failed(f"build an engine from {graph}")
        self._log.errors.clear()  # kernels that did not fit are told as errors too, and others were taken
        return plan


class _Slot:
    """Memory of one batch: ids, mask and types in one copy to the GPU, logits in one copy back."""

    def __init__(self, rows: int, longest: int, stack: ExitStack) -> None:
        """Raises OutOfMemoryError; `stack` gives back what was had."""

        def had(what: Any) -> Any:
            stack.callback(what.close)
            return what

        length = -(-longest // STEP) * STEP
        self._given: cuda_memory.Buffer = had(cuda_memory.Buffer(3 * _aligned(rows * length * 8)))
        self._made: cuda_memory.Buffer = had(cuda_memory.Buffer(rows * length * 2 * 4))
        self._done: cuda_memory.Event = had(cuda_memory.Event())
        self._shape, self._lengths = (0, 0), [0]

    def start(self, context: Any, stream: cuda_memory.Stream, batch: npt.NDArray[Any], lengths: list[int]) -> bool:
        """Put a batch [3, rows, length] on the stream; False when TensorRT does not take it."""
        self._done.wait()  # an earlier one that nobody asked the outputs of
        self._lengths = lengths
        self._shape = (batch.shape[1], batch.shape[2])
        part = _aligned(batch[0].nbytes)
        for number, (name, values) in enumerate(zip(INPUTS, batch, strict=True)):
            self._given.host[number * part :][: values.nbytes] = values.reshape(-1).view(np.uint8)
            if not context.set_input_shape(name, self._shape):
                return False
            context.set_tensor_address(name, self._given.device + number * part)
        context.set_tensor_address(OUTPUT, self._made.device)
        stream.send(self._given, 3 * part)
        if not context.execute_async_v3(stream.handle):
            return False
        stream.fetch(self._made, self._size)
        stream.mark(self._done)
        return True

    @property
    def _size(self) -> int:
        return self._shape[0] * self._shape[1] * 2 * 4

    def outputs(self) -> list[Output]:
        """The logits of the samples, once they are there; copies, for the slot is filled again."""
        self._done.wait()
        logits = self._made.host[: self._size].view(np.float32).reshape(*self._shape, 2).copy()
        return [logits[row, :length] for row, length in enumerate(self._lengths)]


class _Loaded:
    """An engine on the GPU: a context for each profile, a stream, and memory for SLOTS batches."""

    def __init__(self, tensorrt: _TensorRT, plan: Any, wanted: Wanted) -> None:
        """Raises OutOfMemoryError, and ValueError for an engine that cannot be used; then nothing is left behind."""
        self._tensorrt = tensorrt
        with ExitStack() as stack:
            engine = tensorrt.load(plan)
            self._stream = cuda_memory.Stream()
            stack.callback(self._stream.close)
            # Each has memory for its own profile: one sample should not take as much as the largest batch.
            strategy = tensorrt.library.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
            self._contexts: list[Any] = []
            stack.callback(self._contexts.clear)
            for number in range(len(wanted.profiles)):
                context = engine.create_execution_context(strategy)
                if context is None or not context.set_optimization_profile_async(number, self._stream.handle):
                    raise tensorrt.failed("make room for a batch")
                self._contexts.append(context)
            self._slots = deque(_Slot(wanted.rows, wanted.longest, stack) for _ in range(SLOTS))
            stack.callback(self._stream.wait)
            self._memory = stack.pop_all()

    def start(self, batch: npt.NDArray[Any], lengths: list[int]) -> _Slot:
        """Begin with a batch [3, rows, length]; at most SLOTS - 1 others may still be wanted.

        Raises OutOfMemoryError, and ValueError when TensorRT does not take it.
        """
        slot = self._slots[0]
        context = self._contexts[min(batch.shape[1], 2) - 1]
        if not slot.start(context, self._stream, batch, lengths):
            raise self._tensorrt.failed(f"compute a batch of {batch.shape[1]} rows of {batch.shape[2]} tokens")
        self._slots.rotate(-1)
        return slot

    def close(self) -> None:
        """Wait for what runs, and give all memory back."""
        self._memory.close()


class BertBackend:
    """BERT: start and end logits float32 [length, 2] of each sample."""

    by_length = True
    """A batch is padded to its longest sample."""

    def __init__(self, benchmark: Benchmark, options: Options) -> None:
        self._dtype = str(options.get("dtype", "float32"))
        self._rows = batching.whole(options, "batch_size", BATCH) or 1
        self._workspace = _gib(options)
        self.labels: tuple[str, ...] = (RANDOM_WEIGHTS,) if options.get("weights") else ()
        self.model = {"weight_data_types": WORDS[self._dtype]} | (NO_WEIGHTS if self.labels else {})
        self._tensorrt = _TensorRT()
        self._gpu = cuda_memory.gpu()
        self._config = dict(benchmark.config)
        self._folder = None if self.labels else benchmark.model_dir
        self._vocabulary = int(self._config["vocab_size"])
        self._longest = int(self._config["max_position_embeddings"])
        self._cache = export_onnx.cache_folder(str(options["cache"]) if "cache" in options else None)
        self._graph = export_onnx.key_of(self._config, self._folder, self._dtype)
        self._engine: _Loaded | None = None
        self._load()

    @property
    def batch_size(self) -> int:
        """Several batches, so that there is always one to fill in while another is computed."""
        return AHEAD * self._rows

    def versions(self) -> dict[str, str]:
        """TensorRT, what it computes on, and the newest CUDA its driver knows."""
        return {
            "tensorrt": str(self._tensorrt.library.__version__),
            "gpu": self._gpu.name,
            "cuda": self._gpu.cuda,
            "machine": platform.machine(),
        }

    def _load(self) -> _Loaded:
        """Have an engine on the GPU, for fewer rows where memory is short; ValueError where none can be had."""
        while True:
            wanted = Wanted(self._graph, self._dtype, self._rows, self._longest, self._workspace)
            try:
                self._engine = self._made(wanted)
            except OutOfMemoryError as error:
                self._rows = batching.halved(self._rows, self._gpu.name, self._longest, error)
            else:
                return self._engine

    def _made(self, wanted: Wanted) -> _Loaded:
        """The engine that was kept; a new one where there is none or it is of no use."""
        place = self._cache / "tensorrt" / f"{wanted.key(self._gpu, str(self._tensorrt.library.__version__))}.engine"
        plan = stored(place)
        if plan is not None:
            try:
                return _Loaded(self._tensorrt, plan, wanted)
            except ValueError as error:
                sys.stdout.write(f"{place}: {error}; it is built anew\n")
        graph = export_onnx.exported(self._config, self._folder, self._cache, self._dtype)
        sys.stdout.write(f"building a TensorRT engine for {self._gpu.name}, {wanted.rows} samples at once: minutes\n")
        sys.stdout.flush()
        plan = self._tensorrt.build(graph, wanted)
        keep(place, plan)
        return _Loaded(self._tensorrt, plan, wanted)

    def predict(self, samples: Sequence[Features]) -> Iterator[Output]:
        """One output per sample, a batch later than computed; in smaller batches for good where memory is short.

        Raises ValueError for tokens and lengths that the model does not have, and when not one sample fits.
        """
        running: deque[_Slot] = deque()
        at = 0
        while at < len(samples):
            group = samples[at : at + self._rows]
            lengths = [len(sample.input_ids) for sample in group]
            length = min(-(-max(lengths) // STEP) * STEP, self._longest)
            batch = batching.padded(group, vocabulary=self._vocabulary, longest=self._longest, length=length)
            if len(running) == SLOTS:
                yield from running.popleft().outputs()
            try:
                running.append((self._engine or self._load()).start(batch, lengths))
            except OutOfMemoryError as error:
                short: OutOfMemoryError | None = error.with_traceback(None)
            else:
                short = None
                at += len(group)
            if short is not None:
                while running:
                    yield from running.popleft().outputs()
                self.close()
                self._rows = batching.halved(len(group), self._gpu.name, max(lengths), short)
        while running:
            yield from running.popleft().outputs()

    def close(self) -> None:
        """Give the GPU's memory back."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _gib(options: Options) -> float:
    found = options.get("workspace", 0)
    if not isinstance(found, int | float) or isinstance(found, bool) or found < 0:
        raise ValueError(f"workspace {found!r}: a number of GiB")
    return float(found)


def open(benchmark: Benchmark, options: Options) -> Backend:  # noqa: A001 - every backend's door has this name
    """The benchmark's model as an engine on the first GPU, built now unless one was kept.

    Raises ValueError for unknown options, models other than BERT, weights that are missing, truncated or another
    model's, and where the library or a GPU is missing.
    """
    kind = str(benchmark.config.get("model_type", "bert"))
    if kind != "bert" or benchmark.generation is not None:
        raise ValueError(f"the tensorrt backend runs bert, not {kind}: take pytorch, onnxruntime or openai")
    if unknown := set(options) - OPTIONS:
        raise ValueError(f"the tensorrt backend has no option {min(unknown)!r}; it has {sorted(OPTIONS)}")
    if (dtype := options.get("dtype", "float32")) not in WORDS:
        raise ValueError(f"dtype {dtype!r}: one of {', '.join(WORDS)}")
    if options.get("weights", "random") != "random":
        raise ValueError(f"weights {options['weights']!r}: leave it out, or `random`")
    return BertBackend(benchmark, options)
