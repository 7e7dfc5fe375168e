"""The store: written entry by entry, by many at once, on disks that do not work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from pymllm_kernels import tuning
from pymllm_kernels.testing.toy_tunable import BOARD, KEY, TOY, Tile, entry, one_warning, place
from pymllm_kernels.tuning import resolve, state
from pymllm_kernels.tuning import store as store_module
from pymllm_kernels.tuning.document import Entry, Place, Table, dump, parse
from pymllm_kernels.tuning.store import Store, default_directory

PROCESSES, KEYS = 8, 6


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test sees its warnings anew."""
    monkeypatch.setattr(store_module, "_told", set())


RACE = """
import sys, time
from pathlib import Path
from pymllm_kernels import tuning
from pymllm_kernels.testing.toy_tunable import BOARD, KEY, TOY, Tile, entry, place
from pymllm_kernels.tuning import resolve, state

index, directory = int(sys.argv[1]), Path(sys.argv[2])
tuning.use_directory(directory)
places = [place(1 << i) for i in range(6)]
print("ready", flush=True)
sys.stdin.readline()
for there in places:
    state.keep(there, entry(Tile(1 + index), 10.0 + index))
for i in range(6):
    found = resolve(TOY, KEY, 1 << i, BOARD)
    print(found.origin, found.config.size)
"""


def test_eight_processes_on_an_empty_directory_agree(tmp_path: Path) -> None:
    """Each has another result for every key; all are let go at once."""
    directory = tmp_path / "not" / "yet"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(i), str(directory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(PROCESSES)
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    found = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * PROCESSES, found
    assert {error for _, error in found} == {""}
    table, problems = parse((directory / "store.json").read_text())
    assert not problems
    assert len(table) == KEYS
    kept = [table.get(place(1 << i)) for i in range(KEYS)]
    told = "".join(f"store {TOY.from_json(e.config).size}\n" for e in kept if e)
    assert {output for output, _ in found} == {told}
    left = {path.name for path in directory.iterdir()}
    assert left <= {"store.json", "store.json.lock"}


def test_an_entry_is_on_disk_when_put_returns(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(place(1), entry(Tile(8)))
    assert Store(tmp_path).table.get(place(1)) == entry(Tile(8))
    assert (tmp_path / "store.json").read_text().count('"n":4096') == 1


def test_the_first_result_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    mine, other = Store(tmp_path), Store(tmp_path)
    assert len(other.table) == 0
    mine.put(place(1), entry(Tile(8)))
    assert other.put(place(1), entry(Tile(16))) == entry(Tile(8))
    assert other.put(place(1), entry(Tile(16)), replace=True) == entry(Tile(16))
    assert Store(tmp_path).table.get(place(1)) == entry(Tile(16))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace('"size":8', '"size":8,"median_us":"fast"').replace(
            '"median_us":10.0', '"median_us":"fast"', 1
        ),
        lambda text: '{"something": "else"}',
        lambda text: text.replace("tuning 1", "tuning 99"),
        lambda text: "[" * 100_000,
    ],
    ids=["truncated", "empty", "bad entry", "foreign", "later format", "deep"],
)
def test_a_damaged_file_is_told_once_and_set_aside(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "store.json"
    Store(tmp_path).put(place(1), entry(Tile(8)))
    broken = damage(path.read_text())
    path.write_text(broken)
    tuning.use_directory(tmp_path)
    try:
        with one_warning("store.json is damaged"):
            assert resolve(TOY, KEY, 1, BOARD).origin == "rule"
            assert resolve(TOY, KEY, 2, BOARD).config == Tile(8)
            # Nothing is written by looking up.
            assert path.read_text() == broken
            state.keep(place(2), entry(Tile(16)))
        assert resolve(TOY, KEY, 2, BOARD).config == Tile(16)
        aside = [p for p in tmp_path.iterdir() if "damaged" in p.name]
        assert [p.read_text() for p in aside] == [broken]
        assert parse(path.read_text())[1] == []
    finally:
        tuning.use_directory(None)


def test_valid_entries_of_a_damaged_file_survive(tmp_path: Path) -> None:
    path = tmp_path / "store.json"
    store = Store(tmp_path)
    store.put(place(1), entry(Tile(8)))
    store.put(place(2), entry(Tile(16), 20.0))
    path.write_text(path.read_text().replace('"median_us":20.0', '"median_us":-1'))
    with one_warning("median_us: found -1, accepted positive numbers; its 1 valid entries"):
        damaged = Store(tmp_path)
        damaged.put(place(4), entry(Tile(32)))
    assert [p.m for p, _ in Store(tmp_path).table.items()] == [1, 4]


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "tuning").write_text("a file")
    works_in_memory(tmp_path / "tuning")


