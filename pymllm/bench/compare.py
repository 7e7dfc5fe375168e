"""Comparing two runs: refused where it would mean nothing, else how far their times are apart."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pymllm.bench.run import cell_key

# Measured rates within this are the same machine under the same limits. A momentary reading of the SM
# clock says less: on one H200 it lay between 1440 and 1980 MHz while the rates agreed within 8 %.
RATE_TOLERANCE = {"read_tbps": 0.05, "bf16_tops": 0.1}


@dataclass(frozen=True)
class Comparison:
    """Times of one run over those of another, cell by cell.

    Attributes:
        ratios: new median / old median of every cell that has both, by cell key.
        only_old: cells with a time in the old run only.
        only_new: cells with a time in the new run only.
    """

    ratios: Mapping[tuple[Any, ...], float]
    only_old: int
    only_new: int

    def share_within(self, tolerance: float) -> float:
        """Share of the cells whose times differ by at most this (0.03 is 3 %)."""
        within = sum(abs(ratio - 1) <= tolerance for ratio in self.ratios.values())
        return within / len(self.ratios) if self.ratios else float("nan")

    @property
    def median_ratio(self) -> float:
        """Median of new / old."""
        return statistics.median(self.ratios.values()) if self.ratios else float("nan")

    def outside(self, tolerance: float) -> list[tuple[tuple[Any, ...], float]]:
        """Cells that differ by more than the tolerance, the farthest first."""
        far = [(key, r) for key, r in self.ratios.items() if abs(r - 1) > tolerance]
        return sorted(far, key=lambda entry: -abs(entry[1] - 1))


def why_not_comparable(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """``None`` if two documents can be compared, else the reason."""
    for name in ("device", "gpu", "capability"):
        a, b = old["environment"].get(name), new["environment"].get(name)
        if a != b:
            return f"different {name}: {a} and {b}"
    for name in ("cache", "min_copy_bytes"):
        a, b = old["method"].get(name), new["method"].get(name)
        if a != b:
            return f"different cache state ({name}): {a} and {b}"
    if old["method"].get("graph") != new["method"].get("graph"):
        return "different methods: they say in other words what a sample is"
    if (modes := _modes(old)) != _modes(new) and not modes & _modes(new):
        return f"different modes: {sorted(modes)} and {sorted(_modes(new))}"
    return _why_clocks_differ(old, new)


def _modes(document: Mapping[str, Any]) -> set[str]:
    return {cell["mode"] for cell in document["cells"]}


def _why_clocks_differ(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Memory clock and measured rates: a limit that somebody set, or another load, shows in them."""
    clocks = [document["environment"].get("clocks_before") or {} for document in (old, new)]
    memory = [reading.get("memory_mhz") for reading in clocks]
    if all(memory) and memory[0] != memory[1]:
        return f"different clocks (memory_mhz): {memory[0]:g} and {memory[1]:g}"
    if old["environment"].get("device") != "cuda":
        return None
    # Runs of pytest-benchmark saved before it measured the rates have none.
    a, b = old.get("roof") or {}, new.get("roof") or {}
    for name, tolerance in RATE_TOLERANCE.items():
        x, y = a.get(name), b.get(name)
        if x and y and abs(x / y - 1) > tolerance:
            return f"different clocks (measured {name}): {x:.4g} and {y:.4g}"
    return None


def compare(
    old: Mapping[str, Any], new: Mapping[str, Any], providers: Iterable[str] | None = None
) -> Comparison:
    """Ratios of the cells that both runs timed.

    Args:
        old: a document.
        new: another one.
        providers: only these; all if None.

    Raises:
        ValueError: the two cannot be compared; the message gives the reason.
    """
    reason = why_not_comparable(old, new)
    if reason is not None:
        raise ValueError(f"these runs cannot be compared: {reason}")
    names = None if providers is None else set(providers)
    a, b = _times(old, names), _times(new, names)
    both = a.keys() & b.keys()
    return Comparison(
        {key: b[key] / a[key] for key in a if key in both},
        len(a.keys() - both),
        len(b.keys() - both),
    )


def _times(document: Mapping[str, Any], names: set[str] | None) -> dict[tuple[Any, ...], float]:
    return {
        cell_key(cell): cell["median_us"]
        for cell in document["cells"]
        if cell["median_us"] and (names is None or cell["provider"] in names)
    }
