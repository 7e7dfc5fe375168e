"""Which configuration a call runs with, and where it comes from. Reads only; measures nothing."""

from __future__ import annotations

import logging
from typing import Any, Literal, NamedTuple

from pymllm_kernels.device import DeviceFacts
from pymllm_kernels.tuning import state
from pymllm_kernels.tuning.document import Place, Table
from pymllm_kernels.tuning.keys import TuningKey, bucket, conditions, differing
from pymllm_kernels.tuning.store import warn_once
from pymllm_kernels.tuning.tunable import Tunable

_log = logging.getLogger(__name__)

_MOST_KEPT = 65536

Origin = Literal["pinned", "store", "shipped", "rule"]


class Resolved(NamedTuple):
    """A configuration.

    Attributes:
        config: of the operation's class, valid for the number of tokens asked for.
        origin: ``"pinned"`` by the caller or a lock file, ``"store"`` of the user, ``"shipped"`` with
            the package, or the ``"rule"``.
        reason: what it was measured with, or why there is nothing measured.
    """

    config: Any
    origin: Origin
    reason: str


class _Found(NamedTuple):
    """A configuration, or ``None`` and why not; ``by_rule``: another than the one that was measured."""

    config: Any
    reason: str
    by_rule: bool = False


def resolve(tunable: Tunable, key: TuningKey, m: int, facts: DeviceFacts) -> Resolved:
    """The configuration of ``m`` tokens: pinned, of the user's store, shipped, or by rule.

    About 20 microseconds: callers keep the result while ``state.generation`` is the same.

    Raises:
        ValueError: a pinned configuration cannot run, a strict lock file lacks the key, or no
            configuration is valid.
    """
    config = state.pinned(key, bucket(m))
    if config is not None:
        config = tunable.adapt(config, key, m, facts)
        reason = tunable.why_invalid(config, key, m, facts)
        if reason is not None:
            raise ValueError(f"{key.told()}: pinned for M = {m}: {reason}")
        return Resolved(config, "pinned", "pinned by the caller")
    place = Place(conditions(tunable.sources, facts), key, bucket(m))
    locked = state.lock()
    if locked is not None:
        path, table = locked
        found = _find(table, tunable, place, m, facts)
        if found.config is not None:
            return Resolved(found.config, "pinned", f"lock file {path}, {found.reason}")
        if table.strict:
            raise ValueError(
                f"{key.told(place.m)}: not in the lock file {path} ({found.reason}), which is strict"
            )
    found = _find(state.store().table, tunable, place, m, facts)
    if found.config is not None:
        return Resolved(found.config, "store", found.reason)
    _tell_stale(place)
    told = f"store: {found.reason}"
    table_here = state.shipped(facts.name)
    if table_here is None:
        told += f"; no table is shipped for {facts.name}"
    else:
        found = _find(table_here, tunable, place, m, facts)
        if found.config is not None:
            return Resolved(found.config, "shipped", found.reason)
        told += f"; shipped table: {found.reason}"
        like = tunable.like(key)
        if like is not None:
            found = _find(table_here, tunable, place._replace(key=like), m, facts, key)
            if found.config is not None:
                origin: Origin = "rule" if found.by_rule else "shipped"
                return Resolved(found.config, origin, f"{like.told(place.m)} {found.reason}")
    _log.info("%s: by rule (%s)", key.told(place.m), told)
    return Resolved(tunable.rule(key, m, facts), "rule", told)


_kept: dict[tuple[TuningKey, int, DeviceFacts], Any] = {}
_kept_generation = -1


def config_for(tunable: Tunable, key: TuningKey, m: int, facts: DeviceFacts) -> Any:
    """The configuration of :func:`resolve`, kept until something changes.

    Raises:
        ValueError: as :func:`resolve`.
    """
    global _kept_generation
    if _kept_generation != state.generation or len(_kept) > _MOST_KEPT:
        _kept_generation = state.generation
        _kept.clear()
    place = (key, m, facts)
    config = _kept.get(place)
    if config is None:
        config = _kept[place] = resolve(tunable, key, m, facts).config
    return config


def _find(
    table: Table, tunable: Tunable, place: Place, m: int, facts: DeviceFacts,
    key: TuningKey | None = None,
) -> _Found:  # fmt: skip
    """The entry of a place, if it is valid for ``key``, which is the place's own if absent."""
    key = key or place.key
    entry = table.get(place)
    if entry is None:
        return _Found(None, _why_missing(table, place))
    try:
        lent = config = tunable.adapt(tunable.from_json(entry.config), key, m, facts)
        if key != place.key:
            config = tunable.borrowed(lent, key, m, facts)
        reason = tunable.why_invalid(config, key, m, facts)
    except (ValueError, ArithmeticError) as error:
        # The latter of numbers that make no sense, such as tiles of no tokens.
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        return _Found(None, reason)
    if config != lent:
        return _Found(config, f"takes {lent}, this kind of layer another", by_rule=True)
    return _Found(config, f"measured {entry.median_us:.4g} us on {entry.date}")


def _why_missing(table: Table, place: Place) -> str:
    """That it was not measured, or the fields in which the nearest measurement differs."""
    there = table.elsewhere(place.key, place.m)
    if not there:
        return "not tuned"
    nearest = min((differing(conditions, place.conditions) for conditions in there), key=len)
    return f"tuned with {', '.join(nearest)}"


def _tell_stale(place: Place) -> None:
    """Warns once if what the user tuned on this board no longer holds."""
    store, here = state.store(), place.conditions
    there = store.table.elsewhere(place.key, place.m)
    stale = [c for c in there if c.board == here.board]
    if stale and here not in there:
        nearest = min((differing(c, here) for c in stale), key=len)
        warn_once(
            f"tuning results of {place.key.operation} in {store.path or 'memory'} are not used: tuned "
            f"with {', '.join(nearest)}; pymllm tune measures again"
        )
