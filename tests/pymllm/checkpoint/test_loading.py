"""Loading checkpoints: against the library's own decompression."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pymllm import load_linears
from pymllm_kernels.common.packing import pack_words, unpack_words

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAME = "model.layers.0.mlp.down_proj"


def random_weight(n, k, dtype=BF16, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype) * 0.1


def scattered(k, group_size, seed=0):
    """A group for each input, every group ``group_size`` times."""
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    return (order // group_size).to(torch.int32)


def raw_zero_points(words, bits, n):
    """uint8 ``[N, G]``, straight from the format's definition."""
    n_words = torch.arange(n) // (32 // bits)
    shifts = bits * (torch.arange(n) % (32 // bits))
    return ((words[n_words].long() >> shifts[:, None]) & ((1 << bits) - 1)).to(torch.uint8)


def one(layers):
    assert list(layers) == [NAME]
    return layers[NAME]


WEIGHT_ONLY = [
    pytest.param(*case, id="-".join(str(part).removeprefix("torch.") for part in case))
    for case in [
        (4, 128, True, BF16, 48, 384),
        (4, 64, True, FP16, 30, 192),
        (4, 32, False, BF16, 30, 96),
        (4, 20, True, FP32, 17, 100),
        (4, 20, False, FP32, 17, 100),
        (4, None, True, BF16, 33, 77),
        (4, None, False, FP16, 33, 77),
        (4, -1, True, FP32, 9, 21),
        (4, -1, False, BF16, 9, 21),
        (8, 128, True, FP16, 24, 256),
        (8, 32, False, BF16, 30, 96),
        (8, 20, False, FP32, 17, 100),
        (8, None, False, BF16, 33, 77),
        (8, -1, True, FP32, 7, 13),
    ]
]


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "dtype", "n", "k"), WEIGHT_ONLY)
def test_weight_only_equals_the_library(
    library, blocks, checkpoint, numbers, bits, group_size, symmetric, dtype, n, k
):
    how = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    tensors = library.compress(random_weight(n, k, dtype), **how)
    tensors["bias"] = torch.randn(n).to(dtype)
    directory = checkpoint(
        {NAME: tensors}, blocks.of(blocks.pack(bits, group_size, symmetric)), shards=3
    )
    layer = one(load_linears(directory, device="cpu", dtype=dtype, kernel="torch_w4a16"))

    weight = library.decompress(tensors, **how)
    assert layer.weight_scale.dtype == dtype
    assert torch.equal(layer.weight_scale, tensors["weight_scale"])
    assert torch.equal(layer.weight_packed, tensors["weight_packed"])
    assert torch.equal(numbers.dequantized(layer), weight)
    if not symmetric:
        raw = raw_zero_points(tensors["weight_zero_point"], bits, n)
        assert torch.equal(layer.weight_zero_point, raw)

    x = torch.randn(5, k).to(dtype)
    exact = x.double() @ weight.double().T + tensors["bias"].double()
    plain = torch.nn.functional.linear(x, weight, tensors["bias"])
    for kernel in (None, "torch_w4a16"):
        found = load_linears(directory, device="cpu", dtype=dtype, kernel=kernel)[NAME](x)
        numbers.assert_close(found, plain, exact)


@pytest.mark.parametrize("n", [1, 7, 8])
def test_zero_points_of_few_outputs(library, blocks, checkpoint, numbers, n):
    # Here the library's own unpacking fails (N <= 8 and several groups), so the codes are checked.
    tensors = library.compress(random_weight(n, 64), group_size=32, symmetric=False)
    directory = checkpoint({NAME: tensors}, blocks.of(blocks.pack(4, 32, False)))
    layer = one(load_linears(directory, device="cpu", kernel="torch_w4a16"))
    raw = raw_zero_points(tensors["weight_zero_point"], 4, n)
    codes = unpack_words(tensors["weight_packed"], 4, 64)
    groups = torch.arange(64) // 32
    expected = (codes.float() - raw.float()[:, groups]) * tensors["weight_scale"].float()[:, groups]
    assert torch.equal(numbers.dequantized(layer), expected.to(BF16))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("n", "k"), [(48, 256), (17, 101)])
