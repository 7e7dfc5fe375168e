"""Quantization arguments of one tensor role (compressed-tensors format, argument objects)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from pymllm.quantization.format.errors import group_place, refusal

Role = Literal["weights", "input_activations", "output_activations"]

_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_GROUPED_STRATEGIES = ("group", "tensor_group")
_DYNAMIC_STRATEGIES = ("token", "tensor", "tensor_group", "group")
_ACTORDERS = {"weight": "weight", "static": "weight", "group": "group", "dynamic": "group"}

# These say how a writer calibrated. The dtype of a stored tensor is the tensor's own, so
# none of them changes how a checkpoint is read.
_CALIBRATION_KEYS = ("scale_dtype", "zp_dtype", "observer", "observer_kwargs")
_KNOWN_KEYS = frozenset(
    (
        "num_bits",
        "type",
        "symmetric",
        "strategy",
        "group_size",
        "block_structure",
        "dynamic",
        "actorder",
        *_CALIBRATION_KEYS,
    )
)


@dataclass(frozen=True)
class QuantArgs:
    """How one tensor role (weights, inputs or outputs of a layer) is quantized.

    Attributes:
        num_bits: width of a code in bits.
        type: ``"int"`` or ``"float"``.
        symmetric: True when there is no zero point.
        strategy: which elements share a scale: ``"tensor"``, ``"channel"``, ``"group"``,
            ``"block"``, ``"token"``, ``"tensor_group"`` or ``"attn_head"``. Always set:
            inferred where the checkpoint leaves it out.
        group_size: as written. Positive for the grouped strategies; None, -1 and 0 all mean
            "no groups" for the others, see :attr:`columns_per_scale`.
        block_structure: ``(rows, columns)`` of a block, with strategy ``"block"`` only.
        dynamic: True when scales are computed at run time; ``"local"`` with
            ``"tensor_group"`` only.
        actorder: ``"group"`` when columns are grouped in activation order (a stored
            ``g_idx``); ``"weight"`` when that order was used for calibration only, which
            leaves no trace in the tensors; None without ordering.
    """

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    dynamic: bool | Literal["local"] = False
    actorder: Literal["weight", "group"] | None = None

    @property
    def columns_per_scale(self) -> int:
        """Input columns that share a scale, or -1 when a whole row does."""
        if self.strategy in _GROUPED_STRATEGIES and self.group_size is not None:
            return self.group_size
        return -1

    @property
    def layout(self) -> tuple[object, ...]:
        """Everything that changes stored tensors or arithmetic, spelled one way.

        Two argument objects with equal layouts can be read by the same code:
        ``group_size`` null and -1 are the same under ``channel``, and ``actorder``
        ``"weight"`` is the same as none.
        """
        return (
            self.num_bits,
            self.type,
            self.symmetric,
            self.strategy,
            self.columns_per_scale,
            self.block_structure,
            self.dynamic,
            self.actorder == "group",
        )


def parse_arguments(raw: object, group: str, role: Role) -> QuantArgs:
    """Read and check one argument object (compressed-tensors format, argument object).

    Every key is optional; null counts as absent. Keys outside the format are reported by a
    warning and otherwise ignored.

    Args:
        raw: the parsed JSON value.
        group: name of the config group it belongs to, for messages.
        role: which of the group's argument objects it is.

    Raises:
        ValueError: a value is outside the format, or the combination is. The message names
            group, argument object, field, the value found and the accepted ones.
    """
    if not isinstance(raw, Mapping):
        raise refusal(group_place(group), role, raw, "an object with quantization arguments")
    reader = _Reader(raw, group, role)
    reader.warn_unknown_keys()
    group_size = reader.group_size()
    args = QuantArgs(
        num_bits=reader.num_bits(),
        type=reader.choice("type", ("int", "float"), "int"),
        symmetric=reader.boolean("symmetric", True),
        strategy=reader.strategy(group_size),
        group_size=group_size,
        block_structure=reader.block_structure(),
        dynamic=reader.dynamic(),
        actorder=reader.actorder(),
    )
    reader.check_combination(args)
    return args


class _Reader:
    """Typed access to the keys of one argument object."""

    def __init__(self, raw: Mapping[str, Any], group: str, role: Role) -> None:
        self._raw = raw
        self._group = group
        self._role = role

    def refuse(self, field: str, found: object, accepted: str) -> ValueError:
        return refusal(group_place(self._group), f"{self._role}.{field}", found, accepted)

    def warn_unknown_keys(self) -> None:
        unknown = sorted(str(key) for key in self._raw if key not in _KNOWN_KEYS)
        if unknown:
            warnings.warn(
                f"quantization config, {group_place(self._group)}: {self._role} has keys "
                f"outside the format, ignored: {', '.join(unknown)}",
                stacklevel=3,
            )

    def integer(self, field: str, accepted: str) -> int | None:
        value = self._raw.get(field)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.refuse(field, value, accepted)
        return value

    def num_bits(self) -> int:
        accepted = "one positive integer for the whole group"
        value = self.integer("num_bits", accepted)
        if value is None:
            return 8
        if value < 1:
            raise self.refuse("num_bits", value, accepted)
        return value

    def boolean(self, field: str, default: bool) -> bool:
        value = self._raw.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(field, value, "true or false")
        return value

    def choice(self, field: str, choices: tuple[str, ...], default: str) -> str:
        value = self._raw.get(field)
        if value is None:
            return default
        if not isinstance(value, str) or value.lower() not in choices:
            raise self.refuse(field, value, ", ".join(choices))
        return value.lower()

    def group_size(self) -> int | None:
        accepted = "null, -1, 0 or a positive integer"
        value = self.integer("group_size", accepted)
        if value is not None and value < -1:
            raise self.refuse("group_size", value, accepted)
        return value

    def strategy(self, group_size: int | None) -> str:
        if self._raw.get("strategy") is not None:
            return self.choice("strategy", _STRATEGIES, "")
        if group_size is None:
            return "tensor"
        if group_size == 0:
            raise self.refuse(
                "group_size", 0, "a positive integer or -1 when strategy is not given"
            )
        return "group" if group_size > 0 else "channel"

    def block_structure(self) -> tuple[int, int] | None:
        value = self._raw.get("block_structure")
        if value is None:
            return None
        parts = value
        if isinstance(value, str):
            texts = value.split("x")
            parts = [int(text) for text in texts] if all(t.isdecimal() for t in texts) else None
        if (
            not isinstance(parts, (list, tuple))
            or len(parts) != 2
            or any(isinstance(p, bool) or not isinstance(p, int) or p < 1 for p in parts)
        ):
            raise self.refuse("block_structure", value, "[rows, columns], positive integers")
        return (parts[0], parts[1])

    def dynamic(self) -> bool | Literal["local"]:
        value = self._raw.get("dynamic")
        if value is None or isinstance(value, bool):
            return bool(value)
        if isinstance(value, str) and value.lower() == "local":
            return "local"
        raise self.refuse("dynamic", value, "true, false or 'local'")

    def actorder(self) -> Literal["weight", "group"] | None:
        value = self._raw.get("actorder")
        if value is None or value is False:
            order = None
        elif value is True:
            order = "group"
        elif isinstance(value, str) and value.lower() in _ACTORDERS:
            order = _ACTORDERS[value.lower()]
        else:
            raise self.refuse(
                "actorder", value, "null, true, false, weight, static, group or dynamic"
            )
        if order is not None and self._role != "weights":
            raise self.refuse("actorder", value, "null: only weights have an order")
        return cast("Literal['weight', 'group'] | None", order)

    def check_combination(self, args: QuantArgs) -> None:
        strategy, size = args.strategy, args.group_size
        grouped = strategy in _GROUPED_STRATEGIES
        if grouped and (size is None or size <= 0):
            raise self.refuse("group_size", size, f"a positive integer with strategy {strategy}")
        if not grouped and size is not None and size > 0:
            raise self.refuse("group_size", size, f"null or -1 with strategy {strategy}")
        if strategy == "block" and args.block_structure is None:
            raise self.refuse("block_structure", None, "[rows, columns] with strategy block")
        if strategy != "block" and args.block_structure is not None:
            raise self.refuse(
                "block_structure", args.block_structure, f"null with strategy {strategy}"
            )
        if strategy == "token" and not args.dynamic:
            raise self.refuse("dynamic", args.dynamic, "true with strategy token")
        if args.dynamic and strategy not in _DYNAMIC_STRATEGIES:
            raise self.refuse("dynamic", args.dynamic, f"false with strategy {strategy}")
        if args.dynamic == "local" and strategy != "tensor_group":
            raise self.refuse("dynamic", "local", "true or false unless strategy is tensor_group")
        if args.actorder == "group" and not grouped:
            raise self.refuse(
                "actorder",
                self._raw.get("actorder"),
                f"null, weight or static with strategy {strategy}",
            )
