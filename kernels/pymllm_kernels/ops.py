"""Every torch operator of the library: schema, fake and lazily imported implementations.

Nothing here imports Triton, so the operators exist before ``torch.compile`` traces, on any machine.
An activation is ``[..., K]`` in every schema: flattening it here rather than in the caller keeps its
leading sizes symbolic in a compiled graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch.compiler import is_compiling

BIAS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_LIBRARY = torch.library.Library("pymllm_kernels", "DEF")

_LIBRARY.define(
    "w4a16_gemm(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? group_index,"
    " Tensor? input_perm, Tensor? bias, int bits, int group_size) -> Tensor"
)
_LIBRARY.define(
    "w4a16_gemm_hopper(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? input_perm,"
    " Tensor? bias, int group_size, int bits=4) -> Tensor"
)
_LIBRARY.define("per_token_quant_int8(Tensor x) -> (Tensor, Tensor)")
_LIBRARY.define("per_token_quant_int8_asym(Tensor x) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define("static_quant_int8(Tensor x, Tensor scale, Tensor? zero) -> Tensor")
_LIBRARY.define(
    "w8a8_int8_gemm(Tensor codes, Tensor weight, Tensor x_scale, Tensor w_scale, Tensor? x_zero,"
    " Tensor? w_column_sum, Tensor? bias, ScalarType out_dtype) -> Tensor"
)
_LIBRARY.define(
    "w8a8_int8_linear(Tensor x, Tensor weight, Tensor w_scale, Tensor? w_column_sum,"
    " Tensor? input_scale, Tensor? input_zero, Tensor? bias, bool symmetric) -> Tensor"
)


@contextmanager
def _on_device(x: torch.Tensor) -> Iterator[None]:
    """Makes ``x``'s GPU current: kernels are launched on the current device, whatever their arguments."""
    if _is_current(x):
        yield
    else:
        with torch.cuda.device(x.device):
            yield


def _is_current(x: torch.Tensor) -> bool:
    # torch.cuda.current_device first asks whether CUDA runs, which a tensor of it has answered.
    return not x.is_cuda or x.get_device() == torch._C._cuda_getDevice()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``[..., K]`` as ``[M, K]``, a view where the strides allow it."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _dense(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A bias whose values are neighbours, as the kernels read it."""
    return bias if bias is None or bias.stride(0) == 1 else bias.contiguous()


