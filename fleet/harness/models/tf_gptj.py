"""GPT-J in TensorFlow, with the cache handed in and out."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fleet.harness.models.tf_layers import MASKED, Array, Parameters, attention, linear, norm

# Otherwise a page of messages on what this build could do for this CPU, before the first line of ours.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf


def gptj_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of Hugging Face's GPTJForCausalLM."""
    width, words = int(config["n_embd"]), int(config["vocab_size"])
    inner = int(config.get("n_inner") or 4 * width)
    found: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (words, width)}

    def add(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    for number in range(int(config["n_layer"])):
        name = f"transformer.h.{number}"
        add(f"{name}.ln_1", width)
        for part in ("q", "k", "v", "out"):
            found[f"{name}.attn.{part}_proj.weight"] = (width, width)
        add(f"{name}.mlp.fc_in", inner, width)
        add(f"{name}.mlp.fc_out", width, inner)
    add("transformer.ln_f", width)
    add("lm_head", words, width)
    return found


class GptJ:
    """GPTJForCausalLM (transformers' modeling_gptj.py) as one graph: a decoding.Step.

    The cache is keys and values of each layer, [rows, heads, total, size], on the device.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path | None) -> None:
        """From the weights in `folder`, or random ones; raises ValueError for weights of another model."""
        if config.get("activation_function", "gelu_new") != "gelu_new":
            found = config["activation_function"]
            raise ValueError(f"config.json: activation_function {found!r}, this backend computes gelu_new")
        deviation = float(config.get("initializer_range", 0.02))
        weights = Parameters(gptj_shapes(config), folder, "GPTJForCausalLM", deviation)
        self._width, self._heads = int(config["n_embd"]), int(config["n_head"])
        self._size, self._epsilon = self._width // self._heads, float(config["layer_norm_epsilon"])
        self._embedding = weights.get("transformer.wte.weight")
        self._layers = []
        for number in range(int(config["n_layer"])):
            name = f"transformer.h.{number}"
            self._layers.append(
                (
                    weights.norm(f"{name}.ln_1"),
                    weights.joined(*(f"{name}.attn.{part}_proj.weight" for part in "qkv")),
                    weights.joined(f"{name}.attn.out_proj.weight"),
                    weights.linear(f"{name}.mlp.fc_in"),
                    weights.linear(f"{name}.mlp.fc_out"),
                )
            )
        self._norm, self._head = weights.norm("transformer.ln_f"), weights.linear("lm_head")
        self._rotary = int(config.get("rotary_dim") or self._size)
        # Su et al. 2021, RoFormer: pairs of neighbours are turned by angles that grow with the position.
        speeds = 10_000.0 ** -(np.arange(0, self._rotary, 2) / self._rotary)
        angles = np.outer(np.arange(int(config["n_positions"])), speeds)
        self._sine, self._cosine = (tf.constant(turn(angles), tf.float32) for turn in (np.sin, np.cos))
        given = tf.TensorSpec([None, None], tf.int64)
        cached = tf.TensorSpec([None, self._heads, None, self._size], tf.float32)
        self._function = tf.function(
            self._compute, input_signature=[given, given, given, [cached] * (2 * len(self._layers))]
        )
        self._reorder = tf.function(
            lambda cache, rows: [tf.gather(part, rows) for part in cache],
            input_signature=[[cached] * (2 * len(self._layers)), tf.TensorSpec([None], tf.int64)],
        )

    def _turned(self, states: Any, sine: Any, cosine: Any) -> Any:
        """The first `rotary_dim` of the last axis of [rows, new, heads, size] turned in pairs of neighbours."""
        even, odd = states[..., 0 : self._rotary : 2], states[..., 1 : self._rotary : 2]
        pairs = tf.stack([even * cosine - odd * sine, odd * cosine + even * sine], axis=-1)
        turned = tf.reshape(pairs, tf.concat([tf.shape(even)[:-1], [self._rotary]], axis=0))
        return tf.concat([turned, states[..., self._rotary :]], axis=-1)

    def _compute(self, tokens: Any, attention_mask: Any, position_ids: Any, cache: Sequence[Any]) -> Any:
        (rows, new), total = tf.unstack(tf.shape(tokens)), tf.shape(attention_mask)[1]
        sees = tf.range(total)[None] <= tf.range(total - new, total)[:, None]
        sees = sees[None, None] & tf.cast(attention_mask, tf.bool)[:, None, None]
        mask = tf.where(sees, 0.0, MASKED)
        sine, cosine = (tf.gather(table, position_ids)[:, :, None] for table in (self._sine, self._cosine))
        split = [rows, new, 3, self._heads, self._size]
        hidden = tf.reshape(tf.gather(self._embedding, tokens), [-1, self._width])
        kept = []
        for number, (before, projections, attended, entry, output) in enumerate(self._layers):
            normed = norm(hidden, *before, self._epsilon)
            query, key, value = tf.unstack(tf.reshape(tf.matmul(normed, projections), split), axis=2)
            query, key = self._turned(query, sine, cosine), self._turned(key, sine, cosine)
            query, key, value = (tf.transpose(part, [0, 2, 1, 3]) for part in (query, key, value))
            key = tf.concat([cache[2 * number], key], axis=2)
            value = tf.concat([cache[2 * number + 1], value], axis=2)
            kept += [key, value]
            context = tf.transpose(attention(query, key, value, mask), [0, 2, 1, 3])
            # GPT-J feeds attention and MLP the same normalised input.
            inner = tf.nn.gelu(linear(normed, *entry), approximate=True)
            hidden += tf.matmul(tf.reshape(context, [-1, self._width]), attended) + linear(inner, *output)
        last = tf.reshape(hidden, [rows, new, self._width])[:, -1]
        return linear(norm(last, *self._norm, self._epsilon), *self._head), kept

    def __call__(
        self, tokens: Array, attention_mask: Array, position_ids: Array, cache: Any | None, reorder: Array | None
    ) -> tuple[npt.NDArray[np.float32], Any]:
        """See decoding.Step."""
        if cache is None:
            empty = tf.zeros([len(tokens), self._heads, 0, self._size])
            cache = [empty] * (2 * len(self._layers))
        elif reorder is not None:
            cache = self._reorder(cache, reorder)
        logits, cache = self._function(tokens, attention_mask, position_ids, cache)
        return logits.numpy(), cache
