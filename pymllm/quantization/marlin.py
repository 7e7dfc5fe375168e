"""Constraints and layout helpers of the Marlin kernel family.

No Marlin kernel is part of this package. These helpers prepare tensors for one, and check
beforehand whether it would take them. All are plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MARLIN_SUPPORTED_GROUP_SIZES = [-1, 32, 64, 128]
"""Group sizes the kernels take; -1 is one scale per output channel."""

GPTQ_MARLIN_MIN_THREAD_N = 64
"""Outputs per thread block: N must be a multiple."""

GPTQ_MARLIN_MIN_THREAD_K = 128
"""Inputs per thread block: K must be a multiple."""

GPTQ_MARLIN_TILE = 16
"""Side of the square tile that weights are repacked in."""

_MARLIN_MIN_CAPABILITY = (8, 0)
_NAN_REPR_IEEE_754 = 1


@dataclass(frozen=True)
class ScalarType:
    """A number format, described the way Marlin's C++ ``ScalarType`` does.

    Attributes:
        name: C++ spelling; ``b8`` stands for a bias of 8.
        exponent: width of the exponent in bits, 0 for integers.
        mantissa: width of the mantissa in bits; for integers all value bits.
        signed: True when there is a sign bit.
        bias: stored value minus represented value.
        finite_values_only: True for floats without infinities.
    """

    name: str
    exponent: int
    mantissa: int
    signed: bool
    bias: int = 0
    finite_values_only: bool = False

    @property
    def size_bits(self) -> int:
        """Width of one value in bits."""
        return self.exponent + self.mantissa + int(self.signed)

    @property
    def id(self) -> int:
        """The integer a kernel receives.

        Bits 0-7 exponent, 8-15 mantissa, 16 signed, 17-48 bias, 49 finite-values-only,
        50-57 NaN representation (1, the IEEE 754 one, for every integer type).
        """
        return (
            self.exponent
            | self.mantissa << 8
            | int(self.signed) << 16
            | (self.bias & 0xFFFFFFFF) << 17
            | int(self.finite_values_only) << 49
            | _NAN_REPR_IEEE_754 << 50
        )

    def __str__(self) -> str:
        return self.name


SCALAR_TYPE_UINT4 = ScalarType("uint4", exponent=0, mantissa=4, signed=False)
"""Unsigned 4-bit codes, used with stored zero points."""

SCALAR_TYPE_UINT4B8 = ScalarType("uint4b8", exponent=0, mantissa=4, signed=False, bias=8)
"""Unsigned 4-bit codes with an implied zero point of 8 (symmetric weights)."""


def verify_marlin_supported(group_size: int) -> None:
    """Check that Marlin takes this group size and runs on the current GPU.

    Without a CUDA device only the group size is checked.

    Args:
        group_size: inputs that share a scale, or -1 for one scale per output channel.

    Raises:
        ValueError: another group size, or a current CUDA device older than sm_80.
    """
    if group_size not in MARLIN_SUPPORTED_GROUP_SIZES:
        raise ValueError(
            f"group_size: found {group_size}; accepted by Marlin: {MARLIN_SUPPORTED_GROUP_SIZES}"
        )
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < _MARLIN_MIN_CAPABILITY:
            major, minor = capability
            raise ValueError(
                f"compute capability: found {major}.{minor} "
                f"({torch.cuda.get_device_name()}); accepted by Marlin: 8.0 and above"
            )


def verify_marlin_supports_shape(
    output_size_per_partition: int,
    input_size_per_partition: int,
    input_size: int,
    group_size: int,
) -> None:
    """Check that Marlin takes a (possibly sharded) weight of this shape.

    Args:
        output_size_per_partition: N of this rank's weight.
        input_size_per_partition: K of this rank's weight.
        input_size: K of the whole layer.
        group_size: inputs that share a scale, or -1 for one scale per output channel.

    Raises:
        ValueError: N is no multiple of 64, K no multiple of 128, or a scale group would
            straddle two ranks; the message names the argument, its value and the accepted ones.
    """
    for name, size in (
        ("output_size_per_partition", output_size_per_partition),
        ("input_size_per_partition", input_size_per_partition),
        ("input_size", input_size),
    ):
        if size < 1:
            raise ValueError(f"{name}: found {size}; accepted: a positive integer")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size: found {group_size}; accepted: -1 or a positive integer")
    _require_multiple(
        "output_size_per_partition", output_size_per_partition, GPTQ_MARLIN_MIN_THREAD_N
    )
    _require_multiple(
        "input_size_per_partition", input_size_per_partition, GPTQ_MARLIN_MIN_THREAD_K
    )
    if group_size != -1 and group_size < input_size:
        _require_multiple(
            "input_size_per_partition", input_size_per_partition, group_size, " (group_size)"
        )


def _require_multiple(name: str, size: int, unit: int, origin: str = "") -> None:
    if size % unit != 0:
        raise ValueError(f"{name}: found {size}; accepted by Marlin: multiples of {unit}{origin}")


def marlin_make_workspace(device: torch.device) -> torch.Tensor:
    """Zeroed lock array a Marlin kernel synchronizes its thread blocks with.

    Returns:
        int32 tensor on ``device``, one element per streaming multiprocessor.

    Raises:
        ValueError: ``device`` is not a CUDA device.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device: found {str(device)!r}; accepted: a CUDA device")
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return torch.zeros(sms, dtype=torch.int32, device=device)


