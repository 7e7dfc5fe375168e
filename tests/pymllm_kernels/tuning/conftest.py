"""A store of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pymllm_kernels import tuning
from pymllm_kernels.tuning import store as store_module


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty tuning directory, in use."""
    found = tmp_path / "tuning"
    monkeypatch.setattr(store_module, "_told", set())
    tuning.use_directory(found)
    yield found
    tuning.unpin()
    tuning.use_directory(None)
