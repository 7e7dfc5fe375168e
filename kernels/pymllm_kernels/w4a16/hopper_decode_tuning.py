"""Launch parameters of the W4A16 kernel for few tokens on Hopper, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from pymllm_kernels.common.row_block_config import ROW_BLOCK, RowBlockConfig

if TYPE_CHECKING:
    from pymllm_kernels.w4a16.hopper_tuning import HopperForm

# Of a multiprocessor: 16 warps of 128, or 8 of 256.
_REGISTERS = 65536
# Values that a multiprocessor keeps: in act-order 4096x4096 6.5 -> 5.2 us, 8192x8192 14.0 -> 13.7; of twice as
# many (4096x14336 13.5 -> 13.6, 5120x13824 15.7 -> 16.7) the first weights do not hide the time.
_MOST_KEPT = 8192
# A step of 16 warps.
_LEAST_ROW = 2048
# Microseconds that act-order costs a kept token, other activations of this kernel, and those of tiles.
_IN_ORDER_US, _GATHERED_US, _GATHERED_BEFORE_TILES_US = 0.15, 1.4, 1.9


@dataclass(frozen=True)
class DecodeConfig(RowBlockConfig):
    """One compiled form of the kernel.

    Attributes:
        block_m: most tokens, 8 or 16.
        rows: row blocks of 16 output features that a warp works on at once.
        row_warps: warps that work on other row blocks of the same blocks of K.
        warps: of a program; ``warps / row_warps`` of them share the blocks of K.
        registers: of a thread, 128 or 256.
        mix: row blocks whose instructions are mixed.
        keep: whether the one token there is, is kept in shared memory, where it is put in act-order,
            too. Others are read from memory a step at a time, and put in order by a kernel before.
    """

    block_m: int
    rows: int
    row_warps: int = 1
    warps: int = 16
    registers: int = 128
    mix: int = 1
    keep: bool = False

    @property
    def name(self) -> str:
        """For messages: tokens, row blocks of a program and of a warp, warps, and what else differs."""
        together = self.rows * self.row_warps
        more = f"-mix{self.mix}" * (self.mix > 1) + "-kept" * self.keep
        return f"{self.block_m}x{together}by{self.rows}-{self.warps}x{self.registers}{more}"

    @property
    def together(self) -> int:
        """Programs of a multiprocessor."""
        return _REGISTERS // (32 * self.warps * self.registers)

    def row(self, k: int) -> int:
        """The power of two that holds a kept token, as the kernel is compiled; 0 for tokens in memory."""
        return max(1 << (k - 1).bit_length(), _LEAST_ROW) if self.keep else 0

    def programs(self, n: int, multiprocessors: int) -> int:
        """Size of the grid: an even share of row blocks each."""
        return min(multiprocessors * self.together, n // ROW_BLOCK)

    def steps(self, n: int, k: int, multiprocessors: int) -> tuple[int, int]:
        """Passes over K, and steps of all passes, of the program with most to do."""
        share = -(-(n // ROW_BLOCK) // self.programs(n, multiprocessors))
        passes = -(-share // (self.rows * self.row_warps))
        # Blocks of 128 inputs, by all warps that share them.
        return passes, passes * -(-k // (128 * self.warps // self.row_warps))


class _Measured(NamedTuple):
    """A configuration with its time on an H200, in microseconds.

    Fitted over 2,500 times of the shipped table, within 3 to 8 % (root mean square).

    Attributes:
        config: the configuration.
        start: of a call.
        one_pass: of a pass over K.
        step: of a step of ``warps / row_warps`` blocks of K.
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


def _wide(block_m: int, rows: int, row_warps: int = 1, mix: int = 1) -> DecodeConfig:
    return DecodeConfig(block_m, rows, row_warps, warps=8, registers=256, mix=mix)


