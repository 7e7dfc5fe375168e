"""Launches of compiled kernels with little work on the host.

Triton's launcher asks of every argument of every call what it is: 80 to 190 us a call on the host for a
kernel with five tensor maps. Here a form is compiled once from what the library declares, its parameters
lie in place, and a launch writes the ones that change and calls the driver.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import struct
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch

from pymllm_kernels.common import cuda
from pymllm_kernels.common.specialization import (
    Specialization,
    compile_specialization,
    hash_called_functions,
    nvidia_target,
)

_RANK = re.compile(r"tensordesc<[^\[]*\[([^\]]*)\]")
_ADDRESSES_KEPT = 512
# Kernels end with pointers to scratch memory that ours do not use.
_SCRATCH_POINTERS = 2


class TensorMaps:
    """The tensor maps of tensors that differ in their address only."""

    def __init__(
        self, described: dict[str, Any], dtype: torch.dtype, shape: Sequence[int],
        strides: Sequence[int],
    ) -> None:  # fmt: skip
        """See :func:`cuda.encode_map`.

        Args:
            described: box and swizzle as Triton's metadata of the compiled kernel has them.
            dtype: of the elements.
            shape: elements.
            strides: elements.
        """
        self._dtype, self._shape, self._strides = dtype, tuple(shape), tuple(strides)
        self._box, self._swizzle = tuple(described["block_size"]), described["swizzle"]
        # Parameters of the kernel beside the map.
        self._sizes = (ctypes.c_int32 * len(self._shape))(*self._shape)
        self._steps = (ctypes.c_int64 * len(self._shape))(*self._strides)
        self._beside = (
            *(ctypes.addressof(self._sizes) + 4 * i for i in range(len(self._shape))),
            *(ctypes.addressof(self._steps) + 8 * i for i in range(len(self._shape))),
        )
        self._known: dict[int, tuple[list[int], Any]] = {}

    def at(self, address: int) -> list[int]:
        """Addresses of the parameters that stand for a tensor at ``address``."""
        known = self._known.get(address)
        return known[0] if known is not None else self._encode(address)

    def _encode(self, address: int) -> list[int]:
        store = cuda.encode_map(
            address, self._dtype, self._shape, self._strides, self._box, self._swizzle
        )
        if len(self._known) >= _ADDRESSES_KEPT:
            # A new dictionary: another thread may be about to launch with an old map.
            self._known = {}
        parameters = [store.start, *self._beside]
        self._known[address] = (parameters, store)
        return parameters


class LoadedKernel:
    """A form on one device, ready to be launched.

    Attributes:
        described: Triton's metadata of each tensor map, in order.
    """

    def __init__(self, form: Specialization, compiled: Any) -> None:
        """Loads a compiled form into the current device.

        Raises:
            RuntimeError: its parameters are not the ones that the library would pass, or the driver
                refuses it.
        """
        metadata = compiled.metadata
        self.described = [dict(meta) for meta in metadata.tensordesc_meta or ()]
        layout = parameter_layout(form)
        expect_parameters(form, layout, compiled.asm["ptx"])
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise RuntimeError(f"{form.name}: needs scratch memory, which is not passed")
        self._function = cuda.load_function(compiled.asm["cubin"], metadata.name, metadata.shared)
        self._config = cuda.launch_config(
            32 * metadata.num_warps, metadata.shared,
            cooperative=metadata.launch_cooperative_grid, dependent=metadata.launch_pdl,
        )  # fmt: skip
        starts = [0, *itertools.accumulate(len(sizes) for sizes in layout)]
        spans = list(zip(layout, itertools.pairwise(starts), strict=True))
        self._maps = [slice(*span) for sizes, span in spans if len(sizes) > 1]
        places = [span[0] for sizes, span in spans if len(sizes) == 1]
        self._parameters = (ctypes.c_void_p * starts[-1])()
        self._values = (ctypes.c_uint64 * len(places))()
        for j, place in enumerate(places):
            self._parameters[place] = ctypes.addressof(self._values) + 8 * j
        # Little endian: a 4-byte integer is the low half of its place.
        self._pack = struct.Struct(f"<{len(places) - _SCRATCH_POINTERS}q").pack_into
        self._lock = threading.Lock()

    def launch(
        self, programs: int, stream: int, maps: Sequence[list[int]], values: Sequence[int]
    ) -> None:
        """Launches on the current device, which is the one it was loaded into.

        Args:
            programs: size of the grid.
            stream: handle.
            maps: of every tensor map in order, what :meth:`TensorMaps.at` gives.
            values: addresses and integers of all other arguments in order.
        """
        with self._lock:
            self._pack(self._values, 0, *values)
            parameters: Any = self._parameters
            for place, one in zip(self._maps, maps, strict=True):
                parameters[place] = one
            self._config.grid_x = programs
            self._config.stream = stream
            cuda.launch(self._config, self._function, parameters)


def parameter_layout(form: Specialization) -> list[list[int]]:
    """Bytes of the compiled kernel's parameters, in a list for each argument.

    Of a tensor map its own, then those of its sizes and strides; of anything else one.
    """
    layout = []
    for name in form.kernel.arg_names:
        kind = form.signature.get(name)
        if kind is None:
            continue
        if match := _RANK.match(kind):
            rank = match.group(1).count(",") + 1
            layout.append([cuda.MAP_BYTES, *[4] * rank, *[8] * rank])
        elif kind.startswith("*") or kind == "i64":
            layout.append([8])
        else:
            assert kind == "i32", kind
            layout.append([4])
    return layout + [[8]] * _SCRATCH_POINTERS


def expect_parameters(form: Specialization, layout: list[list[int]], ptx: str) -> None:
    """Raises ``RuntimeError`` if the compiled kernel takes other parameters: another Triton might."""
    entry = re.search(r"\.entry[^(]*\(([^)]*)\)", ptx)
    found = []
    for line in entry.group(1).split(",") if entry else ():
        array = re.search(r"\.b8\s+\S+\[(\d+)\]", line)
        bits = re.search(r"\.param\s+\.[a-z](\d+)", line)
        if array:
            found.append(int(array.group(1)))
        elif bits:
            found.append(int(bits.group(1)) // 8)
    expected = list(itertools.chain.from_iterable(layout))
    if found != expected:
        raise RuntimeError(
            f"{form.name}: the compiled kernel takes parameters of {found} bytes, expected "
            f"{expected}; this version of Triton is not supported"
        )


def load(form: Specialization, device: torch.device) -> LoadedKernel:
    """Compiles a form, or reads it from Triton's cache, and loads it into the current device."""
    target = nvidia_target(torch.cuda.get_device_capability(device))
    return LoadedKernel(form, compile_specialization(form, target))


