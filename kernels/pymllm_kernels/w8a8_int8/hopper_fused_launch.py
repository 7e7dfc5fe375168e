"""Launches the int8 layer for Hopper whose kernel quantizes up to 8 tokens itself."""

from __future__ import annotations

import functools

import torch

from pymllm_kernels.common.forms import Form
from pymllm_kernels.common.gluon_hopper import tile_layout
from pymllm_kernels.common.launcher import LoadedKernel, TensorMaps, load
from pymllm_kernels.common.specialization import Specialization, box_type, pointer_type
from pymllm_kernels.device import device_facts
from pymllm_kernels.w8a8_int8.hopper_fused import w8a8_int8_fused_hopper
from pymllm_kernels.w8a8_int8.hopper_fused_tuning import EARLY, FusedConfig, chunks_of, why_invalid
from pymllm_kernels.w8a8_int8.hopper_layer import HopperLayer
from pymllm_kernels.w8a8_int8.layout import W8A8Weight

# A multiple of 16 bytes, so that values are loaded by eight.
_EVEN = 8


def specialization(
    layer: HopperLayer, config: FusedConfig, chunks: int, slots: int, even: bool
) -> Specialization:
    """The compiled form that runs a layer with a configuration; equal for many N and K.

    Args:
        layer: what it runs.
        config: of the tile.
        chunks: of K.
        slots: steps of the ring.
        even: whether the values of a token are neighbours, and tokens on 16 bytes.
    """
    optional = {
        "x_scale_ptr": "*fp32" if layer.static else None,
        "x_zero_ptr": "*i32" if layer.static and layer.zero else None,
        "column_sum_ptr": "*i32" if layer.zero else None,
        "bias_ptr": None if layer.bias is None else pointer_type(layer.bias),
    }
    box = (config.block_n, config.block_k)
    signature = {
        "x_ptr": pointer_type(layer.act),
        "weight_desc": box_type(torch.int8, list(box), tile_layout(*box, torch.int8)),
        "w_scale_ptr": "*fp32",
        "out_ptr": pointer_type(layer.act),
        **{name: kind for name, kind in optional.items() if kind is not None},
        "M": "i32",
        "stride_xm": "i64",
        **({} if even else {"stride_xk": "i64"}),
    }
    constants = {
        **({"stride_xk": 1} if even else {}),
        "stride_ws": int(layer.channel),
        "TOKENS": config.block_m,
        "CHUNKS": chunks,
        "EVEN": even,
        "CONSUMERS": config.consumers,
        "SLOTS": slots,
        "EARLY": EARLY,
        "REGISTERS": config.registers[1],
        **{name: None for name, kind in optional.items() if kind is None},
    }
    odd = "-static" * layer.static + "-zero" * layer.zero + "-bias" * (layer.bias is not None)
    return Specialization(
        f"w8a8_int8-fused-{config.block_m}x{config.block_n}{odd}",
        w8a8_int8_fused_hopper,
        signature,
        constants,
        num_warps=4,
        # Scales, sums and bias may be views that start anywhere.
        divisible_by_16=("out_ptr", *(("x_ptr",) if even else ())),
        # As in the quantization kernel, a fused multiply-add would move codes.
        options={"maxnreg": config.registers[0], "enable_fp_fusion": False},
    )


class PreparedFused:
    """The launch for one shape of a layer and number of tokens, but for the addresses."""

    def __init__(
        self, layer: HopperLayer, m: int, strides: tuple[int, int], x: torch.Tensor,
        config: FusedConfig,
    ) -> None:  # fmt: skip
        """See ``hopper_launch.launch_linear``.

        Raises:
            ValueError: the configuration does not take the layer or the tokens.
        """
        facts = device_facts(x.device)
        reason = why_invalid(config, m, layer.k, facts.shared_memory)
        if reason is not None:
            raise ValueError(f"config: {reason}")
        even = x.data_ptr() % 16 == 0 and strides[0] % _EVEN == 0 and strides[1] == 1
        chunks, slots = chunks_of(layer.k), config.slots(layer.k, facts.shared_memory)
        kernel = _kernel(layer.compiled, config, chunks, slots, even, x.device)
        self._weight = TensorMaps(kernel.described[0], torch.int8, (layer.n, layer.k), (layer.k, 1))
        sizes = (m, *(strides[:1] if even else strides))
        self._launch = kernel.bind((self._weight,), sizes)
        self._programs = config.programs(layer.n, facts.multiprocessors)
        self._static, self._zero = layer.static, layer.zero

    def __call__(
        self, x: torch.Tensor, weight: W8A8Weight, bias: torch.Tensor | None, out: torch.Tensor,
        stream: int,
    ) -> None:  # fmt: skip
        """Launches on the current device."""
        codes_of_weight, w_scale, w_column_sum, input_scale, input_zero = weight
        addresses = [x.data_ptr()]
        if self._static:
            assert input_scale is not None
            addresses.append(input_scale.data_ptr())
            if self._zero:
                assert input_zero is not None
                addresses.append(input_zero.data_ptr())
        addresses.append(w_scale.data_ptr())
        if self._zero:
            assert w_column_sum is not None
            addresses.append(w_column_sum.data_ptr())
        if bias is not None:
            addresses.append(bias.data_ptr())
        addresses.append(out.data_ptr())
        maps = (self._weight[codes_of_weight.data_ptr()],)
        self._launch(self._programs, stream, maps, addresses)


def forms(layer: HopperLayer, config: FusedConfig, shared_memory: int) -> list[Form]:
    """What a call of a layer with rows that are contiguous and on 16 bytes needs compiled."""
    form = (layer.compiled, config, chunks_of(layer.k), config.slots(layer.k, shared_memory), True)
    return [Form(specialization, form)]


@functools.cache
def _kernel(
    layer: HopperLayer, config: FusedConfig, chunks: int, slots: int, even: bool,
    device: torch.device,
) -> LoadedKernel:  # fmt: skip
    return load(specialization(layer, config, chunks, slots, even), device)
