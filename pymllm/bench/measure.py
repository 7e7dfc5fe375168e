"""One layer against its providers: correctness first, then time; every failure becomes a record."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from pymllm.bench.limits import time_limit
from pymllm.bench.nvml import Board
from pymllm.bench.providers import Description, Linear, Provider
from pymllm.bench.roof import Roof, moved_bytes, roof_us
from pymllm.bench.shapes import TUNED_SHAPES, Shape
from pymllm.bench.timing import (
    REST,
    Timing,
    copies_for,
    cpu_time,
    eager_time,
    graph_time,
    host_time,
)
from pymllm.bench.workload import ERROR_LIMITS, GROUP, Workload

Cell = dict[str, Any]
MODES = ("graph", "eager", "host")
CACHES = ("cold", "hot")
# Issuing a call costs the host the same whatever the size; the GPU must keep up.
HOST_TOKENS = 16
TUNED_TOKENS = (1, 16, 64, 256, 1024)
BUILD_LIMIT_S = 120.0


class Stopped(Exception):
    """The run cannot or may not go on; what was measured stays."""


class Record(NamedTuple):
    """A cell of the document, and its samples if it has a time."""

    cell: Cell
    timing: Timing | None


@dataclass(frozen=True)
class Plan:
    """What is measured of each layer.

    Attributes:
        tokens: numbers of tokens.
        modes: of ``MODES``; ignored on a CPU, whose only mode is ``"cpu"``.
        caches: of ``CACHES``.
        dtype: of activations.
        group: inputs a scale of W4A16.
        host_shape: the layer on which host cost is measured, or ``None`` for all.
        tuned_shapes: layers on which slowly tuning peers are timed; ``None`` for all.
        tuned_tokens: tokens with which they are.
        min_bytes: what weight copies must add up to.
        rest: idle time before the replays of a call, as a multiple of the GPU time that they take.
        deadline: ``time.monotonic()`` at which to stop, or ``None``.
    """

    tokens: Sequence[int]
    modes: Sequence[str] = ("graph",)
    caches: Sequence[str] = ("cold",)
    dtype: torch.dtype = torch.bfloat16
    group: int = GROUP
    host_shape: Shape | None = None
    tuned_shapes: Sequence[Shape] | None = TUNED_SHAPES
    tuned_tokens: Sequence[int] = TUNED_TOKENS
    min_bytes: int = 256 * 2**20
    rest: float = REST
    deadline: float | None = None

    def clocks(self, work: Workload, m: int) -> list[tuple[str, str]]:
        """(mode, cache) of every time wanted for this layer and ``m`` tokens."""
        if work.device.type == "cpu":
            return [("cpu", cache) for cache in self.caches]
        wanted = [(mode, cache) for mode in self.modes if mode != "host" for cache in self.caches]
        small = self.host_shape in (None, (work.n, work.k)) and m <= HOST_TOKENS
        return [*wanted, ("host", "hot")] if "host" in self.modes and small else wanted


def no_progress(text: str) -> None:
    """Says nothing."""


@dataclass
class Bench:
    """Measures providers on one layer at a time.

    Attributes:
        roof: the ceilings, for the fraction of the roof.
        plan: what to measure.
        progress: is told what is being done.
        board: tells clock and power at each cell, or ``None``.
    """

    roof: Roof
    plan: Plan
    progress: Callable[[str], None] = field(default=no_progress)
    board: Board | None = None

    def layer(self, work: Workload, provider: Provider) -> Iterator[Record]:
        """All records of one provider on one layer, shortest first.

        Raises:
            Stopped: the time is over, or the GPU no longer answers.
        """
        try:
            yield from self._layer(work, provider)
        finally:
            _free(work.device)

    def _layer(self, work: Workload, provider: Provider) -> Iterator[Record]:
        tokens, reason = self.tokens(provider, (work.n, work.k))
        reason = reason or provider.why_not(work)
        calls: list[Linear] = []
        if reason is None:
            copies = copies_for(provider.bytes_a_copy(work), self.plan.min_bytes)
            try:
                with time_limit(BUILD_LIMIT_S):
                    calls = provider.build(work, copies)
            except Exception as error:  # noqa: BLE001  a peer may fail in any way
                reason = failure(error, work.device)
        for m in tokens:
            self._check_deadline()
            self.progress(f"{work.scheme} {work.n}x{work.k} {provider.name} M={m}")
            if reason is not None:
                yield from self._skipped(work, provider, m, reason)
            else:
                yield from self._tokens_of(work, provider, calls, m)

    def tokens(self, provider: Provider, shape: Shape) -> tuple[Sequence[int], str | None]:
        """The tokens to time on a layer, and why there will be no times."""
        plan = self.plan
        if not provider.only_tuned_shapes:
            return plan.tokens, None
        tokens = [m for m in plan.tokens if m in plan.tuned_tokens]
        if plan.tuned_shapes is None or shape in plan.tuned_shapes:
            return tokens, None
        shapes = ", ".join("{}x{}".format(*shape) for shape in plan.tuned_shapes)
        return tokens, f"tunes for minutes a shape: timed on {shapes} only"

    def _check_deadline(self) -> None:
        if self.plan.deadline is not None and time.monotonic() > self.plan.deadline:
            raise Stopped("the time limit was reached")

    def _tokens_of(
        self, work: Workload, provider: Provider, calls: list[Linear], m: int
    ) -> Iterator[Record]:
        x = work.x(m)
        error = None
        reason = provider.why_not_tokens(work, m)
        if reason is None:
            try:
                with time_limit(provider.limit_s):
                    provider.prepare(calls, x)
                error = work.error(calls[0](x), m)
                reason = _wrong(error, work)
            except Exception as problem:  # noqa: BLE001  a peer may fail in any way
                reason = failure(problem, work.device)
        if reason is not None:
            yield from self._skipped(work, provider, m, reason, error)
            return
        told = _told(provider, work, m)
        for mode, cache in self.plan.clocks(work, m):
            cell = blank(work, provider.name, m, mode, cache)
            cell |= {"error": error, "config": told.config, "origin": told.origin}
            try:
                timing = self._time([partial(call, x) for call in calls], cell)
            except Exception as problem:  # noqa: BLE001  a peer may fail in any way
                cell["skip"] = failure(problem, work.device)
                yield Record(cell, None)
                continue
            fill(cell, timing, self.roof)
            yield Record(cell, timing)
            if work.device.type == "cuda":
                # Captured graphs hold on to memory of their own.
                torch.cuda.empty_cache()

    def _time(self, calls: Sequence[Callable[[], object]], cell: Cell) -> Timing:
        mode = cell["mode"]
        rotated = calls if cell["cache"] == "cold" else calls[:1]
        if mode == "host":
            return host_time(calls[0])
        if mode == "graph":
            board = self.board
            watch = None if board is None else lambda: cell.update(board.at_work())
            return graph_time(rotated, self.plan.rest, watch)
        return eager_time(rotated) if mode == "eager" else cpu_time(rotated)

    def _skipped(
        self, work: Workload, provider: Provider, m: int, reason: str, error: float | None = None
    ) -> Iterator[Record]:
        for mode, cache in self.plan.clocks(work, m):
            cell = blank(work, provider.name, m, mode, cache)
            finite = error is not None and math.isfinite(error)
            cell |= {"skip": reason, "error": error if finite else None}
            yield Record(cell, None)


def blank(work: Workload, provider: str, m: int, mode: str, cache: str) -> Cell:
    """A cell without results: every key, in the document's order."""
    return {
        "scheme": work.scheme,
        "n": work.n,
        "k": work.k,
        "m": m,
        "group": work.group,
        "dtype": str(work.dtype).removeprefix("torch."),
        "provider": provider,
        "mode": mode,
        "cache": cache,
        "skip": None,
        "median_us": None,
        "low_us": None,
        "high_us": None,
        "copies": None,
        "replays": None,
        "sm_mhz": None,
        "power_w": None,
        "throttle": None,
        "tbps": None,
        "tops": None,
        "roof_us": None,
        "roof_fraction": None,
        "error": None,
        "config": None,
        "origin": None,
    }


