"""Launch parameters of the W4A16 kernel: the validity rule and the choice by rule."""

from __future__ import annotations

from dataclasses import dataclass

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


# Ordered from the smallest token tile: the first whose block_m holds M is taken, else the last.
_RULE = (
    Config(block_m=16, block_n=64, num_warps=4, num_stages=4),
    Config(block_m=32, block_n=64, num_warps=4, num_stages=4),
    Config(block_m=64, block_n=128, num_warps=4, num_stages=3),
    Config(block_m=128, block_n=128, num_warps=8, num_stages=3),
)


def shared_memory_bytes(config: Config, block_k: int, bits: int, act_bytes: int) -> int:
    """Shared memory of the pipeline's buffers: one weight and one activation tile a stage."""
    weight = config.block_n * block_k * bits // 8
    activation = config.block_m * block_k * act_bytes
    return config.num_stages * (weight + activation)


def why_invalid(
    config: Config, device: DeviceFacts, block_k: int, bits: int, act_bytes: int
) -> str | None:
    """``None`` if the kernel can be launched with this configuration, else the reason."""
    needed = shared_memory_bytes(config, block_k, bits, act_bytes)
    if device.shared_memory and needed > device.shared_memory:
        return (
            f"{config} needs {needed} bytes of shared memory, {device.name} has "
            f"{device.shared_memory}"
        )
    return None


def choose_config(m: int, block_k: int, bits: int, act_bytes: int, device: DeviceFacts) -> Config:
    """The configuration for ``m`` tokens; fewer stages, then smaller tiles, where memory is short."""
    index = next((i for i, c in enumerate(_RULE) if m <= c.block_m), len(_RULE) - 1)
    for config in reversed(_RULE[: index + 1]):
        for stages in range(config.num_stages, 0, -1):
            candidate = Config(
                config.block_m, config.block_n, config.num_warps, stages, config.group_m
            )
            if why_invalid(candidate, device, block_k, bits, act_bytes) is None:
                return candidate
    raise ValueError(
        f"no configuration of the W4A16 kernel fits the shared memory of {device.name} "
        f"({device.shared_memory} bytes)"
    )
