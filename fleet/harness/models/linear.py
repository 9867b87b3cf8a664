"""Linear layers in each precision: plain, 8-bit integers on CPUs, 8-bit floats on GPUs. All take and give [rows, …]."""

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from fleet.harness.models import fused


class Linear(Protocol):
    """`x @ weight.T + bias`, followed by GELU where it was made so."""

    def __call__(self, rows: Tensor) -> Tensor:
        """[rows, in] to [rows, out], in the precision of `rows`."""


Maker = Callable[[Tensor, Tensor, bool], Linear]
"""Weight [out, in], bias [out], whether GELU follows."""


class Plain:
    """In the precision of its weight."""

    def __init__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> None:
        self._weight, self._bias, self._gelu = weight, bias, gelu

    def __call__(self, rows: Tensor) -> Tensor:
        """One matrix product, on a GPU with GELU in it.

        That one is the tanh form, which differs from the exact one by less than half of what 16-bit floats round
        away; float32 keeps the exact form.
        """
        if self._gelu and rows.is_cuda and rows.dtype is not torch.float32:
            result: Tensor = torch._addmm_activation(self._bias, rows, self._weight.t(), use_gelu=True)  # noqa: SLF001 - cuBLASLt's epilogue has no other door
            return result
        found = F.linear(rows, self._weight, self._bias)
        return F.gelu(found) if self._gelu else found


class Int8:
    """Weights in int8 by output channel, activations in uint8 by one scale a call, which oneDNN multiplies in VNNI.

    Symmetric weights: scale = max |w| / 127. Activations: 128 stands for zero, scale = max |x| / 127. The bias, the
    scales and GELU are part of oneDNN's product, so that no pass over the result is needed.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> None:
        scales = weight.abs().amax(1).clamp_min(1e-12) / 127
        quantised = (weight / scales[:, None]).round().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(quantised, None)
        self._scales, self._zeros = scales.float(), torch.zeros(len(scales), dtype=torch.int32)
        self._bias = bias.float()
        self._post, self._algorithm = ("gelu", "none") if gelu else ("none", "")

    def __call__(self, rows: Tensor) -> Tensor:
        """Quantise, multiply, scale back."""
        scale = max(float(rows.abs().max()), 1e-12) / 127
        # Adding 128.5 and cutting off rounds to the nearest, in one pass instead of three.
        quantised = torch.add(rows * (1 / scale), 128.5).clamp_(1, 255).to(torch.uint8)
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            quantised, scale, 128, self._weight, self._scales, self._zeros, self._bias,
            1.0, 0, rows.dtype, self._post, [], self._algorithm,
        )  # fmt: skip
        return result


class Float8:
    """e4m3 on NVIDIA GPUs from Ada on: weights by one scale, activations by the largest value seen in calibration.

    Until `settle` is called each call looks at its input and widens the scale; afterwards it stands, so that nothing
    has to be read back from the device. Values beyond it are cut off at the largest float8. Rows may come as float8
    already, quantised by `scale` in the kernel that made them.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> None:
        self._weight_scale = weight.abs().max().float() / fused.FLOAT8_MAX
        self._weight = (weight.float() / self._weight_scale).to(torch.float8_e4m3fn).t()
        self._bias = bias.to(torch.bfloat16)
        self.gelu = gelu
        self.scale = torch.full((), 1e-12, dtype=torch.float32, device=weight.device)
        self.settled = False

    def __call__(self, rows: Tensor) -> Tensor:
        """Multiply; the result is bfloat16."""
        found = self.product(rows)
        return F.gelu(found) if self.gelu else found

    def product(self, rows: Tensor) -> Tensor:
        """The same without GELU."""
        if rows.dtype is not torch.float8_e4m3fn:
            if not self.settled:
                self.scale.copy_(torch.maximum(self.scale, rows.abs().max().float() / fused.FLOAT8_MAX))
            rows = fused.to_float8(rows, self.scale)
        found: Tensor = torch._scaled_mm(  # noqa: SLF001 - the only float8 product that torch has under one scale
            rows, self._weight, scale_a=self.scale, scale_b=self._weight_scale, bias=self._bias,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
        return found


def chain(first: Linear, second: Linear, rows: Tensor) -> Tensor:
    """`second(first(rows))`; with settled float8 the step between them is one kernel."""
    if isinstance(first, Float8) and isinstance(second, Float8) and second.settled and first.gelu:
        return second(fused.gelu_float8(first.product(rows), second.scale))
    return second(first(rows))


def int8_works() -> str:
    """Why this torch cannot multiply in int8 on this CPU; empty when it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Int8(torch.eye(16), torch.zeros(16))(torch.ones(2, 16))
    except (RuntimeError, AttributeError) as error:
        return str(error).splitlines()[0]
    return ""
