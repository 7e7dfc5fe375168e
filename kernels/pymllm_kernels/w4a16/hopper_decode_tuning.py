"""Launch parameters of the W4A16 kernel for few tokens on Hopper, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pymllm_kernels.w4a16.hopper_tuning import HopperForm

ROW_BLOCK = 16
# 16 warps of 128 registers fill a multiprocessor.
_WARPS = 16


@dataclass(frozen=True)
class DecodeConfig:
    """One compiled form of the kernel.

    Attributes:
        block_m: most tokens, 8 or 16.
        rows: row blocks of 16 output features that a program works on at once.
        ahead: steps of K whose weights are fetched ahead.
        warps: of a program, each with its own blocks of K.
    """

    block_m: int
    rows: int
    ahead: int = 1
    warps: int = _WARPS

    @property
    def tiles(self) -> int:
        """Tiles of 8 tokens."""
        return self.block_m // 8

    @property
    def places(self) -> int:
        """Accumulators a thread adds up at once: a power of two."""
        return 1 << (self.rows * self.tiles - 1).bit_length()

    @property
    def shared_memory(self) -> int:
        """Bytes of a program, for adding up its warps."""
        return self.warps * self.places * ROW_BLOCK * 8 * 4

    def programs(self, n: int, multiprocessors: int) -> int:
        """Size of the grid: an even share of row blocks each."""
        return min(multiprocessors * (_WARPS // self.warps), n // ROW_BLOCK)


class _Measured(NamedTuple):
    """A configuration with its time on an H200, in microseconds.

    Fitted over 8 layers at M = 1 (16 for two tiles of tokens), within 6 % of each.

    Attributes:
        config: the configuration.
        start: of a call.
        one_pass: of a pass over K.
        step: of a step of ``warps`` blocks of K.
        unit: of 16 row blocks of one block of K on every multiprocessor, from memory.
        groups: most groups a block; beyond that registers are spilled.
        groups_zero: the same with zero points, 0 for none.
    """

    config: DecodeConfig
    start: float
    one_pass: float
    step: float
    unit: float
    groups: int
    groups_zero: int


_MEASURED = (
    # The first two by tuned entries of 1024x4096, 4096x4096 and 4096x14336, M = 1, within 1 %: fetching
    # two steps ahead, which was to hide the memory, costs up to 16 % (14.4 us instead of 12.4).
    _Measured(DecodeConfig(8, rows=2), 2.42, 0.77, 0.530, 0.405, 4, 2),
    _Measured(DecodeConfig(8, rows=2, ahead=2), 2.19, 0.77, 0.660, 0.504, 2, 1),
    _Measured(DecodeConfig(8, rows=3), 2.74, 0.80, 1.207, 0.225, 2, 2),
    _Measured(DecodeConfig(8, rows=4), 2.75, 1.20, 1.406, 0.236, 1, 1),
    _Measured(DecodeConfig(8, rows=5), 2.41, 1.98, 1.636, 0.274, 1, 0),
    _Measured(DecodeConfig(8, rows=3, warps=8), 2.16, 0.73, 1.433, 0.142, 2, 2),
    _Measured(DecodeConfig(8, rows=4, warps=8), 1.89, 1.14, 1.760, 0.147, 1, 1),
    _Measured(DecodeConfig(16, rows=2), 3.78, 0.27, 1.670, 0.104, 2, 1),
    _Measured(DecodeConfig(16, rows=2, warps=8), 2.61, 0.43, 1.288, 0.191, 2, 1),
)
_OF_CONFIG = {measured.config: measured for measured in _MEASURED}
CONFIGS = tuple(_OF_CONFIG)
# More tokens of a tile: 5 % from M = 1 to 8, mostly for reading them.
_A_TOKEN = 0.007


def why_invalid(config: DecodeConfig, m: int, form: HopperForm, shared_memory: int) -> str | None:
    """``None`` if ``m`` tokens of a layer of this form can be run, else the reason."""
    if m > config.block_m:
        return f"{config} takes up to {config.block_m} tokens, found {m}"
    if form.bits != 4:
        return f"{config} takes codes of 4 bits, found {form.bits}"
    if form.block_k != 128:
        return f"{config} takes the layout with blocks of 128 inputs, found {form.block_k}"
    measured = _OF_CONFIG.get(config)
    if measured is None:
        return f"{config} is none of {CONFIGS}"
    # Bytes of a scale are even: one more is a zero point.
    most = measured.groups_zero if form.parameter_bytes % 2 else measured.groups
    if form.runs > most:
        return f"{config} has registers for {most} groups a block, found {form.runs}"
    if config.shared_memory > shared_memory:
        return f"{config} needs {config.shared_memory} bytes of shared memory, there are {shared_memory}"
    return None


def candidates(
    m: int, n: int, k: int, form: HopperForm, multiprocessors: int, shared_memory: int
) -> Iterator[tuple[float, DecodeConfig]]:
    """Every valid configuration for a shape, with its estimated microseconds."""
    blocks = -(-k // 128)
    row_blocks = n // ROW_BLOCK
    for config, start, one_pass, step, unit, _, _ in _MEASURED:
        if why_invalid(config, m, form, shared_memory) or (config.block_m == 16 and m <= 8):
            continue
        passes = -(-row_blocks // (config.programs(n, multiprocessors) * config.rows))
        steps = passes * -(-blocks // config.warps)
        units = row_blocks / multiprocessors * blocks / 16
        tokens = m - 1 if config.block_m == 8 else 0
        estimate = start + one_pass * passes + step * steps + unit * units
        yield estimate * (1 + _A_TOKEN * tokens), config
