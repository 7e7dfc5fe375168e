"""Launches the W4A16 kernels for Hopper."""

from __future__ import annotations

import functools
from dataclasses import replace
from threading import get_ident
from typing import NamedTuple, TypeGuard

import torch
from triton.experimental.gluon import language as gl

from pymllm_kernels.common import cuda
from pymllm_kernels.common.cuda import raw_stream
from pymllm_kernels.common.eager import Prepared
from pymllm_kernels.common.forms import Form
from pymllm_kernels.common.gluon_hopper import GLUON_DTYPE, tile_layout
from pymllm_kernels.common.launcher import LoadedKernel, TensorMaps, load
from pymllm_kernels.common.sharing import HAND_ON, compiled_config
from pymllm_kernels.common.specialization import Specialization, box_type, pointer_type
from pymllm_kernels.common.workspace import counters
from pymllm_kernels.device import device_facts
from pymllm_kernels.gather_inputs import launch as gather
from pymllm_kernels.gather_inputs.launch import PreparedGather
from pymllm_kernels.tuning import TuningKey, resolve, state
from pymllm_kernels.w4a16 import hopper_decode_launch
from pymllm_kernels.w4a16.api import W4A16Weight
from pymllm_kernels.w4a16.hopper import w4a16_gemm_hopper
from pymllm_kernels.w4a16.hopper_decode_launch import PreparedDecode
from pymllm_kernels.w4a16.hopper_decode_tuning import DecodeConfig
from pymllm_kernels.w4a16.hopper_tuning import (
    CONSUMER_REGISTERS,
    HopperConfig,
    HopperForm,
    joined,
    plan,
)
from pymllm_kernels.w4a16.tunable import HOPPER, hopper_key

_ONE_GROUP = 2**30
# Registers of a thread at launch, by the number of consumers: 65,536 over 12, 16 or 20 warps.
_LAUNCH_REGISTERS = {2: 168, 3: 128, 4: 96}
# One a layer shape and number of tokens; a server that meets more starts anew.
_MOST_PREPARED = 65536


def form_of(
    block_k: int,
    group_size: int,
    act: torch.dtype,
    scale: torch.dtype,
    symmetric: bool,
    bits: int = 4,
    act_order: bool = False,
) -> HopperForm:
    """The form of a layer."""
    runs = 1 if group_size == -1 or group_size >= block_k else block_k // group_size
    parameters = scale.itemsize + (not symmetric)
    bf16 = act == torch.bfloat16
    return HopperForm(block_k, runs, parameters, act == scale, bits, act_order, bf16)


class HopperLayer(NamedTuple):
    """What of a layer its compiled kernels and its launches depend on.

    Attributes:
        n: output features.
        k: input features.
        block_k: block of the weight layout, 64 or 128.
        group_size: inputs a scale, -1 for one scale a row.
        act: dtype of the activations.
        scale: dtype of the scales.
        zero: whether there are zero points.
        bias: dtype of the bias, ``None`` for none.
        act_order: whether activations are put in the order of the weight's columns first.
        bits: of a code, 4 or 8.
    """

    n: int
    k: int
    block_k: int
    group_size: int
    act: torch.dtype
    scale: torch.dtype
    zero: bool
    bias: torch.dtype | None
    act_order: bool = False
    bits: int = 4

    @property
    def form(self) -> HopperForm:
        """What the choice of the configuration depends on."""
        return form_of(
            self.block_k, self.group_size, self.act, self.scale, not self.zero, self.bits,
            self.act_order,
        )  # fmt: skip

    @property
    def compiled(self) -> HopperLayer:
        """The part that is compiled in: layers with equal ones share their kernels."""
        return self._replace(n=0, k=0)

    @property
    def tuning_key(self) -> TuningKey:
        """Under which its configurations are stored."""
        return hopper_key(
            self.n, self.k, self.group_size, self.act, self.scale, not self.zero, self.bits,
            self.act_order,
        )  # fmt: skip

    @property
    def words(self) -> int:
        """16-bit words of a row of a block."""
        return self.block_k * self.bits // 16

    @property
    def groups(self) -> int:
        """Rows of scales."""
        return 1 if self.group_size == -1 else self.k // self.group_size


