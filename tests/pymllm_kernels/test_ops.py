"""The torch operators: schema and fake checks, one compiled graph for every M, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import pymllm_kernels
from pymllm_kernels import LinearProblem, device_facts, select_kernel
from pymllm_kernels.testing.inputs import make_w4a16
from pymllm_kernels.w4a16 import api

BF16 = torch.bfloat16
OPS = torch.ops.pymllm_kernels
Layer = Callable[[torch.Tensor], torch.Tensor]


def w4a16_layer(device: str, group_size: int = 64, act_order: bool = False) -> Layer:
    layer = make_w4a16(24, 128, group_size, symmetric=False, act_order=act_order, device=device)
    kernel = select_kernel(layer.problem, "triton_w4a16").kernel
    weight = kernel.prepare(layer.problem, layer.words, layer.scale, layer.zero, layer.g_idx)
    bias = torch.linspace(-1, 1, 24, dtype=BF16, device=device)
    return lambda x: kernel.apply(layer.problem, x, weight, bias)


def w8a8_layer(device: str, strategy: str = "token", symmetric: bool = True) -> Layer:
    facts = device_facts(device)
    problem = LinearProblem(
        "w8a8_int8", 24, 128, 8, -1, True, False, BF16, torch.float32, facts, strategy, symmetric
    )
    kernel = select_kernel(problem, "triton_w8a8_int8").kernel
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (24, 128), dtype=torch.int8, generator=g).to(device)
    scale = (torch.rand(24, generator=g) / 100).to(device)
    static = torch.tensor([0.02], device=device) if strategy == "tensor" else None
    point = None
    if static is not None and not symmetric:
        point = torch.tensor([3], dtype=torch.int8, device=device)
    weight = kernel.prepare(problem, codes, scale, static, point)
    return lambda x: kernel.apply(problem, x, weight, None)


LAYERS: list[tuple[str, Callable[[str], Layer]]] = [
    ("w4a16", w4a16_layer),
    ("w4a16 act-order", lambda device: w4a16_layer(device, act_order=True)),
    ("w8a8 dynamic", w8a8_layer),
    ("w8a8 dynamic asymmetric", lambda device: w8a8_layer(device, symmetric=False)),
    ("w8a8 static", lambda device: w8a8_layer(device, "tensor")),
    ("w8a8 static asymmetric", lambda device: w8a8_layer(device, "tensor", False)),
]


def inputs(m: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(m)
    return torch.randn(m, 128, generator=generator).to(BF16).to(device)


def test_opcheck_w4a16(triton_device: str) -> None:
    layer = make_w4a16(24, 96, 48, symmetric=False, act_order=True, device=triton_device)
    weight = api.prepare(layer.words, layer.scale, layer.zero, layer.g_idx, bits=4, k=96)
    bias = torch.zeros(24, device=triton_device)
    for x in (
        torch.randn(5, 96, dtype=BF16, device=triton_device),
        torch.randn(2, 3, 96, dtype=BF16, device=triton_device),
        torch.randn(96, 7, dtype=BF16, device=triton_device).T,
    ):
        torch.library.opcheck(OPS.w4a16_gemm.default, (x, *weight, bias, 4, 48))


@pytest.mark.parametrize("shape", [(5, 96), (2, 3, 96)], ids=str)
def test_opcheck_int8(triton_device: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=BF16, device=triton_device)
    one = torch.ones(1, device=triton_device)
    zero = torch.ones(1, dtype=torch.int32, device=triton_device)
    torch.library.opcheck(OPS.per_token_quant_int8.default, (x,))
    torch.library.opcheck(OPS.per_token_quant_int8_asym.default, (x,))
    torch.library.opcheck(OPS.static_quant_int8.default, (x, one, zero))
    weight = torch.randint(-128, 128, (24, 96), dtype=torch.int8, device=triton_device)
    codes, scale, point = pymllm_kernels.per_token_quant_int8_asym(x)
    column_sum = weight.sum(1, dtype=torch.int32)
    bias = torch.zeros(24, device=triton_device)
    arguments = (codes, weight, scale, one, point, column_sum, bias, BF16)
    torch.library.opcheck(OPS.w8a8_int8_gemm.default, arguments)


@pytest.mark.parametrize(("name", "make"), LAYERS, ids=[name for name, _ in LAYERS])
def test_one_graph_for_every_m(triton_device: str, name: str, make: Callable[[str], Layer]) -> None:
    """``fullgraph=True`` with a dynamic M: no break, and no recompile from M = 0 to 40."""
    layer = make(triton_device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (5, 1, 40, 0, 17):
            x = inputs(m, triton_device)
            torch._dynamo.decorators.mark_unbacked(x, 0)
            assert torch.equal(compiled(x), layer(x)), f"{name}, M = {m}"


@pytest.mark.parametrize(("name", "make"), LAYERS, ids=[name for name, _ in LAYERS])
def test_marked_dynamic(triton_device: str, name: str, make: Callable[[str], Layer]) -> None:
    """What users write: ``mark_dynamic``, M from 2 up."""
    layer = make(triton_device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (5, 2, 40):
            x = inputs(m, triton_device)
            torch._dynamo.mark_dynamic(x, 0)
            assert torch.equal(compiled(x), layer(x)), f"{name}, M = {m}"


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "make"), LAYERS, ids=[name for name, _ in LAYERS])
def test_inductor(name: str, make: Callable[[str], Layer]) -> None:
    layer = make("cuda")
    compiled = torch.compile(layer, fullgraph=True)
    torch._dynamo.reset()
    for m in (5, 40):
        x = inputs(m, "cuda")
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [0, 1, 40])
@pytest.mark.parametrize(("name", "make"), LAYERS, ids=[name for name, _ in LAYERS])
def test_cuda_graph(name: str, make: Callable[[str], Layer], m: int) -> None:
    """Captured with one input, replayed with another: nothing of the call stayed on the host."""
    layer = make("cuda")
    x = inputs(m, "cuda")
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    x.copy_(torch.flip(x, (0,)) * 0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, layer(x))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("name", "make"), LAYERS, ids=[name for name, _ in LAYERS])
def test_second_gpu_while_the_first_is_current(name: str, make: Callable[[str], Layer]) -> None:
    x = inputs(40, "cuda:0")
    expected = make("cuda:0")(x)
    with torch.cuda.device(0):
        actual = make("cuda:1")(x.to("cuda:1"))
    assert actual.device == torch.device("cuda:1")
    assert torch.equal(actual.cpu(), expected.cpu())


def test_a_cpu_tensor_needs_the_interpreter() -> None:
    if pymllm_kernels.device.interpreting():
        pytest.skip("the interpreter is on")
    layer = make_w4a16(8, 128, 64)
    weight = api.prepare(layer.words, layer.scale, None, None, bits=4, k=128)
    with pytest.raises(RuntimeError, match="w4a16_gemm: found CPU tensors"):
        api.w4a16_gemm(torch.ones(2, 128, dtype=BF16), weight, group_size=64)
