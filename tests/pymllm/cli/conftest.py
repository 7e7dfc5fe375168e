"""Commands print the same on a slow machine."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_line_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal a command that takes seconds says that it goes on; here, never."""
    monkeypatch.setattr("pymllm.cli.report._SILENCE_S", 3600.0)
