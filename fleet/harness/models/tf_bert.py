"""BERT in TensorFlow: from weights, a frozen graph or a SavedModel, for any number of rows and tokens."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fleet.harness import convert
from fleet.harness.interfaces import NO_WEIGHTS
from fleet.harness.models.tf_layers import MASKED, Array, Parameters, attention, first_line, linear, norm

# Otherwise a page of messages on what this build could do for this CPU, before the first line of ours.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

FROZEN, SAVED = "model.pb", "saved_model"
"""Where a graph is looked for when there are no weights: the file, the folder."""
INPUTS = {
    "input_ids": ("input_ids",),
    "mask": ("input_mask", "attention_mask"),
    "types": ("segment_ids", "token_type_ids"),
}
"""A graph's inputs by the names of Google's BERT, and by Hugging Face's."""


class Bert:
    """BertForQuestionAnswering (transformers' modeling_bert.py) as one graph."""

    length: int | None = None
    rows: int | None = None
    told: Mapping[str, str]

    def __init__(self, config: Mapping[str, Any], folder: Path | None) -> None:
        """From the weights in `folder`, or random ones; raises ValueError for weights of another model."""
        if config.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"config.json: hidden_act {config['hidden_act']!r}, this backend computes gelu")
        self.told = {"weight_data_types": "fp32"} | ({} if folder else NO_WEIGHTS)
        deviation = float(config.get("initializer_range", 0.02))
        weights = Parameters(convert.shapes(config), folder, "BertForQuestionAnswering", deviation)
        self._heads, self._epsilon = int(config["num_attention_heads"]), float(config["layer_norm_eps"])
        self._width = int(config["hidden_size"])
        tables = ("word", "position", "token_type")
        self._tables = [weights.get(f"bert.embeddings.{table}_embeddings.weight") for table in tables]
        self._embedded = weights.norm("bert.embeddings.LayerNorm")
        self._layers = []
        for number in range(int(config["num_hidden_layers"])):
            name = f"bert.encoder.layer.{number}"
            self._layers.append(
                (
                    weights.linear(*(f"{name}.attention.self.{part}" for part in ("query", "key", "value"))),
                    weights.linear(f"{name}.attention.output.dense"),
                    weights.norm(f"{name}.attention.output.LayerNorm"),
                    weights.linear(f"{name}.intermediate.dense"),
                    weights.linear(f"{name}.output.dense"),
                    weights.norm(f"{name}.output.LayerNorm"),
                )
            )
        self._head = weights.linear("qa_outputs")
        given = tf.TensorSpec([None, None], tf.int32)
        self._function = tf.function(self._compute, input_signature=[given, given, given])

    def _compute(self, ids: Any, mask: Any, types: Any) -> Any:
        rows, length = tf.unstack(tf.shape(ids))
        words, positions, kinds = self._tables
        hidden = tf.gather(words, ids) + positions[:length] + tf.gather(kinds, types)
        # Of rank 2 from here on: matmul with its bias and GELU is one kernel then.
        hidden = norm(tf.reshape(hidden, [-1, self._width]), *self._embedded, self._epsilon)
        hiding = (1.0 - tf.cast(mask, tf.float32))[:, None, None] * MASKED
        split = [rows, length, 3, self._heads, self._width // self._heads]
        for projections, attended, first_norm, intermediate, output, second_norm in self._layers:
            parts = tf.transpose(tf.reshape(linear(hidden, *projections), split), [2, 0, 3, 1, 4])
            context = tf.transpose(attention(parts[0], parts[1], parts[2], hiding), [0, 2, 1, 3])
            context = tf.reshape(context, [-1, self._width])
            hidden = norm(hidden + linear(context, *attended), *first_norm, self._epsilon)
            inner = tf.nn.gelu(linear(hidden, *intermediate))
            hidden = norm(hidden + linear(inner, *output), *second_norm, self._epsilon)
        return tf.reshape(linear(hidden, *self._head), [rows, length, 2])

    def __call__(self, ids: Array, mask: Array, types: Array) -> Array:
        """Logits float32 [rows, length, 2] of int32 [rows, length]."""
        found: Array = self._function(ids, mask, types).numpy()
        return found


class Given:
    """Somebody else's graph of BERT: logits [rows, length, 2], or start_logits and end_logits [rows, length]."""

    def __init__(self, path: Path, function: Callable[..., Any], inputs: Mapping[str, Any], length: int | None) -> None:
        """`inputs` has what of each of the graph's inputs the name, shape and dtype are asked for.

        Raises ValueError when these are not BERT's.
        """
        self._path, self._function, self._inputs = path, function, {}
        for role, names in INPUTS.items():
            found = [name for name in names if name in inputs]
            if not found:
                raise ValueError(f"{path}: no input {' or '.join(names)}; it has {', '.join(sorted(inputs)) or 'none'}")
            self._inputs[role] = (found[0], inputs[found[0]].dtype)
        if more := sorted(set(inputs) - {name for name, _ in self._inputs.values()}):
            raise ValueError(f"{path}: input {more[0]}, which a BERT for question answering does not have")
        shape = inputs["input_ids"].shape
        self.rows: int | None
        self.rows, fixed = (None, None) if shape.rank is None else shape.as_list()
        if length is not None and fixed not in {None, length}:
            raise ValueError(f"length {length}: {path} takes {fixed} tokens")
        self.length: int | None = fixed or length
        self.told = {
            "weight_data_types": "fp32",
            "starting_weights_filename": path.name,
            "weights_sha256": _sha256(path),
        }

    def __call__(self, ids: Array, mask: Array, types: Array) -> Array:
        """Logits float32 [rows, length, 2] of int32 [rows, length]. Raises ValueError for another shape."""
        values = {"input_ids": ids, "mask": mask, "types": types}
        found = self._function(
            **{name: tf.constant(values[role], dtype) for role, (name, dtype) in self._inputs.items()}
        )
        if "logits" in found:
            logits: Array = found["logits"].numpy()
        else:
            logits = np.stack([found[name].numpy() for name in ("start_logits", "end_logits")], axis=-1)
        if logits.shape != (*ids.shape, 2):
            raise ValueError(
                f"{self._path}: logits {list(logits.shape)} for inputs {list(ids.shape)}: not BERT for SQuAD"
            )
        return logits.astype(np.float32, copy=False)


def _checked_outputs(path: Path, names: set[str]) -> list[str]:
    for wanted in (["logits"], ["start_logits", "end_logits"]):
        if names.issuperset(wanted):
            return wanted
    raise ValueError(f"{path}: no output logits, nor start_logits and end_logits; it has {', '.join(sorted(names))}")


def _sha256(path: Path) -> str:
    """Of a file; of a folder, of all its files in the order of their names."""
    digest = hashlib.sha256()
    for part in [path] if path.is_file() else sorted(part for part in path.rglob("*") if part.is_file()):
        with part.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest() if path.is_dir() else b"")
            if path.is_file():
                return hashlib.file_digest(stream, "sha256").hexdigest()
    return digest.hexdigest()


