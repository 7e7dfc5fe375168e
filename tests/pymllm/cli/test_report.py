"""Tables, JSON and compact layer names."""

from __future__ import annotations

import io
import json
import sys

import pytest

from pymllm.cli.report import (
    Progress,
    compact_names,
    counted,
    format_table,
    kernels_told,
    natural_key,
    one_line,
    print_json,
    shape_of_name,
)


def test_table_aligns_columns_and_leaves_no_trailing_blanks() -> None:
    rows = [("a.long.name", 1, "0.5"), (None, 256, "12.25")]
    assert format_table(("layer", "M", "ms"), rows, right=("M", "ms")).splitlines() == [
        "layer          M     ms",
        "-----------  ---  -----",
        "a.long.name    1    0.5",
        "             256  12.25",
    ]


def test_table_without_rows_is_its_head() -> None:
    assert format_table(("a", "bb"), []) == "a  bb\n-  --"


def test_json_is_standard_even_with_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"error": float("nan"), "list": [float("inf"), 1.5, None], "nested": {"n": 1}})
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"error": None, "list": [None, 1.5, None], "nested": {"n": 1}}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["lm_head"], "lm_head"),
        (["m.2.q", "m.10.q", "m.3.q", "m.4.q"], "m.{2..4,10}.q x4"),
        (["m.5.e.0.w", "m.5.e.1.w"], "m.5.e.{0..1}.w x2"),
        (["m.0.e.0.w", "m.0.e.1.w", "m.1.e.1.w"], "m.{0..1}.e.{0..1}.w x3 (of 4)"),
    ],
)
def test_compact_names(names: list[str], expected: str) -> None:
    assert len({shape_of_name(name) for name in names}) == 1
    assert compact_names(names) == expected


def test_layers_are_sorted_by_number() -> None:
    names = ["m.10.q", "m.2.q", "lm_head", "m.2.a"]
    assert sorted(names, key=natural_key) == ["lm_head", "m.2.a", "m.2.q", "m.10.q"]


def test_each_explanation_is_told_once() -> None:
    told = kernels_told([("A", "k: why\n  not l: x"), ("B", "k: why\n  not l: x"), ("A", "m: z")])
    assert told == ["A, B:", "  k: why", "    not l: x", "A:", "  m: z"]


def test_errors_are_one_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(FileNotFoundError(2, "No such file", "x.json")) == "x.json: No such file"
    assert one_line(KeyError()) == "KeyError"
    assert (counted(1, "layer"), counted(0, "layer")) == ("1 layer", "0 layers")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_shows_on_a_terminal_or_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(stream: io.StringIO, verbose: bool) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress(verbose) as progress:
            progress.step("first step")
            progress.step("next")
        return stream.getvalue()

    assert shown(io.StringIO(), verbose=False) == ""
    assert shown(io.StringIO(), verbose=True) == "first step\nnext\n"
    # The longer first step is overwritten, and nothing is left at the end.
    assert shown(Terminal(), verbose=False) == "\rfirst step\rnext      \r    \r"
