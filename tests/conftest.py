"""Fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.utils._device

# `with torch.device(...)` knows torch.empty by identity, from a cache: filled before the fixture below
# replaces it.
torch.utils._device._device_constructors()


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``torch.empty`` gives NaN (or the most negative integer), so that a place no kernel wrote shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        if tensor.device.type == "meta" or torch.compiler.is_compiling():
            return tensor
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        if tensor.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
            return tensor.fill_(torch.iinfo(tensor.dtype).min)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    yield


@pytest.fixture(autouse=True, scope="session")
def no_tuning_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests, and the processes they start, do not read what was tuned on this machine."""
    from pymllm_kernels import tuning

    directory = tmp_path_factory.mktemp("tuning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYMLLM_TUNING_DIR", str(directory))
        tuning.use_directory(directory)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def triton_device() -> str:
    """A device on which the Triton kernels run: the GPU, or the CPU under Triton's interpreter."""
    from pymllm_kernels.device import interpreting

    if torch.cuda.is_available():
        return "cuda"
    if interpreting():
        return "cpu"
    pytest.skip("no GPU: test_interpreter.py runs this module through Triton's interpreter")
