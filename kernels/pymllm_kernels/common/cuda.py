"""The few functions of the CUDA driver that a launch needs, through ctypes.

Structures and constants: CUDA Driver API, ``cuda.h``, unchanged since CUDA 12.0.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

_INVALID_CONTEXT = 201
_ATTRIBUTE_MAX_DYNAMIC_SHARED = 8
_COOPERATIVE, _PROGRAMMATIC_SERIALIZATION = 2, 6
_INTERLEAVE_NONE, _PROMOTE_128, _FILL_ZERO = 0, 2, 0
_MAP_DTYPE = {
    torch.int8: 0,
    torch.uint8: 0,
    torch.int16: 1,
    torch.int32: 3,
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}
MAP_BYTES = 128
_MAP_ALIGNMENT = 64


class LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute`` with an integer value."""

    _fields_ = (
        ("id", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("value", ctypes.c_int32),
        ("unused", ctypes.c_uint8 * 60),
    )


class LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid_x", ctypes.c_uint32),
        ("grid_y", ctypes.c_uint32),
        ("grid_z", ctypes.c_uint32),
        ("block_x", ctypes.c_uint32),
        ("block_y", ctypes.c_uint32),
        ("block_z", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint32),
    )


@functools.cache
def driver() -> Any:
    """The driver's library.

    Raises:
        OSError: there is none.
    """
    library = ctypes.CDLL("libcuda.so.1")
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    library.cuModuleLoadData.argtypes = [pointer, text]
    library.cuModuleGetFunction.argtypes = [pointer, pointer, text]
    library.cuFuncSetAttribute.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    library.cuTensorMapEncodeTiled.argtypes = [
        pointer, ctypes.c_int, ctypes.c_uint32, *[pointer] * 5, *[ctypes.c_int] * 4,
    ]  # fmt: skip
    library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(text)]
    return library


def check(status: int, what: str) -> None:
    """Raises ``RuntimeError`` with the driver's words unless ``status`` is success."""
    if status:
        words = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(words))
        said = words.value.decode() if words.value else "unknown error"
        raise RuntimeError(f"{what}: CUDA error {status}: {said}")


def load_function(image: bytes, name: str, shared_bytes: int) -> int:
    """Handle of a kernel of a cubin, loaded into the current device's context."""
    # A thread that has not yet used CUDA has no context.
    torch.cuda.set_device(torch.cuda.current_device())
    library = driver()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(library.cuModuleLoadData(ctypes.byref(module), image), f"loading {name}")
    status = library.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
    check(status, f"finding {name}")
    if shared_bytes > 48 * 1024:
        status = library.cuFuncSetAttribute(function, _ATTRIBUTE_MAX_DYNAMIC_SHARED, shared_bytes)
        check(status, f"{name} with {shared_bytes} bytes of shared memory")
    assert function.value is not None
    return function.value


def launch_config(
    threads: int, shared_bytes: int, *, cooperative: bool, dependent: bool
) -> LaunchConfig:
    """A launch of 1-D blocks; the grid's first size and the stream are set at every launch."""
    wanted = []
    if cooperative:
        wanted.append(LaunchAttribute(_COOPERATIVE, 0, 1))
    if dependent:
        wanted.append(LaunchAttribute(_PROGRAMMATIC_SERIALIZATION, 0, 1))
    attributes = (LaunchAttribute * max(1, len(wanted)))(*wanted)
    return LaunchConfig(1, 1, 1, threads, 1, 1, shared_bytes, None, attributes, len(wanted))


def launcher(config: LaunchConfig, function: int, parameters: Any) -> Callable[[], None]:
    """What launches a kernel on the current device; ``config`` and ``parameters`` may change between.

    It raises a ``RuntimeError`` with the driver's words if the driver refuses.
    """
    start = driver().cuLaunchKernelEx
    # As C takes them: checking and converting the types would cost every launch 0.3 us.
    arguments = (ctypes.byref(config), ctypes.c_void_p(function), ctypes.byref(parameters), None)

    def launch() -> None:
        status = start(*arguments)
        if status == _INVALID_CONTEXT:
            torch.cuda.set_device(torch.cuda.current_device())
            status = start(*arguments)
        if status:
            check(status, "launching a kernel")

    return launch


def encode_map(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
) -> Any:
    """A ``CUtensorMap`` on 64 bytes, as a buffer that must be kept.

    Args:
        address: of the first element, a multiple of 16.
        dtype: of the elements.
        shape: elements, the contiguous dimension last.
        strides: elements; in bytes multiples of 16, but for the last, which is 1.
        box: elements of a copy.
        swizzle: 0 to 3 for none, 32, 64 and 128 bytes.

    Raises:
        RuntimeError: the driver refuses it.
    """
    rank = len(shape)
    store = ctypes.create_string_buffer(MAP_BYTES + _MAP_ALIGNMENT)
    start = ctypes.addressof(store)
    store.start = start + -start % _MAP_ALIGNMENT  # type: ignore[attr-defined]
    sizes = (ctypes.c_uint64 * rank)(*reversed(shape))
    steps = [stride * dtype.itemsize for stride in reversed(strides[:-1])]
    ones = (ctypes.c_uint32 * rank)(*[1] * rank)
    status = driver().cuTensorMapEncodeTiled(
        store.start, _MAP_DTYPE[dtype], rank, address, sizes,  # type: ignore[attr-defined]
        (ctypes.c_uint64 * max(1, rank - 1))(*steps), (ctypes.c_uint32 * rank)(*reversed(box)), ones,
        _INTERLEAVE_NONE, swizzle, _PROMOTE_128, _FILL_ZERO,
    )  # fmt: skip
    if status:
        check(status, f"tensor map of {list(shape)}, strides {list(strides)}, boxes {list(box)}")
    return store


def _empty_by_torch(
    shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


# ``empty(shape, strides, dtype)``: an uninitialized tensor on the current device, by the function that
# torch's compiler allocates with, where torch has it. ``Tensor.new_empty`` reads its arguments through
# the dispatcher and takes twice as long, 2 of a call's 15 us.
empty: Callable[[Sequence[int], Sequence[int], torch.dtype], torch.Tensor] = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None),
    "_empty_strided_cuda",
    _empty_by_torch,
)

# torch.cuda's functions first ask whether CUDA runs, which a tensor of it has answered.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def raw_stream(index: int) -> int:
    """Handle of torch's current stream on device ``index``."""
    stream: int = torch._C._cuda_getCurrentRawStream(index)
    return stream
