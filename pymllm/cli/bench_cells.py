"""What a benchmark run says, shape by shape: who is fastest, and by how much ours wins or loses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

OURS = "ours"
BF16_NAMES = ("cublas_bf16", "torch_bf16")
# Two runs of one provider differ by as much: such a win or loss is none.
NOISE = 1.03
_LABELS = {"w4a16": "W4A16", "w8a8_int8": "W8A8 int8"}


@dataclass(frozen=True)
class Grid:
    """Times of all providers on one scheme and shape."""

    scheme: str
    n: int
    k: int
    group: int
    dtype: str
    us: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    roof: Mapping[int, float] = field(default_factory=dict)
    published: frozenset[str] = frozenset()
    """Providers whose times come from another run."""

    @property
    def place(self) -> tuple[str, int, int, int, str]:
        """Scheme, N, K, group and dtype: what a cell of it has, too."""
        return self.scheme, self.n, self.k, self.group, self.dtype

    @property
    def shape(self) -> str:
        """``4096 x 11008``: output features, input features."""
        return f"{self.n} x {self.k}"

    @property
    def label(self) -> str:
        """``W4A16, groups of 128, bf16``."""
        group = f", groups of {self.group}" if self.group > 0 else ""
        dtype = {"bfloat16": "bf16", "float16": "fp16"}.get(self.dtype, self.dtype)
        return f"{_LABELS.get(self.scheme, self.scheme)}{group}, {dtype}"

    @property
    def providers(self) -> list[str]:
        """All with a time: ours, bf16, then the others by name."""
        first = (OURS, *BF16_NAMES)
        others = sorted(name for name in self.us if name not in first)
        return [name for name in first if name in self.us] + others

    @property
    def tokens(self) -> list[int]:
        """Every M with a time, in order."""
        return sorted({m for times in self.us.values() for m in times})

    @property
    def bf16(self) -> str | None:
        """The unquantized provider."""
        return next((name for name in BF16_NAMES if name in self.us), None)

    def time(self, provider: str | None, m: int) -> float | None:
        """Microseconds, ``None`` where there is no time."""
        return self.us.get(provider or "", {}).get(m)

    def best(self, m: int) -> str | None:
        """The fastest provider of all."""
        return min(self._with_time(m), key=lambda name: self.us[name][m], default=None)

    def best_other(self, m: int) -> str | None:
        """The fastest provider that is not ours; unquantized bf16 is one of them."""
        others = [name for name in self._with_time(m) if name != OURS]
        return min(others, key=lambda name: self.us[name][m], default=None)

    def ratio(self, m: int) -> float | None:
        """Time of the fastest other over ours: above 1 ours is faster."""
        mine, other = self.time(OURS, m), self.time(self.best_other(m), m)
        return None if mine is None or other is None else other / mine

    def speed_up(self, m: int, provider: str = OURS) -> float | None:
        """Time of bf16 over that of ``provider``."""
        mine, plain = self.time(provider, m), self.time(self.bf16, m)
        return None if mine is None or plain is None else plain / mine

    def roof_fraction(self, m: int, provider: str = OURS) -> float | None:
        """Least possible time over that of ``provider``."""
        mine, roof = self.time(provider, m), self.roof.get(m)
        return None if mine is None or roof is None else roof / mine

    def with_published(self, times: Mapping[str, Mapping[int, float]]) -> Grid:
        """Adds providers that were not measured here, at the M that were."""
        new = {
            name: {m: us for m, us in cells.items() if m in self.tokens}
            for name, cells in times.items()
            if name not in self.us
        }
        new = {name: cells for name, cells in new.items() if cells}
        return replace(self, us={**self.us, **new}, published=self.published | set(new))

    def _with_time(self, m: int) -> Iterator[str]:
        return (name for name in self.providers if m in self.us[name])


def grids_of(cells: Iterable[Mapping[str, Any]], mode: str, cache: str) -> list[Grid]:
    """The cells of one mode and cache state; what was skipped is absent, never zero."""
    times: dict[tuple[str, int, int, int, str], dict[str, dict[int, float]]] = {}
    roofs: dict[tuple[str, int, int, int, str], dict[int, float]] = {}
    for cell in cells:
        if (cell["mode"], cell["cache"]) != (mode, cache) or cell["median_us"] is None:
            continue
        key = _place(cell)
        times.setdefault(key, {}).setdefault(cell["provider"], {})[cell["m"]] = cell["median_us"]
        if cell["roof_us"] is not None:
            roofs.setdefault(key, {})[cell["m"]] = cell["roof_us"]
    return [Grid(*key, us, roofs.get(key, {})) for key, us in times.items()]


def _place(cell: Mapping[str, Any]) -> tuple[str, int, int, int, str]:
    return cell["scheme"], cell["n"], cell["k"], cell["group"], cell["dtype"]


def modes_of(cells: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of mode and cache state that have times, those of the GPU's own work first."""
    order = ("graph", "cpu", "eager", "host")
    found = {(cell["mode"], cell["cache"]) for cell in cells if cell["median_us"] is not None}
    return sorted(found, key=lambda pair: (order.index(pair[0]), pair[1]))


