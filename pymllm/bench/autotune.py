"""How peers that use Triton's autotuner search: fewer candidates, compiled side by side.

Triton compiles the candidates one after the other, in the process that times them. For thousands of
them that takes an hour; compiled by as many processes as there are cores, into Triton's cache on disk,
minutes. A search has two rounds: a sample of all tiles, then the best tiles in all their variants.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pymllm.bench.limits import time_limit
from pymllm.bench.timing import cold_bytes, percentile

# A thread has 255 registers: accumulators or unpacked weights beyond this spill, and such tiles take
# tens of seconds to compile.
ACCUMULATORS, WEIGHTS = 128, 256
COMPILE_LIMIT_S = 20.0
LEAST_SAMPLES, SAMPLES = 5, 20
# Of a slow candidate this many milliseconds are enough.
TIMED_MS = 25.0
BEST_TILES = 4
# What two variants of a tile differ in, beside the stages that Triton knows of.
_VARIANT = ("NUM_STAGES", "A_load_order", "dot_prod_mode")


@dataclass
class Plan:
    """Which candidates a search tries.

    Attributes:
        limit: the most of a class.
        failed: candidates (as text) that are known not to compile.
        tiles: by class, the tiles that are tried in all their variants; a sample of all elsewhere.
    """

    limit: int
    failed: set[str] = field(default_factory=set)
    tiles: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> list[Any]:
        """For another process."""
        return [self.limit, sorted(self.failed), self.tiles]

    @classmethod
    def from_json(cls, entry: Sequence[Any]) -> Plan:
        """What :meth:`to_json` wrote."""
        limit, failed, tiles = entry
        return cls(limit, set(failed), tiles)

    def candidates(self, configs: Sequence[Any], kind: str) -> list[Any]:
        """Those of a class to try, at least one."""
        best = self.tiles.get(kind)
        if best is None:
            kept = thinned(configs, self.limit)
        else:
            kept = [config for config in configs if tile(config) in best] or list(configs[:1])
        return [config for config in kept if str(config) not in self.failed] or kept[:1]


def tile(config: Any) -> str:
    """The tile and the warps of a candidate, without what makes it a variant of them."""
    sizes = {key: value for key, value in config.kwargs.items() if key not in _VARIANT}
    return f"{sorted(sizes.items())} {config.num_warps}"


def fits(config: Any) -> bool:
    """Whether a candidate's tile fits the registers of its threads."""
    m, n, k = (config.kwargs.get(f"BLOCK_SIZE_{name}", 1) for name in "MNK")
    threads = 32 * config.num_warps
    return bool(m * n <= ACCUMULATORS * threads and n * k <= WEIGHTS * threads)


def thinned(configs: Sequence[Any], limit: int) -> list[Any]:
    """At most ``limit`` candidates that fit, the same in every process: every tile once, then twice, ...

    Args:
        configs: Triton's ``Config`` objects.
        limit: the most to keep.
    """
    if len(configs) <= limit:
        return list(configs)
    fitting = [config for config in configs if fits(config)] or list(configs)
    seen: Counter[str] = Counter()
    turns = []
    for config in sorted(fitting, key=_lot):
        turns.append((seen[tile(config)], config))
        seen[tile(config)] += 1
    # Sorting is stable: within a turn, the lot decides.
    return [config for _, config in sorted(turns, key=lambda turn: turn[0])][:limit]


def _lot(config: Any) -> str:
    # Not the place in the list: classes of M then share candidates, and what was compiled of them.
    return hashlib.sha256(str(config).encode()).hexdigest()


def class_of(tuner: Any, kwargs: Mapping[str, Any]) -> str:
    """The class of calls that an autotuner, inside its ``run``, searches for; the same in all processes."""
    given = {**tuner.nargs, **kwargs}
    return f"{tuner.base_fn.__name__} {[given[key] for key in tuner.keys if key in given]}"


def best_tiles(tuner: Any) -> list[str]:
    """The fastest tiles of an autotuner's last search."""
    timings = tuner.configs_timings
    ordered = dict.fromkeys(tile(config) for config in sorted(timings, key=timings.get))
    return list(ordered)[:BEST_TILES]


