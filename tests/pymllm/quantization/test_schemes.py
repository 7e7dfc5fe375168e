"""The schemes on a bare module, as an engine with its own layers uses them."""

import re

import pytest
import torch

from pymllm.quantization.marlin import SCALAR_TYPE_UINT4, SCALAR_TYPE_UINT4B8
from pymllm.quantization.schemes import (
    CompressedTensorsW8A8Int8Scheme,
    CompressedTensorsWNA16Scheme,
)
from pymllm_kernels.w4a16.providers import CpuInt4Pack, TorchW4A16

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def wna16(**how):
    how = {"weight_bits": 4, "group_size": 32, "symmetric": True, "actorder": None, **how}
    return CompressedTensorsWNA16Scheme(**how)


def bare(scheme, n=24, k=64, sizes=None, dtype=BF16, **attrs):
    layer = torch.nn.Module()
    layer.prefix = "m.a"
    sizes = sizes or [n]
    scheme.create_weights(
        layer,
        input_size_per_partition=k,
        output_partition_sizes=sizes,
        input_size=k,
        output_size=sum(sizes),
        params_dtype=dtype,
        **attrs,
    )
    return layer


def fill(layer, tensors):
    for name, tensor in tensors.items():
        layer._parameters[name].data.copy_(tensor)


@pytest.mark.parametrize("group_size", [None, 0, -1])
def test_one_scale_a_row(group_size):
    scheme = wna16(group_size=group_size)
    assert scheme.group_size == -1
    assert bare(scheme, k=77).weight_scale.shape == (24, 1)


def test_attributes():
    assert wna16().quant_type == SCALAR_TYPE_UINT4B8
    assert wna16(symmetric=False).quant_type == SCALAR_TYPE_UINT4
    assert str(wna16(weight_bits=8).quant_type) == "uint8b128"
    assert str(wna16(weight_bits=8, symmetric=False).quant_type) == "uint8"
    assert (wna16().pack_factor, wna16(weight_bits=8).pack_factor) == (8, 4)
    orders = {"static": "weight", "weight": "weight", "dynamic": "group", True: "group"}
    for given, kept in {**orders, "group": "group", None: None, False: None}.items():
        assert wna16(actorder=given).actorder == kept


REFUSED_ARGUMENTS = {
    "bits": (wna16, {"weight_bits": 3}, "weight_bits: found 3, accepted 4 or 8"),
    "group": (wna16, {"group_size": -2}, "group_size: found -2"),
    "order": (wna16, {"actorder": "random"}, "actorder: found 'random'"),
    "order-channel": (wna16, {"actorder": "group", "group_size": -1}, "actorder: found 'group'"),
    "w8-bits": (CompressedTensorsW8A8Int8Scheme, {"weight_bits": 4}, "weight_bits: found 4"),
    "w8-weights": (
        CompressedTensorsW8A8Int8Scheme,
        {"weight_bits": 8, "weight_strategy": "group"},
        "weight_strategy: found 'group'",
    ),
    "w8-inputs": (
        CompressedTensorsW8A8Int8Scheme,
        {"weight_bits": 8, "input_strategy": "tensor"},
        "found 'tensor' and True",
    ),
}


@pytest.mark.parametrize("case", REFUSED_ARGUMENTS)
def test_refused_arguments(case):
    make, how, message = REFUSED_ARGUMENTS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**how)


def test_parameters_are_the_checkpoints_tensors():
    def forms(layer):
        return {name: (p.dtype, tuple(p.shape)) for name, p in layer.named_parameters()}

    layer = bare(wna16(group_size=20, symmetric=False, actorder="group"), n=17, k=100)
    assert forms(layer) == {
        "weight_packed": (torch.int32, (17, 13)),
        "weight_scale": (BF16, (17, 5)),
        "weight_shape": (torch.int64, (2,)),
        "weight_zero_point": (torch.int32, (3, 5)),
        "weight_g_idx": (torch.int32, (100,)),
    }
    assert sorted(forms(bare(wna16(actorder="weight")))) == [
        "weight_packed",
        "weight_scale",
        "weight_shape",
    ]
    static = CompressedTensorsW8A8Int8Scheme(
        weight_bits=8, input_strategy="tensor", input_dynamic=False, input_symmetric=False
    )
    assert forms(bare(static, n=17, k=33)) == {
        "weight": (torch.int8, (17, 33)),
        "weight_scale": (BF16, (17, 1)),
        "input_scale": (BF16, (1,)),
        "input_zero_point": (torch.int8, (1,)),
    }
    dynamic = CompressedTensorsW8A8Int8Scheme(weight_bits=8)
    assert sorted(forms(bare(dynamic))) == ["weight", "weight_scale"]


