"""Writing checkpoints: read back by the compressed-tensors library and by ourselves."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pymllm import load_linears, save_linears

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def stored_of(directory, name):
    tensors = load_file(directory / "model.safetensors")
    prefix = f"{name}."
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("scheme", "bits"), [("W4A16", 4), ("W8A16", 8)])
@pytest.mark.parametrize(("group_size", "n", "k"), [(32, 30, 96), (20, 17, 100), (None, 33, 77)])
def test_weight_only_as_the_library_writes_and_reads_it(
    library, numbers, tmp_path, dtype, symmetric, scheme, bits, group_size, n, k
):
    weight = torch.randn(n, k).to(dtype)
    weight[3] = 0
    weight[4] = weight[4].abs() + 1
    weight[5] = -weight[5].abs() - 1
    save_linears(
        {"m.a": weight}, tmp_path, scheme=scheme, group_size=group_size, symmetric=symmetric
    )
    how = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    ours, theirs = stored_of(tmp_path, "m.a"), library.compress(weight, **how)
    assert sorted(ours) == sorted(theirs)
    for suffix, tensor in theirs.items():
        assert ours[suffix].dtype == tensor.dtype
        assert torch.equal(ours[suffix], tensor), suffix
    layer = load_linears(tmp_path, device="cpu", kernel="torch_w4a16")["m.a"]
    assert torch.equal(numbers.dequantized(layer), library.decompress(ours, **how))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_w8a8_as_the_library_writes_it(library, tmp_path, dtype):
    weight = torch.randn(33, 77).to(dtype)
    save_linears({"m.a": weight}, tmp_path, scheme="W8A8")
    theirs = library.compress(weight, bits=8, int8=True)
    ours = stored_of(tmp_path, "m.a")
    assert sorted(ours) == ["weight", "weight_scale"]
    assert torch.equal(ours["weight"], theirs["weight"])
    assert torch.equal(ours["weight_scale"], theirs["weight_scale"])


def test_the_config_is_the_librarys(library, tmp_path):
    """The library parses the block, and matches its targets to the schemes we asked for."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 16) for name in "abc"})
    schemes = {"a": "W4A16", "b": "W8A8", "c": "W4A16"}
    save_linears(dict(model.items()), tmp_path, scheme=schemes, group_size=32, symmetric=False)
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert block["format"] == "mixed-precision"
    apply_quantization_config(model, QuantizationConfig.model_validate(block))
    assert model["a"].quantization_scheme.weights.num_bits == 4
    assert model["a"].quantization_scheme.weights.group_size == 32
    assert not model["c"].quantization_scheme.weights.symmetric
    assert model["b"].quantization_scheme.input_activations.num_bits == 8
    loaded = load_linears(tmp_path, device="cpu")
    assert [loaded[name].problem.scheme for name in "abc"] == ["w4a16", "w8a8_int8", "w4a16"]
    x = torch.randn(4, 64)
    for name, layer in loaded.items():
        exact = model[name].weight @ x.T
        error = (layer(x) - layer.bias - exact.T).abs().max() / exact.abs().max()
        assert error < (0.02 if schemes[name] == "W8A8" else 0.2)
        assert torch.equal(layer.bias, model[name].bias)


def test_sources_and_dtype(tmp_path):
    linear = torch.nn.Linear(32, 8)
    sources = {"a": linear, "b": (linear.weight, None), "c": linear.weight.detach()}
    save_linears(sources, tmp_path, group_size=-1, dtype=BF16)
    assert stored_of(tmp_path, "a")["bias"].dtype == BF16
    assert stored_of(tmp_path, "b")["weight_scale"].dtype == BF16
    packed = [stored_of(tmp_path, name)["weight_packed"] for name in "abc"]
    assert torch.equal(packed[0], packed[1])
    assert torch.equal(packed[0], packed[2])
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


W = torch.randn(8, 48)
REFUSALS = {
    "no-layer": ({}, {}, "layers: found none"),
    "name": ({"re:a": W}, {}, "layers: found the name 're:a'"),
    "source": ({"a": "text"}, {}, "layer 'a': found str"),
    "vector": ({"a": W[0]}, {}, "layer 'a': weight: found torch.float32 [48]"),
    "integer": ({"a": W.int()}, {}, "layer 'a': weight: found torch.int32"),
    "infinite": ({"a": W / 0}, {}, "layer 'a': weight: found NaN or infinity"),
    "bias": ({"a": (W, torch.ones(9))}, {}, "layer 'a': bias: found torch.float32 [9]"),
    "divisor": ({"a": W}, {}, "layer 'a': group_size: found 128, expected a divisor of the 48"),
    "group-size": ({"a": W}, {"group_size": -2}, "group_size: found -2"),
    "scheme": ({"a": W}, {"scheme": "W3A16"}, "scheme: found 'W3A16' for layer 'a'"),
    "schemes": ({"a": W}, {"scheme": {"b": "W8A8"}}, "scheme: found other names than layers"),
    "symmetric": ({"a": W}, {"scheme": "W8A8", "symmetric": False}, "symmetric: found False"),
    "dtype": ({"a": W}, {"dtype": torch.int8}, "dtype: found torch.int8"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_write_nothing(tmp_path, case):
    layers, how, message = REFUSALS[case]
    with pytest.raises(ValueError) as caught:
        save_linears(layers, tmp_path / "new", **how)
    assert message in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_overwriting(tmp_path, monkeypatch):
    save_linears({"a": W}, tmp_path, group_size=16)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["config.json", "model.safetensors"]

    def unchanged():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    with pytest.raises(ValueError, match=r"found it already there; overwrite=True"):
        save_linears({"a": -W}, tmp_path, group_size=16)
    assert unchanged()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pymllm.checkpoint.writing.save_file", full_disk)
        with pytest.raises(OSError, match="No space"):
            save_linears({"a": -W}, tmp_path, group_size=16, overwrite=True)
    assert unchanged()

    save_linears({"b": W}, tmp_path, group_size=16, overwrite=True)
    assert list(load_linears(tmp_path, device="cpu")) == ["b"]
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: found a sharded checkpoint"):
        save_linears({"a": W}, tmp_path, group_size=16, overwrite=True)
