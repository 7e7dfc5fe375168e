"""Launches of the Hopper int8 layer: the quantization of the activation, then the GEMM, or one for both."""

from __future__ import annotations

import functools
from threading import get_ident

import torch

from pymllm_kernels.common.cuda import raw_stream
from pymllm_kernels.common.eager import Prepared
from pymllm_kernels.common.forms import Form
from pymllm_kernels.common.gluon_hopper import tile_layout
from pymllm_kernels.common.launcher import LoadedKernel, TensorMaps, load
from pymllm_kernels.common.sharing import compiled_config
from pymllm_kernels.common.specialization import Specialization, box_type, pointer_type
from pymllm_kernels.device import DeviceFacts, device_facts
from pymllm_kernels.tuning import resolve, state
from pymllm_kernels.w8a8_int8 import hopper_decode_launch, hopper_fused_launch
from pymllm_kernels.w8a8_int8.hopper import w8a8_int8_hopper_kernel
from pymllm_kernels.w8a8_int8.hopper_codes import Quantization, quantization_form
from pymllm_kernels.w8a8_int8.hopper_decode_launch import PreparedDecode
from pymllm_kernels.w8a8_int8.hopper_decode_tuning import DecodeConfig
from pymllm_kernels.w8a8_int8.hopper_fused_launch import PreparedFused
from pymllm_kernels.w8a8_int8.hopper_fused_tuning import FusedConfig
from pymllm_kernels.w8a8_int8.hopper_layer import HopperLayer
from pymllm_kernels.w8a8_int8.hopper_tuning import AnyConfig, HopperConfig, Plan, plan_launch
from pymllm_kernels.w8a8_int8.layout import W8A8Weight
from pymllm_kernels.w8a8_int8.tunable import HOPPER

# One a layer shape and number of tokens; a server that meets more starts anew.
_MOST_PREPARED = 65536


def specialization(layer: HopperLayer, config: HopperConfig, dependent: bool) -> Specialization:
    """The compiled GEMM that runs a layer with a configuration; equal for many N, K and M.

    Args:
        layer: what it runs.
        config: tile and ring.
        dependent: whether it is launched as the dependent of the quantization.
    """
    shared = config.share != 1
    optional = {
        "x_zero_ptr": "*i32" if layer.zero else None,
        "column_sum_ptr": "*i32" if layer.zero else None,
        "bias_ptr": None if layer.bias is None else pointer_type(layer.bias),
        "part_ptr": "*i32" if shared else None,
        "count_ptr": "*i32" if shared else None,
    }
    signature = {
        "x_desc": _box(torch.int8, config.tokens, config.block_k),
        "weight_desc": _box(torch.int8, config.block_n, config.block_k),
        "out_desc": _box(layer.act, *config.out_block),
        "out_ptr": pointer_type(layer.act),
        "x_scale_ptr": "*fp32",
        "w_scale_ptr": "*fp32",
        **{name: kind for name, kind in optional.items() if kind is not None},
        "stride_om": "i32",
        "whole": "i32",
    }
    constants = {
        **{name: None for name, kind in optional.items() if kind is None},
        "stride_xs": int(not layer.static),
        "stride_ws": int(layer.channel),
        "BLOCK_M": config.block_m,
        "SWAP": config.swap,
        "CONSUMERS": config.consumers,
        "PING_PONG": config.ping_pong,
        "SHARE": shared,
        "MEET": shared and config.meet,
        "SLOTS": config.slots,
        "GROUP_M": config.group_m,
        "STORE_PARTS": config.store_parts,
        "STORE_SLOTS": config.store_slots,
        "REGISTERS": config.registers[1],
        "PDL": dependent,
        "EARLY": config.early,
    }
    # Scales, sums and bias may be views that start anywhere.
    multiples = ["out_ptr", *(("part_ptr", "count_ptr") if shared else ())]
    if layer.n % 16 == 0:
        multiples.append("stride_om")
    way = "whole" if not shared else "meet" if config.meet else "shared"
    odd = "-zero" * layer.zero + "-bias" * (layer.bias is not None)
    return Specialization(
        f"w8a8_int8-hopper-{config.tokens}x{config.block_n}-{way}{odd}",
        w8a8_int8_hopper_kernel,
        signature,
        constants,
        num_warps=4,
        divisible_by_16=tuple(multiples),
        options={
            "maxnreg": config.registers[0],
            "launch_pdl": dependent,
            "launch_cooperative_grid": shared and config.meet,
        },
    )


