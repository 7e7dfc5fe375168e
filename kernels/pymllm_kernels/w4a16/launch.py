"""Launches the plain Triton W4A16 kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from pymllm_kernels.common.forms import Form as CompiledForm
from pymllm_kernels.common.launcher import FormLauncher
from pymllm_kernels.common.specialization import Specialization, integer_type, pointer_type
from pymllm_kernels.device import device_facts
from pymllm_kernels.problem import LinearProblem
from pymllm_kernels.tuning import config_for
from pymllm_kernels.w4a16.kernel import w4a16_gemm_kernel
from pymllm_kernels.w4a16.layout import choose_layout
from pymllm_kernels.w4a16.tunable import TRITON, triton_key
from pymllm_kernels.w4a16.tuning import Config, Form

_TRITON_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

# What codes are too large by where they are made of bits instead of converted.
_MAGIC_OFFSET = {
    (4, torch.bfloat16): 128.0,
    (4, torch.float16): 1024.0,
    (8, torch.bfloat16): -128.0,
    (8, torch.float16): 1024.0,
}


class TritonForm(NamedTuple):
    """What a compiled kernel depends on; M is not part of it.

    Attributes:
        form: bits, layout and groups.
        config: tile and pipeline.
        act: dtype of the activations.
        scale: dtype of the scales.
        zero: whether there are zero points.
        act_order: whether inputs are taken in another order.
        bias: dtype of the bias, ``None`` for none.
        device: ``"cuda"``, ``"hip"`` or ``"cpu"`` (the interpreter).
        even: whether K fills its last block.
        aligned: whether N, K and the rows of the activations are multiples of 16 elements.
        placed: whether the layer's tensors and the output start on 16 bytes.
        contiguous: whether the activations of a row are neighbours.
        wide: whether strides need 64 bits.
    """

    form: Form
    config: Config
    act: torch.dtype
    scale: torch.dtype
    zero: bool = False
    act_order: bool = False
    bias: torch.dtype | None = None
    device: str = "cuda"
    even: bool = True
    aligned: bool = True
    placed: bool = True
    contiguous: bool = True
    wide: bool = False


def specialization(key: TritonForm) -> Specialization:
    """The compiled form.

    The interpreter computes in fp32: its bf16 arithmetic is wrong, and it has no inline assembly. AMD
    takes the portable path in the activations' dtype.
    """
    form, config = key.form, key.config
    compute = torch.float32 if key.device == "cpu" else key.act
    magic = key.device == "cuda"
    offset = _MAGIC_OFFSET[form.bits, compute] if magic else 0.0
    optional = {
        "perm_ptr": "*i32" if key.act_order else None,
        "zero_ptr": "*i8" if key.zero else None,
        "group_ptr": "*i32" if form.group_index else None,
        "bias_ptr": None if key.bias is None else pointer_type(key.bias),
    }
    stride = "i64" if key.wide else "i32"
    signature = {
        "x_ptr": pointer_type(key.act),
        "weight_ptr": "*i16",
        "scale_ptr": pointer_type(key.scale),
        "out_ptr": pointer_type(key.act),
        **{name: kind for name, kind in optional.items() if kind is not None},
        **dict.fromkeys(("M", "N", "K", "groups"), "i32"),
        **dict.fromkeys(("stride_xm", "stride_wb", "stride_om"), stride),
        **({} if key.contiguous else {"stride_xk": stride}),
    }
    constants = {
        **{name: None for name, kind in optional.items() if kind is None},
        **({"stride_xk": 1} if key.contiguous else {}),
        "BITS": form.bits,
        "GROUP_SIZE": form.group_size,
        "SLICE_K": form.block_k // 4,
        "COMPUTE": _TRITON_DTYPE[compute],
        "MAGIC": magic,
        "OFFSET": offset,
        "EVEN_K": key.even,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GROUP_M": config.group_m,
    }
    # A bias may be a view that starts anywhere.
    multiples = ["stride_wb"]
    if key.placed:
        multiples += ["weight_ptr", "scale_ptr", "out_ptr"]
        multiples += [name for name in ("perm_ptr", "zero_ptr", "group_ptr") if name in signature]
    if key.aligned:
        multiples += ["x_ptr", "N", "K", "stride_xm", "stride_om"]
    return Specialization(
        f"w4a16-{config.block_m}x{config.block_n}-{form.bits}bit-g{form.group_size}",
        w4a16_gemm_kernel,
        signature,
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible_by_16=tuple(multiples),
    )


def forms(problem: LinearProblem, config: Config, bias: torch.dtype | None) -> list[CompiledForm]:
    """What a call whose rows are contiguous and on 16 elements needs compiled."""
    bits, n, k = problem.weight_bits, problem.n, problem.k
    layout = choose_layout(bits, k, problem.group_size)
    spans = problem.groups > 1 and problem.group_size % layout.slice_k != 0
    key = TritonForm(
        Form(bits, layout.block_k, problem.group_size, spans), config, problem.act_dtype,
        problem.scale_dtype, not problem.symmetric, problem.act_order, bias, problem.device.type,
        even=k % layout.block_k == 0, aligned=n % 16 == 0 and k % 16 == 0,
    )  # fmt: skip
    return [CompiledForm(specialization, (key,))]


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_index: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    config: Config | None = None,
) -> None:
    """Fills ``out [M, N]`` from ``x [M, K]``; the shapes are the caller's duty (see ``api``)."""
    m, k = x.shape
    groups, n = scale.shape
    if m == 0 or n == 0:
        return
    facts = device_facts(x.device)
    if config is None:
        key = triton_key(bits, n, k, group_size, x.dtype, group_index is not None)
        config = config_for(TRITON, key, m, facts)
    block_k = weight.shape[2] * 16 // bits
    # The strides of a single row may be anything.
    stride_xm, stride_om = (x.stride(0), out.stride(0)) if m > 1 else (k, n)
    stride_xk, stride_wb = x.stride(1), weight.stride(0)
    own = (weight, scale, zero, group_index, input_perm, out)
    form = TritonForm(
        Form(bits, block_k, group_size, group_index is not None), config, x.dtype, scale.dtype,
        zero is not None, input_perm is not None, None if bias is None else bias.dtype, facts.type,
        even=k % block_k == 0,
        aligned=x.data_ptr() % 16 == 0 and not any(v % 16 for v in (n, k, stride_xm, stride_om)),
        placed=all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in own),
        contiguous=stride_xk == 1,
        wide=integer_type(stride_xm, stride_xk, stride_wb, stride_om) == "i64",
    )  # fmt: skip
    programs = -(-m // config.block_m) * -(-n // config.block_n)
    arguments = {
        "x_ptr": x, "perm_ptr": input_perm, "weight_ptr": weight, "scale_ptr": scale,
        "zero_ptr": zero, "group_ptr": group_index, "bias_ptr": bias, "out_ptr": out, "M": m, "N": n,
        "K": k, "groups": groups, "stride_xm": stride_xm, "stride_xk": stride_xk,
        "stride_wb": stride_wb, "stride_om": stride_om,
    }  # fmt: skip
    _LAUNCHER(form, x.device, programs, arguments)


_LAUNCHER = FormLauncher(specialization)
