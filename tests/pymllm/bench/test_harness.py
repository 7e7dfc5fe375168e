"""Timing arithmetic, the roof, shapes, workloads."""

import statistics

import pytest
import torch

from pymllm.bench import timing
from pymllm.bench.roof import Roof, moved_bytes, roof_us, weight_bytes
from pymllm.bench.shapes import MODELS, SHAPES, model_layers, model_shapes, parse_shape
from pymllm.bench.workload import ERROR_LIMITS, make_workload

H200 = Roof(read_tbps=4.23, bf16_tops=793.0, int_mm_tops=954.0)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "scheme, n, k, m, expected",
    [
        ("w4a16", 4096, 4096, 1, 2.0),
        ("w4a16", 4096, 4096, 64, 2.7),
        ("w4a16", 4096, 4096, 4096, 173.3),
        ("w4a16", 4096, 14336, 1, 7.2),
        ("w4a16", 28672, 4096, 16, 14.6),
        ("w4a16", 57344, 8192, 128, 151.7),
        ("w8a8_int8", 4096, 4096, 1, 4.0),
        ("w8a8_int8", 8192, 8192, 1, 15.9),
        ("w8a8_int8", 10240, 8192, 64, 20.4),
        ("w8a8_int8", 8192, 28672, 512, 151.7),
        ("w8a8_int8", 57344, 8192, 4096, 2426.4),
    ],
)
def test_roof_of_known_cells(scheme, n, k, m, expected):
    group = 128 if scheme == "w4a16" else -1
    found = roof_us(H200, scheme, m, n, k, group)
    assert found == pytest.approx(expected, rel=0.02, abs=0.05)


def test_roof_counts_every_byte_once():
    assert weight_bytes("w4a16", 256, 512, 128) == 256 * 512 // 2 + 256 * 4 * 2
    assert weight_bytes("w4a16", 256, 512, -1) == 256 * 512 // 2 + 256 * 2
    assert weight_bytes("w8a8_int8", 256, 512, -1) == 256 * 512 + 256 * 4
    assert moved_bytes("w8a8_int8", 3, 256, 512, -1) == 256 * 512 + 1024 + 2 * 3 * (256 + 512)
    assert H200.int8_tops == 2 * 793.0
    assert Roof(1.0, 100.0, 350.0).int8_tops == 350.0
    assert Roof(1.0, 100.0).as_json()["int_mm_tops"] is None


def test_summary_is_median_and_percentiles():
    found = timing.summarize([5.0, 1.0, 2.0, 4.0, 3.0], copies=3, calls=7)
    assert (found.median_us, found.copies, found.calls) == (3.0, 3, 7)
    assert found.low_us == pytest.approx(1.4)
    assert found.high_us == pytest.approx(4.6)
    assert found.samples_us == (5.0, 1.0, 2.0, 4.0, 3.0)
    values = sorted(float(i) for i in range(101))
    assert timing.percentile(values, 90) == 90.0


def test_copies_exceed_the_cache():
    mib = 2**20
    assert timing.cold_bytes(60 * mib) == 256 * mib
    assert timing.cold_bytes(100 * mib) == 400 * mib
    assert timing.cold_bytes(None) == 256 * mib
    assert timing.copies_for(8 * mib, 256 * mib) == 32
    assert timing.copies_for(1000 * mib, 256 * mib) == 2
    assert timing.copies_for(1, 256 * mib) == 64


@pytest.mark.parametrize("copies", [1, 2, 31, 64])
@pytest.mark.parametrize("call_us", [0.1, 2.0, 8.6, 76.0, 330.0, 2500.0, 19_000.0, 130_000.0])
def test_plan_of_calls(copies, call_us):
    used, count = timing.plan_calls(copies, call_us)
    assert 1 <= used <= copies
    if call_us > timing.LONG_CALL_US:
        assert (used, count) == (1, 1)
        return
    if copies == 1:
        assert count * call_us >= timing.MIN_GRAPH_US or count == timing.MAX_CALLS
        return
    # One call a copy, and enough copies that none is found where the last replay left it.
    assert count == used >= 2
    assert used == copies or used * call_us <= timing.MAX_GRAPH_US or used == 2


def test_long_calls_are_replayed_less():
    assert timing.replays_for(10.0) == (3, 12)
    assert timing.replays_for(50_000.0) == (1, timing.LONG_REPLAYS)


def test_rest_grows_with_the_work_and_ends():
    assert timing.rest_for(300.0, 10.0, 3.0) == pytest.approx(3.0 * 15 * 300e-6)
    assert timing.rest_for(300.0, 10.0, 0.0) == 0.0
    assert timing.rest_for(1e6, 1e6, 3.0) == timing.MAX_REST_S


class Clock:
    """Events, graphs and streams of a GPU on which every call takes ``call_us``."""

    def __init__(self, monkeypatch, call_us):
        self.call_us, self.now, self.log, self._recording = call_us, 0.0, [], None
        clock = self

        class Event:
            def __init__(self, **_):
                self.at = None

            def record(self):
                self.at = clock.now

            def synchronize(self):
                clock.log.append("wait")

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        class Graph:
            def __init__(self):
                self.calls = 0

            def replay(self):
                clock.log.append(self.calls)
                clock.now += clock.call_us * self.calls

            def reset(self):
                pass

        def capture(calls):
            graph = Graph()
            before = clock.now
            for call in calls:
                call()
            clock.now, graph.calls = before, len(calls)
            return graph

        monkeypatch.setattr(timing, "_event", Event)
        monkeypatch.setattr(timing, "capture", capture)
        monkeypatch.setattr(timing, "_warm_up", lambda calls: 100.0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: clock.log.append("all"))
        monkeypatch.setattr(timing.time, "sleep", lambda s: clock.log.append(("rest", s)))

    def call(self):
        self.now += self.call_us


