"""What the commands print: tables and JSON on stdout, progress and warnings on stderr."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymllm.quantization.format import LayerScheme
    from pymllm_kernels import KernelChoice


# Longer silence looks like a hang.
_SILENCE_S = 5.0


def format_table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], *, right: Collection[str] = ()
) -> str:
    """Plain text with aligned columns, two blanks between them, no trailing blanks.

    Args:
        headers: one title a column.
        rows: cells; ``None`` is printed empty.
        right: titles of the columns to align to the right.
    """
    table = [list(headers)]
    table += [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(headers))]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if title in right else cell.ljust(width)
            for cell, width, title in zip(row, widths, headers, strict=True)
        ).rstrip()
        for row in table
    )


def add_output_options(
    parser: argparse.ArgumentParser, json_help: str = "print one JSON document"
) -> None:
    """Adds what every command takes: ``--json`` and ``--verbose``."""
    parser.add_argument("--json", action="store_true", help=json_help)
    parser.add_argument("--verbose", action="store_true", help="say each step on stderr")


def print_json(document: Mapping[str, Any]) -> None:
    """Prints one JSON document; NaN and infinity, which JSON lacks, become null."""
    print(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


def one_line(error: BaseException) -> str:
    """The message of an error on one line, an ``OSError`` without its number."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror}"
    text = " ".join(str(error).split())
    return text or type(error).__name__


class Progress:
    """Steps of long work on stderr: one changing line on a terminal, lines with ``verbose``.

    Where there is no terminal a line now and then says that the work goes on. A context manager:
    leaving it removes the changing line.
    """

    def __init__(self, verbose: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._changing = sys.stderr.isatty() and not verbose
        self._lines = verbose
        self._width = 0
        self._clock, self._said = clock, clock()

    def __enter__(self) -> Progress:  # noqa: PYI034  typing.Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def step(self, text: str) -> None:
        """Says what is being done now."""
        if self._lines or (not self._changing and self._clock() - self._said >= _SILENCE_S):
            print(text, file=sys.stderr, flush=True)
            self._said = self._clock()
        elif self._changing:
            text = text if len(text) < 79 else text[:75] + "..."
            print("\r" + text.ljust(self._width), end="", file=sys.stderr, flush=True)
            self._width = len(text)

    def clear(self) -> None:
        """Removes the changing line, before something else is printed."""
        if self._changing and self._width:
            print("\r" + " " * self._width + "\r", end="", file=sys.stderr, flush=True)
            self._width = 0


def compact_names(names: Sequence[str]) -> str:
    """One name for layers that differ in numbers only: ``model.layers.{0..31}.mlp.up_proj x32``.

    Args:
        names: dotted names with the same components where these are not numbers.
    """
    if len(names) == 1:
        return names[0]
    columns = list(zip(*(name.split(".") for name in names), strict=True))
    shown, cells = [], 1
    for column in columns:
        if column[0].isdecimal():
            numbers = sorted({int(part) for part in column})
            cells *= len(numbers)
            shown.append(str(numbers[0]) if len(numbers) == 1 else f"{{{_runs(numbers)}}}")
        else:
            shown.append(column[0])
    # A hole in the product of two ranges cannot be seen in the ranges.
    holes = "" if cells == len(names) else f" (of {cells})"
    return f"{'.'.join(shown)} x{len(names)}{holes}"


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts dotted names so that layer 2 comes before layer 10."""
    return tuple(
        (0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")
    )


def counted(number: int, thing: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def shape_of_name(name: str) -> str:
    """A name with its numbers blanked: equal for names that :func:`compact_names` can join."""
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))


def _runs(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def scheme_label(scheme: LayerScheme | None) -> str:
    """``W4A16 g128 sym``, ``W8A16 channel asym act-order``, ``W8A8 channel, token``."""
    if scheme is None:
        return "unquantized"
    weights, inputs = scheme.weights, scheme.inputs
    size = weights.columns_per_scale
    parts = [scheme.signature.upper(), weights.strategy if size == -1 else f"g{size}"]
    if inputs is None:
        parts.append("sym" if weights.symmetric else "asym")
        parts += ["act-order"] if weights.actorder == "group" else []
    else:
        parts.append("dynamic" if inputs.dynamic else "static")
        parts += [] if inputs.symmetric else ["asym"]
    return " ".join(parts)


def kernels_told(choices: Iterable[tuple[str, str]]) -> list[str]:
    """Each explanation once, under the schemes it is for.

    Args:
        choices: pairs of scheme and explanation.
    """
    schemes: dict[str, list[str]] = {}
    for scheme, explanation in choices:
        known = schemes.setdefault(explanation, [])
        if scheme not in known:
            known.append(scheme)
    lines = []
    for explanation, names in schemes.items():
        lines.append(f"{', '.join(names)}:")
        lines += [f"  {line}" for line in explanation.splitlines()]
    return lines


def choice_as_json(choice: KernelChoice) -> dict[str, Any]:
    """A kernel with its reason and those against the others, as JSON values."""
    return {
        "kernel": choice.kernel.name,
        "reason": choice.reason,
        "refusals": [{"kernel": r.kernel, "reason": r.reason} for r in choice.refusals],
        "note": choice.note,
    }
