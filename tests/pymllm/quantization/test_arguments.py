"""Argument objects and the classification of config groups."""

from __future__ import annotations

import itertools
import warnings

import pytest

from pymllm.quantization.format import QuantArgs, parse_arguments, parse_group


def parse(role="weights", **raw):
    return parse_arguments(raw, "g7", role)


def assert_refused(error, *parts):
    """The message names the group and every given part."""
    text = str(error.value)
    for part in ("'g7'", *parts):
        assert part in text, f"{part!r} missing from: {text}"


def test_defaults():
    assert parse() == QuantArgs(8, "int", True, "tensor", None, None, False, None)


def test_null_is_absent():
    keys = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure")
    assert parse(**dict.fromkeys((*keys, "dynamic", "actorder", "observer"))) == parse()


@pytest.mark.parametrize(
    ("raw", "strategy"),
    [
        ({}, "tensor"),
        ({"group_size": None}, "tensor"),
        ({"group_size": 128}, "group"),
        ({"group_size": 1}, "group"),
        ({"group_size": -1}, "channel"),
        ({"strategy": None, "group_size": 32}, "group"),
    ],
)
def test_strategy_is_inferred(raw, strategy):
    assert parse(**raw).strategy == strategy


@pytest.mark.parametrize("size", [None, -1, 0])
def test_channel_with_no_group_size_is_one_layout(size):
    args = parse(strategy="channel", group_size=size)
    assert (args.strategy, args.columns_per_scale) == ("channel", -1)
    assert args.layout == parse(strategy="channel").layout


def test_group_layout_tells_sizes_apart():
    args = parse(group_size=64)
    assert args.columns_per_scale == 64
    assert args.layout != parse(group_size=128).layout


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"type": "INT"}, {"type": "int"}),
        ({"type": "Float"}, {"type": "float"}),
        ({"strategy": "CHANNEL"}, {"strategy": "channel"}),
        ({"strategy": "Token", "dynamic": True}, {"strategy": "token"}),
        ({"strategy": "attn_head"}, {"strategy": "attn_head"}),
        ({"strategy": "tensor_group", "group_size": 16, "dynamic": "LOCAL"}, {"dynamic": "local"}),
        ({"strategy": "tensor", "dynamic": True}, {"dynamic": True}),
        ({"strategy": "group", "group_size": 16, "dynamic": True}, {"dynamic": True}),
    ],
)
def test_accepted_spellings(raw, expected):
    args = parse(**raw)
    assert {key: getattr(args, key) for key in expected} == expected


@pytest.mark.parametrize("written", [[128, 64], (128, 64), "128x64"])
def test_block_structure_spellings(written):
    assert parse(strategy="block", block_structure=written).block_structure == (128, 64)


@pytest.mark.parametrize(
    ("written", "meaning"),
    [
        (None, None),
        (False, None),
        ("weight", "weight"),
        ("static", "weight"),
        ("group", "group"),
        ("dynamic", "group"),
        (True, "group"),
        ("Static", "weight"),
    ],
)
def test_actorder_aliases(written, meaning):
    assert parse(group_size=128, actorder=written).actorder == meaning


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_actorder_weight_is_legal_with_any_strategy_and_changes_nothing(strategy):
    args = parse(strategy=strategy, actorder="static")
    assert args.actorder == "weight"
    assert args.layout == parse(strategy=strategy).layout


