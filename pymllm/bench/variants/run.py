"""A run of variants, and the JSON document that it leaves.

The document (``FORMAT``, ``VERSION``); all times are microseconds of **one call**::

    {
      "format": "pymllm-variants",  "version": 1,
      "environment", "command", "date", "wall_s", "complete", "stopped":  as in ``pymllm.bench.run``
      "read_tbps": float,           memory bandwidth, measured in the same run
      "method": {...},              how it was measured, for people
      "measures": {NAME: str},      what the values of cells are
      "compiled": int,              forms that were compiled ahead
      "cells": [CELL, ...]
    }

A ``CELL`` is one variant in one place; every key is always there::

    "part"       "w4a16" | "w8a8_int8" | "quantization" | "host"
    "variant"    its name
    "base"       the variant it is compared with, in the same place and by turns; null: it is the base
    "n", "k", "m"                output features (null: quantization alone), input features, tokens
    "skip"       null, or why there is no time
    "kernel", "config", "origin" what ran, and where its configuration is from; null where it has none
    "error"      relative Frobenius error against float64; null for "host", which runs the same layers
    "median_us", "low_us", "high_us"             median, 10th and 90th percentile; "host": to issue a call
    "done_us"    "host": median until the GPU has done it; else null
    "copies", "samples"          copies rotated, samples behind the median
    "tbps"       bytes of weights, scales, activations in and out / median, 1e12 bytes/s
    "base_us"    the base's median
    "ratio"      median / the base's
    "measure"    what "value" is, of the document's "measures"; null: nothing is measured of a base
    "value"      of that measure
    "wanted"     its limit; null: nothing is wanted
    "met"        whether it is met; null: nothing is wanted
"""

from __future__ import annotations

import datetime
import gc
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pymllm.bench import environment as environments
from pymllm.bench.measure import Stopped, no_progress
from pymllm.bench.roof import W4A16, W8A8, measure_roof
from pymllm.bench.run import CPU_COPY_BYTES, RunResult, default_device
from pymllm.bench.shapes import CPU_SHAPES, Shape
from pymllm.bench.timing import REST, cold_bytes, graph_method
from pymllm.bench.variants import host, layers, quantization
from pymllm.bench.variants.setting import Setting
from pymllm.bench.variants.values import MEASURES, Cell
from pymllm_kernels.common.forms import Form, compile_forms

FORMAT, VERSION = "pymllm-variants", 1
SHAPES: tuple[Shape, ...] = ((4096, 4096), (4096, 14336), (8192, 8192), (28672, 4096))
TOKENS = (1, 16, 32, 64, 512, 4096)
CPU_TOKENS = (1, 32)
PARTS = (host.PART, quantization.PART, W4A16, W8A8)


def load(path: Path) -> dict[str, Any]:
    """Reads a document.

    Raises:
        ValueError: it is not one, or of another version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    found = (document.get("format"), document.get("version")) if isinstance(document, dict) else ()
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path}: found format {found}, accepted {(FORMAT, VERSION)}")
    return dict(document)


def run(
    *,
    device: torch.device | None = None,
    shapes: Sequence[Shape] | None = None,
    tokens: Sequence[int] | None = None,
    parts: Sequence[str] = PARTS,
    rest: float = REST,
    time_limit_s: float | None = None,
    backend: str = "inductor",
    progress: Callable[[str], None] = no_progress,
    save_to: Path | None = None,
) -> dict[str, Any]:
    """A whole run; stops cleanly at the time limit.

    Args:
        device: a GPU or the CPU; the current GPU if there is one.
        shapes: (N, K) of layers; their K are those of the quantization, the first is the host's.
        tokens: numbers of tokens of layers.
        parts: of ``PARTS``.
        rest: idle time before replays, as a multiple of the GPU time that they take.
        time_limit_s: seconds after which to stop.
        backend: of ``torch.compile`` for the host's part.
        progress: is told what is being done, a line at a time.
        save_to: file that is rewritten as the run goes on, so that a killed run leaves what it has.

    Returns:
        The document.

    Raises:
        ValueError: a part is not known.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"parts: found {unknown}, accepted {list(PARTS)}")
    began = time.monotonic()
    device = device or default_device()
    gpu = device.type == "cuda"
    if gpu and device.index is not None:
        torch.cuda.set_device(device)
    wanted = tuple(shapes or (SHAPES if gpu else CPU_SHAPES))
    counts = tuple(tokens or (TOKENS if gpu else CPU_TOKENS))
    document = _document(device, rest, progress)
    setting = Setting(
        device, document["read_tbps"],
        cold_bytes(document["environment"]["l2_bytes"]) if gpu else CPU_COPY_BYTES, rest,
        None if time_limit_s is None else began + time_limit_s, progress,
    )  # fmt: skip
    result = RunResult(document)

    def save(**changed: Any) -> None:
        document.update(wall_s=round(time.monotonic() - began, 1), **changed)
        if save_to is not None:
            result.save(save_to)

    try:
        if gpu:
            document["compiled"] = _compile(setting, parts, wanted, counts)
        with torch.no_grad():
            for cells in _steps(setting, parts, wanted, counts, backend):
                for cell in cells:
                    document["cells"].append(cell)
                save()
    except (Stopped, KeyboardInterrupt) as error:
        document["environment"]["clocks_after"] = environments.clocks(device)
        save(stopped=str(error) or "interrupted")
        return document
    document["environment"]["clocks_after"] = environments.clocks(device)
    save(complete=True)
    return document


