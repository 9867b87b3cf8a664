"""PyTorch on CPUs and NVIDIA GPUs: BERT without padding here, generation in models.gptj."""

import contextlib
import platform
import sys
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fleet.harness.interfaces import RANDOM_WEIGHTS, Backend, Benchmark, Features, Options, Output
from fleet.harness.models import bert, linear, memory, workers

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.bfloat16,
    "float8": torch.bfloat16,
}
"""Option `dtype` to the precision of what lies between the matrix products."""
WORDS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8", "float8": "fp8"}
"""Option `dtype` in the words of measurements.json."""
OPTIONS = {"batch_size", "device", "dtype", "graphs", "threads", "tokens", "weights", "workers"}
CPU_TOKENS, CUDA_TOKENS = 512, 65_536
"""Tokens computed at once. On a CPU a few hundred fill the matrix units, and more no longer fit into its caches."""
GRAPH_STEP, GRAPH_TOKENS = 16, 512
"""A single sample on a GPU is computed by a captured graph for its length rounded up to GRAPH_STEP."""
CALIBRATION_SAMPLES = 64
PADDED = 384
"""A full window of BERT-99."""


def check_options(options: Options) -> None:
    """Raises ValueError for what the backend does not know."""
    if unknown := set(options) - OPTIONS:
        raise ValueError(f"the pytorch backend has no option {min(unknown)!r} for BERT; it has {sorted(OPTIONS)}")
    if options.get("dtype", "float32") not in DTYPES:
        raise ValueError(f"dtype {options['dtype']!r}: one of {', '.join(DTYPES)}")
    if options.get("weights", "random") != "random":
        raise ValueError(f"weights {options['weights']!r}: leave it out, or `random`")


def _maker(dtype: str, device: torch.device) -> linear.Maker:
    """How linear layers of this precision are made; ValueError where the device has none."""
    if dtype == "int8":
        if device.type != "cpu":
            raise ValueError("dtype int8 is for CPUs; on a GPU: float8, bfloat16 or float16")
        if why := linear.int8_works():
            raise ValueError(f"dtype int8 does not work on this CPU: {why}")
        return lambda weight, bias, gelu: linear.Int8(weight, bias, gelu=gelu)
    if dtype == "float8":
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            raise ValueError("dtype float8 needs an NVIDIA GPU from Ada or Hopper on")
        return lambda weight, bias, gelu: linear.Float8(weight.to(device), bias.to(device), gelu=gelu)

    kind = linear.Half if device.type == "cuda" and dtype != "float32" else linear.Plain

    def plain(weight: Tensor, bias: Tensor, gelu: bool) -> linear.Linear:
        return kind(weight.to(device, DTYPES[dtype]), bias.to(device, DTYPES[dtype]), gelu=gelu)

    return plain


