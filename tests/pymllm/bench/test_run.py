"""Runs on a CPU, their documents, comparisons, and providers that are absent or fail."""

import copy
import json
import subprocess
import sys
import time

import pytest
import torch

from pymllm.bench import run as runs
from pymllm.bench.compare import compare, why_not_comparable
from pymllm.bench.measure import Bench, Plan, Stopped, time_limit
from pymllm.bench.providers import NAMES, PROVIDERS, Job, Provider, base, select
from pymllm.bench.roof import Roof
from pymllm.bench.run import VERSION, load, run
from pymllm.bench.timing import summarize
from pymllm.bench.workload import make_workload

CPU = torch.device("cpu")
CELL_KEYS = set(runs.__doc__.split("every key is always there")[1].split('"')[1::2])
KEYS = {
    "scheme", "n", "k", "m", "group", "dtype", "provider", "mode", "cache", "skip", "median_us",
    "low_us", "high_us", "copies", "replays", "sm_mhz", "power_w", "throttle", "tbps", "tops", "roof_us", "roof_fraction", "error",
    "config", "origin",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "deep" / "run.json"
    said = []
    result = run(device=CPU, shapes=[(64, 256)], tokens=[1, 4], progress=said.append, save_to=path)
    return result, path, said


def test_document(tiny):
    result, path, said = tiny
    document = load(path)
    assert document == json.loads(json.dumps(result.document))
    assert document["complete"] is True
    assert document["stopped"] is None
    assert set(document) == {
        "format", "version", "environment", "roof", "method", "command", "date", "wall_s",
        "complete", "stopped", "providers", "cells",
    }  # fmt: skip
    assert document["environment"]["device"] == "cpu"
    assert document["environment"]["versions"]["torch"] == torch.__version__
    assert set(document["roof"]) == {"read_tbps", "bf16_tops", "int_mm_tops", "int8_tops"}
    assert document["method"]["cache"] == "cold"
    assert any("ours" in text for text in said)


def test_cells(tiny):
    result, _, _ = tiny
    keys = [runs.cell_key(cell) for cell in result.cells]
    assert len(set(keys)) == len(keys)
    found = {(cell["scheme"], cell["provider"], cell["m"]) for cell in result.cells}
    assert found == {
        (scheme, provider, m)
        for scheme, providers in {
            "w4a16": ("ours", "torch_bf16", "dequant_matmul"),
            "w8a8_int8": ("ours", "torch_bf16", "int_mm"),
        }.items()
        for provider in providers
        for m in (1, 4)
    }
    for cell in result.cells:
        assert set(cell) == KEYS
        assert cell["skip"] is None
        assert cell["low_us"] <= cell["median_us"] <= cell["high_us"]
        assert cell["roof_fraction"] == pytest.approx(cell["roof_us"] / cell["median_us"])
        assert 0 < cell["error"] < 0.02
        assert (cell["mode"], cell["cache"]) == ("cpu", "cold")
        assert cell["group"] == (128 if cell["scheme"] == "w4a16" else -1)
        timing = result.samples[runs.cell_key(cell)]
        assert timing.median_us == cell["median_us"]
        assert len(timing.samples_us) == cell["replays"]
    ours = {c["scheme"]: c for c in result.cells if c["provider"] == "ours"}
    assert ours["w4a16"]["config"] == "cpu_int4pack"
    assert ours["w8a8_int8"]["origin"] == "rule"


def test_documented_keys_are_those_of_a_cell():
    assert KEYS <= CELL_KEYS


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="accepted"):
        load(path)
    path.write_text(json.dumps({"format": "pymllm-bench", "version": VERSION + 1}))
    with pytest.raises(ValueError, match=str(VERSION + 1)):
        load(path)


def test_time_limit_leaves_a_readable_run(tmp_path):
    path = tmp_path / "run.json"
    result = run(device=CPU, shapes=[(64, 256)], tokens=[1], time_limit_s=0.0, save_to=path)
    document = load(path)
    assert document["complete"] is False
    assert "time limit" in document["stopped"]
    assert result.cells == []


class Broken(Provider):
    name = "broken"
    devices = ("cpu",)

    def __init__(self, fail):
        self._fail = fail

    def build(self, work, copies):
        if self._fail == "build":
            raise RuntimeError("no such\n kernel")
        weight = work.floating()
        if self._fail == "wrong":
            weight = weight * 1.1
        if self._fail == "shape":
            return [lambda x: x] * copies
        return [lambda x: torch.nn.functional.linear(x, weight)] * copies

    def prepare(self, calls, x):
        if self._fail == "slow":
            self.limit_s = None
            time.sleep(5)

    def describe(self, work, m):
        if self._fail == "describe":
            raise KeyError("tile")
        return super().describe(work, m)

    def why_not(self, work):
        return "not on Sundays" if self._fail == "refuse" else None

    def why_not_tokens(self, work, m):
        return "too many" if self._fail == "tokens" and m > 1 else None


