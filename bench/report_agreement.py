# ruff: noqa: RUF001, RUF003  the sign of N × K
"""How far the peers of a run are from published figures of the same peers, and what may explain it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from report_tables import markdown_table

from pymllm.cli.bench_cells import OURS, microseconds
from pymllm.cli.report import counted

Cell = Mapping[str, Any]
Published = Mapping[tuple[str, int, int], Mapping[str, Mapping[int, float]]]
# A graph this short shows its own launch; how long that takes differs from host to host.
SHORT_GRAPH_US = 300.0
# Below this share of the run's highest clock, a cell is slower for its clock.
SLOW_CLOCK = 0.97
WIDE_SPREAD = 0.05
# A published time this much above one with more tokens was not the kernel's best.
QUICKER_WITH_MORE = 0.98


@dataclass(frozen=True)
class Pair:
    """One published time beside the cell that measured the same.

    Attributes:
        cell: of the run.
        theirs: the published time, microseconds.
        hint: what in the cell may explain the difference, or ``""``.
    """

    cell: Cell
    theirs: float
    hint: str

    @property
    def ratio(self) -> float:
        """Measured over published: above 1 it was slower here."""
        return float(self.cell["median_us"]) / self.theirs

    def within(self, tolerance: float) -> bool:
        """Whether the two differ by at most this (0.07 is 7 %)."""
        return abs(self.ratio - 1) <= tolerance


@dataclass(frozen=True)
class Agreement:
    """All published times that a run measured, too.

    Attributes:
        pairs: in the order of the run.
        tolerance: within which two times agree.
        not_measured: published times without a cell.
    """

    pairs: Sequence[Pair]
    tolerance: float
    not_measured: int

    @property
    def outside(self) -> list[Pair]:
        """The pairs that differ by more, by provider, the farthest first."""
        far = [pair for pair in self.pairs if not pair.within(self.tolerance)]
        return sorted(far, key=lambda pair: (pair.cell["provider"], -abs(pair.ratio - 1)))

    def providers(self) -> dict[str, list[Pair]]:
        """The pairs of each provider."""
        found: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            found.setdefault(pair.cell["provider"], []).append(pair)
        return found


def agreement(
    cells: Sequence[Cell], mode: str, cache: str, published: Published, tolerance: float
) -> Agreement:
    """Pairs the cells of one mode and cache state with published times.

    Args:
        cells: of a run.
        mode: of the cells to take.
        cache: of the cells to take.
        published: times by (scheme, N, K), provider and M; those named like ours are left out.
        tolerance: within which two times agree.
    """
    timed = [c for c in cells if c["median_us"] and (c["mode"], c["cache"]) == (mode, cache)]
    top = max((c.get("sm_mhz") or 0 for c in timed), default=0)
    pairs = []
    for cell in timed:
        place = published.get((cell["scheme"], cell["n"], cell["k"]), {})
        times = place.get(cell["provider"], {})
        theirs = times.get(cell["m"])
        if theirs is not None and cell["provider"] != OURS:
            pairs.append(Pair(cell, theirs, hint(cell, theirs, top, times)))
    known = sum(len(times) for place in published.values() for times in place.values())
    return Agreement(pairs, tolerance, known - len(pairs))


def hint(
    cell: Cell, theirs: float, top_mhz: float, published: Mapping[int, float] | None = None
) -> str:
    """What in a cell may explain that its time is not the published one.

    Args:
        cell: with a time.
        theirs: the published time, microseconds.
        top_mhz: the highest SM clock of the run, 0 if none was read.
        published: by M, all published times of this provider on this layer.
    """
    found = []
    clock, median = cell.get("sm_mhz"), cell["median_us"]
    slower = median > theirs
    more = {us: m for m, us in (published or {}).items() if m > cell["m"]}
    if not slower and more and min(more) < QUICKER_WITH_MORE * theirs:
        found.append(f"published with {min(more):.1f} µs at M = {more[min(more)]}")
    if slower and clock and clock < SLOW_CLOCK * top_mhz:
        found.append(f"{clock:.0f} MHz of {top_mhz:.0f}: up to {top_mhz / clock:.2f}")
    if slower and cell.get("throttle"):
        power = f" at {cell['power_w']:.0f} W" if cell.get("power_w") else ""
        found.append(f"{cell['throttle']}{power}")
    graph_us = median * (cell.get("copies") or 0)
    if 0 < graph_us < SHORT_GRAPH_US:
        found.append(f"graph of {graph_us:.0f} µs: its launch counts")
    if cell.get("high_us") and (cell["high_us"] - cell["low_us"]) / median > WIDE_SPREAD:
        found.append(f"spread {(cell['high_us'] - cell['low_us']) / median:.0%}")
    if cell.get("origin") == "tuned":
        found.append("another search may have found another tile")
    return "; ".join(found)


def _share(pairs: Sequence[Pair], tolerance: float) -> tuple[int, str]:
    same = sum(pair.within(tolerance) for pair in pairs)
    return same, f"{same / len(pairs):.1%}"


def as_markdown(found: Agreement) -> str:
    """The share in all, the share of each provider, and every cell outside."""
    if not found.pairs:
        return "no published cell was measured"
    same, share = _share(found.pairs, found.tolerance)
    head = (
        f"{same} of {len(found.pairs)} cells agree within {100 * found.tolerance:g} % ({share});"
        f" {counted(found.not_measured, 'published cell')} not measured"
    )
    rows: list[list[object]] = []
    for name, pairs in found.providers().items():
        ratios = sorted(pair.ratio for pair in pairs)
        part = _share(pairs, found.tolerance)
        rows.append([name, len(pairs), *part, f"{ratios[len(ratios) // 2]:.2f}",
                     f"{ratios[0]:.2f}", f"{ratios[-1]:.2f}"])  # fmt: skip
    titles = ["provider", "cells", "within", "share", "median ratio", "least", "greatest"]
    parts = [head, markdown_table(titles, rows)]
    if found.outside:
        parts.append(_outside(found.outside))
    return "\n\n".join(parts)


def _outside(pairs: Sequence[Pair]) -> str:
    rows = [
        [p.cell["provider"], p.cell["scheme"], f"{p.cell['n']} × {p.cell['k']}", p.cell["m"],
         microseconds(p.theirs), microseconds(p.cell["median_us"]), f"{p.ratio:.2f}", p.hint]
        for p in pairs
    ]  # fmt: skip
    titles = ["provider", "scheme", "N × K", "M", "published µs", "measured µs", "ratio", "hint"]
    return markdown_table(titles, rows)


def as_json(found: Agreement) -> dict[str, Any]:
    """The same for programs: shares from 0 to 1, times in microseconds."""
    keys = ("provider", "scheme", "n", "k", "m", "sm_mhz", "power_w", "throttle")
    same = sum(pair.within(found.tolerance) for pair in found.pairs)
    return {
        "tolerance": found.tolerance,
        "cells": len(found.pairs),
        "within": same,
        "not_measured": found.not_measured,
        "providers": {
            name: {
                "cells": len(pairs),
                "within": sum(pair.within(found.tolerance) for pair in pairs),
            }
            for name, pairs in found.providers().items()
        },
        "outside": [
            {key: pair.cell.get(key) for key in keys}
            | {
                "published_us": pair.theirs,
                "measured_us": pair.cell["median_us"],
                "ratio": pair.ratio,
                "hint": pair.hint,
            }
            for pair in found.outside
        ],
    }
