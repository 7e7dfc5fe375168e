"""The Hopper int8 linear layer on a GPU: every configuration, sharing, streams, graphs, repetition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pymllm_kernels import device_facts
from pymllm_kernels.testing.int8_layer import Int8Layer, int8_inputs, make_int8_layer
from pymllm_kernels.w8a8_int8.hopper_tuning import HopperConfig, Plan, candidates, plan_launch

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
if not hopper:
    pytest.skip("needs a GPU of capability 9.0", allow_module_level=True)

from pymllm_kernels.w8a8_int8.hopper_launch import launch_linear

BF16, FP16 = torch.bfloat16, torch.float16
# Rings go round several times, tiles and K steps are ragged.
N, K = 4104, 8208


def make(n: int = N, k: int = K, **kind: Any) -> Int8Layer:
    layer = make_int8_layer(n, k, **kind)
    assert layer.kernel.name == "gluon_hopper_w8a8_int8"
    return layer


def inputs(m: int, k: int = K, dtype: torch.dtype = BF16) -> torch.Tensor:
    return int8_inputs(m, k, dtype)


@pytest.mark.parametrize("m", [0, 1, 5, 13, 16, 17, 50, 64, 65, 128, 200, 300, 1000])
def test_exact_round_the_ring(m: int) -> None:
    layer, x = make(), inputs(m)
    assert torch.equal(layer(x), layer.exact(x))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_of_layer(bias: bool, symmetric: bool, static: bool, dtype: torch.dtype) -> None:
    layer = make(1000, 1040, symmetric=symmetric, static=static, bias=bias, dtype=dtype)
    for m in (1, 13, 50, 200, 700):
        x = inputs(m, 1040, dtype)
        assert torch.equal(layer(x), layer.exact(x)), m


def test_strided_and_batched_activations() -> None:
    layer = make(1000, 1040)
    wide = inputs(60, 2081)
    for x in (
        wide[:, 1:2081:2], wide[::3, 7:1047], inputs(1040, 33).T, wide[:, :1040].unflatten(0, (3, 20)),
        wide[:1, 1:1041],
    ):  # fmt: skip
        assert torch.equal(layer(x), layer.exact(x))


def _with_every_plan(config: HopperConfig, plan: Plan) -> list[Plan]:
    plans = [plan, plan._replace(dependent=False, early=False)]
    if not (config.meet and config.share != 1):
        plans += [plan._replace(dependent=True, early=early) for early in (False, True)]
    return plans


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(13, N, K), (50, N, K), (200, N, K), (16, 4096, 4096), (64, 4096, 4096), (300, 4096, 14336)],
)
def test_every_configuration(m: int, n: int, k: int, odd: bool) -> None:
    layer = make(n, k, symmetric=not odd, bias=odd)
    x = inputs(m, k)
    facts = device_facts("cuda")
    expected = layer.exact(x)
    w = layer.weight
    for _, config in candidates(m, n, k, facts.multiprocessors, facts.shared_memory):
        plan = plan_launch(config, m, n, k, facts.multiprocessors)
        assert plan is not None
        for one in _with_every_plan(config, plan):
            memory = torch.full((m * n + 4096,), float("nan"), dtype=BF16, device="cuda")
            out = memory[2048 : 2048 + m * n].view(m, n)
            launch_linear(
                x, w.weight, w.scale, w.column_sum, None, None, layer.bias, out,
                symmetric=not odd, config=config, plan=one,
            )  # fmt: skip
            assert torch.equal(out, expected), (config, one)
            assert memory[:2048].isnan().all() and memory[2048 + m * n :].isnan().all()


@pytest.mark.parametrize("m", [1, 16, 64, 128, 256, 1024])
def test_thousand_calls_give_the_same_bits(m: int) -> None:
    layer, x = make(), inputs(m)
    first = layer(x)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000 if m <= 256 else 200):
        different += (layer(x) != first).sum()
    assert different.item() == 0


@pytest.mark.parametrize("m", [1, 64, 128, 300])
def test_captured_in_graphs_that_run_beside_each_other(m: int) -> None:
    layer = make()
    xs = [inputs(m) for _ in range(2)]
    layer(xs[0])
    torch.cuda.synchronize()
    graphs, outs = [], []
    for x in xs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append(layer(layer(x)[:, :1].expand(m, K) + x))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in xs]
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for x, out in zip(xs, outs, strict=True):
        assert torch.equal(out, layer(layer(x)[:, :1].expand(m, K) + x))


@pytest.mark.parametrize("m", [16, 64, 128])
def test_two_streams_at_once(m: int) -> None:
    layer = make()
    xs = [inputs(m) for _ in range(2)]
    expected = [layer(x) for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    outs: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outs[i].append(layer(xs[i]))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[i]) for i in (0, 1) for out in outs[i])


def test_weight_off_16_bytes_is_copied_once() -> None:
    layer = make(1000, 1040)
    memory = torch.empty(1000 * 1040 + 1, dtype=torch.int8, device="cuda")
    moved = memory[1:].view(1000, 1040).copy_(layer.weight.weight)
    weight = layer.kernel.prepare(layer.problem, moved, layer.weight.scale)
    assert weight.weight.data_ptr() % 16 == 0
    x = inputs(20, 1040)
    assert torch.equal(layer.kernel.apply(layer.problem, x, weight, None), layer(x))


def test_nan_and_zero_rows() -> None:
    layer = make(1000, 1040, bias=True)
    x = inputs(20, 1040)
    x[3], x[4, 7], x[5, 9] = 0, float("nan"), float("inf")
    out = layer(x)
    assert layer.bias is not None and torch.equal(out[3], layer.bias)
    assert out[4:6].isnan().all() and out[:3].isfinite().all() and out[6:].isfinite().all()


def test_operator() -> None:
    layer = make(1000, 1040, symmetric=False, bias=True)
    w = layer.weight
    arguments = (inputs(5, 1040), w.weight, w.scale, w.column_sum, None, None, layer.bias, False)
    torch.library.opcheck(torch.ops.pymllm_kernels.w8a8_int8_linear.default, arguments)
