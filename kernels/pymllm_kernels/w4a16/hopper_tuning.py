"""Launch parameters of the W4A16 kernels for Hopper: what is valid, and the choice by a cost model.

Up to 16 tokens the kernel of ``hopper_decode`` is an alternative to the tiles of this module.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pymllm_kernels.common.launch import cheapest
from pymllm_kernels.common.sharing import HAND_ON, STREAM_K, share_tiles
from pymllm_kernels.w4a16 import hopper_decode_tuning
from pymllm_kernels.w4a16.hopper_decode_tuning import DecodeConfig

SUMS, WEIGHTS, CODES = "sums", "weights", "codes"
# Of a consumer's thread, by their number, once the producer has given up its own: 65,536 over 12, 16
# or 20 warps, 4 of them the producer's.
CONSUMER_REGISTERS = {2: 240, 3: 160, 4: 112}


@dataclass(frozen=True)
class HopperConfig:
    """One compiled form of the kernel, and how tiles are shared.

    Attributes:
        block_m: tokens of a tile.
        consumers: warpgroups of 64 output features each, 2, 3 or 4.
        slots: places in the ring of shared memory.
        span: blocks of K a slot, 1 or 2.
        meet: whether the programs that share a tile wait for each other and add up a piece each
            (a cooperative launch), or the last to come adds up alone.
        out_parts: pieces a tile is stored in by TMA; 0 for plain stores.
        group_m: tiles of M that share a column of N tiles.
        share: programs that share each tile, 1 for none, ``STREAM_K`` and ``HAND_ON`` for even runs of
            K blocks that may begin and end inside a tile.
    """

    block_m: int
    consumers: int
    slots: int
    span: int = 1
    meet: bool = False
    out_parts: int = 0
    group_m: int = 8
    share: int = 1

    rows = 64

    @property
    def early(self) -> int:
        """Steps whose weights are asked for before the warps part: 1 to 3 % up to 32 tokens.

        Of 32 KB a step one: two were 0.5 to 3 % slower; of less two: one was half as good and three up to 5 %
        slower. With 64 tokens and more none made a difference. None where activations are gathered first, whose
        indices would come behind the weights, and in shared tiles of 8-bit weights, which would spill 4 bytes.
        """
        most = 1 if self.consumers == 4 and self.span == 2 else min(2, self.slots)
        return most if self.block_m <= 32 else 0

    @property
    def block_n(self) -> int:
        """Output features of a tile."""
        return self.consumers * self.rows

    @property
    def weight_box_n(self) -> int:
        """Rows of weights copied at once: boxes have powers of two."""
        return self.rows if self.consumers == 3 else self.block_n

    @property
    def scales_n(self) -> int:
        """Scales copied at once, those of three consumers with the next 64 features'."""
        return 4 * self.rows if self.consumers == 3 else self.block_n


@dataclass(frozen=True)
class HopperForm:
    """What of a layer the compiled kernel depends on.

    Attributes:
        block_k: block of the weight layout, 64 or 128.
        runs: groups a block: 1, 2 or 4.
        parameter_bytes: bytes of the scale, and of the zero point if there is one, of a row.
        same_dtype: whether scales have the activations' dtype. Others are not rounded to it, so
            only partial sums can take them.
        bits: of a code, 4 or 8.
        act_order: whether activations are put in another order first.
        bf16: whether activations are.
    """

    block_k: int = 128
    runs: int = 1
    parameter_bytes: int = 2
    same_dtype: bool = True
    bits: int = 4
    act_order: bool = False
    bf16: bool = True

    def scale(self, block_m: int) -> str:
        """What scales multiply in tiles of so many tokens: ``SUMS``, ``WEIGHTS`` or ``CODES``.

        A partial sum has a multiply-add for each of its elements and group. Scales on codes cost two factors a
        row and group: 1.07 times as fast as partial sums with 64 tokens, 1.03 with 32, 1.12 to 1.27 with groups
        of 32; with 8 tokens and groups of 128 equal, and partial sums more accurate.
        """
        if not self.same_dtype:
            return SUMS
        codes = self.bits == 4 and self.bf16 and self.parameter_bytes % 2 == 0
        if self.runs == 1 and block_m < (16 if codes else 64):
            return SUMS
        return CODES if codes else WEIGHTS


@dataclass(frozen=True)
class Plan:
    """The grid of a launch: see ``common.stream_k``."""

    programs: int
    whole: int
    tiles_m: int
    tiles_n: int
    steps: int

    def part_elements(self, config: HopperConfig) -> int:
        """fp32 elements of workspace: a part each tile that may be handed on, else two a program."""
        if config.share == 1:
            return 0
        handed = self.tiles_m * self.tiles_n - self.whole
        parts = handed if config.share == HAND_ON else 2 * self.programs
        return parts * config.block_n * config.block_m


