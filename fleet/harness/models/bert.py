"""BERT for question answering with its padding removed: samples lie one after another in [tokens, hidden].

Linear layers, norms and activations see only real tokens; attention sees each sample by itself. Reads Hugging Face
folders by their parameter names, without transformers, whose import alone takes longer than a short unit.
tests/unit/harness/test_pytorch.py holds it to transformers' logits.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from fleet.harness.models import linear

NAMES = ("query", "key", "value")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, from one file or from shards.

    Raises ValueError naming a file that is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: no such file; next: fleet provision")
        try:
            found.update(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path}: truncated or damaged ({error}); delete it, then: fleet provision") from error
    return found


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Weights of the architecture that `config` describes, as untrained BERTs have them: for speed and memory alone."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * float(config.get("initializer_range", 0.02))

    width, inner = config["hidden_size"], config["intermediate_size"]
    made: dict[str, Tensor] = {
        "bert.embeddings.word_embeddings.weight": normal(config["vocab_size"], width),
        "bert.embeddings.position_embeddings.weight": normal(config["max_position_embeddings"], width),
        "bert.embeddings.token_type_embeddings.weight": normal(config["type_vocab_size"], width),
        "qa_outputs.weight": normal(2, width),
        "qa_outputs.bias": torch.zeros(2),
    }
    shapes = {
        **{f"attention.self.{name}": (width, width) for name in NAMES},
        "attention.output.dense": (width, width),
        "intermediate.dense": (inner, width),
        "output.dense": (width, inner),
    }
    norms = ["bert.embeddings.LayerNorm"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"bert.encoder.layer.{layer}"
        for name, shape in shapes.items():
            made[f"{prefix}.{name}.weight"] = normal(*shape)
            made[f"{prefix}.{name}.bias"] = torch.zeros(shape[0])
        norms += [f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"]
    for name in norms:
        made[f"{name}.weight"], made[f"{name}.bias"] = torch.ones(width), torch.zeros(width)
    return made


@dataclass(frozen=True, slots=True)
class Packed:
    """Samples one after another, on the model's device."""

    input_ids: Tensor
    """int64 [tokens]"""
    token_type_ids: Tensor
    positions: Tensor
    """int64 [tokens], from 0 in each sample."""
    starts: Tensor
    """int32 [samples + 1], the first token of each sample, and the end."""
    lengths: tuple[int, ...]
    longest: int
    """At least the longest sample; a captured graph attends over so many."""


class _Norm:
    def __init__(self, weights: dict[str, Tensor], name: str, eps: float, place: Callable[[Tensor], Tensor]) -> None:
        self.weight, self.bias = place(weights[f"{name}.weight"]), place(weights[f"{name}.bias"])
        self.eps = eps

    def __call__(self, rows: Tensor, following: linear.Linear | None) -> tuple[Tensor, Tensor]:
        """The norm of each row, and the same as `following` takes it."""
        if by_kernels(rows):
            from fleet.harness.models import kernels

            factor = following.factor if following is not None else None
            return kernels.norm(rows, self.weight, self.bias, self.eps, factor)
        normed = F.layer_norm(rows, (rows.shape[-1],), self.weight, self.bias, self.eps)
        return normed, normed


def by_kernels(rows: Tensor) -> bool:
    """Whether kernels of our own compute the steps between matrix products: 16-bit floats on an NVIDIA GPU."""
    return rows.is_cuda and rows.dtype in {torch.bfloat16, torch.float16}


