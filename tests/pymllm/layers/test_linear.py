"""Linear layers: loading rules, merged layers, calls, copies, devices and compilation."""

import copy
import io
import pickle
import re

import pytest
import torch
import torch._dynamo.testing

from pymllm.layers import (
    ColumnParallelLinear,
    Linear,
    MergedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from pymllm.quantization.methods import CompressedTensorsConfig

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QKV = "model.layers.0.self_attn.qkv_proj"


def quantized(library, blocks, kind, n=32, k=96, dtype=BF16, bias=True):
    """A processed layer of each kind, and the floating weight it stands for."""
    weight = torch.randn(n, k).to(dtype)
    if kind == "w8a8":
        how, group = {"bits": 8, "int8": True}, blocks.int8()
    else:
        how = {"bits": 8 if kind == "int8" else 4, "group_size": 32, "symmetric": kind != "asym"}
        group = blocks.pack(how["bits"], 32, how["symmetric"])
    tensors = library.compress(weight, **how)
    config = CompressedTensorsConfig.from_config(blocks.of(group))
    layer = Linear(k, n, bias, params_dtype=dtype, device="cpu", quant_config=config, prefix="m.a")
    for name, tensor in tensors.items():
        layer.load_tensor(name, tensor)
    if bias:
        layer.load_tensor("bias", torch.randn(n).to(dtype))
    assert layer.missing_tensors() == []
    layer.quant_method.process_weights_after_loading(layer)
    return layer, library.decompress(tensors, **how)


KINDS = ["sym", "asym", "int8", "w8a8"]


def test_unquantized():
    layer = Linear(6, 4, params_dtype=FP32, device="cpu", prefix="m.a")
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)
    weight, bias = torch.randn(4, 6), torch.randn(4)
    layer.load_tensor("weight", weight.double().float())
    layer.load_tensor("bias", bias)
    x = torch.randn(2, 3, 6)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight, bias))
    with pytest.raises(
        ValueError, match=r"'m\.a': x: found torch\.float16 .* expected torch\.float32"
    ):
        layer(x.half())
    layer.to(BF16)
    assert layer.weight.dtype == BF16


