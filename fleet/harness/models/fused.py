"""Steps between matrix products, each one pass over memory where torch.compile is used: `compile_all` turns it on."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

FLOAT8_MAX = 448.0
"""The largest float8_e4m3fn."""


_TWO_ROOT_TWO_OVER_PI = 2 * math.sqrt(2 / math.pi)


def _to_float8(rows: Tensor, scale: Tensor) -> Tensor:
    # Times the reciprocal of one number, not a division for each element.
    return (rows.float() * scale.reciprocal()).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)


def _gelu_float8(rows: Tensor, scale: Tensor) -> Tensor:
    # GELU's tanh form, written as x * sigmoid(2y), y = sqrt(2/pi) (x + 0.044715 x^3): float8 rounds away far more than
    # sets it apart from the exact form, and on an H200 it takes 145 us where the exact one takes 218 (30,095 x 4,096).
    exact = rows.float()
    inner = _TWO_ROOT_TWO_OVER_PI * (exact + 0.044715 * exact * exact * exact)
    return _to_float8(exact * torch.sigmoid(inner), scale)


def _add_norm(hidden: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(hidden + delta, (hidden.shape[-1],), weight, bias, eps)


def _add_norm_float8(  # noqa: PLR0917 - torch.compile takes them in order
    hidden: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: Tensor
) -> tuple[Tensor, Tensor]:
    normed = _add_norm(hidden, delta, weight, bias, eps)
    return normed, _to_float8(normed, scale)


_NAMES = ("to_float8", "gelu_float8", "add_norm", "add_norm_float8")
to_float8, gelu_float8, add_norm, add_norm_float8 = _to_float8, _gelu_float8, _add_norm, _add_norm_float8


def compile_all() -> None:
    """Compile each step for any number of rows; needs Triton on a GPU.

    The width of a row stays a constant of the kernel: with that a norm reads its row once (measured on an H200, an
    unknown width made it three times slower).
    """
    for name in _NAMES:
        compiled = torch.compile(globals()[f"_{name}"])

        def step(rows: Tensor, *rest: Any, compiled: Any = compiled) -> Any:
            torch._dynamo.mark_dynamic(rows, 0)  # noqa: SLF001 - torch's documented way to say so
            for other in rest:
                if isinstance(other, Tensor) and other.ndim == rows.ndim:
                    torch._dynamo.mark_dynamic(other, 0)  # noqa: SLF001
            return compiled(rows, *rest)

        globals()[name] = step
