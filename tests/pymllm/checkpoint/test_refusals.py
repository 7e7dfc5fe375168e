"""What a load refuses, each with layer, tensor, what was found and expected."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pymllm import load_linears

BF16 = torch.bfloat16
NAME = "model.layers.0.mlp.down_proj"


def random_weight(n, k, dtype=BF16, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype) * 0.1


def _changed(tensors, **changes):
    new = {**tensors, **changes}
    return {name: tensor for name, tensor in new.items() if tensor is not None}


REFUSALS = {
    "packed-missing": ({"weight_packed": None}, "weight_packed or weight: found none"),
    "scale-missing": ({"weight_scale": None}, "weight_scale: found none, expected one"),
    "shape-missing": ({"weight_shape": None}, "weight_shape: found none"),
    "extra": (
        {"weight_global_scale": torch.ones(1)},
        "weight_global_scale: found an unexpected tensor float32 [1]",
    ),
    "packed-dtype": (
        {"weight_packed": torch.zeros(16, 8, dtype=torch.int64)},
        "weight_packed: found int64 [16, 8], expected int32 [16, 8]",
    ),
    "packed-width": (
        {"weight_packed": torch.zeros(16, 9, dtype=torch.int32)},
        "weight_packed: found int32 [16, 9], expected int32 [16, 8]",
    ),
    "stacked": (
        {"weight_packed": torch.zeros(2, 16, 8, dtype=torch.int32)},
        "stacked experts are not supported",
    ),
    "scale-shape": (
        {"weight_scale": torch.ones(16, 4)},
        "weight_scale: found float32 [16, 4], expected bfloat16 or float16 or float32 [16, 2]",
    ),
    "scale-dtype": (
        {"weight_scale": torch.ones(16, 2, dtype=torch.int32)},
        "weight_scale: found int32 [16, 2]",
    ),
    "stored-shape": (
        {"weight_shape": torch.tensor([15, 64])},
        "weight_packed: found int32 [16, 8], expected int32 [15, 8]",
    ),
    "stored-shape-negative": ({"weight_shape": torch.tensor([16, -64])}, "positive values"),
    "group-size": ({"weight_shape": torch.tensor([16, 63])}, "expected a divisor of the 63 inputs"),
    "bias": ({"bias": torch.ones(15)}, "bias: found float32 [15]"),
    "both": ({"weight": torch.ones(16, 64)}, "found both weight and weight_packed"),
    "integer-weight": (
        {"weight_packed": None, "weight": torch.zeros(16, 64, dtype=torch.int8)},
        "weight: found torch.int8 [16, 64], expected weight_packed: group 'group_0'",
    ),
    "fake-quantized": (
        {"weight_packed": None, "weight": torch.ones(16, 64)},
        "weight: found torch.float32 beside weight_scale",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_tensors(library, blocks, checkpoint, case):
    changes, message = REFUSALS[case]
    tensors = library.compress(random_weight(16, 64), group_size=32)
    layers = {"model.a": tensors, NAME: _changed(tensors, **changes)}
    directory = checkpoint(layers, blocks.of(blocks.pack(4, 32)))
    done = []
    with pytest.raises(ValueError, match="layer '" + NAME.replace(".", r"\.")) as caught:
        load_linears(directory, device="cpu", progress=lambda *call: done.append(call))
    assert message in str(caught.value)
    assert not done  # every layer is checked before any is loaded


@pytest.mark.parametrize("values", [[0, 0, 1, 2], [0, 0, 0, 1], [0, 0, 1, -2]])
def test_refused_group_numbers(library, blocks, checkpoint, values):
    tensors = library.compress(random_weight(16, 4), group_size=2)
    tensors["weight_g_idx"] = torch.tensor(values, dtype=torch.int32)
    directory = checkpoint({NAME: tensors}, blocks.of(blocks.pack(4, 2, actorder="group")))
    with pytest.raises(ValueError, match=f"{NAME}.*weight_g_idx: found group"):
        load_linears(directory, device="cpu")


def test_not_claimed_but_packed(library, blocks, checkpoint):
    tensors = library.compress(random_weight(16, 64), group_size=32)
    block = blocks.of(blocks.pack(4, 32), ignore=["re:.*down_proj"])
    with pytest.raises(ValueError, match=f"{NAME}.*weight_packed.*does not claim this layer"):
        load_linears(checkpoint({NAME: tensors}, block), device="cpu")


def test_damaged_files(library, blocks, checkpoint):
    tensors = library.compress(random_weight(16, 64), group_size=32)
    directory = checkpoint({NAME: tensors}, blocks.of(blocks.pack(4, 32)))
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for content, told in (
        (whole[:-1], "truncated"),
        (whole[:20], "truncated"),
        (whole[:5], "truncated"),
        (b"", "truncated"),
        (b"\xff" * 200, "truncated or damaged"),
        (whole[:8] + b"!" * header + whole[8 + header :], "header is damaged"),
        (whole.replace(b'"I32"', b'"I31"'), "dtype 'I31' is not supported"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors: .*" + told):
            load_linears(directory, device="cpu")
    path.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: found no such file"):
        load_linears(directory, device="cpu")
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: is not JSON"):
        load_linears(directory, device="cpu")
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: found no such file"):
        load_linears(directory, device="cpu")
    with pytest.raises(ValueError, match=r"nowhere: found no such directory"):
        load_linears(directory / "nowhere", device="cpu")


def test_damaged_index(library, blocks, checkpoint):
    tensors = library.compress(random_weight(16, 64), group_size=32)
    directory = checkpoint({NAME: tensors}, blocks.of(blocks.pack(4, 32)), shards=2)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for key, file, told in (
        (f"{NAME}.weight_packed", "model-9.safetensors", "names the file 'model-9.safetensors'"),
        (f"{NAME}.weight_packed", "../model-0.safetensors", "which is not beside it"),
        ("model.other.weight", "model-0.safetensors", "names tensor 'model.other.weight'"),
    ):
        changed = {**index["weight_map"], key: file}
        path.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ValueError, match=told.replace(".", r"\.")):
            load_linears(directory, device="cpu")
    path.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(ValueError, match=r"index\.json: weight_map: expected an object"):
        load_linears(directory, device="cpu")


def test_no_quantization_config(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json: found no quantization_config"):
        load_linears(tmp_path, device="cpu")
