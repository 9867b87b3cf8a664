"""BERT for question answering in plain PyTorch: the only import of torch.

Reads a Hugging Face folder (config.json, model.safetensors) by its parameter names, without transformers, whose
import alone takes longer than a short unit. tests/unit/harness/test_pytorch.py holds it to transformers' logits.
"""

import contextlib
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from fleet.harness.interfaces import Benchmark, Features, Options

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONS = {"batch_size", "device", "dtype", "threads"}


class Embeddings(nn.Module):
    """Word, position and token-type embeddings, added and normalised."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], width)
        self.position_embeddings = nn.Embedding(config["max_position_embeddings"], width)
        self.token_type_embeddings = nn.Embedding(config["type_vocab_size"], width)
        self.LayerNorm = nn.LayerNorm(width, eps=config["layer_norm_eps"])

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """[batch, length] twice to [batch, length, hidden]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        summed = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        result: Tensor = self.LayerNorm(summed + self.position_embeddings(positions))
        return result


class Layer(nn.Module):
    """One encoder layer; parameter names are mapped from BERT's in `state_dict`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.heads = config["num_attention_heads"]
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=config["layer_norm_eps"])
        self.intermediate = nn.Linear(width, inner)
        self.output = nn.Linear(inner, width)
        self.output_norm = nn.LayerNorm(width, eps=config["layer_norm_eps"])

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """[batch, length, hidden] to the same; `mask` is [batch, 1, 1, length], True where attended."""
        batch, length, width = hidden.shape
        shape = (batch, length, self.heads, width // self.heads)
        query, key, value = (part(hidden).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        context = context.transpose(1, 2).reshape(batch, length, width)
        hidden = self.attention_norm(hidden + self.attention_output(context))
        result: Tensor = self.output_norm(hidden + self.output(F.gelu(self.intermediate(hidden))))
        return result


class BertForQuestionAnswering(nn.Module):
    """Start and end logits from token ids."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.qa_outputs = nn.Linear(config["hidden_size"], 2)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, mask: Tensor | None) -> Tensor:
        """[batch, length] twice to [batch, length, 2]."""
        hidden = self.embeddings(input_ids, token_type_ids)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        result: Tensor = self.qa_outputs(hidden)
        return result


_PARTS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_norm",
}


def state_dict(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Hugging Face's BERT parameter names to this module's.

    Raises ValueError naming the first parameter that is missing.
    """
    names = {f"embeddings.{part}.weight": f"bert.embeddings.{part}.weight" for part in (
        "word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")}  # fmt: skip
    names["embeddings.LayerNorm.bias"] = "bert.embeddings.LayerNorm.bias"
    for layer in range(layers):
        for theirs, ours in _PARTS.items():
            for kind in ("weight", "bias"):
                names[f"layers.{layer}.{ours}.{kind}"] = f"bert.encoder.layer.{layer}.{theirs}.{kind}"
    names["qa_outputs.weight"], names["qa_outputs.bias"] = "qa_outputs.weight", "qa_outputs.bias"
    if missing := [name for name in names.values() if name not in weights]:
        raise ValueError(f"the weights have no {missing[0]}: not a BertForQuestionAnswering checkpoint")
    return {ours: weights[theirs] for ours, theirs in names.items()}


@contextlib.contextmanager
def _uninitialised() -> Iterator[None]:
    """Build layers without drawing random weights that are replaced at once.

    Not torch.device("meta"): its first random draw imports a second's worth of torch.
    """
    kept = {kind: kind.reset_parameters for kind in (nn.Linear, nn.Embedding)}
    try:
        for kind in kept:
            kind.reset_parameters = lambda _: None
        yield
    finally:
        for kind, method in kept.items():
            kind.reset_parameters = method


class PytorchBackend:
    """A BERT on CPU or CUDA. Options: device, dtype, batch_size, threads."""

    labels: tuple[str, ...] = ()
    by_length = True

    def __init__(self, model_dir: Path, options: Options) -> None:
        if unknown := set(options) - OPTIONS:
            raise ValueError(f"the pytorch backend has no option {min(unknown)!r}; it has {sorted(OPTIONS)}")
        if threads := int(options.get("threads", 0)):
            torch.set_num_threads(threads)
        self._device = torch.device(str(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")))
        name = str(options.get("dtype", "float32"))
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r}: one of {', '.join(DTYPES)}")
        self._dtype_name = name
        self.batch_size = int(options.get("batch_size", 32 if self._device.type == "cpu" else 512))
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        if config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"config.json: hidden_act {config['hidden_act']!r}, this backend computes gelu")
        with _uninitialised():
            model = BertForQuestionAnswering(config)
        weights = state_dict(load_file(model_dir / "model.safetensors"), config["num_hidden_layers"])
        model.load_state_dict(weights, assign=True)
        self._model = model.to(device=self._device, dtype=DTYPES[name]).eval()

    @property
    def model(self) -> dict[str, str]:
        """The precision the weights are run in."""
        return {"weight_data_types": {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[self._dtype_name]}

    def versions(self) -> dict[str, str]:
        """torch, and CUDA where it is used."""
        found = {"torch": torch.__version__, "device": str(self._device), "machine": platform.machine()}
        if self._device.type == "cuda":
            found["cuda"] = str(torch.version.cuda)
            found["gpu"] = torch.cuda.get_device_name(self._device)
        return found

    @torch.inference_mode()
    def predict(self, samples: Sequence[Features]) -> Sequence[npt.NDArray[np.float32]]:
        """Start and end logits, one array [length, 2] per sample, in order."""
        lengths = [len(sample.input_ids) for sample in samples]
        ids = np.zeros((len(samples), max(lengths)), dtype=np.int64)
        types = np.zeros_like(ids)
        for row, sample in enumerate(samples):
            ids[row, : lengths[row]] = sample.input_ids
            types[row, : lengths[row]] = sample.token_type_ids
        mask = None
        if min(lengths) != max(lengths):
            attended = np.arange(max(lengths))[None, :] < np.asarray(lengths)[:, None]
            mask = torch.from_numpy(attended)[:, None, None, :].to(self._device)
        logits = self._model(torch.from_numpy(ids).to(self._device), torch.from_numpy(types).to(self._device), mask)
        array = logits.float().cpu().numpy()
        return [array[row, :length] for row, length in enumerate(lengths)]

    def close(self) -> None:
        """Nothing to end."""


def open(benchmark: Benchmark, options: Options) -> PytorchBackend:  # noqa: A001 - every backend's door has this name
    """The benchmark's model, loaded.

    Raises ValueError for unknown options and foreign checkpoints, FileNotFoundError for missing weights.
    """
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(1)  # one query at a time: a second pool would only take cores from the first
    return PytorchBackend(benchmark.model_dir, options)
