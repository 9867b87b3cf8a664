"""GPT-J's parameters, from a Hugging Face folder or drawn, and its layers over rows of tokens."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEED = 20_260_401
"""Of random weights."""


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
