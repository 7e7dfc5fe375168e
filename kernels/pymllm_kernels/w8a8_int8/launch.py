"""Launches the plain Triton int8 GEMM."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pymllm_kernels.common.forms import Form
from pymllm_kernels.common.launcher import FormLauncher
from pymllm_kernels.common.specialization import Specialization, integer_type, pointer_type
from pymllm_kernels.device import device_facts
from pymllm_kernels.per_token_quant_int8 import launch as quant
from pymllm_kernels.problem import LinearProblem
from pymllm_kernels.tuning import config_for
from pymllm_kernels.w8a8_int8.kernel import w8a8_int8_gemm_kernel
from pymllm_kernels.w8a8_int8.tunable import TRITON, triton_key
from pymllm_kernels.w8a8_int8.tuning import Config


class TritonForm(NamedTuple):
    """What a compiled kernel depends on; M is not part of it.

    Attributes:
        config: tile and pipeline.
        out: dtype of the output.
        per_token: whether each row has its own scale.
        channel: whether each output feature has its own scale.
        zero: whether activations have a zero point.
        bias: dtype of the bias, ``None`` for none.
        even: whether K fills its last block.
        aligned: whether N, K and all rows are multiples of 16 elements.
        placed: whether the output starts on 16 bytes.
        wide: whether strides need 64 bits.
    """

    config: Config
    out: torch.dtype
    per_token: bool = True
    channel: bool = True
    zero: bool = False
    bias: torch.dtype | None = None
    even: bool = True
    aligned: bool = True
    placed: bool = True
    wide: bool = False


def specialization(key: TritonForm) -> Specialization:
    """The compiled form."""
    config = key.config
    optional = {
        "x_zero_ptr": "*i32" if key.zero else None,
        "column_sum_ptr": "*i32" if key.zero else None,
        "bias_ptr": None if key.bias is None else pointer_type(key.bias),
    }
    signature = {
        "x_ptr": "*i8",
        "weight_ptr": "*i8",
        "x_scale_ptr": "*fp32",
        "w_scale_ptr": "*fp32",
        "out_ptr": pointer_type(key.out),
        **{name: kind for name, kind in optional.items() if kind is not None},
        **dict.fromkeys(("M", "N", "K"), "i32"),
        **dict.fromkeys(("stride_xm", "stride_wn", "stride_om"), "i64" if key.wide else "i32"),
    }
    constants = {
        **{name: None for name, kind in optional.items() if kind is None},
        "stride_xs": int(key.per_token),
        "stride_ws": int(key.channel),
        "SWAP": config.swap,
        "EVEN_K": key.even,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    # Scales, sums and bias may be views that start anywhere.
    multiples = ["out_ptr"] if key.placed else []
    if key.aligned:
        multiples += ["x_ptr", "weight_ptr", "N", "K", "stride_xm", "stride_wn", "stride_om"]
    return Specialization(
        f"w8a8_int8-{config.block_m}x{config.block_n}{'-zero' * key.zero}",
        w8a8_int8_gemm_kernel,
        signature,
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible_by_16=tuple(multiples),
    )


def forms(problem: LinearProblem, config: Config, bias: torch.dtype | None) -> list[Form]:
    """What a call whose rows are contiguous and on 16 elements needs compiled, quantization included.

    Weights with a scale for each output.
    """
    n, k = problem.n, problem.k
    static, zero = problem.input_strategy == "tensor", not problem.input_symmetric
    key = TritonForm(
        config, problem.act_dtype, not static, True, zero, bias,
        even=k % config.block_k == 0, aligned=n % 16 == 0 and k % 16 == 0,
    )  # fmt: skip
    quantization = quant.form_of(problem.act_dtype, k, k, 1, 0, static=static, zero=zero)
    return [Form(quant.specialization, (quantization,)), Form(specialization, (key,))]


def launch(
    codes: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    w_column_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    config: Config | None = None,
) -> None:
    """Fills ``out [M, N]`` from int8 ``codes [M, K]``; the shapes are the caller's duty."""
    m, k = codes.shape
    n = weight.shape[0]
    if m == 0 or n == 0:
        return
    if config is None:
        key = triton_key(n, k, out.dtype)
        config = config_for(TRITON, key, m, device_facts(codes.device))
    # The strides of a single row may be anything.
    stride_xm, stride_om = (codes.stride(0), out.stride(0)) if m > 1 else (k, n)
    stride_wn = weight.stride(0) if n > 1 else k
    addresses = codes.data_ptr() | weight.data_ptr()
    form = TritonForm(
        config, out.dtype,
        # [1] is one scale for all rows, [1, 1] the scale of a single row.
        x_scale.numel() > 1 or x_scale.dim() > 1, w_scale.numel() > 1, x_zero is not None,
        None if bias is None else bias.dtype,
        even=k % config.block_k == 0,
        aligned=addresses % 16 == 0
        and not any(v % 16 for v in (n, k, stride_xm, stride_wn, stride_om)),
        placed=out.data_ptr() % 16 == 0,
        wide=integer_type(stride_xm, stride_wn, stride_om) == "i64",
    )  # fmt: skip
    programs = -(-m // config.block_m) * -(-n // config.block_n)
    arguments = {
        "x_ptr": codes, "weight_ptr": weight, "x_scale_ptr": x_scale, "w_scale_ptr": w_scale,
        "x_zero_ptr": x_zero, "column_sum_ptr": w_column_sum, "bias_ptr": bias, "out_ptr": out,
        "M": m, "N": n, "K": k, "stride_xm": stride_xm, "stride_wn": stride_wn,
        "stride_om": stride_om,
    }  # fmt: skip
    _LAUNCHER(form, codes.device, programs, arguments)


_LAUNCHER = FormLauncher(specialization)
