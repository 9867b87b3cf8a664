"""GPT-J-6B, Offline, on one GPU: samples a second beside NVIDIA's MLPerf submission.

    python benchmarks/gptj_speed.py [--dtype bfloat16] [--batch-size 112] [--samples 448] [--attention sdpa]

Needs torch, numpy and safetensors. The weights are random, which takes the same time, but ends no answer early: every
answer has --new-tokens tokens. With 128, the most that the benchmark allows, this is more work than the real one,
whose answers are about half as long; --new-tokens 69 is near those. Prompts are as long as CNN/DailyMail's: about 870
tokens on average, 1919 at the most. Without a GPU, only small settings end in time:

    python benchmarks/gptj_speed.py --device cpu --layers 1 --hidden 64 --heads 2 --batch-size 4 --samples 8

Printed with it: the limits that arithmetic and memory of an H200 set to this way of computing.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from fleet.harness.interfaces import Features, Generation
from fleet.harness.models import gptj, gptj_layers

NVIDIA = 36.4
"""Samples/s for each H200, gptj-99 Offline, beam 4, TensorRT-LLM with FP8 (MLPerf Inference v4.1)."""
FLOPS, BYTES = 790e12, 4.8e12
"""An H200's bf16 operations a second on matrices as measured, and its memory's bytes a second."""
MEAN, LONGEST = 870, 1919


class Summaries:
    """As much of the GPT-J benchmark as the backend needs: no weights, no data."""

    model_dir = Path("none")
    model: dict[str, str] = {}  # noqa: RUF012 - shaped like Benchmark

    def __init__(self, width: int, heads: int, layers: int, new_tokens: int, beams: int) -> None:
        self.config: dict[str, Any] = {
            "model_type": "gptj", "n_embd": width, "n_head": heads, "n_layer": layers, "n_positions": 2048,
            "rotary_dim": min(64, width // heads), "vocab_size": 50_400, "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new", "n_inner": None,
        }  # fmt: skip
        self.generation = Generation(
            beams=beams, min_new_tokens=new_tokens, max_new_tokens=new_tokens, eos_token_ids=(50_256,),
            pad_token_id=50_256,
        )  # fmt: skip


def prompts(count: int, longest: int) -> list[Features]:
    """Random tokens, log-normal lengths, sorted as the SUT does."""
    chance = np.random.default_rng(0)
    mean = MEAN * longest / LONGEST
    lengths = np.clip(chance.lognormal(np.log(mean) - 0.11, 0.5, count), mean / 12, longest).astype(int)
    return [Features(chance.integers(0, 50_256, length), np.zeros(length, np.int64)) for length in sorted(lengths)]


def limit(config: dict[str, int], lengths: "np.ndarray[Any, Any]", steps: int, beams: int) -> float:
    """Samples/s that an H200's arithmetic in bf16 and its memory allow, one after the other and nothing beside them.

    Weights are multiplied with every token, each prompt token looks at those before it, and in every step each sample's
    keys and values are read once; those of generated tokens are there for each beam. Reading the weights is shared by a
    batch and left out.
    """
    layers, width = config["n_layer"], config["n_embd"]
    parameters = layers * 12 * width**2
    tokens, attended = float(lengths.mean()), float((lengths**2).mean())
    prompt = 2 * parameters * tokens + 2 * layers * width * attended
    step = beams * 2 * (parameters + config["vocab_size"] * width)
    column = 2 * 2 * layers * width
    read = steps * column * (tokens + beams * steps / 2)
    return 1 / ((prompt + steps * step) / FLOPS + read / BYTES)


def rate(backend: Any, samples: list[Features], batch: int, seconds: float, device: str) -> tuple[int, int, float]:
    """Samples and tokens done and the time they took; no new batch is begun after `seconds`."""
    done, tokens, started = 0, 0, time.perf_counter()
    for at in range(0, len(samples), batch):
        if done and time.perf_counter() - started > seconds:
            break
        for output in backend.predict(samples[at : at + batch]):
            done, tokens = done + 1, tokens + len(output)
        print(f"  {done} samples, {time.perf_counter() - started:.1f} s", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return done, tokens, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(gptj_layers.DTYPES))
    parser.add_argument("--attention", default="matmul", choices=gptj.ATTENTION)
    parser.add_argument(
        "--batch-size", type=int, default=112, help="samples at once; 112 of the longest fit in 139 GiB"
    )
    parser.add_argument("--samples", type=int, default=448)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--longest", type=int, default=LONGEST, help="prompt tokens; the mean goes with it")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--seconds", type=float, default=150)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: not run; see --help for a setting that a CPU can do")

    options = {
        "device": given.device, "dtype": given.dtype, "weights": "random", "batch_size": given.batch_size,
        "attn_implementation": given.attention,
    }  # fmt: skip
    samples = prompts(given.samples, given.longest)
    lengths = np.array([len(sample.input_ids) for sample in samples])
    print(f"{len(samples)} prompts of {lengths.mean():.0f} tokens on average, {lengths.max()} at the most")

    # One new token each: what the prompts cost by themselves.
    benchmark: Any = Summaries(given.hidden, given.heads, given.layers, 1, given.beams)
    started = time.perf_counter()
    backend: Any = gptj.open(benchmark, options)
    print(f"{backend.versions()}, {', '.join(backend.labels)}; loaded in {time.perf_counter() - started:.1f} s")
    few = samples[:: max(1, len(samples) // given.batch_size)][: given.batch_size]
    for label in ("warm-up", "prompts alone"):
        done, _, seconds = rate(backend, few, given.batch_size, given.seconds, given.device)
        print(f"{label}: {done / seconds:.2f} samples/s")
    backend.close()
    del backend

    benchmark = Summaries(given.hidden, given.heads, given.layers, given.new_tokens, given.beams)
    backend = gptj.open(benchmark, options)
    rate(backend, few[:4], given.batch_size, given.seconds, given.device)
    done, tokens, seconds = rate(backend, samples, given.batch_size, given.seconds, given.device)
    found = done / seconds
    if given.device == "cuda":
        print(f"GPU memory at the most: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    print(
        f"{given.dtype}, {given.attention}, beam {given.beams}: {found:.2f} samples/s, {tokens / seconds:.0f} tokens/s"
    )
    if (given.device, given.hidden, given.layers) != ("cuda", 4096, 28):
        print("another model or device: nothing to compare with")
        return
    most = limit(benchmark.config, lengths[:done], given.new_tokens, given.beams)
    print(f"limit of an H200 in bf16 {most:.1f} samples/s: {found / most:.3f} of it")
    print(f"NVIDIA's submission {NVIDIA} samples/s for each H200, FP8: {found / NVIDIA:.3f} of it")


if __name__ == "__main__":
    main()
