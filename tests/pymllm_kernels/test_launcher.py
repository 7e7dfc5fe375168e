"""Declared forms and launches through the driver: parameters in place, nothing compiled twice."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget

from pymllm_kernels import LinearProblem, counters, planned_device, select_kernel
from pymllm_kernels.common import cuda, forms, launcher
from pymllm_kernels.common.forms import Form, FormError, compile_forms, is_compiled
from pymllm_kernels.common.specialization import (
    Specialization,
    compile_specialization,
    integer_type,
    pointer_type,
)
from pymllm_kernels.per_token_quant_int8 import launch as quant
from pymllm_kernels.w4a16.hopper_launch import HopperLayer, specialization
from pymllm_kernels.w4a16.hopper_tuning import HopperConfig

BF16 = torch.bfloat16
HOPPER = planned_device("9.0")
LAYER = HopperLayer(4096, 4096, 128, 128, BF16, BF16, True, BF16)
CONFIG = HopperConfig(block_m=8, consumers=2, slots=4, span=2, share=4)


class Driver:
    """Stands for the driver: keeps what a launch would read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[tuple[int, int, list[bytes]]] = []
        self.maps: list[tuple[Any, ...]] = []
        self.sizes: list[int] = []
        monkeypatch.setattr(cuda, "load_function", lambda image, name, shared: 77)
        monkeypatch.setattr(cuda, "launcher", self.launcher)
        monkeypatch.setattr(cuda, "encode_map", self.encode)

    def launcher(
        self, config: cuda.LaunchConfig, function: int, parameters: Any
    ) -> Callable[[], None]:
        assert function == 77

        def launch() -> None:
            read = [ctypes.string_at(parameters[i], size) for i, size in enumerate(self.sizes)]
            # As the driver, another thread gets its turn meanwhile.
            time.sleep(0)
            self.launches.append((config.grid_x, config.stream, read))

        return launch

    def encode(self, address: int, *described: Any) -> Any:
        self.maps.append((address, *described))
        store = ctypes.create_string_buffer(address.to_bytes(8, "little"), cuda.MAP_BYTES)
        store.start = ctypes.addressof(store)  # type: ignore[attr-defined]
        return store


def quantization() -> launcher.LoadedKernel:
    form = quant.specialization(quant.form_of(BF16, 4096, 4096, 1, 0, static=False, zero=False))
    return launcher.LoadedKernel(form, compile_specialization(form, GPUTarget("cuda", 90, 32)))


def as_int(value: bytes) -> int:
    return int.from_bytes(value, "little", signed=True)


def test_parameters_are_in_the_order_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    form = specialization(LAYER, CONFIG)
    kernel = launcher.LoadedKernel(form, compile_specialization(form, GPUTarget("cuda", 90, 32)))
    driver.sizes = [size for sizes in launcher.parameter_layout(form) for size in sizes]
    shapes = [(3, 4096), (32 * 4096, 32), (32 * 4096,), (32 * 4096,)]
    dtypes = [BF16, torch.int16, BF16, torch.int8]
    maps = [
        launcher.TensorMaps(box, dtype, shape, (*shape[1:], 1))
        for box, dtype, shape in zip(kernel.described, dtypes, shapes, strict=True)
    ]
    values = [2**40 + 16, 2**41, 2**42, 2**43, 3, 4096, -5, 1, 32, 0, 16, 4096]
    launch = kernel.bind(maps, values[4:])
    # Another launch of the kernel, with other sizes, has its own place.
    kernel.bind(maps, [0] * 8)
    for addresses in ([16, 32, 48, 64], [80, 32, 48, 64]):
        launch(128, 9, [m[a] for m, a in zip(maps, addresses, strict=True)], values[:4])
    (grid, stream, read), (_, _, again) = driver.launches
    assert (grid, stream) == (128, 9)
    # A tensor map is followed by its sizes and strides.
    places, i = [], 0
    for shape in shapes:
        places.append(i)
        sizes = [as_int(read[j]) for j in range(i + 1, i + 1 + 2 * len(shape))]
        assert sizes == [*shape, *shape[1:], 1]
        i += 1 + 2 * len(shape)
    assert [as_int(read[p][:8]) for p in places] == [16, 32, 48, 64]
    assert [as_int(again[p][:8]) for p in places] == [80, 32, 48, 64]
    # out, bias, parts, counters and eight integers, then two unused pointers.
    assert [as_int(value) for value in read[i:]] == [*values, 0, 0]
    assert [len(value) for value in read[i:]] == [8] * 4 + [4] * 8 + [8] * 2
    # Each address was encoded once, as the compiled kernel describes its box.
    assert [found[0] for found in driver.maps] == [16, 32, 48, 64, 80]
    assert driver.maps[0][1:] == (BF16, (3, 4096), (4096, 1), (8, 64), 3)