def test_a_read_only_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if str(path).startswith(str(tmp_path)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    works_in_memory(tmp_path)
    assert not (tmp_path / "store.json").exists()


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path).put(place(64), entry(Tile(8)))
    before = (tmp_path / "store.json").read_text()

    def refuse(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        works_in_memory(tmp_path)
        assert (tmp_path / "store.json").read_text() == before
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_results_are_written_once_the_disk_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(116, "Stale handle")))
        with pytest.warns(UserWarning, match="Stale handle"):
            store.put(place(1), entry(Tile(8)))
    store.put(place(2), entry(Tile(8)))
    assert len(Store(tmp_path).table) == 2


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path).put(place(1), entry(Tile(16)))

    def refuse(self: Path, *args: Any, **kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.warns(UserWarning, match=r"cannot be read \(Permission denied\)"):
        assert len(Store(tmp_path).table) == 0


def works_in_memory(directory: Path) -> None:
    """Results are used, and one warning says where they are."""
    tuning.use_directory(directory)
    try:
        with one_warning(f"{directory}/store.json cannot be written"):
            assert resolve(TOY, KEY, 1, BOARD).origin == "rule"
            state.keep(place(1), entry(Tile(16)))
            state.keep(place(2), entry(Tile(32)))
        assert resolve(TOY, KEY, 1, BOARD)[:2] == (Tile(16), "store")
        assert resolve(TOY, KEY, 2, BOARD)[:2] == (Tile(32), "store")
    finally:
        tuning.use_directory(None)


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYMLLM_TUNING_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    directory, why = default_directory()
    assert directory is None
    store = Store(directory, why)
    with one_warning("in memory only: no home directory"):
        store.put(place(1), entry(Tile(16)))
        assert store.table.get(place(1)) == entry(Tile(16))


def test_where_the_directory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("PYMLLM_TUNING_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_directory() == (Path("/h/.cache/pymllm/tuning"), "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_directory() == (Path("/x/pymllm/tuning"), "")
    monkeypatch.setenv("PYMLLM_TUNING_DIR", "/t")
    assert default_directory() == (Path("/t"), "")


def test_a_document_survives_a_round_trip_and_has_a_line_an_entry() -> None:
    other = entry(Tile(8, True), 12.5)
    table = Table({place(1): entry(Tile(8)), place(2): other})
    table.strict = True
    text = dump(table, lock=True)
    again, problems = parse(text)
    assert not problems
    assert again.strict
    assert list(again.items()) == list(table.items())
    assert dump(again, lock=True) == text
    assert json.loads(text)["sections"][0]["board"] == BOARD.name
    assert sum('"median_us"' in line for line in text.splitlines()) == 2


def test_nothing_is_told_where_nothing_is_wrong(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = Store(tmp_path / "none")
        assert len(store.table) == 0
        store.put(place(1), entry(Tile(8)))
        assert isinstance(store.table.get(place(1)), Entry)


def test_entries_of_several_machines_lie_side_by_side(tmp_path: Path) -> None:
    here = place(1)
    there = Place(here.conditions.__class__("Other", "8.0", 108, "3.6.0", "0"), KEY, 1)
    Store(tmp_path).put(there, entry(Tile(32)))
    Store(tmp_path).put(here, entry(Tile(8)))
    assert len(Store(tmp_path).table) == 2