def summary(grids: Sequence[Grid]) -> str:
    """One line: cells won and lost, geometric means, and the worst loss by name."""
    won: list[float] = []
    lost: list[tuple[float, str]] = []
    speed_ups: list[float] = []
    missing = 0
    for grid in grids:
        for m in grid.tokens:
            ratio, other = grid.ratio(m), grid.best_other(m)
            if ratio is None:
                missing += other is not None
            elif ratio > 1:
                won.append(ratio)
            else:
                lost.append((ratio, f"{grid.shape}, M = {m}, {other}"))
            if (speed_up := grid.speed_up(m)) is not None:
                speed_ups.append(speed_up)
    ratios = won + [ratio for ratio, _ in lost]
    if not ratios:
        return f"nothing to compare: no time of ours in {missing} cells that others have"
    close = sum(1 / NOISE < ratio < NOISE for ratio in ratios)
    told = ", published ones included" if any(grid.published for grid in grids) else ""
    text = (
        f"ours against the fastest other provider{told}: won {len(won)}, lost {len(lost)}"
        f" of {len(ratios)} cells ({close} within 3 %),"
        f" geometric mean {geometric_mean(ratios):.2f}x"
    )
    if speed_ups:
        text += f"; against bf16 {geometric_mean(speed_ups):.2f}x"
    if lost:
        ratio, place = min(lost)
        text += f"; worst loss {ratio:.2f}x ({place})"
    return text + (f"; no time of ours where others have one: {missing}" if missing else "")


def slower_than_bf16(grids: Sequence[Grid]) -> list[str]:
    """Where not quantizing would be faster, beyond noise: shape, M and by how much."""
    return [
        f"{grid.shape}, M = {m}: {grid.time(OURS, m):.1f} us, bf16 {grid.time(grid.bf16, m):.1f}"
        f" ({speed_up:.2f}x)"
        for grid in grids
        for m in grid.tokens
        if (speed_up := grid.speed_up(m)) is not None and speed_up < 1 / NOISE
    ]


def paths_of(cells: Iterable[Mapping[str, Any]], grid: Grid) -> list[tuple[list[int], str]]:
    """(numbers of tokens, kernel and configuration with its origin) that ours took for a layer."""
    found: dict[int, str] = {}
    for cell in cells:
        if _place(cell) == grid.place and cell["provider"] == OURS and cell["config"] is not None:
            found[cell["m"]] = f"{cell['config']} ({cell['origin']})"
    grouped: list[tuple[list[int], str]] = []
    for m, path in sorted(found.items()):
        if grouped and grouped[-1][1] == path:
            grouped[-1][0].append(m)
        else:
            grouped.append(([m], path))
    return grouped


def geometric_mean(values: Sequence[float]) -> float:
    """Of at least one positive number."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def microseconds(value: float | None) -> str:
    """Three digits or a decimal, ``-`` where there is no time."""
    return "-" if value is None else f"{value:.1f}" if value < 1e4 else f"{value:.0f}"


def absent(run: Mapping[str, Any]) -> dict[str, str]:
    """Providers that were not there, with the reason."""
    return {name: entry["absent"] for name, entry in run["providers"].items() if entry["absent"]}


def skipped(cells: Iterable[Mapping[str, Any]], without: Iterable[str] = ()) -> dict[str, int]:
    """Why cells of providers that were there have no time, and how many cells that is."""
    left = set(without)
    reasons: dict[str, int] = {}
    for cell in cells:
        if cell["skip"] is not None and cell["provider"] not in left:
            text = f"{cell['provider']}, {cell['scheme']}: {cell['skip']}"
            reasons[text] = reasons.get(text, 0) + 1
    return reasons