def test_sizes_and_arguments():
    layer = Linear(6, 4, False, device="cpu")
    assert (layer.in_features, layer.out_features) == (6, 4)
    assert (layer.input_size_per_partition, layer.output_partition_sizes) == (6, [4])
    assert layer.bias is None
    assert layer.params_dtype == torch.get_default_dtype()
    assert MergedLinear(6, [4, 2, 2], device="cpu").out_features == 8
    for cls in (ColumnParallelLinear, RowParallelLinear):
        assert cls(6, 4, device="cpu", prefix="m.a").tp_size == 1
        with pytest.raises(ValueError, match=r"'m\.a': found tp_size 2 .* not yet"):
            cls(6, 4, tp_size=2, tp_rank=1, prefix="m.a")
    with pytest.raises(ValueError, match="in_features: found 0"):
        Linear(0, 4)
    with pytest.raises(ValueError, match="output_sizes: found 2"):
        MergedLinear(6, [4, 2], prefix="m.qkv_proj")
    with pytest.raises(ValueError, match="quant_config and quant_method"):
        Linear(6, 4, quant_config=object(), quant_method=UnquantizedLinearMethod())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_shapes_and_strides(library, blocks, numbers, kind, dtype):
    layer, weight = quantized(library, blocks, kind, dtype=dtype)
    x = torch.randn(4, 5, 96).to(dtype)
    y = layer(x)
    assert (y.shape, y.dtype) == ((4, 5, 32), dtype)
    exact = x.double() @ weight.double().T + layer.bias.double()
    assert (y - exact).abs().max() < 0.05 * exact.abs().max()
    for view in (
        torch.cat([x, x], -1)[..., :96],
        torch.cat([x, x], -1)[..., 96:],
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        if layer.kernel_choice.kernel.name == "torch_w4a16":  # torch's own GEMM follows strides
            numbers.assert_close(layer(view), y, exact)
        else:
            assert torch.equal(layer(view), y)
    repeated = layer(x[:1, :1].expand(3, 2, 96))
    assert torch.equal(repeated, repeated[:1, :1].expand(3, 2, 32))
    numbers.assert_close(repeated[0, 0], y[0, 0], exact[0, 0])
    assert layer(x[:0]).shape == (0, 5, 32)
    assert layer(x[0, :0]).shape == (0, 32)
    assert layer(x[0, :1]).shape == (1, 32)
    assert layer(x[0, 0]).shape == (32,)
    numbers.assert_close(layer(x[0, 0]), y[0, 0], exact[0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_bias(library, blocks, kind):
    layer, _ = quantized(library, blocks, kind, dtype=FP32)
    x = torch.randn(3, 96)
    with_bias = layer(x)
    bias, layer.bias = layer.bias, None
    torch.testing.assert_close(with_bias, layer(x) + bias)
    # Some tools put something in a parameter's place that computes it.
    layer.bias = bias
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", torch.nn.Identity())
    assert "bias" not in layer._parameters
    assert torch.equal(layer(x), with_bias)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_input(library, blocks, kind):
    layer, _ = quantized(library, blocks, kind)
    expected = (
        r"layer 'm\.a': x: found torch\.\w+ \[2, \d+\], expected torch\.bfloat16.* \[\.\.\., 96\]"
    )
    for x in (
        torch.zeros(2, 95, dtype=BF16),
        torch.zeros(2, 96).double(),
        torch.zeros(2, 96).int(),
    ):
        with pytest.raises(ValueError, match=expected):
            layer(x)
    with pytest.raises(ValueError, match=r"x: found torch\.bfloat16 \[\]"):
        layer(torch.tensor(1.0, dtype=BF16))


def test_another_dtype_of_x_runs_or_is_refused(library, blocks):
    layer, weight = quantized(library, blocks, "asym", bias=False)
    x = torch.randn(3, 96)
    assert layer.kernel_choice.kernel.name == "torch_w4a16"
    assert torch.equal(layer(x), x @ weight.float().T)
    layer, _ = quantized(library, blocks, "sym")
    assert layer.kernel_choice.kernel.name == "cpu_int4pack"
    with pytest.raises(ValueError, match=r"found torch\.float32 .*\(cpu_int4pack "):
        layer(x)


def test_not_processed(library, blocks):
    config = CompressedTensorsConfig.from_config(blocks.of(blocks.pack(4, 32)))
    layer = Linear(96, 32, quant_config=config, params_dtype=BF16, device="cpu", prefix="m.a")
    with pytest.raises(ValueError, match=r"'m\.a': found weights that are not processed"):
        layer(torch.zeros(1, 96, dtype=BF16))
    meta = Linear(96, 32, quant_config=config, params_dtype=BF16, device="meta", prefix="m.a")
    with pytest.raises(ValueError, match=r"'m\.a': weight_packed: found it on the meta device"):
        meta.quant_method.process_weights_after_loading(meta)


@pytest.mark.parametrize("kind", KINDS)
def test_processing_twice_and_loading_again(library, blocks, kind):
    layer, _ = quantized(library, blocks, kind)
    before = {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}
    layer.quant_method.process_weights_after_loading(layer)
    assert before == {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"weight_scale: found weights already processed"):
        layer.load_tensor("weight_scale", torch.zeros(32, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_copies(library, blocks, kind):
    layer, _ = quantized(library, blocks, kind)
    x = torch.randn(3, 96).to(BF16)
    y = layer(x)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(twin(x), y)
        assert twin.kernel_choice.kernel.name == layer.kernel_choice.kernel.name
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other, _ = quantized(library, blocks, kind)
    assert not torch.equal(other(x), y)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), y)
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_through_safetensors(library, blocks, kind, tmp_path):
    from safetensors.torch import load_file, save_file

    layer, _ = quantized(library, blocks, kind)
    other, _ = quantized(library, blocks, kind)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(3, 96).to(BF16)
    assert torch.equal(other(x), layer(x))


def test_pickle_before_processing(blocks):
    config = CompressedTensorsConfig.from_config(blocks.of(blocks.pack(4, 32)))
    layer = Linear(96, 32, quant_config=config, params_dtype=BF16, device="cpu", prefix="m.a")
    twin = pickle.loads(pickle.dumps(layer))
    twin.load_tensor("weight_scale", torch.ones(32, 3))
    assert bool((twin.weight_scale == 1).all())


@pytest.mark.parametrize("kind", KINDS)
def test_casting_leaves_quantized_tensors_alone(library, blocks, kind):
    layer, _ = quantized(library, blocks, kind)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for cast in (layer.half, layer.double, layer.float, lambda: layer.to("cpu", BF16)):
        cast()
        for name, tensor in layer.state_dict().items():
            if name != "bias":
                assert tensor.dtype == stored[name].dtype
                assert torch.equal(tensor, stored[name])
    assert layer.bias.dtype == BF16
    assert layer.to("meta").weight_scale.is_meta


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_moving_to_another_device(library, blocks, numbers, kind):
    layer, weight = quantized(library, blocks, kind)
    x = torch.randn(3, 96).to(BF16)
    y = layer(x)
    if layer.kernel_choice.kernel.name == "cpu_int4pack":
        with pytest.raises(ValueError, match=r"'m\.a'.*load the checkpoint with device='cuda"):
            layer.to("cuda")
        assert torch.equal(layer(x), y)
        return
    layer.to("cuda")
    assert layer.kernel_choice.kernel.name.startswith("triton")
    assert layer.problem.device.type == "cuda"
    moved = layer(x.cuda()).cpu()
    if kind == "w8a8":  # the same integers, the bias by one fma there and after a rounding here
        torch.testing.assert_close(moved, y, rtol=2**-8, atol=1e-6)
    else:
        exact = x.double() @ weight.double().T + layer.bias.detach().cpu().double()
        numbers.assert_close(moved, y, exact)


def test_moving_where_the_kernel_does_not_run(library, blocks, monkeypatch):
    """The check of a move, with a planned GPU in place of a real one."""
    from pymllm_kernels import planned_device

    gpu = planned_device("9.0")
    monkeypatch.setattr("pymllm.quantization.schemes.common.device_facts", lambda device: gpu)
    monkeypatch.setattr("pymllm.quantization.schemes.wna16.device_facts", lambda device: gpu)
    device = torch.device("cuda")
    layer, _ = quantized(library, blocks, "asym")
    for kind, kernel in (("asym", "gluon_hopper_w4a16"), ("w8a8", "gluon_hopper_w8a8_int8")):
        layer, _ = quantized(library, blocks, kind)
        choice = layer.quant_method.scheme.choice_after_move(layer, device)
        assert choice.kernel.name == kernel


@pytest.mark.parametrize("kind", ["sym", "asym", "w8a8"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(library, blocks, kind, backend):
    layer, _ = quantized(library, blocks, kind)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    compiled(torch.randn(3, 96).to(BF16))
    compilations = counter.frame_count  # aot_eager may trace the first call twice
    for m in (3, 2, 17, 64, 1000):
        x = torch.randn(m, 96).to(BF16)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == compilations


# Merged layers


def merged(blocks, group, sizes, k, prefix=QKV, **how):
    config = CompressedTensorsConfig.from_config(blocks.of(group))
    how = {"params_dtype": BF16, "device": "cpu", "bias": False, **how}
    return MergedLinear(k, sizes, quant_config=config, prefix=prefix, **how)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "ids", [(0, 1, 2), ("q_proj", "k_proj", "v_proj"), ("v", "q", "k")], ids=str
)
def test_merged_asymmetric_with_odd_shards(library, blocks, numbers, bits, ids):
    sizes, k, g = [30, 9, 3], 64, 32
    how = {"bits": bits, "group_size": g, "symmetric": False}
    shards = [library.compress(torch.randn(n, k).to(BF16), **how) for n in sizes]
    layer = merged(blocks, blocks.pack(bits, g, False), sizes, k)
    layer.kernel_name = "torch_w4a16"
    for shard_id in ids:
        index = layer.shard_index(shard_id)
        for name, tensor in shards[index].items():
            layer.load_tensor(name, tensor, shard_id)
    layer.quant_method.process_weights_after_loading(layer)
    alone = []
    for n, tensors in zip(sizes, shards, strict=True):
        single = Linear(
            k,
            n,
            False,
            params_dtype=BF16,
            device="cpu",
            quant_config=layer.quant_method.quant_config,
        )
        for name, tensor in tensors.items():
            single.load_tensor(name, tensor)
        single.quant_method.process_weights_after_loading(single)
        alone.append(single)
    expected = torch.cat([numbers.dequantized(single) for single in alone])
    assert torch.equal(numbers.dequantized(layer), expected)
    if bits == 8:  # with 4 bits the library cannot unpack the zero points of 3 outputs
        assert torch.equal(expected, torch.cat([library.decompress(t, **how) for t in shards]))


def test_merged_loaded_whole(library, blocks, numbers):
    """A model born fused stores one tensor for all shards."""
    sizes, k = [30, 9, 4], 64
    how = {"group_size": 32, "symmetric": False}
    tensors = library.compress(torch.randn(43, k).to(BF16), **how)
    layer = merged(blocks, blocks.pack(4, 32, False), sizes, k)
    for name, tensor in tensors.items():
        layer.load_tensor(name, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(numbers.dequantized(layer), library.decompress(tensors, **how))


def test_merged_scales_of_several_dtypes_are_not_rounded(library, blocks, numbers):
    sizes, k = [16, 16], 64
    shards = [library.compress(torch.randn(16, k).to(d), group_size=32) for d in (BF16, FP16)]
    group = blocks.pack(4, 32)
    layer = merged(blocks, group, sizes, k, "m.gate_up_proj", params_dtype=FP32)
    for index, tensors in enumerate(shards):
        for name, tensor in tensors.items():
            layer.load_tensor(name, tensor, index)
    assert layer.weight_scale.dtype == FP32
    for index, tensors in enumerate(shards):
        rows = layer.weight_scale[16 * index : 16 * index + 16]
        assert torch.equal(rows, tensors["weight_scale"].float())
    single = Linear(
        k, 16, False, params_dtype=BF16, device="cpu", quant_config=layer.quant_method.quant_config
    )
    single.load_tensor("weight_scale", shards[1]["weight_scale"])
    assert single.weight_scale.dtype == FP16


def test_merged_group_numbers(library, blocks):
    sizes, k, g = [16, 8], 64, 32
    order = torch.randperm(k)
    g_idx = (order // g).to(torch.int32)
    group = blocks.pack(4, g, actorder="group")

    def loaded(first, second):
        layer = merged(blocks, group, sizes, k, "m.gate_up_proj")
        for index, values in enumerate((first, second)):
            tensors = library.compress(torch.randn(sizes[index], k).to(BF16), group_size=g)
            for name, tensor in {**tensors, "weight_g_idx": values}.items():
                layer.load_tensor(name, tensor, index)
        layer.quant_method.process_weights_after_loading(layer)
        return layer

    unset = torch.full_like(g_idx, -1)
    regular = (torch.arange(k) // g).to(torch.int32)
    assert loaded(g_idx, g_idx.clone()).problem.act_order
    assert not loaded(unset, regular).problem.act_order
    for other in (g_idx.flip(0), unset):
        with pytest.raises(ValueError, match=r"'m\.gate_up_proj': weight_g_idx: found values that"):
            loaded(g_idx, other)


def test_merged_w8a8(library, blocks):
    sizes, k = [30, 9], 64
    shards = [library.compress(torch.randn(n, k).to(BF16), bits=8, int8=True) for n in sizes]
    layer = merged(blocks, blocks.int8(), sizes, k, "m.gate_up_proj")
    for index, tensors in enumerate(shards):
        for name, tensor in tensors.items():
            layer.load_tensor(name, tensor, index)
    memory = layer.weight.data_ptr()
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.weight.data_ptr() == memory
    assert torch.equal(layer.weight, torch.cat([t["weight"] for t in shards]))

    tensor_wise = blocks.int8(weights={"strategy": "tensor"})
    layer = merged(blocks, tensor_wise, sizes, k, "m.gate_up_proj")
    for index in (1, 0):
        layer.load_tensor("weight", shards[index]["weight"], index)
        layer.load_tensor("weight_scale", torch.tensor([index + 1.0]), index)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.weight_scale.tolist() == [1.0] * 30 + [2.0] * 9


def test_merged_static_inputs_must_agree(blocks):
    group = blocks.int8(inputs={"strategy": "tensor", "dynamic": False})
    layer = merged(blocks, group, [8, 8], 16, "m.gate_up_proj")
    layer.load_tensor("input_scale", torch.tensor([0.5]), 0)
    layer.load_tensor("input_scale", torch.tensor(0.5), 1)
    with pytest.raises(
        ValueError, match=r"input_scale: found values that differ from another shard"
    ):
        layer.load_tensor("input_scale", torch.tensor([0.25]), 1)


REFUSED = {
    "shard": ("weight_packed", torch.zeros(9, 8).int(), 3, "shard_id: found 3, accepted [0, 1, 2,"),
    "name": ("weight_packed", torch.zeros(9, 8).int(), "o_proj", "shard_id: found 'o_proj'"),
    "rows": (
        "weight_packed",
        torch.zeros(8, 8).int(),
        1,
        "weight_packed: found int32 [8, 8], expected int32 [9, 8]",
    ),
    "dtype": ("weight_packed", torch.zeros(9, 8), 1, "weight_packed: found float32 [9, 8]"),
    "stored": (
        "weight_shape",
        torch.tensor([8, 64]),
        1,
        "weight_shape: found values [8, 64], expected [9, 64]",
    ),
    "zeros": (
        "weight_zero_point",
        torch.zeros(1, 2).int(),
        1,
        "weight_zero_point: found int32 [1, 2], expected int32 [2, 2], or int8 [9, 2]",
    ),
    "extra": ("qweight", torch.zeros(1), 1, "qweight: found an unexpected tensor float32 [1]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_loads(blocks, case):
    name, tensor, shard_id, message = REFUSED[case]
    layer = merged(blocks, blocks.pack(4, 32, False), [30, 9, 3], 64)
    with pytest.raises(ValueError, match=re.escape(f"layer '{QKV}': {message}")):
        layer.load_tensor(name, tensor, shard_id)


def test_loading_off_the_meta_device(library, blocks):
    tensors = library.compress(torch.randn(30, 64).to(FP16), group_size=32, symmetric=False)
    layer = merged(blocks, blocks.pack(4, 32, False), [30], 64, "m.a", device="meta")
    for name, tensor in tensors.items():
        layer.load_tensor(name, tensor)
    assert layer.missing_tensors() == []
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer.weight_scale, tensors["weight_scale"])


def test_attributes_of_parameters(blocks):
    layer = merged(blocks, blocks.pack(4, 32, False), [30, 9], 64, "m.gate_up_proj", bias=True)
    packed, zero = layer.weight_packed, layer.weight_zero_point
    assert (packed.output_dim, packed.input_dim) == (0, 1)
    assert (packed.packed_dim, packed.packed_factor, zero.packed_dim) == (1, 8, 0)
    assert zero.shape == (4 + 2, 2)
    assert all(p.weight_loader == layer.weight_loader for p in layer.parameters())
