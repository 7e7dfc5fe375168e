"""Plain torch of the activation quantization, fp32 arithmetic as the compressed-tensors notes give it.

``rint`` is round to nearest, ties to even; every division and product is one fp32 rounding.
"""

from __future__ import annotations

import torch

# Below this absmax 127 / absmax overflows fp32; the row is scaled by a power of two first (exact).
TINY = 1e-30
TINY_FACTOR = 2.0**64


def per_token_quant_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric: ``scale = absmax / 127``, ``code = rint(x * (127 / absmax))`` a row.

    Args:
        x: floating ``[M, K]``.

    Returns:
        int8 ``[M, K]`` and fp32 ``[M]``. A zero row has scale 0 and codes 0. A row holding NaN or
        infinity has a NaN or infinite scale and codes 0, so that its output is NaN.
    """
    rows = x.to(torch.float32)
    absmax = _row_max(rows.abs())
    factor = _tiny_factor(absmax)
    inverse = torch.where(absmax == 0, 0.0, _divide(127.0, absmax * factor))
    codes = _to_int8(torch.round((rows * factor[:, None]) * inverse[:, None]))
    return codes, _divide(absmax, 127.0)


def per_token_quant_int8_asym(
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric, range extended to 0: ``x ~ (code - zero) * scale``.

    ``scale = (max - min) / 255``, ``r = 255 / (max - min)``, ``zero = rint(-128 - min * r)``,
    ``code = clamp(rint(x * r) + zero, -128, 127)``.

    Args:
        x: floating ``[M, K]``.

    Returns:
        int8 ``[M, K]``, fp32 ``[M]``, int32 ``[M]`` zero points in -128 .. 127. A zero row has scale
        0, codes 0 and zero point 0.
    """
    rows = x.to(torch.float32)
    low = -_row_max(-rows)
    high = _row_max(rows)
    span = high - low
    factor = _tiny_factor(span)
    inverse = torch.where(span == 0, 0.0, _divide(255.0, span * factor))
    zero = torch.round(-128.0 - (low * factor) * inverse)
    zero = torch.where(span == 0, 0.0, _finite(zero).clamp(-128.0, 127.0))
    rounded = torch.round((rows * factor[:, None]) * inverse[:, None])
    codes = _to_int8(_finite(rounded) + zero[:, None])
    return codes, _divide(span, 255.0), zero.to(torch.int32)


def static_quant_int8(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> torch.Tensor:
    """One given scale: ``code = clamp(rint(x / scale) + zero, -128, 127)``, NaN gives ``zero``.

    Args:
        x: floating ``[M, K]``.
        scale: fp32 ``[1]``.
        zero: int32 ``[1]`` or ``None``.
    """
    rounded = _finite(torch.round(x.to(torch.float32) / scale))
    return _to_int8(rounded if zero is None else rounded + zero.to(torch.float32))


def _row_max(rows: torch.Tensor) -> torch.Tensor:
    """Largest value of a row and 0, NaN if the row holds one; ``[M]``, also for K = 0."""
    return torch.nn.functional.pad(rows, (0, 1)).amax(dim=-1)


def _tiny_factor(size: torch.Tensor) -> torch.Tensor:
    return torch.where(size < TINY, TINY_FACTOR, 1.0)


def _divide(a: torch.Tensor | float, b: torch.Tensor | float) -> torch.Tensor:
    """IEEE division: torch multiplies by a reciprocal where one side is a Python number."""
    like = a if isinstance(a, torch.Tensor) else b
    assert isinstance(like, torch.Tensor)
    numerator = a if isinstance(a, torch.Tensor) else torch.full_like(like, a)
    return numerator / (b if isinstance(b, torch.Tensor) else torch.full_like(like, b))


def _finite(values: torch.Tensor) -> torch.Tensor:
    """NaN to 0, and -256 .. 255: far enough for any zero point to bring it back into int8."""
    return torch.nan_to_num(values, nan=0.0).clamp(-256.0, 255.0)


def _to_int8(values: torch.Tensor) -> torch.Tensor:
    return _finite(values).clamp(-128.0, 127.0).to(torch.int8)
