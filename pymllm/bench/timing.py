"""Time of one call: GPU time by CUDA-graph replay, eager loops, host cost, and CPU wall clock.

GPU modules are reached through ``torch.cuda`` inside the functions, so importing needs no GPU.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]

LOW, HIGH = 10, 90
WARM_REPLAYS, REPLAYS = 3, 12
# Fewer copies are rotated where all of them would take longer.
MAX_GRAPH_US = 3_000.0
# One weight in the L2 has nothing to rotate: its call is repeated until launches do not count.
MIN_GRAPH_US = 1_000.0
MAX_CALLS = 512
# A dozen replays of a call this long would take seconds: the median of fewer has to do.
LONG_CALL_US = 20_000.0
LONG_REPLAYS = 5
# Of a call this long, the host's share is nothing.
SURE_CALL_US = 5_000.0
PILOT_CALLS = 4
EAGER_SAMPLES, CPU_SAMPLES = 11, 31
# Idle time before the replays of a call, in GPU time that they will take: back to back, compute-bound
# calls draw more than the board may, and its clock falls for all that follow.
REST = 3.0
MAX_REST_S = 0.6
# What is watched takes milliseconds to read; the GPU is kept busy for about as long.
WATCHED_US = 2_000.0


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call.

    Attributes:
        median_us: median of the samples.
        low_us: 10th percentile.
        high_us: 90th percentile.
        samples_us: every sample, each the mean of ``calls`` calls.
        copies: weight copies that were rotated.
        calls: calls of one sample.
    """

    median_us: float
    low_us: float
    high_us: float
    samples_us: tuple[float, ...]
    copies: int
    calls: int