def marlin_make_empty_g_idx(device: torch.device) -> torch.Tensor:
    """Stand-in for the ``g_idx`` of a layer without activation ordering.

    Returns:
        int32 parameter of shape ``[0]`` on ``device``, without gradient.
    """
    empty = torch.empty(0, dtype=torch.int32, device=device)
    return torch.nn.Parameter(empty, requires_grad=False)


def get_scale_perms() -> tuple[list[int], list[int]]:
    """Column orders in which Marlin reads scales.

    Returns:
        The order within 64 columns for grouped scales (the transpose of an 8 x 8 square), and
        the order within 32 columns for one scale per channel (the columns that the four
        threads of a tensor-core fragment row hold: pairs at 0, 8, 16 and 24).
    """
    grouped = [i + 8 * j for i in range(8) for j in range(8)]
    channel = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return grouped, channel


def marlin_permute_scales(
    s: torch.Tensor, size_k: int, size_n: int, group_size: int
) -> torch.Tensor:
    """Reorder the columns of a scale matrix the way Marlin reads it.

    Args:
        s: scales, shape ``[G, N]`` with ``G = size_k / group_size``, or 1 with one group.
        size_k: K, inputs of the layer.
        size_n: N, outputs of the layer.
        group_size: inputs that share a scale; -1, or ``size_k`` and above, is one group.

    Returns:
        Contiguous tensor of the same shape and dtype.

    Raises:
        ValueError: the shape does not fit the sizes, ``size_k`` is no multiple of the group
            size, or ``size_n`` no multiple of the permutation's length (64 grouped, 32 not).
    """
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size: found {group_size}; accepted: -1 or a positive integer")
    grouped_perm, channel_perm = get_scale_perms()
    is_grouped = group_size != -1 and group_size < size_k
    perm = grouped_perm if is_grouped else channel_perm
    if is_grouped:
        _require_multiple("size_k", size_k, group_size, " (group_size)")
    groups = size_k // group_size if is_grouped else 1
    if tuple(s.shape) != (groups, size_n):
        raise ValueError(f"s: found shape {tuple(s.shape)}; accepted: {(groups, size_n)}")
    _require_multiple("size_n", size_n, len(perm))
    return s.reshape(-1, len(perm))[:, perm].reshape(groups, size_n).contiguous()


def replace_parameter(layer: torch.nn.Module, name: str, new_data: torch.Tensor) -> None:
    """Put ``new_data`` in the place of a parameter or buffer, whatever its shape and dtype.

    A parameter is replaced by a new plain parameter without gradient that keeps the attributes
    set on the old one (such as ``weight_loader``). A buffer stays a buffer and keeps its
    persistence. ``new_data`` is used as it is, not copied.

    Args:
        layer: the module that owns the tensor directly.
        name: name of the parameter or buffer.
        new_data: the tensor to put there.

    Raises:
        ValueError: ``layer`` itself has no parameter or buffer of that name.
    """
    if name in layer._buffers:
        persistent = name not in layer._non_persistent_buffers_set
        layer.register_buffer(name, new_data.detach(), persistent=persistent)
        return
    if name not in layer._parameters:
        known = [*layer._parameters, *layer._buffers]
        raise ValueError(
            f"name: found {name!r}; accepted: a parameter or buffer of this "
            f"{type(layer).__name__}: {known}"
        )
    replacement = torch.nn.Parameter(new_data.detach(), requires_grad=False)
    old = layer._parameters[name]
    if old is not None:
        vars(replacement).update(vars(old))
    layer.register_parameter(name, replacement)
