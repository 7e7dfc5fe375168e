"""Resolution of targets and ignore entries, against the format's own library too."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from pymllm.quantization.format import class_names_of, parse_block, resolve

BITS = {"a": 4, "b": 8}
LINEAR = ("Linear", "Module")


def block(groups: dict[str, list[str]], ignore=None):
    """Block of packed channel groups; ``a*`` are 4-bit, ``b*`` 8-bit, ``*z`` asymmetric."""
    return parse_block(
        {
            "format": "pack-quantized",
            "ignore": ignore,
            "config_groups": {
                name: {
                    "targets": targets,
                    "weights": {
                        "num_bits": BITS[name[0]],
                        "strategy": "channel",
                        "symmetric": not name.endswith("z"),
                    },
                }
                for name, targets in groups.items()
            },
        }
    )


def decide(groups, name, ignore=None, class_names=LINEAR, **mapping):
    scheme = resolve(block(groups, ignore), name, class_names, **mapping)
    return None if scheme is None else scheme.group


@pytest.mark.parametrize(
    ("entry", "name", "hit"),
    [
        ("re:vision_tower.*", "model.vision_tower.x", False),
        ("re:vision_tower.*", "vision_tower.x", True),
        ("re:lm_head", "lm_head_2", True),
        (r"re:.*mlp\.gate_proj", "model.mlp.gate_proj_extra", True),
        (r"re:.*mlp\.gate_proj$", "model.mlp.gate_proj_extra", False),
        ("re:", "anything.at.all", True),
        ("lm_head", "model.lm_head", False),
        ("lm_head", "lm_head", True),
        (".self_attn.o_proj", "model.self_attn.o_proj", False),
        ("o_proj", "model.o_proj", False),
        ("model.o_proj.weight", "model.o_proj", False),
        ("Linear", "model.o_proj", True),
        ("linear", "model.o_proj", False),
        ("Lin", "model.o_proj", False),
        ("re:Linear", "model.o_proj", False),
        ("Module", "model.o_proj", True),
    ],
)
def test_entry_kinds_in_targets_and_ignore(entry, name, hit):
    assert decide({"a": [entry]}, name) == ("a" if hit else None)
    assert decide({"a": ["Linear"]}, name, [entry]) == (None if hit else "a")


def test_no_target_no_scheme():
    assert decide({}, "x") is None
    assert decide({"a": []}, "x") is None
    assert decide({"a": ["Embedding"]}, "x") is None


def test_ignore_wins_over_an_exact_target():
    assert decide({"a": ["m.x"]}, "m.x", ["Linear"]) is None
    assert decide({"a": ["m.x"]}, "m.x", ["re:m"]) is None


def test_exact_then_regex_then_class():
    everything = {"a": ["Linear"], "b": [r"re:m\..*"], "bz": ["m.x"]}
    assert decide(everything, "m.x") == "bz"
    assert decide(everything, "m.y") == "b"
    assert decide(everything, "n.y") == "a"


def test_regexes_go_in_string_order_not_config_order():
    assert decide({"a": ["re:m.x"], "b": ["re:.*x"]}, "m.x") == "b"
    assert decide({"b": ["re:.*x"], "a": ["re:m.x"]}, "m.x") == "b"


def test_classes_go_in_string_order():
    assert decide({"b": ["Module"], "a": ["Linear"]}, "m.x") == "a"


def test_shared_target_belongs_to_the_later_group():
    assert decide({"a": ["Linear"], "b": ["Linear"]}, "m.x") == "b"
    assert decide({"b": ["Linear"], "a": ["Linear"]}, "m.x") == "a"


def test_ignored_class_does_not_cover_children():
    assert decide({"a": ["Linear"]}, "attn.x", ["Attention"]) == "a"


@pytest.mark.parametrize("pattern", ["re:(", "re:[a", "re:*x", "re:x(?P<n>a)(?P<n>b)"])
def test_bad_regex_names_group_and_pattern(pattern):
    with pytest.raises(ValueError) as error:
        block({"a": ["Linear"], "b": ["re:fine", pattern]})
    assert "'b'" in str(error.value)
    assert "targets" in str(error.value)
    assert repr(pattern) in str(error.value)
    with pytest.raises(ValueError) as error:
        block({"a": ["Linear"]}, [pattern])
    assert "ignore" in str(error.value)
    assert repr(pattern) in str(error.value)


# --- class names --------------------------------------------------------------------------


class LinearBase(nn.Module):
    pass


class ColumnParallelLinear(nn.Module):
    pass


class Wrapped(LinearBase):
    pass


class Plain:
    pass


class SubLinear(Plain, nn.Linear):
    pass


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (None, {"Linear", "Module"}),
        (nn.Linear(1, 1), {"Linear", "Module"}),
        (SubLinear(1, 1), {"SubLinear", "Linear", "Module"}),
        (Wrapped(), {"Wrapped", "LinearBase", "Linear", "Module"}),
        (ColumnParallelLinear(), {"ColumnParallelLinear", "Linear", "Module"}),
        (nn.LayerNorm(1), {"LayerNorm", "Module"}),
        (nn.Bilinear(1, 1, 1), {"Bilinear", "Module"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_class_names(module, expected):
    names = class_names_of(module)
    assert set(names) == expected
    assert len(names) == len(expected)


@pytest.mark.parametrize(
    "name", ["Linear", "MergedLinear", "ColumnParallelLinear", "RowParallelLinear"]
)
def test_own_layers_count_as_linear(name):
    layers = pytest.importorskip("pymllm.layers.linear")
    module = object.__new__(getattr(layers, name))
    assert "Linear" in class_names_of(module)


# --- fused layers -------------------------------------------------------------------------

QKV = "m.0.attn.qkv_proj"
Q, K, V = (f"m.0.attn.{shard}_proj" for shard in "qkv")


@pytest.mark.parametrize(
    ("groups", "ignore", "expected"),
    [
        ({"a": ["Linear"]}, None, "a"),
        ({"a": ["Linear"]}, [Q, K, V], None),
        ({"a": ["Linear"]}, ["re:.*[qkv]_proj"], None),
        ({"a": [Q, K, V]}, None, "a"),
        ({"a": [Q, K, V], "b": ["Linear"]}, None, "a"),
        ({"a": ["re:.*[qkv]_proj"], "b": ["Linear"]}, None, "a"),
        ({"a": ["re:m.*"], "b": ["Linear"]}, None, "a"),
        ({"a": ["re:m.*"]}, ["re:.*[qkv]_proj$"], None),
        # Two groups with one layout can share a layer.
        ({"a": [Q], "a2": [K, V]}, None, "a"),
        # Nothing reaches the shards.
        ({"a": ["lm_head"]}, [Q], None),
        # Born fused: the name itself is in the config.
        ({"a": [QKV], "b": ["Linear"]}, None, "a"),
        ({"a": ["Linear"]}, [QKV], None),
        ({"a": [QKV]}, [Q], "a"),
        ({"a": ["re:.*qkv_proj"], "b": ["Linear"]}, None, "a"),
        ({"a": ["Linear"]}, ["re:.*qkv_proj$"], None),
        ({"a": ["re:.*qkv"], "b": ["Linear"]}, None, "a"),
        ({"a": ["re:.*qkv_proj"], "b": ["re:m"]}, None, "a"),
        # A list written for several models: both readings say the same.
        ({"a": ["re:.*qkv_proj", Q, K, V], "b": ["Linear"]}, None, "a"),
        ({"a": ["Linear"]}, ["re:.*qkv_proj", "re:.*[qkv]_proj"], None),
    ],
)
def test_fused_layer(groups, ignore, expected):
    assert decide(groups, QKV, ignore) == expected


@pytest.mark.parametrize(
    ("groups", "ignore", "told"),
    [
        ({"a": ["Linear"]}, [Q], [Q, "ignored"]),
        ({"a": ["Linear"]}, ["re:.*v_proj"], [Q, K, V]),
        ({"a": ["Linear"], "b": [V]}, None, ["'a'", "'b'"]),
        ({"a": ["Linear"], "az": ["re:.*q_proj"]}, None, ["'a'", "'az'"]),
        ({"a": [Q, K]}, None, [V, "no target"]),
        # Hits the fused name, but tells shards apart: the fused reading is an accident.
        ({"a": [r"re:.*\.qk?v?_proj"], "b": ["Linear"]}, None, ["'a'", "'b'"]),
        # Both names are singled out, with different results.
        ({"a": ["re:.*qkv_proj"], "b": ["re:.*[qkv]_proj$", "Linear"], "bz": [Q]}, None, [Q]),
        ({"a": ["re:.*qkv_proj"]}, [r"re:.*\.[qkv]_proj"], ["both"]),
    ],
)
def test_fused_layer_with_differing_shards(groups, ignore, told):
    with pytest.raises(ValueError) as error:
        decide(groups, QKV, ignore)
    for part in (repr(QKV), *told):
        assert part in str(error.value)


def test_gate_up_and_prefixless_names():
    assert decide({"a": ["Linear"]}, "mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]) is None
    with pytest.raises(ValueError, match=r"'gate_up_proj'.*up_proj"):
        decide({"a": ["Linear"]}, "gate_up_proj", ["up_proj"])


def test_only_the_whole_last_component_is_fused():
    assert decide({"a": ["Linear"]}, "m.my_qkv_proj", ["m.my_q_proj"]) == "a"


def test_mapping_can_be_replaced():
    mapping = {"in_proj": ["z_proj", "x_proj"]}
    ignore = ["m.z_proj", "m.x_proj"]
    assert decide({"a": ["Linear"]}, "m.in_proj", ignore) == "a"
    assert decide({"a": ["Linear"]}, "m.in_proj", ignore, packed_modules_mapping=mapping) is None
    assert decide({"a": ["Linear"]}, QKV, [Q], packed_modules_mapping={}) == "a"


# --- against the library ------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, nn.Linear(8, 4))
        self.o_proj = SubLinear(8, 4)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.gate = nn.Linear(8, 4)
        self.gate_extra = SubLinear(8, 4)
        self.wrapped = Wrapped()
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.lm_head = nn.Linear(8, 4)
        self.lm_head_2 = nn.Linear(8, 4)


def entry_pool(names):
    regexes = [
        *("re:.*", "re:", "re:lm_head", "re:lm_head$", "re:head", "re:.*attn.*", "re:.*attn$"),
        *(r"re:layers\.0\.", r"re:.*\.1\.", "re:.*[qk]_proj", "re:.*gate", "re:.*gate$"),
        *("re:(?!.*attn)", "re:.*proj|lm_head", r"re:layers\.\d+\.attn\.o", "re:embed"),
    ]
    classes = [
        *("Linear", "SubLinear", "Embedding", "Module", "LayerNorm", "Attention", "Plain"),
        *("LinearBase", "Wrapped", "Layer", "linear", "NoSuchClass"),
    ]
    near_misses = ["q_proj", "attn.q_proj", ".gate", "layers.0.gate.weight", "head"]
    return names, regexes, classes, near_misses


def draw(rng, pool, low, high):
    return [rng.choice(rng.choice(pool)) for _ in range(rng.randint(low, high))]


def random_config(rng, pool):
    groups = {name: draw(rng, pool, 0, 4) for name in rng.sample(["a", "az", "b", "bz"], 3)}
    return groups, draw(rng, pool, 0, 2)


def library_config(groups, ignore):
    from compressed_tensors.quantization import QuantizationConfig

    schemes = {
        name: {
            "targets": targets,
            "weights": {
                "num_bits": BITS[name[0]],
                "strategy": "channel",
                "symmetric": not name.endswith("z"),
            },
        }
        for name, targets in groups.items()
    }
    return QuantizationConfig(config_groups=schemes, ignore=ignore, format="pack-quantized")


def our_answers(model, groups, ignore):
    parsed = block(groups, ignore)
    answers = {}
    for name, module in model.named_modules():
        scheme = resolve(parsed, name, class_names_of(module))
        if scheme is not None:
            answers[name] = (scheme.weights.num_bits, scheme.weights.symmetric)
    return answers


def test_random_configs_resolve_as_the_library_matches():
    """Every module kind, through the functions the library applies configs with."""
    match = pytest.importorskip("compressed_tensors.utils.match")
    rng = random.Random(20)
    model = Model()
    pool = entry_pool([name for name, _ in model.named_modules() if name])
    compared = quantized = 0
    for _ in range(400):
        groups, ignore = random_config(rng, pool)
        config = library_config(groups, ignore)
        by_target = {t: s for s in config.config_groups.values() for t in s.targets}
        theirs = {}
        for name, module in match.match_named_modules(model, by_target, config.ignore):
            weights = by_target[match.match_targets(name, module, by_target)[0]].weights
            theirs[name] = (weights.num_bits, weights.symmetric)
        assert our_answers(model, groups, ignore) == theirs, (groups, ignore)
        compared += len(list(model.named_modules()))
        quantized += len(theirs)
    assert compared > 5000
    assert 0.2 < quantized / compared < 0.8, "the cases must exercise both answers"


def test_random_configs_resolve_as_the_library_applies():
    """Linear and embedding modules, through the library's entry point."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    rng = random.Random(21)
    with torch.device("meta"):
        pool = entry_pool([name for name, _ in Model().named_modules() if name])
    for _ in range(40):
        groups, ignore = random_config(rng, pool)
        model = Model()
        expected = {
            name: answer
            for name, answer in our_answers(model, groups, ignore).items()
            if isinstance(model.get_submodule(name), (nn.Linear, nn.Embedding))
        }
        config = library_config(groups, ignore)
        quantization.apply_quantization_config(model, config, show_progress=False)
        theirs = {
            name: (module.quantization_scheme.weights.num_bits, scheme.weights.symmetric)
            for name, module in model.named_modules()
            if (scheme := getattr(module, "quantization_scheme", None)) is not None
        }
        assert expected == theirs, (groups, ignore)
