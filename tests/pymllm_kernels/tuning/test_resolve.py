"""What a call runs with: the order of origins, misses that name their reason, pins, lock files."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pymllm_kernels import tuning
from pymllm_kernels.device import DeviceFacts
from pymllm_kernels.testing.toy_tunable import (
    BOARD,
    H200,
    KEY,
    TOY,
    Tile,
    entry,
    one_warning,
    place,
)
from pymllm_kernels.tuning import Place, Table, TuningKey, bucket, config_for, resolve, state
from pymllm_kernels.tuning.document import dump, parse
from pymllm_kernels.tuning.source import source_hash
from pymllm_kernels.tuning.state import table_path
from pymllm_kernels.w4a16 import tunable as w4a16_tunable
from pymllm_kernels.w8a8_int8 import tunable as w8a8_tunable


def ship(facts: DeviceFacts, table: Table, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Makes a table the one that the package brings."""
    folder.mkdir(exist_ok=True)
    patch.setattr(state, "TABLES", folder)
    state.shipped.cache_clear()
    table_path(facts.name).write_text(dump(table))


@pytest.fixture
def tables(tmp_path: Path) -> Any:
    """A folder for shipped tables, forgotten after the test."""
    yield tmp_path / "tables"
    state.shipped.cache_clear()


def test_pinned_before_store_before_shipped_before_rule(
    directory: Path, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(TOY, KEY, 5, BOARD)[:2] == (Tile(8), "rule")
    ship(BOARD, Table({place(8): entry(Tile(16))}), tables, monkeypatch)
    assert resolve(TOY, KEY, 5, BOARD)[:2] == (Tile(16), "shipped")
    state.keep(place(8), entry(Tile(32)))
    assert resolve(TOY, KEY, 5, BOARD)[:2] == (Tile(32), "store")
    tuning.pin(TOY, KEY, Tile(64))
    assert resolve(TOY, KEY, 5, BOARD)[:2] == (Tile(64), "pinned")
    tuning.pin(TOY, KEY, Tile(4), 6)
    assert resolve(TOY, KEY, 5, BOARD)[:2] == (Tile(4), "pinned")
    assert resolve(TOY, KEY, 9, BOARD)[:2] == (Tile(64), "pinned")
    tuning.unpin(KEY, 5)
    assert resolve(TOY, KEY, 5, BOARD)[:2] == (Tile(64), "pinned")
    tuning.unpin()
    assert resolve(TOY, KEY, 5, BOARD)[:2] == (Tile(32), "store")
    assert "measured 10 us on 2026-11-26" in resolve(TOY, KEY, 5, BOARD).reason


def test_a_lock_file_comes_between_pins_and_store(directory: Path, tmp_path: Path) -> None:
    state.keep(place(8), entry(Tile(32)))
    path = tmp_path / "lock"
    path.write_text(dump(Table({place(8): entry(Tile(16))}), lock=True))
    tuning.load_lock(path, strict=False)
    assert resolve(TOY, KEY, 5, BOARD)[:2] == (Tile(16), "pinned")
    assert str(path) in resolve(TOY, KEY, 5, BOARD).reason
    assert resolve(TOY, KEY, 1, BOARD).origin == "rule"
    tuning.pin(TOY, KEY, Tile(64))
    assert resolve(TOY, KEY, 5, BOARD).config == Tile(64)
    tuning.unpin()
    tuning.unlock()
    assert resolve(TOY, KEY, 5, BOARD)[:2] == (Tile(32), "store")


def test_a_strict_lock_file_makes_a_missing_key_an_error(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    table = Table({place(8): entry(Tile(16))})
    path.write_text(dump(table, lock=True))
    tuning.load_lock(path)
    assert resolve(TOY, KEY, 7, BOARD).config == Tile(16)
    with pytest.raises(
        ValueError, match=r"toy 4096x4096 group 128 bfloat16 M<=16: not in the lock"
    ):
        resolve(TOY, KEY, 9, BOARD)
    with pytest.raises(ValueError, match=r"toy 512x4096 .*not tuned"):
        resolve(TOY, replace(KEY, n=512), 7, BOARD)
    # The same entry, locked elsewhere: bit-equal results are not promised.
    elsewhere = replace(place(8).conditions, triton="3.0.0")
    path.write_text(dump(Table({Place(elsewhere, KEY, 8): entry(Tile(16))}), lock=True))
    tuning.load_lock(path)
    with pytest.raises(ValueError, match=r"Triton 3\.0\.0 there"):
        resolve(TOY, KEY, 7, BOARD)


def test_the_lock_file_of_the_directory_is_found(directory: Path) -> None:
    table = Table({place(8): entry(Tile(16))}, strict=True)
    directory.mkdir()
    (directory / "lock.json").write_text(dump(table, lock=True))
    tuning.use_directory(directory)
    assert resolve(TOY, KEY, 8, BOARD)[:2] == (Tile(16), "pinned")
    with pytest.raises(ValueError, match="strict"):
        resolve(TOY, KEY, 1, BOARD)


def test_a_damaged_lock_file_is_an_error_not_a_rule(directory: Path, tmp_path: Path) -> None:
    text = dump(Table({place(8): entry(Tile(16))}), lock=True)
    (tmp_path / "lock").write_text(text[:-30])
    with pytest.raises(ValueError, match=r"lock file .*not JSON"):
        tuning.load_lock(tmp_path / "lock")
    directory.mkdir()
    (directory / "lock.json").write_text(text[:-30])
    tuning.use_directory(directory)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"lock file .*not JSON"):
            resolve(TOY, KEY, 8, BOARD)


CHANGES = [
    ("board", "Another board", "board Another board there, Board of the tests here"),
    ("capability", "8.9", "capability 8.9 there, 9.0 here"),
    ("multiprocessors", 66, "multiprocessors 66 there, 132 here"),
    ("triton", "3.0.0", "Triton 3.0.0 there, "),
    ("kernel", "0000", "kernel source 0000 there, "),
]


@pytest.mark.parametrize(("field", "value", "told"), CHANGES, ids=[c[0] for c in CHANGES])
@pytest.mark.parametrize("where", ["store", "shipped"])
def test_other_conditions_are_a_miss_that_names_the_field(
    directory: Path, tables: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, field: str, value: Any, told: str, where: str,
) -> None:  # fmt: skip
    there = Place(replace(place(8).conditions, **{field: value}), KEY, 8)
    if where == "store":
        state.keep(there, entry(Tile(16)))
    else:
        ship(BOARD, Table({there: entry(Tile(16))}), tables, monkeypatch)
    with caplog.at_level(logging.INFO), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = resolve(TOY, KEY, 8, BOARD)
        resolve(TOY, KEY, 8, BOARD)
    assert found[:2] == (Tile(8), "rule")
    assert told in found.reason
    assert told in caplog.text
    # What this user tuned on this board is worth a warning, once; other boards' results are not.
    stale = where == "store" and field != "board"
    assert [told in str(warning.message) for warning in caught] == [True] * stale


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, dtype="float16"), replace(KEY, group_size=64), replace(KEY, n=8192),
        replace(KEY, k=8192), replace(KEY, variant="zero"), replace(KEY, operation="other"),
    ],
    ids=str,
)  # fmt: skip
def test_another_layer_is_a_miss(directory: Path, other: TuningKey) -> None:
    state.keep(place(8), entry(Tile(16)))
    assert resolve(TOY, KEY, 8, BOARD).origin == "store"
    assert resolve(TOY, other, 8, BOARD).origin == "rule"
    assert resolve(TOY, KEY, 9, BOARD).origin == "rule"


