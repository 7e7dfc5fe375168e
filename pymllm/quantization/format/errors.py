"""One wording for everything the reader of a quantization block refuses."""

from __future__ import annotations

_SHOWN_CHARS = 160


def shown(value: object) -> str:
    """``repr`` of ``value``, cut to a length fit for an error message."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


def refusal(where: str, field: str, found: object, accepted: str) -> ValueError:
    """Error saying where a value stands, what it is and what could stand there instead.

    Args:
        where: the place, e.g. ``"group 'group_0'"``.
        field: dotted key below it, e.g. ``"weights.num_bits"``.
        found: the value as read.
        accepted: what the field may hold, in words.
    """
    return ValueError(
        f"quantization config, {where}: {field}: found {shown(found)}; accepted: {accepted}"
    )


def group_place(group: str) -> str:
    """How messages name a config group."""
    return f"group {group!r}"