def test_graph_holds_one_call_a_copy_and_replays_wait_for_each_other(monkeypatch):
    clock = Clock(monkeypatch, 10.0)
    seen = []
    found = timing.graph_time([clock.call] * 5, rest=2.0, watch=lambda: seen.append(len(clock.log)))
    assert (found.median_us, found.copies, found.calls, len(found.samples_us)) == (10.0, 5, 5, 12)
    pilot = [4, "wait"] * 2
    assert clock.log[:4] == pilot
    assert clock.log[4] == ("rest", pytest.approx(2.0 * 15 * 50e-6))
    assert clock.log[5:35] == [5, "wait"] * 15
    # What is watched is watched at work, and the GPU is done before the graph goes.
    busy = int(timing.WATCHED_US / 50)
    assert clock.log[35:] == [5] * busy + ["all"]
    assert seen == [35 + busy]


def test_side_by_side_takes_turns_with_as_many_calls_each(monkeypatch):
    clock = Clock(monkeypatch, 10.0)
    first, second = timing.side_by_side([[clock.call] * 5, [clock.call] * 3], rest=2.0)
    assert (first.copies, first.calls, len(first.samples_us)) == (5, 5, 12)
    assert (second.copies, second.calls, len(second.samples_us)) == (3, 5, 12)
    assert (first.median_us, second.median_us) == (10.0, 10.0)
    assert clock.log[8] == ("rest", pytest.approx(2.0 * 15 * 100e-6))
    assert clock.log[9:] == [5, "wait"] * 30


def test_side_by_side_knows_who_is_who(monkeypatch):
    clock = Clock(monkeypatch, 10.0)
    order = []
    monkeypatch.setattr(timing, "pilot_time", lambda calls: 10.0)
    monkeypatch.setattr(timing, "capture", lambda calls: type("G", (), {"reset": int})())
    graphs = {}

    def replay(graph, samples):
        name = graphs.setdefault(id(graph), len(graphs))
        order.append(name)
        return [100.0 * (name + 1)] * samples

    monkeypatch.setattr(timing, "replay", replay)
    times = timing.side_by_side([[clock.call] * 4] * 3)
    assert [timing.median_us for timing in times] == [25.0, 50.0, 75.0]
    assert order[:9] == [0, 1, 2, 1, 2, 0, 2, 0, 1]


@pytest.mark.parametrize("to_the_end", [False, True])
def test_host_time_issues_few_calls_a_sample(monkeypatch, to_the_end):
    clock = Clock(monkeypatch, 10.0)
    found = timing.host_time(
        lambda: clock.log.append("call"), count=3, samples=2, to_the_end=to_the_end
    )
    sample = ["all", *["call"] * 3, *["all"] * to_the_end]
    assert clock.log == ["call"] * 20 + sample * 2 + ["all"]
    assert (found.calls, len(found.samples_us)) == (3, 2)


def test_cpu_time_rotates_and_measures():
    turns = []
    calls = [lambda i=i: turns.append(i) for i in range(3)]
    found = timing.cpu_time(calls, budget_s=0.01)
    assert set(turns) == {0, 1, 2}
    assert found.low_us <= found.median_us <= found.high_us
    assert found.median_us == statistics.median(found.samples_us)


def test_shapes():
    assert len(set(SHAPES)) == 8
    assert set(model_shapes("llama-3-8b")) == {
        (6144, 4096),
        (4096, 4096),
        (28672, 4096),
        (4096, 14336),
    }
    assert set(model_shapes("llama-3-70b")) < set(SHAPES)
    assert (1024, 4096) in model_shapes("llama-3-8b", fused=False)
    for name in MODELS:
        layers = model_layers(name)
        assert {layer.name for layer in layers} >= {"qkv_proj", "o_proj", "down_proj"}
        assert all(layer.n % 64 == 0 and layer.k % 128 == 0 for layer in layers)
    with pytest.raises(ValueError, match="gpt-9"):
        model_layers("gpt-9")


def test_parse_shape():
    assert parse_shape("4096x14336") == parse_shape("4096\u00d714336") == (4096, 14336)
    for text in ("4096", "4096x", "0x5", "axb", "1x2x3"):
        with pytest.raises(ValueError, match="NxK"):
            parse_shape(text)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8_int8"])
def test_workload_reference(scheme):
    work = make_workload(scheme, 192, 256, 5, CPU)
    again = make_workload(scheme, 192, 256, 5, CPU)
    assert torch.equal(work.words, again.words)
    assert torch.equal(work.expected, again.expected)
    assert not torch.equal(work.words, make_workload(scheme, 192, 256, 5, CPU, seed=1).words)
    weight = work.floating()
    assert (weight != 0).any(dim=1).all()
    y = torch.nn.functional.linear(work.x(3), weight)
    assert work.error(y, 3) < 0.01 < ERROR_LIMITS[scheme]
    y[2, 7] = float("nan")
    assert work.error(y, 3) != work.error(y, 3)
    with pytest.raises(ValueError, match="shape"):
        work.error(y, 4)


def test_workload_notices_a_wrong_scale():
    work = make_workload("w4a16", 1024, 256, 4, CPU)
    assert len(work.columns) == 512
    y = torch.nn.functional.linear(work.x(4), work.floating())
    y[:, 512:640] *= 1.5
    assert work.error(y, 4) > ERROR_LIMITS["w4a16"]


def test_workload_refusals():
    with pytest.raises(ValueError, match="scheme"):
        make_workload("w2a2", 64, 64, 1, CPU)
    with pytest.raises(ValueError, match="k: found 192"):
        make_workload("w4a16", 64, 192, 1, CPU)