def fill(cell: Cell, timing: Timing, roof: Roof) -> None:
    """Writes a timing and what follows from it into a cell."""
    scheme, n, k, m, group = (cell[key] for key in ("scheme", "n", "k", "m", "group"))
    least = roof_us(roof, scheme, m, n, k, group)
    median = timing.median_us
    cell |= {
        "median_us": median,
        "low_us": timing.low_us,
        "high_us": timing.high_us,
        "copies": timing.copies,
        "replays": len(timing.samples_us),
    }
    if cell["mode"] != "host":
        cell |= {
            "tbps": moved_bytes(scheme, m, n, k, group) / median / 1e6,
            "tops": 2 * m * n * k / median / 1e6,
            "roof_us": least,
            "roof_fraction": least / median,
        }


def _told(provider: Provider, work: Workload, m: int) -> Description:
    try:
        return provider.describe(work, m)
    except Exception as error:  # noqa: BLE001  a time is worth keeping without its description
        return Description(f"not known ({type(error).__name__}: {error})", "library")


def _wrong(error: float, work: Workload) -> str | None:
    limit = ERROR_LIMITS[work.scheme]
    # NaN fails this comparison, too.
    if error <= limit:
        return None
    return f"wrong result: relative error {error:.3g} against float64, accepted up to {limit}"


def failure(error: BaseException, device: torch.device) -> str:
    """One line about an exception.

    Raises:
        Stopped: the GPU does not answer since: nothing can be measured any more.
    """
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError:
            raise Stopped(f"the GPU was lost: {reason}") from error
    return reason


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
