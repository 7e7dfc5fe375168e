"""Running a benchmark, and the JSON document that it leaves.

The document (``FORMAT``, ``VERSION``); all times are microseconds of **one call**::

    {
      "format": "pymllm-bench",  "version": 1,
      "environment": {
        "device": "cuda" | "cpu",   "gpu": "NVIDIA H200" (on a CPU: its model name),
        "capability": "9.0" | null, "multiprocessors": 132 | null, "l2_bytes": int | null,
        "memory_bytes": int | null, "driver": str | null,
        "versions": {"python", "torch", "triton", "cuda", "pymllm", "gemlite", "humming-kernels",
                     "vllm", "torchao": those that were there},
        "commit": str | null,       git commit of the sources, "+" appended if they were changed
        "clocks_before": CLOCKS | null, "clocks_after": CLOCKS | null,
        "clocks_unreadable": null | reason
      },                            CLOCKS = {"sm_mhz", "memory_mhz", "temperature_c", "power_w",
                                              "throttle"}
      "roof": {                     the machine's ceilings, measured in the same run
        "read_tbps": float,         sum over 1 GiB (CPU: 128 MiB)
        "bf16_tops": float,         bf16 matmul, 8192^3 (CPU: 1024^3)
        "int_mm_tops": float|null,  torch._int_mm of the same size
        "int8_tops": float          max(2 * bf16_tops, int_mm_tops)
      },
      "method": {"cache": "cold", "min_copy_bytes": int, "graph": str, "percentiles": [10, 90],
                 "rest": float, "error": str, ...},          how it was measured, for people
      "command": str, "date": "2026-01-31T12:00:00+00:00", "wall_s": float,
      "complete": bool,             false while running, and when stopped by the time limit
      "stopped": str | null,        why it is not complete
      "providers": {NAME: {"about": str, "absent": null | reason,
                           "warm_s": seconds compiled ahead, "warm": null | what went wrong,
                           both only of those that compile ahead}},
      "cells": [CELL, ...]
    }

A ``CELL`` is one provider in one place; every key is always there::

    "scheme"   "w4a16" | "w8a8_int8"
    "n", "k", "m"              output features, input features, tokens
    "group"    128 | -1        inputs a scale; -1: one scale a row (always for w8a8_int8)
    "dtype"    "bfloat16" | "float16"         of activations and results
    "provider" "ours" | "cublas_bf16" (CPU: "torch_bf16") | "dequant_matmul" | "tinygemm" |
               "int_mm" | "humming" | "gemlite" | "marlin" | "machete" | "cutlass" |
               "vllm_triton" | "torchao"
    "mode"     "graph" (GPU time by CUDA-graph replay) | "eager" (loop of calls between two events)
               | "host" (host time to issue one call) | "cpu" (wall clock, on a CPU)
    "cache"    "cold" (weight copies rotated beyond the L2) | "hot" (one copy)
    "skip"     null, or why there is no time: every number below is then null, except "error" where
               the error is the reason
    "median_us", "low_us", "high_us"          median, 10th and 90th percentile
    "copies", "replays"        weight copies rotated, samples behind the median
    "sm_mhz", "power_w"        clock and power right after the samples, the call still running; null
                               where not read ("host", "eager", "cpu")
    "throttle"                 what held the clock down then, "" if nothing; null where not read
    "tbps"     (weights + scales + activations in and out) / median, 1e12 bytes/s
    "tops"     2 m n k / median, 1e12 operations/s
    "roof_us"  the least time the measured ceilings allow, of the *quantized* problem
    "roof_fraction"            roof_us / median_us; null for "host"
    "error"    relative Frobenius error against float64 of the same quantized weights
    "config"   str | null      tile or algorithm, where the provider tells
    "origin"   "pinned" | "store" | "shipped" | "rule" | "tuned" | "heuristic" | "library"

A cell is identified by (scheme, n, k, group, dtype, m, provider, mode, cache).
"""

from __future__ import annotations

import datetime
import gc
import itertools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pymllm.bench import environment as environments
from pymllm.bench.measure import Bench, Cell, Plan, Record, Stopped, failure, no_progress
from pymllm.bench.providers import Job, Provider, configure, select
from pymllm.bench.roof import Roof, measure_roof
from pymllm.bench.shapes import CPU_SHAPES, CPU_TOKENS, SHAPES, TOKENS, TUNED_SHAPES, Shape
from pymllm.bench.timing import HIGH, LOW, REST, Timing, cold_bytes, graph_method
from pymllm.bench.workload import (
    ERROR_LIMITS,
    GROUP,
    REFERENCE_COLUMNS,
    SCHEMES,
    Workload,
    make_workload,
)

FORMAT, VERSION = "pymllm-bench", 1
CPU_COPY_BYTES = 32 * 2**20
WARM_LIMIT_S = 240.0
KEY = ("scheme", "n", "k", "group", "dtype", "m", "provider", "mode", "cache")


