"""Tuning results as JSON: the format of the user's store, of shipped tables and of lock files.

``{"format": "pymllm tuning 1", "sections": [section, ...]}``. A section has what its measurements
hold for (``operation`` and the fields of ``Conditions``) and ``entries``, one a line: the fields of a
``TuningKey`` but the operation, ``m`` (the bucket) and the fields of an ``Entry``. A lock file has
``"strict"`` besides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from pymllm_kernels.tuning.keys import BUCKETS, Conditions, TuningKey

FORMAT = "pymllm tuning 1"


@dataclass(frozen=True)
class Entry:
    """The outcome of tuning a key for a bucket of M.

    Attributes:
        config: the configuration that was chosen, as its operation writes it in JSON.
        median_us: its time, microseconds.
        date: day of the measurement, ``YYYY-MM-DD``.
        runner_up: the fastest of the others, or ``None``.
        runner_up_us: its time.
        timings: time of each candidate by :func:`config_digest`, microseconds; ``None`` for one that
            did not run or was wrong.
    """

    config: Mapping[str, Any]
    median_us: float
    date: str
    runner_up: Mapping[str, Any] | None = None
    runner_up_us: float | None = None
    timings: Mapping[str, float | None] = field(default_factory=dict)


class Place(NamedTuple):
    """Where an entry lies."""

    conditions: Conditions
    key: TuningKey
    m: int


class Table:
    """Entries by key and bucket, and by the conditions they were measured under."""

    def __init__(self, entries: Mapping[Place, Entry] | None = None, strict: bool = False) -> None:
        self._entries: dict[tuple[TuningKey, int], dict[Conditions, Entry]] = {}
        self.strict = strict
        for place, entry in (entries or {}).items():
            self.put(place, entry)

    def get(self, place: Place) -> Entry | None:
        """The entry of exactly these conditions, key and bucket."""
        return self._entries.get(place[1:], {}).get(place.conditions)

    def elsewhere(self, key: TuningKey, m: int) -> list[Conditions]:
        """All conditions under which this was measured."""
        return list(self._entries.get((key, m), ()))

    def put(self, place: Place, entry: Entry) -> None:
        """Adds or replaces an entry."""
        self._entries.setdefault(place[1:], {})[place.conditions] = entry

    def items(self) -> Iterator[tuple[Place, Entry]]:
        """All entries, ordered by operation, shape, variant and bucket."""
        for key, m in sorted(self._entries, key=lambda item: (*vars(item[0]).values(), item[1])):
            for conditions, entry in self._entries[key, m].items():
                yield Place(conditions, key, m), entry

    def __len__(self) -> int:
        return sum(len(found) for found in self._entries.values())


def config_digest(config: Mapping[str, Any]) -> str:
    """A short name of a configuration, the same everywhere."""
    import hashlib

    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def dump(table: Table, *, lock: bool = False) -> str:
    """The document of a table, one entry a line; with ``strict`` if it is a lock file."""
    sections: dict[tuple[str, Conditions], list[str]] = {}
    for place, entry in table.items():
        # Not asdict, which copies deeply: 0.6 s instead of 0.15 for 7,500 entries.
        row = {**vars(place.key)}
        operation = row.pop("operation")
        row |= {"m": place.m, **{k: v for k, v in vars(entry).items() if v not in (None, {})}}
        line = json.dumps(row, separators=(",", ":"))
        sections.setdefault((operation, place.conditions), []).append(line)
    parts = []
    for (operation, conditions), lines in sections.items():
        head = json.dumps({"operation": operation, **asdict(conditions)})
        parts.append(head[:-1] + ', "entries": [\n' + ",\n".join(lines) + "\n]}")
    strict = f'"strict": {json.dumps(table.strict)}, ' if lock else ""
    return f'{{"format": "{FORMAT}", {strict}"sections": [\n' + ",\n".join(parts) + "\n]}\n"


def parse(text: str) -> tuple[Table, list[str]]:
    """The table of a document, and what is wrong with it: bad entries are left out and told."""
    table = Table()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        return table, [f"not JSON ({error})"]
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        return table, [f"format: found {found!r}, accepted {FORMAT!r}"]
    problems = []
    table.strict = document.get("strict", False) is True
    sections = document.get("sections")
    if not isinstance(sections, list):
        return table, ["sections: found none"]
    for section in sections:
        try:
            head = dict(_typed(section, _SECTION, _SECTION))
            rows, operation = head.pop("entries"), head.pop("operation")
            conditions = Conditions(**head)
        except ValueError as error:
            problems.append(f"section: {error}")
            continue
        for row in rows:
            try:
                key, m, entry = _row(operation, row)
            except ValueError as error:
                problems.append(f"entry {json.dumps(row)[:120]}: {error}")
                continue
            table.put(Place(conditions, key, m), entry)
    return table, problems


_HEAD: dict[str, tuple[type, ...]] = {
    "operation": (str,),
    **{f.name: (int,) if f.type == "int" else (str,) for f in fields(Conditions)},
}
_SECTION = {**_HEAD, "entries": (list,)}
_KEY: dict[str, tuple[type, ...]] = {
    "n": (int,),
    "k": (int,),
    "group_size": (int,),
    "dtype": (str,),
    "variant": (str,),
    "m": (int,),
}
_ENTRY: dict[str, tuple[type, ...]] = {
    "config": (dict,),
    "median_us": (int, float),
    "date": (str,),
}
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "runner_up": (dict,),
    "runner_up_us": (int, float),
    "timings": (dict,),
}


_ROW = {**_KEY, **_ENTRY}
_ROW_OR_MORE = {**_ROW, **_OPTIONAL}


def _row(operation: str, row: object) -> tuple[TuningKey, int, Entry]:
    values = _typed(row, _ROW, _ROW_OR_MORE)
    entry = Entry(**{name: value for name, value in values.items() if name not in _KEY})
    m = values["m"]
    if m not in BUCKETS:
        raise ValueError(f"m: found {m}, accepted powers of two up to {BUCKETS[-1]}")
    if not entry.median_us > 0:
        raise ValueError(f"median_us: found {entry.median_us}, accepted positive numbers")
    for digest, timing in entry.timings.items():
        if timing is not None and type(timing) not in (int, float):
            raise ValueError(f"timings: {digest}: found {timing!r}, accepted numbers")
    key = TuningKey(operation, *(values[name] for name in _KEY if name != "m"))
    return key, m, entry


def _typed(
    found: object, required: Mapping[str, tuple[type, ...]], known: Mapping[str, tuple[type, ...]]
) -> dict[str, Any]:
    """The fields of a JSON object, checked: a table has thousands, and each start reads it.

    Raises:
        ValueError: one is missing, unknown or of another type.
    """
    if not isinstance(found, dict):
        raise ValueError(f"found {found!r:.80}, accepted an object")  # noqa: TRY004  a bad file
    if not required.keys() <= found.keys() <= known.keys():
        raise ValueError(f"found fields {sorted(found)}, accepted {sorted(known)}")
    for name, value in found.items():
        # JSON has no subclasses but bool, which is not a number here.
        if type(value) not in known[name]:
            raise ValueError(f"{name}: found {value!r:.80}")
    return found
