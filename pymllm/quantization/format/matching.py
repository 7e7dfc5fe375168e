"""Which layer gets which scheme (compressed-tensors format, resolution of targets)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pymllm.quantization.format.errors import refusal
from pymllm.quantization.format.scheme import LayerScheme

if TYPE_CHECKING:
    from torch import nn

    from pymllm.quantization.format.block import QuantBlock

REGEX_PREFIX = "re:"

DEFAULT_PACKED_MODULES_MAPPING: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

# What a plain linear layer answers to when only its name is known.
_LINEAR_CLASS_NAMES = ("Linear", "Module")
# Layer classes of inference engines, ours included, that stand for an `nn.Linear` of the
# checkpoint without deriving from it.
_LINEAR_STANDINS = frozenset(
    ("LinearBase", "MergedLinear", "ColumnParallelLinear", "RowParallelLinear")
)


class EntryList:
    """A list of target or ignore entries, checked and compiled once.

    An entry ``re:PATTERN`` matches names by ``re.match`` (anchored at the start only). Any
    other entry matches the name, or the class name, that equals it.
    """

    def __init__(self, entries: Iterable[str], where: str, field: str) -> None:
        """Compile ``entries``.

        Args:
            entries: the entries as written; order and repetition do not matter.
            where: place named in messages, e.g. ``"group 'group_0'"``.
            field: ``"targets"`` or ``"ignore"``.

        Raises:
            ValueError: a pattern is not a regular expression; the message names ``where`` and
                the pattern.
        """
        ordered = sorted(set(entries), key=_priority)
        self._plain = frozenset(e for e in ordered if not e.startswith(REGEX_PREFIX))
        self._regexes = [
            (entry, _compiled(entry, where, field))
            for entry in ordered
            if entry.startswith(REGEX_PREFIX)
        ]

    def names_exactly(self, name: str) -> bool:
        """True when an entry without ``re:`` equals ``name``."""
        return name in self._plain

    def by_name(self, name: str) -> str | None:
        """Entry that decides by name: the exact one, else the first regex in string order."""
        if name in self._plain:
            return name
        return next((entry for entry, regex in self._regexes if regex.match(name)), None)

    def by_class(self, class_names: Sequence[str]) -> str | None:
        """First entry, in string order, that equals one of ``class_names``."""
        return min(self._plain.intersection(class_names), key=_priority, default=None)

    def find(self, name: str, class_names: Sequence[str]) -> str | None:
        """Entry that decides: exact name, then regexes, then class names."""
        by_name = self.by_name(name)
        return self.by_class(class_names) if by_name is None else by_name

    def regexes_matching(self, name: str) -> set[str]:
        """All ``re:`` entries that match ``name``."""
        return {entry for entry, regex in self._regexes if regex.match(name)}


def class_names_of(module: nn.Module | None) -> tuple[str, ...]:
    """Class names a module answers to: its class and every ``nn.Module`` parent.

    ``"Linear"`` is added for classes that stand for an ``nn.Linear`` without deriving from
    it: anything with a parent called ``LinearBase`` (compressed-tensors format, special case)
    and the merged and parallel layers. None stands for a plain ``nn.Linear``.
    """
    if module is None:
        return _LINEAR_CLASS_NAMES
    from torch import nn  # here, so that a checkpoint can be planned without loading torch

    names = [cls.__name__ for cls in type(module).__mro__ if issubclass(cls, nn.Module)]
    if not _LINEAR_STANDINS.isdisjoint(names) and "Linear" not in names:
        names.append("Linear")
    return tuple(names)


def resolve(
    block: QuantBlock,
    name: str,
    class_names: Sequence[str],
    packed_modules_mapping: Mapping[str, Sequence[str]] = DEFAULT_PACKED_MODULES_MAPPING,
) -> LayerScheme | None:
    """Scheme of the layer called ``name``, or None when it is not quantized.

    A layer that no target matches, or that any ``ignore`` entry matches by name or class, is
    not quantized. Otherwise exact names beat regexes, regexes beat class names, regexes go in
    string order, and a target listed by two groups belongs to the later one
    (compressed-tensors format, the library's resolution).

    A name whose last component is a key of ``packed_modules_mapping`` stands for several
    stored layers. It is resolved under its own name when an entry spells that name exactly,
    or when a regex matches it and none of its shards. Otherwise every shard is resolved, and
    all must agree.

    Args:
        block: the parsed quantization block.
        name: full dotted module name, without ``.weight``.
        class_names: what :func:`class_names_of` gives for the module.
        packed_modules_mapping: last name component of a fused layer -> those of its shards.

    Raises:
        ValueError: the shards of a fused layer differ, or entries naming the fused layer and
            entries naming its shards contradict each other; the message names the layer.
    """
    parent, dot, leaf = name.rpartition(".")
    shards = [parent + dot + shard for shard in packed_modules_mapping.get(leaf, ())]
    if not shards or block.targets.names_exactly(name) or block.ignored.names_exactly(name):
        return _resolve_one(block, name, class_names)[0]
    names_fused, names_shards = _named_side(block, name, shards)
    if not names_fused:
        return _resolve_shards(block, name, shards, class_names)
    own, reason = _resolve_one(block, name, class_names)
    if not names_shards:
        return own
    results, told = _resolve_each(block, shards, class_names)
    if all(_agree(own, scheme) for scheme in results):
        return own
    raise ValueError(
        f"quantization config: fused layer {name!r}: regexes name both the fused layer "
        f"({reason}) and its shards ({told}), and the results differ; accepted: entries that "
        "agree, or one that spells the fused name in full"
    )


def _priority(entry: str) -> tuple[bool, str]:
    # The library tests for the prefix anywhere in the entry; kept for equal ordering.
    return (REGEX_PREFIX in entry, entry)


def _compiled(entry: str, where: str, field: str) -> re.Pattern[str]:
    pattern = entry[len(REGEX_PREFIX) :]
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise refusal(where, field, entry, f"a regular expression after 're:' ({error})") from None


def _resolve_one(
    block: QuantBlock, name: str, class_names: Sequence[str]
) -> tuple[LayerScheme | None, str]:
    """Resolve ``name`` as it stands; the second value says in words what decided."""
    target = block.targets.find(name, class_names)
    if target is None:
        return None, "not quantized, no target matches"
    ignore = block.ignored.find(name, class_names)
    if ignore is not None:
        return None, f"not quantized, ignored by {ignore!r}"
    scheme = block.scheme_by_target[target]
    return scheme, f"group {scheme.group!r} by target {target!r}"


def _named_side(block: QuantBlock, name: str, shards: Sequence[str]) -> tuple[bool, bool]:
    """Whether entries single out the fused layer, and whether entries single out shards.

    A regex that matches the fused name and every shard singles out neither.
    """
    names_fused = names_shards = False
    for entries in (block.targets, block.ignored):
        own = entries.regexes_matching(name)
        hits = [entries.regexes_matching(shard) for shard in shards]
        names_fused |= bool(own.difference(*hits))
        wide = own.intersection(*hits)
        names_shards |= any(hit - wide for hit in hits)
        names_shards |= any(entries.names_exactly(shard) for shard in shards)
    return names_fused, names_shards


def _resolve_shards(
    block: QuantBlock, name: str, shards: Sequence[str], class_names: Sequence[str]
) -> LayerScheme | None:
    results, told = _resolve_each(block, shards, class_names)
    if all(_agree(results[0], scheme) for scheme in results):
        return results[0]
    raise ValueError(
        f"quantization config: fused layer {name!r}: its shards differ ({told}); accepted: the "
        "same scheme for all of them, or none of them quantized"
    )


def _resolve_each(
    block: QuantBlock, names: Sequence[str], class_names: Sequence[str]
) -> tuple[list[LayerScheme | None], str]:
    """Schemes of several layers, and one text saying how each was decided."""
    results = [_resolve_one(block, name, class_names) for name in names]
    told = "; ".join(f"{name}: {why}" for name, (_, why) in zip(names, results, strict=True))
    return [scheme for scheme, _ in results], told


def _agree(one: LayerScheme | None, other: LayerScheme | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.same_layout(other)