@dataclass(frozen=True)
class _Cost:
    """Microseconds on an H200, fitted over 8 layers: start + block * (blocks of 128 inputs in a row).

    For whole tiles, tiles shared evenly, stream-K, and tiles that are handed on. ``block`` is of one tile.
    """

    whole: tuple[float, float]
    even: tuple[float, float]
    stream: tuple[float, float]
    handed: tuple[float, float]


# Fitted over times of the shipped table, but for whole tiles of 128 and 256 tokens. Of its 3,228 entries from 2
# tokens on, what they and the kernel for few tokens choose is the fastest or within 3 % in 2,751, and slower by more
# in 93; of 384 the time is not known.
_MEASURED: tuple[tuple[HopperConfig, _Cost], ...] = (
    (
        HopperConfig(block_m=8, consumers=2, slots=6, span=2),
        _Cost((2.9, 0.273), (4.9, 0.282), (5.3, 0.320), (8.4, 0.263)),
    ),
    (
        HopperConfig(block_m=8, consumers=4, slots=4, span=2),
        _Cost((3.2, 0.508), (7.5, 0.472), (8.2, 0.593), (7.3, 0.547)),
    ),
    (
        HopperConfig(block_m=8, consumers=3, slots=5, span=2),
        _Cost((3.7, 0.387), (6.4, 0.401), (7.2, 0.459), (8.8, 0.343)),
    ),
    (
        HopperConfig(block_m=16, consumers=2, slots=4, span=2),
        _Cost((3.0, 0.271), (5.4, 0.281), (6.0, 0.338), (7.1, 0.289)),
    ),
    (
        HopperConfig(block_m=16, consumers=4, slots=4, span=2),
        _Cost((3.4, 0.538), (7.5, 0.478), (14.8, 0.487), (8.9, 0.544)),
    ),
    (
        HopperConfig(block_m=16, consumers=3, slots=5, span=2),
        _Cost((3.4, 0.395), (7.4, 0.360), (9.1, 0.427), (8.8, 0.419)),
    ),
    (
        HopperConfig(block_m=32, consumers=2, slots=4, span=2),
        _Cost((3.2, 0.295), (6.2, 0.284), (6.7, 0.368), (6.4, 0.326)),
    ),
    (
        HopperConfig(block_m=32, consumers=4, slots=4, span=2),
        _Cost((3.5, 0.556), (8.8, 0.539), (11.1, 0.708), (11.2, 0.559)),
    ),
    (
        HopperConfig(block_m=32, consumers=3, slots=4, span=2),
        _Cost((3.6, 0.407), (7.9, 0.410), (10.7, 0.464), (9.2, 0.442)),
    ),
    (
        HopperConfig(block_m=64, consumers=2, slots=4, span=2, meet=True),
        _Cost((3.7, 0.395), (7.5, 0.413), (8.2, 0.497), (7.4, 0.391)),
    ),
    (
        HopperConfig(block_m=64, consumers=4, slots=6, meet=True),
        _Cost((4.8, 0.701), (10.0, 0.726), (11.5, 0.852), (11.1, 0.828)),
    ),
    (
        HopperConfig(block_m=64, consumers=3, slots=3, span=2, meet=True),
        _Cost((4.4, 0.544), (8.5, 0.558), (10.5, 0.631), (9.2, 0.572)),
    ),
    (
        HopperConfig(block_m=128, consumers=2, slots=4, meet=True, out_parts=2),
        _Cost((2.9, 0.668), (8.2, 0.655), (11.5, 0.698), (6.9, 0.692)),
    ),
    (
        HopperConfig(block_m=128, consumers=3, slots=4, meet=True, out_parts=4),
        _Cost((2.8, 0.933), (9.8, 0.947), (14.1, 1.016), (7.5, 1.046)),
    ),
    (
        HopperConfig(block_m=256, consumers=2, slots=3, meet=True, out_parts=16, group_m=4),
        _Cost((2.6, 1.323), (13.0, 1.244), (14.6, 1.512), (4.8, 1.594)),
    ),
)


# What a block of 8-bit codes costs, 1 for one of 4 bits, by tokens of a tile: of the times of 8 bits in
# ``variants.json`` up to 32 tokens, estimated above. Twice the bytes to fetch beside the same activations.
_COST_OF_8_BITS = {8: 1.8, 16: 1.85, 32: 1.8, 64: 1.3, 128: 1.05, 256: 1.15}


def shared_memory_bytes(config: HopperConfig, form: HopperForm) -> int:
    """Shared memory of the ring, its barriers and the store buffers."""
    block = (
        config.block_n * form.block_k * form.bits // 8
        + config.scales_n * form.runs * form.parameter_bytes
        + config.block_m * form.block_k * 2
    )
    out = 2 * config.block_n * config.block_m * 2 // config.out_parts if config.out_parts else 0
    return config.slots * (config.span * block + 16) + out + 1024