_MEASURED = (
    _Measured(DecodeConfig(8, rows=1), 0.84, 0.84, 0.718, 0.608, 4, 4),
    _Measured(DecodeConfig(8, rows=2), 2.24, 0.30, 0.468, 0.505, 4, 2),
    _Measured(DecodeConfig(8, rows=2, row_warps=2), 1.83, 0.30, 0.575, 0.431, 4, 2),
    _Measured(DecodeConfig(8, rows=3), 1.72, 0.54, 0.547, 0.520, 2, 2),
    _Measured(DecodeConfig(8, rows=4), 2.28, 0.32, 0.516, 0.521, 1, 1),
    _Measured(DecodeConfig(8, rows=4, row_warps=4), 2.68, 0.89, 0.381, 0.488, 1, 1),
    _Measured(DecodeConfig(8, rows=4, row_warps=4, mix=2), 1.67, 1.67, 0.773, 0.362, 1, 0),
    _Measured(DecodeConfig(8, rows=4, row_warps=8), 1.50, 1.50, 0.639, 0.358, 1, 1),
    _Measured(DecodeConfig(8, rows=4, warps=8), 2.38, 0.57, 0.331, 0.518, 1, 1),
    _Measured(_wide(8, 4, mix=2), 1.65, 0.30, 0.373, 0.727, 4, 4),
    _Measured(_wide(8, 7, row_warps=4), 1.77, 1.77, 0.451, 0.448, 4, 4),  # of few times
    _Measured(_wide(16, 2), 1.72, 0.30, 0.562, 1.104, 4, 4),
    _Measured(_wide(16, 3), 1.12, 1.12, 0.562, 1.021, 4, 4),
    _Measured(_wide(16, 4, mix=2), 2.49, 0.30, 0.584, 0.638, 2, 2),
    _Measured(_wide(16, 5), 3.14, 1.11, 0.439, 0.592, 4, 2),  # of few times
)
# Start, pass, step and unit with a token that is kept: a microsecond of latency less before the first step, but
# waits for shared memory in every step. Fitted over 320 times, within 2 to 7 %; (e) by what others differ.
_KEPT: dict[DecodeConfig, tuple[float, float, float, float]] = {
    DecodeConfig(8, rows=1): (0.40, 1.34, 0.537, 0.446),
    DecodeConfig(8, rows=2): (1.51, 0.51, 0.394, 0.577),
    DecodeConfig(8, rows=2, row_warps=2): (1.34, 0.75, 0.242, 0.629),
    DecodeConfig(8, rows=3): (1.22, 0.98, 0.227, 0.723),
    DecodeConfig(8, rows=4): (1.73, 0.71, 0.379, 0.638),
    DecodeConfig(8, rows=4, row_warps=4): (2.07, 1.22, 0.181, 0.631),  # (e)
    DecodeConfig(8, rows=4, row_warps=4, mix=2): (1.14, 2.08, 0.777, 0.360),
    DecodeConfig(8, rows=4, row_warps=8): (0.89, 1.83, 0.439, 0.501),  # (e)
    DecodeConfig(8, rows=4, warps=8): (1.48, 0.61, 0.457, 0.626),
    _wide(8, 4, mix=2): (1.17, 0.76, 0.153, 0.879),
    _wide(8, 7, row_warps=4): (1.16, 2.10, 0.251, 0.591),  # (e)
}
_OF_CONFIG = {measured.config: measured for measured in _MEASURED}
_OF_CONFIG |= {
    (kept := replace(config, keep=True)): _Measured(kept, *times, *_OF_CONFIG[config][5:])
    for config, times in _KEPT.items()
}
CONFIGS = tuple(_OF_CONFIG)
# More tokens of a tile: 3.5 % from M = 1 to 8, mostly for reading them.
_A_TOKEN = 0.005


def why_invalid(
    config: DecodeConfig, m: int, k: int, form: HopperForm, shared_memory: int
) -> str | None:
    """``None`` if ``m`` tokens of a layer of this form can be run, else the reason."""
    most = 1 if config.keep else config.block_m
    if m > most:
        return f"{config} takes up to {most} tokens, found {m}"
    if config.row(k) * config.together > _MOST_KEPT:
        return f"{config} keeps up to {_MOST_KEPT // config.together} values, found K = {k}"
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


def order_us(config: DecodeConfig | None) -> float:
    """What act-order costs a call; ``None``: of tiles."""
    if config is None:
        return _GATHERED_BEFORE_TILES_US
    return _IN_ORDER_US if config.keep else _GATHERED_US


def candidates(
    m: int, n: int, k: int, form: HopperForm, multiprocessors: int, shared_memory: int
) -> Iterator[tuple[float, DecodeConfig]]:
    """Every valid configuration for a shape, with its estimated microseconds."""
    units = n / ROW_BLOCK / multiprocessors * -(-k // 128) / 16
    for config, start, one_pass, step, unit, _, _ in _OF_CONFIG.values():
        if why_invalid(config, m, k, form, shared_memory) or (config.block_m == 16 and m <= 8):
            continue
        passes, steps = config.steps(n, k, multiprocessors)
        tokens = m - 1 if config.block_m == 8 else 0
        estimate = start + one_pass * passes + step * steps + unit * units
        order = order_us(config) if form.act_order else 0.0
        yield estimate * (1 + _A_TOKEN * tokens) + order, config