def test_w8a8_equals_the_library(library, blocks, checkpoint, numbers, dtype, n, k):
    from pymllm_kernels.per_token_quant_int8.reference import per_token_quant_int8

    tensors = library.compress(random_weight(n, k, dtype), bits=8, int8=True)
    tensors["bias"] = torch.randn(n).to(dtype)
    directory = checkpoint({NAME: tensors}, blocks.of(blocks.int8()), shards=2)
    layer = one(load_linears(directory, device="cpu", dtype=dtype))
    assert torch.equal(layer.weight, tensors["weight"])
    assert torch.equal(layer.weight_scale, tensors["weight_scale"].float().flatten())
    dequantized = layer.weight.to(dtype) * layer.weight_scale.to(dtype)[:, None]
    assert torch.equal(dequantized, library.decompress(tensors, bits=8, int8=True))

    x = torch.randn(6, k).to(dtype)
    x[2] = 0
    codes, scale = per_token_quant_int8(x)
    acc = codes.double() @ tensors["weight"].double().T
    exact = acc * scale.double()[:, None] * tensors["weight_scale"].double().T
    exact = exact + tensors["bias"].double()
    plain = (acc.float() * scale[:, None] * layer.weight_scale + layer.bias.float()).to(dtype)
    numbers.assert_close(layer(x), plain, exact)
    assert torch.equal(layer(x)[2], tensors["bias"])