def specialization(layer: HopperLayer, config: HopperConfig) -> Specialization:
    """The compiled form that runs a layer with a configuration; equal for many N, K and M."""
    slice_k = layer.block_k // 4
    parts = config.share != 1
    hand_on = config.share == HAND_ON
    shared = parts and not hand_on
    pointer = pointer_type(layer.act)
    optional = {
        "zero_desc": _row_type(torch.int8, config.scales_n) if layer.zero else None,
        "out_desc": (
            _tile_type(layer.act, config.block_m // config.out_parts, config.rows)
            if config.out_parts
            else None
        ),
        "bias_ptr": None if layer.bias is None else pointer_type(layer.bias),
        "part_ptr": "*fp32" if parts else None,
        "count_ptr": "*i32" if parts else None,
    }
    sizes = ("M", "N", "groups", "tiles_m", "tiles_n", "whole", "steps", "stride_om")
    signature = {
        "x_desc": _tile_type(layer.act, config.block_m, 2 * slice_k),
        "weight_desc": _tile_type(torch.int16, config.weight_box_n, layer.words),
        "scale_desc": _row_type(layer.scale, config.scales_n),
        "out_ptr": pointer,
        **{name: kind for name, kind in optional.items() if kind is not None},
        **dict.fromkeys(sizes, "i32"),
    }
    constants = {
        "BITS": layer.bits,
        "GROUP_SIZE": _ONE_GROUP if layer.group_size == -1 else layer.group_size,
        "SLICE_K": slice_k,
        "RUNS": layer.form.runs,
        "HALF": GLUON_DTYPE[layer.act],
        "SCALE": layer.form.scale(config.block_m),
        "BLOCK_M": config.block_m,
        "ROWS": config.rows,
        "CONSUMERS": config.consumers,
        "SLOTS": config.slots,
        "SPAN": config.span,
        "GROUP_M": config.group_m,
        "OUT_PARTS": config.out_parts,
        "SHARE": shared,
        "HAND_ON": hand_on,
        "MEET": shared and config.meet,
        "JOIN": joined(config, layer.form),
        "REGISTERS": CONSUMER_REGISTERS[config.consumers],
        "DEPENDENT": layer.act_order,
        "EARLY": 0 if layer.act_order or (parts and layer.bits == 8) else config.early,
    }
    return Specialization(
        f"w{layer.bits}a16-hopper-{config.block_m}x{config.block_n}{'-shared' * shared}"
        f"{'-handed' * hand_on}{'-act-order' * layer.act_order}",
        w4a16_gemm_hopper,
        signature,
        {**constants, **{name: None for name, kind in optional.items() if kind is None}},
        num_warps=4,
        # A bias may be a view that starts anywhere; rows of the output are multiples of 16 features.
        divisible_by_16=(
            *(name for name in signature if name.endswith("_ptr") and name != "bias_ptr"),
            "stride_om",
        ),
        options={
            "maxnreg": _LAUNCH_REGISTERS[config.consumers],
            "launch_cooperative_grid": shared and config.meet,
            "launch_pdl": layer.act_order,
        },
    )


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor | None = None,
    *,
    group_size: int,
    perm: torch.Tensor | None = None,
    bits: int = 4,
    config: HopperConfig | DecodeConfig | None = None,
) -> torch.Tensor:
    """Fills a contiguous ``out [M, N]``, a new one if absent, from ``x [M, K]`` on the current device.

    Whether the layer fits is the caller's duty. An ``x`` that the kernels cannot read (rows not
    contiguous or not on 16 bytes) is copied first. ``perm`` int32 ``[K]``: the input at each column of
    the weight, ``None`` for their order.
    """
    n = weight.shape[1]
    if out is None:
        out = x.new_empty(x.shape[0], n)
    if x.shape[0] == 0:
        return out
    given = W4A16Weight(weight, scale, zero, None, perm)
    prepared = find(x, given, bias, group_size, bits, config)
    if prepared is None:
        x = x.clone(memory_format=torch.contiguous_format)
        prepared = find(x, given, bias, group_size, bits, config)
        assert prepared is not None
    prepared(x, given, bias, out, raw_stream(x.get_device()))
    return out


