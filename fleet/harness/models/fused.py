"""Steps between matrix products, each one pass over memory where torch.compile is used: `compile_all` turns it on."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

FLOAT8_MAX = 448.0
"""The largest float8_e4m3fn."""


def _to_float8(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)


def _gelu_float8(rows: Tensor, scale: Tensor) -> Tensor:
    return _to_float8(F.gelu(rows.float()), scale)


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
    """Compile each step once for any number of rows; needs Triton on a GPU."""
    for name in _NAMES:
        globals()[name] = torch.compile(globals()[f"_{name}"], dynamic=True)