def test_tensor_maps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    maps = launcher.TensorMaps({"block_size": [8, 64], "swizzle": 3}, BF16, (8, 64), (64, 1))
    first = maps[0]
    for i in range(1, 2000):
        assert maps[16 * i] is maps[16 * i]
    assert len(driver.maps) == 2000
    assert len(maps) <= launcher._ADDRESSES_KEPT
    # Who holds an item may launch with it although it was dropped meanwhile.
    assert 0 not in maps and as_int(ctypes.string_at(first[0], 8)) == 0


def test_wrong_counts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is launched: the driver would read what lies behind."""
    driver = Driver(monkeypatch)
    kernel = quantization()
    launch = kernel.bind(sizes=[4096, 4096, 4096, 0])
    for values in ([16, 32], [16, 32, 48, 64]):
        with pytest.raises(struct.error, match="expected 3 items"):
            launch(1, 9, (), values)
    maps = launcher.TensorMaps({"block_size": [8, 64], "swizzle": 3}, BF16, (8, 64), (64, 1))
    with pytest.raises(ValueError, match="zip"):
        kernel.bind([maps])
    with pytest.raises(ValueError, match="zip"):
        launch(1, 9, [maps[16]], [16, 32, 48])
    form = specialization(LAYER, CONFIG)
    tiles = launcher.LoadedKernel(form, compile_specialization(form, GPUTarget("cuda", 90, 32)))
    with pytest.raises(ValueError, match="zip"):
        tiles.bind([maps] * 4)(1, 9, (), [16] * 12)
    assert driver.launches == []


def test_threads_do_not_mix_up_their_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """All through one launcher, each with addresses, grid and stream of its own."""
    driver = Driver(monkeypatch)
    driver.sizes = [8] * 3 + [4] * 4 + [8] * 2
    kernel, mine = quantization(), threading.local()
    monkeypatch.setattr(launcher, "load", lambda form, device: kernel)
    monkeypatch.setattr(cuda, "raw_stream", lambda index: mine.stream)
    launch = launcher.FormLauncher(quant.specialization)
    form = quant.form_of(BF16, 4096, 4096, 1, 0, static=False, zero=False)
    sizes = {"K": 4096, "stride_xm": 4096, "stride_cm": 4096, "counters": 0}

    def work(i: int) -> None:
        mine.stream = 10 * i
        given = {"x_ptr": 16 * i, "codes_ptr": 32 * i, "scale_ptr": 48 * i, **sizes}
        for _ in range(500):
            launch(form, torch.device("cuda", 0), i, given)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.launches) == 2000
    for grid, stream, read in driver.launches:
        assert stream == 10 * grid
        assert [as_int(value) for value in read[:3]] == [16 * grid, 32 * grid, 48 * grid]
        assert [as_int(value) for value in read[3:7]] == [4096, 4096, 4096, 0]


def test_what_the_driver_says_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread without a context gets one and tries again; everything else is an error."""

    class Library:
        def __init__(self, statuses: list[int]) -> None:
            self.statuses = statuses

        def cuLaunchKernelEx(self, *arguments: Any) -> int:
            assert len(arguments) == 4 and arguments[1].value == 77
            return self.statuses.pop(0)

        def cuGetErrorString(self, status: int, words: Any) -> None:
            words._obj.value = b"words"

    contexts: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", contexts.append)
    config = cuda.launch_config(128, 0, cooperative=False, dependent=True)
    for statuses, refused in (([0], None), ([201, 0], None), ([201, 201], 201), ([1], 1)):
        library = Library(list(statuses))
        monkeypatch.setattr(cuda, "driver", lambda library=library: library)
        launch = cuda.launcher(config, 77, (ctypes.c_void_p * 2)())
        if refused is None:
            launch()
        else:
            with pytest.raises(
                RuntimeError, match=f"launching a kernel: CUDA error {refused}: words"
            ):
                launch()
        assert library.statuses == []
    assert contexts == [3, 3]


def test_other_parameters_are_refused() -> None:
    form = specialization(LAYER, CONFIG)
    compiled = compile_specialization(form, GPUTarget("cuda", 90, 32))
    layout = launcher.parameter_layout(form)
    launcher.expect_parameters(form, layout, compiled.asm["ptx"])
    with pytest.raises(RuntimeError, match=r"w4a16-hopper-8x128-shared.*not supported"):
        launcher.expect_parameters(form, layout[:-1], compiled.asm["ptx"])


