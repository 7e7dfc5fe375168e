"""Counters with which the programs of a kernel meet."""

from __future__ import annotations

import threading

import torch

from pymllm_kernels.common.cuda import raw_stream
from pymllm_kernels.device import device_facts

# Programs of a grid times their consumers: one of each a multiprocessor and warpgroup at most.
_PER_MULTIPROCESSOR = 4
_STREAMS_A_POOL = 64

_lock = threading.Lock()
_pools: dict[int, list[torch.Tensor]] = {}
_places: dict[tuple[int, int], torch.Tensor] = {}


def counters(device: torch.device) -> torch.Tensor:
    """int32 ``[4 * multiprocessors]``, zero, for kernels that leave them zero.

    Every stream has its own, so kernels of several streams do not meet each other's; graphs captured
    on one stream share them and must not be replayed at the same time. 64 streams share a pool of
    about 130 KB.

    Raises:
        RuntimeError: new memory is needed while a CUDA graph is captured, where zeroing would be
            recorded instead of done.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    key = (index, raw_stream(index))
    place = _places.get(key)
    return _new_place(index, key) if place is None else place


def reserve_counters(device: torch.device) -> None:
    """Allocates the first pool of a device, so that a first call may be captured."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    with _lock:
        if index not in _pools:
            _add_pool(index)


def _new_place(index: int, key: tuple[int, int]) -> torch.Tensor:
    with _lock:
        used = sum(1 for device, _ in _places if device == index)
        if used >= _STREAMS_A_POOL * len(_pools.get(index, ())):
            _add_pool(index)
        place = _pools[index][-1][used % _STREAMS_A_POOL]
        return _places.setdefault(key, place)


def _add_pool(index: int) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "counters for a new device or stream are needed while a CUDA graph is captured: call the "
            "layer once before the capture"
        )
    size = _PER_MULTIPROCESSOR * device_facts(torch.device("cuda", index)).multiprocessors
    pool = torch.zeros(_STREAMS_A_POOL, size, dtype=torch.int32, device=f"cuda:{index}")
    # Other streams use it without waiting for this one.
    torch.cuda.current_stream(index).synchronize()
    _pools.setdefault(index, []).append(pool)
