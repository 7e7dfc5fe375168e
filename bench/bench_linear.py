"""Every provider on every layer shape: one group a (scheme, N x K, M), one entry a provider.

What pytest-benchmark stores and compares are the harness's own samples (on a GPU the time of one
call by CUDA-graph replay), not the time that a test takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pymllm.bench.measure import Plan, Record
from pymllm.bench.providers import Provider
from pymllm.bench.run import Session, default_device, start
from pymllm.bench.workload import Workload

Entry = tuple[str, tuple[int, int], Provider, int, str]


class SampleClock:
    """A timer that moves on by one sample whenever ``advance`` is called."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._samples: list[float] = []

    def load(self, samples_us: Sequence[float]) -> int:
        """Takes the samples of an entry; returns their number."""
        self._seconds = 0.0
        self._samples = [sample / 1e6 for sample in reversed(samples_us)]
        return len(self._samples)

    def now(self) -> float:
        """Seconds, as ``time.perf_counter`` would say."""
        return self._seconds

    def advance(self) -> None:
        """One sample passes."""
        self._seconds += self._samples.pop()


CLOCK = SampleClock()


class Measurements:
    """Measures a provider on a layer when the first of its entries is asked for."""

    def __init__(self, session: Session, wanted: Sequence[Entry]) -> None:
        self._session = session
        self._wanted = wanted
        self._work: Workload | None = None
        self._records: dict[Entry, Record] = {}

    @property
    def document(self) -> dict[str, Any]:
        """Machine, roof and providers, in the form of a saved run."""
        return self._session.result.document

    def record(self, entry: Entry) -> Record:
        """The record of an entry; measures all M of its provider and layer."""
        if entry not in self._records:
            self._measure(entry)
        return self._records[entry]

    def _measure(self, entry: Entry) -> None:
        scheme, shape, provider, _, _ = entry
        if self._work is None or (self._work.scheme, self._work.n, self._work.k) != (
            scheme,
            *shape,
        ):
            self._work = None
            self._work = self._session.workload(scheme, shape)
        same = [e for e in self._wanted if e[:3] == entry[:3]]
        bench = self._session.bench
        plan: Plan = dataclasses.replace(
            bench.plan,
            tokens=sorted({e[3] for e in same}),
            modes=tuple(dict.fromkeys(e[4] for e in same)),
            host_shape=shape,
        )
        with torch.no_grad():
            for record in dataclasses.replace(bench, plan=plan).layer(self._work, provider):
                cell = record.cell
                self._records[scheme, shape, provider, cell["m"], cell["mode"]] = record
        for e in same:
            # A slowly tuning peer is timed on few shapes and tokens only.
            self._records.setdefault(e, Record({"skip": "not timed by default"}, None))


@pytest.fixture(scope="session")
def measurements(request: pytest.FixtureRequest) -> Measurements:
    wanted = [
        item.callspec.params["entry"]  # type: ignore[attr-defined]
        for item in request.session.items
        if "entry" in getattr(getattr(item, "callspec", None), "params", {})
    ]
    names = {entry[2].name for entry in wanted}
    session = start(
        default_device(),
        tokens=sorted({entry[3] for entry in wanted}),
        providers=sorted(names),
        caches=(request.config.getoption("--bench-cache"),),
    )
    return Measurements(session, wanted)


@pytest.mark.benchmark(timer=CLOCK.now)
def test_linear(benchmark: Any, measurements: Measurements, entry: Entry) -> None:
    scheme, (n, k), provider, m, mode = entry
    document = measurements.document
    absent = document["providers"][provider.name]["absent"]
    if absent:
        pytest.skip(f"{provider.name}: {absent}")
    record = measurements.record(entry)
    if record.timing is None:
        pytest.skip(f"{provider.name}: {record.cell['skip']}")
    what = {"host": "host cost, "}.get(mode, "")
    benchmark.group = f"{what}{scheme} {n}x{k} M={m}"
    benchmark.extra_info.update(record.cell, **document["environment"])
    benchmark.pedantic(CLOCK.advance, rounds=CLOCK.load(record.timing.samples_us))
