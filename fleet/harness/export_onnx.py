"""BERT and GPT-J from Hugging Face weights to ONNX, without torch: the graph is written node by node.

Only operators of the ONNX standard, so that TensorRT reads the file too; fusing them is the engine's business. Weights
lie beside the graph as external data and are written one at a time, so that a model may be larger than memory and
than the 2 GB of a protobuf.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from safetensors import safe_open

from fleet.harness import convert

VERSION = 1
"""Counts up when `export` writes another graph from the same weights."""
OPSET, IR_VERSION = 20, 9
"""20 is the first with Gelu; both old enough for ONNX Runtime 1.17 and TensorRT 10."""
SEED = 20_260_401
"""Of random weights."""
MASKED = -1e9
DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
"""numpy knows bfloat16 by this name because onnx brings ml_dtypes."""
GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
ALIGNMENT = 4096
"""Bytes: ONNX Runtime maps external data page by page."""

Array = npt.NDArray[Any]
Config = Mapping[str, Any]


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter; ValueError for a model that is neither BERT nor GPT-J."""
    kind = config.get("model_type", "bert")
    if kind == "bert":
        return convert.shapes(config)
    if kind != "gptj":
        raise ValueError(f"no ONNX export of {kind}, only of bert and gptj: take the pytorch or openai backend")
    width = config["n_embd"]
    inner = config.get("n_inner") or 4 * width
    found: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (config["vocab_size"], width)}
    for layer in range(config["n_layer"]):
        name = f"transformer.h.{layer}"
        found |= {f"{name}.ln_1.weight": (width,), f"{name}.ln_1.bias": (width,)}
        found |= {f"{name}.attn.{part}_proj.weight": (width, width) for part in ("q", "k", "v", "out")}
        found |= {f"{name}.mlp.fc_in.weight": (inner, width), f"{name}.mlp.fc_in.bias": (inner,)}
        found |= {f"{name}.mlp.fc_out.weight": (width, inner), f"{name}.mlp.fc_out.bias": (width,)}
    found |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
    return found | {"lm_head.weight": (config["vocab_size"], width), "lm_head.bias": (config["vocab_size"],)}


class _Parameters:
    """Parameters by Hugging Face's names, read one at a time from a folder, or drawn at random without one."""

    def __init__(self, config: Config, folder: Path | None) -> None:
        """Raises ValueError naming a file that is missing or cut off, or the first parameter missing or misshapen."""
        self._shapes = shapes(config)
        self._deviation = np.float32(config.get("initializer_range", 0.02))
        self._random = np.random.default_rng(SEED)
        self._where: dict[str, Path] | None = None
        if folder is None:
            return
        self._where = {}
        for path in files_of(folder):
            for name, (dtype, shape) in convert.headers([path]).items():
                self._where[name] = path
                if shape != self._shapes.get(name, shape):
                    raise ValueError(f"{path}: {name} is {list(shape)}, config.json says {list(self._shapes[name])}")
                if name in self._shapes and dtype not in {"F16", "F32", "F64"}:
                    raise ValueError(f"{path}: {name} is {dtype}, the ONNX export reads F16, F32 and F64")
        if missing := [name for name in self._shapes if name not in self._where]:
            kind = config.get("model_type", "bert")
            raise ValueError(f"{folder}: the weights have no {missing[0]}: not a whole {kind} checkpoint")

    def __getitem__(self, name: str) -> Array:
        """In float32."""
        if self._where is not None:
            with safe_open(self._where[name], framework="numpy") as tensors:
                found: Array = tensors.get_tensor(name)
                return found.astype(np.float32, copy=False)
        shape = self._shapes[name]
        if len(shape) > 1:
            return self._random.standard_normal(shape, dtype=np.float32) * self._deviation
        is_scale = name.endswith(".weight")  # of a norm: what else has one dimension is a bias
        return np.full(shape, float(is_scale), dtype=np.float32)

    def kernel(self, *names: str) -> Array:
        """Weights [out, in] of layers with one input, side by side as [in, outs]."""
        return np.concatenate([self[f"{name}.weight"].T for name in names], axis=1)

    def bias(self, *names: str) -> Array:
        """Their biases, joined."""
        return np.concatenate([self[f"{name}.bias"] for name in names])


