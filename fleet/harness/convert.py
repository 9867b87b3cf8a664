"""Checkpoints as they are published, to safetensors: BERT's under Hugging Face's names, GPT-J's from torch's shards."""

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

_SHARD = re.compile(r"pytorch_model-(\d{5})-of-(\d{5})(?:-\d+)?\.bin")
"""MLCommons' archive of GPT-J adds a number of its own, `pytorch_model-00001-of-00003-003.bin` (mlcommons/inference,
pull request 1427)."""

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
    state = _load(path)
    import torch  # which is there, or nothing was read

    for name, tensor in state.items():
        # numpy knows no bfloat16; float32 holds each of its values.
        yield name, (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _load(path: Path) -> dict[str, Any]:
    """A state dict, name to torch's tensor; one that torch wrote since 1.6 stays in the file until it is used."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a pickle that only torch reads: install torch, or bring {SAFETENSORS} in its place"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a whole state dict of weights alone, fetch it again: {cause}") from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path}: not a state dict, name to tensor")
    return {str(name): tensor for name, tensor in state.items()}


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


def find_shards(folder: Path) -> list[Path]:
    """The shards of the state dict that torch wrote into `folder`, in order, or its only file; none where none is.

    Raises ValueError for a set that is not whole.
    """
    found: dict[int, Path] = {}
    total = 0
    for path in sorted(folder.iterdir()):
        if not (match := _SHARD.fullmatch(path.name)):
            continue
        number, of = int(match[1]), int(match[2])
        if number in found or of != (total or of) or not 1 <= number <= of:
            raise ValueError(
                f"{path}: beside {next(iter(found.values())).name if found else 'nothing'}: no one set of shards"
            )
        found[number], total = path, of
    if missing := [number for number in range(1, total + 1) if number not in found]:
        raise ValueError(f"{folder}: shard {missing[0]} of {total} is missing: fetch it again")
    whole = folder / "pytorch_model.bin"
    return [found[number] for number in sorted(found)] or ([whole] if whole.is_file() else [])


def link(source: Path, folder: Path, leave_out: set[str]) -> None:
    """Links in `folder` to the files of its sibling `source`, and no other links."""
    wanted = {path.name for path in source.iterdir() if path.is_file()} - leave_out
    for path in folder.iterdir():
        if path.is_symlink() and path.name not in wanted:
            path.unlink()
    for name in wanted:
        made, target = folder / name, Path("..") / source.name / name
        if not made.is_symlink() or made.readlink() != target:
            partial = folder / f"{name}.partial"
            partial.unlink(missing_ok=True)
            partial.symlink_to(target)
            partial.replace(made)


def shards_to_safetensors(shards: Sequence[Path], folder: Path, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Write the parameters `wanted`, name to shape, from torch's shards to safetensors in `folder`.

    A file for each shard and then the index, all by rename, with one shard open at a time and its data left on disk
    until it is copied. Nothing is done where the index says that it was made of the same files; without shards, what
    was made before is taken away. Raises ValueError, naming shard and parameter, for what is missing, doubled or of
    another shape.
    """
    index = folder / INDEX
    made_of = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in shards}
    if shards and _made_of(index) == made_of:
        return
    for path in folder.iterdir():
        if not path.is_symlink() and (path == index or path.suffix == ".safetensors"):
            path.unlink()
    if not shards:
        return
    weight_map = _weight_map(shards, wanted)
    written = {path.name: f"model-{number:05}-of-{len(shards):05}.safetensors" for number, path in enumerate(shards, 1)}
    size = sum(_write_shard(path, folder / written[path.name], weight_map) for path in shards)
    listing = {
        "metadata": {"total_size": size, "made_of": made_of},
        "weight_map": {name: written[shard] for name, shard in weight_map.items()},
    }
    partial = index.with_name(f"{index.name}.partial")
    partial.write_text(json.dumps(listing, indent=1), encoding="utf-8")
    partial.replace(index)


def _weight_map(shards: Sequence[Path], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Name of each parameter to its shard's; the masks that transformers wrote beside them are left out."""
    found: dict[str, str] = {}
    for path in shards:
        for name, tensor in _load(path).items():
            if name not in wanted:
                continue
            if name in found:
                raise ValueError(f"{path}: {name} is in {found[name]} too: no one set of shards")
            if tuple(tensor.shape) != wanted[name]:
                raise ValueError(f"{path}: {name} is {list(tensor.shape)}, config.json says {list(wanted[name])}")
            found[name] = path.name
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"{shards[0].parent}: the shards have no {missing[0]}: not this model's, or not whole")
    return found


def _made_of(index: Path) -> Any:
    """From what the files that `index` names were made; None where they are not all there."""
    try:
        known = json.loads(index.read_text(encoding="utf-8"))
        there = all((index.parent / name).is_file() for name in set(known["weight_map"].values()))
        return known["metadata"]["made_of"] if there else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _write_shard(shard: Path, target: Path, weight_map: Mapping[str, str]) -> int:
    """Write the tensors that `weight_map` gives to `shard`; their bytes."""
    from safetensors.torch import save_file

    tensors = {
        # A part of something larger would be written whole, or refused.
        name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in _load(shard).items()
        if weight_map.get(name) == shard.name
    }
    partial = target.with_name(f"{target.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    partial.replace(target)
    return sum(tensor.nbytes for tensor in tensors.values())
