# ruff: noqa: RUF003  the sign of N × K
"""Markdown tables and plots of saved benchmark runs.

    python bench/report.py RUN.json --out docs/plots --update docs/performance.md
    python bench/report.py --variants VARIANTS.json --update docs/performance.md

Runs are JSON files of ``pymllm bench --out``; several are joined, if they may be compared. Numbers in a
document stand between ``<!-- tables: NAME -->`` and ``<!-- /tables -->`` and are written by ``--update``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from report_agreement import Published, agreement, as_json, as_markdown
from report_tables import CACHE_WORDS, MODE_WORDS, Report, tables, variants_table, whole

from pymllm.bench import run as runs_file
from pymllm.bench.compare import why_not_comparable
from pymllm.bench.variants import run as variants_file
from pymllm.cli.bench_cells import grids_of, modes_of

# Kinds of the published file, and the scheme each is here.
KINDS = {"w4a16": "w4a16", "w8a8": "w8a8_int8"}
BLOCK = re.compile(r"(<!-- tables: (\S+) -->\n).*?(<!-- /tables -->)", re.DOTALL)
OTHER_MACHINE = 1.2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 2 and one line on stderr if the input is wrong."""
    options = parse(argv)
    try:
        return make(options)
    except (ValueError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN.json")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write plots there (matplotlib)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write all tables there")
    parser.add_argument("--update", type=Path, metavar="FILE", help="fill the tables of a document")
    parser.add_argument("--mode", choices=list(MODE_WORDS), help="default: graph, on a CPU cpu")
    parser.add_argument("--cache", choices=list(CACHE_WORDS), help="default: cold")
    parser.add_argument(
        "--published", type=Path, metavar="FILE",
        help="add providers of this file that no run has, marked as published",
    )  # fmt: skip
    parser.add_argument(
        "--check-published", type=Path, metavar="FILE",
        help="say how many cells of the other providers agree with this file, and which do not;"
        " --update then fills the table called agreement, too",
    )  # fmt: skip
    parser.add_argument(
        "--variants", type=Path, nargs="+", metavar="FILE",
        help="files of bench/variants.py, joined; of a cell that several have, the last with a time"
        " counts: print the table, or fill the one called variants",
    )  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=0.07, help="default: 0.07")
    parser.add_argument("--json", action="store_true", help="print --check-published as JSON")
    return parser.parse_args(argv)


def make(options: argparse.Namespace) -> int:
    """Does what the options ask for; without any, prints the tables."""
    if options.json and options.check_published is None:
        raise ValueError("--json needs --check-published")
    beside: dict[str, str] = {}
    if options.variants is not None:
        beside["variants"] = variants_table(load_variants(options.variants))
    if not options.runs:
        return without_runs(options, beside)
    report = load(options.runs, options.mode, options.cache)
    if options.check_published is not None:
        published = read_published(options.check_published)
        found = agreement(report.cells, report.mode, report.cache, published, options.tolerance)
        beside["agreement"] = as_markdown(found)
        print(json.dumps(as_json(found), indent=1) if options.json else beside["agreement"])
    if options.published is not None:
        add_published(report, read_published(options.published), options.published.name)
    if options.markdown is not None:
        options.markdown.write_text(whole(report, beside), encoding="utf-8")
    if options.update is not None:
        update(options.update, tables(report) | beside)
    if options.out is not None:
        from report_plots import draw_all

        for scheme in report.schemes:
            for path in draw_all(report.of(scheme), options.out, report.note):
                print(path)
    wanted = (options.check_published, options.markdown, options.update, options.out)
    if all(option is None for option in wanted):
        print(whole(report, beside), end="")
    return 0


def without_runs(options: argparse.Namespace, beside: Mapping[str, str]) -> int:
    """Does what can be done with ``--variants`` alone.

    Raises:
        ValueError: there is nothing, or something else is asked for.
    """
    others = (options.markdown, options.out, options.published, options.check_published)
    if not beside or any(option is not None for option in others):
        raise ValueError("needs a RUN.json")
    if options.update is not None:
        update(options.update, beside)
    else:
        print(*beside.values(), sep="\n")
    return 0