def records_of(provider, tokens=(1, 2)):
    work = make_workload("w4a16", 64, 256, max(tokens), CPU)
    plan = Plan(tokens, min_bytes=1)
    return [r.cell for r in Bench(Roof(1.0, 1.0), plan).layer(work, provider)]


@pytest.mark.parametrize(
    "fail, reason",
    [
        ("build", "RuntimeError: no such kernel"),
        ("wrong", "wrong result: relative error 0.1"),
        ("shape", "ValueError: result: found shape"),
        ("refuse", "not on Sundays"),
    ],
)
def test_failures_become_skips(fail, reason):
    cells = records_of(Broken(fail))
    assert [cell["m"] for cell in cells] == [1, 2]
    for cell in cells:
        assert reason in cell["skip"]
        assert cell["median_us"] is None
        assert set(cell) == KEYS
    assert (cells[0]["error"] is not None) == (fail == "wrong")


def test_some_tokens_only():
    one, two = records_of(Broken("tokens"))
    assert one["median_us"] > 0
    assert (two["skip"], two["median_us"]) == ("too many", None)


def test_a_time_outlives_its_description():
    (cell,) = records_of(Broken("describe"), (1,))
    assert cell["median_us"] > 0
    assert "KeyError" in cell["config"]


def test_preparing_has_a_time_limit():
    provider = Broken("slow")
    provider.limit_s = 0.05
    (cell,) = records_of(provider, (1,))
    assert "TimeoutError: took longer than 0.05 s" in cell["skip"]
    with time_limit(0.5):
        pass
    with pytest.raises(TimeoutError), time_limit(0.01):
        time.sleep(1)


def test_slowly_tuning_peers_are_timed_on_few_shapes():
    provider = Broken(None)
    provider.only_tuned_shapes = True
    (cell,) = records_of(provider, (1, 2))
    assert (cell["m"], "minutes a shape" in cell["skip"]) == (1, True)


def test_deadline_stops_between_cells():
    work = make_workload("w4a16", 64, 256, 1, CPU)
    bench = Bench(Roof(1.0, 1.0), Plan((1,), min_bytes=1, deadline=time.monotonic() - 1))
    with pytest.raises(Stopped):
        list(bench.layer(work, Broken(None)))


def test_host_cost_is_measured_once():
    plan = Plan((1, 64), modes=("graph", "host"), host_shape=(64, 256))
    work = make_workload("w4a16", 64, 256, 1, CPU)
    assert plan.clocks(work, 1) == [("cpu", "cold")]
    work.words = work.words.to("meta")
    assert plan.clocks(work, 1) == [("graph", "cold"), ("host", "hot")]
    assert plan.clocks(work, 64) == [("graph", "cold")]
    work.n = 128
    assert plan.clocks(work, 1) == [("graph", "cold")]


class Warmed(Broken):
    name = "ours"

    def __init__(self, error=None):
        super().__init__(None)
        self.jobs, self.limit_s, self._error = None, None, error

    def warm(self, jobs, limit_s):
        self.jobs, self.limit_s = jobs, limit_s
        if self._error:
            raise self._error


def test_providers_compile_ahead_what_will_be_timed():
    session = runs.start(CPU, tokens=[1, 3], providers=["ours"], deadline=time.monotonic() + 50)
    provider = Warmed()
    provider.schemes = ("w4a16",)
    session.warm(("w4a16", "w8a8_int8"), [(64, 256), (32, 128)], provider)
    assert [(job.scheme, job.n, job.k, job.tokens) for job in provider.jobs] == [
        ("w4a16", 64, 256, (1, 3)),
        ("w4a16", 32, 128, (1, 3)),
    ]
    assert 40 < provider.limit_s <= 50
    for job in provider.jobs:
        assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
        assert job.workload().x(1).shape == (1, job.k)
    known = session.result.document["providers"]["ours"]
    assert known["warm"] is None and known["warm_s"] >= 0
    session.warm(("w4a16",), [(64, 256)], Warmed(TimeoutError("too long")))
    assert known["warm"] == "TimeoutError: too long"


def test_options_of_providers():
    with pytest.raises(ValueError, match="gemlight"):
        runs.configure({"gemlight": {}})
    with pytest.raises(ValueError, match=r"ours: found options .'autotune'"):
        runs.configure({"ours": {"autotune": "max"}})
    for wrong in ({"autotune": "most"}, {"candidates": 0}, {"speed": 1}):
        with pytest.raises(ValueError, match="gemlite: found"):
            runs.configure({"gemlite": wrong})
    gemlite = next(p for p in PROVIDERS if p.name == "gemlite")
    runs.configure({"gemlite": {"autotune": "max", "candidates": 40}})
    assert "at most 40 candidates" in gemlite.about
    runs.configure({})
    assert "default list" in gemlite.about


