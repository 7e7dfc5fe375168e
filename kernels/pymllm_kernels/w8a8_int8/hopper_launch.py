"""Launches of the Hopper int8 layer: the quantization of the activation, then the GEMM."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from pymllm_kernels.common.cuda import raw_stream
from pymllm_kernels.common.forms import Form
from pymllm_kernels.common.gluon_hopper import tile_layout
from pymllm_kernels.common.launcher import LoadedKernel, TensorMaps, load
from pymllm_kernels.common.sharing import compiled_config
from pymllm_kernels.common.specialization import Specialization, box_type, pointer_type
from pymllm_kernels.device import device_facts
from pymllm_kernels.per_token_quant_int8 import launch as quant
from pymllm_kernels.tuning import TuningKey, resolve, state
from pymllm_kernels.w8a8_int8.hopper import w8a8_int8_hopper_kernel
from pymllm_kernels.w8a8_int8.hopper_tuning import HopperConfig, Plan, plan_launch
from pymllm_kernels.w8a8_int8.tunable import HOPPER, hopper_key

# One a layer shape and number of tokens; a server that meets more starts anew.
_MOST_PREPARED = 65536
_ALIGNMENT = 256


class HopperLayer(NamedTuple):
    """What of a layer its compiled kernels and its launches depend on.

    Attributes:
        n: output features.
        k: input features.
        act: dtype of the activations and outputs.
        channel: whether there is a weight scale for each output feature, or one.
        static: whether the scale of the activations is given.
        zero: whether activations have a zero point.
        bias: dtype of the bias, ``None`` for none.
    """

    n: int
    k: int
    act: torch.dtype
    channel: bool = True
    static: bool = False
    zero: bool = False
    bias: torch.dtype | None = None

    @property
    def compiled(self) -> HopperLayer:
        """The part that is compiled in: layers with equal ones share their kernels."""
        return self._replace(n=self.n % 16, k=0)

    @property
    def tuning_key(self) -> TuningKey:
        """Under which its configurations are stored."""
        return hopper_key(self.n, self.k, self.act, symmetric=not self.zero, static=self.static)


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
    out: torch.Tensor,
    *,
    symmetric: bool,
    config: HopperConfig | None = None,
    plan: Plan | None = None,
) -> None:
    """Quantizes ``x [M, K]`` and fills ``out [M, N]``: two kernels, which overlap for few tokens.

    On the current device, whose current stream is used.

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
        plan: how it is launched, by rule if absent.
    """
    m, k = x.shape
    n = weight.shape[0]
    if m == 0 or n == 0:
        return
    static = input_scale is not None
    zero = input_zero is not None if static else not symmetric
    # The stride of a single row may be anything.
    strides = (x.stride(0) if m > 1 else k, x.stride(1))
    key = (
        x.dtype, w_scale.numel() > 1, static, zero, None if bias is None else bias.dtype, n, k, m,
        strides, x.data_ptr() % 16, x.get_device(), config, plan, state.generation,
    )  # fmt: skip
    prepared = _PREPARED.get(key)
    if prepared is None:
        layer = HopperLayer(n, k, x.dtype, key[1], static, zero, key[4])
        if len(_PREPARED) >= _MOST_PREPARED:
            _PREPARED.clear()
        prepared = _PREPARED[key] = _Prepared(layer, m, strides, x, config, plan)
    prepared(x, weight, w_scale, w_column_sum, input_scale, input_zero, bias, out)


class _Prepared:
    """The launches for one shape of a layer and number of tokens, but for the addresses."""

    def __init__(
        self, layer: HopperLayer, m: int, strides: tuple[int, int], x: torch.Tensor,
        config: HopperConfig | None, plan: Plan | None,
    ) -> None:  # fmt: skip
        n, k, device = layer.n, layer.k, x.device
        facts = device_facts(device)
        if config is None:
            config = resolve(HOPPER, layer.tuning_key, m, facts).config
        if plan is None:
            plan = plan_launch(config, m, n, k, facts.multiprocessors)
        if plan is None:
            raise ValueError(
                f"config: found {config}, which cannot share the tiles of [{m}, {k}] x {n}"
            )
        form = quant.form_of(
            layer.act, k, *strides, x.data_ptr(), static=layer.static, zero=layer.zero,
            counters=plan.counters > 0, pdl=plan.early,
        )  # fmt: skip
        self._quantize = quant.loaded(form, device)
        taken = (strides[0],) if form.contiguous else strides
        self._quantize_sizes = (k, *taken, k, plan.counters)
        self._gemm, self._weight = _loaded(layer, compiled_config(config), plan.dependent, device)
        boxes = self._gemm.described
        self._x = TensorMaps(boxes[0], torch.int8, (m, k), (k, 1))
        self._out = TensorMaps(boxes[2], layer.act, (m, n), (n, 1))
        self._sizes = (n, plan.whole)
        self._m, self._programs, self._index = m, plan.programs, device.index
        self._static, self._zero = layer.static, layer.zero
        # One allocation for what lives between the two kernels and inside the second.
        self._at_scale = _aligned(m * k)
        self._at_zero = self._at_scale + _aligned(0 if layer.static else 4 * m)
        dynamic_zero = layer.zero and not layer.static
        self._at_counters = self._at_zero + _aligned(4 * m if dynamic_zero else 0)
        self._at_parts = self._at_counters + _aligned(4 * plan.counters)
        self._bytes = self._at_parts + 4 * plan.parts
        self._shared = plan.parts > 0

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor,
        w_column_sum: torch.Tensor | None, input_scale: torch.Tensor | None,
        input_zero: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor,
    ) -> None:  # fmt: skip
        # Torch hands freed memory out again to later work of the stream only.
        workspace = x.new_empty(self._bytes, dtype=torch.uint8)
        codes, to = workspace.data_ptr(), out.data_ptr()
        scale = codes + self._at_scale if input_scale is None else input_scale.data_ptr()
        zeros: tuple[int, ...] = ()
        if self._zero:
            zeros = (codes + self._at_zero if input_zero is None else input_zero.data_ptr(),)
        counters = (codes + self._at_counters,) if self._shared else ()
        stream = raw_stream(self._index)
        self._quantize.launch(
            self._m, stream, (),
            (x.data_ptr(), codes, scale, *zeros, *counters, *self._quantize_sizes),
        )  # fmt: skip
        addresses = [to, scale, w_scale.data_ptr(), *zeros]
        if w_column_sum is not None and self._zero:
            addresses.append(w_column_sum.data_ptr())
        if bias is not None:
            addresses.append(bias.data_ptr())
        if self._shared:
            # Counters of this call alone: captured graphs may run beside each other.
            addresses += (codes + self._at_parts, *counters)
        maps = (self._x.at(codes), self._weight.at(weight.data_ptr()), self._out.at(to))
        self._gemm.launch(self._programs, stream, maps, (*addresses, *self._sizes))


_PREPARED: dict[tuple[object, ...], _Prepared] = {}


@functools.cache
def _loaded(
    layer: HopperLayer, config: HopperConfig, dependent: bool, device: torch.device
) -> tuple[LoadedKernel, TensorMaps]:
    """The GEMM of a form, and the tensor maps of the layer's weight."""
    gemm = _gemm(layer.compiled, config, dependent, device)
    weight = TensorMaps(gemm.described[1], torch.int8, (layer.n, layer.k), (layer.k, 1))
    return gemm, weight


def forms(layer: HopperLayer, config: HopperConfig, m: int, multiprocessors: int) -> list[Form]:
    """What a call of a layer with ``m`` rows, each contiguous and on 16 elements, needs compiled."""
    plan = plan_launch(config, m, layer.n, layer.k, multiprocessors)
    assert plan is not None
    quantization = quant.form_of(
        layer.act, layer.k, layer.k, 1, 0, static=layer.static, zero=layer.zero,
        counters=plan.counters > 0, pdl=plan.early,
    )  # fmt: skip
    gemm = (layer.compiled, compiled_config(config), plan.dependent)
    return [Form(quant.specialization, (quantization,)), Form(specialization, gemm)]


@functools.cache
def _gemm(
    layer: HopperLayer, config: HopperConfig, dependent: bool, device: torch.device
) -> LoadedKernel:
    return load(specialization(layer, config, dependent), device)


def _box(dtype: torch.dtype, rows: int, columns: int) -> str:
    return box_type(dtype, [rows, columns], tile_layout(rows, columns, dtype))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
