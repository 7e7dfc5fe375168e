"""Launches the W4A16 kernel for Hopper."""

from __future__ import annotations

import functools

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pymllm_kernels.common.gluon_hopper import GLUON_DTYPE, tile_layout
from pymllm_kernels.common.workspace import counters
from pymllm_kernels.device import device_facts
from pymllm_kernels.w4a16.hopper import w4a16_gemm_hopper
from pymllm_kernels.w4a16.hopper_tuning import (
    HopperConfig,
    HopperForm,
    choose_config,
    plan,
)

_ONE_GROUP = 2**30
# Registers of a thread by the number of consumers: of the whole block at launch, and of a consumer
# once the producer has given up its own. 65,536 over 12 or 20 warps, 4 of them the producer's.
LAUNCH_REGISTERS = {2: 168, 4: 96}
_CONSUMER_REGISTERS = {2: 240, 4: 112}


def form_of(
    block_k: int, group_size: int, act: torch.dtype, scale: torch.dtype, symmetric: bool
) -> HopperForm:
    """The form of a layer."""
    runs = 1 if group_size == -1 or group_size >= block_k else block_k // group_size
    return HopperForm(block_k, runs, scale.itemsize + (not symmetric), act == scale)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    group_size: int,
    config: HopperConfig | None = None,
) -> None:
    """Fills ``out [M, N]`` from ``x [M, K]``; whether the layer fits is the caller's duty.

    An ``x`` that TMA cannot read (rows not contiguous or not on 16 bytes) is copied first.
    """
    m, k = x.shape
    n = weight.shape[1]
    if m == 0:
        return
    form = form_of(4 * weight.shape[2], group_size, x.dtype, scale.dtype, zero is None)
    facts = device_facts(x.device)
    if config is None:
        config = choose_config(m, n, k, form, facts.multiprocessors, facts.shared_memory)
    grid = plan(config, m, n, k, form, facts.multiprocessors)
    if grid is None:
        raise ValueError(
            f"config: found {config}, which cannot share the tiles of [{m}, {k}] x {n}"
        )
    part = count = None
    if config.share != 1:
        part = torch.empty(grid.part_elements(config), dtype=torch.float32, device=x.device)
        count = counters(x.device)
    w4a16_gemm_hopper[(grid.programs,)](
        *_descriptors(_readable(x), weight, scale, zero, out, config),
        out, bias, part, count,
        m, n, scale.shape[0], grid.tiles_m, grid.tiles_n, grid.whole, grid.steps, out.stride(0),
        **kernel_constants(config, form, group_size, x.dtype),
        num_warps=4, maxnreg=LAUNCH_REGISTERS[config.consumers],
        launch_cooperative_grid=config.share != 1 and config.meet,
    )  # fmt: skip


def kernel_constants(
    config: HopperConfig, form: HopperForm, group_size: int, dtype: torch.dtype
) -> dict[str, object]:
    """The compile-time arguments, for the launcher and for compiling ahead of time."""
    return {
        "GROUP_SIZE": _ONE_GROUP if group_size == -1 else group_size,
        "SLICE_K": form.block_k // 4,
        "RUNS": form.runs,
        "HALF": GLUON_DTYPE[dtype],
        "SCALE_WEIGHTS": config.scale_weights,
        "BLOCK_M": config.block_m,
        "ROWS": config.rows,
        "CONSUMERS": config.consumers,
        "SLOTS": config.slots,
        "SPAN": config.span,
        "GROUP_M": config.group_m,
        "OUT_PARTS": config.out_parts,
        "SHARE": config.share != 1,
        "MEET": config.share != 1 and config.meet,
        "REGISTERS": _CONSUMER_REGISTERS[config.consumers],
    }


def _readable(x: torch.Tensor) -> torch.Tensor:
    row_bytes = x.stride(0) * x.element_size()
    aligned = x.data_ptr() % 16 == 0 and (x.shape[0] == 1 or row_bytes % 16 == 0)
    return x if aligned and x.stride(1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _descriptors(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    out: torch.Tensor,
    config: HopperConfig,
) -> tuple[TensorDescriptor | None, ...]:
    m, k = x.shape
    blocks, n, slice_k = weight.shape
    # The row stride of a single row may be anything, and TMA wants one of 16 bytes.
    stride = x.stride(0) if m > 1 else k
    out_desc = None
    if config.out_parts:
        box = [config.block_m // config.out_parts, config.rows]
        out_desc = TensorDescriptor(
            out, [m, n], [out.stride(0), 1], box, tile_layout(*box, out.dtype)
        )
    x_box = [config.block_m, 2 * slice_k]
    weight_box = [config.block_n, slice_k]
    return (
        TensorDescriptor(x, [m, k], [stride, 1], x_box, tile_layout(*x_box, x.dtype)),
        TensorDescriptor(
            weight, [blocks * n, slice_k], [slice_k, 1], weight_box,
            tile_layout(*weight_box, weight.dtype),
        ),
        _row_descriptor(scale, config.block_n),
        None if zero is None else _row_descriptor(zero, config.block_n),
        out_desc,
    )  # fmt: skip


def _row_descriptor(rows: torch.Tensor, block_n: int) -> TensorDescriptor:
    return TensorDescriptor(rows, [rows.numel()], [1], [block_n], row_layout(rows.dtype))


@functools.cache
def row_layout(dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Shared-memory layout of a row of scales or zero points."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * dtype.itemsize, rank=1)
