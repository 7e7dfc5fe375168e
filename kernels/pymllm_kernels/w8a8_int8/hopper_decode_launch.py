"""Launches the int8 layer for few tokens on Hopper."""

from __future__ import annotations

import functools

import torch

from pymllm_kernels.common.forms import Form
from pymllm_kernels.common.launcher import LoadedKernel, load
from pymllm_kernels.common.specialization import Specialization, pointer_type
from pymllm_kernels.device import device_facts
from pymllm_kernels.w8a8_int8.hopper_codes import Quantization, quantization_form
from pymllm_kernels.w8a8_int8.hopper_decode import w8a8_int8_decode_hopper
from pymllm_kernels.w8a8_int8.hopper_decode_tuning import DecodeConfig, why_invalid
from pymllm_kernels.w8a8_int8.hopper_layer import HopperLayer
from pymllm_kernels.w8a8_int8.layout import W8A8Weight


def specialization(layer: HopperLayer, config: DecodeConfig) -> Specialization:
    """The compiled form that runs a layer with a configuration; equal for many N, K and M."""
    optional = {
        "x_zero_ptr": "*i32" if layer.zero else None,
        "column_sum_ptr": "*i32" if layer.zero else None,
        "bias_ptr": None if layer.bias is None else pointer_type(layer.bias),
    }
    signature = {
        "x_ptr": "*i8",
        "weight_ptr": "*i8",
        "x_scale_ptr": "*fp32",
        "w_scale_ptr": "*fp32",
        "out_ptr": pointer_type(layer.act),
        **{name: kind for name, kind in optional.items() if kind is not None},
        **dict.fromkeys(("M", "N", "K"), "i32"),
    }
    constants = {
        "stride_xs": int(not layer.static),
        "stride_ws": int(layer.channel),
        "ROWS": config.rows,
        "TILES": config.tiles,
        "PLACES": config.places,
        "WARPS": config.warps,
    }
    odd = "-static" * layer.static + "-zero" * layer.zero + "-bias" * (layer.bias is not None)
    return Specialization(
        f"w8a8_int8-decode-{config.block_m}x{config.rows}{odd}",
        w8a8_int8_decode_hopper,
        signature,
        {**constants, **{name: None for name, kind in optional.items() if kind is None}},
        num_warps=config.warps,
        # Scales, sums and bias may be views that start anywhere.
        divisible_by_16=("x_ptr", "weight_ptr", "out_ptr", "K"),
        # A multiprocessor's registers over 16 warps.
        options={"maxnreg": 128, "launch_pdl": True},
    )


class PreparedDecode:
    """The launches for one shape of a layer and number of tokens, but for the addresses."""

    def __init__(
        self, layer: HopperLayer, m: int, strides: tuple[int, int], x: torch.Tensor,
        config: DecodeConfig,
    ) -> None:  # fmt: skip
        """See ``hopper_launch.launch_linear``.

        Raises:
            ValueError: the configuration does not take the layer or the tokens.
        """
        facts = device_facts(x.device)
        reason = why_invalid(config, m, facts.shared_memory)
        if reason is not None:
            raise ValueError(f"config: {reason}")
        self._quantize = Quantization(layer, m, strides, x, early=True)
        sizes = (m, layer.n, layer.k)
        self._launch = _kernel(layer.compiled, config, x.device).bind(sizes=sizes)
        self._programs = config.programs(layer.n, facts.multiprocessors)
        self._zero = layer.zero

    def __call__(
        self, x: torch.Tensor, weight: W8A8Weight, bias: torch.Tensor | None, out: torch.Tensor,
        stream: int,
    ) -> None:  # fmt: skip
        """Launches on the current device."""
        codes_of_weight, w_scale, w_column_sum, input_scale, input_zero = weight
        _memory, codes, scale, zero, _ = self._quantize(x, input_scale, input_zero, stream)
        addresses = [codes, codes_of_weight.data_ptr(), scale, w_scale.data_ptr(), *zero]
        if self._zero:
            assert w_column_sum is not None
            addresses.append(w_column_sum.data_ptr())
        if bias is not None:
            addresses.append(bias.data_ptr())
        addresses.append(out.data_ptr())
        self._launch(self._programs, stream, (), addresses)


def forms(layer: HopperLayer, config: DecodeConfig) -> list[Form]:
    """What a call of a layer with rows that are contiguous and on 16 elements needs compiled."""
    return [quantization_form(layer, early=True), Form(specialization, (layer.compiled, config))]


@functools.cache
def _kernel(layer: HopperLayer, config: DecodeConfig, device: torch.device) -> LoadedKernel:
    return load(specialization(layer, config), device)
