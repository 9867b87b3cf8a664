"""Generation with PyTorch: GPT-J in our own arithmetic, other decoders through transformers.

GPT-J has its own because transformers' knows neither scaled_dot_product_attention nor static caches, and its
continuous batching answers wrong tokens for this model without saying so (5.23). Beam search copies no cache here: the
beams of a sample share its prompt's keys, keys of generated tokens stay where they were written, and a mask says which
of them a beam descends from. Slots whose sample is answered take the next one at once.
tests/unit/harness/test_gptj_torch.py holds the tokens to transformers' own generate().
"""

import json
import math
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from fleet.harness.interfaces import RANDOM_WEIGHTS, Backend, Benchmark, Features, Generation, Options, generation_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
OPTIONS = {"attn_implementation", "batch_size", "beams", "device", "dtype", "layers", "threads", "weights"}
ATTENTION = ("sdpa", "matmul")
SEED = 20_260_401
"""Of random weights."""
PREFILL_TOKENS = 16_384
"""Prompt tokens computed at once: enough for full speed, few enough for little memory."""
WORKSPACE_BYTES = 6 * 2**30
"""GPU memory that the cache leaves to prompts, logits and the search."""
CALLS = 16
"""Samples in a call of predict for each slot: the slots run empty only at the end of a call."""
NEVER = -1e9
"""The score of what must not win, finite as in transformers' search: infinities would make NaN of differences."""

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options that every model here has, checked."""

    device: torch.device
    dtype: str
    batch_size: int
    random: bool
    attention: str
    generation: Generation
    labels: tuple[str, ...]


def settings(benchmark: Benchmark, options: Options) -> Settings:
    """Raises ValueError, naming what there is, for an unknown option or a value out of range."""
    if unknown := set(options) - OPTIONS:
        raise ValueError(f"the pytorch backend has no option {min(unknown)!r}; it has {sorted(OPTIONS)}")
    name = str(options.get("dtype", "float32"))
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}: one of {', '.join(DTYPES)}")
    weights = options.get("weights")
    if weights not in {None, "random"}:
        raise ValueError(f"weights {weights!r}: `random`, or leave it out to read the checkpoint")
    if "layers" in options and weights is None:
        raise ValueError("option layers goes with `weights: random` only: a checkpoint has the layers it has")
    generation, labels = generation_of(benchmark, options)
    device = torch.device(str(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")))
    batch_size = int(options.get("batch_size", 64 if device.type == "cpu" else 256))
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: a whole number from 1 on")
    if threads := int(options.get("threads", 0)):
        torch.set_num_threads(threads)
    if weights:
        labels = (*labels, RANDOM_WEIGHTS)
    return Settings(
        device=device,
        dtype=name,
        batch_size=batch_size,
        random=bool(weights),
        attention=str(options.get("attn_implementation", "sdpa")),
        generation=generation,
        labels=labels,
    )


class Checkpoint:
    """The parameters of a Hugging Face folder: model.safetensors, or the shards that its index names."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Raises ValueError when a file is missing or cut off."""
        self._device = str(device)
        self._folder = folder
        index = folder / "model.safetensors.index.json"
        files: set[str] = {"model.safetensors"}
        if index.is_file():
            try:
                files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(f"{index}: no index of shards, fetch it again: {error}") from error
        self._where: dict[str, Any] = {}
        for name in sorted(files):
            opened = self._open(folder / name)
            self._where.update(dict.fromkeys(opened.keys(), opened))

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt", device=self._device)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such file, run `fleet provision`") from error
        except SafetensorError as error:
            raise ValueError(f"{path}: truncated or no safetensors file, fetch it again: {error}") from error

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter. Raises ValueError when it is missing or of another shape."""
        if name not in self._where:
            raise ValueError(f"{self._folder}: the weights have no {name}: not a GPTJForCausalLM checkpoint")
        found = self._where[name].get_tensor(name)
        if found.shape != shape:
            raise ValueError(f"{self._folder}: {name} has shape {tuple(found.shape)}, config.json says {shape}")
        return found


class Drawn:
    """Random parameters in place of a checkpoint, drawn on the device, the same ones every time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(SEED)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """As GPTJPreTrainedModel initialises: normal with 0.02, norms that change nothing, biases zero."""
        if len(shape) > 1:
            return torch.empty(shape, device=self._device).normal_(0, 0.02, generator=self._generator)
        fill = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
        return torch.full(shape, fill, device=self._device)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    norm: Tensor
    norm_bias: Tensor
    entry: Tensor
    """Query, key, value and fc_in on top of each other: GPT-J feeds attention and MLP the same normalised input."""
    entry_bias: Tensor
    attention_output: Tensor
    output: Tensor
    output_bias: Tensor


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""From layer number and its new queries, keys, values [rows, heads, size] to the contexts [rows, width]."""


class GptJ:
    """The arithmetic of GPTJForCausalLM (transformers' modeling_gptj.py), on rows of tokens without padding."""

    def __init__(
        self, config: Mapping[str, Any], weights: Checkpoint | Drawn, device: torch.device, dtype: str
    ) -> None:
        """Raises ValueError for weights that are none of this configuration's."""
        self.width, self.heads = int(config["n_embd"]), int(config["n_head"])
        self.size = self.width // self.heads
        self.positions, self.vocabulary = int(config["n_positions"]), int(config["vocab_size"])
        self._epsilon = float(config["layer_norm_epsilon"])
        if config.get("activation_function", "gelu_new") != "gelu_new":
            found = config["activation_function"]
            raise ValueError(f"config.json: activation_function {found!r}, this backend computes gelu_new")
        inner = int(config.get("n_inner") or 4 * self.width)
        self.device, self.dtype = device, DTYPES[dtype]

        def get(name: str, *shape: int) -> Tensor:
            return weights.get(name, shape).to(device=device, dtype=self.dtype)

        width = self.width
        self._embedding = get("transformer.wte.weight", self.vocabulary, width)
        self.layers = [self._layer(f"transformer.h.{n}", inner, get) for n in range(int(config["n_layer"]))]
        self._norm = get("transformer.ln_f.weight", width), get("transformer.ln_f.bias", width)
        self._head = get("lm_head.weight", self.vocabulary, width), get("lm_head.bias", self.vocabulary)
        self._rotary = int(config.get("rotary_dim") or self.size)
        # Su et al. 2021, RoFormer: pairs of neighbours are turned by angles that grow with the position.
        speeds = 10_000.0 ** -(torch.arange(0, self._rotary, 2, dtype=torch.float64) / self._rotary)
        angles = torch.outer(torch.arange(self.positions, dtype=torch.float64), speeds)
        self._turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64).to(device)

    def _layer(self, name: str, inner: int, get: Callable[..., Tensor]) -> _Layer:
        width = self.width
        projections = [get(f"{name}.attn.{part}_proj.weight", width, width) for part in "qkv"]
        bias = get(f"{name}.mlp.fc_in.bias", inner)
        return _Layer(
            norm=get(f"{name}.ln_1.weight", width),
            norm_bias=get(f"{name}.ln_1.bias", width),
            entry=torch.cat([*projections, get(f"{name}.mlp.fc_in.weight", inner, width)]),
            entry_bias=torch.cat([torch.zeros(3 * width, device=bias.device, dtype=bias.dtype), bias]),
            attention_output=get(f"{name}.attn.out_proj.weight", width, width),
            output=get(f"{name}.mlp.fc_out.weight", width, inner),
            output_bias=get(f"{name}.mlp.fc_out.bias", width),
        )

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """[rows] tokens at [rows] positions to [rows, width]; `attend` knows what else there is to look at."""
        rows, width, heads, size = len(tokens), self.width, self.heads, self.size
        turns = self._turns[positions][:, None]
        hidden = F.embedding(tokens, self._embedding)
        for number, layer in enumerate(self.layers):
            normed = F.layer_norm(hidden, (width,), layer.norm, layer.norm_bias, self._epsilon)
            entry = F.linear(normed, layer.entry, layer.entry_bias)
            turning = entry[:, : 2 * width].view(rows, 2 * heads, size)[..., : self._rotary]
            pairs = torch.view_as_complex(turning.float().view(rows, 2 * heads, -1, 2))
            turning.copy_(torch.view_as_real(pairs * turns).flatten(-2))
            query, key, value = (entry[:, n * width : (n + 1) * width].view(rows, heads, size) for n in range(3))
            hidden = torch.addmm(hidden, attend(number, query, key, value), layer.attention_output.t())
            inner = F.gelu(entry[:, 3 * width :], approximate="tanh")
            hidden += F.linear(inner, layer.output, layer.output_bias)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, width] to float32 [rows, vocabulary]."""
        return F.linear(F.layer_norm(hidden, (self.width,), *self._norm, self._epsilon), *self._head).float()


class _Cache:
    """Keys and values of as many samples as there are slots, each layer's [slots, heads, columns, size].

    Before column `start` lie the generated tokens, latest first, one column for each step and beam; from there on the
    prompt. So the columns in use are always one range, whatever the slots' ages and lengths.
    """

    def __init__(self, model: GptJ, slots: int, start: int, prompt: int) -> None:
        self.slots, self.start, self.prompt = slots, start, prompt
        shape = (slots, model.heads, start + prompt, model.size)
        # Zeros: what a mask leaves out still gets multiplied, and 0 times an old NaN is NaN.
        both = [[torch.zeros(shape, device=model.device, dtype=model.dtype) for _ in range(2)] for _ in model.layers]
        self.keys, self.values = [keys for keys, _ in both], [values for _, values in both]


class _Search:
    """Beam search over slots, each at its own step; one beam is greedy search.

    The rules are those of transformers' _beam_search (length penalty 1): of the best candidates, those that end are
    finished if they are among the best `beams`, the others go on; finished ones are ranked by their score per token.
    """

    def __init__(self, slots: int, generation: Generation, device: torch.device) -> None:
        beams, steps = generation.beams, generation.max_new_tokens
        self._generation = generation
        self._ends = torch.tensor(generation.eos_token_ids, dtype=torch.int64, device=device)
        self._kept = max(2, 1 + len(generation.eos_token_ids)) * beams
        self.step = torch.zeros(slots, dtype=torch.int64, device=device)
        self.tokens = torch.zeros((slots, beams), dtype=torch.int64, device=device)
        self._scores = torch.zeros((slots, beams), device=device)
        self._written = torch.zeros((slots, beams, steps), dtype=torch.int64, device=device)
        self._finished = torch.zeros((slots, beams), dtype=torch.bool, device=device)
        self._finished_scores = torch.zeros((slots, beams), device=device)
        self._finished_lengths = torch.zeros((slots, beams), dtype=torch.int64, device=device)
        self._finished_written = torch.zeros_like(self._written)

    def begin(self, slots: Tensor, last_tokens: Tensor) -> None:
        """Take new samples, whose prompts end in `last_tokens`."""
        self.step[slots] = 0
        self.tokens[slots] = last_tokens[:, None]
        self._scores[slots] = NEVER
        self._scores[slots, 0] = 0.0  # all beams are one as yet
        self._finished[slots] = False
        self._finished_scores[slots] = NEVER

    def advance(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """From logits [slots, beams, vocabulary]: the beams each goes on from [slots, beams], and who is done."""
        wanted, (slots, beams) = self._generation, self._scores.shape
        scores = F.log_softmax(logits, dim=-1)
        if wanted.min_new_tokens and len(self._ends):
            early = (self.step < wanted.min_new_tokens)[:, None, None]
            scores[..., self._ends] = scores[..., self._ends].masked_fill(early, -math.inf)
        # The best of all beams are among the best of each: a short row is sorted instead of a long one.
        scores, tokens = scores.topk(min(self._kept, logits.shape[-1]), dim=-1)
        each = scores.shape[-1]
        best, chosen = (scores + self._scores[..., None]).view(slots, -1).topk(min(self._kept, beams * each), dim=-1)
        parents, tokens = chosen // each, tokens.reshape(slots, -1).gather(1, chosen)
        length = self.step + 1
        last = length >= wanted.max_new_tokens
        ending = torch.isin(tokens, self._ends) | last[:, None]
        written = self._written.gather(1, parents[..., None].expand(-1, -1, wanted.max_new_tokens))
        written.scatter_(
            2, self.step.clamp(max=wanted.max_new_tokens - 1)[:, None, None].expand(*tokens.shape, 1), tokens[..., None]
        )
        self._finish(best[:, :beams] / length[:, None], written[:, :beams], ending[:, :beams], length)
        self._scores, going = torch.where(ending, best + NEVER, best).topk(beams, dim=-1)
        self._written = written.gather(1, going[..., None].expand(-1, -1, wanted.max_new_tokens))
        self.tokens = tokens.gather(1, going)
        self.step = length
        done = self._finished.all(dim=1)
        if not wanted.early_stopping:
            done &= self._scores[:, 0] / length <= self._finished_scores.amin(dim=1)
        return parents.gather(1, going), done | last

    def _finish(self, scores: Tensor, written: Tensor, ending: Tensor, length: Tensor) -> None:
        if self._generation.early_stopping:
            ending = ending & ~self._finished.all(dim=1, keepdim=True)
        merged = torch.cat([self._finished_scores, torch.where(ending, scores, NEVER)], dim=1)
        self._finished_scores, kept = merged.topk(scores.shape[1], dim=-1)
        self._finished = torch.cat([self._finished, ending], dim=1).gather(1, kept)
        lengths = length[:, None].expand_as(scores)
        self._finished_lengths = torch.cat([self._finished_lengths, lengths], dim=1).gather(1, kept)
        wide = kept[..., None].expand(-1, -1, written.shape[-1])
        self._finished_written = torch.cat([self._finished_written, written], dim=1).gather(1, wide)

    def answers(self, slots: list[int]) -> list[Tokens]:
        """The best finished answers; ends as tokens are part of them."""
        written = self._finished_written[slots, 0].cpu().numpy()
        lengths = self._finished_lengths[slots, 0].tolist()
        return [row[:length].copy() for row, length in zip(written, lengths, strict=True)]


class _Batch:
    """Samples being answered together, one in each slot."""

    def __init__(self, model: GptJ, generation: Generation, cache: _Cache, slots: int, attention: str) -> None:
        self._model, self._cache, self._attention = model, cache, attention
        self._beams = generation.beams
        self.search = _Search(slots, generation, model.device)
        self._slots = torch.arange(slots, device=model.device)
        self._lengths = torch.ones(slots, dtype=torch.int64, device=model.device)
        self._ages, self._prompts = [0] * slots, [1] * slots
        mask = {"device": model.device, "dtype": model.dtype}
        self._ancestry = torch.full((slots, generation.beams, cache.start), -math.inf, **mask)
        self._prompt_mask = torch.full((slots, cache.prompt), -math.inf, **mask)

    def begin(self, slots: Sequence[int], prompts: Sequence[Tokens]) -> None:
        """Put prompts into free slots; all of a prompt but its last token, with which the first step begins."""
        device = self._model.device
        where = torch.tensor(slots, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._lengths[where] = lengths
        for slot, prompt in zip(slots, prompts, strict=True):
            self._ages[slot], self._prompts[slot] = 0, len(prompt)
        self._ancestry[where] = -math.inf
        columns = torch.arange(self._cache.prompt, device=device)
        hidden = columns[None] >= (lengths - 1)[:, None]
        self._prompt_mask[where] = torch.zeros_like(self._prompt_mask[where]).masked_fill(hidden, -math.inf)
        self.search.begin(where, torch.tensor([int(prompt[-1]) for prompt in prompts], device=device))
        first, tokens = 0, 0
        for number, prompt in enumerate(prompts):
            tokens += len(prompt)
            if tokens >= PREFILL_TOKENS or number == len(prompts) - 1:
                self._prefill(where[first : number + 1], [one[:-1] for one in prompts[first : number + 1]])
                first, tokens = number + 1, 0

    def _prefill(self, slots: Tensor, prompts: Sequence[Tokens]) -> None:
        model, start = self._model, self._cache.start
        longest = max(len(prompt) for prompt in prompts)
        if not longest:
            return
        tokens = torch.from_numpy(np.concatenate(prompts)).to(model.device)
        row = torch.from_numpy(np.repeat(np.arange(len(prompts)), [len(one) for one in prompts])).to(model.device)
        column = torch.from_numpy(np.concatenate([np.arange(len(one)) for one in prompts])).to(model.device)

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            shape = (3, len(prompts), model.heads, longest, model.size)
            padded = torch.zeros(shape, device=model.device, dtype=model.dtype)
            for kind, new in enumerate((query, key, value)):
                padded[kind][row, :, column] = new
            # No mask beside causality: padding comes after the tokens, which never look ahead.
            context = F.scaled_dot_product_attention(padded[0], padded[1], padded[2], is_causal=True)
            self._cache.keys[number][slots, :, start : start + longest] = padded[1]
            self._cache.values[number][slots, :, start : start + longest] = padded[2]
            return context.transpose(1, 2)[row, column].reshape(len(tokens), model.width)

        model.hidden(tokens, column, attend)

    def step(self) -> list[bool]:
        """One more token for every slot; who is done by it."""
        model, search, cache, beams = self._model, self.search, self._cache, self._beams
        slots = len(self._slots)
        # Slots that wait for a sample go on with what they had, to no end; their age stays in range.
        age = search.step.clamp(max=cache.start // beams - 1)
        columns = cache.start - beams * (age[:, None] + 1) + torch.arange(beams, device=model.device)
        self._ancestry.scatter_(2, columns[..., None], 0.0)
        # Multiples of 8: the attention kernels read masks in blocks of 16 bytes.
        first = max(0, cache.start - beams * (max(self._ages) + 1)) // 8 * 8
        last = min(cache.prompt, (max(self._prompts) + 7) // 8 * 8)
        prompt_mask = self._prompt_mask[:, None, :last].expand(-1, beams, -1)
        mask = torch.cat([self._ancestry[..., first:], prompt_mask], dim=-1)[:, None]
        seen = slice(first, cache.start + last)

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = cache.keys[number][:slots], cache.values[number][:slots]
            keys[self._slots[:, None], :, columns] = key.view(slots, beams, model.heads, model.size)
            values[self._slots[:, None], :, columns] = value.view(slots, beams, model.heads, model.size)
            query = query.view(slots, beams, model.heads, model.size).transpose(1, 2)
            if self._attention == "sdpa":
                context = F.scaled_dot_product_attention(query, keys[:, :, seen], values[:, :, seen], attn_mask=mask)
            else:
                context = _by_matmul(query, keys[:, :, seen], values[:, :, seen], mask)
            return context.transpose(1, 2).reshape(slots * beams, model.width)

        positions = (self._lengths - 1 + age)[:, None].expand(-1, beams).reshape(-1)
        hidden = model.hidden(search.tokens.view(-1), positions.clamp(max=model.positions - 1), attend)
        parents, done = search.advance(model.logits(hidden).view(slots, beams, -1))
        self._ancestry = self._ancestry.gather(1, parents[..., None].expand_as(self._ancestry))
        self._ages = [min(age + 1, cache.start // beams - 1) for age in self._ages]
        finished: list[bool] = done.tolist()
        return finished

    def release(self, slots: Sequence[int]) -> None:
        """Nothing waits for these: they no longer widen what attention reads."""
        for slot in slots:
            self._prompts[slot] = 1


def _by_matmul(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of few queries over many keys as two batched products, the scores in float32."""
    slots, heads, beams, size = query.shape
    flat = query.reshape(slots * heads, beams, size)
    turned = keys.reshape(slots * heads, -1, size).transpose(1, 2)
    if query.is_cuda and query.dtype != torch.float32:
        scores = torch.bmm(flat, turned, out_dtype=torch.float32)
    else:
        scores = torch.bmm(flat, turned).float()
    scores = scores.view(slots, heads, beams, -1).mul_(size**-0.5).add_(mask)
    weights = scores.softmax(dim=-1).to(values.dtype).view(slots * heads, beams, -1)
    return torch.bmm(weights, values.reshape(slots * heads, -1, size)).view(slots, heads, beams, size)


