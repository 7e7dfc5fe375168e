"""Marlin's constraints and layout helpers; everything but the workspace runs on CPU."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pymllm.quantization import marlin


def test_constants():
    assert marlin.MARLIN_SUPPORTED_GROUP_SIZES == [-1, 32, 64, 128]
    assert marlin.GPTQ_MARLIN_MIN_THREAD_N == 64
    assert marlin.GPTQ_MARLIN_MIN_THREAD_K == 128
    assert marlin.GPTQ_MARLIN_TILE == 16


def packed_id(*, exponent, mantissa, signed, bias, finite, nan_repr):
    """The id field by field, as a string of bits from the most significant one."""
    (unsigned_bias,) = struct.unpack("<I", struct.pack("<i", bias))
    fields = ((nan_repr, 8), (finite, 1), (unsigned_bias, 32), (signed, 1), (mantissa, 8))
    return int("".join(f"{value:0{width}b}" for value, width in (*fields, (exponent, 8))), 2)


@pytest.mark.parametrize(
    ("scalar", "name", "bias", "number"),
    [
        (marlin.SCALAR_TYPE_UINT4, "uint4", 0, 0x4000000000400),
        (marlin.SCALAR_TYPE_UINT4B8, "uint4b8", 8, 0x4000000100400),
    ],
)
def test_scalar_types(scalar, name, bias, number):
    expected = packed_id(exponent=0, mantissa=4, signed=0, bias=bias, finite=0, nan_repr=1)
    assert (scalar.name, scalar.size_bits, scalar.id) == (name, 4, expected)
    assert expected == number
    assert str(scalar) == name


@pytest.mark.parametrize("bias", [-1, 128, -(2**31), 2**31 - 1])
def test_scalar_type_fields_do_not_run_into_each_other(bias):
    scalar = marlin.ScalarType("t", 5, 10, True, bias, finite_values_only=True)
    expected = packed_id(exponent=5, mantissa=10, signed=1, bias=bias, finite=1, nan_repr=1)
    assert (scalar.size_bits, scalar.id) == (16, expected)


@pytest.fixture
def fake_gpu(monkeypatch):
    def install(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "fake GPU")

    return install


@pytest.mark.parametrize("capability", [None, (8, 0), (8, 6), (9, 0), (12, 0)])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_supported(fake_gpu, capability, group_size):
    fake_gpu(capability)
    marlin.verify_marlin_supported(group_size)


@pytest.mark.parametrize("group_size", [0, 16, 256, -2])
def test_unsupported_group_size(fake_gpu, group_size):
    fake_gpu(None)
    with pytest.raises(ValueError, match=rf"group_size: found {group_size}; .*\[-1, 32, 64, 128\]"):
        marlin.verify_marlin_supported(group_size)


def test_unsupported_gpu(fake_gpu):
    fake_gpu((7, 5))
    with pytest.raises(ValueError, match=r"found 7\.5 \(fake GPU\).*8\.0"):
        marlin.verify_marlin_supported(128)


@pytest.mark.parametrize(
    "shape",
    [
        (64, 128, 128, 128),
        (64, 128, 256, 128),
        (64, 128, 256, -1),
        (192, 384, 384, 32),
        (64, 128, 128, 256),  # one group covers the whole layer
    ],
)
def test_supported_shapes(shape):
    marlin.verify_marlin_supports_shape(*shape)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((63, 128, 128, -1), "output_size_per_partition: found 63; .*64"),
        ((96, 128, 128, -1), "output_size_per_partition: found 96"),
        ((64, 64, 128, -1), "input_size_per_partition: found 64; .*128"),
        ((64, 192, 384, 32), "input_size_per_partition: found 192"),
        ((64, 128, 512, 256), r"input_size_per_partition: found 128; .*256 \(group_size\)"),
        ((0, 128, 128, -1), "output_size_per_partition: found 0"),
        ((64, 0, 128, -1), "input_size_per_partition: found 0"),
        ((64, 128, 0, -1), "input_size: found 0"),
        ((64, 128, 128, 0), "group_size: found 0"),
        ((64, 128, 128, -2), "group_size: found -2"),
    ],
)
def test_unsupported_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        marlin.verify_marlin_supports_shape(*shape)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_workspace_needs_cuda(device):
    with pytest.raises(ValueError, match=f"device: found '{device}'"):
        marlin.marlin_make_workspace(torch.device(device))


def test_workspace_has_one_element_per_sm(monkeypatch):
    """The device is faked down to the allocation, which lands on the CPU."""
    zeros = torch.zeros
    seen = []
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(multi_processor_count=7),
    )
    monkeypatch.setattr(
        torch,
        "zeros",
        lambda *size, dtype, device: seen.append(device) or zeros(*size, dtype=dtype),
    )
    workspace = marlin.marlin_make_workspace(torch.device("cuda:1"))
    assert seen == [torch.device("cuda:1")]
    assert torch.equal(workspace, torch.tensor([0] * 7, dtype=torch.int32))
    assert workspace.dtype == torch.int32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_workspace_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    workspace = marlin.marlin_make_workspace(device)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    assert (workspace.shape, workspace.dtype, workspace.device) == ((sms,), torch.int32, device)
    assert not workspace.any()


def test_empty_g_idx():
    g_idx = marlin.marlin_make_empty_g_idx(torch.device("cpu"))
    assert isinstance(g_idx, nn.Parameter)
    assert (g_idx.shape, g_idx.dtype, g_idx.requires_grad) == ((0,), torch.int32, False)


def test_scale_perms_against_array_shuffles():
    grouped, channel = marlin.get_scale_perms()
    assert grouped == torch.arange(64).reshape(8, 8).T.flatten().tolist()
    # Column = 8 * pair_block + 2 * thread + element, read thread by thread.
    assert channel == torch.arange(32).reshape(4, 4, 2).permute(1, 0, 2).flatten().tolist()
    assert sorted(grouped) == list(range(64))
    assert sorted(channel) == list(range(32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("k", "n", "group_size"),
    [(256, 128, 128), (256, 64, 32), (384, 192, 64), (256, 128, -1), (128, 96, 128), (64, 64, 128)],
)
def test_permuted_scales_hold_every_scale_where_marlin_reads_it(k, n, group_size, dtype):
    is_grouped = group_size != -1 and group_size < k
    groups = k // group_size if is_grouped else 1
    scales = torch.randn(groups, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = scales.clone()
    permuted = marlin.marlin_permute_scales(scales, k, n, group_size)
    assert (permuted.dtype, permuted.shape) == (dtype, scales.shape)
    assert permuted.is_contiguous()
    assert torch.equal(scales, before)
    for column in range(n):
        if is_grouped:
            base, within = column // 64 * 64, column % 64
            source = base + within // 8 + 8 * (within % 8)
        else:
            base, within = column // 32 * 32, column % 32
            source = base + 2 * (within // 8) + 8 * (within % 8 // 2) + within % 2
        assert torch.equal(permuted[:, column], scales[:, source])


@pytest.mark.parametrize("group_size", [64, -1])
def test_permutation_can_be_undone(group_size):
    groups = 1 if group_size == -1 else 4
    scales = torch.arange(groups * 128, dtype=torch.float32).reshape(groups, 128)
    permuted = marlin.marlin_permute_scales(scales, 256, 128, group_size)
    perm = torch.tensor(marlin.get_scale_perms()[group_size == -1])
    restored = permuted.reshape(-1, len(perm))[:, perm.argsort()].reshape(groups, 128)
    assert not torch.equal(permuted, scales)
    assert torch.equal(restored, scales)


def test_permute_takes_a_transposed_view():
    scales = torch.randn(128, 4).T
    expected = marlin.marlin_permute_scales(scales.contiguous(), 256, 128, 64)
    assert torch.equal(marlin.marlin_permute_scales(scales, 256, 128, 64), expected)


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        ((2, 64), (256, 64, 64), r"s: found shape \(2, 64\); accepted: \(4, 64\)"),
        ((4, 128), (256, 64, 64), r"s: found shape"),
        ((2, 64), (256, 64, -1), r"accepted: \(1, 64\)"),
        ((64,), (256, 64, -1), r"s: found shape \(64,\)"),
        ((4, 96), (256, 96, 64), "size_n: found 96; .*64"),
        ((1, 48), (256, 48, -1), "size_n: found 48; .*32"),
        ((3, 64), (200, 64, 64), "size_k: found 200; .*64"),
        ((4, 64), (256, 64, 0), "group_size: found 0"),
    ],
)
def test_permute_refusals(shape, sizes, message):
    with pytest.raises(ValueError, match=message):
        marlin.marlin_permute_scales(torch.zeros(shape), *sizes)


# --- replace_parameter ----------------------------------------------------------------------


def test_replaced_parameter_keeps_attributes_and_takes_any_shape():
    layer = nn.Linear(4, 2)
    layer.weight.weight_loader = "loader"
    packed = torch.ones(3, dtype=torch.int32)
    marlin.replace_parameter(layer, "weight", packed)
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.requires_grad is False
    assert layer.weight.weight_loader == "loader"
    assert layer.weight.data_ptr() == packed.data_ptr()
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}


def test_replacement_from_a_parameter_is_detached():
    layer = nn.Linear(4, 2)
    source = nn.Parameter(torch.ones(2, 4))
    marlin.replace_parameter(layer, "weight", source)
    assert layer.weight is not source
    assert layer.weight.requires_grad is False
    assert layer.weight.is_leaf
    assert source.requires_grad is True


def test_none_parameter_is_filled():
    layer = nn.Linear(4, 2, bias=False)
    marlin.replace_parameter(layer, "bias", torch.zeros(2))
    assert isinstance(layer.bias, nn.Parameter)


@pytest.mark.parametrize("persistent", [True, False])
def test_buffer_stays_a_buffer(persistent):
    layer = nn.Module()
    layer.register_buffer("g_idx", torch.zeros(2), persistent=persistent)
    marlin.replace_parameter(layer, "g_idx", torch.ones(3, requires_grad=True))
    assert torch.equal(layer.g_idx, torch.ones(3))
    assert layer.g_idx.requires_grad is False
    assert ("g_idx" in layer.state_dict()) is persistent


@pytest.mark.parametrize("name", ["weights", "forward", "child", "child.weight"])
def test_unknown_name_is_refused(name):
    layer = nn.Linear(4, 2)
    layer.child = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=rf"'{name}'.*Linear.*weight.*bias"):
        marlin.replace_parameter(layer, name, torch.zeros(1))