def files_of(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder; ValueError where there are none under its names."""
    files, foreign = convert.find(folder)
    if not files or foreign:
        raise ValueError(f"{folder}: no model.safetensors with Hugging Face's names, run `fleet provision`")
    return files


class _Graph:
    """Nodes and weights of a model that is being written."""

    def __init__(self, dtype: str, data: BinaryIO) -> None:
        self._dtype, self._data = dtype, data
        self._nodes: list[Any] = []
        self._tensors: list[Any] = []
        self._known: dict[tuple[Any, ...], str] = {}

    def weight(self, name: str, array: Array) -> str:
        """A parameter, in the model's precision, written to the external data."""
        array = np.ascontiguousarray(array, dtype=np.dtype(self._dtype).newbyteorder("<"))
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        tensor = TensorProto(name=name, data_type=DTYPES[self._dtype], dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        where = {"location": WEIGHTS, "offset": self._data.tell(), "length": array.nbytes}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        array.tofile(self._data)
        self._tensors.append(tensor)
        return name

    def ints(self, *values: int) -> str:
        """A constant int64 [count]."""
        return self._constant(np.array(values, dtype=np.int64))

    def number(self, value: float, dtype: str | None = None) -> str:
        """A constant without dimensions, in the model's precision unless told."""
        return self._constant(np.array(value, dtype=dtype or self._dtype))

    def _constant(self, array: Array) -> str:
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = name = f"constant_{len(self._known)}"
            self._tensors.append(onnx.numpy_helper.from_array(array, name))
        return self._known[key]

    def op(self, kind: str, *inputs: str, outputs: int | None = None, to: str = "", **attributes: Any) -> Any:
        """A node; its output's name, or all their names where `outputs` says how many."""
        base = to or f"{kind}_{len(self._nodes)}"
        names = [base] if outputs is None else [f"{base}_{number}" for number in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, name=base, **attributes))
        return base if outputs is None else names

    def cast(self, value: str, dtype: str, to: str = "") -> str:
        """`value` as `dtype`."""
        kinds = {**DTYPES, "int64": TensorProto.INT64}
        name = to or f"Cast_{len(self._nodes)}"
        # Not by `op`, whose `to` is the name.
        self._nodes.append(helper.make_node("Cast", [value], [name], name=name, to=kinds[dtype]))
        return name

    def linear(self, hidden: str, name: str, kernel: Array, bias: Array | None) -> str:
        """`hidden` [..., in] times a kernel [in, out], and a bias [out]."""
        made: str = self.op("MatMul", hidden, self.weight(f"{name}.weight", kernel))
        return made if bias is None else str(self.op("Add", made, self.weight(f"{name}.bias", bias)))

    def norm(self, hidden: str, name: str, parameters: _Parameters, epsilon: float) -> str:
        """LayerNorm over the last dimension."""
        scale, shift = (self.weight(f"{name}.{part}", parameters[f"{name}.{part}"]) for part in ("weight", "bias"))
        made: str = self.op("LayerNormalization", hidden, scale, shift, axis=-1, epsilon=epsilon)
        return made

    def attend(self, query: str, key: str, value: str, hiding: str, size: int) -> str:
        """Contexts [rows, heads, new, size] of query, key [rows, heads, size, total] and value; softmax in float32."""
        scores = self.op("MatMul", self.op("Mul", query, self.number(size**-0.5)), key)
        if self._dtype != "float32":
            scores = self.cast(scores, "float32")
        scores = self.op("Softmax", self.op("Add", scores, hiding), axis=-1)
        if self._dtype != "float32":
            scores = self.cast(scores, self._dtype)
        made: str = self.op("MatMul", scores, value)
        return made

    def hiding(self, attention_mask: str) -> str:
        """What is added to scores, float32 [rows, 1, 1, total]: MASKED where the mask int64 [rows, total] is 0."""
        absent = self.op("Sub", self.number(1.0, "float32"), self.cast(attention_mask, "float32"))
        absent = self.op("Mul", absent, self.number(MASKED, "float32"))
        made: str = self.op("Unsqueeze", absent, self.ints(1, 2))
        return made

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """The whole."""
        graph = helper.make_graph(self._nodes, "model", list(inputs), list(outputs), self._tensors)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="mlperf-fleet"
        )