def _steps(
    setting: Setting, parts: Sequence[str], shapes: Sequence[Shape], tokens: Sequence[int],
    backend: str,
) -> Iterator[Iterator[Cell]]:  # fmt: skip
    """What gives the cells, in the order of the parts."""
    for part in PARTS:
        if part not in parts:
            continue
        if part == host.PART:
            yield host.measure(setting, shapes[0], backend)
        elif part == quantization.PART:
            yield quantization.measure(setting, _inputs(shapes))
        else:
            for shape in shapes:
                yield layers.measure(setting, part, shape, tokens)
        gc.collect()
        setting.release()


def _inputs(shapes: Sequence[Shape]) -> list[int]:
    return sorted({k for _, k in shapes})


def _compile(
    setting: Setting, parts: Sequence[str], shapes: Sequence[Shape], tokens: Sequence[int]
) -> int:
    """Compiles on all cores what the cells need; a form that does not compile is told where it is used."""
    forms: list[Form] = []
    if quantization.PART in parts:
        forms += quantization.forms(_inputs(shapes))
    for scheme in (W4A16, W8A8):
        if scheme in parts:
            for shape in shapes:
                forms += layers.forms(scheme, shape, tokens, setting.facts)
    last = [time.monotonic()]

    def told(done: int, of: int) -> None:
        if done in (0, of) or time.monotonic() > last[0] + 5:
            last[0] = time.monotonic()
            setting.progress(f"compiled {done} of {of} forms")

    return compile_forms(forms, setting.facts, told, failed=setting.progress)


def _document(device: torch.device, rest: float, progress: Callable[[str], None]) -> dict[str, Any]:
    progress("measuring the machine's ceilings")
    facts = environments.environment(device)
    read_tbps = measure_roof(device).read_tbps
    facts["clocks_before"] = environments.clocks(device)
    # Capturing a graph collects garbage: not over everything that was imported.
    gc.collect()
    gc.freeze()
    return {
        "format": FORMAT,
        "version": VERSION,
        "environment": facts,
        "read_tbps": read_tbps,
        "method": _method(device.type == "cuda", rest),
        "measures": MEASURES,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "wall_s": 0.0,
        "complete": False,
        "stopped": None,
        "compiled": 0,
        "cells": [],
    }


def _method(gpu: bool, rest: float) -> dict[str, Any]:
    return {
        "sample": graph_method(gpu),
        "turns": "the graphs of a base and of all its variants hold the same number of calls and are"
        " replayed in turns" if gpu else "one after the other",
        "rest": rest,
        "quantization": "inputs rotate like weights, each with codes of its own; few tokens fit the L2",
        "host": f"eager, torch.compile: to issue a call; CUDA graph: to issue one of"
        f" {host.GRAPH_CALLS} calls, by {host.GRAPH_CALLS}; done_us: until the GPU has done them",
        "error": "relative Frobenius, 256 rows x 256 outputs, against float64 of the dequantized weights"
        " (W8A8: and of x quantized in plain torch); every output is checked to be finite",
    }  # fmt: skip