def find(
    x: torch.Tensor,
    weight: W4A16Weight,
    bias: torch.Tensor | None,
    group_size: int,
    bits: int = 4,
    config: HopperConfig | DecodeConfig | None = None,
) -> Prepared | None:
    """What launches a layer for an ``x [M, K]``, M > 0, of these strides and this alignment.

    ``None`` if the kernels cannot read such an ``x``.
    """
    m, k = x.shape
    _, n, words = weight.weight.shape
    stride_xm, stride_xk = x.stride()
    # The stride of a single row may be anything.
    strides = (stride_xm if m > 1 else k, stride_xk)
    aligned = x.data_ptr() % 16 == 0
    act_order = weight.input_perm is not None
    if not act_order and not (aligned and stride_xk == 1 and strides[0] % 8 == 0):
        return None
    layer = HopperLayer(
        n, k, words * 16 // bits, group_size, x.dtype, weight.scale.dtype, weight.zero is not None,
        None if bias is None else bias.dtype, act_order, bits,
    )  # fmt: skip
    # A launch is for one thread at a time.
    key = (layer, m, strides, aligned, x.get_device(), config, state.generation, get_ident())
    prepared = _PREPARED.get(key)
    if prepared is None:
        if len(_PREPARED) >= _MOST_PREPARED:
            _PREPARED.clear()
        prepared = _PREPARED[key] = _prepare(layer, m, strides, aligned, x.device, config)
    return prepared


def _prepare(
    layer: HopperLayer, m: int, strides: tuple[int, int], aligned: bool, device: torch.device,
    config: HopperConfig | DecodeConfig | None,
) -> Prepared:  # fmt: skip
    if config is None:
        config = resolve(HOPPER, layer.tuning_key, m, device_facts(device)).config
    stride_xm = layer.k if layer.act_order else strides[0]
    if layer.act_order and _kept(config) and not (aligned and strides[1] == 1):
        # Any other strides and places are what the gathering reads.
        config = replace(config, keep=False)
    prepare = PreparedDecode if isinstance(config, DecodeConfig) else _PreparedTiles
    gemm: Prepared = prepare(layer, m, stride_xm, device, config)  # type: ignore[arg-type]
    if layer.act_order and not _kept(config):
        gather_inputs = PreparedGather(layer.act, m, layer.k, strides, aligned, device)
        return _GatheredFirst(gather_inputs, gemm)
    return gemm


def _kept(config: HopperConfig | DecodeConfig) -> TypeGuard[DecodeConfig]:
    """Whether the one token is kept in shared memory, and put in order there."""
    return isinstance(config, DecodeConfig) and config.keep


def _beside_the_gathering(layer: HopperLayer, config: HopperConfig) -> HopperLayer:
    """The layer as it is compiled: whether the kernel starts while activations are gathered.

    With many tokens waiting programs would hold the registers that the gathering needs.
    """
    compiled = layer.compiled
    return compiled if config.block_m <= 64 else compiled._replace(act_order=False)


class _GatheredFirst(NamedTuple):
    """The launches of a layer in act-order, but for what the kernel for few tokens puts in order itself.

    A kernel before the GEMM puts x in order: TMA reads neighbours, and in the kernel for few tokens each
    multiprocessor would gather all of x.
    """

    gather_inputs: PreparedGather
    gemm: Prepared

    def __call__(
        self, x: torch.Tensor, weight: W4A16Weight, bias: torch.Tensor | None, out: torch.Tensor,
        stream: int,
    ) -> None:  # fmt: skip
        assert weight.input_perm is not None
        x = self.gather_inputs(x, weight.input_perm, stream)
        self.gemm(x, weight, bias, out, stream)


