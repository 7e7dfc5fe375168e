"""Cells of a run of variants, what is wanted of them, and how a variant stands over all its cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pymllm.bench.timing import Timing

Cell = dict[str, Any]

TIME, SHARE, ROOF, US = "time", "share", "roof", "us"
MEASURES = {
    TIME: "time / time of the base; wanted: at most",
    SHARE: "share of the memory roof / share that the base reaches; wanted: at least",
    ROOF: "share of the memory roof, (bytes in and out / read bandwidth) / time; wanted: at least",
    US: "microseconds; wanted: at most",
}
_AT_LEAST = frozenset((SHARE, ROOF))


class Goal(NamedTuple):
    """What is measured of a cell, and what is wanted.

    Attributes:
        measure: of ``MEASURES``.
        wanted: the limit, ``None`` if nothing is wanted.
    """

    measure: str = TIME
    wanted: float | None = None


def blank(part: str, variant: str, base: str, m: int, k: int, n: int | None = None) -> Cell:
    """A cell without results: every key, in the document's order."""
    return {
        "part": part,
        "variant": variant,
        "base": None if variant == base else base,
        "n": n,
        "k": k,
        "m": m,
        "skip": None,
        "kernel": None,
        "config": None,
        "origin": None,
        "error": None,
        "median_us": None,
        "low_us": None,
        "high_us": None,
        "done_us": None,
        "copies": None,
        "samples": None,
        "tbps": None,
        "base_us": None,
        "ratio": None,
        "measure": None,
        "value": None,
        "wanted": None,
        "met": None,
    }


def accept(cell: Cell, error: float, limit: float) -> bool:
    """Whether a result is right; its error, and what is wrong, go to the cell."""
    cell["error"] = error if math.isfinite(error) else None
    # NaN fails this comparison, too.
    if error <= limit:
        return True
    cell["skip"] = f"wrong result: relative error {error:.3g}, accepted up to {limit}"
    return False


def fill(cell: Cell, timing: Timing, moved: int | None = None) -> None:
    """Writes a time into a cell, and the rate if it is known how many bytes a call moves."""
    cell |= {
        "median_us": timing.median_us,
        "low_us": timing.low_us,
        "high_us": timing.high_us,
        "copies": timing.copies,
        "samples": len(timing.samples_us),
        "tbps": None if moved is None else moved / timing.median_us / 1e6,
    }


def compare(cell: Cell, base: Cell, goal: Goal, read_tbps: float) -> None:
    """Writes into a cell how it stands to its base, and whether that is what is wanted."""
    us, base_us = cell["median_us"], base["median_us"]
    if us is None:
        return
    if base_us is not None and cell is not base:
        cell |= {"base_us": base_us, "ratio": us / base_us}
    value = us
    if goal.measure == TIME:
        value = cell["ratio"]
    elif goal.measure == SHARE:
        value = None if base_us is None else cell["tbps"] / base["tbps"]
    elif goal.measure == ROOF:
        value = cell["tbps"] / read_tbps
    if value is None:
        return
    met = None if goal.wanted is None else _fits(value, goal.measure, goal.wanted)
    cell |= {"measure": goal.measure, "value": value, "wanted": goal.wanted, "met": met}


def _fits(value: float, measure: str, wanted: float) -> bool:
    return value >= wanted if measure in _AT_LEAST else value <= wanted


@dataclass(frozen=True)
class Regime:
    """A variant over all cells of which the same is wanted.

    Attributes:
        part: of the run.
        variant: its name.
        base: what it is compared with, ``None`` if with nothing.
        measure: of ``MEASURES``.
        wanted: the limit, or ``None``.
        cells: those with a value.
    """

    part: str
    variant: str
    base: str | None
    measure: str
    wanted: float | None
    cells: Sequence[Cell]

    @property
    def mean(self) -> float:
        """Geometric mean of the values."""
        logs = [math.log(cell["value"]) for cell in self.cells]
        return math.exp(sum(logs) / len(logs))

    @property
    def worst(self) -> Cell:
        """The cell farthest on the wrong side."""
        choose = min if self.measure in _AT_LEAST else max
        return choose(self.cells, key=lambda cell: cell["value"])

    @property
    def tokens(self) -> list[int]:
        """The numbers of tokens, in order."""
        return sorted({cell["m"] for cell in self.cells})

    @property
    def limit(self) -> str:
        """What is wanted, in short."""
        if self.wanted is None:
            return "-"
        sign = ">=" if self.measure in _AT_LEAST else "<="
        return f"{sign} {self.wanted:.2f}{' us' if self.measure == US else ''}"

    @property
    def outcome(self) -> str:
        """``met``, ``not met, 3 of 24 cells``, or ``-`` where nothing is wanted."""
        if self.wanted is None:
            return "-"
        missed = sum(not cell["met"] for cell in self.cells)
        return f"not met, {missed} of {len(self.cells)} cells" if missed else "met"

    def told(self, cell: Cell) -> str:
        """Value and place of a cell."""
        shape = f"{cell['n']}x{cell['k']}" if cell["n"] is not None else f"K = {cell['k']}"
        return f"{cell['value']:.2f} ({shape}, M = {cell['m']})"


def regimes(cells: Iterable[Cell]) -> list[Regime]:
    """Cells with a value by variant and by what is wanted, in order of appearance."""
    found: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        if cell["value"] is not None:
            key = tuple(cell[name] for name in ("part", "variant", "base", "measure", "wanted"))
            found.setdefault(key, []).append(cell)
    return [
        Regime(part, variant, base, measure, wanted, group)
        for (part, variant, base, measure, wanted), group in found.items()
    ]


def reasons(cells: Iterable[Cell]) -> dict[str, int]:
    """Why there are no times, by variant, and in how many cells."""
    found: dict[str, int] = {}
    for cell in cells:
        if cell["skip"] is not None:
            text = f"{cell['part']}, {cell['variant']}: {cell['skip']}"
            found[text] = found.get(text, 0) + 1
    return found
