"""Public functions of the activation quantization."""

from __future__ import annotations

import torch

ACT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def per_token_quant_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes each row of ``x`` to int8 with its own scale, symmetric.

    ``scale = absmax / 127``, ``code = rint(x * (127 / absmax))`` in fp32 (compressed-tensors dynamic
    per-token quantization as vLLM's CUDA kernel computes it).

    Args:
        x: ``[..., K]``, bf16, fp16 or fp32; strided rows are read in place.

    Returns:
        int8 ``[..., K]`` codes in -127 .. 127 and fp32 ``[..., 1]`` scales, ``x ~ codes * scale``. A
        zero row gives scale 0; a row with NaN or infinity a NaN or infinite scale and codes 0.

    Raises:
        ValueError: ``x`` is a scalar or not floating.
    """
    _check(x)
    return torch.ops.pymllm_kernels.per_token_quant_int8(x)  # type: ignore[no-any-return]


def per_token_quant_int8_asym(
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantizes each row of ``x`` to int8 with its own scale and zero point.

    The range of a row is extended to 0, which keeps the zero point in int8 and the correction
    ``zero * sum(w)`` of the GEMM in int32.

    Args:
        x: ``[..., K]``, bf16, fp16 or fp32; strided rows are read in place.

    Returns:
        int8 ``[..., K]`` codes, fp32 ``[..., 1]`` scales, int32 ``[..., 1]`` zero points,
        ``x ~ (codes - zero) * scale``.

    Raises:
        ValueError: ``x`` is a scalar or not floating.
    """
    _check(x)
    return torch.ops.pymllm_kernels.per_token_quant_int8_asym(x)  # type: ignore[no-any-return]


def static_quant_int8(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantizes ``x`` to int8 with one given scale: ``clamp(rint(x / scale) + zero, -128, 127)``.

    Args:
        x: ``[..., K]``, bf16, fp16 or fp32; strided rows are read in place.
        scale: fp32 ``[1]``.
        zero: int32 ``[1]`` or ``None``.

    Returns:
        int8 ``[..., K]``.

    Raises:
        ValueError: ``x`` is a scalar or not floating, or ``scale`` or ``zero`` is not as stated.
    """
    _check(x)
    for name, tensor, dtype in (("scale", scale, torch.float32), ("zero", zero, torch.int32)):
        if tensor is not None and (tensor.dtype != dtype or tensor.numel() != 1):
            raise ValueError(
                f"{name}: found {tensor.dtype} of shape {tuple(tensor.shape)}, accepted {dtype} [1]"
            )
    return torch.ops.pymllm_kernels.static_quant_int8(x, scale, zero)  # type: ignore[no-any-return]


def _check(x: torch.Tensor) -> None:
    if x.dim() == 0:
        raise ValueError("x: found a scalar, accepted [..., K]")
    if x.dtype not in ACT_DTYPES:
        raise ValueError(f"x: found dtype {x.dtype}, accepted {ACT_DTYPES}")
