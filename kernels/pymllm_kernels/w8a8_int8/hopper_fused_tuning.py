"""Launch parameters of the int8 kernel for Hopper that quantizes up to 8 tokens itself, and their cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

# Values of a token that are held as one tensor, and chunks of all tokens that fit the registers.
CHUNK = 2048
_MOST_CHUNKS = 16
# Rows of the matrix instruction that is given the weights, and of the one that is given the codes.
_WEIGHT_ROWS, CODE_ROWS = 64, 8
# Of barriers, scales and zero points.
_BESIDE = 1024
# Steps whose weights are asked for before the warps part, which takes 0.6 us: enough to keep the memory
# busy until the loading warp runs. 2 to 20 were equal.
EARLY = 4
_MOST_SLOTS, _LEAST_SLOTS = 24, EARLY


@dataclass(frozen=True)
class FusedConfig:
    """One compiled form of the kernel; how many steps its ring holds follows from K.

    Attributes:
        block_m: most tokens: 1, 2, 4 or 8.
        block_n: output features of a tile.
        block_k: inputs of a step.
    """

    block_m: int
    block_n: int
    block_k: int

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return 2 if self.block_n == 256 else 1

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread at launch, where tokens are in them, and of the second consumer."""
        return 168, 96

    def slots(self, k: int, shared_memory: int) -> int:
        """Steps of the ring, in what the codes of all of K leave of the shared memory."""
        left = shared_memory - chunks_of(k) * CHUNK * CODE_ROWS - _BESIDE
        return min(left // (max(self.block_n, _WEIGHT_ROWS) * self.block_k), _MOST_SLOTS)

    def programs(self, n: int, multiprocessors: int) -> int:
        """Size of the grid: whole tiles, one after the other."""
        return min(multiprocessors, -(-n // self.block_n))


class _Cost(NamedTuple):
    """Microseconds on an H200.

    Fitted with the constants below over 1,465 times of the shipped table, within 4 % (root mean square).

    Attributes:
        start: of a call.
        block: of 128 inputs of a tile.
    """

    start: float
    block: float


# What the memory delivers, and how much of the shorter of the two, memory and tiles, is not hidden.
_BYTES_A_US = 4.63e6
_NOT_HIDDEN = 0.18
# Of a token, and of each chunk beyond 8 of all tokens: they take longer than the first weights.
_TOKEN_US, _LATE_CHUNK_US, _LATE = 0.09, 0.09, 8
# Of a given scale, and of zero points found here: more instructions a value, of which the first weights hide
# some: 8 tokens of 4096 values 8.3 us, 11.0 with zero points, 11.6 with a given scale; with a kernel before
# it 8.0. (us a chunk of a token, chunks hidden)
_STATIC_US, _ZERO_US = (0.5, 3), (0.15, 2)
# Of a round of tiles after the first.
_ROUND_US = 0.68
_COSTS: dict[tuple[int, int], _Cost] = {
    (32, 256): _Cost(2.91, 0.072),
    (64, 256): _Cost(2.83, 0.077),
    (128, 256): _Cost(2.55, 0.156),
    (256, 128): _Cost(2.60, 0.322),
}
CONFIGS = tuple(FusedConfig(m, n, k) for m in (1, 2, 4, 8) for n, k in _COSTS)


def chunks_of(k: int) -> int:
    """Chunks that hold a token."""
    return -(-k // CHUNK)


def why_invalid(config: FusedConfig, m: int, k: int, shared_memory: int) -> str | None:
    """``None`` if ``m`` tokens of ``k`` values can be run, else the reason."""
    if m > config.block_m:
        return f"{config} takes up to {config.block_m} tokens, found {m}"
    if config not in CONFIGS:
        return f"{config} is none of {CONFIGS}"
    most = _MOST_CHUNKS // config.block_m * CHUNK
    if k > most:
        return f"{config} takes K up to {most}, found {k}"
    if config.slots(k, shared_memory) < _LEAST_SLOTS:
        return f"{config} needs more than the {shared_memory} bytes of shared memory for K = {k}"
    return None


def candidates(
    m: int, n: int, k: int, multiprocessors: int, shared_memory: int, variant: str = ""
) -> Iterator[tuple[float, FusedConfig]]:
    """Every valid configuration for a shape, with its estimated microseconds.

    ``variant``: of the tuning key, ``static`` and ``zero`` or neither.
    """
    for config in CONFIGS:
        if config.block_m >= 2 * m or why_invalid(config, m, k, shared_memory):
            continue
        start, block = _COSTS[config.block_n, config.block_k]
        rounds = -(-n // (config.block_n * config.programs(n, multiprocessors)))
        work = block * rounds * -(-k // 128) + _ROUND_US * (rounds - 1)
        memory = n * k / _BYTES_A_US
        chunks = config.block_m * chunks_of(k)
        start += _TOKEN_US * config.block_m + _LATE_CHUNK_US * max(chunks - _LATE, 0)
        if variant:
            more, hidden = _STATIC_US if "static" in variant else _ZERO_US
            start += more * max(chunks - hidden, 0)
        yield start + _NOT_HIDDEN * min(work, memory) + max(work, memory), config
