"""BERT checkpoints as they are published, to Hugging Face's parameter names and model.safetensors."""

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]

PICKLES = ("model.pytorch", "pytorch_model.bin")
"""State dicts that only torch reads; the first is the official one of MLPerf's BERT-large."""
ARRAYS = "model.npz"
SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_TRAINING = re.compile(r"(^|/)(adam_[mv]|global_step)(/|$)|^cls/(predictions|seq_relationship)/")
"""TensorFlow's variables that no inference needs: the optimiser's, and the heads of pretraining."""
_TENSORFLOW = (
    ("cls/squad/output_weights", "qa_outputs/weight"),
    ("cls/squad/output_bias", "qa_outputs/bias"),
    ("layer_(?=[0-9])", "layer/"),
    ("_embeddings$", "_embeddings/weight"),
    ("/kernel$", "/weight"),
)
_LAYER_NORM = ((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))


def from_tensorflow_names(arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
    """BERT's parameters by Hugging Face's names, `bert/encoder/layer_0/output/dense/kernel` and the like renamed.

    TensorFlow's kernels are [inputs, outputs] and come out transposed; those of the optimiser and of pretraining are
    left out, and so is position_ids, which is no parameter. Names that are Hugging Face's already stay.
    """
    renamed = {}
    for name, array in arrays.items():
        theirs = name.removesuffix(":0")
        if _TRAINING.search(theirs) or theirs.endswith("embeddings.position_ids"):
            continue
        ours = theirs
        if "/" in theirs or theirs == "global_step":
            for pattern, replacement in _TENSORFLOW:
                ours = re.sub(pattern, replacement, ours)
            ours = ours.replace("/", ".")
        for pattern, replacement in _LAYER_NORM:
            ours = re.sub(pattern, replacement, ours)
        renamed[ours] = array.T if theirs.endswith("/kernel") else array
    return renamed


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of Hugging Face's BertForQuestionAnswering without its unused pooler."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    found: dict[str, tuple[int, ...]] = {}

    def add(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    for table, rows in (("word", "vocab_size"), ("position", "max_position_embeddings"), ("token_type", "type_vocab_size")):  # fmt: skip
        found[f"bert.embeddings.{table}_embeddings.weight"] = (config[rows], width)
    add("bert.embeddings.LayerNorm", width)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"bert.encoder.layer.{layer}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            add(f"{prefix}.attention.{part}", width, width)
        add(f"{prefix}.attention.output.LayerNorm", width)
        add(f"{prefix}.intermediate.dense", inner, width)
        add(f"{prefix}.output.dense", width, inner)
        add(f"{prefix}.output.LayerNorm", width)
    add("qa_outputs", 2, width)
    return found


def check(found: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError naming the first parameter that `config` needs and `path` lacks or has in another shape."""
    for name, shape in shapes(config).items():
        if name not in found:
            raise ValueError(f"{path}: no {name}, not a BERT checkpoint for question answering: fetch it again")
        if found[name] != shape:
            raise ValueError(
                f"{path}: {name} is {list(found[name])}, the configuration says {list(shape)}:"
                " put the checkpoint's own config.json and vocab.txt beside it"
            )


def find(folder: Path) -> tuple[list[Path], bool]:
    """The files of the checkpoint in `folder`, and whether only `to_safetensors` makes them fit; none where none is.

    Safetensors with Hugging Face's names come before anything else. Raises ValueError for an index of shards that
    cannot be read, a missing shard, and a safetensors file that is not whole.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not an index of shards, fetch it again: {error}") from error
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"{folder / missing[0]} is missing, which {INDEX} names: fetch it again")
        return [folder / name for name in names], False
    for name in (SAFETENSORS, *PICKLES, ARRAYS):
        path = folder / name
        if path.is_file():
            return [path], name != SAFETENSORS or any(_is_foreign(tensor) for tensor in headers([path]))
    return [], False


def _is_foreign(name: str) -> bool:
    return "/" in name or name.endswith((".gamma", ".beta"))


def headers(paths: Iterable[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name to type (`F32`) and shape of every tensor in safetensors files, whose data is not read.

    Raises ValueError for a file that is cut off or none.
    """
    found = {}
    for path in paths:
        with _opened(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                part = tensors.get_slice(name)
                found[name] = (str(part.get_dtype()), tuple(part.get_shape()))
    return found


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file, fetch it again: {error}") from error


def read(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Arrays by name from a torch pickle, an .npz or a safetensors file.

    Raises ValueError for a file that is cut off or holds anything else, and for a pickle where torch is not installed.
    """
    if path.suffix == ".safetensors":
        with _opened(path) as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a whole .npz of arrays, fetch it again: {error}") from error
    return dict(_read_pickle(path))


def _read_pickle(path: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a pickle that only torch reads: install torch, or bring {SAFETENSORS} in its place"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a whole state dict of weights alone, fetch it again: {cause}") from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path}: not a state dict, name to tensor")
    for name, tensor in state.items():
        # numpy knows no bfloat16; float32 holds each of its values.
        yield str(name), (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_safetensors(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Write the checkpoint `source` to the file `target` under Hugging Face's names, by rename.

    Raises ValueError as `read` and `check` do.
    """
    from safetensors.numpy import save_file

    arrays = from_tensorflow_names(read(source))
    check({name: array.shape for name, array in arrays.items()}, config, source)
    partial = target.with_name(f"{target.name}.partial")
    save_file({name: np.ascontiguousarray(arrays[name]) for name in shapes(config)}, partial)
    partial.replace(target)
