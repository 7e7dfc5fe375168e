"""Quantizing linear layers by rounding to nearest, and writing them as a checkpoint."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import nn

from pymllm.checkpoint.reader import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from pymllm.checkpoint.rounding import quantize_weight
from pymllm.layers.parameter import FLOAT_DTYPES
from pymllm_kernels import CHANNEL
from pymllm_kernels.common.packing import pack_words

LayerSource: TypeAlias = nn.Linear | torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]

_WEIGHT_BITS = {"W4A16": 4, "W8A16": 8, "W8A8": 8}
# The release of the compressed-tensors library whose layout is written.
_FORMAT_VERSION = "0.20.0"


def save_linears(
    layers: Mapping[str, LayerSource],
    checkpoint_dir: str | Path,
    *,
    scheme: str | Mapping[str, str] = "W4A16",
    group_size: int | None = 128,
    symmetric: bool = True,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Quantize layers and write them as a compressed-tensors checkpoint.

    Codes are rounded to nearest, scales are the range of a group or row over the range of the
    codes (compressed-tensors, how writers choose weight codes). Files are written beside their
    final names and renamed at the end, so that a failure leaves an earlier checkpoint as it was.

    Args:
        layers: layer name -> ``nn.Linear``, a weight ``[N, K]``, or ``(weight, bias or None)``.
        checkpoint_dir: folder to write ``config.json`` and ``model.safetensors`` into; created
            if needed.
        scheme: ``"W4A16"``, ``"W8A16"`` (packed weights, floating activations) or ``"W8A8"``
            (int8 weights and activations), or layer name -> one of these.
        group_size: inputs that share a scale in the weight-only schemes; None or -1 is one
            scale per output. W8A8 always has one scale per output.
        symmetric: whether the weight-only schemes go without zero points.
        dtype: dtype of weights before rounding, and of scales and biases; each layer's own if
            None.
        overwrite: whether an existing checkpoint may be replaced.

    Raises:
        ValueError: an argument is outside the format, a layer cannot be quantized that way
            (the message names it), or there is a checkpoint already.
    """
    directory = Path(checkpoint_dir)
    _check_target(directory, overwrite)
    schemes = _scheme_of_each(layers, scheme, symmetric)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype: found {dtype!r}, accepted {FLOAT_DTYPES}")
    if group_size is not None and group_size < 1 and group_size != CHANNEL:
        raise ValueError(f"group_size: found {group_size!r}, accepted a positive integer or -1")
    tensors: dict[str, torch.Tensor] = {}
    dtypes = []
    for name, source in layers.items():
        weight, bias = _weight_and_bias(name, source, dtype)
        _check_weight(name, weight, schemes[name], group_size)
        tensors |= _layer_tensors(name, weight, schemes[name], group_size or CHANNEL, symmetric)
        if bias is not None:
            tensors[f"{name}.bias"] = bias.clone()  # two layers may share one
        dtypes.append(weight.dtype)
    config = {
        "torch_dtype": str(dtypes[0]).removeprefix("torch."),
        "quantization_config": _quantization_config(schemes, group_size or CHANNEL, symmetric),
    }
    _write(directory, config, tensors)


def _check_target(directory: Path, overwrite: bool) -> None:
    if (directory / INDEX_NAME).exists():
        raise ValueError(
            f"{directory / INDEX_NAME}: found a sharded checkpoint, which is never replaced; "
            "expected another folder"
        )
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if (directory / name).exists() and not overwrite:
            raise ValueError(
                f"{directory / name}: found it already there; overwrite=True replaces it"
            )


def _scheme_of_each(
    layers: Mapping[str, LayerSource], scheme: str | Mapping[str, str], symmetric: bool
) -> dict[str, str]:
    if not layers:
        raise ValueError("layers: found none, expected at least one")
    for name in layers:
        if not name or name.startswith("re:"):
            raise ValueError(f"layers: found the name {name!r}, expected a dotted module name")
    if isinstance(scheme, str):
        schemes = dict.fromkeys(layers, scheme)
    else:
        if set(scheme) != set(layers):
            differing = sorted(set(scheme) ^ set(layers))
            raise ValueError(f"scheme: found other names than layers: {differing}")
        schemes = {name: scheme[name] for name in layers}
    for name, chosen in schemes.items():
        if chosen not in _WEIGHT_BITS:
            raise ValueError(
                f"scheme: found {chosen!r} for layer {name!r}, accepted {list(_WEIGHT_BITS)}"
            )
    if not symmetric and set(schemes.values()) == {"W8A8"}:
        raise ValueError("symmetric: found False, accepted True with W8A8")
    return schemes