class _Common:
    """What GPT-J and the models of transformers share as backends."""

    by_length = True

    def __init__(self, chosen: Settings) -> None:
        self._chosen = chosen
        self.labels = chosen.labels

    @property
    def model(self) -> dict[str, str]:
        """The precision the weights are run in, and whether there were any."""
        found = {"weight_data_types": SHORT[self._chosen.dtype]}
        if self._chosen.random:
            found |= {"starting_weights_filename": "none", "weight_transformations": "none, the weights are random"}
        return found

    def versions(self) -> dict[str, str]:
        """torch, and CUDA where it is used."""
        device = self._chosen.device
        found = {"torch": torch.__version__, "device": str(device), "machine": platform.machine()}
        if device.type == "cuda":
            found["cuda"] = str(torch.version.cuda)
            found["gpu"] = torch.cuda.get_device_name(device)
            found["gpu_peak_memory_gib"] = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f}"
        return found

    def _check(self, prompts: Sequence[Tokens], vocabulary: int, positions: int) -> None:
        """Raises ValueError for what the model has no embedding for; a GPU would only say `device-side assert`."""
        most = positions - self._chosen.generation.max_new_tokens
        for prompt in prompts:
            if not 1 <= len(prompt) <= most:
                raise ValueError(f"a prompt of {len(prompt)} tokens: this model reads 1 to {most} of them")
            if prompt.min() < 0 or prompt.max() >= vocabulary:
                wrong = int(prompt.min() if prompt.min() < 0 else prompt.max())
                raise ValueError(
                    f"token {wrong} is none of the model's {vocabulary}: vocabulary and weights do not match"
                )

    def _halved(self, size: int, longest: int, error: BaseException) -> int:
        """Half as many samples at once. Raises ValueError when there was but one."""
        if size == 1:
            raise ValueError(
                f"out of GPU memory with one prompt of {longest} tokens and {self._chosen.generation.beams} beams;"
                " take a GPU with more memory, a smaller dtype or fewer beams"
            ) from error
        sys.stdout.write(f"out of GPU memory with {size} samples at once: going on with {size // 2}\n")
        return size // 2