def test_actorder_group_changes_the_layout():
    ordered, plain = parse(group_size=128, actorder="group"), parse(group_size=128)
    assert ordered.layout != plain.layout


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({"num_bits": {"q_proj": 4}}, "num_bits"),
        ({"num_bits": "4"}, "num_bits"),
        ({"num_bits": True}, "num_bits"),
        ({"num_bits": 0}, "num_bits"),
        ({"num_bits": 4.0}, "num_bits"),
        ({"type": "uint"}, "type"),
        ({"type": 1}, "type"),
        ({"symmetric": "true"}, "symmetric"),
        ({"symmetric": 1}, "symmetric"),
        ({"strategy": "row"}, "strategy"),
        ({"strategy": ["group"]}, "strategy"),
        ({"group_size": -2}, "group_size"),
        ({"group_size": "128"}, "group_size"),
        ({"group_size": 0}, "group_size"),
        ({"strategy": "group"}, "group_size"),
        ({"strategy": "group", "group_size": -1}, "group_size"),
        ({"strategy": "group", "group_size": 0}, "group_size"),
        ({"strategy": "tensor_group"}, "group_size"),
        ({"strategy": "channel", "group_size": 128}, "group_size"),
        ({"strategy": "tensor", "group_size": 128}, "group_size"),
        ({"strategy": "token", "group_size": 128, "dynamic": True}, "group_size"),
        ({"strategy": "token"}, "dynamic"),
        ({"strategy": "token", "dynamic": False}, "dynamic"),
        ({"strategy": "channel", "dynamic": True}, "dynamic"),
        ({"strategy": "block", "block_structure": [1, 1], "dynamic": True}, "dynamic"),
        ({"strategy": "attn_head", "dynamic": True}, "dynamic"),
        ({"dynamic": "local"}, "dynamic"),
        ({"dynamic": "true"}, "dynamic"),
        ({"dynamic": 1}, "dynamic"),
        ({"strategy": "block"}, "block_structure"),
        ({"block_structure": [128, 128]}, "block_structure"),
        ({"strategy": "block", "block_structure": [128]}, "block_structure"),
        ({"strategy": "block", "block_structure": "128"}, "block_structure"),
        ({"strategy": "block", "block_structure": "axb"}, "block_structure"),
        ({"strategy": "block", "block_structure": [0, 128]}, "block_structure"),
        ({"actorder": "random", "group_size": 128}, "actorder"),
        ({"actorder": 1, "group_size": 128}, "actorder"),
        ({"actorder": "group", "strategy": "channel"}, "actorder"),
        ({"actorder": True}, "actorder"),
    ],
)
def test_refusals_name_group_role_and_field(raw, field):
    with pytest.raises(ValueError) as error:
        parse(**raw)
    assert_refused(error, f"weights.{field}", "found", "accepted")


@pytest.mark.parametrize("role", ["input_activations", "output_activations"])
@pytest.mark.parametrize("order", ["weight", "static", "group", True])
def test_actorder_on_activations_is_refused(role, order):
    with pytest.raises(ValueError) as error:
        parse(role, group_size=128, actorder=order)
    assert_refused(error, f"{role}.actorder")


def test_actorder_false_on_activations_is_null():
    assert parse("input_activations", actorder=False).actorder is None


@pytest.mark.parametrize("raw", ["int4", 4, [4]])
def test_argument_object_must_be_an_object(raw):
    with pytest.raises(ValueError) as error:
        parse_arguments(raw, "g7", "weights")
    assert_refused(error, "weights")


def test_unknown_keys_warn():
    with pytest.warns(UserWarning, match=r"'g7'.*weights.*novelty") as caught:
        args = parse(num_bits=4, group_size=128, novelty=3)
    assert args.num_bits == 4
    assert len(caught) == 1


def test_calibration_keys_are_ignored_silently():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = parse(
            scale_dtype="torch.bfloat16",
            zp_dtype="torch.int8",
            observer="mse",
            observer_kwargs={"grid": 20},
        )
    assert args == parse()


# --- config groups -----------------------------------------------------------------------

INT4_GROUP = {"num_bits": 4, "strategy": "group", "group_size": 128}
INT8_CHANNEL = {"num_bits": 8, "strategy": "channel"}
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}


def group(weights=None, inputs=None, outputs=None, fmt=None, top=None, **more):
    raw = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": outputs,
        "format": fmt,
        **more,
    }
    return parse_group("g7", raw, top)


@pytest.mark.parametrize(
    ("weights", "signature"),
    [
        (INT4_GROUP, "w4a16"),
        ({**INT4_GROUP, "symmetric": False}, "w4a16"),
        ({**INT4_GROUP, "group_size": 20}, "w4a16"),
        ({**INT4_GROUP, "actorder": "group"}, "w4a16"),
        ({**INT4_GROUP, "actorder": "weight"}, "w4a16"),
        ({"num_bits": 4, "strategy": "channel", "actorder": "static"}, "w4a16"),
        ({**INT4_GROUP, "num_bits": 8}, "w8a16"),
        ({**INT8_CHANNEL, "symmetric": False}, "w8a16"),
    ],
)
def test_wna16_is_accepted(weights, signature):
    scheme = group(weights, fmt="pack-quantized")
    assert (scheme.kind, scheme.signature, scheme.inputs) == ("wna16", signature, None)
    assert scheme.targets == ("Linear",)


