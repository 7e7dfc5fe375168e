"""Launch parameters of the int8 kernel for one token on Hopper, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

ROW_BLOCK = 16


@dataclass(frozen=True)
class DecodeConfig:
    """One compiled form of the kernel.

    Attributes:
        rows: row blocks of 16 output features that a program works on at once.
        warps: of a program, each with its own blocks of K.
    """

    rows: int
    warps: int = 16

    @property
    def places(self) -> int:
        """Accumulators a thread adds up at once: a power of two."""
        return 1 << (self.rows - 1).bit_length()

    @property
    def shared_memory(self) -> int:
        """Bytes of a program, for adding up its warps, and 1 KB for the extremes of the token."""
        return self.warps * self.places * ROW_BLOCK * 8 * 4 + 1024

    def programs(self, n: int, multiprocessors: int) -> int:
        """Size of the grid: an even share of row blocks each."""
        return min(multiprocessors, -(-n // ROW_BLOCK))


class _Measured(NamedTuple):
    """A configuration with its time on an H200, in microseconds.

    Attributes:
        config: the configuration.
        start: of a call.
        one_pass: of a pass over K.
        step: of a step of K of all warps.
    """

    config: DecodeConfig
    start: float
    one_pass: float
    step: float


_MEASURED = (
    _Measured(DecodeConfig(rows=1), 2.9, 0.5, 0.4),
    _Measured(DecodeConfig(rows=2), 2.9, 0.5, 0.4),
    _Measured(DecodeConfig(rows=3), 2.9, 0.6, 0.5),
    _Measured(DecodeConfig(rows=4), 2.9, 0.7, 0.6),
)
CONFIGS = tuple(measured.config for measured in _MEASURED)


def why_invalid(config: DecodeConfig, m: int, shared_memory: int) -> str | None:
    """``None`` if ``m`` tokens can be run, else the reason."""
    if m != 1:
        return f"{config} takes 1 token, found {m}"
    if config not in CONFIGS:
        return f"{config} is none of {CONFIGS}"
    if config.shared_memory > shared_memory:
        return f"{config} needs {config.shared_memory} bytes of shared memory, there are {shared_memory}"
    return None


def candidates(
    m: int, n: int, k: int, multiprocessors: int, shared_memory: int
) -> Iterator[tuple[float, DecodeConfig]]:
    """Every valid configuration for a shape, with its estimated microseconds."""
    for config, start, one_pass, step in _MEASURED:
        if why_invalid(config, m, shared_memory):
            continue
        row_blocks = -(-n // (ROW_BLOCK * config.programs(n, multiprocessors)))
        passes = -(-row_blocks // config.rows)
        steps = passes * -(-k // (128 * config.warps))
        yield start + one_pass * passes + step * steps, config