def cell_key(cell: Cell) -> tuple[Any, ...]:
    """What identifies a cell."""
    return tuple(cell[name] for name in KEY)


@dataclass
class RunResult:
    """A run: the document, and the samples behind its cells.

    Attributes:
        document: as in the module's description.
        samples: timing of each cell that has one, by :func:`cell_key`.
    """

    document: dict[str, Any]
    samples: dict[tuple[Any, ...], Timing] = field(default_factory=dict)

    @property
    def cells(self) -> list[Cell]:
        """The cells of the document."""
        cells: list[Cell] = self.document["cells"]
        return cells

    def add(self, record: Record) -> None:
        """Takes a record."""
        self.cells.append(record.cell)
        if record.timing is not None:
            self.samples[cell_key(record.cell)] = record.timing

    def save(self, path: Path) -> None:
        """Writes the document; a reader never sees half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        text = json.dumps(_finite(self.document), indent=1, allow_nan=False)
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)


def load(path: Path) -> dict[str, Any]:
    """Reads a document.

    Raises:
        ValueError: it is not one, or of another version.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    found = (document.get("format"), document.get("version")) if isinstance(document, dict) else ()
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path}: found format {found}, accepted {(FORMAT, VERSION)}")
    return dict(document)


@dataclass
class Session:
    """A machine whose ceilings are known, with the providers that can be used on it.

    Attributes:
        device: where everything runs.
        roof: its ceilings.
        bench: measures one layer.
        phases: the providers that are not absent, in the order of a run.
        result: what has been measured.
        progress: is told what is being done.
    """

    device: torch.device
    roof: Roof
    bench: Bench
    phases: list[list[Provider]]
    result: RunResult
    progress: Callable[[str], None]

    def workload(self, scheme: str, shape: Shape) -> Workload:
        """The random layer of a shape, the same in every run."""
        self.progress(f"{scheme} {shape[0]}x{shape[1]}: making weights and reference")
        plan = self.bench.plan
        return make_workload(
            scheme, *shape, max(plan.tokens), self.device, group=plan.group, dtype=plan.dtype
        )

    def layer(self, scheme: str, shape: Shape, providers: Sequence[Provider]) -> Iterator[Record]:
        """Measures the providers that run a scheme on one shape; records go to the result."""
        fitting = [provider for provider in providers if scheme in provider.schemes]
        if not fitting:
            return
        with torch.no_grad():
            work = self.workload(scheme, shape)
            for provider in fitting:
                for record in self.bench.layer(work, provider):
                    self.result.add(record)
                    yield record

    def warm(self, schemes: Sequence[str], shapes: Sequence[Shape], provider: Provider) -> None:
        """Lets a provider compile ahead what its cells will need; what goes wrong is in the document."""
        if type(provider).warm is Provider.warm:
            return
        plan = self.bench.plan
        jobs = []
        for shape, scheme in itertools.product(shapes, schemes):
            tokens, reason = self.bench.tokens(provider, shape)
            if reason is None and scheme in provider.schemes:
                jobs.append(Job(scheme, *shape, plan.group, plan.dtype, self.device, tuple(tokens)))
        self.progress(f"{provider.name}: compiling ahead")
        began = time.monotonic()
        known = self.result.document["providers"][provider.name]
        known["warm"] = None
        limit = WARM_LIMIT_S
        if plan.deadline is not None:
            limit = min(limit, plan.deadline - began)
        try:
            with torch.no_grad():
                provider.warm(jobs, limit)
        except Exception as error:  # noqa: BLE001  a peer may fail in any way
            known["warm"] = failure(error, self.device)
            self.progress(f"{provider.name}: {known['warm']}")
        known["warm_s"] = round(time.monotonic() - began, 1)


