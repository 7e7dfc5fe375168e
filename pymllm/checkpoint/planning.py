"""From a checkpoint's headers to the layers that will be loaded, every one checked."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from pymllm.checkpoint.reader import CONFIG_NAME, Checkpoint, TensorInfo
from pymllm.layers.linear import Linear
from pymllm.layers.parameter import FLOAT_DTYPES, INTEGER_DTYPES
from pymllm.quantization.format import find_quantization_block
from pymllm.quantization.methods.compressed_tensors import CompressedTensorsConfig
from pymllm.quantization.schemes.common import choose_kernel
from pymllm_kernels import DeviceFacts, KernelChoice, LinearProblem, kernel_names

# Scales and zero points of a kv-cache, which belong to attention (compressed-tensors format).
KV_CACHE_TENSOR = re.compile(
    r"(^|\.)([qkv]_(scale|zero_point)|[kv]_proj\.output_(scale|zero_point))$"
)
# Embeddings are 2-D floating tensors too, and a class target does not mean them.
_EMBEDDING_LEAF = re.compile(r"embed|^(wte|wpe|shared)$")
_QUANTIZED_SUFFIXES = ("weight_scale", "weight_shape", "weight_g_idx", "weight_zero_point")
# First release that always writes a tensor. Before, zero points were left out when all 0 and group
# numbers when never set; a checkpoint without a version is older than 0.7.0, or of unknown age.
_ALWAYS_WRITTEN_SINCE = {"weight_zero_point": (0, 9, 3), "weight_g_idx": (0, 12, 0)}


@dataclass(frozen=True)
class LayerPlan:
    """A quantized layer found in a checkpoint, checked against its headers.

    Attributes:
        name: full dotted name.
        in_features: K.
        out_features: N.
        has_bias: whether the checkpoint has a bias for it.
        tensors: suffix -> description of the tensors to load.
        left_out: suffixes of tensors that an old release did not write, their values being
            known.
        params_dtype: expected dtype of activations.
        kernel_name: the kernel that was asked for, or None.
        problem: what the kernel is chosen for.
        choice: the kernel, with the reasons.
    """

    name: str
    in_features: int
    out_features: int
    has_bias: bool
    tensors: Mapping[str, TensorInfo]
    left_out: tuple[str, ...]
    params_dtype: torch.dtype
    kernel_name: str | None
    problem: LinearProblem
    choice: KernelChoice

    def build(self, config: CompressedTensorsConfig, device: torch.device | str) -> Linear:
        """The layer, with uninitialised parameters."""
        layer = Linear(
            self.in_features,
            self.out_features,
            self.has_bias,
            params_dtype=self.params_dtype,
            device=device,
            quant_config=config,
            prefix=self.name,
        )
        layer.kernel_name = self.kernel_name
        return layer


@dataclass(frozen=True)
class CheckpointPlan:
    """What a checkpoint would load.

    Attributes:
        config: its quantization.
        layers: the quantized linear layers, by name, numbers in numeric order.
        unquantized: names of layers that the config claims but that are stored plain.
    """

    config: CompressedTensorsConfig
    layers: tuple[LayerPlan, ...]
    unquantized: tuple[str, ...]


def plan_linears(
    checkpoint: Checkpoint,
    device: DeviceFacts,
    *,
    dtype: torch.dtype | str | None = None,
    kernel: str | None = None,
    strict: bool = False,
    names: Collection[str] | None = None,
) -> CheckpointPlan:
    """Find and check all quantized linear layers.

    Everything is checked from the files' headers. Of the tensors only those whose few values
    matter to the choice are read: stored shapes, group numbers, and tensors that the layer's
    scheme has no use for.

    Args:
        checkpoint: an open checkpoint.
        device: where the layers are to run; it need not be present.
        dtype: dtype of activations; the checkpoint's own, else bfloat16, if None.
        kernel: name of a kernel to force on the layers whose scheme it runs.
        strict: whether a layer that the config claims but that is stored plain is an error
            rather than a warning.
        names: only these layers.

    Raises:
        ValueError: the configuration or a layer is not as the format says, or no kernel runs
            it; the message names layer, tensor, what was found and what was expected.
    """
    if kernel is not None and kernel not in kernel_names():
        raise ValueError(f"kernel: found {kernel!r}, accepted {kernel_names()}")
    block = _block_of(checkpoint)
    config = CompressedTensorsConfig.from_config(block)
    modules = _chosen(checkpoint.modules(), names)
    planner = _Planner(
        checkpoint,
        config,
        optional_tensors(block.get("version")),
        activation_dtype(checkpoint.config, dtype),
        device,
        kernel,
    )
    layers, plain = [], []
    for name, tensors in sorted(modules.items(), key=lambda item: _natural(item[0])):
        if planner.is_quantized(name, tensors):
            layers.append(planner.plan(name, tensors))
        elif planner.is_claimed(name, tensors):
            plain.append(name)
    found = {layer.name for layer in layers} | set(plain)
    for name in modules if names is not None else ():
        if name not in found:
            raise ValueError(f"names: found {name!r}, which is not a quantized linear layer")
    if plain:
        told = (
            f"{checkpoint.directory}: the quantization config claims layers that are stored "
            f"without quantization: {', '.join(plain)}"
        )
        if strict:
            raise ValueError(told)
        warnings.warn(told, stacklevel=3)
    return CheckpointPlan(config, tuple(layers), tuple(plain))


def _block_of(checkpoint: Checkpoint) -> dict[str, Any]:
    block = find_quantization_block(checkpoint.config)
    if block is None:
        raise ValueError(
            f"{checkpoint.directory / CONFIG_NAME}: found no quantization_config, "
            "expected one of compressed-tensors"
        )
    return block


def activation_dtype(config: Mapping[str, Any], dtype: torch.dtype | str | None) -> torch.dtype:
    """``dtype`` if given, else ``dtype`` or ``torch_dtype`` of a ``config.json``, else bfloat16.

    Raises:
        ValueError: it is not bfloat16, float16 or float32.
    """
    found: object = dtype
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            found = place.get(key) if found is None else found
    if found is None:
        return torch.bfloat16
    parsed = getattr(torch, found.removeprefix("torch."), None) if isinstance(found, str) else found
    if parsed not in FLOAT_DTYPES:
        raise ValueError(f"dtype: found {found!r}, accepted {FLOAT_DTYPES}")
    return parsed


def optional_tensors(version: object) -> frozenset[str]:
    """Suffixes of tensors that a library of this version left out where they say nothing."""
    parts = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(version or "0.0"))
    if parts is None:
        return frozenset()
    numbers = tuple(int(part or 0) for part in parts.groups())
    return frozenset(suffix for suffix, first in _ALWAYS_WRITTEN_SINCE.items() if numbers < first)


@dataclass(frozen=True)
class _Planner:
    checkpoint: Checkpoint
    config: CompressedTensorsConfig
    optional: frozenset[str]
    act_dtype: torch.dtype
    device: DeviceFacts
    kernel: str | None

    def is_quantized(self, name: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether a module's tensors are those of a quantized layer.

        Raises:
            ValueError: some are, but the weight itself is missing or there twice.
        """
        weight, packed = tensors.get("weight"), tensors.get("weight_packed")
        if weight is not None and packed is not None:
            raise ValueError(
                f"layer {name!r}: found both weight and weight_packed, expected one of them"
            )
        if weight is None and packed is None:
            for suffix in _QUANTIZED_SUFFIXES:
                if suffix in tensors:
                    raise ValueError(
                        f"layer {name!r}: weight_packed or weight: found none, expected one: "
                        f"the layer has {sorted(tensors)}"
                    )
            return False
        return packed is not None or (weight is not None and not weight.dtype.is_floating_point)

    def is_claimed(self, name: str, tensors: Mapping[str, TensorInfo]) -> bool:
        """Whether the config claims a module that is stored without quantization.

        Raises:
            ValueError: the module is fake-quantized: plain weight with scales.
        """
        weight = tensors.get("weight")
        if weight is None or self.config.resolve(name) is None:
            return False
        if "weight_scale" in tensors:
            raise ValueError(
                f"layer {name!r}: weight: found {weight.dtype} beside weight_scale, expected "
                "quantized codes: the checkpoint was saved before compression"
            )
        return len(weight.shape) == 2 and not _EMBEDDING_LEAF.search(name.rpartition(".")[2])

    def plan(self, name: str, tensors: Mapping[str, TensorInfo]) -> LayerPlan:
        """Check one quantized layer.

        Raises:
            ValueError: it is not what the config says.
        """
        stored = "weight_packed" if "weight_packed" in tensors else "weight"
        info = tensors[stored]
        found = f"layer {name!r}: {stored}: found {info.dtype} {list(info.shape)}"
        scheme = self.config.resolve(name)
        if scheme is None:
            raise ValueError(
                f"{found}, expected a floating weight: the quantization config does not claim "
                "this layer"
            )
        if len(info.shape) != 2:
            raise ValueError(f"{found}, expected 2 dimensions: stacked experts are not supported")
        expected = "weight_packed" if scheme.kind == "wna16" else "weight"
        if stored != expected:
            raise ValueError(
                f"{found}, expected {expected}: group {scheme.group!r} says {scheme.format}"
            )
        n, k = self._stored_shape(name, tensors) if stored == "weight_packed" else info.shape
        tensors = {
            suffix: info
            for suffix, info in tensors.items()
            if not KV_CACHE_TENSOR.search(f"{name}.{suffix}")
        }
        return self._compare(name, n, k, tensors)

    def _stored_shape(self, name: str, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
        # The packed width does not give K where the last word is not full.
        info = tensors.get("weight_shape")
        if info is None:
            raise ValueError(f"layer {name!r}: weight_shape: found none, expected int64 [2]")
        values: list[int] = []
        if info.shape == (2,) and info.dtype in INTEGER_DTYPES:
            values = self.checkpoint.read(f"{name}.weight_shape").tolist()
        if len(values) != 2 or min(values) < 1:
            raise ValueError(
                f"layer {name!r}: weight_shape: found {info.dtype} {list(info.shape)} {values}, "
                "expected int64 [2] with positive values"
            )
        return values[0], values[1]

    def _compare(self, name: str, n: int, k: int, tensors: Mapping[str, TensorInfo]) -> LayerPlan:
        """Compare a layer's headers with the parameters that its scheme creates."""
        has_bias = "bias" in tensors
        layer = Linear(
            k,
            n,
            has_bias,
            params_dtype=self.act_dtype,
            device="meta",
            quant_config=self.config,
            prefix=name,
        )
        method: Any = layer.quant_method
        for suffix, info in tensors.items():
            layer.check_tensor(suffix, info.dtype, info.shape)
        left_out = []
        for suffix, _ in layer.missing_tensors():
            if suffix in tensors:
                continue
            if suffix not in self.optional:
                raise ValueError(
                    f"layer {name!r}: {suffix}: found none, expected one: the layer has "
                    f"{sorted(tensors)}"
                )
            left_out.append(suffix)
            method.scheme.fill_left_out(layer, suffix)
        useful = {}
        for suffix, info in tensors.items():
            has_place = suffix in layer._parameters
            if suffix == "weight_g_idx" or not has_place:
                layer.load_tensor(suffix, self.checkpoint.read(f"{name}.{suffix}"))
            if has_place:
                useful[suffix] = info
        problem = replace(
            method.scheme.problem_of(layer, self.device),
            scale_dtype=tensors["weight_scale"].dtype,
        )
        forced = self.kernel if self.kernel in kernel_names(problem.scheme) else None
        choice = choose_kernel(layer, problem, forced)
        return LayerPlan(
            name, k, n, has_bias, useful, tuple(left_out), self.act_dtype, forced, problem, choice
        )  # fmt: skip


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _chosen(
    modules: dict[str, dict[str, TensorInfo]], names: Collection[str] | None
) -> dict[str, dict[str, TensorInfo]]:
    if names is None:
        return modules
    names = {names} if isinstance(names, str) else names
    for name in names:
        if name not in modules:
            raise ValueError(f"names: found {name!r}, expected layers of the checkpoint")
    return {name: tensors for name, tensors in modules.items() if name in names}