def _ints(name: str, *dimensions: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.INT64, list(dimensions))


def _bert(graph: _Graph, config: Config, weights: _Parameters) -> Any:
    """BertForQuestionAnswering as transformers' modeling_bert.py computes it."""
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"config.json: hidden_act {config['hidden_act']!r}, the ONNX export writes gelu")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    size, epsilon = width // heads, config["layer_norm_eps"]

    def table(kind: str) -> str:
        name = f"bert.embeddings.{kind}_embeddings.weight"
        return graph.weight(name, weights[name])

    def linear(hidden: str, name: str) -> str:
        return graph.linear(hidden, name, weights.kernel(name), weights.bias(name))

    length = graph.op("Shape", "input_ids", start=1, end=2)
    positions = graph.op("Slice", table("position"), graph.ints(0), length, graph.ints(0))
    hidden = graph.op("Gather", table("word"), "input_ids")
    hidden = graph.op("Add", hidden, graph.op("Gather", table("token_type"), "token_type_ids"))
    hidden = graph.norm(graph.op("Add", hidden, positions), "bert.embeddings.LayerNorm", weights, epsilon)
    hiding = graph.hiding("attention_mask")
    for number in range(config["num_hidden_layers"]):
        name = f"bert.encoder.layer.{number}"
        parts = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
        # One product for the three: a CPU and a GPU are better filled by it.
        joined = graph.linear(hidden, f"{name}.attention.self", weights.kernel(*parts), weights.bias(*parts))
        query, key, value = graph.op("Split", joined, outputs=3, axis=-1, num_outputs=3)
        split = graph.ints(0, 0, heads, size)
        query, key, value = (
            graph.op("Transpose", graph.op("Reshape", part, split), perm=order)
            for part, order in ((query, [0, 2, 1, 3]), (key, [0, 2, 3, 1]), (value, [0, 2, 1, 3]))
        )
        context = graph.op("Transpose", graph.attend(query, key, value, hiding, size), perm=[0, 2, 1, 3])
        context = linear(graph.op("Reshape", context, graph.ints(0, 0, width)), f"{name}.attention.output.dense")
        hidden = graph.norm(graph.op("Add", context, hidden), f"{name}.attention.output.LayerNorm", weights, epsilon)
        inner = graph.op("Gelu", linear(hidden, f"{name}.intermediate.dense"))
        inner = linear(inner, f"{name}.output.dense")
        hidden = graph.norm(graph.op("Add", inner, hidden), f"{name}.output.LayerNorm", weights, epsilon)
    graph.cast(linear(hidden, "qa_outputs"), "float32", to="logits")
    given = [_ints(name, "batch", "length") for name in ("input_ids", "token_type_ids", "attention_mask")]
    return graph.model(given, [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", 2])])


def rotary(positions: int, size: int) -> tuple[Array, Array]:
    """Cosines and sines float32 [positions, size / 2] of GPT-J's angles: position times 10000^(-2i / size)."""
    frequencies = 10_000.0 ** (-np.arange(0, size, 2) / size)
    angles = np.arange(positions)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _halves_first(width: int, heads: int, rotated: int) -> npt.NDArray[np.int64]:
    """Where the rows of a query or key projection come from when pairs to rotate no longer alternate.

    GPT-J turns dimensions 0 and 1, 2 and 3 and so on of each head. With the even ones first and the odd ones after
    them the same is done on two slices, and as queries and keys are reordered alike, their products stay.
    """
    size = width // heads
    one = np.concatenate([np.arange(0, rotated, 2), np.arange(1, rotated, 2), np.arange(rotated, size)])
    found: npt.NDArray[np.int64] = (np.arange(heads)[:, None] * size + one).reshape(-1)
    return found


def _gptj(graph: _Graph, config: Config, weights: _Parameters, dtype: str) -> Any:
    """GPTJForCausalLM as transformers' modeling_gptj.py computes it, one step with cached keys and values."""
    if config.get("activation_function", "gelu_new") != "gelu_new":
        raise ValueError(f"config.json: activation {config['activation_function']!r}, the ONNX export writes gelu_new")
    width, heads, layers = config["n_embd"], config["n_head"], config["n_layer"]
    size, epsilon = width // heads, config.get("layer_norm_epsilon", 1e-5)
    rotated = config.get("rotary_dim") or size
    order = _halves_first(width, heads, rotated)
    # Of the new tokens: one angle for all heads, [rows, new, 1, rotated / 2].
    cosine, sine = (
        graph.op("Unsqueeze", graph.op("Gather", graph.weight(name, table), "position_ids"), graph.ints(2))
        for name, table in zip(("cosine", "sine"), rotary(config["n_positions"], rotated), strict=True)
    )

    def turned(part: str) -> str:
        sizes = [rotated // 2, rotated // 2] + ([size - rotated] if size > rotated else [])
        left, right, *rest = graph.op("Split", part, graph.ints(*sizes), outputs=len(sizes), axis=-1)
        first = graph.op("Sub", graph.op("Mul", left, cosine), graph.op("Mul", right, sine))
        second = graph.op("Add", graph.op("Mul", right, cosine), graph.op("Mul", left, sine))
        made: str = graph.op("Concat", first, second, *rest, axis=-1)
        return made

    def one(number: int, name: str) -> str:
        made: str = graph.op("Slice", graph.op("Shape", name), graph.ints(number), graph.ints(number + 1))
        return made

    def flat(number: str) -> str:
        made: str = graph.op("Squeeze", number)
        return made

    # A new token sees those up to its own place: [new, total].
    new, total = flat(one(1, "input_ids")), flat(one(1, "attention_mask"))
    nought, step = graph.number(0, "int64"), graph.number(1, "int64")
    own = graph.op("Add", graph.op("Range", nought, new, step), graph.op("Sub", total, new))
    later = graph.op("Greater", graph.op("Range", nought, total, step), graph.op("Unsqueeze", own, graph.ints(1)))
    later = graph.op("Mul", graph.cast(later, "float32"), graph.number(MASKED, "float32"))
    hiding = graph.op("Add", graph.hiding("attention_mask"), later)

    words = graph.weight("transformer.wte.weight", weights["transformer.wte.weight"])
    hidden = graph.op("Gather", words, "input_ids")
    for number in range(layers):
        name = f"transformer.h.{number}"
        normed = graph.norm(hidden, f"{name}.ln_1", weights, epsilon)
        kernel = weights.kernel(*(f"{name}.attn.{part}_proj" for part in ("q", "k", "v")))
        kernel = kernel[:, np.concatenate([order, width + order, 2 * width + np.arange(width)])]
        joined = graph.linear(normed, f"{name}.attn.qkv", kernel, None)
        parts = [
            graph.op("Reshape", part, graph.ints(0, 0, heads, size))
            for part in graph.op("Split", joined, outputs=3, axis=-1, num_outputs=3)
        ]
        query, key, value = (
            graph.op("Transpose", part, perm=[0, 2, 1, 3]) for part in (turned(parts[0]), turned(parts[1]), parts[2])
        )
        for kind, made in (("key", key), ("value", value)):
            past = graph.op("Gather", f"past_key_values.{number}.{kind}", "reorder", axis=0)
            graph.op("Concat", past, made, to=f"present.{number}.{kind}", axis=2)
        key = graph.op("Transpose", f"present.{number}.key", perm=[0, 1, 3, 2])
        context = graph.attend(query, key, f"present.{number}.value", hiding, size)
        context = graph.op("Transpose", context, perm=[0, 2, 1, 3])
        context = graph.op("Reshape", context, graph.ints(0, 0, width))
        attended = graph.linear(context, f"{name}.attn.out_proj", weights.kernel(f"{name}.attn.out_proj"), None)
        inner = f"{name}.mlp.fc_in"
        inner = graph.linear(normed, inner, weights.kernel(inner), weights.bias(inner))
        inner = graph.op("Gelu", inner, approximate="tanh")
        outer = f"{name}.mlp.fc_out"
        inner = graph.linear(inner, outer, weights.kernel(outer), weights.bias(outer))
        hidden = graph.op("Add", graph.op("Add", attended, inner), hidden)
    # The last token only: of a whole prompt the vocabulary's logits would be the largest array of all.
    last = graph.op("Slice", hidden, graph.ints(-1), graph.ints(np.iinfo(np.int64).max), graph.ints(1))
    last = graph.norm(last, "transformer.ln_f", weights, epsilon)
    graph.cast(
        graph.linear(last, "lm_head", weights.kernel("lm_head"), weights.bias("lm_head")), "float32", to="logits"
    )
    return graph.model(*_step_values(config, DTYPES[dtype]))


def _step_values(config: Config, element: int) -> tuple[list[Any], list[Any]]:
    """A step's inputs and outputs; the cache is of type `element`."""
    heads, size = config["n_head"], config["n_embd"] // config["n_head"]
    given = [_ints("input_ids", "rows", "new"), _ints("position_ids", "rows", "new")]
    given += [_ints("attention_mask", "rows", "total"), _ints("reorder", "rows")]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 1, config["vocab_size"]])]
    for number in range(config["n_layer"]):
        for kind in ("key", "value"):
            past, present = ["rows_before", heads, "past", size], ["rows", heads, "total", size]
            past_name = f"past_key_values.{number}.{kind}"
            given.append(helper.make_tensor_value_info(past_name, element, past))
            outputs.append(helper.make_tensor_value_info(f"present.{number}.{kind}", element, present))
    return given, outputs