def test_missing_and_unknown_arguments_are_named() -> None:
    form = specialization(LAYER, CONFIG)
    odd = dataclasses.replace(form, signature={**form.signature, "what": "i32"})
    with pytest.raises(ValueError, match="unknown: \\['what'\\]"):
        odd.source()
    less = {name: kind for name, kind in form.signature.items() if name != "steps"}
    with pytest.raises(ValueError, match="missing: \\['steps'\\]"):
        dataclasses.replace(form, signature=less).source()


def test_types() -> None:
    assert pointer_type(BF16) == "*bf16"
    with pytest.raises(ValueError, match="float64, accepted"):
        pointer_type(torch.float64)
    assert integer_type(2**31 - 1, -(2**31)) == "i32" and integer_type(0, 2**31) == "i64"


PROBLEMS = [
    LinearProblem("w4a16", 4096, 4096, 4, 128, True, False, BF16, BF16, HOPPER),
    LinearProblem("w4a16", 1000, 4090, 8, -1, False, False, BF16, BF16, HOPPER),
    LinearProblem("w8a8_int8", 4096, 14336, 8, -1, True, False, BF16, torch.float32, HOPPER, "token"),
    LinearProblem("w8a8_int8", 999, 4090, 8, -1, True, False, BF16, torch.float32, HOPPER, "tensor"),
]  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.scheme}-{p.n}x{p.k}")
def test_few_forms_serve_every_number_of_tokens(problem: LinearProblem) -> None:
    kernel = select_kernel(problem).kernel
    forms = {form for m in range(1, 4097, 3) for form in kernel.forms(problem, m)}
    assert 1 <= len(forms) <= 12
    for form in forms:
        made = form.specialization()
        assert isinstance(made, Specialization) and made.source() is not None


def test_a_form_is_compiled_once(tmp_path: Path) -> None:
    """In processes of their own: Triton reads its cache's directory from the environment."""
    quantization = quant.form_of(BF16, 4096, 4096, 1, 0, static=False, zero=False)
    form = Form(quant.specialization, (quantization,))
    assert form == Form(
        quant.specialization, (quant.form_of(BF16, 4096, 4096, 1, 0, static=False, zero=False),)
    )
    code = (
        "import torch\n"
        "from pymllm_kernels import counters, planned_device\n"
        "from pymllm_kernels.common.forms import Form, compile_forms, is_compiled\n"
        "from pymllm_kernels.per_token_quant_int8 import launch as quant\n"
        "f = quant.form_of(torch.bfloat16, 4096, 4096, 1, 0, static=False, zero=False)\n"
        "form, facts = Form(quant.specialization, (f,)), planned_device('9.0')\n"
        "before = is_compiled(form, facts)\n"
        "print(before, compile_forms([form, form], facts), is_compiled(form, facts), counters().compiled)\n"
    )
    environment = {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert outputs == [["False", "1", "True", "1"], ["True", "0", "True", "0"]]


def test_forms_are_compiled_by_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import knobs

    with knobs.cache.scope():
        several = [
            Form(quant.specialization, (quant.form_of(dtype, k, k, 1, 0, static=False, zero=zero),))
            for dtype in (BF16, torch.float16)
            for k in (512, 1040)
            for zero in (False, True)
        ]
        seen: list[tuple[int, int]] = []
        before = counters()
        assert compile_forms(several, HOPPER, lambda *told: seen.append(told), workers=2) == 8
        assert seen[0] == (0, 8) and seen[-1] == (8, 8)
        # Others compiled, and what they left is found.
        assert counters() == before
        assert all(is_compiled(form, HOPPER) for form in several)


# Made by the package: processes that compile do not know a test's own functions.
GOOD = quant.form_of(BF16, 2048, 2048, 1, 0, static=False, zero=False)
BROKEN = [Form(quant.specialization, (GOOD._replace(block_k=size),)) for size in (300, 301, 302)]


def test_a_form_that_does_not_compile_is_named() -> None:
    with pytest.raises(FormError, match="quant-dynamic-symmetric-300 does not compile"):
        compile_forms(BROKEN[:1], HOPPER)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_others_are_compiled_where_failures_are_told(workers: int) -> None:
    good = Form(quant.specialization, (GOOD,))
    told: list[str] = []
    compile_forms([*BROKEN, good], HOPPER, workers=workers, failed=told.append)
    assert is_compiled(good, HOPPER)
    assert len(told) == 3 and all("does not compile" in text for text in told)


def test_a_process_that_ends_is_no_form_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "is_compiled", lambda form, facts: False)
    ending: Any = os._exit
    told: list[str] = []
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        compile_forms(
            [Form(ending, (code,)) for code in range(4)], HOPPER, workers=2, failed=told.append
        )
    assert told == []
