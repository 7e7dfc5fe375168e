"""What a call of a layer costs the host: eager, compiled by torch, in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from pymllm.bench.limits import time_limit
from pymllm.bench.measure import failure
from pymllm.bench.providers.ours import make_layer
from pymllm.bench.roof import W4A16, W8A8
from pymllm.bench.shapes import Shape
from pymllm.bench.timing import Call, Timing, capture, cpu_time, host_time, pilot_time, summarize
from pymllm.bench.variants.setting import Setting
from pymllm.bench.variants.values import Cell, Goal, blank, compare, fill
from pymllm.bench.workload import make_workload

PART = "host"
TOKENS = (1,)
EAGER, COMPILED, GRAPH = "eager", "torch.compile", "CUDA graph"
# A graph is issued at once; few replays a sample, so that no full queue blocks them.
GRAPH_CALLS, REPLAYS = 32, 8
ROUNDS, SAMPLES = 3, 7
COMPILE_LIMIT_S = 90.0

Linear = Callable[[torch.Tensor], torch.Tensor]


def measure(setting: Setting, shape: Shape, backend: str = "inductor") -> Iterator[Cell]:
    """All cells: each way to call, with bf16 ``F.linear`` as the base of it.

    Args:
        setting: the machine.
        shape: (N, K).
        backend: of ``torch.compile``.

    Raises:
        Stopped: there is no time left, or the GPU no longer answers.
    """
    setting.progress(f"{PART} {shape[0]}x{shape[1]}: making weights")
    works = {s: make_workload(s, *shape, max(TOKENS), setting.device) for s in (W4A16, W8A8)}
    made = {scheme: make_layer(work) for scheme, work in works.items()}
    kernels = {scheme: layer.kernel_choice.kernel.name for scheme, layer in made.items()}
    weight = works[W4A16].floating()
    calls: dict[str, Linear] = {"F.linear": partial(F.linear, weight=weight)}
    for scheme, layer in made.items():
        calls[scheme] = partial(layer.quant_method.apply, layer)
    for m in TOKENS:
        x = works[W4A16].x(m)
        for way in (EAGER, COMPILED, *([GRAPH] if setting.gpu else [])):
            setting.check_deadline()
            setting.progress(f"{PART} {shape[0]}x{shape[1]} {way} M={m}")
            cells = {
                name: blank(PART, f"{name}, {way}", f"F.linear, {way}", m, shape[1], shape[0])
                for name in calls
            }
            for name, cell in cells.items():
                cell["kernel"] = kernels.get(name)
            _time_all(setting, way, calls, cells, x, backend)
            base = cells["F.linear"]
            for cell in cells.values():
                if cell is not base:
                    compare(cell, base, Goal(), setting.read_tbps)
            yield from cells.values()


def _time_all(
    setting: Setting, way: str, calls: Mapping[str, Linear], cells: Mapping[str, Cell],
    x: torch.Tensor, backend: str,
) -> None:  # fmt: skip
    """Times one way to call of all layers; compiled ones apart, as one compilation may end another's."""
    groups = [[name] for name in calls] if way == COMPILED else [list(calls)]
    for names in groups:
        try:
            with time_limit(COMPILE_LIMIT_S):
                ready = [_ready(way, calls[name], x, backend) for name in names]
            times = _in_turns(setting, ready, GRAPH_CALLS if way == GRAPH else 1)
        except Exception as error:  # noqa: BLE001  compilers fail in any way
            reason = failure(error, setting.device)
            for name in names:
                cells[name]["skip"] = reason
            continue
        for name, (issued, done) in zip(names, times, strict=True):
            fill(cells[name], issued)
            cells[name]["done_us"] = done.median_us


def _ready(way: str, call: Linear, x: torch.Tensor, backend: str) -> Call:
    """What issues the call, or a graph of ``GRAPH_CALLS`` of it."""
    if way == GRAPH:
        pilot_time([partial(call, x)])
        graph: Any = capture([partial(call, x)] * GRAPH_CALLS)
        replay: Call = graph.replay
        return replay
    if way == COMPILED:
        torch._dynamo.reset()
        compiled = torch.compile(_as_function(call), fullgraph=True, backend=backend)
        expected, found = call(x), compiled(x)
        if not torch.allclose(found, expected, rtol=0.02, atol=0.02):
            raise ValueError("wrong result: compiled differs from eager")
        return partial(compiled, x)
    return partial(call, x)


def _in_turns(
    setting: Setting, calls: Sequence[Call], calls_in_one: int
) -> list[tuple[Timing, Timing]]:
    """For each the host's time to issue a call, and the time until the GPU has done it."""
    if not setting.gpu:
        return [(cpu_time([call]),) * 2 for call in calls]
    count = 48 if calls_in_one == 1 else REPLAYS
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in calls]
    for _ in range(ROUNDS):
        for call, kinds in zip(calls, found, strict=True):
            for to_the_end, samples in enumerate(kinds):
                samples += host_time(call, count, SAMPLES, to_the_end=bool(to_the_end)).samples_us
    each = [[us / calls_in_one for us in samples] for kinds in found for samples in kinds]
    timings = [summarize(samples, 1, count * calls_in_one) for samples in each]
    return list(zip(timings[::2], timings[1::2], strict=True))


def _as_function(call: Linear) -> Linear:
    """The call as a function, which is what ``torch.compile`` takes."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return call(x)

    return function