def test_absent_peers_say_why(monkeypatch):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    for provider in PROVIDERS:
        if provider.name in ("gemlite", "humming", "marlin", "machete", "cutlass", "torchao"):
            assert "not installed (pip install " in provider.why_absent()


def test_absent_peers_are_in_the_document(monkeypatch):
    present, known = runs._present([[Absent()], [Broken(None)]], lambda text: None)
    assert [[p.name for p in phase] for phase in present] == [["broken"]]
    assert known["absent"]["absent"] == "OSError: libfoo.so"
    assert known["broken"]["absent"] is None


class Absent(Broken):
    name = "absent"

    def __init__(self):
        super().__init__(None)

    def why_absent(self):
        raise OSError("libfoo.so")


def test_select():
    assert len(set(NAMES)) == len(NAMES)
    assert [[p.name for p in phase] for phase in select(None, "cpu")] == [
        ["ours", "torch_bf16", "dequant_matmul", "int_mm"]
    ]
    order = [p.name for phase in select(None, "cuda") for p in phase]
    assert order[0] == "ours"
    assert order[-2:] == ["humming", "gemlite"]
    assert select(["gemlite"], "cpu") == []
    with pytest.raises(ValueError, match="nothing"):
        select(["nothing"], "cpu")


def changed(document, path, value):
    document = copy.deepcopy(document)
    place = document
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return document


@pytest.mark.parametrize(
    "path, value, reason",
    [
        (("environment", "gpu"), "NVIDIA L4", "different gpu: .* and NVIDIA L4"),
        (("environment", "device"), "cuda", "different device"),
        (("method", "cache"), "hot", "different cache state"),
        (("method", "graph"), "two rounds", "different methods"),
        (("method", "rest"), 7.0, None),
        (("cells", 0, "mode"), "graph", None),
        (("environment", "driver"), "1.2", None),
    ],
)
def test_comparisons_are_refused(tiny, path, value, reason):
    document = tiny[0].document
    other = changed(document, path, value)
    if reason is None:
        assert why_not_comparable(document, other) is None
        return
    with pytest.raises(ValueError, match=reason):
        compare(document, other)


def test_clocks_and_modes_are_compared(tiny):
    clocks = {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "temperature_c": 40.0, "power_w": 500.0}
    old = changed(tiny[0].document, ("environment", "clocks_before"), clocks)
    # The SM clock of a moment is no reason, the measured rates are.
    boost = changed(old, ("environment", "clocks_before", "sm_mhz"), 1410.0)
    memory = changed(old, ("environment", "clocks_before", "memory_mhz"), 2619.0)
    assert why_not_comparable(old, boost) is None
    assert "memory_mhz" in why_not_comparable(old, memory)
    gpu = changed(old, ("environment", "device"), "cuda")
    rate = gpu["roof"]["bf16_tops"]
    assert why_not_comparable(gpu, changed(gpu, ("roof", "bf16_tops"), rate * 1.05)) is None
    slow = changed(gpu, ("roof", "bf16_tops"), rate * 0.8)
    assert "measured bf16_tops" in why_not_comparable(gpu, slow)
    host = copy.deepcopy(tiny[0].document)
    for cell in host["cells"]:
        cell["mode"] = "host"
    assert "different modes" in why_not_comparable(tiny[0].document, host)


def test_ratios(tiny):
    old = tiny[0].document
    new = copy.deepcopy(old)
    for number, cell in enumerate(new["cells"]):
        cell["median_us"] *= 1.05 if number < 3 else 1.01
    new["cells"].pop()
    found = compare(old, new)
    count = len(old["cells"]) - 1
    assert (len(found.ratios), found.only_old, found.only_new) == (count, 1, 0)
    assert found.share_within(0.03) == pytest.approx((count - 3) / count)
    assert found.share_within(0.07) == 1.0
    assert len(found.outside(0.03)) == 3
    assert found.median_ratio == pytest.approx(1.01)
    ours = compare(old, new, ["ours"])
    assert {key[6] for key in ours.ratios} == {"ours"}


def test_nan_is_not_written(tmp_path):
    result = runs.RunResult({"format": runs.FORMAT, "version": VERSION, "cells": [float("nan")]})
    result.save(tmp_path / "run.json")
    assert load(tmp_path / "run.json")["cells"] == [None]


def test_import_touches_no_gpu_and_no_peer():
    code = (
        "import sys\n"
        "for name in ('gemlite', 'humming', 'vllm', 'torchao', 'triton'): sys.modules[name] = None\n"
        "import pymllm.bench.run, pymllm.bench.compare, torch\n"
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_summary_of_one_sample():
    assert summarize([2.0], 1, 1).high_us == 2.0
