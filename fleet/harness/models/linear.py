"""Linear layers in each precision: plain, 8-bit integers on CPUs, 8-bit floats on GPUs. All take and give [rows, …]."""

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from fleet.harness.models import cublaslt

FLOAT8_MAX = 448.0
"""The largest float8_e4m3fn."""


class Linear(Protocol):
    """`x @ weight.T + bias`, followed by GELU where it was made so."""

    @property
    def factor(self) -> Tensor | None:
        """What rows must be multiplied with and turned into float8; None where they come as they are."""

    def __call__(self, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """[rows, in] to [rows, out], plus `added` [rows, out], whose memory may be the result's."""


Maker = Callable[[Tensor, Tensor, bool], Linear]
"""Weight [out, in], bias [out], whether GELU follows."""


class Plain:
    """In the precision of its weight."""

    factor = None

    def __init__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> None:
        self._weight, self._bias, self._gelu = weight, bias, gelu

    def __call__(self, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """One matrix product."""
        found = F.linear(rows, self._weight, self._bias)
        if self._gelu:
            found = F.gelu(found)
        return found if added is None else found + added


class Half:
    """bfloat16 or float16 on an NVIDIA GPU: bias, GELU and what is added are part of cuBLASLt's product.

    Its GELU is the tanh form, which differs from the exact one by less than half of what 16-bit floats round away.
    """

    factor = None

    def __init__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> None:
        self._product = cublaslt.Product(weight, bias, gelu=gelu)

    def __call__(self, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """One kernel."""
        return self._product(rows, added)


class Int8:
    """Weights in int8 by output channel, activations in uint8 by one scale a call, which oneDNN multiplies in VNNI.

    Symmetric weights: scale = max |w| / 127. Activations from min to max: what follows GELU reaches from -0.17 to 20.
    The bias, the scales, GELU and what is added are part of oneDNN's product, so that no pass over the result is needed.
    """

    factor = None

    def __init__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> None:
        scales = weight.abs().amax(1).clamp_min(1e-12) / 127
        quantised = (weight / scales[:, None]).round().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(quantised, None)
        self._scales, self._zeros = scales.float(), torch.zeros(len(scales), dtype=torch.int32)
        self._bias = bias.float()
        self._post, self._algorithm = ("gelu", "none") if gelu else ("none", "")

    def __call__(self, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """Quantise, multiply, scale back."""
        low, high = (float(bound) for bound in torch.aminmax(rows))
        low, high = min(low, 0.0), max(high, 0.0)
        # 254 steps: with zero rounded to a whole one, the largest is still 255 and nothing needs to be cut off.
        scale = max(high - low, 1e-12) / 254
        zero = round(-low / scale)
        # In float32: bfloat16 has no halves beyond 128. Adding a half and cutting off rounds to the nearest.
        quantised = torch.add(torch.tensor([zero + 0.5]), rows.float(), alpha=1 / scale).to(torch.uint8)
        product = (quantised, scale, zero, self._weight, self._scales, self._zeros)
        result: Tensor
        if added is None or self._post != "none":
            result = torch.ops.onednn.qlinear_pointwise(
                *product, self._bias, 1.0, 0, rows.dtype, self._post, [], self._algorithm
            )
            return result if added is None else result + added
        result = torch.ops.onednn.qlinear_pointwise.binary(
            *product, added, self._bias, 1.0, 0, rows.dtype, 1.0, 0, "sum", 1.0, "none", [], ""
        )
        return result


class Float8:
    """e4m3 on NVIDIA GPUs from Ada on: weights by one scale, activations by the largest value seen in calibration.

    Until `settle` is called it computes in bfloat16 and notes the largest value of its rows; afterwards rows must come
    times `factor`, as float8, from the kernel that made them. Values beyond the largest seen are cut off.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> None:
        self._weight, self._bias, self._gelu = weight.to(torch.bfloat16), bias.to(torch.bfloat16), gelu
        self._largest = torch.full((), 1e-6, dtype=torch.float32, device=weight.device)
        self._product: cublaslt.Product | None = None
        self.factor: Tensor | None = None

    def __call__(self, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """Multiply; the result is bfloat16, or what `settle` was told."""
        if self._product is not None:
            return self._product(rows, added)
        self._largest = torch.maximum(self._largest, rows.abs().max().float())
        return Plain(self._weight, self._bias, gelu=self._gelu)(rows, added)

    def settle(self, following: "Float8 | None" = None) -> None:
        """End the calibration; results are float8 for `following` where it is given, which has settled before."""
        scale = self._largest / FLOAT8_MAX
        weight_scale = self._weight.abs().max().float() / FLOAT8_MAX
        self.factor = scale.reciprocal()
        self._product = cublaslt.Product(
            (self._weight.float() / weight_scale).to(torch.float8_e4m3fn), self._bias, gelu=self._gelu,
            scales=(weight_scale, scale), result_scale=following.factor if following else None,
        )  # fmt: skip
        del self._weight


def int8_works() -> str:
    """Why this torch cannot multiply in int8 on this CPU; empty when it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Int8(torch.eye(16), torch.zeros(16))(torch.ones(2, 16), torch.zeros(2, 16))
    except (RuntimeError, AttributeError) as error:
        return str(error).splitlines()[0]
    return ""