@pytest.mark.parametrize("fmt", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize(
    "weights",
    [INT8_CHANNEL, {**INT8_CHANNEL, "actorder": "static"}, {"num_bits": 8, "strategy": "tensor"}],
)
@pytest.mark.parametrize(
    "inputs",
    [
        TOKEN,
        {**TOKEN, "symmetric": False},
        {"num_bits": 8, "strategy": "tensor"},
        {"num_bits": 8, "strategy": "tensor", "symmetric": False},
    ],
)
def test_w8a8_is_accepted(fmt, weights, inputs):
    scheme = group(weights, inputs, fmt=fmt)
    assert (scheme.kind, scheme.signature, scheme.format) == ("w8a8_int8", "w8a8", fmt)


FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
FLOAT8_TOKEN = {**TOKEN, "type": "float"}
TENSOR_DYNAMIC = {"strategy": "tensor", "dynamic": True}


@pytest.mark.parametrize(
    ("weights", "inputs", "outputs", "fmt", "field"),
    [
        (FLOAT8, FLOAT8_TOKEN, None, "float-quantized", "weights.type"),
        ({**INT4_GROUP, "type": "float"}, None, None, "pack-quantized", "weights.type"),
        (INT8_CHANNEL, FLOAT8_TOKEN, None, "int-quantized", "input_activations.type"),
        (INT4_GROUP, FLOAT8_TOKEN, None, "pack-quantized", "input_activations.type"),
        (INT4_GROUP, TOKEN, None, "pack-quantized", "input_activations"),
        (INT4_GROUP, TOKEN, None, "int-quantized", "weights.num_bits"),
        (INT4_GROUP, None, None, "int-quantized", "weights.num_bits"),
        (INT8_CHANNEL, None, None, "int-quantized", "input_activations"),
        ({"group_size": 128}, TOKEN, None, "int-quantized", "weights.strategy"),
        (
            {"strategy": "block", "block_structure": [128, 128]},
            TOKEN,
            None,
            "int-quantized",
            "weights.strategy",
        ),
        ({**INT8_CHANNEL, "symmetric": False}, TOKEN, None, "int-quantized", "weights.symmetric"),
        (TENSOR_DYNAMIC, TOKEN, None, "int-quantized", "weights.dynamic"),
        ({**INT4_GROUP, "dynamic": True}, None, None, "pack-quantized", "weights.dynamic"),
        (INT8_CHANNEL, {**TOKEN, "num_bits": 4}, None, "int-quantized", "activations.num_bits"),
        (INT8_CHANNEL, {"group_size": 64}, None, "int-quantized", "input_activations.strategy"),
        (INT8_CHANNEL, TENSOR_DYNAMIC, None, "int-quantized", "input_activations.dynamic"),
        (INT8_CHANNEL, TOKEN, {"num_bits": 8}, "int-quantized", "output_activations"),
        (INT4_GROUP, None, {"num_bits": 8}, "pack-quantized", "output_activations"),
        ({**INT4_GROUP, "num_bits": 3}, None, None, "pack-quantized", "weights.num_bits"),
        ({**INT4_GROUP, "num_bits": 2}, None, None, "pack-quantized", "weights.num_bits"),
        ({"num_bits": 4}, None, None, "pack-quantized", "weights.strategy"),
        (
            {"num_bits": 4, "strategy": "block", "block_structure": [2, 2]},
            None,
            None,
            "pack-quantized",
            "weights.strategy",
        ),
        (INT4_GROUP, None, None, "marlin-24", "format"),
        (INT4_GROUP, None, None, "sparse-24-bitmask", "format"),
        (INT4_GROUP, None, None, "dense", "format"),
        (INT4_GROUP, None, None, "fakequant", "format"),
        (INT4_GROUP, None, None, "mixed-precision", "format"),
        (INT4_GROUP, None, None, "nvfp4-pack-quantized", "format"),
        (INT4_GROUP, None, None, 3, "format"),
        (None, TOKEN, None, "int-quantized", "weights"),
    ],
)
def test_schemes_are_refused_by_name(weights, inputs, outputs, fmt, field):
    with pytest.raises(ValueError) as error:
        group(weights, inputs, outputs, fmt)
    assert_refused(error, field, "found", "accepted")


@pytest.mark.parametrize(
    ("own", "top", "inputs", "expected"),
    [
        ("int-quantized", "pack-quantized", TOKEN, "int-quantized"),
        ("naive-quantized", "mixed-precision", TOKEN, "naive-quantized"),
        (None, "naive-quantized", TOKEN, "naive-quantized"),
        (None, "mixed-precision", TOKEN, "int-quantized"),
        (None, None, TOKEN, "int-quantized"),
        (None, "mixed-precision", None, "pack-quantized"),
        (None, None, None, "pack-quantized"),
    ],
)
def test_format_resolution_order(own, top, inputs, expected):
    assert group(INT8_CHANNEL, inputs, fmt=own, top=top).format == expected


def test_top_level_format_is_used_even_if_it_does_not_fit():
    with pytest.raises(ValueError) as error:
        group(INT8_CHANNEL, TOKEN, top="pack-quantized")
    assert_refused(error, "input_activations")


@pytest.mark.parametrize("targets", [None, "Linear", [1], {"Linear": 1}])
def test_targets_must_be_a_list_of_strings(targets):
    with pytest.raises(ValueError) as error:
        group(INT4_GROUP, targets=targets)
    assert_refused(error, "targets")


def test_unknown_scheme_key_is_refused_unless_null():
    with pytest.raises(ValueError) as error:
        group(INT4_GROUP, rotation="hadamard")
    assert_refused(error, "rotation")
    with pytest.warns(UserWarning, match="rotation"):
        assert group(INT4_GROUP, rotation=None).kind == "wna16"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("W4A16", ("w4a16", "group", 128, True)),
        ("w4a16", ("w4a16", "group", 128, True)),
        ("W4A16_ASYM", ("w4a16", "group", 128, False)),
        ("w4a16_Asym", ("w4a16", "group", 128, False)),
        ("W8A16", ("w8a16", "group", 128, True)),
        ("W8A8", ("w8a8", "channel", None, True)),
        ("int8", ("w8a8", "channel", None, True)),
    ],
)
def test_presets(name, expected):
    scheme = parse_group(name, ["re:.*proj"], None)
    weights = scheme.weights
    assert (
        scheme.signature,
        weights.strategy,
        weights.group_size,
        weights.symmetric,
    ) == expected
    assert scheme.targets == ("re:.*proj",)
    if scheme.inputs is not None:
        assert scheme.inputs == QuantArgs(8, "int", True, "token", dynamic=True)