@contextmanager
def searching(plan: Plan) -> Iterator[dict[str, Any]]:
    """Inside, Triton's autotuners try a plan's candidates, and time them with :func:`cold_ms`.

    Yields:
        the autotuners that have searched, by the class that they searched for.
    """
    from triton.runtime.autotuner import Autotuner

    tuner: Any = Autotuner
    prune, bench = tuner.prune_configs, tuner._bench
    searched: dict[str, Any] = {}

    def prune_configs(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        kind = class_of(self, kwargs)
        searched[kind] = self
        return plan.candidates(list(prune(self, kwargs)), kind)

    def timed(self: Any, *args: Any, config: Any, **meta: Any) -> Any:
        self._do_bench = _do_bench
        self.__dict__.pop("do_bench", None)
        return bench(self, *args, config=config, **meta)

    def _do_bench(call: Callable[[], Any], quantiles: Sequence[float]) -> list[float]:
        ordered = sorted(cold_ms(call))
        return [percentile(ordered, 100 * quantile) for quantile in quantiles]

    tuner.prune_configs, tuner._bench = prune_configs, timed
    try:
        yield searched
    finally:
        tuner.prune_configs, tuner._bench = prune, bench


def cold_ms(call: Callable[[], Any]) -> list[float]:
    """GPU times of an eager call, milliseconds, nothing of its data in the L2.

    A call through the autotuner takes the host 0.1 ms and more: that long the GPU is kept busy before
    the time begins, or else calls of few microseconds would be ordered by the host's noise.
    """
    cuda: Any = torch.cuda
    flush = torch.empty(cold_bytes(None), dtype=torch.int8, device="cuda")
    call()
    cuda.synchronize()
    began = time.perf_counter()
    call()
    host_s = time.perf_counter() - began
    cuda.synchronize()
    # Cycles of a clock of at most 2 GHz.
    busy = int(2e9 * (1.5 * host_s + 50e-6))
    times: list[float] = []
    while len(times) < LEAST_SAMPLES or (len(times) < SAMPLES and sum(times) < TIMED_MS):
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        flush.zero_()
        cuda._sleep(busy)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return times


def first_round(plan: Plan, call: Callable[[], Any]) -> None:
    """Searches what a call needs, notes the best tiles in the plan, and forgets the result.

    Args:
        plan: without tiles for the classes of this call.
        call: a call of the layer.
    """
    with searching(plan) as searched:
        call()
    for kind, tuner in searched.items():
        plan.tiles[kind] = best_tiles(tuner)
        tuner.cache.clear()


@contextmanager
def compiling(plan: Plan, index: int, count: int) -> Iterator[list[str]]:
    """Inside, autotuned kernels are compiled instead of run: every ``count``-th candidate.

    Yields:
        the list that the candidates which do not compile are added to, as text.
    """
    from triton.runtime.autotuner import Autotuner

    tuner: Any = Autotuner
    run = tuner.run
    failed: list[str] = []

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs)[index::count]:
            meta = {**kwargs, **config.all_kwargs(), "warmup": True}
            try:
                with time_limit(COMPILE_LIMIT_S):
                    self.fn.run(*args, **meta)
            except Exception:  # noqa: BLE001  the search then leaves it out
                failed.append(str(config))
        self.nargs = None

    with searching(plan):
        tuner.run = compile_only
        try:
            yield failed
        finally:
            tuner.run = run


def compile_side_by_side(task: Mapping[str, Any], plan: Plan, limit_s: float) -> None:
    """Compiles a plan's candidates in as many processes as there are cores.

    Candidates that do not compile are added to the plan's.

    Args:
        task: what to compile, as :mod:`pymllm.bench.precompile` takes it: provider, options, jobs.
        plan: which candidates.
        limit_s: seconds after which what still compiles is ended.

    Raises:
        RuntimeError: a process failed; the message has the end of its output.
        TimeoutError: the time was not enough; what was compiled stays.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    deadline = time.monotonic() + limit_s
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "pymllm.bench.precompile"]
    whole = {**task, "plan": plan.to_json(), "count": count}
    started = [
        subprocess.Popen(
            [*command, json.dumps({**whole, "index": i})], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(count or 1)
    ]  # fmt: skip
    try:
        plan.failed |= _gathered(started, deadline)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"compiling took longer than {limit_s:.0f} s") from None
    finally:
        for process in started:
            process.kill()
            process.wait()


def _gathered(started: Sequence[subprocess.Popen[str]], deadline: float) -> set[str]:
    failed: set[str] = set()
    for process in started:
        out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        if process.returncode:
            last = " ".join(err.split())[-300:]
            raise RuntimeError(f"compiling failed ({process.returncode}): {last}")
        failed |= set(json.loads(out.splitlines()[-1]))
    return failed
