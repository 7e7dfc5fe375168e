"""Launches the int8 layer for one token on Hopper."""

from __future__ import annotations

import functools

import torch

from pymllm_kernels.common.cuda import raw_stream
from pymllm_kernels.common.forms import Form
from pymllm_kernels.common.launcher import LoadedKernel, load
from pymllm_kernels.common.specialization import Specialization, pointer_type
from pymllm_kernels.device import device_facts
from pymllm_kernels.w8a8_int8.hopper_decode import w8a8_int8_decode_hopper
from pymllm_kernels.w8a8_int8.hopper_decode_tuning import DecodeConfig, why_invalid
from pymllm_kernels.w8a8_int8.hopper_layer import HopperLayer


def specialization(layer: HopperLayer, config: DecodeConfig) -> Specialization:
    """The compiled form that runs a layer with a configuration; equal for all N and K."""
    optional = {
        "x_scale_ptr": "*fp32" if layer.static else None,
        "x_zero_ptr": "*i32" if layer.zero and layer.static else None,
        "column_sum_ptr": "*i32" if layer.zero else None,
        "bias_ptr": None if layer.bias is None else pointer_type(layer.bias),
    }
    signature = {
        "x_ptr": pointer_type(layer.act),
        "weight_ptr": "*i8",
        "w_scale_ptr": "*fp32",
        "out_ptr": pointer_type(layer.act),
        **{name: kind for name, kind in optional.items() if kind is not None},
        **dict.fromkeys(("N", "K"), "i32"),
    }
    constants = {
        "stride_ws": int(layer.channel),
        "ROWS": config.rows,
        "PLACES": config.places,
        "WARPS": config.warps,
    }
    odd = "-static" * layer.static + "-zero" * layer.zero + "-bias" * (layer.bias is not None)
    return Specialization(
        f"w8a8_int8-decode-{config.rows}{odd}",
        w8a8_int8_decode_hopper,
        signature,
        {**constants, **{name: None for name, kind in optional.items() if kind is None}},
        num_warps=config.warps,
        # Scales, sums and bias may be views that start anywhere.
        divisible_by_16=("x_ptr", "weight_ptr", "out_ptr", "K"),
        # A multiprocessor's registers over 16 warps. As in the quantization kernel, a fused
        # multiply-add would move codes.
        options={"maxnreg": 128, "enable_fp_fusion": False},
    )


class PreparedDecode:
    """A launch for one shape of a layer, but for the addresses."""

    def __init__(self, layer: HopperLayer, device: torch.device, config: DecodeConfig) -> None:
        """See ``hopper_launch.launch_linear``.

        Raises:
            ValueError: the configuration cannot be launched.
        """
        facts = device_facts(device)
        reason = why_invalid(config, 1, facts.shared_memory)
        if reason is not None:
            raise ValueError(f"config: {reason}")
        self._kernel = _kernel(layer.compiled, config, device)
        self._programs = config.programs(layer.n, facts.multiprocessors)
        self._sizes = (layer.n, layer.k)
        self._index = device.index
        self._zero = layer.zero

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor,
        w_column_sum: torch.Tensor | None, input_scale: torch.Tensor | None,
        input_zero: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor,
    ) -> None:  # fmt: skip
        """Launches on the current device and stream."""
        if x.data_ptr() % 16 or x.stride(1) != 1:
            # Loads of 16 bytes.
            x = x.clone(memory_format=torch.contiguous_format)
        sums = w_column_sum if self._zero else None
        given = (x, weight, input_scale, w_scale, input_zero, sums, bias, out)
        addresses = [tensor.data_ptr() for tensor in given if tensor is not None]
        stream = raw_stream(self._index)
        self._kernel.launch(self._programs, stream, (), (*addresses, *self._sizes))


def forms(layer: HopperLayer, config: DecodeConfig) -> list[Form]:
    """What a call of a layer with one token, contiguous and on 16 bytes, needs compiled."""
    return [Form(specialization, (layer.compiled, config))]


@functools.cache
def _kernel(layer: HopperLayer, config: DecodeConfig, device: torch.device) -> LoadedKernel:
    return load(specialization(layer, config), device)
