"""Layers quantized by the compressed-tensors library, and checkpoint folders made of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file


def _scheme(bits, group_size, symmetric, int8):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    grouped = group_size is not None and group_size > 0
    weights = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if grouped else "channel",
        group_size=group_size,
    )
    inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True) if int8 else None
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)


def _compressor(int8):
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry("int-quantized" if int8 else "pack-quantized")


def _compress(weight, *, bits=4, group_size=None, symmetric=True, int8=False):
    """Checkpoint tensors of a layer, by the library."""
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = _scheme(bits, group_size, symmetric, int8)
    size = group_size if group_size is not None and group_size > 0 else weight.shape[1]
    grouped = weight.unflatten(1, (-1, size))
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
    state = {"weight": weight, "weight_scale": scale}
    if not symmetric:
        state["weight_zero_point"] = zero
    return _compressor(int8).compress(state, scheme)


def _decompress(tensors, *, bits=4, group_size=None, symmetric=True, int8=False):
    """The layer's floating weight, by the library."""
    scheme = _scheme(bits, group_size, symmetric, int8)
    stored = {name: tensor for name, tensor in tensors.items() if name != "bias"}
    return _compressor(int8).decompress(stored, scheme)["weight"]


@pytest.fixture
def library():
    pytest.importorskip("compressed_tensors")
    return SimpleNamespace(compress=_compress, decompress=_decompress)


def pack_group(bits=4, group_size=None, symmetric=True, actorder=None, targets=("Linear",)):
    grouped = group_size is not None and group_size > 0
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": group_size,
        "actorder": actorder,
    }
    return {"targets": list(targets), "weights": weights, "format": "pack-quantized"}


def int8_group(targets=("Linear",), weights=None, inputs=None):
    return {
        "targets": list(targets),
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel", **(weights or {})},
        "input_activations": {
            "num_bits": 8,
            "type": "int",
            "strategy": "token",
            "dynamic": True,
            **(inputs or {}),
        },
        "format": "int-quantized",
    }


def block_of(*groups, ignore=(), version="0.20.0"):
    block = {
        "quant_method": "compressed-tensors",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": list(ignore),
        "format": groups[0]["format"],
    }
    return block if version is None else {**block, "version": version}


@pytest.fixture
def blocks():
    return SimpleNamespace(pack=pack_group, int8=int8_group, of=block_of)


@pytest.fixture
def checkpoint(tmp_path):
    """Writes ``{layer: {suffix: tensor}}`` and a block; ``shards`` > 1 deals tensors in turn."""

    def write(layers, block, *, shards=1, config=None, name="checkpoint"):
        directory: Path = tmp_path / name
        directory.mkdir()
        tensors = {
            f"{layer}.{suffix}": tensor.contiguous().clone()
            for layer, stored in layers.items()
            for suffix, tensor in stored.items()
        }
        text = {"torch_dtype": "bfloat16", **(config or {}), "quantization_config": block}
        (directory / "config.json").write_text(json.dumps(text))
        if shards == 1:
            save_file(tensors, directory / "model.safetensors")
            return directory
        files = {f"model-{i}.safetensors": {} for i in range(shards)}
        weight_map = {}
        for i, (tensor_name, tensor) in enumerate(tensors.items()):
            file = f"model-{i % shards}.safetensors"
            files[file][tensor_name] = tensor
            weight_map[tensor_name] = file
        for file, content in files.items():
            save_file(content, directory / file)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory

    return write


def dequantized(layer):
    """The weight a processed weight-only layer holds, from the checkpoint-layout kernel."""
    from pymllm_kernels.common.packing import unpack_words
    from pymllm_kernels.w4a16.reference import dequantize

    assert layer.kernel_choice.kernel.name == "torch_w4a16"
    weight = layer.quant_method.scheme.weight_of(layer)
    bits = layer.problem.weight_bits
    codes = unpack_words(weight.weight, bits, layer.in_features)
    return dequantize(codes, weight.scale, weight.zero, weight.group_index, bits)


def assert_close_to_exact(found, plain, exact):
    """Error against fp64 at most twice that of plain torch, plus one rounding of the result."""
    assert found.dtype == plain.dtype
    assert found.shape == exact.shape
    band = exact.abs() * torch.finfo(found.dtype).eps
    found, plain = found.detach().to(torch.float64), plain.detach().to(torch.float64)
    error, worst = (found - exact).abs(), (plain - exact).abs().max()
    too_far = error > 2 * worst + band
    assert not bool(too_far.any()), (
        f"max error {error.max():.3e}, plain torch {worst:.3e}, "
        f"first bad at {too_far.nonzero()[0].tolist()}"
    )


@pytest.fixture
def numbers():
    return SimpleNamespace(dequantized=dequantized, assert_close=assert_close_to_exact)