def test_a_table_of_another_card_is_never_read(
    directory: Path, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(H200, Table({place(8, facts=H200): entry(Tile(16))}), tables, monkeypatch)
    assert resolve(TOY, KEY, 8, H200).origin == "shipped"
    for name in ("NVIDIA H200 NVL", "NVIDIA H20", "NVIDIA H100 80GB HBM3", "../NVIDIA H200"):
        found = resolve(TOY, KEY, 8, replace(H200, name=name))
        assert found.origin == "rule"
        assert found.reason.endswith(f"no table is shipped for {name}")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"kernel": "tile", "size": 128, "wide": False}, "more than 64"),
        ({"kernel": "tile", "size": 0, "wide": False}, "ZeroDivisionError"),
        ({"kernel": "gone", "size": 16, "wide": False}, "kernel 'gone'"),
        ({"kernel": "tile", "size": 16}, "found fields"),
        ({"kernel": "tile", "size": 16, "wide": 0}, "wide: found 0"),
        ({"kernel": "tile", "size": True, "wide": True}, "size: found True"),
        ({"kernel": "tile", "size": 16, "wide": False, "new": 1}, "found fields"),
    ],
)
def test_a_stored_configuration_that_cannot_run_is_a_miss(
    directory: Path, config: dict[str, Any], told: str
) -> None:
    state.keep(place(8), replace(entry(Tile(16)), config=config))
    found = resolve(TOY, KEY, 8, BOARD)
    assert found[:2] == (Tile(8), "rule")
    assert told in found.reason