def frozen(path: Path, length: int | None) -> Given:
    """A GraphDef of TensorFlow 1, its weights in it. Raises ValueError when it is none, or not BERT's."""
    definition = tf.compat.v1.GraphDef()
    try:
        definition.ParseFromString(path.read_bytes())
        wrapped = tf.compat.v1.wrap_function(lambda: tf.compat.v1.import_graph_def(definition, name=""), [])
    except Exception as error:  # protobuf's DecodeError, and whatever importing nonsense raises
        raise ValueError(f"{path}: truncated or no frozen graph, fetch it again: {first_line(error)}") from error
    operations = {operation.name: operation for operation in wrapped.graph.get_operations()}
    inputs = {
        name: operation.outputs[0]
        for name, operation in operations.items()
        if operation.type in {"Placeholder", "PlaceholderWithDefault"}
    }
    ends = {name for name, operation in operations.items() if len(operation.outputs) == 1}
    ends &= {"logits", "start_logits", "end_logits"} | {
        name for name in ends if not operations[name].outputs[0].consumers()
    }
    outputs = {name: operations[name].outputs[0] for name in _checked_outputs(path, ends)}
    pruned = wrapped.prune(list(inputs.values()), outputs)

    def call(**values: Any) -> Any:
        return pruned(*(values[name] for name in inputs))

    return Given(path, call, inputs, length)


def saved(path: Path, length: int | None) -> Given:
    """A SavedModel's serving signature. Raises ValueError when it is none, or not BERT's."""
    try:
        loaded = tf.saved_model.load(str(path))
    except (OSError, ValueError, KeyError, tf.errors.OpError) as error:
        raise ValueError(f"{path}: truncated or no SavedModel, fetch it again: {first_line(error)}") from error
    name = "serving_default"
    if name not in loaded.signatures:
        raise ValueError(f"{path}: no signature {name}; it has {', '.join(loaded.signatures) or 'none'}")
    signature = loaded.signatures[name]
    _checked_outputs(path, set(signature.structured_outputs))

    def call(**values: Any) -> Any:
        _ = loaded  # its variables live as long as it does
        return signature(**values)

    return Given(path, call, signature.structured_input_signature[1], length)