def _triton_out(x: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The output of a Triton kernel; on a CPU (interpreter) fp32, since its bf16 stores truncate."""
    stored = torch.float32 if x.device.type == "cpu" else dtype
    return torch.empty(shape, dtype=stored, device=x.device)


def _require_interpreter(op: str) -> None:
    from pymllm_kernels.device import interpreting

    if not interpreting():
        raise RuntimeError(
            f"{op}: found CPU tensors; the Triton kernel needs a GPU, or TRITON_INTERPRET=1 set before"
            " Python starts. select_kernel picks a kernel that runs on this device"
        )


def _w4a16_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_index: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    from pymllm_kernels.w4a16.launch import launch

    if x.device.type == "cpu":
        _require_interpreter("w4a16_gemm")
    rows = _rows(x)
    n = scale.shape[1]
    out = _triton_out(x, (rows.shape[0], n), x.dtype)
    with _on_device(x):
        launch(rows, weight, scale, zero, group_index, input_perm, _dense(bias), out,
               bits=bits, group_size=group_size)  # fmt: skip
    return out.to(x.dtype).view(*x.shape[:-1], n)


def _w4a16_gemm_hopper(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    bits: int = 4,
) -> torch.Tensor:
    if not _is_current(x):
        with torch.cuda.device(x.device):
            return _w4a16_gemm_hopper(x, weight, scale, zero, input_perm, bias, group_size, bits)
    rows = _rows(x)
    out = _launches().w4a16(
        rows, weight, scale, zero, _dense(bias), group_size=group_size, perm=input_perm, bits=bits
    )
    return out if rows is x else out.view(*x.shape[:-1], weight.shape[1])


def _per_token_quant(
    x: torch.Tensor, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    rows = _rows(x)
    m = rows.shape[0]
    if x.device.type == "cpu":
        from pymllm_kernels.per_token_quant_int8 import reference

        if symmetric:
            codes, scale = reference.per_token_quant_int8(rows)
            zero = None
        else:
            codes, scale, zero = reference.per_token_quant_int8_asym(rows)
    else:
        from pymllm_kernels.per_token_quant_int8.launch import launch_dynamic

        codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
        scale = torch.empty(m, dtype=torch.float32, device=x.device)
        zero = None if symmetric else torch.empty(m, dtype=torch.int32, device=x.device)
        with _on_device(x):
            launch_dynamic(rows, codes, scale, zero)
    per_row = (*x.shape[:-1], 1)
    return codes.view(x.shape), scale.view(per_row), None if zero is None else zero.view(per_row)


def _per_token_quant_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _per_token_quant(x, symmetric=True)[:2]


def _per_token_quant_int8_asym(
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scale, zero = _per_token_quant(x, symmetric=False)
    assert zero is not None
    return codes, scale, zero


def _static_quant_int8(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> torch.Tensor:
    rows = _rows(x)
    if x.device.type == "cpu":
        from pymllm_kernels.per_token_quant_int8 import reference

        return reference.static_quant_int8(rows, scale, zero).view(x.shape)
    from pymllm_kernels.per_token_quant_int8.launch import launch_static

    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    with _on_device(x):
        launch_static(rows, codes, scale, zero)
    return codes.view(x.shape)


def _w8a8_int8_gemm(
    codes: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    w_column_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    from pymllm_kernels.w8a8_int8.launch import launch

    if codes.device.type == "cpu":
        _require_interpreter("w8a8_int8_gemm")
    rows = _rows(codes)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    n = weight.shape[0]
    out = _triton_out(codes, (rows.shape[0], n), out_dtype)
    with _on_device(codes):
        launch(rows, weight, x_scale, w_scale, x_zero, w_column_sum, _dense(bias), out)
    return out.to(out_dtype).view(*codes.shape[:-1], n)


def _w8a8_int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    w_column_sum: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    input_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    symmetric: bool,
) -> torch.Tensor:
    if x.is_cpu:
        raise RuntimeError("w8a8_int8_linear: found CPU tensors; the kernel needs a Hopper GPU")
    if not _is_current(x):
        with torch.cuda.device(x.device):
            return _w8a8_int8_linear(
                x, weight, w_scale, w_column_sum, input_scale, input_zero, bias, symmetric
            )
    rows = _rows(x)
    out = _launches().w8a8_int8(
        rows, weight, w_scale, w_column_sum, input_scale, input_zero, _dense(bias),
        symmetric=symmetric,
    )  # fmt: skip
    return out if rows is x else out.view(*x.shape[:-1], weight.shape[0])


def w4a16_gemm_hopper(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    bits: int = 4,
) -> torch.Tensor:
    """The operator, without the dispatcher where that changes nothing (see ``direct``)."""
    call: Callable[..., torch.Tensor] = (
        _w4a16_gemm_hopper if direct(x) else torch.ops.pymllm_kernels.w4a16_gemm_hopper
    )
    return call(x, weight, scale, zero, input_perm, bias, group_size, bits)


def w8a8_int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    w_column_sum: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    input_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    symmetric: bool,
) -> torch.Tensor:
    """The operator, without the dispatcher where that changes nothing (see ``direct``)."""
    call: Callable[..., torch.Tensor] = (
        _w8a8_int8_linear if direct(x) else torch.ops.pymllm_kernels.w8a8_int8_linear
    )
    return call(x, weight, w_scale, w_column_sum, input_scale, input_zero, bias, symmetric)


def direct(x: torch.Tensor) -> bool:
    """Whether an operator's implementation may be called without torch's dispatcher.

    The dispatcher takes 7 us of a call's 25 on the host. It is needed where somebody listens or
    replaces calls: compiling, tracing, fake and other special tensors, dispatch modes, autograd.
    """
    return (
        not is_compiling()
        and type(x) is torch.Tensor
        and not x.requires_grad
        and _len_torch_dispatch_stack() == 0
        and _get_tracing_state() is None
    )


class _Launches(NamedTuple):
    w4a16: Callable[..., torch.Tensor]
    w8a8_int8: Callable[..., torch.Tensor]


@functools.cache
def _launches() -> _Launches:
    """The launchers for Hopper. An import statement in every call would cost it a microsecond."""
    from pymllm_kernels.w4a16.hopper_launch import launch
    from pymllm_kernels.w8a8_int8.hopper_launch import launch_linear

    return _Launches(launch, launch_linear)


def _fake_w4a16_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_index: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[1]))


def _fake_w4a16_gemm_hopper(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    input_perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    bits: int = 4,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def _fake_per_token_quant_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _fake_per_token_quant_int8_asym(
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scale = _fake_per_token_quant_int8(x)
    return codes, scale, torch.empty_like(scale, dtype=torch.int32)


def _fake_static_quant_int8(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> torch.Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


def _fake_w8a8_int8_gemm(
    codes: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    w_column_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=out_dtype)


def _fake_w8a8_int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    w_column_sum: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    input_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    symmetric: bool,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "w4a16_gemm": (_w4a16_gemm, _fake_w4a16_gemm),
    "w4a16_gemm_hopper": (_w4a16_gemm_hopper, _fake_w4a16_gemm_hopper),
    "per_token_quant_int8": (_per_token_quant_int8, _fake_per_token_quant_int8),
    "per_token_quant_int8_asym": (_per_token_quant_int8_asym, _fake_per_token_quant_int8_asym),
    "static_quant_int8": (_static_quant_int8, _fake_static_quant_int8),
    "w8a8_int8_gemm": (_w8a8_int8_gemm, _fake_w8a8_int8_gemm),
    "w8a8_int8_linear": (_w8a8_int8_linear, _fake_w8a8_int8_linear),
}

for _name, (_implementation, _fake) in _IMPLEMENTATIONS.items():
    _LIBRARY.impl(_name, _implementation, "CUDA")
    _LIBRARY.impl(_name, _implementation, "CPU")
    torch.library.register_fake(f"pymllm_kernels::{_name}", _fake, lib=_LIBRARY)