def why_invalid(config: HopperConfig, form: HopperForm, shared_memory: int) -> str | None:
    """``None`` if a layer of this form can be run with this configuration, else the reason."""
    if form.runs > 1 and config.span == 2 and form.scale(config.block_m) == SUMS:
        return f"{config} takes one group a block, found {form.runs}"
    registers = _registers(config, form)
    if registers > CONSUMER_REGISTERS[config.consumers]:
        return (
            f"{config} needs {registers} registers of {CONSUMER_REGISTERS[config.consumers]} with "
            f"{form.runs} groups a block"
        )
    scaled = form.scale(config.block_m) == WEIGHTS and (form.bits == 8 or form.runs > 1)
    if scaled and config.share != 1 and config.block_m * config.consumers >= 384:
        return f"{config} spills registers where its tiles are shared, of 8 bits or several groups a block"
    needed = shared_memory_bytes(config, form)
    if needed > shared_memory:
        return f"{config} needs {needed} bytes of shared memory, there are {shared_memory}"
    return None


def _registers(config: HopperConfig, form: HopperForm) -> int:
    """Of a consumer's thread: accumulators, weights (of 8 bits also packed), and 20 for the rest.

    Forms above their share were seen to spill or to have each wgmma waited for (C7511, C7512).
    """
    sums = 1 + max(form.runs, config.span) if form.scale(config.block_m) == SUMS else 1
    packed = form.block_k // 16 if form.bits == 8 else 0
    return sums * config.block_m // 2 + config.span * form.block_k // 4 + packed + 20