def summarize(samples_us: Sequence[float], copies: int, calls: int) -> Timing:
    """Median and percentiles of samples, at least one."""
    ordered = sorted(samples_us)
    return Timing(
        statistics.median(ordered),
        percentile(ordered, LOW),
        percentile(ordered, HIGH),
        tuple(samples_us),
        copies,
        calls,
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Percentile of sorted values, linear between neighbours."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def copies_for(bytes_a_copy: int, min_bytes: int, most: int = 64) -> int:
    """Weight copies that together exceed ``min_bytes``: 2 .. ``most``."""
    return max(2, min(most, -(-min_bytes // max(1, bytes_a_copy))))


def cold_bytes(l2_bytes: int | None) -> int:
    """What the weight copies must add up to so that none is found in the L2."""
    return max(256 * 2**20, 4 * (l2_bytes or 0))


def graph_method(gpu: bool) -> str:
    """What a sample is; runs that say other words are not compared."""
    if not gpu:
        return "wall clock of calls that rotate over copies of the weight"
    return (
        "one CUDA graph holds one call of each copy of the weight; a sample is one replay / calls, the"
        " graph's launch included; each replay ends before the next is issued"
    )


def plan_calls(copies: int, call_us: float) -> tuple[int, int]:
    """How many copies a graph rotates and how many calls it holds: one for each copy.

    All copies while the graph stays under ``MAX_GRAPH_US``, fewer (but two) when one call is long; of
    very long calls one. A single copy is called again and again until the graph has ``MIN_GRAPH_US``.
    """
    call_us = max(call_us, 0.5)
    if call_us > LONG_CALL_US:
        return 1, 1
    if copies == 1:
        return 1, min(MAX_CALLS, math.ceil(MIN_GRAPH_US / call_us))
    used = copies
    if copies * call_us > MAX_GRAPH_US:
        used = min(copies, max(2, int(MAX_GRAPH_US / call_us)))
    return used, used


def replays_for(call_us: float) -> tuple[int, int]:
    """How many replays warm up, and how many are timed."""
    return (1, LONG_REPLAYS) if call_us > LONG_CALL_US else (WARM_REPLAYS, REPLAYS)


def rest_for(graph_us: float, call_us: float, rest: float) -> float:
    """Seconds of idle time before the replays of a graph."""
    return min(MAX_REST_S, rest * sum(replays_for(call_us)) * graph_us / 1e6)


def graph_time(
    calls: Sequence[Call], rest: float = 0.0, watch: Callable[[], None] | None = None
) -> Timing:
    """GPU time of one call, weights from wherever rotating over ``calls`` leaves them.

    A sample is a replay of a graph that holds one call of each copy, launch of the graph included; the
    host waits for each replay before it issues the next.

    Args:
        calls: one thunk for each weight copy; a single one leaves its weight in the L2.
        rest: idle time before the replays, as a multiple of the GPU time that they will take.
        watch: called once, after the samples, while further replays keep the GPU busy.
    """
    call_us = pilot_time(calls)
    used, count = plan_calls(len(calls), call_us)
    warm, timed = replays_for(call_us)
    graph = capture([calls[i % used] for i in range(count)])
    time.sleep(rest_for(count * call_us, call_us, rest))
    replay(graph, warm)
    samples = replay(graph, timed)
    if watch is not None:
        for _ in range(max(1, min(64, int(WATCHED_US / (count * call_us))))):
            graph.replay()
        watch()
        torch.cuda.synchronize()
    graph.reset()
    return summarize([sample / count for sample in samples], used, count)


def side_by_side(rotations: Sequence[Sequence[Call]], rest: float = 0.0) -> list[Timing]:
    """:func:`graph_time` of several, replayed in turns: a clock that drifts is the same for all.

    All graphs hold the same number of calls, so that their launch counts the same in each.

    Args:
        rotations: for each what :func:`graph_time` takes.
        rest: idle time before the replays, as a multiple of the GPU time that they will take.
    """
    call_us = [pilot_time(calls) for calls in rotations]
    planned = zip(rotations, call_us, strict=True)
    count = max(plan_calls(len(calls), us)[1] for calls, us in planned)
    warm, timed = replays_for(max(call_us))
    graphs = [capture([calls[i % len(calls)] for i in range(count)]) for calls in rotations]
    time.sleep(rest_for(count * sum(call_us), max(call_us), rest))
    samples: list[list[float]] = [[] for _ in graphs]
    for turn in range(warm + timed):
        for place in range(len(graphs)):
            # Each comes first in turn: after idle time the first may find a lower clock.
            which = (place + turn) % len(graphs)
            samples[which] += replay(graphs[which], 1)
    for graph in graphs:
        graph.reset()
    return [
        summarize([us / count for us in found[warm:]], min(len(calls), count), count)
        for calls, found in zip(rotations, samples, strict=True)
    ]


def pilot_time(calls: Sequence[Call]) -> float:
    """About how many microseconds a call takes on the GPU; afterwards each may be captured."""
    call_us = _warm_up(calls)
    if call_us < SURE_CALL_US:
        # Short calls issued one by one show the host: a first graph tells how long they are.
        pilot = capture([calls[i % len(calls)] for i in range(PILOT_CALLS)])
        call_us = min(replay(pilot, 2)) / PILOT_CALLS
        pilot.reset()
    return call_us


def _warm_up(calls: Sequence[Call]) -> float:
    """Runs what compiles or allocates before any capture; microseconds of one eager call."""
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
        call_us = _eager_sample(calls[:1], 1)
        if call_us < SURE_CALL_US:
            for call in calls[:3]:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return call_us


@functools.cache
def _side_stream(device: int) -> Any:
    # One for all captures: what libraries allocate for each stream, they allocate once.
    make: Any = torch.cuda.Stream
    return make(device=device)


def capture(calls: Sequence[Call]) -> Any:
    """A CUDA graph of these calls, each of which was made before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_side_stream(torch.cuda.current_device())):
        for call in calls:
            call()
    return graph


def _event() -> Any:
    make: Any = torch.cuda.Event
    return make(enable_timing=True)


def replay(graph: Any, samples: int) -> list[float]:
    """Microseconds of each replay; each ends before the next begins."""
    times = []
    for _ in range(samples):
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3)
    return times


def eager_time(calls: Sequence[Call], samples: int = EAGER_SAMPLES) -> Timing:
    """Time of one call in a loop of eager calls between two events: GPU time or host, the longer."""
    _warm_up(calls)
    pilot_us = _eager_sample(calls, len(calls)) / len(calls)
    used, count = plan_calls(len(calls), pilot_us)
    count *= max(1, math.ceil(MIN_GRAPH_US / (count * max(pilot_us, 0.5))))
    times = [_eager_sample(calls[:used], count) / count for _ in range(samples)]
    return summarize(times, used, count)


def _eager_sample(calls: Sequence[Call], count: int) -> float:
    """Microseconds of ``count`` eager calls on the current stream."""
    start, end = _event(), _event()
    start.record()
    for i in range(count):
        calls[i % len(calls)]()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def host_time(
    call: Call, count: int = 48, samples: int = EAGER_SAMPLES, *, to_the_end: bool = False
) -> Timing:
    """Host time to issue one eager call. Few calls a sample, so that no full queue blocks them.

    Args:
        call: what to time.
        count: calls of a sample.
        samples: how many.
        to_the_end: until the GPU has done them: the longer of the host's time and the GPU's.
    """
    for _ in range(20):
        call()
    times = []
    for _ in range(samples):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        if to_the_end:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6 / count)
    torch.cuda.synchronize()
    return summarize(times, 1, count)


def cpu_time(calls: Sequence[Call], budget_s: float = 0.15) -> Timing:
    """Wall clock of one call on a CPU, rotating over ``calls``."""
    for call in calls[:2]:
        call()
    start = time.perf_counter()
    calls[0]()
    pilot = max(time.perf_counter() - start, 1e-7)
    count = max(1, min(100, int(1e-3 / pilot)))
    samples = max(5, min(CPU_SAMPLES, int(budget_s / (pilot * count))))
    times = []
    turn = 0
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(count):
            calls[turn % len(calls)]()
            turn += 1
        times.append((time.perf_counter() - start) * 1e6 / count)
    return summarize(times, min(len(calls), turn), count)
