"""Lock files: what was tuned, to be used as it is by every process and machine of a kind."""

from __future__ import annotations

from pathlib import Path

from pymllm_kernels import DeviceFacts
from pymllm_kernels.selection import CANDIDATES
from pymllm_kernels.tuning import Table, Tunable, conditions, state
from pymllm_kernels.tuning.document import dump
from pymllm_kernels.tuning.store import LOCK_NAME, VARIABLE, write_whole


def tunables() -> dict[str, Tunable]:
    """Every operation that is tuned, by name."""
    return {kernel.tunable.operation: kernel.tunable for kernel in CANDIDATES if kernel.tunable}


def export_lock(path: Path, facts: DeviceFacts) -> int:
    """Writes everything tuned that a device would use now: shipped, of the store, of a lock file.

    Args:
        path: of the file.
        facts: the device.

    Returns:
        The number of entries.

    Raises:
        ValueError: there is none.
        OSError: it cannot be written.
    """
    here = {name: conditions(tunable.sources, facts) for name, tunable in tunables().items()}
    lock = state.lock()
    merged = Table()
    # The later replace the earlier.
    for table in (state.shipped(facts.name), state.store().table, lock[1] if lock else None):
        for place, entry in table.items() if table else ():
            if here.get(place.key.operation) == place.conditions:
                merged.put(place, entry)
    if not len(merged):
        raise ValueError(f"nothing is tuned for {facts.name} with these kernels: pymllm tune first")
    write_whole(path, dump(merged, lock=True))
    return len(merged)


def import_lock(path: Path, *, strict: bool) -> tuple[Path, Table]:
    """Makes a lock file that of the tuning directory: all further processes use it.

    Args:
        path: a file of :func:`export_lock`.
        strict: whether a key that is not in it is an error.

    Returns:
        Where it lies now, and what it holds.

    Raises:
        ValueError: it cannot be read or is damaged, or there is no tuning directory.
        OSError: the tuning directory cannot be written.
    """
    table = state.read_lock(path)
    table.strict = strict
    place = _lock_path()
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place, dump(table, lock=True))
    state.load_lock(place, strict=strict)
    return place, table


def remove_lock() -> Path:
    """Removes the lock file of the tuning directory.

    Raises:
        ValueError: there is none.
    """
    place = _lock_path()
    if not place.exists():
        raise ValueError(f"there is no lock file {place}")
    place.unlink()
    state.unlock()
    return place


def _lock_path() -> Path:
    path = state.store().path
    if path is None:
        raise ValueError(f"there is no tuning directory: {VARIABLE} names one")
    return path.with_name(LOCK_NAME)