def test_a_directory_that_cannot_be_entered(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user's home: whether there is a lock file cannot be known, and the layer runs."""

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    for name in ("exists", "read_text"):
        monkeypatch.setattr(Path, name, refuse)
    with one_warning("store.json cannot be read (Permission denied)"):
        assert resolve(TOY, KEY, 8, BOARD)[:2] == (Tile(8), "rule")


def test_a_pinned_configuration_that_cannot_run_is_an_error(directory: Path) -> None:
    tuning.pin(TOY, KEY, Tile(128))
    with pytest.raises(
        ValueError, match=r"toy 4096x4096 .*pinned for M = 8: 32 tiles: size 128 is more"
    ):
        resolve(TOY, KEY, 8, BOARD)
    with pytest.raises(ValueError, match="accepted"):
        tuning.pin(TOY, KEY, "fast")


def test_a_configuration_is_adapted_to_the_tokens(directory: Path) -> None:
    state.keep(place(8), entry(Tile(16, wide=True)))
    assert resolve(TOY, KEY, 8, BOARD).config == Tile(16, wide=True)
    assert resolve(TOY, KEY, 7, BOARD).config == Tile(16)


def test_kept_configurations_follow_every_change(directory: Path, tmp_path: Path) -> None:
    def now() -> Any:
        return config_for(TOY, KEY, 8, BOARD)

    seen = [tuning.generation()]
    assert now() == Tile(8)
    state.keep(place(8), entry(Tile(16)))
    seen.append(tuning.generation())
    assert now() == Tile(16)
    tuning.pin(TOY, KEY, Tile(32))
    seen.append(tuning.generation())
    assert now() == Tile(32)
    tuning.unpin()
    seen.append(tuning.generation())
    assert now() == Tile(16)
    tuning.use_directory(tmp_path / "other")
    seen.append(tuning.generation())
    assert now() == Tile(8)
    assert len(set(seen)) == len(seen)
    assert seen == sorted(seen)


HOPPER = [
    (w4a16_tunable.HOPPER, w4a16_tunable.hopper_key(n, k, 128, *[torch.bfloat16] * 2, True))
    for n, k in ((4096, 4096), (28672, 4096), (132 * 128, 2048))
] + [
    (w8a8_tunable.HOPPER, w8a8_tunable.hopper_key(n, k, torch.bfloat16, True, False))
    for n, k in ((4096, 4096), (28672, 4096), (132 * 64, 2048))
]


@pytest.mark.parametrize(("tunable", "key"), HOPPER, ids=lambda v: getattr(v, "operation", ""))
def test_every_candidate_of_a_bucket_runs_every_number_of_tokens_in_it(
    directory: Path, tunable: Any, key: TuningKey
) -> None:
    """What was tuned for 256 tokens is not refused at 200; else a server would meet the rule there."""
    for top in (1, 8, 64, 256, 2048, 8192):
        for config in tunable.candidates(key, top, H200):
            assert tunable.from_json(tunable.to_json(config)) == config
            assert tunable.why_invalid(config, key, top, H200) is None
            for m in {top // 2 + 1, top - top // 4, max(top - 1, 1)}:
                if bucket(m) != top:
                    continue
                adapted = tunable.adapt(config, key, m, H200)
                assert tunable.why_invalid(adapted, key, m, H200) is None, (config, m)


@pytest.mark.parametrize(
    ("tunable", "key"),
    [
        *HOPPER,
        (w4a16_tunable.TRITON, w4a16_tunable.triton_key(4, 4096, 4096, 128, torch.bfloat16, False)),
        (w4a16_tunable.TRITON, w4a16_tunable.triton_key(8, 64, 4096, -1, torch.float16, True)),
        (w8a8_tunable.TRITON, w8a8_tunable.triton_key(4096, 4090, torch.bfloat16)),
    ],
    ids=lambda value: getattr(value, "operation", ""),
)
def test_the_rule_is_the_first_candidate(tunable: Any, key: TuningKey) -> None:
    for m in (1, 7, 64, 300, 5000):
        found = tunable.candidates(key, m, H200)
        assert found[0] == tunable.rule(key, m, H200)
        assert len(set(found)) == len(found) > 1
        assert all(tunable.why_invalid(c, key, m, H200) is None for c in found)


SHIPPED = sorted((Path(state.__file__).parent / "tables").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.stem))
def test_shipped_tables_are_whole_and_of_these_kernels(path: Path) -> None:
    """One of other kernels is dead weight: ``pymllm tune --shipped-table`` writes it anew."""
    operations = {tunable.operation: tunable for tunable, _ in HOPPER}
    table, problems = parse(path.read_text())
    assert not problems
    assert len(table)
    for there, found in table.items():
        tunable = operations[there.key.operation]
        assert path == table_path(there.conditions.board)
        assert there.conditions.kernel == source_hash(tunable.sources)
        facts = replace(H200, name=there.conditions.board)
        config = tunable.from_json(found.config)
        assert tunable.why_invalid(config, there.key, there.m, facts) is None


def test_what_is_shipped_for_a_like_layer_is_used(
    directory: Path, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After all that was measured for the layer itself, if it is valid for it, and it says so."""
    other = replace(KEY, dtype="float16")
    monkeypatch.setattr(type(TOY), "like", lambda self, key: KEY if key == other else None)
    ship(BOARD, Table({place(8): entry(Tile(16)), place(4): entry(Tile(65))}), tables, monkeypatch)
    found = resolve(TOY, other, 5, BOARD)
    assert found[:2] == (Tile(16), "shipped")
    assert found.reason.startswith("toy 4096x4096 group 128 bfloat16 M<=8 measured 10 us")
    assert resolve(TOY, other, 4, BOARD).origin == resolve(TOY, other, 2, BOARD).origin == "rule"
    state.keep(place(8, other), entry(Tile(32)))
    assert resolve(TOY, other, 5, BOARD)[:2] == (Tile(32), "store")


def test_what_a_like_layer_takes_instead(
    directory: Path, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the rule's then, and says what it is taken instead of."""
    other = replace(KEY, dtype="float16")
    monkeypatch.setattr(type(TOY), "like", lambda self, key: KEY if key == other else None)
    monkeypatch.setattr(type(TOY), "borrowed", lambda self, config, key, m, facts: Tile(32))
    ship(BOARD, Table({place(8): entry(Tile(16))}), tables, monkeypatch)
    found = resolve(TOY, other, 5, BOARD)
    assert found[:2] == (Tile(32), "rule")
    assert found.reason.endswith(f"takes {Tile(16)}, this kind of layer another")
    assert resolve(TOY, KEY, 5, BOARD)[:2] == (Tile(16), "shipped")


def test_kinds_of_layers_that_lend_each_other_configurations_only_in_part() -> None:
    """Tokens that a program quantizes by itself, and those that it puts in order by itself."""
    from pymllm_kernels.w4a16.hopper_decode_tuning import DecodeConfig
    from pymllm_kernels.w4a16.hopper_tuning import HopperConfig
    from pymllm_kernels.w8a8_int8.hopper_fused_tuning import FusedConfig

    bf16 = torch.bfloat16
    for static, symmetric in ((True, True), (False, False)):
        key = w8a8_tunable.hopper_key(4096, 4096, bf16, symmetric, static)
        fused, other = FusedConfig(8, 64, 256), FusedConfig(1, 64, 256)
        # 8 tokens: 11.6 and 11.0 us, 8.0 with codes of a kernel before; one token 7.1 and 8.1.
        taken = w8a8_tunable.HOPPER.borrowed(fused, key, 8, H200)
        assert not isinstance(taken, FusedConfig)
        assert w8a8_tunable.HOPPER.why_invalid(taken, key, 8, H200) is None
        assert w8a8_tunable.HOPPER.borrowed(other, key, 1, H200) == other
    hopper = w4a16_tunable.HOPPER
    key = w4a16_tunable.hopper_key(28672, 4096, 128, bf16, bf16, True, act_order=True)
    assert hopper.like(key) == replace(key, variant="")
    config = DecodeConfig(8, rows=4)
    assert hopper.borrowed(config, key, 1, H200) == replace(config, keep=True)
    tiles = HopperConfig(block_m=8, consumers=4, slots=4, span=2)
    taken = hopper.borrowed(tiles, key, 1, H200)
    assert isinstance(taken, DecodeConfig) and taken.keep
    assert hopper.borrowed(tiles, key, 2, H200) == tiles
    # Too long to be kept.
    long = replace(key, k=14336)
    assert not getattr(hopper.borrowed(config, long, 1, H200), "keep", False)


def test_which_layers_are_alike() -> None:
    """Of these operations: 16-bit dtypes, zero points, a scale a row; not smaller groups or 8 bits."""
    from pymllm_kernels.w4a16.tunable import HOPPER as W4A16
    from pymllm_kernels.w8a8_int8.tunable import HOPPER as W8A8

    def w4a16(group: int, dtype: str, variant: str = "") -> TuningKey:
        return TuningKey(W4A16.operation, 4096, 4096, group, dtype, variant)

    base = w4a16(128, "bfloat16")
    assert W4A16.like(base) is None
    for key in (w4a16(128, "float16"), w4a16(-1, "bfloat16"), w4a16(256, "float16", "zero")):
        assert W4A16.like(key) == base
    for group, variant in ((64, ""), (32, ""), (128, "bits=8"), (128, "scale=float16")):
        assert W4A16.like(w4a16(group, "bfloat16", variant)) is None
    assert W4A16.like(w4a16(64, "float16", "bits=8 zero")) == w4a16(64, "bfloat16", "bits=8")
    int8 = TuningKey(W8A8.operation, 4096, 4096, -1, "bfloat16")
    assert W8A8.like(int8) is None
    assert W8A8.like(replace(int8, dtype="float16", variant="zero static")) == int8
