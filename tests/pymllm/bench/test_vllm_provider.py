"""What the vLLM providers hand to its operators, which plain torch stands in for here."""

import sys
import types

import pytest
import torch

from pymllm.bench.providers import vllm
from pymllm.bench.workload import ERROR_LIMITS, make_workload
from pymllm_kernels.common.packing import unpack_words
from pymllm_kernels.per_token_quant_int8 import reference as quant_reference

CPU = torch.device("cpu")
N, K, M = 128, 256, 5


class Operators:
    """vLLM's operators in plain torch, with the order of arguments of 0.26."""

    def gptq_marlin_repack(self, packed, perm, size_k, size_n, bits, a_8bit):
        assert (packed.shape, packed.is_contiguous()) == ((K // 8, N), True)
        assert (perm.numel(), size_k, size_n, bits, a_8bit) == (0, K, N, 4, False)
        return packed

    def marlin_gemm(
        self, a, c, weight, bias, scales, a_scales, global_scale, zeros, g_idx, perm, workspace,
        type_id, m, n, k, k_full, atomic_add, fp32_reduce, zeros_float,
    ):  # fmt: skip
        assert type_id == 0x4000000100400
        assert (c, bias, a_scales, global_scale) == (None, None, None, None)
        assert [t.numel() for t in (zeros, g_idx, perm, workspace)] == [0, 0, 0, 132]
        assert (m, n, k) == (M, N, K)
        assert (k_full, atomic_add, fp32_reduce, zeros_float) == (True, False, True, False)
        # Place 8 i + j of a block of 64 holds the scale of output i + 8 j.
        plain = torch.empty_like(scales)
        for place in range(N):
            block, i, j = place // 64, place % 64 // 8, place % 8
            plain[:, 64 * block + i + 8 * j] = scales[:, place]
        return _matmul(a, weight.T.contiguous(), plain.T)

    def machete_prepack_B(self, packed, a_type, type_id, scale_type):
        assert (packed.shape, packed.stride()) == ((K // 8, N), (1, K // 8))
        assert (a_type, scale_type) == (torch.bfloat16, torch.bfloat16)
        assert type_id == 0x4000000100400
        return packed.T.contiguous()

    def machete_mm(
        self, a, weight, type_id, out_type, scales, zeros, group, channel, token, schedule
    ):
        assert type_id == 0x4000000100400
        assert (out_type, zeros, channel, token, schedule) == (None,) * 5
        assert (scales.shape, scales.is_contiguous(), group) == ((K // 128, N), True, 128)
        return _matmul(a, weight, scales.T)

    def dynamic_scaled_int8_quant(self, out, x, scale, azp):
        assert (out.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (M, 1))
        assert azp is None
        codes, found = quant_reference.per_token_quant_int8(x)
        out.copy_(codes)
        scale.copy_(found.reshape(M, 1))

    def cutlass_scaled_mm(self, out, a, b, a_scales, b_scales, bias):
        assert (b.shape, b.stride(), b_scales.shape) == ((K, N), (1, K), (N, 1))
        assert (b_scales.dtype, bias) == (torch.float32, None)
        exact = a.to(torch.float64) @ b.to(torch.float64)
        out.copy_(exact * a_scales * b_scales.T)


def _matmul(x, words, scale):
    weight = (unpack_words(words, 4, K).to(x.dtype) - 8) * scale.repeat_interleave(128, dim=1)
    return torch.nn.functional.linear(x, weight)


@pytest.fixture
def operators(monkeypatch):
    found = Operators()
    monkeypatch.setattr(vllm, "_ops", lambda: found)
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(vllm, "missing", lambda module, package: None)
    return found


def triton_scaled_mm(codes, weight, x_scale, scale, dtype):
    out = torch.full((M, N), float("nan"), dtype=dtype)
    Operators().cutlass_scaled_mm(out, codes, weight, x_scale, scale, None)
    return out


@pytest.mark.parametrize(
    "provider", [vllm.Marlin(), vllm.Machete(), vllm.Cutlass(), vllm.VllmTriton()], ids=lambda p: p.name
)  # fmt: skip
def test_operators_get_the_layer(operators, monkeypatch, provider):
    module = types.ModuleType(vllm._TRITON)
    module.triton_scaled_mm = triton_scaled_mm
    monkeypatch.setitem(sys.modules, vllm._TRITON, module)
    assert provider.why_absent() is None
    work = make_workload(provider.schemes[0], N, K, M, CPU)
    assert provider.why_not(work) is None
    calls = provider.build(work, 3)
    assert len(calls) == 3
    for call in calls:
        assert work.error(call(work.x(M)), M) <= ERROR_LIMITS[work.scheme]


def test_an_operator_that_is_not_there_is_named(operators, monkeypatch):
    monkeypatch.delattr(Operators, "machete_mm")
    assert "no operator machete_mm; written for 0.26" in vllm.Machete().why_absent()
    assert vllm.Marlin().why_absent() is None


def test_a_library_that_does_not_load_is_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm, "missing", lambda module, package: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: spec)
    vllm._ops.cache_clear()
    assert "no _C*.so in" in vllm.Cutlass().why_absent()
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    assert "its library does not load: OSError" in vllm.Cutlass().why_absent()


@pytest.mark.parametrize(
    "provider, shape, group, reason",
    [
        (vllm.Marlin(), (N, K), 16, "takes groups of"),
        (vllm.Marlin(), (N, 128), 128, "takes groups of"),
        (vllm.Marlin(), (96, K), 128, "N a multiple of 64"),
        (vllm.Machete(), (64, K), 128, "N a multiple of 128"),
        (vllm.Cutlass(), (72, K), -1, "multiples of 16"),
    ],
)
def test_layers_that_they_do_not_take(provider, shape, group, reason):
    work = make_workload(provider.schemes[0], *shape, M, CPU, group=group)
    assert reason in provider.why_not(work)
