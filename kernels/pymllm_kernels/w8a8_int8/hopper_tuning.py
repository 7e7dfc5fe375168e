"""Launch parameters of the Hopper int8 GEMM: what is valid, the plan of a launch, the choice.

Up to 16 tokens the kernel of ``hopper_decode`` is an alternative to the tiles of this module, up to 8
that of ``hopper_fused``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from pymllm_kernels.common.launch import cheapest
from pymllm_kernels.common.sharing import STREAM_K, share_tiles
from pymllm_kernels.w8a8_int8 import hopper_decode_tuning, hopper_fused_tuning
from pymllm_kernels.w8a8_int8.hopper_decode_tuning import DecodeConfig
from pymllm_kernels.w8a8_int8.hopper_fused_tuning import EARLY, FusedConfig


@dataclass(frozen=True)
class HopperConfig:
    """One compiled form of the kernel, and how tiles are shared.

    Attributes:
        block_m: tokens of the matrix instructions of a tile.
        block_n: output features of a tile.
        block_k: inputs of one step.
        slots: steps that the ring in shared memory holds.
        box_m: tokens of a tile that are copied, if fewer than ``block_m`` (0).
        swap: whether the weight is the 64-row side of the matrix instruction.
        consumers: warpgroups that multiply, 1 or 2.
        ping_pong: whether two consumers take turns at tiles rather than share each.
        store_parts: pieces in which a consumer writes its part of a tile.
        store_slots: buffers for those pieces.
        group_m: tiles of M that share a column of N tiles.
        meet: whether the programs that share a tile wait for each other and add up a piece each
            (a cooperative launch), or the last to come adds up alone.
        share: programs that share each tile, 1 for none, ``STREAM_K`` for even runs of K steps
            that may begin and end inside a tile.
    """

    block_m: int
    block_n: int
    block_k: int = 128
    slots: int = 6
    box_m: int = 0
    swap: bool = False
    consumers: int = 2
    ping_pong: bool = False
    store_parts: int = 1
    store_slots: int = 1
    group_m: int = 8
    meet: bool = False
    share: int = 1

    @property
    def halves(self) -> int:
        """Parts of a tile with an accumulator each."""
        return 1 if self.ping_pong else self.consumers

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.box_m or self.block_m

    @property
    def early(self) -> int:
        """Steps whose weights are asked for before the warps part: up to 1.5 us of calls of 8 to 120."""
        return min(EARLY, self.slots) if self.tokens <= 64 and self.share == 1 else 0

    @property
    def out_block(self) -> tuple[int, int]:
        """(tokens, features) of one store."""
        if self.swap:
            return self.block_m // self.store_parts, self.block_n // self.halves
        return self.block_m // self.halves, self.block_n // self.store_parts

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread at launch, and of the second consumer; the first takes what is left."""
        return (128, 0) if self.consumers == 1 else (168, 240)

    def shared_memory(self, out_bytes: int = 2) -> int:
        """Bytes of shared memory a program takes, within a few hundred."""
        ring = self.slots * (self.block_m + self.block_n) * self.block_k
        tokens, features = self.out_block
        return ring + self.consumers * self.store_slots * tokens * features * out_bytes + 1024


AnyConfig = HopperConfig | DecodeConfig | FusedConfig


class Plan(NamedTuple):
    """How a launch spreads its work: see ``common.stream_k``.

    Attributes:
        programs: size of the grid.
        whole: leading tiles that programs take whole.
        parts: int32 elements of the workspace.
        counters: int32 counters, which are to be 0 when the kernel starts.
        dependent: whether the GEMM is launched as the dependent of the quantization, which saves the
            gap between two kernels; not together with a cooperative launch.
        early: whether a dependent GEMM reads weights while the activation is quantized, or is started
            when the quantization ends.
    """

    programs: int
    whole: int
    parts: int
    counters: int
    dependent: bool
    early: bool


# Beyond both, waiting programs of the GEMM hold the registers that the quantization needs: 26.3 us
# instead of 23.6 for 128 tokens of a [4096, 14336] layer, 33.0 instead of 31.0 for 256 of [8192, 8192].
_EARLY_TOKENS = 64
_EARLY_VALUES = 2**20
# What a launch without overlap costs more, where overlap is possible.
_NO_OVERLAP_US = 1.2
_MIN_STEPS = 4


