"""The user's tuning results: one file, written entry by entry by any number of processes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from pathlib import Path

from pymllm_kernels.tuning.document import Entry, Place, Table, dump, parse

VARIABLE = "PYMLLM_TUNING_DIR"
STORE_NAME = "store.json"
LOCK_NAME = "lock.json"
# Held for the milliseconds of one write.
_LOCK_TIMEOUT_S = 10.0

_told: set[str] = set()


def warn_once(text: str) -> None:
    """A warning that this process has not given yet."""
    if text not in _told:
        _told.add(text)
        warnings.warn(text, stacklevel=3)


def default_directory() -> tuple[Path | None, str]:
    """Where results are kept: ``PYMLLM_TUNING_DIR``, else ``pymllm/tuning`` of the user's cache.

    Returns:
        The directory, which need not exist, or ``None`` and the reason that there is none.
    """
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser().absolute(), ""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "pymllm" / "tuning", ""
    try:
        return Path.home() / ".cache" / "pymllm" / "tuning", ""
    except RuntimeError as error:
        return None, f"no home directory ({error})"


class Store:
    """Results of this machine's user, in memory and in ``store.json`` of a directory.

    The file is read once. A write takes a file lock, reads what others have written since, and
    replaces the file by a complete one. Where that cannot be done a warning, once a cause, says that
    results are kept in memory.

    Args:
        directory: of the file, or ``None`` for memory only.
        why_none: the reason for ``None``, if it was not asked for.
        name: of the file.
    """

    def __init__(self, directory: Path | None, why_none: str = "", name: str = STORE_NAME) -> None:
        self.path = None if directory is None else directory / name
        self._why_none = why_none
        self._table: Table | None = None
        self._unsaved: dict[Place, tuple[Entry, bool]] = {}
        self._written: tuple[int, int, int] | None = None
        self._mutex = threading.RLock()

    @property
    def table(self) -> Table:
        """All entries known to this process."""
        with self._mutex:
            if self._table is None:
                if self.path is None:
                    if self._why_none:
                        warn_once(
                            f"tuning results are kept in memory only: {self._why_none}; "
                            f"{VARIABLE} names a directory for them"
                        )
                    self._table = Table()
                else:
                    self._table, _ = self._read(self.path)
            return self._table

    def put(self, place: Place, entry: Entry, *, replace: bool = False) -> Entry:
        """Keeps a result, in the file if that can be written.

        Args:
            place: what it is for.
            entry: the result.
            replace: whether it takes the place of another one that is there.

        Returns:
            What is kept: the entry, or the one that another process put there before, so that all
            processes run the same.
        """
        with self._mutex:
            known = self.table.get(place)
            if known is not None and not replace:
                return known
            self.table.put(place, entry)
            self._unsaved[place] = (entry, replace)
            if self.path is not None:
                try:
                    self._save(self.path)
                except (OSError, NotImplementedError) as error:
                    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                    warn_once(
                        f"{self.path} cannot be written ({reason}): tuning results are kept in "
                        f"memory; {VARIABLE} names another directory"
                    )
            return self.table.get(place) or entry

    def _save(self, path: Path) -> None:
        from filelock import FileLock

        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_TIMEOUT_S):
            damaged = False
            if self._written is not None and self._written == _identity(path):
                # Nobody else has written since: what is known is what is there.
                merged = self.table
            else:
                merged, damaged = self._read(path)
            for place, (entry, replace) in self._unsaved.items():
                if replace or merged.get(place) is None:
                    merged.put(place, entry)
            if damaged:
                os.replace(path, f"{path}.damaged-{time.time_ns()}")
            write_whole(path, dump(merged))
            self._written = _identity(path)
        self._unsaved.clear()
        self._table = merged

    def _read(self, path: Path) -> tuple[Table, bool]:
        """The file's valid entries, and whether something else is in it."""
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return Table(), False
        except UnicodeDecodeError as error:
            table, problems = Table(), [f"not text ({error.reason})"]
        except OSError as error:
            warn_once(
                f"{path} cannot be read ({error.strerror}): tuned configurations are not used"
            )
            return Table(), False
        else:
            table, problems = parse(text)
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            warn_once(
                f"{path} is damaged: {problems[0]}{more}; its {len(table)} valid entries are used, "
                "and the file is set aside when the next result is written"
            )
        return table, bool(problems)


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def write_whole(path: Path, text: str) -> None:
    """Replaces a file by a complete new one: readers see the old one or the new one.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