@pytest.mark.parametrize("shape", ["scalar", "flat"])
def test_w8a8_variants(blocks, checkpoint, shape):
    """Per-tensor weights, static asymmetric inputs, scales without their last dimension."""
    n, k = 12, 40
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    tensor = {"weights": {"strategy": "tensor"}}
    static = {"inputs": {"strategy": "tensor", "dynamic": False, "symmetric": False}}
    lone = torch.tensor(0.02) if shape == "scalar" else torch.tensor([0.02])
    tensors = {
        "weight": weight,
        "weight_scale": lone,
        "input_scale": lone * 2,
        "input_zero_point": torch.tensor([-7], dtype=torch.int8),
    }
    directory = checkpoint({NAME: tensors}, blocks.of(blocks.int8(**tensor, **static)))
    layer = one(load_linears(directory, device="cpu", dtype=FP32))
    x = torch.randn(3, k)
    codes = (torch.round(x / 0.04) - 7).clamp(-128, 127)
    expected = (codes + 7) @ weight.float().T * (0.02 * 0.04)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)

    channel = {"weight": weight, "weight_scale": torch.rand(n)}
    directory = checkpoint({NAME: channel}, blocks.of(blocks.int8()), name="channel")
    assert torch.equal(
        one(load_linears(directory, device="cpu")).weight_scale, channel["weight_scale"]
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_order(library, blocks, checkpoint, numbers, symmetric):
    n, k, g = 30, 96, 32
    tensors = library.compress(random_weight(n, k), group_size=g, symmetric=symmetric)
    plain = library.decompress(tensors, group_size=g, symmetric=symmetric)
    block = blocks.of(blocks.pack(4, g, symmetric, actorder="group"), version="0.15.0")
    g_idx = scattered(k, g)

    directory = checkpoint({NAME: {**tensors, "weight_g_idx": g_idx}}, block, name="scattered")
    layer = one(load_linears(directory, device="cpu", kernel="torch_w4a16"))
    codes = unpack_words(tensors["weight_packed"], 4, k).to(BF16)
    zero = torch.full((n, k // g), 8.0).to(BF16)
    if not symmetric:
        zero = raw_zero_points(tensors["weight_zero_point"], 4, n).to(BF16)
    columns = g_idx.long()
    expected = (codes - zero[:, columns]) * tensors["weight_scale"][:, columns]
    assert torch.equal(numbers.dequantized(layer), expected)
    assert layer.problem.act_order

    unset, partly = torch.full((k,), -1, dtype=torch.int32), g_idx.clone()
    partly[3] = -1
    regular = (torch.arange(k) // g).to(torch.int32)
    for number, values in enumerate((unset, partly, regular)):
        directory = checkpoint({NAME: {**tensors, "weight_g_idx": values}}, block, name=f"{number}")
        layer = one(load_linears(directory, device="cpu", kernel="torch_w4a16"))
        assert torch.equal(numbers.dequantized(layer), plain)
        assert not layer.problem.act_order
        assert layer.weight_group_index is None


def test_group_numbers_left_out_by_old_releases(library, blocks, checkpoint, numbers):
    tensors = library.compress(random_weight(16, 64), group_size=32)
    block = blocks.of(blocks.pack(4, 32, actorder="group"), version="0.11.0")
    layer = one(
        load_linears(checkpoint({NAME: tensors}, block), device="cpu", kernel="torch_w4a16")
    )
    assert torch.equal(numbers.dequantized(layer), library.decompress(tensors, group_size=32))
    newer = blocks.of(blocks.pack(4, 32, actorder="group"), version="0.12.0")
    with pytest.raises(ValueError, match=f"{NAME}.*weight_g_idx: found none"):
        load_linears(checkpoint({NAME: tensors}, newer, name="newer"), device="cpu")


@pytest.mark.parametrize("bits", [4, 8])
def test_legacy_int8_zero_points(library, blocks, checkpoint, bits):
    n, k, g = 30, 96, 32
    how = {"bits": bits, "group_size": g, "symmetric": False}
    tensors = library.compress(random_weight(n, k), **how)
    raw = raw_zero_points(tensors["weight_zero_point"], bits, n)
    signed = (raw.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    block = blocks.of(blocks.pack(bits, g, False), version="0.9.3")
    new = load_linears(checkpoint({NAME: tensors}, block, name="new"), device="cpu")
    tensors["weight_zero_point"] = signed
    old = load_linears(checkpoint({NAME: tensors}, block, name="old"), device="cpu")
    assert torch.equal(old[NAME].weight_zero_point, new[NAME].weight_zero_point)
    if bits == 4:
        tensors["weight_zero_point"] = signed + 8
        directory = checkpoint({NAME: tensors}, block, name="beyond")
        with pytest.raises(
            ValueError, match=r"weight_zero_point: found int8 values outside -8 \.\. 7"
        ):
            load_linears(directory, device="cpu")


@pytest.mark.parametrize(
    ("version", "accepted"),
    [(None, True), ("0.6.0", True), ("0.9.2", True), ("0.9.3", False), ("0.14.1.a20260325", False)],
)
def test_zero_points_left_out(library, blocks, checkpoint, numbers, version, accepted):
    tensors = library.compress(random_weight(16, 64), group_size=32)
    block = blocks.of(blocks.pack(4, 32, symmetric=False), version=version)
    directory = checkpoint({NAME: tensors}, block)
    if accepted:
        layer = one(load_linears(directory, device="cpu"))
        assert torch.equal(numbers.dequantized(layer), library.decompress(tensors, group_size=32))
    else:
        with pytest.raises(ValueError, match=f"{NAME}.*weight_zero_point: found none"):
            load_linears(directory, device="cpu")


@pytest.mark.parametrize("packed", [True, False])
def test_zero_points_of_a_symmetric_layer(library, blocks, checkpoint, packed):
    n, groups = 30, 2
    tensors = library.compress(random_weight(n, 64), group_size=32)
    zero = torch.zeros(n, groups, dtype=torch.int8)
    if packed:
        zero = pack_words(torch.full((groups, n), 8, dtype=torch.uint8), 4).T.contiguous()
    block = blocks.of(blocks.pack(4, 32))
    with_zero = {**tensors, "weight_zero_point": zero}
    layer = one(load_linears(checkpoint({NAME: with_zero}, block), device="cpu"))
    assert layer.weight_zero_point is None
    zero[1, 1] += 1
    with_zero["weight_zero_point"] = zero
    with pytest.raises(ValueError, match=f"{NAME}.*weight_zero_point: found zero points other"):
        load_linears(checkpoint({NAME: with_zero}, block, name="other"), device="cpu")


def test_group_numbers_without_activation_order(library, blocks, checkpoint):
    tensors = library.compress(random_weight(16, 64), group_size=32)
    block = blocks.of(blocks.pack(4, 32, actorder="weight"))
    regular = (torch.arange(64) // 32).to(torch.int32)
    for number, g_idx in enumerate((regular, torch.full_like(regular, -1))):
        given = {NAME: {**tensors, "weight_g_idx": g_idx}}
        load_linears(checkpoint(given, block, name=str(number)), device="cpu")
    given = {NAME: {**tensors, "weight_g_idx": scattered(64, 32)}}
    with pytest.raises(ValueError, match=f"{NAME}.*weight_g_idx: found groups in activation order"):
        load_linears(checkpoint(given, block), device="cpu")


def test_mixed_schemes_names_progress_and_kernel(library, blocks, checkpoint):
    four, eight, plain = "model.layers.10.a", "model.layers.2.b", "lm_head"
    block = blocks.of(blocks.pack(4, 32, targets=[four]), blocks.int8([eight]), ignore=[plain])
    layers = {
        four: library.compress(random_weight(16, 64), group_size=32),
        eight: library.compress(random_weight(16, 64), bits=8, int8=True),
        plain: {"weight": random_weight(16, 64)},
    }
    directory = checkpoint(layers, block)
    calls = []
    loaded = load_linears(directory, device="cpu", progress=lambda *call: calls.append(call))
    assert list(loaded) == [eight, four]
    assert calls == [(1, 2, eight), (2, 2, four)]
    assert (loaded[four].problem.scheme, loaded[eight].problem.scheme) == ("w4a16", "w8a8_int8")
    assert list(load_linears(directory, device="cpu", names=[four])) == [four]
    forced = load_linears(directory, device="cpu", kernel="torch_w8a8_int8")
    assert forced[eight].kernel_choice.kernel.name == "torch_w8a8_int8"
    assert forced[four].kernel_choice.kernel.name == "cpu_int4pack"
    with pytest.raises(ValueError, match=r"names: found 'nothing'"):
        load_linears(directory, device="cpu", names=["nothing"])
    with pytest.raises(ValueError, match=r"names: found 'lm_head', which is not a quantized"):
        load_linears(directory, device="cpu", names=["lm_head"])
    with pytest.raises(ValueError, match=r"kernel: found 'fast', accepted \["):
        load_linears(directory, device="cpu", kernel="fast")
    with pytest.raises(ValueError, match=f"{four}.*triton_w4a16.*needs a GPU"):
        load_linears(directory, device="cpu", kernel="triton_w4a16")


def test_claimed_but_stored_plain(library, blocks, checkpoint):
    layers = {
        NAME: library.compress(random_weight(16, 64), group_size=32),
        "model.layers.0.mlp.gate": {"weight": random_weight(4, 64)},
        "model.norm": {"weight": torch.ones(64)},
        "model.embed_tokens": {"weight": random_weight(10, 64)},
    }
    directory = checkpoint(layers, blocks.of(blocks.pack(4, 32)))
    with pytest.warns(UserWarning, match=r"without quantization: model\.layers\.0\.mlp\.gate$"):
        assert list(load_linears(directory, device="cpu")) == [NAME]
    with pytest.raises(ValueError, match=r"without quantization: model\.layers\.0\.mlp\.gate$"):
        load_linears(directory, device="cpu", strict=True)


def test_kv_cache_scales_are_tolerated(library, blocks, checkpoint):
    tensors = library.compress(random_weight(16, 64), group_size=32)
    attention = "model.layers.0.self_attn"
    layers = {
        f"{attention}.k_proj": {**tensors, "output_scale": torch.ones(1)},
        attention: {"k_scale": torch.ones(1), "v_scale": torch.ones(1)},
    }
    loaded = load_linears(checkpoint(layers, blocks.of(blocks.pack(4, 32))), device="cpu")
    assert list(loaded) == [f"{attention}.k_proj"]


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        ({"torch_dtype": "float16"}, None, FP16),
        ({"torch_dtype": None, "text_config": {"dtype": "float32"}}, None, FP32),
        ({"torch_dtype": None}, None, BF16),
        ({"torch_dtype": "float16"}, "bfloat16", BF16),
    ],
)
def test_activation_dtype(library, blocks, checkpoint, config, given, expected):
    tensors = library.compress(random_weight(16, 64), group_size=32)
    directory = checkpoint({NAME: tensors}, blocks.of(blocks.pack(4, 32)), config=config)
    layer = one(load_linears(directory, device="cpu", dtype=given))
    assert layer.problem.act_dtype == expected
    assert layer.weight_scale.dtype == BF16  # the checkpoint's, never rounded


def test_a_model_saved_by_the_library(library, tmp_path, numbers):
    """Names, config and tensors all from the library, through its model-level functions."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = torch.nn.ModuleDict({"a": torch.nn.Linear(96, 30), "b": torch.nn.Linear(64, 16)}).to(
        BF16
    )
    apply_quantization_config(
        model,
        QuantizationConfig(
            config_groups={
                "group_0": {
                    "targets": ["re:a$"],
                    "weights": {"num_bits": 4, "symmetric": False, "group_size": 32},
                },
                "group_1": {
                    "targets": ["b"],
                    "weights": {"num_bits": 8, "strategy": "channel"},
                    "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
                },
            }
        ),
    )
    for module in model.values():
        args = module.quantization_scheme.weights
        grouped = module.weight.unflatten(1, (-1, args.group_size or module.in_features))
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        module.weight_scale.data = scale
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    compressor.update_config(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    layers = load_linears(tmp_path, device="cpu", dtype=BF16)
    assert sorted(layers) == ["a", "b"]
    compressor.decompress_model(model)
    assert torch.equal(numbers.dequantized(layers["a"]), model["a"].weight)
    assert torch.equal(layers["b"].weight, stored["b.weight"])
    assert torch.equal(layers["a"].bias, model["a"].bias)


def test_import_is_light():
    code = (
        "import sys, pymllm; assert pymllm.__version__ == '0.1.0'; "
        "loaded = {'triton', 'pymllm_kernels', 'pymllm.layers'} & set(sys.modules); "
        "assert not loaded, loaded; pymllm.load_linears, pymllm.save_linears; "
        "assert 'triton' not in sys.modules; import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
