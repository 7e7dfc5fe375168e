"""Launches through the driver on a GPU: captured, from threads, with and without torch's dispatcher."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from pymllm_kernels import LinearProblem, counters, device_facts, ops, select_kernel
from pymllm_kernels.common import eager

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


class Layer:
    """A layer with random weights, called as a user calls it."""

    def __init__(self, scheme: str, n: int, k: int) -> None:
        facts = device_facts("cuda")
        g = torch.Generator(device="cuda").manual_seed(n + k)
        if scheme == "w4a16":
            self.problem = LinearProblem(scheme, n, k, 4, 128, True, False, BF16, BF16, facts)
            words = torch.randint(
                -(2**31), 2**31, (n, k // 8), dtype=torch.int32, device="cuda", generator=g
            )
            scale = (torch.rand(n, k // 128, device="cuda", generator=g) / 100).to(BF16)
            stored: tuple[Any, ...] = (words, scale, None, None)
        else:
            self.problem = LinearProblem(
                scheme, n, k, 8, -1, True, False, BF16, torch.float32, facts, "token"
            )
            codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda", generator=g)
            stored = (codes, torch.rand(n, device="cuda", generator=g) / 1000)
        self.kernel: Any = select_kernel(self.problem).kernel
        self.weight = self.kernel.prepare(self.problem, *stored)
        self.call = self.kernel.bind(self.problem, self.weight)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out: torch.Tensor = self.call(x, self.weight, bias)
        return out

    def inputs(self, m: int) -> torch.Tensor:
        g = torch.Generator(device="cuda").manual_seed(m)
        return torch.randn(m, self.problem.k, device="cuda", generator=g).to(BF16)


SCHEMES = ["w4a16", "w8a8_int8"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("m", [1, 100])
def test_the_first_call_of_a_layer_may_be_captured(scheme: str, m: int) -> None:
    """Nothing was compiled, tuned or loaded for this key before."""
    layer = Layer(scheme, 1168 + 16 * m, 2048)
    x = layer.inputs(m)
    tuned = counters().tuned
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, layer(x))
    assert counters().tuned == tuned


@pytest.mark.parametrize("scheme", SCHEMES)
def test_threads_may_call_a_layer_at_once(scheme: str) -> None:
    """Each on a stream of its own, started without a CUDA context; parameters are not mixed up."""
    layer = Layer(scheme, 1040, 2048)
    xs = [layer.inputs(m) for m in (1, 1, 17, 17, 130, 130)]
    expected = [layer(x) for x in xs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            outs = [layer(xs[i]) for _ in range(200)]
            torch.cuda.current_stream().synchronize()
        wrong.extend(i for out in outs if not torch.equal(out, expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_dispatcher_changes_nothing(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(scheme, 1040, 2048)
    x = layer.inputs(9)
    assert ops.direct(x)
    direct = layer(x)
    assert torch.equal(layer.kernel.apply(layer.problem, x, layer.weight, None), direct)
    for module in (ops, eager):
        monkeypatch.setattr(module, "direct", lambda x: False)
    assert torch.equal(layer(x), direct)


def test_who_listens_is_heard() -> None:
    x = torch.empty(1, 1, device="cuda")
    assert ops.direct(x)
    assert not ops.direct(x.requires_grad_())
    assert not ops.direct(torch.nn.Parameter(x.detach()))
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    layer = Layer("w4a16", 1040, 2048)
    with Mode():
        layer(layer.inputs(3))
    assert "pymllm_kernels.w4a16_gemm_hopper.default" in seen or any(
        "w4a16_gemm" in s for s in seen
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_biases_as_they_come(scheme: str) -> None:
    """Views that start anywhere, with gaps, in another dtype; a wrong one is refused by name."""
    layer = Layer(scheme, 1040, 2048)
    x, values = layer.inputs(5), torch.randn(2 * 1040 + 3, device="cuda")
    for bias in (values[3 : 3 + 1040], values[1 : 1 + 2 * 1040 : 2], values[:1040].to(BF16)):
        assert torch.equal(layer(x, bias), layer(x, bias.clone()))
    with pytest.raises(ValueError, match=r"bias: found shape \(1039,\), expected \(1040,\)"):
        layer(x, values[:1039])
    with pytest.raises(ValueError, match="bias: found on cpu, but x is on cuda"):
        layer(x, values[:1040].cpu())
    with pytest.raises(ValueError, match="x: found on cpu, but the weight is on cuda"):
        layer(x.cpu())
    with pytest.raises(ValueError, match=r"bias: found torch\.float64, accepted"):
        layer(x, values[:1040].double())
