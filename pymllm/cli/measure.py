"""Time and error of a call: what ``demo`` and ``run`` report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_WARM_UP = 3
_MAX_CALLS = 30
_MIN_CALLS = 3
_CPU_SECONDS = 0.1


def median_milliseconds(call: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    """Median duration of ``call(x)`` after warm-up: CUDA events on a GPU, the clock on a CPU."""
    if x.device.type == "cuda":
        with torch.cuda.device(x.device):
            return _on_gpu(call, x)
    return _on_cpu(call, x)


def _on_gpu(call: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    for _ in range(_WARM_UP):
        call(x)
    pairs = []
    for _ in range(_MAX_CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call(x)
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(float(start.elapsed_time(end)) for start, end in pairs)


def _on_cpu(call: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    call(x)
    durations: list[float] = []
    stop = time.perf_counter() + _CPU_SECONDS
    while len(durations) < _MAX_CALLS:
        start = time.perf_counter()
        call(x)
        durations.append(time.perf_counter() - start)
        if len(durations) >= _MIN_CALLS and time.perf_counter() > stop:
            break
    return 1e3 * statistics.median(durations)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``; NaN and infinity stay."""
    difference = float((found.to(torch.float64) - expected).norm())
    size = float(expected.norm())
    return difference / size if size else difference
