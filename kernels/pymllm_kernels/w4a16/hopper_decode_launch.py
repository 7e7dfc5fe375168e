"""Launches the W4A16 kernel for few tokens on Hopper."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from pymllm_kernels.common.forms import Form
from pymllm_kernels.common.gluon_hopper import GLUON_DTYPE
from pymllm_kernels.common.launcher import LoadedKernel, load
from pymllm_kernels.common.row_block_config import ROW_BLOCK
from pymllm_kernels.common.specialization import Specialization, pointer_type
from pymllm_kernels.device import device_facts
from pymllm_kernels.w4a16.hopper_decode import w4a16_decode_hopper
from pymllm_kernels.w4a16.hopper_decode_tuning import DecodeConfig, why_invalid

if TYPE_CHECKING:
    from pymllm_kernels.w4a16.api import W4A16Weight
    from pymllm_kernels.w4a16.hopper_launch import HopperLayer

_ONE_GROUP = 2**30
# A bias may be a view that starts anywhere.
_ALIGNED = ("x_ptr", "perm_ptr", "weight_ptr", "scale_ptr", "out_ptr")


def specialization(layer: HopperLayer, config: DecodeConfig, row: int) -> Specialization:
    """The compiled form that runs a layer with a configuration; equal for all N, M and K of a row.

    ``row``: of ``DecodeConfig.row``. In act-order 0 stands for tokens that a kernel puts in order which it
    starts beside.
    """
    beside = layer.act_order and not row
    optional = {
        "perm_ptr": "*i32" if row and layer.act_order else None,
        "zero_ptr": "*i8" if layer.zero else None,
        "bias_ptr": None if layer.bias is None else pointer_type(layer.bias),
    }
    signature = {
        "x_ptr": pointer_type(layer.act),
        "weight_ptr": "*i16",
        "scale_ptr": pointer_type(layer.scale),
        "out_ptr": pointer_type(layer.act),
        **{name: kind for name, kind in optional.items() if kind is not None},
        **dict.fromkeys(("M", "N", "K", "groups", "stride_x8", "share", "more"), "i32"),
    }
    constants = {
        "HALF": GLUON_DTYPE[layer.act],
        "GROUP_SIZE": _ONE_GROUP if layer.group_size == -1 else layer.group_size,
        "RUNS": layer.form.runs,
        "ROWS": config.rows,
        "MIX": config.mix,
        "PLACES": config.places,
        "TILES": config.tiles,
        "DEPENDENT": beside,
        "ROW": row,
        "WARPS": config.warps,
        "ROW_WARPS": config.row_warps,
    }
    return Specialization(
        f"w4a16-decode-{config.name}{'-act-order' * layer.act_order}{f'-{row}' if row else ''}",
        w4a16_decode_hopper,
        signature,
        {**constants, **{name: None for name, kind in optional.items() if kind is None}},
        num_warps=config.warps,
        divisible_by_16=tuple(name for name in _ALIGNED if name in signature),
        options={"maxnreg": min(config.registers, 255), "launch_pdl": beside},
    )


class PreparedDecode:
    """A launch for one shape of a layer and number of tokens, but for the addresses."""

    def __init__(
        self, layer: HopperLayer, m: int, stride_xm: int, device: torch.device, config: DecodeConfig
    ) -> None:
        """Of ``x [m, K]`` with contiguous rows ``stride_xm`` elements apart.

        Raises:
            ValueError: the configuration does not take the layer or the tokens.
        """
        facts = device_facts(device)
        reason = why_invalid(config, m, layer.k, layer.form, facts.shared_memory)
        if reason is not None:
            raise ValueError(f"config: {reason}")
        self._programs = config.programs(layer.n, facts.multiprocessors)
        share, more = divmod(layer.n // ROW_BLOCK, self._programs)
        sizes = (m, layer.n, layer.k, layer.groups, stride_xm // 8, share, more)
        kernel = _kernel(layer.compiled, config, config.row(layer.k), device)
        self._launch = kernel.bind(sizes=sizes)
        self._puts_in_order = layer.act_order and config.keep

    def __call__(
        self, x: torch.Tensor, weight: W4A16Weight, bias: torch.Tensor | None, out: torch.Tensor,
        stream: int,
    ) -> None:  # fmt: skip
        """Launches on the current device; of ``x`` and ``out`` only the addresses are read."""
        words, scale, zero, _, perm = weight
        addresses = [x.data_ptr(), words.data_ptr(), scale.data_ptr()]
        if self._puts_in_order:
            assert perm is not None
            addresses.insert(1, perm.data_ptr())
        if zero is not None:
            addresses.append(zero.data_ptr())
        if bias is not None:
            addresses.append(bias.data_ptr())
        addresses.append(out.data_ptr())
        self._launch(self._programs, stream, (), addresses)


def form(layer: HopperLayer, config: DecodeConfig) -> Form:
    """What a call of a layer with a configuration needs compiled, but for a kernel before it."""
    return Form(specialization, (layer.compiled, config, config.row(layer.k)))


@functools.cache
def _kernel(
    layer: HopperLayer, config: DecodeConfig, row: int, device: torch.device
) -> LoadedKernel:
    return load(specialization(layer, config, row), device)
