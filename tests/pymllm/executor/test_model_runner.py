"""Loading whole models: names, fused layers, what is missing and what is too much."""

import pytest
import torch

from pymllm.executor import ModelRunner
from pymllm.layers import Linear, MergedLinear
from pymllm.quantization.methods import CompressedTensorsConfig

BF16 = torch.bfloat16
HIDDEN, SIZES = 64, [30, 9, 9]
SHARDS = ["q_proj", "k_proj", "v_proj"]


class Attention(torch.nn.Module):
    def __init__(self, config, prefix):
        super().__init__()
        how = {"params_dtype": BF16, "quant_config": config}
        self.qkv_proj = MergedLinear(HIDDEN, SIZES, prefix=f"{prefix}.qkv_proj", **how)
        self.o_proj = Linear(HIDDEN, HIDDEN, False, prefix=f"{prefix}.o_proj", **how)


class Model(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = torch.nn.Embedding(10, HIDDEN, dtype=BF16)
        self.attn = Attention(config, "attn")
        self.norm = torch.nn.LayerNorm(HIDDEN, dtype=BF16)
        self.head = Linear(HIDDEN, 10, False, params_dtype=BF16, quant_config=config, prefix="head")
        self.head.weight = self.embed.weight  # tied
        self.register_buffer("table", torch.zeros(4))
        self.register_buffer("cache", torch.zeros(4), persistent=False)


@pytest.fixture
def case(library, blocks):
    """A model's config, and its checkpoint as ``{layer: {suffix: tensor}}``."""
    group = blocks.pack(4, 32, symmetric=False)
    block = blocks.of(group, ignore=["head"])
    how = {"group_size": 32, "symmetric": False}
    layers = {
        "embed": {"weight": torch.randn(10, HIDDEN).to(BF16)},
        "norm": {"weight": torch.randn(HIDDEN), "bias": torch.randn(HIDDEN)},
        "attn.o_proj": library.compress(torch.randn(HIDDEN, HIDDEN).to(BF16), **how),
        "attn": {"k_scale": torch.ones(1)},
    }
    for shard, size in zip(SHARDS, SIZES, strict=True):
        layers[f"attn.{shard}"] = library.compress(torch.randn(size, HIDDEN).to(BF16), **how)
        layers[f"attn.{shard}"]["bias"] = torch.randn(size).to(BF16)
    layers["table"] = {}
    return block, layers


def flat(layers):
    pairs = {
        f"{name}.{suffix}": t for name, stored in layers.items() for suffix, t in stored.items()
    }
    return {**pairs, "table": torch.arange(4.0)}


def make(block, device="cpu"):
    with torch.device(device):
        return Model(CompressedTensorsConfig.from_config(block))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_model_with_fused_layers(library, case, numbers, device, order):
    block, layers = case
    model = make(block, device)
    processed = []
    for module in (model.attn.qkv_proj, model.attn.o_proj, model.head):
        method = module.quant_method
        original = method.process_weights_after_loading

        def counted(layer, original=original):
            processed.append(layer)
            original(layer)

        method.process_weights_after_loading = counted
    ModelRunner(model).load_weights(list(flat(layers).items())[::order])
    assert processed == [model.attn.qkv_proj, model.attn.o_proj, model.head]

    how = {"group_size": 32, "symmetric": False}
    weights = [library.decompress(layers[f"attn.{shard}"], **how) for shard in SHARDS]
    assert torch.equal(numbers.dequantized(model.attn.qkv_proj), torch.cat(weights))
    biases = [layers[f"attn.{shard}"]["bias"] for shard in SHARDS]
    assert torch.equal(model.attn.qkv_proj.bias, torch.cat(biases))
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, layers["embed"]["weight"])
    assert torch.equal(model.norm.weight, layers["norm"]["weight"].to(BF16))
    assert model.table.tolist() == [0, 1, 2, 3]
    x = torch.randn(3, HIDDEN).to(BF16)
    plain = torch.nn.functional.linear(x, torch.cat(weights), torch.cat(biases))
    assert torch.equal(model.attn.qkv_proj(x), plain)
    assert model.head(x).shape == (3, 10)