def export(config: Config, folder: Path | None, target: Path, dtype: str = "float32") -> None:
    """Write model.onnx and its weights into the new folder `target`, from the weights in `folder` or random ones.

    BERT takes input_ids, token_type_ids and attention_mask, int64 [batch, length], and gives logits [batch, length, 2].
    GPT-J takes input_ids and position_ids [rows, new], attention_mask [rows, total], reorder [rows], which says which
    row of the cache each row continues, and past_key_values.N.key and .value [rows before, heads, past, size]; it gives
    the logits of the last token, [rows, 1, vocabulary], and the cache for the next step, present.N.key and .value. The
    keys' dimensions are in an order of their own, see _halves_first. Softmax and logits are float32 in any `dtype`.

    Raises ValueError for another model, and for weights that are missing, cut off or not the configuration's.
    """
    weights = _Parameters(config, folder)
    with (target / WEIGHTS).open("xb") as data:
        graph = _Graph(dtype, data)
        bert = config.get("model_type", "bert") == "bert"
        model = _bert(graph, config, weights) if bert else _gptj(graph, config, weights, dtype)
    (target / GRAPH).write_bytes(model.SerializeToString())


def cache_folder(given: str | None) -> Path:
    """Where models are kept: what option `cache` says, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given or f"{home}/mlperf-fleet").expanduser()


def key_of(config: Config, folder: Path | None, dtype: str) -> str:
    """What an export depends on, as a hex digest: exporter, configuration, precision and the weights' content.

    Raises ValueError when there are no weights in `folder`.
    """
    relevant = {name: value for name, value in config.items() if name != "transformers_version"}
    digest = hashlib.sha256(json.dumps([VERSION, dtype, relevant], sort_keys=True, default=str).encode())
    for part in _digests(folder):
        digest.update(part)
    return digest.hexdigest()


def _digests(folder: Path | None) -> Iterator[bytes]:
    if folder is None:
        yield f"random {SEED}".encode()
        return
    for path in files_of(folder):
        with path.open("rb") as stream:
            yield hashlib.file_digest(stream, "sha256").digest()


def exported(config: Config, folder: Path | None, cache: Path, dtype: str = "float32") -> Path:
    """The model.onnx of `export` in `cache`, made now unless it is there; raises ValueError as that does."""
    place = cache / "onnx" / key_of(config, folder, dtype)[:32]
    if not (place / GRAPH).is_file():
        partial = place.with_name(f"{place.name}.partial-{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            export(config, folder, partial, dtype)
            settle(partial, place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return place / GRAPH


def settle(partial: Path, place: Path) -> None:
    """Rename a finished folder to its place, unless another process was faster with the same content."""
    try:
        partial.rename(place)
    except OSError:
        if not (place / GRAPH).is_file():
            raise
