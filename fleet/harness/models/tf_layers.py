"""What TensorFlow's models share: parameters of a Hugging Face folder or drawn, and the usual layers."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from fleet.harness import convert

# Otherwise a page of messages on what this build could do for this CPU, before the first line of ours.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

SEED = 20_260_401
"""Of random weights."""
MASKED = -1e9

Shapes = Mapping[str, tuple[int, ...]]
Array = npt.NDArray[Any]


class Parameters:
    """Parameters by Hugging Face's names, from a folder's safetensors or drawn at random; float32 on the device."""

    def __init__(self, shapes: Shapes, folder: Path | None, kind: str, deviation: float) -> None:
        """Random where `folder` is None. Raises ValueError naming the first parameter that is missing or misshapen."""
        self._shapes, self._deviation = shapes, deviation
        self._random = np.random.default_rng(SEED)
        self._where: dict[str, Path] | None = None
        if folder is None:
            return
        files, foreign = convert.find(folder)
        if not files or foreign:
            raise ValueError(f"{folder}: no model.safetensors with Hugging Face's names, run `fleet provision`")
        self._where = {}
        for path in files:
            for name, (dtype, shape) in convert.headers([path]).items():
                self._where[name] = path
                if shape != shapes.get(name, shape):
                    raise ValueError(f"{path}: {name} is {list(shape)}, config.json says {list(shapes[name])}")
                if name in shapes and dtype not in {"F16", "F32", "F64"}:
                    raise ValueError(f"{path}: {name} is {dtype}, the tensorflow backend reads F16, F32 and F64")
        for name in shapes:
            if name not in self._where:
                raise ValueError(f"{folder}: the weights have no {name}: not a {kind} checkpoint")

    def _array(self, name: str) -> Array:
        if self._where is not None:
            with safe_open(self._where[name], framework="numpy") as tensors:
                found: Array = tensors.get_tensor(name)
                return found.astype(np.float32, copy=False)
        shape = self._shapes[name]
        if len(shape) > 1:
            return self._random.standard_normal(shape, dtype=np.float32) * np.float32(self._deviation)
        is_scale = name.endswith(".weight")  # of a norm: what else has one dimension is a bias
        return np.full(shape, float(is_scale), dtype=np.float32)

    def get(self, name: str) -> Any:
        """As it is stored."""
        return tf.constant(self._array(name))

    def joined(self, *names: str) -> Any:
        """Weights [out, in] of layers with one input, side by side as a kernel [in, outs]; biases joined."""
        return tf.constant(np.concatenate([self._array(name).T for name in names], axis=-1))

    def norm(self, name: str) -> tuple[Any, Any]:
        """Scale and shift."""
        return self.get(f"{name}.weight"), self.get(f"{name}.bias")

    def linear(self, *names: str) -> tuple[Any, Any]:
        """Kernel [in, outs] and bias of layers with one input."""
        return self.joined(*(f"{name}.weight" for name in names)), self.joined(*(f"{name}.bias" for name in names))


def linear(hidden: Any, kernel: Any, bias: Any) -> Any:
    """[rows, in] to [rows, out]."""
    return tf.nn.bias_add(tf.matmul(hidden, kernel), bias)


def norm(hidden: Any, scale: Any, shift: Any, epsilon: float) -> Any:
    """Layer norm over the last axis."""
    centred = hidden - tf.reduce_mean(hidden, axis=-1, keepdims=True)
    variance = tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True)
    return centred * tf.math.rsqrt(variance + epsilon) * scale + shift


def attention(query: Any, key: Any, value: Any, mask: Any) -> Any:
    """Contexts [rows, heads, new, size]; `mask` is added to the scores [rows, heads, new, total]."""
    scores = tf.matmul(query * query.shape[-1] ** -0.5, key, transpose_b=True) + mask
    return tf.matmul(tf.nn.softmax(scores), value)


def first_line(error: BaseException) -> str:
    """What an error says, or its kind: TensorFlow's go on for pages."""
    return (str(error) or type(error).__name__).splitlines()[0]
