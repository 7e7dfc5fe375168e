"""Launchers of the Hopper int8 GEMM, alone and with the quantization of the activation before it."""

from __future__ import annotations

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pymllm_kernels.common.gluon_hopper import tile_layout
from pymllm_kernels.device import device_facts
from pymllm_kernels.per_token_quant_int8.kernel import launch_dynamic, launch_static
from pymllm_kernels.w8a8_int8.hopper import w8a8_int8_hopper_kernel
from pymllm_kernels.w8a8_int8.hopper_tuning import HopperConfig, Plan, choose_config, plan_launch


def _descriptor(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = tile_layout(rows, columns, tensor.dtype)
    return TensorDescriptor.from_tensor(tensor, [rows, columns], layout)


def kernel_constants(config: HopperConfig, pdl: bool) -> dict[str, object]:
    """The compile-time arguments, for the launcher and for compiling ahead of time."""
    return {
        "BLOCK_M": config.block_m,
        "SWAP": config.swap,
        "CONSUMERS": config.consumers,
        "PING_PONG": config.ping_pong,
        "SHARE": config.share != 1,
        "MEET": config.share != 1 and config.meet,
        "SLOTS": config.slots,
        "GROUP_M": config.group_m,
        "STORE_PARTS": config.store_parts,
        "STORE_SLOTS": config.store_slots,
        "REGISTERS": config.registers[1],
        "PDL": pdl,
    }


def launch_gemm(
    codes: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    w_column_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    config: HopperConfig,
    plan: Plan,
    counters: torch.Tensor | None,
) -> None:
    """Fills ``out [M, N]`` from int8 ``codes [M, K]``.

    Args:
        codes: rows at multiples of 16 bytes, like ``weight``'s and ``out``'s.
        weight: int8 ``[N, K]``.
        x_scale: fp32 ``[M]`` or ``[1]``.
        w_scale: fp32 ``[N]`` or ``[1]``.
        x_zero: int32 as ``x_scale``, or ``None``.
        w_column_sum: int32 ``[N]``, with ``x_zero``.
        bias: ``[N]`` or ``None``.
        out: ``[M, N]``.
        config: the compiled form.
        plan: what ``plan_launch`` gives for it. If ``dependent``, the kernel before on the stream
            must write nothing but ``codes``, ``x_scale``, ``x_zero`` and ``counters``.
        counters: int32 ``[plan.counters]``, 0 once the kernel before is done, ``None`` for none.
    """
    parts = None
    if plan.parts:
        parts = torch.empty(plan.parts, dtype=torch.int32, device=out.device)
    w8a8_int8_hopper_kernel[(plan.programs,)](
        _descriptor(codes, config.tokens, config.block_k),
        _descriptor(weight, config.block_n, config.block_k),
        _descriptor(out, *config.out_block),
        out, x_scale, w_scale, x_zero, w_column_sum, bias, parts, counters, out.stride(0),
        # A single row takes the form of many: a stride of 0 would be compiled apart.
        int(x_scale.numel() > 1 or codes.shape[0] == 1), int(w_scale.numel() > 1),
        plan.whole,
        **kernel_constants(config, plan.dependent),
        num_warps=4, maxnreg=config.registers[0], launch_pdl=plan.dependent,
        launch_cooperative_grid=config.share != 1 and config.meet,
    )  # fmt: skip


def launch_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    w_column_sum: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    input_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    symmetric: bool,
    config: HopperConfig | None = None,
    plan: Plan | None = None,
) -> None:
    """Quantizes ``x [M, K]`` and fills ``out [M, N]``: two kernels, which overlap for few tokens.

    Args:
        x: bf16, fp16 or fp32, any strides.
        weight: int8 ``[N, K]``, K a multiple of 16, contiguous and on 16 bytes.
        w_scale: fp32 ``[N]`` or ``[1]``.
        w_column_sum: int32 ``[N]`` for activations with a zero point.
        input_scale: fp32 ``[1]`` for static activations.
        input_zero: int32 ``[1]`` for static asymmetric activations.
        bias: ``[N]`` or ``None``.
        out: ``[M, N]``, N such that a row is a multiple of 16 bytes.
        symmetric: whether activations have no zero point.
        config: the compiled form, by rule if absent.
        plan: how it is launched, by rule if absent.
    """
    m, k = x.shape
    n = weight.shape[0]
    if m == 0 or n == 0:
        return
    device = device_facts(x.device)
    if config is None:
        config = choose_config(m, n, k, device.multiprocessors, device.shared_memory)
    if plan is None:
        plan = plan_launch(config, m, n, k, device.multiprocessors)
    if plan is None:
        raise ValueError(
            f"config: found {config}, which cannot share the tiles of [{m}, {k}] x {n}"
        )
    codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
    counters = None
    if plan.counters:
        # Of this call alone: captured graphs may run beside each other.
        counters = torch.empty(plan.counters, dtype=torch.int32, device=x.device)
    if input_scale is not None:
        scale, zero = input_scale, input_zero
        launch_static(x, codes, scale, zero, counters=counters, pdl=plan.early)
    else:
        scale = torch.empty(m, dtype=torch.float32, device=x.device)
        zero = None if symmetric else torch.empty(m, dtype=torch.int32, device=x.device)
        launch_dynamic(x, codes, scale, zero, counters=counters, pdl=plan.early)
    launch_gemm(
        codes, weight, scale, w_scale, zero, w_column_sum, bias, out,
        config=config, plan=plan, counters=counters,
    )  # fmt: skip