def default_device() -> torch.device:
    """The current GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def start(
    device: torch.device,
    *,
    tokens: Sequence[int] | None = None,
    providers: Sequence[str] | None = None,
    modes: Sequence[str] = ("graph",),
    caches: Sequence[str] = ("cold",),
    dtype: torch.dtype = torch.bfloat16,
    group: int = GROUP,
    host_shape: Shape | None = None,
    tuned_shapes: Sequence[Shape] | None = TUNED_SHAPES,
    rest: float = REST,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    deadline: float | None = None,
    progress: Callable[[str], None] = no_progress,
) -> Session:
    """Measures the ceilings and finds the providers; arguments as in :func:`run`."""
    gpu = device.type == "cuda"
    if gpu and device.index is not None:
        # Streams, events and what peers launch belong to the current device.
        torch.cuda.set_device(device)
    configure(options or {})
    progress("measuring the machine's ceilings")
    facts = environments.environment(device)
    roof = measure_roof(device)
    facts["clocks_before"] = environments.clocks(device)
    phases, known = _present(select(providers, device.type), progress)
    # Capturing a graph collects garbage: not over everything that was imported.
    gc.collect()
    gc.freeze()
    min_bytes = cold_bytes(facts["l2_bytes"]) if gpu else CPU_COPY_BYTES
    plan = Plan(
        tuple(tokens or (TOKENS if gpu else CPU_TOKENS)), tuple(modes), tuple(caches), dtype,
        group, host_shape, tuned_shapes, min_bytes=min_bytes, rest=rest, deadline=deadline,
    )  # fmt: skip
    document = {
        "format": FORMAT,
        "version": VERSION,
        "environment": facts,
        "roof": roof.as_json(),
        "method": _method(plan, gpu),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "wall_s": 0.0,
        "complete": False,
        "stopped": None,
        "providers": known,
        "cells": [],
    }
    result = RunResult(document)
    watched, _ = environments.board(device)
    bench = Bench(roof, plan, progress, watched)
    return Session(device, roof, bench, phases, result, progress)


def run(
    *,
    device: torch.device | None = None,
    shapes: Sequence[Shape] | None = None,
    tokens: Sequence[int] | None = None,
    schemes: Sequence[str] = SCHEMES,
    providers: Sequence[str] | None = None,
    modes: Sequence[str] = ("graph",),
    caches: Sequence[str] = ("cold",),
    dtype: torch.dtype = torch.bfloat16,
    group: int = GROUP,
    tuned_shapes: Sequence[Shape] | None = TUNED_SHAPES,
    rest: float = REST,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    time_limit_s: float | None = None,
    progress: Callable[[str], None] = no_progress,
    save_to: Path | None = None,
) -> RunResult:
    """A whole run, phase after phase, shape after shape; stops cleanly at the time limit.

    Args:
        device: a GPU or the CPU; the current GPU if there is one.
        shapes: (N, K); the standard eight, or small ones on a CPU.
        tokens: numbers of tokens.
        schemes: ``"w4a16"``, ``"w8a8_int8"``.
        providers: names; all that run on the device if None.
        modes: ``"graph"``, ``"eager"``, ``"host"`` (on the first shape); a CPU has its own.
        caches: ``"cold"``, ``"hot"``.
        dtype: of activations.
        group: inputs a scale of W4A16.
        tuned_shapes: where slowly tuning peers are timed, ``None`` for everywhere.
        rest: idle time before the replays of a call, as a multiple of the GPU time that they take.
        options: of providers, by their names, such as ``{"gemlite": {"autotune": "max"}}``.
        time_limit_s: seconds after which to stop.
        progress: is told what is being done, a line at a time.
        save_to: file that is rewritten after every layer, so that a killed run leaves what it has.
    """
    began = time.monotonic()
    device = device or default_device()
    wanted = tuple(shapes or (SHAPES if device.type == "cuda" else CPU_SHAPES))
    session = start(
        device, tokens=tokens, providers=providers, modes=modes, caches=caches, dtype=dtype,
        group=group, host_shape=wanted[0], tuned_shapes=tuned_shapes, rest=rest, options=options,
        progress=progress,
        deadline=None if time_limit_s is None else began + time_limit_s,
    )  # fmt: skip
    document = session.result.document

    def save(**changed: Any) -> None:
        document.update(wall_s=round(time.monotonic() - began, 1), **changed)
        if save_to is not None:
            session.result.save(save_to)

    try:
        for phase in session.phases:
            for provider in phase:
                session.warm(schemes, wanted, provider)
            for shape, scheme in itertools.product(wanted, schemes):
                for _ in session.layer(scheme, shape, phase):
                    pass
                save()
    except (Stopped, KeyboardInterrupt) as error:
        document["environment"]["clocks_after"] = environments.clocks(device)
        save(stopped=str(error) or "interrupted")
        return session.result
    document["environment"]["clocks_after"] = environments.clocks(device)
    save(complete=True)
    return session.result


def _present(
    phases: list[list[Provider]], progress: Callable[[str], None]
) -> tuple[list[list[Provider]], dict[str, Any]]:
    """The providers that can be used, and for the document all of them with the reasons."""
    known: dict[str, Any] = {}
    usable = []
    for phase in phases:
        there = []
        for provider in phase:
            progress(f"looking for {provider.name}")
            try:
                absent = provider.why_absent()
            except Exception as error:  # noqa: BLE001  a peer may fail in any way
                absent = f"{type(error).__name__}: {error}"
            known[provider.name] = {"about": provider.about, "absent": absent}
            there += [provider] if absent is None else []
        usable += [there] if there else []
    return usable, known


def _method(plan: Plan, gpu: bool) -> dict[str, Any]:
    return {
        "cache": "+".join(plan.caches),
        "min_copy_bytes": plan.min_bytes,
        "graph": graph_method(gpu),
        "rest": plan.rest,
        "percentiles": [LOW, HIGH],
        "error": f"relative Frobenius, all tokens x {REFERENCE_COLUMNS} outputs spread over N,"
        " against float64; every output is checked to be finite",
        "error_limits": dict(ERROR_LIMITS),
        "data": "random codes over the full range, random scales, normal activations; fixed seed",
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
