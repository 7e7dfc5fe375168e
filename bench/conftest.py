"""Options of ``pytest bench/``, the machine's description, and which runs may be compared."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest

from pymllm.bench.compare import why_not_comparable
from pymllm.bench.environment import clocks, environment
from pymllm.bench.measure import HOST_TOKENS
from pymllm.bench.providers import select
from pymllm.bench.roof import measure_roof
from pymllm.bench.run import CPU_COPY_BYTES, default_device
from pymllm.bench.shapes import CPU_SHAPES, CPU_TOKENS, SHAPES, TOKENS, parse_shape
from pymllm.bench.timing import cold_bytes, graph_method
from pymllm.bench.workload import SCHEMES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pymllm")
    group.addoption("--bench-shapes", metavar="NxK,...", help="default: the standard eight")
    group.addoption("--bench-tokens", metavar="M,...", help="default: 1 to 8192")
    group.addoption("--bench-schemes", metavar="NAME,...", help="w4a16, w8a8_int8")
    group.addoption("--bench-providers", metavar="NAME,...", help="default: all that are installed")
    group.addoption("--bench-cache", choices=("cold", "hot"), default="cold")


def _listed(config: pytest.Config, name: str) -> list[str] | None:
    text = config.getoption(name)
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" not in metafunc.fixturenames:
        return
    config, device = metafunc.config, default_device()
    gpu = device.type == "cuda"
    shapes = _listed(config, "--bench-shapes")
    tokens = _listed(config, "--bench-tokens")
    layers = [parse_shape(text) for text in shapes] if shapes else SHAPES if gpu else CPU_SHAPES
    rows = [int(text) for text in tokens] if tokens else TOKENS if gpu else CPU_TOKENS
    schemes = _listed(config, "--bench-schemes") or SCHEMES
    entries = []
    for phase in select(_listed(config, "--bench-providers"), device.type):
        for scheme in schemes:
            for shape in layers:
                for provider in phase:
                    if scheme in provider.schemes:
                        for m in rows:
                            entries.append((scheme, shape, provider, m, "graph" if gpu else "cpu"))
                            if gpu and shape == layers[0] and m <= HOST_TOKENS:
                                entries.append((scheme, shape, provider, m, "host"))
    metafunc.parametrize(
        "entry",
        entries,
        ids=[f"{s}-{n}x{k}-M{m}-{mode}-{p.name}" for s, (n, k), p, m, mode in entries],
    )


@functools.cache
def _facts(cache: str) -> dict[str, Any]:
    """What a saved run is compared by, in the form of a document."""
    facts = environment(default_device())
    facts["clocks_before"] = clocks(default_device())
    gpu = facts["device"] == "cuda"
    min_bytes = cold_bytes(facts["l2_bytes"]) if gpu else CPU_COPY_BYTES
    return {
        "environment": facts,
        # Only a GPU's rates say that its clocks were others.
        "roof": measure_roof(default_device()).as_json() if gpu else {},
        "method": {"cache": cache, "min_copy_bytes": min_bytes, "graph": graph_method(gpu)},
        "cells": [],
    }


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["pymllm_bench"] = _facts(config.getoption("--bench-cache"))


def pytest_benchmark_compare_machine_info(
    config: pytest.Config,
    benchmarksession: Any,
    machine_info: Mapping[str, Any],
    compared_benchmark: Mapping[str, Any],
) -> None:
    old = compared_benchmark["machine_info"].get("pymllm_bench")
    if old is None:
        raise pytest.UsageError("cannot compare: the saved run does not say what it ran on")
    reason = why_not_comparable(old, machine_info["pymllm_bench"])
    if reason is not None:
        raise pytest.UsageError(f"cannot compare with the saved run: {reason}")
