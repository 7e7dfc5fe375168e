"""Weights of 4 or 8 bits, packed, with floating activations (``pack-quantized``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pymllm.layers.parameter import (
    DtypeRule,
    Form,
    GroupIndex,
    PackedZeroPoints,
    Rows,
    StoredShape,
    place_of,
    raw_zero_points,
)
from pymllm.quantization.marlin import SCALAR_TYPE_UINT4, SCALAR_TYPE_UINT4B8, ScalarType
from pymllm.quantization.schemes.act_order import check_groups, is_neighbours, is_set
from pymllm.quantization.schemes.common import (
    LinearScheme,
    choose_kernel,
    install,
    is_processed,
    require_loaded,
    start_layer,
)
from pymllm_kernels import (
    CHANNEL,
    DeviceFacts,
    KernelChoice,
    LinearProblem,
    W4A16Weight,
    device_facts,
)
from pymllm_kernels.common.packing import words_per_line

SCALAR_TYPE_UINT8 = ScalarType("uint8", exponent=0, mantissa=8, signed=False)
SCALAR_TYPE_UINT8B128 = ScalarType("uint8b128", exponent=0, mantissa=8, signed=False, bias=128)

# (bits, symmetric) -> number format of a stored code.
_QUANT_TYPES = {
    (4, True): SCALAR_TYPE_UINT4B8,
    (4, False): SCALAR_TYPE_UINT4,
    (8, True): SCALAR_TYPE_UINT8B128,
    (8, False): SCALAR_TYPE_UINT8,
}
_ACTORDERS = {
    None: None, False: None, "weight": "weight", "static": "weight",
    "group": "group", "dynamic": "group", True: "group",
}  # fmt: skip
_STORED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
# The kernel that keeps the checkpoint's own tensors, so that another kernel can start from them.
_CHECKPOINT_LAYOUT_KERNEL = "torch_w4a16"


class CompressedTensorsWNA16Scheme(LinearScheme):
    """Packed integer weights with a scale per group or per output (compressed-tensors format).

    Attributes:
        weight_bits: 4 or 8.
        group_size: inputs that share a scale, -1 for one scale per output.
        symmetric: whether there are no zero points.
        actorder: ``"group"`` when ``weight_g_idx`` gives the group of each input; ``"weight"``
            or None leave no trace in the tensors.
        pack_factor: codes in a 32-bit word.
        quant_type: number format of a stored code.
    """

    def __init__(
        self,
        *,
        weight_bits: int,
        group_size: int | None,
        symmetric: bool,
        actorder: str | bool | None,
    ) -> None:
        """Check and keep the arguments; None, 0 and -1 all mean one scale per output.

        Raises:
            ValueError: a value, or the combination, is outside the scheme.
        """
        if weight_bits not in (4, 8):
            raise ValueError(f"weight_bits: found {weight_bits!r}, accepted 4 or 8")
        if group_size is not None and group_size < -1:
            raise ValueError(
                f"group_size: found {group_size!r}, accepted a positive integer, or None, 0 or -1"
            )
        if actorder not in _ACTORDERS:
            raise ValueError(f"actorder: found {actorder!r}, accepted {list(_ACTORDERS)}")
        self.weight_bits = weight_bits
        self.group_size = group_size or CHANNEL
        self.symmetric = symmetric
        self.actorder = _ACTORDERS[actorder]
        self.pack_factor = 32 // weight_bits
        self.quant_type = _QUANT_TYPES[weight_bits, symmetric]
        if self.actorder == "group" and self.group_size == CHANNEL:
            raise ValueError(f"actorder: found {actorder!r}, accepted only with a group size")

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's tensors.

        With b bits, K inputs, N outputs and G groups: ``weight_packed`` int32
        ``[N, ceil(K b / 32)]``, ``weight_scale`` ``[N, G]``, ``weight_shape`` int64 ``[2]``, if
        asymmetric ``weight_zero_point`` int32 ``[ceil(N b / 32), G]`` (every logical weight
        starts a word), if actorder is ``"group"`` ``weight_g_idx`` int32 ``[K]``.

        Raises:
            ValueError: the group size does not divide K; the message names the layer.
        """
        n, k, bits = sum(output_partition_sizes), input_size_per_partition, self.weight_bits
        groups = self._groups(layer, k)
        # [G, N] in memory: the kernels' own order, which saves a copy when they are prepared.
        scale = torch.empty(groups, n, dtype=params_dtype).T
        packing = {"packed_factor": self.pack_factor}
        params: dict[str, Any] = {
            "weight_packed": (
                torch.empty(n, words_per_line(k, bits), dtype=torch.int32),
                Rows(0),
                {"output_dim": 0, "input_dim": 1, "packed_dim": 1, **packing},
            ),
            "weight_scale": (
                scale,
                Rows(0, DtypeRule.ADOPT, squeezable=groups == 1),
                {"output_dim": 0, "input_dim": 1},
            ),
            "weight_shape": (torch.tensor([n, k]), StoredShape(k), {}),
        }
        if not self.symmetric:
            words = sum(words_per_line(size, bits) for size in output_partition_sizes)
            params["weight_zero_point"] = (
                torch.empty(words, groups, dtype=torch.int32),
                PackedZeroPoints(bits),
                {"output_dim": 0, "input_dim": 1, "packed_dim": 0, **packing},
            )
        if self.actorder == "group":
            params["weight_g_idx"] = (
                torch.full((k,), -1, dtype=torch.int32),
                GroupIndex(group_size=self.group_size),
                {"input_dim": 0},
            )
        start_layer(layer, params_dtype, k, output_partition_sizes, params, extra_weight_attrs)

    def problem_of(self, layer: nn.Module, device: DeviceFacts | None = None) -> LinearProblem:
        """The problem of a layer that has not been processed, on ``device`` or where it is."""
        owner: Any = layer
        return LinearProblem(
            scheme="w4a16",
            n=sum(owner.output_partition_sizes),
            k=owner.input_size_per_partition,
            weight_bits=self.weight_bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            act_order=self._group_index(layer) is not None,
            act_dtype=owner.params_dtype,
            scale_dtype=owner.weight_scale.dtype,
            device=device or device_facts(owner.weight_packed.device),
        )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Choose the kernel and convert the loaded tensors for it; a second call does nothing.

        Beside the result, device memory holds the packed weight being converted and a few
        percent of it.

        Raises:
            ValueError: stored shape, zero points or group numbers are not possible, or no
                kernel runs the layer; the message names the layer.
        """
        if is_processed(layer):
            return
        require_loaded(layer)
        owner: Any = layer
        problem = self.problem_of(layer)
        self._check_stored_shape(layer)
        zero = self._zero_points(layer)
        g_idx = self._group_index(layer)
        choice = choose_kernel(layer, problem, owner.kernel_name)
        self._prepare(
            layer, problem, choice, owner.weight_packed.data, owner.weight_scale.data, zero, g_idx
        )

    def weight_of(self, layer: nn.Module) -> W4A16Weight:
        """The prepared weight that the kernel's ``apply`` takes."""
        params: Any = layer._parameters
        return W4A16Weight(
            params["weight_packed"],
            params["weight_scale"],
            params["weight_zero_point"],
            params["weight_group_index"],
            params["input_perm"],
        )

    def fill_left_out(self, layer: nn.Module, name: str, index: int | None = None) -> None:
        """Load what an absent tensor stands for: zero points of 0, or unset group numbers.

        Args:
            layer: an unprocessed layer.
            name: ``weight_zero_point`` or ``weight_g_idx``.
            index: number of a logical weight, or None for all.
        """
        owner: Any = layer
        param = layer._parameters[name]
        values = torch.full((owner.input_size_per_partition,), -1, dtype=torch.int32)
        if name == "weight_zero_point":
            sizes, groups = owner.output_partition_sizes, owner.weight_scale.shape[1]
            count = sum(sizes) if index is None else sizes[index]
            values = torch.zeros(count, groups, dtype=torch.int8)
        owner.weight_loader(param, values, index)

    def stray_forms(self, layer: nn.Module, name: str, index: int | None) -> Sequence[Form]:
        """Zero points of a symmetric layer, group numbers where groups are neighbours."""
        owner: Any = layer
        k, sizes = owner.input_size_per_partition, owner.output_partition_sizes
        groups = self._groups(layer, k)
        if name == "weight_zero_point" and self.symmetric:
            count = sum(sizes) if index is None else sizes[index]
            words = words_per_line(count, self.weight_bits)
            return Form((torch.int32,), (words, groups)), Form((torch.int8,), (count, groups))
        if name == "weight_g_idx" and self.actorder != "group":
            return (Form((torch.int32, torch.int64), (k,)),)
        return ()

    def check_stray(
        self, layer: nn.Module, name: str, loaded: torch.Tensor, index: int | None
    ) -> None:
        """Accept zero points that are all 0, and group numbers that are ``k // g`` or unset.

        Raises:
            ValueError: the values would change the layer's output.
        """
        owner: Any = layer
        if name == "weight_zero_point":
            sizes = owner.output_partition_sizes
            count = sum(sizes) if index is None else sizes[index]
            half = 1 << (self.weight_bits - 1)
            if bool((raw_zero_points(loaded, self.weight_bits, count) != half).any()):
                raise ValueError(
                    "found zero points other than 0, expected none: the scheme is symmetric"
                )
        elif is_set(loaded):
            size = owner.input_size_per_partition if self.group_size < 0 else self.group_size
            if not is_neighbours(loaded, size):
                raise ValueError(
                    f"found groups in activation order, expected k // {size}: the scheme's "
                    f"actorder is {self.actorder!r}"
                )

    def choice_after_move(self, layer: nn.Module, device: torch.device) -> KernelChoice:
        """The kernel that would run a processed layer on another device.

        A layer in the checkpoint's layout gets the best kernel there; any other keeps its own.

        Raises:
            ValueError: its kernel does not run there.
        """
        owner: Any = layer
        name = owner.kernel_choice.kernel.name
        if name == _CHECKPOINT_LAYOUT_KERNEL:
            return super().choice_after_move(layer, device)
        problem = dataclasses.replace(owner.problem, device=device_facts(device))
        reason = owner.kernel_choice.kernel.why_not(problem)
        if reason is not None:
            raise ValueError(
                f"{place_of(layer)}: found weights converted for {name} on "
                f"{owner.problem.device.name}, which does not run on {device} ({reason}); "
                f"load the checkpoint with device={str(device)!r}"
            )
        return choose_kernel(layer, problem, name)

    def finish_move(self, layer: nn.Module, choice: KernelChoice) -> None:
        """Convert the moved tensors for ``choice`` if they are in the checkpoint's layout."""
        owner: Any = layer
        if owner.kernel_choice.kernel.name != _CHECKPOINT_LAYOUT_KERNEL:
            super().finish_move(layer, choice)
            return
        words, scale, zero, g_idx, _ = self.weight_of(layer)
        problem = dataclasses.replace(owner.problem, device=device_facts(words.device))
        self._prepare(layer, problem, choice, words, scale, zero, g_idx)

    def _prepare(
        self,
        layer: nn.Module,
        problem: LinearProblem,
        choice: KernelChoice,
        words: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        g_idx: torch.Tensor | None,
    ) -> None:
        kernel: Any = choice.kernel
        try:
            weight = kernel.prepare(problem, words, scale, zero, g_idx)
        except ValueError as error:
            raise ValueError(f"{place_of(layer)}: {error}") from None
        prepared = {
            "weight_packed": weight.weight,
            # Contiguous, so that safetensors can save a state dict.
            "weight_scale": weight.scale.contiguous(),
            "weight_zero_point": None if weight.zero is None else weight.zero.contiguous(),
            "weight_group_index": weight.group_index,
            "input_perm": weight.input_perm,
        }
        install(layer, _STORED, prepared)
        self.set_kernel(layer, problem, choice)

    def _groups(self, layer: nn.Module, k: int) -> int:
        if self.group_size == CHANNEL:
            return 1
        if k % self.group_size:
            raise ValueError(
                f"{place_of(layer)}: group_size: found {self.group_size}, "
                f"expected a divisor of the {k} inputs"
            )
        return k // self.group_size

    def _check_stored_shape(self, layer: nn.Module) -> None:
        owner: Any = layer
        expected = [sum(owner.output_partition_sizes), owner.input_size_per_partition]
        found = owner.weight_shape.tolist()
        if found != expected:
            raise ValueError(
                f"{place_of(layer)}: weight_shape: found values {found}, expected {expected}"
            )

    def _zero_points(self, layer: nn.Module) -> torch.Tensor | None:
        """Raw zero points uint8 ``[N, G]``, ``[G, N]`` in memory; None if symmetric."""
        owner: Any = layer
        stored = layer._parameters.get("weight_zero_point")
        if stored is None:
            return None
        sizes, bits = owner.output_partition_sizes, self.weight_bits
        try:
            if self.symmetric:
                self.check_stray(layer, "weight_zero_point", stored.data, None)
                return None
            if stored.dtype == torch.int8:
                return raw_zero_points(stored.data, bits, sum(sizes)).contiguous().T
            shards = torch.split(stored.data, [words_per_line(size, bits) for size in sizes])
            codes = [
                raw_zero_points(words, bits, size)
                for words, size in zip(shards, sizes, strict=True)
            ]
        except ValueError as error:
            raise ValueError(f"{place_of(layer)}: weight_zero_point: {error}") from None
        return torch.cat(codes, dim=1).T

    def _group_index(self, layer: nn.Module) -> torch.Tensor | None:
        """Group of each input, or None where groups are neighbouring inputs."""
        g_idx = layer._parameters.get("weight_g_idx")
        if self.actorder != "group" or g_idx is None or not is_set(g_idx):
            return None
        try:
            check_groups(g_idx, self.group_size)
        except ValueError as error:
            raise ValueError(f"{place_of(layer)}: weight_g_idx: {error}") from None
        return None if is_neighbours(g_idx, self.group_size) else g_idx.data