K = TypeVar("K", bound=Hashable)


class FormLauncher(Generic[K]):
    """Launches the forms of a kernel without tensor maps, each told by a hashable key."""

    def __init__(self, specialize: Callable[[K], Specialization]) -> None:
        """Takes what makes a form of a key."""
        self._specialize = specialize
        self._known: dict[tuple[K, torch.device], tuple[LoadedKernel, list[str]]] = {}

    def __call__(
        self, key: K, device: torch.device, programs: int,
        arguments: Mapping[str, torch.Tensor | int | None],
    ) -> None:  # fmt: skip
        """Launches on the current device and stream.

        Args:
            key: of the form.
            device: the current device; a CPU in Triton's interpreter.
            programs: size of the grid.
            arguments: what the kernel takes, by name; what the form has compiled in is not read.
        """
        if device.type != "cuda" or torch.version.hip is not None:
            self._launch_portable(self._specialize(key), programs, arguments)
            return
        known = self._known.get((key, device))
        if known is None:
            form = self._specialize(key)
            names = [name for name in form.kernel.arg_names if name in form.signature]
            known = self._known[key, device] = (load(form, device), names)
        loaded, names = known
        given = [arguments[name] for name in names]
        values: Any = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in given]
        loaded.launch(programs, cuda.raw_stream(device.index), (), values)

    @staticmethod
    def _launch_portable(
        form: Specialization, programs: int, arguments: Mapping[str, torch.Tensor | int | None]
    ) -> None:
        """Through Triton's own launcher: on AMD GPUs, and in the interpreter."""
        hash_called_functions(form.kernel)
        given = {name: arguments[name] for name in form.signature}
        form.kernel[(programs,)](**given, **form.constexprs, **form.compiler_options())