def plan_launch(config: HopperConfig, m: int, n: int, k: int, multiprocessors: int) -> Plan | None:
    """The grid and the workspace of a product, ``None`` if tiles cannot be shared in this way."""
    tiles = -(-m // config.tokens) * -(-n // config.block_n)
    steps = -(-k // config.block_k)
    grid = share_tiles(config.share, tiles, steps, multiprocessors, least_steps=_MIN_STEPS)
    if grid is None:
        return None
    programs, whole = grid
    dependent = _overlaps(m, k) and not (config.meet and config.share != 1)
    if config.share == 1:
        return Plan(programs, whole, 0, 0, dependent, dependent)
    parts = 2 * programs * config.block_m * config.block_n
    return Plan(programs, whole, parts, programs * config.halves, dependent, dependent)


def _overlaps(m: int, k: int) -> bool:
    """Whether the quantization is small enough for the GEMM to start beside it."""
    return m <= _EARLY_TOKENS or m * k <= _EARLY_VALUES


def why_invalid(config: HopperConfig, shared_memory: int) -> str | None:
    """``None`` if the kernel can be launched with this configuration, else the reason."""
    if config.share != 1 and (config.ping_pong or not config.swap):
        return f"{config}: tiles are shared weight-first only, by consumers that share each"
    needed = config.shared_memory()
    if shared_memory and needed > shared_memory:
        return f"{config} needs {needed} bytes of shared memory, there are {shared_memory}"
    return None


@dataclass(frozen=True)
class _Cost:
    """Microseconds on an H200: start + block * (blocks of 128 inputs in a row), a mode each.

    ``block`` is of one tile. A mode without numbers is not used.
    """

    whole: tuple[float, float] | None = None
    even: tuple[float, float] | None = None
    stream: tuple[float, float] | None = None


# What the memory delivers while a weight is read once.
_BYTES_A_US = 4.35e6


def _few(block_m: int, block_n: int, block_k: int, **more: int | bool) -> HopperConfig:
    """A weight-first form with as many slots as fit 200 KB beside the store buffer."""
    slots = (200 * 1024 - block_m * block_n * 2) // ((block_m + block_n) * block_k)
    consumers = 2 if block_n == 256 else 1
    config = HopperConfig(block_m, block_n, block_k, min(slots, 24), swap=True, consumers=consumers)
    return replace(config, **more)  # type: ignore[arg-type]


def _narrow(box_m: int) -> HopperConfig:
    """Tiles of 32 features: 128 of them for N = 4096, so that none is shared."""
    return HopperConfig(64, 32, 256, slots=8, box_m=box_m % 64, consumers=1)


# Numbers with (e) are estimates from neighbours; starts of the larger tiles and of their even shares were
# corrected by what 1,559 searches found (bench/results/nvidia_h200/tuning.json), those of whole tiles up to
# 64 tokens by what the ring filled early saved.
_COSTS: tuple[tuple[HopperConfig, _Cost], ...] = (
    (_narrow(8), _Cost(whole=(4.7, 0.069))),
    (_narrow(16), _Cost(whole=(3.7, 0.070))),  # (e)
    (_narrow(32), _Cost(whole=(3.7, 0.085))),  # (e)
    (_narrow(64), _Cost(whole=(3.7, 0.125))),  # (e)
    (_few(8, 64, 256), _Cost((4.4, 0.090), (6.6, 0.245), (5.9, 0.243))),  # whole, even (e)
    (_few(16, 64, 256), _Cost((3.7, 0.095), (6.8, 0.250), (5.9, 0.254))),  # whole, even (e)
    (_few(32, 64, 256), _Cost((3.7, 0.120), (6.0, 0.280), (6.5, 0.290))),  # (e)
    (_few(64, 64, 256, meet=True), _Cost((3.7, 0.165), (7.4, 0.300), (8.0, 0.350))),  # (e)
    (_few(8, 128, 256), _Cost((4.6, 0.150), (4.8, 0.510), (5.6, 0.523))),  # (e)
    (_few(16, 128, 128), _Cost((3.8, 0.160), (5.4, 0.520), (6.0, 0.542))),  # whole (e)
    (_few(32, 128, 128), _Cost((3.1, 0.185), (6.2, 0.550), (6.8, 0.580))),  # (e)
    (_few(64, 128, 128, meet=True), _Cost((3.2, 0.245), (7.8, 0.560), (8.8, 0.600))),  # (e)
    (_few(8, 256, 128), _Cost((4.8, 0.300), (5.1, 1.025), (6.1, 1.080))),  # whole (e)
    (_few(16, 256, 128), _Cost((5.1, 0.310), (6.0, 1.100), (7.1, 1.120))),  # whole (e)
    (_few(32, 256, 128), _Cost((4.8, 0.340))),  # (e)
    (_few(64, 256, 128), _Cost((4.6, 0.400))),  # (e)
    (_few(128, 64, 128), _Cost((4.4, 0.240))),  # (e)
    (
        HopperConfig(128, 128, slots=6, swap=True, store_parts=2, meet=True),
        _Cost((7.2, 0.355), (11.0, 0.580), (11.0, 0.700)),  # stream (e)
    ),
    (
        HopperConfig(128, 128, slots=6, ping_pong=True, store_parts=4, store_slots=2),
        _Cost((7.6, 0.335)),
    ),
    (
        HopperConfig(128, 256, slots=4, swap=True, store_parts=4, meet=True),
        _Cost((7.0, 0.690), (19.0, 0.750)),
    ),
    (HopperConfig(256, 128, slots=4, store_parts=4), _Cost((7.0, 0.690))),
)


def candidates(
    m: int, n: int, k: int, multiprocessors: int, shared_memory: int
) -> Iterator[tuple[float, HopperConfig]]:
    """Every valid configuration for a shape, with its estimated microseconds."""
    smallest = next((size for size in (8, 16, 32, 64) if m <= size), 64)
    blocks = -(-k // 128)
    for base, cost in _COSTS:
        if base.tokens < smallest or (m <= 64 and base.tokens > smallest):
            continue
        tiles = -(-m // base.tokens) * -(-n // base.block_n)
        most = min(multiprocessors // tiles, 8)
        for share in (1, STREAM_K, *range(2, most + 1)):
            mode = cost.whole if share == 1 else cost.stream if share == STREAM_K else cost.even
            config = replace(base, share=share, meet=base.meet and share != 1)
            plan = plan_launch(config, m, n, k, multiprocessors)
            if mode is None or plan is None or why_invalid(config, shared_memory):
                continue
            rounds = -(-tiles // plan.programs) if share == 1 else tiles / plan.programs
            start, block = mode
            if _overlaps(m, k) and not plan.dependent:
                start += _NO_OVERLAP_US
            work, memory = block * rounds * blocks, n * k / _BYTES_A_US
            if share in (1, STREAM_K):
                # The shorter of the two is not hidden quite, nor is the end of a tile before the last:
                # 57344 features at 1 token take 119.5 us in 4 rounds of 128, 111 in 7 of 64.
                hidden = 0.9 if share == 1 else 0.95
                start += (1 - hidden) * min(work, memory) + _end(base, m) * max(rounds - 1, 0)
            yield start + max(work, memory), config


def _end(config: HopperConfig, m: int) -> float:
    """What the end of a tile before a program's last takes.

    From 128 tokens on fitted over 2,600 times of the shipped table: what is stored after the last
    product, but for consumers in turns, one of which goes on.
    """
    if m <= 64:
        return 1.0 if config.block_n >= 128 else 0.2
    return 0.46 if config.ping_pong else 0.2 + config.block_m * config.block_n / 12500


def all_candidates(
    m: int, n: int, k: int, multiprocessors: int, shared_memory: int, variant: str = ""
) -> Iterator[tuple[float, AnyConfig]]:
    """Every valid configuration of all three kernels, with its estimated microseconds.

    ``variant``: of the tuning key, ``static`` and ``zero`` or neither.
    """
    yield from candidates(m, n, k, multiprocessors, shared_memory)
    yield from hopper_decode_tuning.candidates(m, n, k, multiprocessors, shared_memory)
    yield from hopper_fused_tuning.candidates(m, n, k, multiprocessors, shared_memory, variant)


def choose_config(
    m: int, n: int, k: int, multiprocessors: int, shared_memory: int, variant: str = ""
) -> AnyConfig:
    """The configuration with the least estimated time.

    Raises:
        ValueError: none is valid.
    """
    # Tiles have 1, 2, 4, 8 tokens or more: numbers in between have the tiles of the next.
    rounded = 1 << (m - 1).bit_length() if m <= 8 else -(-m // 8) * 8
    # Only up to 8 tokens are there kernels that the kind of activations makes slower.
    return _choose_config(rounded, n, k, multiprocessors, shared_memory, variant if m <= 8 else "")


@functools.lru_cache(maxsize=4096)
def _choose_config(
    m: int, n: int, k: int, multiprocessors: int, shared_memory: int, variant: str
) -> AnyConfig:
    found = all_candidates(m, n, k, multiprocessors, shared_memory, variant)
    return cheapest(found, "the int8 kernels for Hopper", shared_memory)