class Bert:
    """Start and end logits of packed samples.

    `make` turns a weight [out, in] and bias [out] into a linear layer of the precision wanted; see models.linear.
    Raises ValueError naming the first parameter that the weights lack.
    """

    def __init__(
        self,
        config: dict[str, Any],
        weights: dict[str, Tensor],
        *,
        make: linear.Maker,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"config.json: hidden_act {config['hidden_act']!r}, this backend computes gelu")
        self._weights = _Named(weights)
        self.device, self.dtype = device, dtype
        self.heads = config["num_attention_heads"]
        self.vocabulary = config["vocab_size"]
        self.longest = config["max_position_embeddings"]
        eps = config["layer_norm_eps"]
        embeddings = "bert.embeddings."
        self._words = self._place(self._weights[f"{embeddings}word_embeddings.weight"])
        self._positions = self._place(self._weights[f"{embeddings}position_embeddings.weight"])
        self._types = self._place(self._weights[f"{embeddings}token_type_embeddings.weight"])
        self._norm = _Norm(self._weights, f"{embeddings}LayerNorm", eps, self._place)
        if len(self._words) != self.vocabulary:
            raise ValueError(f"the weights know {len(self._words)} words, config.json says {self.vocabulary}")
        self._layers = [self._layer(f"bert.encoder.layer.{n}.", eps, make) for n in range(config["num_hidden_layers"])]
        self._head = linear.Plain(
            self._place(self._weights["qa_outputs.weight"]), self._place(self._weights["qa_outputs.bias"])
        )
        del self._weights

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self.dtype)

    def _layer(self, prefix: str, eps: float, make: linear.Maker) -> "_Layer":
        def of(*names: str, gelu: bool = False) -> linear.Linear:
            weight = torch.cat([self._weights[f"{prefix}{name}.weight"] for name in names])
            bias = torch.cat([self._weights[f"{prefix}{name}.bias"] for name in names])
            return make(weight, bias, gelu)

        return _Layer(
            heads=self.heads,
            projections=of(*(f"attention.self.{name}" for name in NAMES)),
            attended=of("attention.output.dense"),
            attention_norm=_Norm(self._weights, f"{prefix}attention.output.LayerNorm", eps, self._place),
            intermediate=of("intermediate.dense", gelu=True),
            output=of("output.dense"),
            output_norm=_Norm(self._weights, f"{prefix}output.LayerNorm", eps, self._place),
        )

    def __call__(self, packed: Packed) -> Tensor:
        """Logits [tokens, 2] in the model's precision."""
        hidden, ready = self._embedded(packed)
        followers = [layer.projections for layer in self._layers[1:]]
        for layer, following in zip(self._layers, [*followers, None], strict=True):
            hidden, ready = layer(hidden, ready, packed, following)
        return self._head(hidden)

    def _embedded(self, packed: Packed) -> tuple[Tensor, Tensor]:
        ids = (packed.input_ids, packed.token_type_ids, packed.positions)
        tables = (self._words, self._types, self._positions)
        norm, following = self._norm, self._layers[0].projections
        if by_kernels(self._words):
            from fleet.harness.models import kernels

            return kernels.embed(ids, tables, norm.weight, norm.bias, norm.eps, factor=following.factor)
        words, types, positions = (F.embedding(rows, table) for rows, table in zip(ids, tables, strict=True))
        return norm(words + types + positions, following)

    def settle(self) -> None:
        """End the calibration of layers that need one."""
        for layer in self._layers:
            for part in (layer.output, layer.projections, layer.attended):
                if isinstance(part, linear.Float8):
                    part.settle()
            if isinstance(layer.intermediate, linear.Float8) and isinstance(layer.output, linear.Float8):
                layer.intermediate.settle(layer.output)


class _Named(dict[str, Tensor]):
    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"the weights have no {name}: not a BertForQuestionAnswering checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    heads: int
    projections: linear.Linear
    attended: linear.Linear
    attention_norm: _Norm
    intermediate: linear.Linear
    output: linear.Linear
    output_norm: _Norm

    def __call__(
        self, hidden: Tensor, ready: Tensor, packed: Packed, following: linear.Linear | None
    ) -> tuple[Tensor, Tensor]:
        """The hidden state [tokens, hidden], and the same as the layer `following` wants it."""
        context = attend(self.projections(ready), self.heads, packed, self.attended.factor)
        hidden, ready = self.attention_norm(self.attended(context, hidden), self.intermediate)
        return self.output_norm(self.output(self.intermediate(ready), hidden), following)


def attend(projected: Tensor, heads: int, packed: Packed, factor: Tensor | None) -> Tensor:
    """Context [tokens, width] within each sample, from query, key and value side by side in [tokens, 3 x width].

    Times `factor` in float8 where there is one.
    """
    if by_kernels(projected):
        from fleet.harness.models import kernels

        return kernels.attend(projected, packed.starts, heads, packed.longest, factor)
    tokens, width = len(projected), projected.shape[1] // 3
    query, key, value = projected.view(tokens, 3, heads, width // heads).unbind(1)
    found, at = [], 0
    # Sorted by length, samples of one length lie side by side and are attended to in one call.
    for count, length in _runs(packed.lengths):
        end = at + count * length
        parts = [part[at:end].view(count, length, *part.shape[1:]).transpose(1, 2) for part in (query, key, value)]
        context = F.scaled_dot_product_attention(*parts)
        found.append(context.transpose(1, 2).reshape(count * length, *query.shape[1:]))
        at = end
    return (torch.cat(found) if len(found) > 1 else found[0]).reshape(tokens, width)


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(how many, length) of neighbours of the same length."""
    count = 0
    for at, length in enumerate(lengths):
        count += 1
        if at + 1 == len(lengths) or lengths[at + 1] != length:
            yield count, length
            count = 0
