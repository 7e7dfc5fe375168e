"""Launches the quantization of activations."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from pymllm_kernels.common.launcher import FormLauncher, LoadedKernel, load
from pymllm_kernels.common.specialization import Specialization, integer_type, pointer_type
from pymllm_kernels.device import interpreting
from pymllm_kernels.per_token_quant_int8.kernel import per_token_quant_kernel, static_quant_kernel

# A row of up to this many values is held in registers and read once.
_MAX_BLOCK = 32768
# Values a program where the scale is given, 8 a thread: each takes a division.
_STATIC_BLOCK = 2048


class QuantForm(NamedTuple):
    """What a compiled quantization depends on.

    Attributes:
        act: dtype of the activations.
        block_k: values of a row at a time, see :func:`launch_parameters`.
        one_block: whether that is the whole row.
        static: whether the scale is given.
        zero: whether there is a zero point.
        counters: whether counters of a following kernel are cleared.
        pdl: whether a following kernel, if launched for it, may start at once.
        contiguous: whether the values of a row are neighbours.
        even: whether K is a multiple of 16.
        aligned: whether rows start on 16 elements.
        wide: whether strides need 64 bits.
    """

    act: torch.dtype
    block_k: int
    one_block: bool
    static: bool
    zero: bool
    counters: bool = False
    pdl: bool = False
    contiguous: bool = True
    even: bool = True
    aligned: bool = True
    wide: bool = False


def specialization(form: QuantForm) -> Specialization:
    """The compiled form."""
    stride = "i64" if form.wide else "i32"
    signature = {
        "x_ptr": pointer_type(form.act),
        "codes_ptr": "*i8",
        "scale_ptr": "*fp32",
        **({"zero_ptr": "*i32"} if form.zero else {}),
        **({"counters_ptr": "*i32"} if form.counters else {}),
        "K": "i32",
        "stride_xm": stride,
        **({} if form.contiguous else {"stride_xk": stride}),
        "stride_cm": "i32",
        "counters": "i32",
    }
    constants: dict[str, object] = {"BLOCK_K": form.block_k, "PDL": form.pdl}
    if form.contiguous:
        constants["stride_xk"] = 1
    if not form.zero:
        constants["zero_ptr"] = None
    if not form.counters:
        constants["counters_ptr"] = None
    if form.static:
        constants["FUSED"] = not interpreting()
    else:
        constants["ONE_BLOCK"] = form.one_block
    multiples = ["codes_ptr"]
    if form.even:
        multiples += ["K", "stride_cm"]
    if form.aligned:
        multiples += ["x_ptr", "stride_xm"]
    kind = "static" if form.static else "dynamic"
    return Specialization(
        f"quant-{kind}-{'asymmetric' if form.zero else 'symmetric'}-{form.block_k}",
        static_quant_kernel if form.static else per_token_quant_kernel,
        signature,
        constants,
        num_warps=4 if form.static else min(max(form.block_k // 1024, 1), 16),
        divisible_by_16=tuple(multiples),
        # A fused multiply-add would skip the rounding of the product before rint.
        options={"enable_fp_fusion": False},
    )


def block_of(k: int) -> int:
    """Values of a row of ``k`` that are handled at a time: 32 a thread up to 16384, then 64.

    On an H200, 4096 values take 2.0 us with 4 warps, 2.1 with 8 and 2.3 with 16.
    """
    return min(max(1 << (k - 1).bit_length(), 256), _MAX_BLOCK)


def form_of(
    act: torch.dtype, k: int, stride_xm: int, stride_xk: int, address: int, *, static: bool,
    zero: bool, counters: bool = False, pdl: bool = False,
) -> QuantForm:  # fmt: skip
    """The form for rows of ``k`` values at these strides (elements) and this address."""
    block = _STATIC_BLOCK if static else block_of(k)
    return QuantForm(
        act, block, k <= block, static, zero, counters, pdl, stride_xk == 1, k % 16 == 0,
        address % 16 == 0 and stride_xm % 16 == 0,
        integer_type(stride_xm, stride_xk) == "i64",
    )  # fmt: skip


def programs(form: QuantForm, m: int, k: int) -> int:
    """Size of the grid for ``m`` rows of ``k`` values."""
    return m * -(-k // form.block_k) if form.static else m


@functools.cache
def loaded(form: QuantForm, device: torch.device) -> LoadedKernel:
    """A form on a device, which is current."""
    return load(specialization(form), device)


def launch_dynamic(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> None:
    """Fills ``codes [M, K]``, ``scale [M]`` and, if asymmetric, ``zero [M]`` from ``x [M, K]``.

    Args:
        x: floating, any strides.
        codes: int8, contiguous.
        scale: fp32.
        zero: int32 or ``None``.
    """
    _launch(x, codes, scale, zero, static=False)


def launch_static(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> None:
    """Fills ``codes [M, K]`` from ``x [M, K]`` with one scale and zero point for the tensor."""
    _launch(x, codes, scale, zero, static=True)


def _launch(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, *,
    static: bool,
) -> None:  # fmt: skip
    m, k = x.shape
    if m == 0:
        return
    # The stride of a single row may be anything.
    stride_xm, stride_xk = x.stride(0) if m > 1 else k, x.stride(1)
    form = form_of(
        x.dtype, k, stride_xm, stride_xk, x.data_ptr(), static=static, zero=zero is not None
    )
    arguments = {
        "x_ptr": x, "codes_ptr": codes, "scale_ptr": scale, "zero_ptr": zero, "K": k,
        "stride_xm": stride_xm, "stride_xk": stride_xk, "stride_cm": k, "counters": 0,
    }  # fmt: skip
    _LAUNCHER(form, x.device, programs(form, m, k), arguments)


_LAUNCHER = FormLauncher(specialization)