def joined(config: HopperConfig, form: HopperForm) -> int:
    """Slices of weights that are one operand of wgmma; those of a partial sum are of one group.

    Warps of a consumer meet before every operand: two slices an operand were 1 to 5 % faster than one, four
    another 1 to 3 % up to 64 tokens and with three and four consumers. With 128 tokens and two consumers four
    were 1 to 6 % slower than two, and so they were with 64 where scales are not on codes.
    """
    scale = form.scale(config.block_m)
    two = config.block_m >= (64 if scale != CODES else 128) and config.consumers == 2
    most = 2 if two or config.block_m == 8 else 4
    return min(most, 4 // form.runs) if scale == SUMS else most


def plan(
    config: HopperConfig, m: int, n: int, k: int, form: HopperForm, multiprocessors: int
) -> Plan | None:
    """The grid, or ``None`` if tiles cannot be shared in this way."""
    tiles_m, tiles_n = -(-m // config.block_m), -(-n // config.block_n)
    tiles = tiles_m * tiles_n
    steps = -(-k // (form.block_k * config.span))
    grid = share_tiles(config.share, tiles, steps, multiprocessors)
    return None if grid is None else Plan(*grid, tiles_m, tiles_n, steps)


def candidates(
    m: int, n: int, k: int, form: HopperForm, multiprocessors: int, shared_memory: int
) -> Iterator[tuple[float, HopperConfig]]:
    """Every valid configuration of tiles for a shape, with its estimated microseconds."""
    for measured, cost in _MEASURED:
        tiles = -(-m // measured.block_m) * -(-n // measured.block_n)
        blocks = -(-k // 128)
        most = multiprocessors // tiles
        for share in (1, STREAM_K, HAND_ON, *range(2, min(most, 8) + 1)):
            config = _fit_ring(_shared_by(measured, share, form), form, shared_memory)
            grid = None if config is None else plan(config, m, n, k, form, multiprocessors)
            if config is None or grid is None or why_invalid(config, form, shared_memory):
                continue
            if share == 1:
                start, block = cost.whole
                whole = -(-tiles // multiprocessors)
                rounds = whole * _in_rounds(config, grid.tiles_m, whole, tiles / multiprocessors)
            elif share == STREAM_K:
                start, block = cost.stream
                rounds = tiles / grid.programs
            elif share == HAND_ON:
                start, block = cost.handed
                rounds = tiles / grid.programs
            else:
                start, block = cost.even
                rounds = 1 / share
            block *= _COST_OF_8_BITS[config.block_m] if form.bits == 8 else 1.0
            block *= _more_work(config, form)
            yield start + block * rounds * blocks * _rereading(config, grid.tiles_m), config


def _shared_by(config: HopperConfig, share: int, form: HopperForm) -> HopperConfig:
    """The measured configuration as programs share its tiles.

    What a program stores alone it stores by TMA from 32 tokens on: with plain stores 64 tokens took
    0.7 us more, 3 to 5 % of a call, and 32 tokens 1 to 2 %.
    """
    out_parts = config.out_parts
    # Four consumers of 64 tokens that also share tiles would spill, and three that multiply four groups.
    crowded = form.scale(64) == WEIGHTS and form.runs > 1
    full = config.block_m == 64 and config.consumers >= (3 if crowded else 4)
    alone = (1,) if full else (1, STREAM_K, HAND_ON)
    if not out_parts and config.block_m >= 32 and share in alone:
        out_parts = 2
    return replace(config, share=share, out_parts=out_parts)


def _more_work(config: HopperConfig, form: HopperForm) -> float:
    """What a block costs beside one of symmetric bf16 weights with one group.

    Two more factors of codes a row and group, a multiplication a weight, or a partial sum a group.
    """
    scale = form.scale(config.block_m)
    if scale == CODES:
        return 1 + 0.015 * (form.runs - 1)
    if scale == WEIGHTS:
        return 1.06 + 0.015 * (form.runs - 1)
    return 1 + 0.045 * (form.runs - 1) * config.block_m / 64


def _in_rounds(config: HopperConfig, tiles_m: int, rounds: int, busy: float) -> float:
    """What several rounds of whole tiles cost beside as many blocks of one; ``busy``: rounds that are filled.

    Up to 64 tokens 4 to 8 % (as all multiprocessors read). Of 256 tokens more where the last round leaves many
    without a tile: 448 (3.4 rounds of 132) took 194 to 198 us where 512 (3.9 rounds) took 173, and so did nine
    other layers from 1024 tokens on, by 13 to 22 %; not understood.
    """
    if config.block_m <= 64:
        return 1.06 if rounds > 1 else 1.0
    return 1.13 if config.block_m == 256 and tiles_m >= 4 and busy < 0.9 * rounds else 1.0


def _rereading(config: HopperConfig, tiles_m: int) -> float:
    """What unpacking and reading the weights again for further tiles of M costs.

    Measured with 128 tokens a tile, power held down by many: 0.62 to 0.70 microseconds a block up to 4
    tiles of M, 0.67 to 0.72 at 8, 0.70 to 0.79 at 16. The time of 256 tokens a tile was measured with
    many.
    """
    if config.block_m == 256 or tiles_m <= 4:
        return 1.0
    return 1.07 if tiles_m <= 8 else 1.15


def _holds_two_blocks(config: HopperConfig, form: HopperForm) -> bool:
    """Whether a consumer has registers for two blocks at once."""
    scale = form.scale(config.block_m)
    if form.runs > 1 and (scale == SUMS or (scale == WEIGHTS and config.consumers > 2)):
        # Scales and zero points of four groups spilled 4 bytes.
        return False
    return _registers(config, form) <= CONSUMER_REGISTERS[config.consumers]


def _fit_ring(config: HopperConfig, form: HopperForm, shared_memory: int) -> HopperConfig | None:
    """The measured configuration as this form can run it: one block a slot, smaller buffers."""
    if config.span == 2 and not _holds_two_blocks(config, form):
        config = replace(config, span=1, slots=2 * config.slots)
    while why_invalid(config, form, shared_memory):
        if config.slots == 2:
            return None
        if 0 < config.out_parts < 4:
            config = replace(config, out_parts=2 * config.out_parts)
        else:
            config = replace(config, slots=config.slots - 1)
    return config


def all_candidates(
    m: int, n: int, k: int, form: HopperForm, multiprocessors: int, shared_memory: int
) -> Iterator[tuple[float, HopperConfig | DecodeConfig]]:
    """Every valid configuration of both kernels, with its estimated microseconds."""
    gathering = hopper_decode_tuning.order_us(None) if form.act_order else 0.0
    for cost, config in candidates(m, n, k, form, multiprocessors, shared_memory):
        yield cost + gathering, config
    yield from hopper_decode_tuning.candidates(m, n, k, form, multiprocessors, shared_memory)


def choose_config(
    m: int, n: int, k: int, form: HopperForm, multiprocessors: int, shared_memory: int
) -> HopperConfig | DecodeConfig:
    """The configuration with the least estimated time.

    Raises:
        ValueError: none is valid.
    """
    # Tiles have 8 tokens or more: numbers in between have the tiles of the next multiple. Few tokens
    # differ by what they read of the activations.
    rounded = m if m <= 16 else -(-m // 8) * 8
    return _choose_config(rounded, n, k, form, multiprocessors, shared_memory)


@functools.lru_cache(maxsize=4096)
def _choose_config(
    m: int, n: int, k: int, form: HopperForm, multiprocessors: int, shared_memory: int
) -> HopperConfig | DecodeConfig:
    found = all_candidates(m, n, k, form, multiprocessors, shared_memory)
    return cheapest(found, "the W4A16 kernels for Hopper", shared_memory)
