"""Finding and reading the quantization block (compressed-tensors format, top level)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pymllm.quantization.format.errors import group_place, refusal
from pymllm.quantization.format.matching import EntryList
from pymllm.quantization.format.scheme import LayerScheme, parse_group, string_list

METHOD_NAME = "compressed-tensors"
_LEGACY_METHOD_NAME = "sparseml"
_PLACE = "top level"
_REWRITING_FORMATS = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24")


@dataclass(frozen=True)
class QuantBlock:
    """A checked quantization block.

    Attributes:
        schemes: one entry per config group, in the order of the block.
        ignore: entries of layers that stay unquantized, as written.
        format: top-level ``format`` as written, or None.
        version: library release that wrote the block, or None; informational.
        targets: all targets of all groups, compiled.
        ignored: ``ignore``, compiled.
        scheme_by_target: target entry -> scheme of the last group that lists it.
    """

    schemes: tuple[LayerScheme, ...]
    ignore: tuple[str, ...]
    format: str | None
    version: str | None
    targets: EntryList
    ignored: EntryList
    scheme_by_target: Mapping[str, LayerScheme]


def find_quantization_block(config_json: Mapping[str, Any]) -> dict[str, Any] | None:
    """Quantization block of a parsed ``config.json``, or None when there is none.

    Looks at ``quantization_config``, ``text_config.quantization_config``,
    ``compression_config`` and ``text_config.compression_config``, in this order, and takes a
    block out of its legacy wrapper (compressed-tensors format, finding the configuration).
    The block may belong to another quantization method: its ``quant_method`` says so.

    Raises:
        ValueError: the value found is not a JSON object.
    """
    text_config = config_json.get("text_config")
    nested = text_config if isinstance(text_config, Mapping) else {}
    for place, key, prefix in (
        (config_json, "quantization_config", ""),
        (nested, "quantization_config", "text_config."),
        (config_json, "compression_config", ""),
        (nested, "compression_config", "text_config."),
    ):
        found = place.get(key)
        if found is None or found == {}:
            continue
        if not isinstance(found, Mapping):
            raise refusal("config.json", prefix + key, found, "an object")
        return _unwrapped(found)
    return None


def parse_block(raw: Mapping[str, Any]) -> QuantBlock:
    """Read and check a quantization block; unknown top-level keys are ignored.

    ``quantization_status`` decides nothing (published checkpoints carry several values over
    the same tensors) and ``kv_cache_scheme`` concerns attention only.

    Raises:
        ValueError: another quantization method, sparse storage, transforms, a group that
            cannot be executed, or a malformed value; the message names group and field.
    """
    if not isinstance(raw, Mapping):
        raise refusal(_PLACE, "block", raw, "an object")
    block = _unwrapped(raw)
    _check_method(block.get("quant_method"))
    top_format = _optional_string(block, "format")
    if top_format in _REWRITING_FORMATS:
        raise refusal(_PLACE, "format", top_format, "a format without sparsity")
    _check_sparsity(block.get("sparsity_config"))
    _check_transforms(block.get("transform_config"))
    groups = block.get("config_groups")
    if not isinstance(groups, Mapping):
        raise refusal(_PLACE, "config_groups", groups, "an object of groups (it may be empty)")
    schemes = tuple(parse_group(str(name), raw, top_format) for name, raw in groups.items())
    ignore = block.get("ignore")
    ignore = () if ignore is None else string_list(_PLACE, "ignore", ignore)
    for scheme in schemes:  # the joint list below no longer knows which group wrote an entry
        EntryList(scheme.targets, group_place(scheme.group), "targets")
    by_target = {target: scheme for scheme in schemes for target in scheme.targets}
    return QuantBlock(
        schemes=schemes,
        ignore=ignore,
        format=top_format,
        version=_optional_string(block, "version"),
        targets=EntryList(by_target, _PLACE, "targets"),
        ignored=EntryList(ignore, _PLACE, "ignore"),
        scheme_by_target=by_target,
    )


def _unwrapped(block: Mapping[str, Any]) -> dict[str, Any]:
    """Take a block out of its legacy wrapper; other blocks come back as they are.

    The wrapper's sparsity and transform keys describe the same weights, so they come along.
    """
    inner = block.get("quantization_config")
    if not isinstance(inner, Mapping):
        return dict(block)
    unwrapped = dict(inner)
    for key in ("sparsity_config", "transform_config"):
        if not unwrapped.get(key) and block.get(key):
            unwrapped[key] = block[key]
    method = unwrapped.get("quant_method") or block.get("quant_method")
    if method is not None:
        is_legacy = _normalised(method) == _LEGACY_METHOD_NAME
        unwrapped["quant_method"] = METHOD_NAME if is_legacy else method
    return unwrapped


def _normalised(method: object) -> object:
    if not isinstance(method, str):
        return method
    return method.lower().replace("compressed_tensors", METHOD_NAME)


def _check_method(method: object) -> None:
    # Absent is fine: whoever chose this reader has read the name elsewhere.
    if method is not None and _normalised(method) != METHOD_NAME:
        raise refusal(_PLACE, "quant_method", method, METHOD_NAME)


def _optional_string(block: Mapping[str, Any], key: str) -> str | None:
    value = block.get(key)
    if value is not None and not isinstance(value, str):
        raise refusal(_PLACE, key, value, "a string or null")
    return value


def _check_sparsity(config: object) -> None:
    if config is None or config == {}:
        return
    if not isinstance(config, Mapping):
        raise refusal(_PLACE, "sparsity_config", config, "an object or null")
    if config.get("format") != "dense":
        raise refusal(_PLACE, "sparsity_config.format", config.get("format"), "dense")


def _check_transforms(config: object) -> None:
    if config in (None, {}, {"config_groups": {}}, {"config_groups": None}):
        return
    raise refusal(
        _PLACE,
        "transform_config",
        config,
        "null or empty: the weights were transformed and inputs may need the same",
    )
