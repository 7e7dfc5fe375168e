"""Launch parameters of the int8 kernel for few tokens on Hopper, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pymllm_kernels.common.row_block_config import ROW_BLOCK, RowBlockConfig


@dataclass(frozen=True)
class DecodeConfig(RowBlockConfig):
    """One compiled form of the kernel.

    Attributes:
        block_m: most tokens, 8 or 16.
        rows: row blocks of 16 output features that a program works on at once.
        warps: of a program, each with its own blocks of K.
    """

    block_m: int
    rows: int
    warps: int = 16

    def programs(self, n: int, multiprocessors: int) -> int:
        """Size of the grid: an even share of row blocks each."""
        return min(multiprocessors, -(-n // ROW_BLOCK))


class _Measured(NamedTuple):
    """A configuration with its time on an H200, in microseconds.

    Fitted over 12 layers from 1024x1024 to 10240x8192, within 10 % of each, 3 % in the mean; one and
    two row blocks of 8 tokens over 600 times of the shipped table, within 8 % in the mean.

    Attributes:
        config: the configuration.
        start: of a call.
        step: of a step of K of all warps.
        memory: of a MB of weights.
    """

    config: DecodeConfig
    start: float
    step: float
    memory: float


_MEASURED = (
    _Measured(DecodeConfig(8, rows=1), 2.67, 0.86, 0.231),
    _Measured(DecodeConfig(8, rows=2), 2.9, 0.79, 0.26),
    _Measured(DecodeConfig(8, rows=3), 3.6, 0.80, 0.220),
    _Measured(DecodeConfig(16, rows=1), 3.4, 0.90, 0.165),
    _Measured(DecodeConfig(16, rows=2), 4.0, 1.00, 0.200),
)
CONFIGS = tuple(measured.config for measured in _MEASURED)


def why_invalid(config: DecodeConfig, m: int, shared_memory: int) -> str | None:
    """``None`` if ``m`` tokens can be run, else the reason."""
    if m > config.block_m:
        return f"{config} takes up to {config.block_m} tokens, found {m}"
    if config not in CONFIGS:
        return f"{config} is none of {CONFIGS}"
    if config.shared_memory > shared_memory:
        return f"{config} needs {config.shared_memory} bytes of shared memory, there are {shared_memory}"
    return None


def candidates(
    m: int, n: int, k: int, multiprocessors: int, shared_memory: int
) -> Iterator[tuple[float, DecodeConfig]]:
    """Every valid configuration for a shape, with its estimated microseconds."""
    for config, start, step, memory in _MEASURED:
        if why_invalid(config, m, shared_memory):
            continue
        if config.block_m == 16 and m <= 8:
            continue
        row_blocks = -(-n // (ROW_BLOCK * config.programs(n, multiprocessors)))
        passes = -(-row_blocks // config.rows)
        steps = passes * -(-k // (128 * config.warps))
        yield start + step * steps + memory * n * k / 1e6, config