def test_from_a_folder(case, checkpoint, numbers):
    block, layers = case
    del layers["table"]
    directory = checkpoint({**layers, "": {}}, block, shards=3)
    model = make(block)
    del model.table
    ModelRunner(model).load_weights(directory)
    other = make(block)
    ModelRunner(other).load_weights(flat({**layers}).items())
    found, expected = (numbers.dequantized(m.attn.qkv_proj) for m in (model, other))
    assert torch.equal(found, expected)


def changed(name, value):
    def change(tensors):
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


REFUSALS = {
    "missing": (changed("norm.bias", None), "module 'norm': bias: found none"),
    "missing-quantized": (
        changed("attn.o_proj.weight_scale", None),
        "module 'attn.o_proj': weight_scale: found none",
    ),
    "missing-shard": (
        changed("attn.k_proj.weight_packed", None),
        "module 'attn.qkv_proj': weight_packed of k_proj: found none",
    ),
    "missing-zero-points": (
        changed("attn.v_proj.weight_zero_point", None),
        "module 'attn.qkv_proj': weight_zero_point of v_proj: found none",
    ),
    "missing-tied": (changed("embed.weight", None), "module 'embed': weight: found none"),
    "missing-buffer": (changed("table", None), "module '': table: found none"),
    "unexpected-module": (
        changed("attn.x_proj.weight", torch.ones(1)),
        "module 'attn.x_proj': weight: found an unexpected tensor, expected no such module",
    ),
    "unexpected-tensor": (
        changed("norm.scale", torch.ones(1)),
        "module 'norm': scale: found an unexpected tensor, expected no such tensor",
    ),
    "unexpected-in-shard": (
        changed("attn.q_proj.qzeros", torch.ones(1)),
        "layer 'attn.qkv_proj': qzeros: found an unexpected tensor float32 [1]",
    ),
    "misshapen": (
        changed("norm.bias", torch.ones(HIDDEN + 1)),
        "module 'norm': bias: found float32 [65], expected bfloat16 or float16 or float32 [64]",
    ),
    "misshapen-shard": (
        changed("attn.k_proj.weight_scale", torch.ones(8, 2)),
        "layer 'attn.qkv_proj': weight_scale: found float32 [8, 2]",
    ),
    "dtype": (
        changed("norm.bias", torch.ones(HIDDEN, dtype=torch.int32)),
        "module 'norm': bias: found int32 [64]",
    ),
}


@pytest.mark.parametrize("from_folder", [False, True])
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(case, name, from_folder, tmp_path):
    import json

    from safetensors.torch import save_file

    block, layers = case
    change, message = REFUSALS[name]
    tensors = flat(layers)
    change(tensors)
    source = tensors.items()
    if from_folder:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": block}))
        save_file(tensors, tmp_path / "model.safetensors")
        source = tmp_path
    model = make(block)
    table = model.table.clone()
    with pytest.raises(ValueError) as caught:
        ModelRunner(model).load_weights(source)
    assert message in str(caught.value)
    if from_folder:
        assert torch.equal(model.table, table)
        assert model.attn.o_proj.loaded_shards == {}


def test_zero_points_left_out_by_old_releases(library, blocks, case, checkpoint, numbers):
    block, layers = case
    del layers["table"]
    del block["version"]
    for name in ("q_proj", "v_proj"):
        del layers[f"attn.{name}"]["weight_zero_point"]
    del layers["attn.o_proj"]["weight_zero_point"]
    model = make(block)
    del model.table
    ModelRunner(model).load_weights(checkpoint(layers, block))
    zero = model.attn.qkv_proj.weight_zero_point
    assert bool((zero[:30] == 8).all())
    assert not bool((zero[30:39] == 8).all())
    assert bool((zero[39:] == 8).all())
    assert bool((model.attn.o_proj.weight_zero_point == 8).all())


def test_a_second_load_is_refused(case):
    block, layers = case
    runner = ModelRunner(make(block))
    runner.load_weights(flat(layers).items())
    with pytest.raises(ValueError, match="found weights already processed"):
        runner.load_weights(flat(layers).items())


def test_modules_with_their_own_loader():
    calls = []

    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2, 2))
            self.weight.weight_loader = lambda param, loaded, shard: calls.append(shard)

    model = torch.nn.ModuleDict({"gate_up_proj": Fused()})
    tensors = {"gate_proj.weight": torch.ones(1, 2), "up_proj.weight": torch.ones(1, 2)}
    ModelRunner(model).load_weights(tensors.items())
    assert calls == ["gate_proj", "up_proj"]