class _PreparedTiles:
    """A launch for one shape of a layer and number of tokens, but for the addresses."""

    def __init__(
        self, layer: HopperLayer, m: int, stride_xm: int, device: torch.device, config: HopperConfig
    ) -> None:
        n, k = layer.n, layer.k
        grid = plan(config, m, n, k, layer.form, device_facts(device).multiprocessors)
        if grid is None:
            raise ValueError(
                f"config: found {config}, which cannot share the tiles of [{m}, {k}] x {n}"
            )
        kernel, (weight, scale, zero) = _loaded(layer, compiled_config(config), device)
        boxes = kernel.described
        self._x = TensorMaps(boxes[0], layer.act, (m, k), (stride_xm, 1))
        self._weight, self._scale, self._zero = weight, scale, zero
        self._out = None
        if config.out_parts:
            self._out = TensorMaps(boxes[-1], layer.act, (m, n), (n, 1))
        self._device = device
        self._programs = grid.programs
        self._part_elements = grid.part_elements(config)
        maps = [one for one in (self._x, weight, scale, zero, self._out) if one is not None]
        sizes = (m, n, layer.groups, grid.tiles_m, grid.tiles_n, grid.whole, grid.steps, n)
        self._launch = kernel.bind(maps, sizes)

    def __call__(
        self, x: torch.Tensor, weight: W4A16Weight, bias: torch.Tensor | None, out: torch.Tensor,
        stream: int,
    ) -> None:  # fmt: skip
        words, scale, zero, _, _ = weight
        to = out.data_ptr()
        maps = [
            self._x[x.data_ptr()],
            self._weight[words.data_ptr()],
            self._scale[scale.data_ptr()],
        ]
        if zero is not None:
            assert self._zero is not None
            maps.append(self._zero[zero.data_ptr()])
        if self._out is not None:
            maps.append(self._out[to])
        addresses = [to]
        if bias is not None:
            addresses.append(bias.data_ptr())
        if self._part_elements:
            # Kept alive by the stream's order: torch hands it out again to later work only.
            part = cuda.empty((self._part_elements,), (1,), torch.float32)
            addresses += (part.data_ptr(), counters(self._device).data_ptr())
        self._launch(self._programs, stream, maps, addresses)


_PREPARED: dict[tuple[object, ...], Prepared] = {}


@functools.cache
def _loaded(
    layer: HopperLayer, config: HopperConfig, device: torch.device
) -> tuple[LoadedKernel, tuple[TensorMaps, TensorMaps, TensorMaps | None]]:
    """The kernel of a form, and the tensor maps of the layer's own tensors."""
    kernel = _kernel(_beside_the_gathering(layer, config), config, device)
    blocks, rows = -(-layer.k // layer.block_k) * layer.n, layer.groups * layer.n
    boxes = kernel.described
    weight = TensorMaps(boxes[1], torch.int16, (blocks, layer.words), (layer.words, 1))
    scale = TensorMaps(boxes[2], layer.scale, (rows,), (1,))
    zero = TensorMaps(boxes[3], torch.int8, (rows,), (1,)) if layer.zero else None
    return kernel, (weight, scale, zero)


def forms(layer: HopperLayer, config: HopperConfig | DecodeConfig) -> list[Form]:
    """What a call of a layer with a configuration needs compiled, of rows contiguous and on 16 bytes."""
    if isinstance(config, DecodeConfig):
        gemm = hopper_decode_launch.form(layer, config)
    else:
        compiled = _beside_the_gathering(layer, config)
        gemm = Form(specialization, (compiled, compiled_config(config)))
    gathered = layer.act_order and not _kept(config)
    return [gather.form(layer.act, layer.k), gemm] if gathered else [gemm]


@functools.cache
def _kernel(layer: HopperLayer, config: HopperConfig, device: torch.device) -> LoadedKernel:
    return load(specialization(layer, config), device)


def _tile_type(dtype: torch.dtype, rows: int, columns: int) -> str:
    return box_type(dtype, [rows, columns], tile_layout(rows, columns, dtype))


def _row_type(dtype: torch.dtype, columns: int) -> str:
    # Of a row of scales or zero points.
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * dtype.itemsize, rank=1)
    return box_type(dtype, [columns], layout)