def test_extra_attributes_go_to_every_parameter():
    def loader():
        return None

    layer = bare(wna16(symmetric=False), weight_loader=loader)
    assert all(p.weight_loader is loader for p in layer.parameters())


def test_group_size_that_does_not_divide():
    with pytest.raises(
        ValueError, match=r"layer 'm\.a': group_size: found 32, .* of the 65 inputs"
    ):
        bare(wna16(), k=65)
    with pytest.raises(ValueError, match=r"layer 'm\.a': params_dtype: found torch\.int8"):
        bare(wna16(), dtype=torch.int8)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_weight_only_on_a_bare_module(library, numbers, bits, symmetric):
    how = {"bits": bits, "group_size": 32, "symmetric": symmetric}
    tensors = library.compress(torch.randn(24, 64).to(BF16), **how)
    scheme = wna16(weight_bits=bits, symmetric=symmetric)
    layer = bare(scheme)
    layer.kernel_name = "torch_w4a16"
    fill(layer, tensors)
    scheme.process_weights_after_loading(layer)
    x, bias = torch.randn(5, 64).to(BF16), torch.randn(24).to(BF16)
    weight = library.decompress(tensors, **how)
    assert torch.equal(scheme.apply(layer, x, bias), torch.nn.functional.linear(x, weight, bias))
    assert str(layer.kernel_choice).startswith("torch_w4a16: asked for by name")
    assert layer.problem.n == 24
    assert not any(name in layer._parameters for name in ("weight_shape", "weight_g_idx"))


def test_legacy_zero_points_put_in_by_hand(library):
    tensors = library.compress(torch.randn(24, 64).to(BF16), group_size=32, symmetric=False)
    scheme, outputs = wna16(symmetric=False), []
    x = torch.randn(2, 64).to(BF16)
    for legacy in (False, True):
        layer = bare(scheme)
        fill(layer, {name: t for name, t in tensors.items() if name != "weight_zero_point"})
        zero = tensors["weight_zero_point"]
        if legacy:
            shifts = 4 * torch.arange(8)
            raw = (zero[:, None, :] >> shifts[None, :, None]) & 15
            zero = (raw.reshape(-1, 2)[:24] - 8).to(torch.int8)
        layer.weight_zero_point = torch.nn.Parameter(zero, requires_grad=False)
        scheme.process_weights_after_loading(layer)
        outputs.append(scheme.apply(layer, x))
    assert torch.equal(*outputs)


def test_refused_contents(library):
    tensors = library.compress(torch.randn(24, 64).to(BF16), group_size=32)
    scheme = wna16()
    layer = bare(scheme)
    fill(layer, {**tensors, "weight_shape": torch.tensor([24, 63])})
    with pytest.raises(ValueError, match=r"'m\.a': weight_shape: found values \[24, 63\]"):
        scheme.process_weights_after_loading(layer)
    assert layer.kernel_choice is None  # still as it was loaded

    fill(layer, tensors)
    zeros = torch.nn.Parameter(torch.zeros(24, 2, dtype=torch.int8), requires_grad=False)
    zeros[3, 1] = 1
    layer.weight_zero_point = zeros
    with pytest.raises(ValueError, match=r"'m\.a': weight_zero_point: found zero points other"):
        scheme.process_weights_after_loading(layer)
    zeros[3, 1] = 0
    scheme.process_weights_after_loading(layer)
    assert layer.weight_zero_point is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: 2}, "found groups 0 .. 2, expected 0 .. 1"),
        ({0: -3}, "found groups -3 .. 1, expected 0 .. 1"),
        ({0: 1}, "found group 0 for 31 inputs, expected 32"),
    ],
)
def test_refused_group_numbers(library, change, message):
    tensors = library.compress(torch.randn(24, 64).to(BF16), group_size=32)
    scheme = wna16(actorder="group")
    layer = bare(scheme)
    g_idx = torch.arange(64) // 32
    for at, value in change.items():
        g_idx[at] = value
    fill(layer, {**tensors, "weight_g_idx": g_idx})
    with pytest.raises(ValueError, match=re.escape(f"layer 'm.a': weight_g_idx: {message}")):
        scheme.process_weights_after_loading(layer)


