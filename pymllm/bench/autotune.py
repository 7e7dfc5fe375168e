"""How peers that use Triton's autotuner search: fewer candidates, compiled side by side.

Triton compiles the candidates one after the other, in the process that times them. For thousands of
them that takes an hour; compiled by as many processes as there are cores, into Triton's cache on disk,
minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pymllm.bench.limits import time_limit

# A thread has 255 registers: accumulators or unpacked weights beyond this spill, and such tiles take
# tens of seconds to compile.
ACCUMULATORS, WEIGHTS = 128, 256
COMPILE_LIMIT_S = 20.0
WARM_MS, TIMED_MS = 5, 20


def fits(config: Any) -> bool:
    """Whether a candidate's tile fits the registers of its threads."""
    m, n, k = (config.kwargs.get(f"BLOCK_SIZE_{name}", 1) for name in "MNK")
    threads = 32 * config.num_warps
    return bool(m * n <= ACCUMULATORS * threads and n * k <= WEIGHTS * threads)


def thinned(configs: Sequence[Any], limit: int, failed: Collection[str] = ()) -> list[Any]:
    """At most ``limit`` candidates that fit, the same in every process, spread over all.

    Args:
        configs: Triton's ``Config`` objects.
        limit: the most to keep.
        failed: those (as text) that are known not to compile.
    """
    if len(configs) <= limit:
        kept = list(configs)
    else:
        fitting = [config for config in configs if fits(config)] or list(configs)
        kept = sorted(fitting, key=_lot)[:limit]
    return [config for config in kept if str(config) not in failed] or kept[:1]


def _lot(config: Any) -> str:
    # Not the place in the list: classes of M then share candidates, and what was compiled of them.
    return hashlib.sha256(str(config).encode()).hexdigest()


@contextmanager
def searching(limit: int, failed: Collection[str] = ()) -> Iterator[None]:
    """Inside, Triton's autotuners try at most ``limit`` candidates, each for 25 ms instead of 125."""
    import triton.testing
    from triton.runtime.autotuner import Autotuner

    tuner: Any = Autotuner
    prune, bench = tuner.prune_configs, tuner._bench

    def prune_configs(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        return thinned(list(prune(self, kwargs)), limit, failed)

    def timed(self: Any, *args: Any, config: Any, **meta: Any) -> Any:
        self._do_bench = _do_bench
        self.__dict__.pop("do_bench", None)
        return bench(self, *args, config=config, **meta)

    def _do_bench(call: Callable[[], Any], quantiles: Sequence[float]) -> Any:
        return triton.testing.do_bench(call, warmup=WARM_MS, rep=TIMED_MS, quantiles=quantiles)

    tuner.prune_configs, tuner._bench = prune_configs, timed
    try:
        yield
    finally:
        tuner.prune_configs, tuner._bench = prune, bench


@contextmanager
def compiling(limit: int, index: int, count: int) -> Iterator[list[str]]:
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

    with searching(limit):
        tuner.run = compile_only
        try:
            yield failed
        finally:
            tuner.run = run


def compile_side_by_side(task: Mapping[str, Any], limit_s: float) -> set[str]:
    """Runs :mod:`pymllm.bench.precompile` in as many processes as there are cores.

    Args:
        task: what to compile, as that module takes it, without ``index`` and ``count``.
        limit_s: seconds after which what still compiles is ended.

    Returns:
        Candidates that do not compile, as text.

    Raises:
        RuntimeError: a process failed; the message has the end of its output.
        TimeoutError: the time was not enough; what was compiled stays.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    deadline = time.monotonic() + limit_s
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "pymllm.bench.precompile"]
    texts = [json.dumps({**task, "index": i, "count": count}) for i in range(count or 1)]
    started = [
        subprocess.Popen(
            [*command, text], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for text in texts
    ]  # fmt: skip
    try:
        return _gathered(started, deadline)
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