def _weight_and_bias(
    name: str, source: LayerSource, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(source, nn.Linear):
        source = (source.weight, source.bias)
    elif isinstance(source, torch.Tensor):
        source = (source, None)
    if not (isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], torch.Tensor)):
        raise ValueError(
            f"layer {name!r}: found {type(source).__name__}, expected nn.Linear, a weight, or "
            "(weight, bias)"
        )
    weight, bias = source
    weight = weight.detach().cpu().to(dtype or weight.dtype)
    if bias is not None:
        bias = bias.detach().cpu().to(dtype or bias.dtype)
        if bias.shape != weight.shape[:1] or bias.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"layer {name!r}: bias: found {bias.dtype} {list(bias.shape)}, "
                f"expected floating {list(weight.shape[:1])}"
            )
    return weight, bias


def _check_weight(name: str, weight: torch.Tensor, scheme: str, group_size: int | None) -> None:
    if weight.dim() != 2 or 0 in weight.shape or weight.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"layer {name!r}: weight: found {weight.dtype} {list(weight.shape)}, expected "
            "bfloat16, float16 or float32 [N, K]"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"layer {name!r}: weight: found NaN or infinity, expected finite values")
    grouped = scheme != "W8A8" and group_size is not None and group_size > 0
    if grouped and weight.shape[1] % (group_size or 1):
        raise ValueError(
            f"layer {name!r}: group_size: found {group_size}, expected a divisor of the "
            f"{weight.shape[1]} inputs"
        )


def _layer_tensors(
    name: str, weight: torch.Tensor, scheme: str, group_size: int, symmetric: bool
) -> dict[str, torch.Tensor]:
    """The checkpoint tensors of one layer (compressed-tensors, ``pack-`` and ``int-quantized``)."""
    bits = _WEIGHT_BITS[scheme]
    if scheme == "W8A8":
        codes, scale, _ = quantize_weight(weight, bits, CHANNEL, symmetric=True)
        return {f"{name}.weight": codes, f"{name}.weight_scale": scale}
    codes, scale, zero = quantize_weight(weight, bits, group_size, symmetric=symmetric)
    tensors = {
        f"{name}.weight_packed": pack_words(_raw(codes, bits), bits),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }
    if zero is not None:
        words = pack_words(_raw(zero.T, bits).contiguous(), bits)
        tensors[f"{name}.weight_zero_point"] = words.T.contiguous()
    return tensors


def _raw(values: torch.Tensor, bits: int) -> torch.Tensor:
    return (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def _quantization_config(
    schemes: Mapping[str, str], group_size: int, symmetric: bool
) -> dict[str, Any]:
    used = list(dict.fromkeys(schemes.values()))
    groups = {}
    for number, scheme in enumerate(used):
        named = [name for name, chosen in schemes.items() if chosen == scheme]
        # One scheme covers every layer there is; several are told apart by exact names.
        targets = ["Linear"] if len(used) == 1 else named
        groups[f"group_{number}"] = _config_group(scheme, targets, group_size, symmetric)
    formats = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": [],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": _FORMAT_VERSION,
    }


def _config_group(
    scheme: str, targets: list[str], group_size: int, symmetric: bool
) -> dict[str, Any]:
    weight_only = scheme != "W8A8"
    grouped = weight_only and group_size != CHANNEL
    arguments = {"num_bits": _WEIGHT_BITS[scheme], "type": "int", "dynamic": False}
    weights = {
        **arguments,
        "symmetric": symmetric if weight_only else True,
        "strategy": "group" if grouped else "channel",
        "group_size": group_size if grouped else None,
    }
    inputs = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
        "group_size": None,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None if weight_only else inputs,
        "output_activations": None,
        "format": "pack-quantized" if weight_only else "int-quantized",
    }


def _write(directory: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    finals = [directory / WEIGHTS_NAME, directory / CONFIG_NAME]
    weights_temp, config_temp = temps = [path.with_name(f".{path.name}.{mark}") for path in finals]
    try:
        save_file(tensors, weights_temp, metadata={"format": "pt"})
        text = json.dumps(config, indent=2) + "\n"
        config_temp.write_text(text, encoding="utf-8")
        for temp in temps:
            with temp.open("rb") as file:
                os.fsync(file.fileno())
        for temp, final in zip(temps, finals, strict=True):
            temp.replace(final)
    finally:
        for temp in temps:
            temp.unlink(missing_ok=True)