def launch_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    w_column_sum: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    input_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor | None = None,
    *,
    symmetric: bool,
    config: AnyConfig | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Quantizes ``x [M, K]`` and fills and returns ``out [M, N]``, a new one if absent.

    By two kernels, which overlap for few tokens, or one. On the current device, whose
    current stream is used.

    Args:
        x: bf16 or fp16, any strides.
        weight: int8 ``[N, K]``, K a multiple of 16, contiguous and on 16 bytes.
        w_scale: fp32 ``[N]`` or ``[1]``.
        w_column_sum: int32 ``[N]`` for activations with a zero point.
        input_scale: fp32 ``[1]`` for static activations.
        input_zero: int32 ``[1]`` for static asymmetric activations.
        bias: ``[N]`` or ``None``.
        out: ``[M, N]``, contiguous and on 16 bytes, N a multiple of 8.
        symmetric: whether activations have no zero point.
        config: the compiled form, by rule if absent.
        plan: how tiles are launched, by rule if absent.
    """
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    if x.shape[0] == 0 or weight.shape[0] == 0:
        return out
    given = W8A8Weight(weight, w_scale, w_column_sum, input_scale, input_zero)
    prepared = find(x, given, bias, symmetric, config, plan)
    prepared(x, given, bias, out, raw_stream(x.get_device()))
    return out


def find(
    x: torch.Tensor,
    weight: W8A8Weight,
    bias: torch.Tensor | None,
    symmetric: bool,
    config: AnyConfig | None = None,
    plan: Plan | None = None,
) -> Prepared:
    """What launches a layer for an ``x [M, K]``, M > 0, of these strides and this alignment."""
    m, k = x.shape
    static = weight.input_scale is not None
    zero = weight.input_zero is not None if static else not symmetric
    stride_xm, stride_xk = x.stride()
    # The stride of a single row may be anything.
    strides = (stride_xm if m > 1 else k, stride_xk)
    layer = HopperLayer(
        weight.weight.shape[0], k, x.dtype, weight.scale.numel() > 1, static, zero,
        None if bias is None else bias.dtype,
    )  # fmt: skip
    # A launch is for one thread at a time.
    key = (
        layer, m, strides, x.data_ptr() % 16, x.get_device(), config, plan, state.generation,
        get_ident(),
    )  # fmt: skip
    prepared = _PREPARED.get(key)
    if prepared is None:
        if len(_PREPARED) >= _MOST_PREPARED:
            _PREPARED.clear()
        prepared = _PREPARED[key] = _prepare(layer, m, strides, x, config, plan)
    return prepared


def _prepare(
    layer: HopperLayer, m: int, strides: tuple[int, int], x: torch.Tensor,
    config: AnyConfig | None, plan: Plan | None,
) -> Prepared:  # fmt: skip
    if config is None:
        config = resolve(HOPPER, layer.tuning_key, m, device_facts(x.device)).config
    if isinstance(config, DecodeConfig):
        return PreparedDecode(layer, m, strides, x, config)
    if isinstance(config, FusedConfig):
        return PreparedFused(layer, m, strides, x, config)
    return _PreparedTiles(layer, m, strides, x, config, plan)


class _PreparedTiles:
    """The launches for one shape of a layer and number of tokens, but for the addresses."""

    def __init__(
        self, layer: HopperLayer, m: int, strides: tuple[int, int], x: torch.Tensor,
        config: HopperConfig, plan: Plan | None,
    ) -> None:  # fmt: skip
        n, k, device = layer.n, layer.k, x.device
        if plan is None:
            plan = plan_launch(config, m, n, k, device_facts(device).multiprocessors)
        if plan is None:
            raise ValueError(
                f"config: found {config}, which cannot share the tiles of [{m}, {k}] x {n}"
            )
        self._quantize = Quantization(
            layer, m, strides, x, early=plan.early, counters=plan.counters, parts=plan.parts
        )
        gemm, self._weight = _loaded(layer, compiled_config(config), plan.dependent, device)
        boxes = gemm.described
        self._x = TensorMaps(boxes[0], torch.int8, (m, k), (k, 1))
        self._out = TensorMaps(boxes[2], layer.act, (m, n), (n, 1))
        self._gemm = gemm.bind((self._x, self._weight, self._out), (n, plan.whole))
        self._programs = plan.programs

    def __call__(
        self, x: torch.Tensor, weight: W8A8Weight, bias: torch.Tensor | None, out: torch.Tensor,
        stream: int,
    ) -> None:  # fmt: skip
        codes_of_weight, w_scale, w_column_sum, input_scale, input_zero = weight
        to = out.data_ptr()
        _memory, codes, scale, zero, parts = self._quantize(x, input_scale, input_zero, stream)
        addresses = [to, scale, w_scale.data_ptr(), *zero]
        if w_column_sum is not None and zero:
            addresses.append(w_column_sum.data_ptr())
        if bias is not None:
            addresses.append(bias.data_ptr())
        addresses += parts
        maps = (self._x[codes], self._weight[codes_of_weight.data_ptr()], self._out[to])
        self._gemm(self._programs, stream, maps, addresses)


_PREPARED: dict[tuple[object, ...], Prepared] = {}


@functools.cache
def _loaded(
    layer: HopperLayer, config: HopperConfig, dependent: bool, device: torch.device
) -> tuple[LoadedKernel, TensorMaps]:
    """The GEMM of a form, and the tensor maps of the layer's weight."""
    gemm = _gemm(layer.compiled, config, dependent, device)
    weight = TensorMaps(gemm.described[1], torch.int8, (layer.n, layer.k), (layer.k, 1))
    return gemm, weight


def forms(layer: HopperLayer, config: AnyConfig, m: int, facts: DeviceFacts) -> list[Form]:
    """What a call of a layer with ``m`` rows, each contiguous and on 16 elements, needs compiled."""
    if isinstance(config, DecodeConfig):
        return hopper_decode_launch.forms(layer, config)
    if isinstance(config, FusedConfig):
        return hopper_fused_launch.forms(layer, config, facts.shared_memory)
    plan = plan_launch(config, m, layer.n, layer.k, facts.multiprocessors)
    assert plan is not None
    gemm = (layer.compiled, compiled_config(config), plan.dependent)
    return [
        quantization_form(layer, early=plan.early, counters=plan.counters),
        Form(specialization, gemm),
    ]


@functools.cache
def _gemm(
    layer: HopperLayer, config: HopperConfig, dependent: bool, device: torch.device
) -> LoadedKernel:
    return load(specialization(layer, config, dependent), device)


def _box(dtype: torch.dtype, rows: int, columns: int) -> str:
    return box_type(dtype, [rows, columns], tile_layout(rows, columns, dtype))
