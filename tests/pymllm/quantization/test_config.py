"""From a checkpoint's config.json to the quantization method of a layer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from pymllm.layers.quantize_base import LinearMethodBase
from pymllm.quantization.format import LayerScheme, find_quantization_block, parse_block
from pymllm.quantization.methods import compressed_tensors as module
from pymllm.quantization.methods.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
    CompressedTensorsW8A8Int8Scheme,
    CompressedTensorsWNA16Scheme,
)

INT4 = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
}
INT8 = {
    "targets": ["re:.*mlp.*"],
    "format": "int-quantized",
    "weights": {"num_bits": 8, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
}


def make_block(**changes):
    block = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": INT4},
        "ignore": ["lm_head"],
    }
    block.update(changes)
    return copy.deepcopy(block)


MIXED = make_block(
    format="mixed-precision", config_groups={"low": INT4, "high": INT8}, ignore=["lm_head"]
)

FLAT_INT4 = {
    "quant_format": "pack-quantized",
    "ignore": ["lm_head"],
    "weight_bits": 4,
    "group_size": 128,
    "weight_strategy": "group",
    "weight_type": "int",
    "weight_dynamic": False,
    "symmetric": True,
    "actorder": None,
    "input_bits": None,
    "input_strategy": None,
    "input_type": None,
    "input_dynamic": False,
    "input_symmetric": True,
}
FLAT_INT8 = {
    **FLAT_INT4,
    "quant_format": "int-quantized",
    "weight_bits": 8,
    "group_size": None,
    "weight_strategy": "channel",
    "input_bits": 8,
    "input_strategy": "token",
    "input_type": "int",
    "input_dynamic": True,
}


def flat(config):
    return {name: getattr(config, name) for name in FLAT_INT4}


# --- places of the block --------------------------------------------------------------------

OTHER = make_block(version="other")


@pytest.mark.parametrize(
    "config_json",
    [
        {"quantization_config": make_block()},
        {"text_config": {"quantization_config": make_block()}},
        {"compression_config": make_block()},
        {"text_config": {"compression_config": make_block()}},
        {"quantization_config": None, "compression_config": make_block()},
        {"quantization_config": {}, "text_config": {"quantization_config": make_block()}},
        {"quantization_config": make_block(), "text_config": {"quantization_config": OTHER}},
        {"text_config": {"quantization_config": make_block()}, "compression_config": OTHER},
        {"compression_config": make_block(), "text_config": {"compression_config": OTHER}},
        {"text_config": None, "quantization_config": make_block()},
        {"quantization_config": {"quantization_config": make_block()}},
    ],
)
def test_block_is_found(config_json):
    assert find_quantization_block(config_json) == make_block()


@pytest.mark.parametrize(
    "config_json", [{}, {"quantization_config": None}, {"text_config": {"hidden_size": 8}}]
)
def test_unquantized_model_has_no_block(config_json):
    assert find_quantization_block(config_json) is None


def test_block_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match=r"text_config\.quantization_config.*'awq'"):
        find_quantization_block({"text_config": {"quantization_config": "awq"}})


def test_legacy_wrapper_may_say_sparseml():
    wrapper = {"quantization_config": make_block(quant_method="sparseml")}
    found = find_quantization_block({"compression_config": wrapper})
    assert found["quant_method"] == "compressed-tensors"
    assert parse_block(wrapper).schemes == parse_block(make_block()).schemes
    with pytest.raises(ValueError, match=r"quant_method.*'sparseml'"):
        parse_block(make_block(quant_method="sparseml"))


@pytest.mark.parametrize("key", ["sparsity_config", "transform_config"])
def test_legacy_wrapper_does_not_hide_what_stands_beside_the_block(key):
    value = {"format": "sparse-bitmask", "config_groups": {"R1": {}}}
    with pytest.raises(ValueError, match=key):
        parse_block({"quantization_config": make_block(), key: value})


@pytest.mark.parametrize(
    "method", ["compressed-tensors", "Compressed-Tensors", "compressed_tensors", None]
)
def test_method_name_spellings(method):
    assert len(parse_block(make_block(quant_method=method)).schemes) == 1


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "", 3])
def test_other_methods_are_refused(method):
    with pytest.raises(ValueError, match=r"quant_method.*compressed-tensors"):
        parse_block(make_block(quant_method=method))


# --- top level ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_status": "frozen"},
        {"quantization_status": "initialized"},
        {"ignore": None},
        {"global_compression_ratio": 1.5},
        {"kv_cache_scheme": {"num_bits": 8, "type": "float", "nonsense": 1}},
        {"moe_sparsity_config": {"method": "prune", "num_experts": [4]}},
        {"sparsity_config": None},
        {"sparsity_config": {}},
        {"sparsity_config": {"format": "dense", "targets": ["Linear"], "ignore": ["x"]}},
        {"transform_config": None},
        {"transform_config": {}},
        {"transform_config": {"config_groups": {}}},
        {"version": "0.14.1.a20260325"},
        {"some_future_key": {"a": 1}},
        {"format": None},
        {"format": "mixed-precision"},
    ],
    ids=str,
)
def test_harmless_top_level(changes):
    (scheme,) = parse_block(make_block(**changes)).schemes
    assert (scheme.kind, scheme.format) == ("wna16", "pack-quantized")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparsity_config.format"]),
        ({"sparsity_config": {"targets": ["Linear"]}}, ["sparsity_config.format"]),
        ({"sparsity_config": "dense"}, ["sparsity_config"]),
        ({"transform_config": {"config_groups": {"R1": {}}}}, ["transform_config", "R1"]),
        ({"transform_config": {"rotation": "R1"}}, ["transform_config"]),
        ({"transform_config": True}, ["transform_config"]),
        ({"format": "sparse-bitmask"}, ["format", "sparse-bitmask"]),
        ({"format": "sparse-24-bitmask"}, ["format", "sparse-24-bitmask"]),
        ({"format": "marlin-24"}, ["format", "marlin-24"]),
        ({"format": "float-quantized"}, ["group_0", "format", "float-quantized"]),
        ({"format": 4}, ["format"]),
        ({"ignore": "lm_head"}, ["ignore"]),
        ({"ignore": [None]}, ["ignore"]),
        ({"ignore": ["re:["]}, ["ignore", "re:["]),
        ({"config_groups": None}, ["config_groups"]),
        ({"config_groups": [INT4]}, ["config_groups"]),
        ({"config_groups": {"g": {**INT4, "targets": ["re:("]}}}, ["'g'", "targets", "re:("]),
        ({"config_groups": {"g": INT4, "h": {"targets": []}}}, ["'h'", "weights"]),
        ({"config_groups": {"FP8": ["Linear"]}}, ["'FP8'", "preset"]),
    ],
    ids=str,
)
def test_refused_blocks(changes, parts):
    with pytest.raises(ValueError) as error:
        CompressedTensorsConfig.from_config(make_block(**changes))
    for part in parts:
        assert part in str(error.value)


def test_sparse_format_is_refused_whatever_the_groups_say():
    group = {**INT4, "format": "pack-quantized"}
    with pytest.raises(ValueError, match="marlin-24"):
        parse_block(make_block(format="marlin-24", config_groups={"g": group}))


def test_block_keeps_ignore_and_version():
    block = parse_block(make_block(version="0.9.1", ignore=["b", "re:a", "b"]))
    assert (block.version, block.ignore, block.format) == (
        "0.9.1",
        ("b", "re:a", "b"),
        "pack-quantized",
    )


# --- the config object ----------------------------------------------------------------------


@pytest.mark.parametrize("keywords", [FLAT_INT4, FLAT_INT8], ids=["int4", "int8"])
def test_flat_keywords_come_back(keywords):
    config = CompressedTensorsConfig(**keywords)
    assert flat(config) == keywords
    assert config.get_quant_method(nn.Linear(8, 8), "m.x") is not None
    assert config.get_quant_method(nn.Linear(8, 8), "lm_head") is None
    assert config.get_quant_method(nn.LayerNorm(8), "m.norm") is None


def test_flat_keywords_are_normalised():
    config = CompressedTensorsConfig(
        **{**FLAT_INT4, "actorder": "static", "weight_strategy": None, "weight_type": None}
    )
    assert (config.actorder, config.weight_strategy, config.weight_type) == (
        "weight",
        "group",
        "int",
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"weight_bits": 3}, "weights.num_bits"),
        ({"weight_type": "float"}, "weights.type"),
        ({"weight_dynamic": True}, "weights.dynamic"),
        ({"group_size": None}, "weights.group_size"),
        ({"actorder": "sorted"}, "weights.actorder"),
        ({"quant_format": "marlin-24"}, "format"),
        ({"input_bits": 8, "input_strategy": "token", "input_dynamic": True}, "input_activations"),
        ({"ignore": ["re:("]}, "ignore"),
    ],
)
def test_flat_keywords_are_checked(changes, field):
    with pytest.raises(ValueError, match=field):
        CompressedTensorsConfig(**{**FLAT_INT4, **changes})


def test_from_config_describes_the_first_group():
    assert flat(CompressedTensorsConfig.from_config(make_block())) == FLAT_INT4
    assert flat(CompressedTensorsConfig.from_config(MIXED)) == FLAT_INT4
    first_int8 = make_block(config_groups={"group_0": INT8})
    assert flat(CompressedTensorsConfig.from_config(first_int8)) == FLAT_INT8


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_from_config_takes_a_whole_config_json(key):
    config = CompressedTensorsConfig.from_config({"hidden_size": 8, key: make_block()})
    assert flat(config) == FLAT_INT4


def test_from_config_leaves_its_argument_alone():
    raw = make_block()
    CompressedTensorsConfig.from_config(raw)
    assert raw == make_block()


def test_no_groups_quantizes_nothing():
    raw = make_block(config_groups={}, kv_cache_scheme={"num_bits": 8})
    config = CompressedTensorsConfig.from_config(raw)
    assert config.get_quant_method(nn.Linear(8, 8), "m.x") is None
    assert (config.weight_bits, config.weight_strategy, config.input_bits) == (16, None, None)
    with pytest.raises(ValueError, match="none"):
        CompressedTensorsLinearMethod(config, "w4a16")


def test_fixed_answers():
    config = CompressedTensorsConfig.from_config(make_block())
    assert config.get_name() == "compressed-tensors"
    assert set(config.get_supported_act_dtypes()) == {
        torch.bfloat16,
        torch.float16,
        torch.float32,
    }
    assert CompressedTensorsConfig.get_min_capability() == 75
    assert CompressedTensorsConfig.get_config_filenames() == ["config.json"]


# --- methods of layers ----------------------------------------------------------------------


def test_mixed_groups_give_each_layer_its_scheme():
    config = CompressedTensorsConfig.from_config(MIXED)
    layer = nn.Linear(8, 8)
    attention = config.get_quant_method(layer, "m.attn.o_proj")
    mlp = config.get_quant_method(layer, "m.mlp.down_proj")
    assert isinstance(attention.scheme, CompressedTensorsWNA16Scheme)
    assert isinstance(mlp.scheme, CompressedTensorsW8A8Int8Scheme)
    assert isinstance(attention, LinearMethodBase)
    assert attention.quant_config is config
    assert config.get_quant_method(layer, "lm_head") is None


def test_resolve_plans_without_layers():
    config = CompressedTensorsConfig.from_config(MIXED)
    scheme = config.resolve("m.mlp.down_proj")
    assert isinstance(scheme, LayerScheme)
    assert (scheme.group, scheme.signature) == ("high", "w8a8")
    assert config.resolve("m.attn.o_proj").group == "low"
    assert config.resolve("lm_head") is None
    assert config.resolve("m.norm", nn.LayerNorm(8)) is None


def test_packed_modules_mapping_can_be_extended():
    raw = make_block(ignore=["m.z_proj", "m.x_proj", "m.q_proj"])
    config, other = (CompressedTensorsConfig.from_config(raw) for _ in range(2))
    config.packed_modules_mapping["in_proj"] = ["z_proj", "x_proj"]
    assert config.resolve("m.in_proj") is None
    assert other.resolve("m.in_proj") is not None
    with pytest.raises(ValueError, match=r"m\.qkv_proj.*m\.q_proj"):
        config.get_quant_method(nn.Linear(8, 8), "m.qkv_proj")


def test_quantized_embedding_is_refused():
    group = {**INT4, "targets": ["re:.*"]}
    config = CompressedTensorsConfig.from_config(make_block(config_groups={"g": group}))
    with pytest.raises(ValueError, match=r"m\.embed.*Embedding.*'g'"):
        config.get_quant_method(nn.Embedding(8, 8), "m.embed")


@pytest.mark.parametrize(
    ("signature", "bits"),
    [("w4a16", 4), ("w4a16:low", 4), ("w8a8:high", 8)],
)
def test_signatures(signature, bits):
    config = CompressedTensorsConfig.from_config(MIXED)
    assert CompressedTensorsLinearMethod(config, signature).scheme.weight_bits == bits


@pytest.mark.parametrize("signature", ["w8a8", "w8a8:low", "w4a16:", "W4A16", "", "fp8"])
def test_unknown_signatures_list_the_valid(signature):
    config = CompressedTensorsConfig.from_config(MIXED)
    with pytest.raises(ValueError) as error:
        CompressedTensorsLinearMethod(config, signature)
    for part in (repr(signature), "'w4a16'", "'w4a16:low'", "'w8a8:high'"):
        assert part in str(error.value)


@pytest.mark.parametrize("size", [None, -1, 0])
def test_channel_scheme_gets_minus_one(size):
    weights = {"num_bits": 8, "strategy": "channel", "group_size": size, "symmetric": False}
    group = {"targets": ["Linear"], "weights": weights}
    config = CompressedTensorsConfig.from_config(make_block(config_groups={"g": group}))
    scheme = config.get_quant_method(nn.Linear(8, 8), "m.x").scheme
    assert (scheme.weight_bits, scheme.group_size, scheme.symmetric) == (8, -1, False)
    assert config.group_size == size


@pytest.mark.parametrize(("written", "given"), [("dynamic", "group"), ("static", "weight")])
def test_wna16_scheme_gets_the_order_without_aliases(written, given):
    weights = {**INT4["weights"], "group_size": 64, "actorder": written}
    group = {"targets": ["Linear"], "weights": weights}
    config = CompressedTensorsConfig.from_config(make_block(config_groups={"g": group}))
    scheme = config.get_quant_method(nn.Linear(64, 8), "m.x").scheme
    assert (scheme.group_size, scheme.actorder) == (64, given)


class Recorder:
    def __init__(self, **options):
        self.options = options
        self.calls = []

    def create_weights(self, *args, **kwargs):
        self.calls.append(("create", args, kwargs))

    def process_weights_after_loading(self, layer):
        self.calls.append(("process", layer))

    def apply(self, layer, x, bias=None):
        self.calls.append(("apply", layer, x, bias))
        return "y"


@pytest.mark.parametrize(
    "inputs",
    [
        {"strategy": "token", "dynamic": True, "symmetric": True},
        {"strategy": "token", "dynamic": True, "symmetric": False},
        {"strategy": "tensor", "dynamic": False, "symmetric": True},
        {"strategy": "tensor", "dynamic": False, "symmetric": False},
    ],
)
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_w8a8_scheme_gets_its_variant(monkeypatch, strategy, inputs):
    monkeypatch.setattr(module, "CompressedTensorsW8A8Int8Scheme", Recorder)
    group = {
        "targets": ["Linear"],
        "format": "int-quantized",
        "weights": {"num_bits": 8, "strategy": strategy},
        "input_activations": {"num_bits": 8, **inputs},
    }
    config = CompressedTensorsConfig.from_config(make_block(config_groups={"g": group}))
    assert CompressedTensorsLinearMethod(config, "w8a8").scheme.options == {
        "weight_bits": 8,
        "weight_strategy": strategy,
        "input_strategy": inputs["strategy"],
        "input_dynamic": inputs["dynamic"],
        "input_symmetric": inputs["symmetric"],
    }


def test_method_forwards_everything(monkeypatch):
    monkeypatch.setattr(module, "CompressedTensorsWNA16Scheme", Recorder)
    config = CompressedTensorsConfig.from_config(make_block())
    method = CompressedTensorsLinearMethod(config, "w4a16")
    layer = nn.Linear(2, 2)
    method.create_weights(layer, 2, [2], 2, 2, torch.float16, weight_loader=1)
    method.process_weights_after_loading(layer)
    assert method.apply(layer, "x", bias="b") == "y"
    assert method.apply(layer, "x") == "y"
    assert method.scheme.calls == [
        ("create", (layer, 2, [2], 2, 2, torch.float16), {"weight_loader": 1}),
        ("process", layer),
        ("apply", layer, "x", "b"),
        ("apply", layer, "x", None),
    ]


def test_every_public_name_is_there():
    for name in module.__all__:
        assert hasattr(module, name)
    assert {
        "MARLIN_SUPPORTED_GROUP_SIZES",
        "GPTQ_MARLIN_MIN_THREAD_N",
        "GPTQ_MARLIN_MIN_THREAD_K",
        "GPTQ_MARLIN_TILE",
        "SCALAR_TYPE_UINT4",
        "SCALAR_TYPE_UINT4B8",
        "verify_marlin_supported",
        "verify_marlin_supports_shape",
        "marlin_make_workspace",
        "marlin_make_empty_g_idx",
        "get_scale_perms",
        "marlin_permute_scales",
        "replace_parameter",
        "CompressedTensorsWNA16Scheme",
        "CompressedTensorsW8A8Int8Scheme",
        "CompressedTensorsLinearMethod",
        "CompressedTensorsConfig",
    } == set(module.__all__)


# --- blocks as the library writes them ------------------------------------------------------


@pytest.mark.parametrize("fmt", ["mixed-precision", None])
def test_library_presets_are_read_or_refused(fmt):
    """Every preset, in the library's shorthand and as the object the library writes."""
    scheme_module = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    accepted = set()
    for preset in scheme_module.PRESET_SCHEMES:
        written = scheme_module.preset_name_to_scheme(preset, ["Linear"]).model_dump(mode="json")
        results = []
        for groups in ({preset: ["Linear"]}, {"group_0": written}):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    (scheme,) = parse_block(make_block(format=fmt, config_groups=groups)).schemes
            except ValueError as error:
                assert repr(next(iter(groups))) in str(error)
                results.append(None)
            else:
                results.append((scheme.kind, scheme.weights, scheme.inputs))
        assert results[0] == results[1], preset
        if results[0] is not None:
            accepted.add(preset)
    assert accepted == {"W4A16", "W4A16_ASYM", "W8A16", "W8A8", "INT8"}
