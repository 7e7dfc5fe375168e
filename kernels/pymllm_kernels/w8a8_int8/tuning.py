"""Launch parameters of the int8 GEMM: the validity rule and the choice by rule."""

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
        block_k: inputs of one step.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline over K.
        swap: whether the weight is the first operand (accumulator ``[block_n, block_m]``), so that
            few tokens fill the narrow side of the matrix instruction.
        group_m: tiles of M that share a column of N tiles.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool
    group_m: int = 8


# Ordered from the smallest token tile: the first whose block_m holds M is taken, else the last.
_RULE = (
    Config(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=4, swap=True),
    Config(block_m=32, block_n=64, block_k=128, num_warps=4, num_stages=4, swap=True),
    Config(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=4, swap=True),
    Config(block_m=128, block_n=128, block_k=128, num_warps=4, num_stages=3, swap=False),
)


def why_invalid(config: Config, device: DeviceFacts) -> str | None:
    """``None`` if the kernel can be launched with this configuration, else the reason."""
    needed = config.num_stages * (config.block_m + config.block_n) * config.block_k
    return why_too_large(config, needed, device)


def tiles(k: int) -> tuple[Config, ...]:
    """The configurations for ``k`` inputs, by growing block_m."""
    # Rows that start at any byte are loaded byte by byte: the large tile then spills 6 KB a thread.
    return _RULE if k % 16 == 0 else _RULE[:3]


def choose_config(m: int, k: int, device: DeviceFacts) -> Config:
    """The configuration for ``m`` tokens; fewer stages, then smaller tiles, where memory is short."""
    return first_that_fits(
        tiles(k), m, lambda config: why_invalid(config, device), device, "the int8 GEMM"
    )