def load_variants(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Reads files of variants; of a cell that several have, the last with a time stays.

    Raises:
        ValueError: they are of different machines.
    """
    documents = [variants_file.load(path) for path in paths]
    machines = {document["environment"]["gpu"] for document in documents}
    if len(machines) > 1:
        raise ValueError(f"--variants: found {' and '.join(sorted(map(str, machines)))}")
    owner: dict[tuple[Any, ...], int] = {}
    timed = set()
    for number, document in enumerate(documents):
        for cell in document["cells"]:
            place = _place(cell)
            if cell["skip"] is None:
                timed.add(place)
            elif place in timed:
                continue
            owner[place] = number
    for number, document in enumerate(documents):
        document["cells"] = [c for c in document["cells"] if owner[_place(c)] == number]
    return documents


def _place(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[key] for key in ("part", "variant", "n", "k", "m"))


def load(paths: Sequence[Path], mode: str | None = None, cache: str | None = None) -> Report:
    """Reads runs and joins them; of a cell that several have, the last counts.

    Of another provider than ours, the last that has a time: a run in which it did not work says nothing.

    Raises:
        ValueError: a file is not a run, the runs may not be compared, or none has such times.
    """
    runs = [read_run(path) for path in paths]
    for path, run in zip(paths[1:], runs[1:], strict=True):
        if reason := why_not_comparable(runs[0], run):
            raise ValueError(f"{path}: cannot be shown beside {paths[0]}: {reason}")
    joined: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for cell in (cell for run in runs for cell in run["cells"]):
        key = runs_file.cell_key(cell)
        if cell["median_us"] is not None or cell["provider"] == "ours" or key not in joined:
            joined[key] = cell
    cells = list(joined.values())
    pairs = modes_of(cells)
    wanted = [
        pair for pair in pairs if mode in (None, pair[0]) and cache in (None, pair[1])
    ]  # fmt: skip
    if not wanted:
        raise ValueError(f"no times of mode {mode}, cache {cache}; the runs have {pairs}")
    repeated = sum(len(run["cells"]) for run in runs) - len(cells)
    if repeated:
        print(f"report: in several runs, the last counts: {repeated} cells", file=sys.stderr)
    return Report(runs, cells, grids_of(cells, *wanted[0]), *wanted[0])


def read_run(path: Path) -> Mapping[str, Any]:
    """One run.

    Raises:
        ValueError: it is not a run of a known version.
    """
    try:
        return runs_file.load(path)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def read_published(path: Path) -> Published:
    """Times of a file of published figures: ``[{kind, N, K, M, us: {provider: µs}}, ...]``.

    Raises:
        ValueError: it is something else.
    """
    found: dict[tuple[str, int, int], dict[str, dict[int, float]]] = {}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            place = found.setdefault((KINDS[entry["kind"]], entry["N"], entry["K"]), {})
            for name, us in entry["us"].items():
                place.setdefault(name, {})[entry["M"]] = float(us)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of published figures: {error!r}") from None
    return found


def add_published(report: Report, published: Published, name: str) -> None:
    """Adds published providers that no run has.

    Raises:
        ValueError: bf16 took another time there, so that it was another machine.
    """
    ratios = [
        us / mine
        for grid in report.grids
        for m, us in published.get((grid.scheme, grid.n, grid.k), {})
        .get(grid.bf16 or "", {})
        .items()
        if (mine := grid.time(grid.bf16, m)) is not None
    ]
    middle = statistics.median(ratios) if ratios else 1.0
    if not 1 / OTHER_MACHINE < middle < OTHER_MACHINE:
        raise ValueError(
            f"{name}: its bf16 takes {middle:.2f} times as long as this run's: other GPU or clocks"
        )
    report.grids = [
        grid.with_published(published.get((grid.scheme, grid.n, grid.k), {}))
        for grid in report.grids
    ]
    if any(grid.published for grid in report.grids):
        report.published = name


def update(path: Path, found: Mapping[str, str]) -> None:
    """Fills the blocks of a document by their names; one that is not among them stays as it is.

    Raises:
        ValueError: there is no block, or one is not closed.
    """
    text = path.read_text(encoding="utf-8")
    names = [name for _, name, _ in BLOCK.findall(text)]
    if not names or len(names) != text.count("<!-- tables: "):
        raise ValueError(f"{path}: blocks are <!-- tables: NAME --> ... <!-- /tables -->")
    for name in names:
        if name not in found:
            print(f"report: {path}: left {name!r} as it is: not in these runs", file=sys.stderr)

    def fill(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        return f"{opening}{found[name]}\n{closing}" if name in found else match.group()

    path.write_text(BLOCK.sub(fill, text), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
