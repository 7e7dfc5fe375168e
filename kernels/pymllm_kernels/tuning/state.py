"""What this process looks configurations up in: pins, a lock file, the store, shipped tables.

``generation`` grows with every change; who keeps a resolved configuration compares it.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pymllm_kernels.tuning.document import Entry, Place, Table, parse
from pymllm_kernels.tuning.keys import TuningKey, bucket
from pymllm_kernels.tuning.store import LOCK_NAME, Store, default_directory, warn_once
from pymllm_kernels.tuning.tunable import Tunable

TABLES = Path(__file__).parent / "tables"

generation = 0

_mutex = threading.RLock()
_pins: dict[tuple[TuningKey, int | None], Any] = {}
_store: Store | None = None
_lock: tuple[Path, Table] | None = None
_lock_read = False


def changed() -> None:
    """Makes every resolved configuration that is kept anywhere stale."""
    global generation
    with _mutex:
        generation += 1


def store() -> Store:
    """The user's store."""
    global _store
    with _mutex:
        if _store is None:
            _store = Store(*default_directory())
        return _store


def use_directory(directory: Path | str | None) -> None:
    """Keeps results there instead of the default directory; ``None`` is memory only.

    The lock file of the directory, if there is one, is used, too.
    """
    global _store, _lock, _lock_read
    with _mutex:
        _store = Store(None if directory is None else Path(directory))
        _lock, _lock_read = None, False
        changed()


def keep(place: Place, entry: Entry, *, replace: bool = False) -> Entry:
    """Puts a result into the store; see :meth:`Store.put`."""
    kept = store().put(place, entry, replace=replace)
    changed()
    return kept


def pin(tunable: Tunable, key: TuningKey, config: Any, m: int | None = None) -> None:
    """Makes a configuration the only choice of a key, before everything else.

    Whether it can run is seen where it is resolved, which raises a ``ValueError`` if not.

    Args:
        tunable: the operation.
        key: the layer.
        config: one of its configurations.
        m: tokens, pinned with all others of the bucket; every number of tokens if ``None``.

    Raises:
        ValueError: it is of another class.
    """
    tunable.to_json(config)
    with _mutex:
        _pins[key, None if m is None else bucket(m)] = config
        changed()


def unpin(key: TuningKey | None = None, m: int | None = None) -> None:
    """Takes back the pins of a key and bucket, of a key, or all."""
    with _mutex:
        for place in list(_pins):
            if key in (None, place[0]) and (m is None or place[1] == bucket(m)):
                del _pins[place]
        changed()


@contextmanager
def pinned_for_now(
    tunable: Tunable, key: TuningKey, config: Any, m: int | None = None
) -> Iterator[None]:
    """A pin that ends with the block; what was pinned there before is pinned again.

    Raises:
        ValueError: as :func:`pin`.
    """
    place = (key, None if m is None else bucket(m))
    before = _pins.get(place)
    pin(tunable, key, config, m)
    try:
        yield
    finally:
        with _mutex:
            if before is None:
                _pins.pop(place, None)
            else:
                _pins[place] = before
            changed()


def pinned(key: TuningKey, m: int) -> Any:
    """The configuration that the caller pinned for a key and bucket, or ``None``."""
    if not _pins:
        return None
    found = _pins.get((key, m))
    return _pins.get((key, None)) if found is None else found


def read_lock(path: Path) -> Table:
    """The table of a lock file.

    Raises:
        ValueError: it cannot be read or is damaged; a lock file is whole or not used.
    """
    try:
        table, problems = parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        problems = [f"not text ({error.reason})"]
    except OSError as error:
        problems = [error.strerror or type(error).__name__]
    if problems:
        raise ValueError(f"lock file {path}: {problems[0]}")
    return table


def load_lock(path: Path | str, *, strict: bool = True) -> None:
    """Pins everything that a file of ``pymllm tune export`` holds, in this process.

    Args:
        path: the file.
        strict: whether a key that is not in it is an error.

    Raises:
        ValueError: it cannot be read or is damaged.
    """
    global _lock, _lock_read
    table = read_lock(Path(path))
    table.strict = strict
    with _mutex:
        _lock, _lock_read = (Path(path), table), True
        changed()


def unlock() -> None:
    """Forgets the lock file in this process."""
    global _lock, _lock_read
    with _mutex:
        _lock, _lock_read = None, True
        changed()


def lock() -> tuple[Path, Table] | None:
    """The lock file: the one loaded, else ``lock.json`` beside the store.

    Raises:
        ValueError: it cannot be read or is damaged.
    """
    global _lock, _lock_read
    if not _lock_read:
        with _mutex:
            path = store().path
            if path is not None and not _lock_read:
                beside = path.with_name(LOCK_NAME)
                try:
                    is_there = beside.exists()
                except OSError:
                    # A directory that cannot be entered: reading the store tells.
                    is_there = False
                _lock = (beside, read_lock(beside)) if is_there else None
            _lock_read = True
    return _lock


@functools.cache
def shipped(board: str) -> Table | None:
    """The table that the package brings for a board, ``None`` if it brings none."""
    path = table_path(board)
    if not path.is_file():
        return None
    table, problems = parse(path.read_text(encoding="utf-8"))
    if problems:
        warn_once(f"{path} is damaged: {problems[0]}; its {len(table)} valid entries are used")
    return table


def table_path(board: str) -> Path:
    """Where the package keeps the table of a board."""
    return TABLES / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', board)}.json"