def test_what_the_kernel_refuses_names_the_layer(library, monkeypatch):
    tensors = library.compress(torch.randn(24, 64).to(BF16), group_size=32)
    scheme = wna16()
    layer = bare(scheme)
    fill(layer, tensors)

    def refuse(*_):
        raise ValueError("scale: found up to 1e+09")

    with monkeypatch.context() as patch:
        for kernel in (CpuInt4Pack, TorchW4A16):
            patch.setattr(kernel, "prepare", refuse)
        with pytest.raises(ValueError, match=r"layer 'm\.a': scale: found up to 1e\+09"):
            scheme.process_weights_after_loading(layer)
    assert layer.kernel_choice is None  # still as it was loaded
    scheme.process_weights_after_loading(layer)
    assert layer.kernel_choice is not None


def test_forced_kernel_that_cannot_run():
    scheme = wna16(symmetric=False)
    layer = bare(scheme)
    layer.weight_zero_point.data.zero_()
    layer.kernel_name = "cpu_int4pack"
    with pytest.raises(ValueError, match=r"layer 'm\.a': kernel 'cpu_int4pack' cannot run .*zero"):
        scheme.process_weights_after_loading(layer)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_w8a8_on_a_bare_module(numbers, symmetric, dynamic):
    from pymllm_kernels.per_token_quant_int8 import reference

    scheme = CompressedTensorsW8A8Int8Scheme(
        weight_bits=8,
        input_strategy="token" if dynamic else "tensor",
        input_dynamic=dynamic,
        input_symmetric=symmetric,
    )
    n, k = 17, 33
    layer = bare(scheme, n=n, k=k, dtype=FP32)
    weight, scale = torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n, 1) / 50
    fill(layer, {"weight": weight, "weight_scale": scale})
    given, zero = torch.tensor([0.03]), torch.tensor([5], dtype=torch.int8)
    if not dynamic:
        fill(layer, {"input_scale": given})
        if not symmetric:
            fill(layer, {"input_zero_point": zero})
    memory = layer.weight.data_ptr()
    scheme.process_weights_after_loading(layer)
    assert layer.weight.data_ptr() == memory
    x, bias = torch.randn(4, k), torch.randn(n)
    if dynamic:
        codes = (
            reference.per_token_quant_int8(x)
            if symmetric
            else reference.per_token_quant_int8_asym(x)
        )
        step, offset = codes[1][:, None], 0 if symmetric else codes[2][:, None]
        codes = codes[0]
    else:
        offset = 0 if symmetric else zero.int()
        codes = reference.static_quant_int8(x, given, None if symmetric else offset)
        step = given
    centred = codes.double() - offset
    exact = centred @ weight.double().T * step.double() * scale.double().T + bias.double()
    plain = (centred.float() * step) @ (weight.float() * scale).T + bias
    numbers.assert_close(scheme.apply(layer, x, bias), plain, exact)


@pytest.mark.parametrize("act_order", [False, True])
def test_memory_held_while_converting(library, monkeypatch, act_order):
    """Scales and zero points go to the kernel in its own order, so that it copies nothing."""
    from pymllm_kernels.w4a16 import api

    scheme = wna16(symmetric=False, actorder="group" if act_order else None)
    tensors = library.compress(torch.randn(24, 64).to(BF16), group_size=32, symmetric=False)
    layer = bare(scheme)
    if act_order:
        tensors["weight_g_idx"] = torch.randperm(64) // 32
    fill(layer, tensors)
    scale = layer.weight_scale
    zero = scheme._zero_points(layer)
    prepared = api.prepare(
        layer.weight_packed.data, scale.data, zero, scheme._group_index(layer), bits=4, k=64
    )
    assert prepared.scale.data_ptr() == scale.data_ptr()
    assert prepared.zero.data_ptr() == zero.data_ptr()
