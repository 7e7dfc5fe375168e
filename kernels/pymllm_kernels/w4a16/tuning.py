"""Launch parameters of the W4A16 kernel: the validity rule and the choice by rule."""

from __future__ import annotations

from dataclasses import dataclass

from pymllm_kernels.common.launch import first_that_fits, why_too_large
from pymllm_kernels.device import DeviceFacts


@dataclass(frozen=True)
class Config:
    """One compiled form of the kernel.

    Attributes:
        block_m: tokens of a tile.
        block_n: output features of a tile.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline over K.
        group_m: tiles of M that share a column of N tiles.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    group_m: int = 8


ACT_BYTES = 2

# Each ordered from the smallest token tile: the first whose block_m holds M is taken, else the last.
# Registers decide the shapes, compiled for sm_90: a scale for every slice or every weight needs a
# second partial sum or fp32 weights beside the accumulator, so 128x128 would spill. 64 features on
# 8 warps is no way out: both warpgroups then unpack the same weights (13 instructions a weight, not 6).
_RULE = (
    Config(block_m=16, block_n=64, num_warps=4, num_stages=4),
    Config(block_m=32, block_n=64, num_warps=4, num_stages=4),
    Config(block_m=64, block_n=128, num_warps=8, num_stages=3),
    Config(block_m=128, block_n=128, num_warps=8, num_stages=3),
)
_RULE_FINE_GROUPS = _RULE[:3]


@dataclass(frozen=True)
class Form:
    """What of a layer the compiled kernel depends on.

    Attributes:
        bits: 4 or 8.
        block_k: block of the weight layout.
        group_size: inputs a scale, -1 for one scale a row.
        group_index: whether a slice of the layout spans groups.
    """

    bits: int
    block_k: int
    group_size: int
    group_index: bool = False

    @property
    def rule(self) -> tuple[Config, ...]:
        """The configurations of this form, by growing block_m."""
        fine = self.group_size > 0 and self.group_size % (self.block_k // 2) != 0
        return _RULE_FINE_GROUPS if fine or self.group_index else _RULE


def shared_memory_bytes(config: Config, form: Form) -> int:
    """Shared memory of the pipeline's buffers: one weight and one activation tile a stage."""
    weight = config.block_n * form.block_k * form.bits // 8
    activation = config.block_m * form.block_k * ACT_BYTES
    return config.num_stages * (weight + activation)


def why_invalid(config: Config, form: Form, device: DeviceFacts) -> str | None:
    """``None`` if the kernel can be launched with this configuration, else the reason."""
    return why_too_large(config, shared_memory_bytes(config, form), device)


def choose_config(m: int, form: Form, device: DeviceFacts) -> Config:
    """The configuration for ``m`` tokens; fewer stages, then smaller tiles, where memory is short."""
    return first_that_fits(
        form.rule, m, lambda config: why_invalid(config, form, device), device, "the W4A16 kernel"
    )
