"""Launches of compiled kernels with little work on the host.

Triton's launcher asks of every argument of every call what it is: 80 to 190 us a call on the host for a
kernel with five tensor maps. Here a form is compiled once from what the library declares, its parameters
lie in place, and a launch writes the ones that change and calls the driver.
"""

from __future__ import annotations

import ctypes
import functools
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


class TensorMaps(dict[int, tuple[int, Any]]):
    """The tensor maps of tensors that differ in their address only, by that address.

    An item is made when it is first asked for: where the map is, and the memory that must be kept
    until it has been launched with.

    Attributes:
        beside: addresses of the kernel's parameters beside a map, the same for all.
    """

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
        super().__init__()
        self._dtype, self._shape, self._strides = dtype, tuple(shape), tuple(strides)
        self._box, self._swizzle = tuple(described["block_size"]), described["swizzle"]
        self._sizes = (ctypes.c_int32 * len(self._shape))(*self._shape)
        self._steps = (ctypes.c_int64 * len(self._shape))(*self._strides)
        self.beside = (
            *(ctypes.addressof(self._sizes) + 4 * i for i in range(len(self._shape))),
            *(ctypes.addressof(self._steps) + 8 * i for i in range(len(self._shape))),
        )

    def __missing__(self, address: int) -> tuple[int, Any]:
        store = cuda.encode_map(
            address, self._dtype, self._shape, self._strides, self._box, self._swizzle
        )
        if len(self) >= _ADDRESSES_KEPT:
            self.clear()
        self[address] = made = (store.start, store)
        return made


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
        function = cuda.load_function(compiled.asm["cubin"], metadata.name, metadata.shared)
        config = functools.partial(
            cuda.launch_config, 32 * metadata.num_warps, metadata.shared,
            cooperative=metadata.launch_cooperative_grid, dependent=metadata.launch_pdl,
        )  # fmt: skip
        self._new = functools.partial(Launch, function, config, layout)

    @functools.cached_property
    def launch(self) -> Launch:
        """With nothing in place, of a kernel without tensor maps."""
        return self.bind()

    def bind(self, maps: Sequence[TensorMaps] = (), sizes: Sequence[int] = ()) -> Launch:
        """A launch in which all is in place that does not change from call to call.

        Args:
            maps: of every tensor map in order.
            sizes: values of the last arguments.
        """
        return self._new(maps, sizes)


class Launch:
    """Launches a kernel with other addresses every time; for one thread at a time."""

    def __init__(
        self, function: int, config: Callable[[], cuda.LaunchConfig], layout: list[list[int]],
        maps: Sequence[TensorMaps], sizes: Sequence[int],
    ) -> None:  # fmt: skip
        """See :meth:`LoadedKernel.bind`."""
        *starts, count = itertools.accumulate((len(taken) for taken in layout), initial=0)
        spans = list(zip(layout, starts, strict=True))
        self._maps = [start for taken, start in spans if len(taken) > 1]
        places = [start for taken, start in spans if len(taken) == 1]
        parameters: Any = (ctypes.c_void_p * count)()
        self._values: Any = (ctypes.c_uint64 * len(places))()
        for j, place in enumerate(places):
            parameters[place] = ctypes.addressof(self._values) + 8 * j
        for place, one in zip(self._maps, maps, strict=True):
            parameters[place + 1 : place + 1 + len(one.beside)] = one.beside
        # Little endian: a 4-byte integer is the low half of its place.
        given = len(places) - _SCRATCH_POINTERS - len(sizes)
        self._values[given : given + len(sizes)] = list(sizes)
        self._pack = struct.Struct(f"{given}q").pack_into
        self._parameters, self._config, self._kept = parameters, config(), maps
        self._start = cuda.launcher(self._config, function, parameters)
        self._programs = self._stream = -1

    def __call__(
        self, programs: int, stream: int, maps: Sequence[tuple[int, Any]], values: Sequence[int]
    ) -> None:
        """Launches on the current device, which is the one the kernel was loaded into.

        Args:
            programs: size of the grid.
            stream: handle.
            maps: of every tensor map in order, the item of its :class:`TensorMaps`.
            values: addresses and integers of all other arguments in order, but those in place.
        """
        self._pack(self._values, 0, *values)
        if maps or self._maps:
            for place, one in zip(self._maps, maps, strict=True):
                self._parameters[place] = one[0]
        # Set only when they change: setting a field takes 0.1 us.
        if programs != self._programs:
            self._config.grid_x = self._programs = programs
        if stream != self._stream:
            self._config.stream = self._stream = stream
        self._start()


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
        self._known: dict[tuple[K, torch.device], tuple[Launch, list[str]]] = {}
        self._lock = threading.Lock()

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
            known = self._known[key, device] = (load(form, device).launch, names)
        launch, names = known
        given = [arguments[name] for name in names]
        values: Any = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in given]
        with self._lock:
            launch(programs, cuda.raw_stream(device.index), (), values)

    @staticmethod
    def _launch_portable(
        form: Specialization, programs: int, arguments: Mapping[str, torch.Tensor | int | None]
    ) -> None:
        """Through Triton's own launcher: on AMD GPUs, and in the interpreter."""
        hash_called_functions(form.kernel)
        given = {name: arguments[name] for name in form.signature}
        form.kernel[(programs,)](**given, **form.constexprs, **form.compiler_options())