@pytest.mark.parametrize("name", ["W4A8", "W4AFP8", "W3A16", "FP8", "NVFP4", "UNQUANTIZED"])
def test_other_presets_are_refused(name):
    with pytest.raises(ValueError, match=f"'{name}'.*W4A16_ASYM"):
        parse_group(name, ["Linear"], None)


def test_preset_name_over_an_object_is_a_free_name():
    scheme = parse_group("W8A8", {"targets": ["Linear"], "weights": INT4_GROUP}, None)
    assert scheme.signature == "w4a16"


@pytest.mark.parametrize("raw", [None, 4, "Linear"])
def test_group_must_be_an_object_or_a_list(raw):
    with pytest.raises(ValueError) as error:
        parse_group("g7", raw, None)
    assert_refused(error, "scheme")


# --- against the library ------------------------------------------------------------------


def test_every_combination_is_judged_as_the_library_does():
    """The library of 0.20 dropped ``actorder: group``, so only ``weight`` is compared."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    strategies = [None, "tensor", "channel", "group", "BLOCK", "token", "tensor_group", "attn_head"]
    accepted = 0
    for strategy, size, dynamic, structure, order in itertools.product(
        strategies,
        [None, -2, -1, 0, 1, 128],
        [False, True, "local"],
        [None, [128, 128], "128x64", [128]],
        [None, False, "weight"],
    ):
        raw = {
            "strategy": strategy,
            "group_size": size,
            "dynamic": dynamic,
            "block_structure": structure,
            "actorder": order,
        }
        try:
            theirs = quantization.QuantizationArgs(**raw)
        except ValueError:
            with pytest.raises(ValueError):
                parse(**raw)
            continue
        ours = parse(**raw)
        accepted += 1
        assert (ours.strategy, ours.group_size) == (theirs.strategy, theirs.group_size), raw
        assert (ours.dynamic, ours.actorder) == (theirs.dynamic, theirs.actorder), raw
        assert list(ours.block_structure or []) == (theirs.block_structure or []), raw
    assert accepted > 100