class BertBackend:
    """One BERT on one device."""

    by_length = True
    """Samples of one length are attended to together on a CPU, and a batch holds like lengths on a GPU."""

    def __init__(self, benchmark: Benchmark, options: Options) -> None:
        self._device = workers.device_of(options)
        if threads := int(options.get("threads", 0)):
            torch.set_num_threads(threads)
        self._dtype = str(options.get("dtype", "float32"))
        on_gpu = self._device.type == "cuda"
        self._tokens = int(options.get("tokens", CUDA_TOKENS if on_gpu else CPU_TOKENS))
        self.batch_size = int(options.get("batch_size", 10_833 if on_gpu else 256))
        self.labels: tuple[str, ...] = (RANDOM_WEIGHTS,) if options.get("weights") == "random" else ()
        # Only attention that takes the samples' starts from the device can be recorded for any length.
        graphs = on_gpu and self._dtype != "float32" and bool(options.get("graphs", True))
        self._graphs: dict[int, _Graph] | None = None
        with self._on_device():
            self._load(benchmark, graphs=graphs)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Kernels of our own and cuBLASLt go to the thread's current GPU, whatever tensors they are given."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    def _load(self, benchmark: Benchmark, *, graphs: bool) -> None:
        weights = bert.random_weights(benchmark.config) if self.labels else bert.read_weights(benchmark.model_dir)
        self._model = bert.Bert(
            benchmark.config,
            weights,
            make=_maker(self._dtype, self._device),
            device=self._device,
            dtype=DTYPES[self._dtype],
        )
        self._calibrate(benchmark)
        if graphs:
            self._warm()
            # All of them now: recording one takes longer than a query may.
            longest = min(GRAPH_TOKENS, self._model.longest)
            with torch.inference_mode():
                self._graphs = {size: _Graph(self._model, size) for size in range(GRAPH_STEP, longest + 1, GRAPH_STEP)}

    def _calibrate(self, benchmark: Benchmark) -> None:
        """Let layers with scales see samples from all over the dataset, then keep the scales."""
        if self._dtype == "float8":
            count = min(CALIBRATION_SAMPLES, benchmark.sample_count)
            step = max(1, benchmark.sample_count // count)
            for _ in self.predict([benchmark.features(at * step) for at in range(count)]):
                pass
            self._model.settle()

    def _warm(self) -> None:
        """Compute a batch of each size once: kernels are compiled and chosen at the first use, and memory may be short."""
        length = min(PADDED, self._model.longest)
        sample = Features(np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.int64))
        tokens = self._tokens
        while tokens > GRAPH_TOKENS:
            for _ in self.predict([sample] * (tokens // length)):
                pass
            tokens //= 2

    @property
    def model(self) -> dict[str, str]:
        """The precision the weights are run in."""
        told = {"weight_data_types": WORDS[self._dtype]}
        if self._dtype in {"int8", "float8"}:
            told["weight_transformations"] = f"quantised to {WORDS[self._dtype]} when loaded"
        return told

    def versions(self) -> dict[str, str]:
        """torch, and CUDA where it is used."""
        found = {"torch": torch.__version__, "device": str(self._device), "machine": platform.machine()}
        if self._device.type == "cuda":
            found["cuda"] = str(torch.version.cuda)
            found["gpu"] = torch.cuda.get_device_name(self._device)
            found["gpu_peak_memory_gib"] = f"{torch.cuda.max_memory_allocated(self._device) / 2**30:.2f}"
        return found

    def predict(self, samples: Sequence[Features]) -> Iterator[Output]:
        """Start and end logits, one array [length, 2] per sample, in order, a micro-batch later than computed."""
        if self._graphs is not None and len(samples) == 1:
            size = -(-len(samples[0].input_ids) // GRAPH_STEP) * GRAPH_STEP
            if size in self._graphs:
                self._check(samples[0].input_ids, len(samples[0].input_ids))
                # Only here, where nothing else is under way: a graph has one set of buffers.
                with self._on_device():
                    answer = self._graphs[size](samples[0])
                yield answer
                return
        waiting: _Pending | None = None
        done = 0
        while done < len(samples):
            # Asked anew each time: running out of memory lowers the budget.
            chunk = next(workers.chunks(samples[done:], self._tokens))
            done += len(chunk)
            started = self._start(chunk)
            if waiting is not None:
                yield from waiting.outputs()
            waiting = started
        if waiting is not None:
            yield from waiting.outputs()

    def _check(self, ids: npt.NDArray[np.int64], longest: int) -> None:
        """Raises ValueError for what the model has no embedding for; a GPU would only say `device-side assert`."""
        if ids.max() >= self._model.vocabulary or ids.min() < 0:
            wrong = int(ids.max() if ids.max() >= self._model.vocabulary else ids.min())
            raise ValueError(
                f"token {wrong} is none of the model's {self._model.vocabulary}: vocabulary and weights do not match"
            )
        if longest > self._model.longest:
            raise ValueError(f"a sample of {longest} tokens, the model has {self._model.longest} positions")

    def _start(self, chunk: Sequence[Features]) -> "_Pending":
        """Compute a chunk without waiting for it; in smaller ones where it does not fit into the device's memory."""
        try:
            with self._on_device(), torch.inference_mode():
                return self._compute(chunk)
        except (RuntimeError, MemoryError) as error:
            if not memory.is_short(error):
                raise
            tokens = sum(len(sample.input_ids) for sample in chunk)
            if len(chunk) == 1:
                raise ValueError(f"out of memory on {self._device} with a single sample of {tokens} tokens") from error
        # Not before the exception is gone: it holds the tensors that did not fit.
        memory.release(self._device)
        self._tokens = tokens // 2
        sys.stdout.write(f"out of memory with {tokens} tokens at once: going on with {self._tokens}\n")
        parts: list[_Pending] = []
        done = 0
        while done < len(chunk):
            part = next(workers.chunks(chunk[done:], self._tokens))
            parts.append(self._start(part))
            done += len(part)
        return _Joined(parts)

    def _compute(self, chunk: Sequence[Features]) -> "_Pending":
        lengths = [len(sample.input_ids) for sample in chunk]
        on_gpu = self._device.type == "cuda"
        together = np.concatenate([sample.input_ids for sample in chunk])
        self._check(together, max(lengths))
        ids = torch.from_numpy(together)
        types = torch.from_numpy(np.concatenate([sample.token_type_ids for sample in chunk]))
        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))

        def placed(part: Tensor) -> Tensor:
            return (part.pin_memory() if on_gpu else part).to(self._device, non_blocking=True)

        packed = bert.Packed(
            placed(ids), placed(types), placed(positions), placed(starts), lengths=tuple(lengths), longest=max(lengths)
        )
        return _Pending(self._model(packed), lengths)

    def close(self) -> None:
        """Nothing to end."""


class _Pending:
    """Logits on their way to the host."""

    def __init__(self, logits: Tensor, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._done: torch.cuda.Event | None = None
        # In float32 on the host: there are only two numbers a token, and LoadGen gets float32.
        if logits.is_cuda:
            self._logits = torch.empty(logits.shape, dtype=torch.float32, pin_memory=True)
            self._logits.copy_(logits, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._logits = logits.float()

    def outputs(self) -> Iterator[Output]:
        """One array [length, 2] per sample."""
        if self._done is not None:
            self._done.synchronize()
        array = self._logits.numpy()
        at = 0
        for length in self._lengths:
            yield array[at : at + length]
            at += length


class _Joined(_Pending):
    """Several, one after another."""

    def __init__(self, parts: Sequence[_Pending]) -> None:
        self._parts = parts

    def outputs(self) -> Iterator[Output]:
        for part in self._parts:
            yield from part.outputs()


class _Graph:
    """The kernels for one sample of up to `size` tokens, recorded once: launching them costs more than running them."""

    def __init__(self, model: bert.Bert, size: int) -> None:
        device = model.device
        # One copy to the device and one back: ids, types and positions in rows, the sample's end in front.
        self._host = torch.zeros(3 * size + 2, dtype=torch.int32, pin_memory=True)
        self._host[1] = size
        rows = self._host[2:].view(3, size)
        rows[2] = torch.arange(size)
        # Through numpy: a tensor made in inference mode cannot be written outside of it.
        self._end, self._ids, self._types = self._host[1:2].numpy(), rows[0].numpy(), rows[1].numpy()
        self._given = self._host.to(device)
        ids, types, positions = self._given[2:].view(3, size).unbind(0)
        packed = bert.Packed(ids, types, positions, self._given[:2], lengths=(size,), longest=size)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(3):
                model(packed)
        torch.cuda.current_stream(device).wait_stream(side)
        self._answer = torch.empty(size, 2, dtype=torch.float32, pin_memory=True)
        self._replayed = torch.cuda.Event()
        self._graph = torch.cuda.CUDAGraph()
        # The stream that torch would take itself is the first graph's, on whatever GPU that was.
        with torch.cuda.graph(self._graph, stream=side):
            self._given.copy_(self._host, non_blocking=True)
            self._answer.copy_(model(packed).float(), non_blocking=True)

    def __call__(self, sample: Features) -> Output:
        """Logits [length, 2] of one sample; the next call overwrites the buffers, so it is a copy."""
        length = len(sample.input_ids)
        self._end[0] = length
        self._ids[:length] = sample.input_ids
        self._types[:length] = sample.token_type_ids
        self._graph.replay()
        self._replayed.record()
        self._replayed.synchronize()
        answer: Output = self._answer.numpy()[:length].copy()
        return answer


def open(benchmark: Benchmark, options: Options) -> Backend:  # noqa: A001 - every backend's door has this name
    """The benchmark's model, loaded.

    Raises ValueError for unknown options, missing weights and foreign checkpoints.
    """
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(1)  # one query at a time: a second pool would only take cores from the first
    if benchmark.generation is not None:
        from fleet.harness.models import gptj

        return gptj.open(benchmark, options)
    check_options(options)
    each = workers.each(options)
    if len(each) > 1:
        return workers.Workers(partial(BertBackend, benchmark), each, tokens=2 * CUDA_TOKENS)
    return BertBackend(benchmark, each[0])