class GptJBackend(_Common):
    """GPT-J on CPU or CUDA; for its options see OPTIONS."""

    def __init__(self, benchmark: Benchmark, chosen: Settings, layers: int | None) -> None:
        if chosen.attention not in ATTENTION:
            raise ValueError(f"attn_implementation {chosen.attention!r}: one of {', '.join(ATTENTION)}")
        config, weights = dict(benchmark.config), Drawn(chosen.device) if chosen.random else None
        labels = chosen.labels
        if weights is None:
            config |= json.loads(_readable(benchmark.model_dir / "config.json"))
        elif layers is not None and layers != config["n_layer"]:
            if not 1 <= layers <= config["n_layer"]:
                raise ValueError(f"layers {layers}: the model has 1 to {config['n_layer']}")
            labels = (*labels, f"{layers} of {config['n_layer']} layers")
            config["n_layer"] = layers
        super().__init__(chosen)
        self.labels = labels
        self._gptj = GptJ(
            config, weights or Checkpoint(benchmark.model_dir, chosen.device), chosen.device, chosen.dtype
        )
        self._slots = chosen.batch_size
        self._cache: _Cache | None = None
        self._cached_for = 0
        """Slots that were wanted when the cache was made; it may have got fewer."""

    @property
    def batch_size(self) -> int:
        """Many more than are computed at once: an answered sample's slot takes the next one."""
        return CALLS * self._chosen.batch_size

    def predict(self, samples: Sequence[Features]) -> Iterator[Tokens]:
        """New tokens int64 [count] of each sample in order, the end token among them.

        Raises ValueError for a prompt that is empty, too long or of another vocabulary, and when not even one sample
        fits into GPU memory.
        """
        prompts = [np.ascontiguousarray(sample.input_ids, dtype=np.int64) for sample in samples]
        self._check(prompts, self._gptj.vocabulary, self._gptj.positions)
        longest = max(len(prompt) for prompt in prompts)
        waiting = dict(enumerate(prompts))
        answers: dict[int, Tokens] = {}
        given = 0
        while given < len(prompts):
            failed: torch.OutOfMemoryError | None = None
            try:
                for index, tokens in self._generate(waiting):
                    answers[index] = tokens
                    while given in answers:
                        yield answers.pop(given)
                        given += 1
            except torch.OutOfMemoryError as error:
                failed = error.with_traceback(None)  # the frames hold the very tensors that filled the memory
            if failed is not None:
                self._cache = None
                self._slots = self._halved(min(self._slots, len(waiting)), longest, failed)
                if self._chosen.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _generate(self, waiting: dict[int, Tokens]) -> Iterator[tuple[int, Tokens]]:
        """Index and answer of all that wait, as they come; what is answered waits no longer."""
        with torch.inference_mode():
            batch, slots = self._batch(waiting)
            queue = deque(waiting)
            held: dict[int, int] = {}
        while queue or held:
            with torch.inference_mode():
                free = [slot for slot in range(slots) if slot not in held]
                # A few at a time: a prompt alone costs more than a prompt among others.
                if queue and (not held or len(free) >= max(1, slots // 8)):
                    new = [(slot, queue.popleft()) for slot in free[: len(queue)]]
                    batch.begin([slot for slot, _ in new], [waiting[index] for _, index in new])
                    held.update(new)
                finished = batch.step()
                done = [slot for slot in held if finished[slot]]
                answers = batch.search.answers(done) if done else []
                batch.release(done)
            for slot, tokens in zip(done, answers, strict=True):
                index = held.pop(slot)
                del waiting[index]
                yield index, tokens

    def _batch(self, waiting: dict[int, Tokens]) -> tuple[_Batch, int]:
        generation = self._chosen.generation
        start = (generation.beams * generation.max_new_tokens + 7) // 8 * 8
        prompt = (max(len(tokens) for tokens in waiting.values()) + 7) // 8 * 8
        wanted = min(self._slots, len(waiting))
        cache = self._cache
        if cache is None or cache.start != start or cache.prompt < prompt or self._cached_for < wanted:
            self._cache = cache = None  # before the next one is made
            self._cache = cache = _Cache(self._gptj, min(wanted, self._fitting(start + prompt)), start, prompt)
            self._cached_for = wanted
        slots = min(cache.slots, wanted)
        # As many rounds, but even ones: a last round of a few samples would take as long as a full one.
        slots = math.ceil(len(waiting) / math.ceil(len(waiting) / slots))
        return _Batch(self._gptj, generation, cache, slots, self._chosen.attention), slots

    def _fitting(self, columns: int) -> int:
        """Slots of so many columns that fit into the GPU's free memory; at least one, that it may be tried."""
        if self._chosen.device.type != "cuda":
            return self._slots
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._chosen.device)
        model = self._gptj
        column = 2 * len(model.layers) * model.width * torch.empty((), dtype=model.dtype).element_size()
        return max(1, int((free - WORKSPACE_BYTES) // (columns * column)))

    def close(self) -> None:
        """Let go of the cache."""
        self._cache = None


class TransformersBackend(_Common):
    """Any other decoder, Llama above all, as transformers runs it."""

    def __init__(self, benchmark: Benchmark, chosen: Settings, layers: int | None) -> None:
        super().__init__(chosen)
        import transformers  # seconds: only who needs it pays

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._transformers = transformers
        how = {"dtype": DTYPES[chosen.dtype], "attn_implementation": chosen.attention}
        if chosen.random:
            fields = dict(benchmark.config)
            total = fields.get("num_hidden_layers")
            if layers is not None and layers != total:
                self.labels = (*self.labels, f"{layers} of {total} layers")
                fields["num_hidden_layers"] = layers
            config = transformers.AutoConfig.for_model(**fields)
            torch.manual_seed(SEED)
            with chosen.device:
                self._loaded = transformers.AutoModelForCausalLM.from_config(config, **how)
        else:
            self._loaded = self._read(benchmark.model_dir, how)
        self._loaded = self._loaded.to(chosen.device).eval()
        self.batch_size = chosen.batch_size
        wanted = chosen.generation
        self._wanted = transformers.GenerationConfig(
            num_beams=wanted.beams,
            min_new_tokens=wanted.min_new_tokens,
            max_new_tokens=wanted.max_new_tokens,
            eos_token_id=list(wanted.eos_token_ids),
            pad_token_id=wanted.pad_token_id,
            early_stopping=wanted.early_stopping if wanted.beams > 1 else False,
            do_sample=False,
        )

    def _read(self, folder: Path, how: dict[str, Any]) -> Any:
        """Raises ValueError for weights that are missing, cut off or not all there."""
        Checkpoint(folder, torch.device("cpu"))  # its errors name the file
        loaded, info = self._transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **how
        )
        if missing := info["missing_keys"]:
            raise ValueError(f"{folder}: the weights have no {min(missing)}")
        return loaded

    def versions(self) -> dict[str, str]:
        """torch, transformers, and CUDA where it is used."""
        return super().versions() | {"transformers": self._transformers.__version__}

    def predict(self, samples: Sequence[Features]) -> Sequence[Tokens]:
        """New tokens int64 [count] of each sample in order, the end token among them.

        Raises ValueError for a prompt that is empty, too long or of another vocabulary, and when not even one sample
        fits into GPU memory.
        """
        prompts = [sample.input_ids for sample in samples]
        fields = self._loaded.config
        self._check(prompts, fields.vocab_size, fields.max_position_embeddings)
        if self._chosen.device.type == "cuda" and self._chosen.generation.beams == 1:
            return self._continuously(prompts)
        answers: list[Tokens] = []
        while len(answers) < len(prompts):
            group = prompts[len(answers) : len(answers) + self.batch_size]
            failed: torch.OutOfMemoryError | None = None
            try:
                answers += self._padded(group)
            except torch.OutOfMemoryError as error:
                failed = error.with_traceback(None)
            if failed is not None:
                self.batch_size = self._halved(len(group), max(len(prompt) for prompt in group), failed)
                if self._chosen.device.type == "cuda":
                    torch.cuda.empty_cache()
        return answers

    def _continuously(self, prompts: Sequence[Tokens]) -> list[Tokens]:
        """Transformers' continuous batching: it fills the GPU's free memory with a cache in pages."""
        found = self._loaded.generate_batch([prompt.tolist() for prompt in prompts], generation_config=self._wanted)
        answers = []
        for number in range(len(prompts)):
            output = found[f"req_{number}"]
            if output.error:
                raise ValueError(f"transformers gave no answer to sample {number}: {output.error}")
            answers.append(np.array(output.generated_tokens, dtype=np.int64))
        return answers

    @torch.inference_mode()
    def _padded(self, prompts: Sequence[Tokens]) -> list[Tokens]:
        wanted, longest = self._chosen.generation, max(len(prompt) for prompt in prompts)
        ids = np.full((len(prompts), longest), wanted.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        made = self._loaded.generate(
            torch.from_numpy(ids).to(self._chosen.device),
            attention_mask=torch.from_numpy(mask).to(self._chosen.device),
            generation_config=self._wanted,
        )
        return [until_end(row, wanted.eos_token_ids) for row in made[:, longest:].cpu().numpy()]

    def close(self) -> None:
        """Nothing to end."""


def until_end(tokens: Tokens, ends: Sequence[int]) -> Tokens:
    """`tokens` without the padding after the first of `ends`."""
    found = np.flatnonzero(np.isin(tokens, ends))
    return tokens[: found[0] + 1].copy() if len(found) else tokens.copy()


def _readable(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file, run `fleet provision`") from error


def open(benchmark: Benchmark, options: Options) -> Backend:  # noqa: A001 - every backend's door has this name
    """The benchmark's model, loaded: GPT-J here, any other decoder by transformers.

    Raises ValueError for unknown options, a benchmark that generates nothing, and weights that are missing, truncated
    or another model's.
    """
    chosen = settings(benchmark, options)
    layers = options.get("layers")
    kind: Callable[[Benchmark, Settings, int | None], Backend]
    kind = GptJBackend if benchmark.config.get("model_type") == "gptj" else TransformersBackend
    return kind(benchmark, chosen, None if layers is None else int(layers))
