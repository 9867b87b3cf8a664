"""BERT-large, Offline and SingleStream: this project's pytorch backend against the MLPerf reference's way of working.

    python benchmarks/bert_speed.py --dtype float32 bfloat16 int8          on a CPU
    python benchmarks/bert_speed.py --device cuda --dtype bfloat16 float8  on an NVIDIA GPU

The peer is how mlcommons/inference language/bert's pytorch_SUT works: transformers' model in fp32, one sample at a time,
each padded to 384 tokens with an attention mask. Random weights, lengths as SQuAD's (mean about 178). Peer and backend
take turns in one process; prints medians over the rounds. LoadGen is left out: it costs both the same.

Needs torch, transformers, numpy and safetensors; nothing else of this project's environment.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fleet.harness.backends import pytorch
from fleet.harness.interfaces import Features

LARGE = {
    "vocab_size": 30522, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    "hidden_act": "gelu", "initializer_range": 0.02,
}  # fmt: skip
PADDED = 384
FLOP_PER_TOKEN = 24 * 2 * 12 * 1024**2
"""Multiplications and additions of the linear layers; attention adds 24 x 4 x length x 1024 a token."""


def samples(count: int, seed: int = 0) -> list[Features]:
    """Lengths like those of SQuAD v1.1's dev features: most between 100 and 250, some cut off at 384, mean about 178."""
    chance = np.random.default_rng(seed)
    lengths = np.clip(np.exp(chance.normal(5.10, 0.38, count)), 40, PADDED).astype(int)
    found = []
    for length in lengths:
        ids = chance.integers(1000, 30_000, length, dtype=np.int64)
        found.append(Features(ids, (np.arange(length) >= 15).astype(np.int64)))
    return found


class Large:
    """As much of a benchmark as the backend needs."""

    generation = None
    model_dir = Path("/nowhere")
    config = LARGE

    def __init__(self, layers: int) -> None:
        self.config = {**LARGE, "num_hidden_layers": layers}
        self._samples = samples(256, seed=1)
        self.sample_count = len(self._samples)

    def features(self, index: int) -> Features:
        """Sample `index`."""
        return self._samples[index]


def reference(device: torch.device, layers: int) -> Any:
    """The model of transformers as the reference builds it: fp32, attention written out."""
    import transformers

    config = transformers.BertConfig(**{**LARGE, "num_hidden_layers": layers}, attn_implementation="eager")
    return transformers.BertForQuestionAnswering(config).eval().to(device)


def one_by_one(model: Any, given: Sequence[Features], device: torch.device) -> None:
    """The reference's loop: pad, compute, bring home, next."""
    with torch.inference_mode():
        _one_by_one(model, given, device)


def _one_by_one(model: Any, given: Sequence[Features], device: torch.device) -> None:
    for sample in given:
        ids = torch.zeros(1, PADDED, dtype=torch.int64)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        length = len(sample.input_ids)
        ids[0, :length] = torch.from_numpy(sample.input_ids)
        types[0, :length] = torch.from_numpy(sample.token_type_ids)
        mask[0, :length] = 1
        found = model(input_ids=ids.to(device), token_type_ids=types.to(device), attention_mask=mask.to(device))
        torch.stack([found.start_logits, found.end_logits], dim=-1).squeeze(0).cpu().numpy()


def timed(work: Any, device: torch.device) -> float:
    """Wall seconds, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def latencies(backend: Any, given: Sequence[Features]) -> Iterator[float]:
    """Milliseconds of each sample by itself."""
    for sample in given:
        started = time.perf_counter()
        list(backend.predict([sample]))
        yield (time.perf_counter() - started) * 1000


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--samples", type=int, help="a pass of Offline; 48 on a CPU, 10833 on a GPU")
    parser.add_argument("--peer-samples", type=int, help="of the peer; 4 on a CPU, 200 on a GPU")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help="micro-batches to try; the default alone")
    parser.add_argument("--option", action="append", default=[], help="further backend options, name=number")
    given = parser.parse_args()
    device = torch.device(given.device)
    on_gpu = device.type == "cuda"
    listed = sorted(samples(given.samples or (10_833 if on_gpu else 48)), key=lambda sample: len(sample.input_ids))
    tokens = sum(len(sample.input_ids) for sample in listed)
    print(f"{len(listed)} samples, mean {tokens / len(listed):.0f} tokens; torch {torch.__version__}", flush=True)
    peer = reference(device, given.layers)
    few = samples(given.peer_samples or (200 if on_gpu else 4), seed=2)
    timed(lambda: one_by_one(peer, few[:2], device), device)
    more = {name: int(value) for name, _, value in (text.partition("=") for text in given.option)}
    for dtype in given.dtype:
        for budget in given.tokens or [0]:
            options: dict[str, Any] = {"weights": "random", "device": given.device, "dtype": dtype, **more}
            if budget:
                options["tokens"] = budget
            started = time.perf_counter()
            backend = pytorch.open(Large(given.layers), options)  # type: ignore[arg-type]
            list(backend.predict(listed[:: max(1, len(listed) // 512)]))
            opened = time.perf_counter() - started
            rates, peers = [], []
            for _ in range(given.rounds):
                peers.append(len(few) / timed(lambda: one_by_one(peer, few, device), device))
                rates.append(len(listed) / timed(lambda: list(backend.predict(listed)), device))  # noqa: B023
            ratio = statistics.median(ours / theirs for ours, theirs in zip(rates, peers, strict=True))
            rate = statistics.median(rates)
            flops = rate * tokens / len(listed) * FLOP_PER_TOKEN * given.layers / 24
            single = sorted(latencies(backend, [*few[:8], *few]))
            print(
                f"{dtype:9} tokens {budget or 'default':>7}: Offline {rate:9.2f} samples/s (peer {statistics.median(peers):.2f}),"
                f" {ratio:.1f} times the reference; linear layers {flops / 1e12:.2f} TFLOP/s;"
                f" SingleStream p50 {single[len(single) // 2]:.2f} ms, p90 {single[int(len(single) * 0.9)]:.2f} ms;"
                f" opened in {opened:.1f} s",
                flush=True,
            )
            backend.close()
            if on_gpu:
                print(f"          peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
