"""Config groups: which storage format applies, and which of them can be executed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pymllm.quantization.format.arguments import QuantArgs, Role, parse_arguments
from pymllm.quantization.format.errors import group_place, refusal

Kind = Literal["wna16", "w8a8_int8"]

WNA16_BITS = (4, 8)
_INT_FORMATS = ("int-quantized", "naive-quantized")
_READABLE_FORMATS = "pack-quantized, int-quantized or naive-quantized"
_SCHEME_KEYS = frozenset(
    ("targets", "weights", "input_activations", "output_activations", "format")
)

_INT4_GROUP_128 = {"num_bits": 4, "strategy": "group", "group_size": 128}
_PRESET_W8A8 = {
    "weights": {"num_bits": 8, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
}
_PRESETS: dict[str, dict[str, Any]] = {
    "W4A16": {"weights": _INT4_GROUP_128},
    "W4A16_ASYM": {"weights": {**_INT4_GROUP_128, "symmetric": False}},
    "W8A16": {"weights": {**_INT4_GROUP_128, "num_bits": 8}},
    "W8A8": _PRESET_W8A8,
    "INT8": _PRESET_W8A8,
}


@dataclass(frozen=True)
class LayerScheme:
    """How the linear layers of one config group are stored and computed.

    Attributes:
        group: name of the config group.
        kind: ``"wna16"`` (packed int weights, floating activations) or ``"w8a8_int8"``
            (int8 weights and int8 activations).
        weights: arguments of the weights.
        inputs: arguments of the input activations; None for ``"wna16"``.
        format: storage format of the group's tensors.
        targets: entries naming the group's layers, as written.
    """

    group: str
    kind: Kind
    weights: QuantArgs
    inputs: QuantArgs | None
    format: str
    targets: tuple[str, ...]

    @property
    def signature(self) -> str:
        """Short name of the arithmetic: ``"w4a16"``, ``"w8a16"`` or ``"w8a8"``."""
        input_bits = 16 if self.inputs is None else self.inputs.num_bits
        return f"w{self.weights.num_bits}a{input_bits}"

    def same_layout(self, other: LayerScheme) -> bool:
        """True when layers of both schemes can be stored and computed as one layer."""
        return (
            self.kind == other.kind
            and self.weights.layout == other.weights.layout
            and (self.inputs and self.inputs.layout) == (other.inputs and other.inputs.layout)
        )


def parse_group(group: str, raw: object, top_format: str | None) -> LayerScheme:
    """Read one entry of ``config_groups`` and classify it.

    Args:
        group: the entry's key.
        raw: its value: a scheme object, or a list of targets when the key is a preset name
            (compressed-tensors format, preset shorthand).
        top_format: the block's own ``format``, or None.

    Raises:
        ValueError: the entry is malformed or describes a scheme that cannot be executed; the
            message names group and field.
    """
    where = group_place(group)
    if isinstance(raw, (list, tuple)):
        preset = _PRESETS.get(group.upper())
        if preset is None:
            raise refusal(
                where,
                "preset name",
                group,
                f"{', '.join(_PRESETS)} (any letter case), or an object instead of a list",
            )
        raw = {"targets": raw, **preset}
    if not isinstance(raw, Mapping):
        raise refusal(where, "scheme", raw, "an object, or a list of targets under a preset name")
    _check_keys(where, raw)
    targets = string_list(where, "targets", raw.get("targets"))
    weights = _optional_arguments(raw, group, "weights")
    inputs = _optional_arguments(raw, group, "input_activations")
    outputs = _optional_arguments(raw, group, "output_activations")
    if weights is None:
        raise refusal(where, "weights", None, "an object with quantization arguments")
    if outputs is not None:
        raise refusal(where, "output_activations", raw["output_activations"], "null")
    storage = _storage_format(where, raw.get("format"), top_format, inputs)
    kind = _classify(where, weights, inputs, storage)
    return LayerScheme(group, kind, weights, inputs, storage, targets)


def string_list(where: str, field: str, raw: object) -> tuple[str, ...]:
    """Check that ``raw`` is a list of strings and return it as a tuple.

    Raises:
        ValueError: it is not; the message names ``where`` and ``field``.
    """
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise refusal(where, field, raw, "a list of strings")
    for entry in raw:
        if not isinstance(entry, str):
            raise refusal(where, field, entry, "strings only")
    return tuple(raw)


def _check_keys(where: str, raw: Mapping[str, Any]) -> None:
    for key in raw:
        if key in _SCHEME_KEYS:
            continue
        # `format` once came as a new key here and changed what is stored: a key that says
        # something is not safe to skip.
        if raw[key] is not None:
            raise refusal(where, str(key), raw[key], f"only the keys {sorted(_SCHEME_KEYS)}")
        warnings.warn(
            f"quantization config, {where}: null key outside the format, ignored: {key}",
            stacklevel=4,
        )


def _optional_arguments(raw: Mapping[str, Any], group: str, role: Role) -> QuantArgs | None:
    value = raw.get(role)
    return None if value is None else parse_arguments(value, group, role)


def _storage_format(
    where: str, group_format: object, top_format: str | None, inputs: QuantArgs | None
) -> str:
    if group_format == "mixed-precision":
        raise refusal(where, "format", group_format, _READABLE_FORMATS)
    chosen = group_format
    if chosen is None and top_format != "mixed-precision":
        chosen = top_format
    if chosen is None:
        chosen = "pack-quantized" if inputs is None else "int-quantized"
    if not isinstance(chosen, str):
        raise refusal(where, "format", chosen, _READABLE_FORMATS)
    return chosen


def _classify(where: str, weights: QuantArgs, inputs: QuantArgs | None, storage: str) -> Kind:
    if weights.type != "int":
        raise refusal(where, "weights.type", weights.type, "int")
    if inputs is not None and inputs.type != "int":
        raise refusal(where, "input_activations.type", inputs.type, "int")
    if storage == "pack-quantized":
        _check_wna16(where, weights, inputs)
        return "wna16"
    if storage in _INT_FORMATS:
        _check_w8a8_weights(where, weights, storage)
        _check_w8a8_inputs(where, inputs, storage)
        return "w8a8_int8"
    raise refusal(where, "format", storage, _READABLE_FORMATS)


def _check_wna16(where: str, weights: QuantArgs, inputs: QuantArgs | None) -> None:
    rule = "with format pack-quantized"
    if inputs is not None:
        raise refusal(where, "input_activations", inputs, f"null {rule}")
    if weights.num_bits not in WNA16_BITS:
        raise refusal(where, "weights.num_bits", weights.num_bits, f"4 or 8 {rule}")
    if weights.strategy not in ("group", "channel"):
        raise refusal(where, "weights.strategy", weights.strategy, f"group or channel {rule}")
    if weights.dynamic:
        raise refusal(where, "weights.dynamic", weights.dynamic, "false")


def _check_w8a8_weights(where: str, weights: QuantArgs, storage: str) -> None:
    rule = f"with format {storage}"
    if weights.num_bits != 8:
        raise refusal(where, "weights.num_bits", weights.num_bits, f"8 {rule}")
    if weights.strategy not in ("channel", "tensor"):
        raise refusal(where, "weights.strategy", weights.strategy, f"channel or tensor {rule}")
    if weights.dynamic:
        raise refusal(where, "weights.dynamic", weights.dynamic, "false")
    if not weights.symmetric:
        raise refusal(where, "weights.symmetric", False, f"true {rule}")


def _check_w8a8_inputs(where: str, inputs: QuantArgs | None, storage: str) -> None:
    rule = f"with format {storage}"
    if inputs is None:
        raise refusal(where, "input_activations", None, f"int8 arguments {rule}")
    if inputs.num_bits != 8:
        raise refusal(where, "input_activations.num_bits", inputs.num_bits, f"8 {rule}")
    if inputs.strategy not in ("token", "tensor"):
        raise refusal(
            where,
            "input_activations.strategy",
            inputs.strategy,
            f"token (dynamic) or tensor (static) {rule}",
        )
    if inputs.strategy == "tensor" and inputs.dynamic:
        raise refusal(
            where, "input_activations.dynamic", inputs.dynamic, "false with strategy tensor"
        )
