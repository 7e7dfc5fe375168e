# ruff: noqa: RUF001, RUF002, RUF003  the sign of N × K, and a dash where there is no time
"""The Markdown tables of joined runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pymllm.bench.variants.host import PART as HOST
from pymllm.bench.variants.values import ROOF, SHARE, TIME, US, reasons, regimes
from pymllm.cli.bench_cells import (
    OURS,
    Grid,
    absent,
    grids_of,
    microseconds,
    paths_of,
    skipped,
    slower_than_bf16,
    summary,
)
from pymllm.cli.report import counted

MODE_WORDS = {
    "graph": "GPU time by CUDA-graph replay",
    "eager": "eager calls, launches included",
    "host": "host time to issue a call",
    "cpu": "wall clock",
}
MEASURE_WORDS = {
    TIME: "time / the base's",
    SHARE: "share of the memory roof / the base's",
    ROOF: "share of the memory roof",
    US: "µs",
}
CACHE_WORDS = {"cold": "weights not in cache", "hot": "weights in cache"}


@dataclass
class Report:
    """Runs joined, seen in one mode and cache state."""

    runs: list[Mapping[str, Any]]
    cells: list[Mapping[str, Any]]
    grids: list[Grid]
    mode: str
    cache: str
    published: str | None = None

    def of(self, scheme: str) -> list[Grid]:
        """The grids of one scheme, small layers first."""
        chosen = [grid for grid in self.grids if grid.scheme == scheme]
        return sorted(chosen, key=lambda grid: (grid.n * grid.k, grid.n, grid.group))

    @property
    def schemes(self) -> list[str]:
        """All schemes that have times."""
        return sorted({grid.scheme for grid in self.grids})

    @property
    def note(self) -> str:
        """How it was measured, for under the titles."""
        how = f"{MODE_WORDS[self.mode]}, {CACHE_WORDS[self.cache]}, medians"
        text = f"{self.runs[0]['environment']['gpu']}; {how}"
        return f"{text}; † published: {self.published}" if self.published else text


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def scheme_tables(grids: Sequence[Grid]) -> str:
    """One table a shape: M × providers in µs, the fastest bold, and how ours stands."""
    told = summary(grids).replace(" x ", " × ")
    parts = [f"{grids[0].label}, microseconds a call: {told}."]
    for grid in grids:
        names = [f"{name}†" if name in grid.published else name for name in grid.providers]
        titles = ["M", *names, "roof", "ours, of the roof", "best other / ours", "bf16 / ours"]
        rows = []
        for m in grid.tokens:
            best, share = grid.best(m), grid.roof_fraction(m)
            times = [microseconds(grid.time(name, m)) for name in grid.providers]
            times[grid.providers.index(best or "")] += "**"
            rows.append(
                [
                    m,
                    *(f"**{us}" if us.endswith("**") else us for us in times),
                    microseconds(grid.roof.get(m)),
                    "-" if share is None else f"{share:.0%}",
                    *("-" if r is None else f"{r:.2f}" for r in (grid.ratio(m), grid.speed_up(m))),
                ]
            )
        cells = [["–" if cell == "-" else cell for cell in row] for row in rows]
        parts.append(f"#### N × K = {grid.n} × {grid.k}\n\n{markdown_table(titles, cells)}")
    return "\n\n".join(parts)


def machine_table(report: Report) -> str:
    """What each run was made on, with which command."""
    parts = []
    for run in report.runs:
        env, roof = run["environment"], run["roof"]
        versions = ", ".join(f"{name} {text}" for name, text in env["versions"].items())
        ceilings = (
            f"reads {roof['read_tbps']:.2f} TB/s, bf16 {roof['bf16_tops']:.4g} TFLOP/s,"
            f" int8 {roof['int8_tops']:.4g} TOP/s"
        )
        rows = [
            ["date", f"{run['date']}, {run['wall_s']:.0f} s"],
            ["complete", "yes" if run["complete"] else f"no: {run['stopped']}"],
            ["command", f"`{run['command']}`"],
            ["device", f"{env['gpu']}, driver {env['driver']}" if env["driver"] else env["gpu"]],
            ["versions", versions],
            ["commit", env["commit"] or "unknown"],
            ["clocks before", _clocks(env["clocks_before"])],
            ["clocks after", _clocks(env["clocks_after"])],
            ["roof, measured", ceilings],
            ["shown", report.note],
            ["spread", _spread(report)],
        ]  # fmt: skip
        lines = ["|  |  |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _clocks(clocks: Mapping[str, Any] | None) -> str:
    if clocks is None:
        return "not readable"
    units = {"sm_mhz": "MHz SM", "memory_mhz": "MHz memory", "temperature_c": "°C", "power_w": "W"}
    told = [f"{clocks[name]:g} {unit}" for name, unit in units.items() if clocks.get(name)]
    told += [str(clocks["throttle"])] if clocks.get("throttle") else []
    return ", ".join(told) or "not readable"


def _spread(report: Report) -> str:
    spreads = sorted(
        (cell["high_us"] - cell["low_us"]) / cell["median_us"]
        for cell in report.cells
        if cell["median_us"] and (cell["mode"], cell["cache"]) == (report.mode, report.cache)
    )
    nine_tenths = spreads[min(len(spreads) - 1, 9 * len(spreads) // 10)]
    return f"10th to 90th percentile within {nine_tenths:.1%} of the median in nine cells of ten"


def missing_list(report: Report) -> str:
    """Providers that were not there and cells without a time, with reasons."""
    gone = {name: reason for run in report.runs for name, reason in absent(run).items()}
    there = {name for run in report.runs for name in run["providers"].keys() - absent(run).keys()}
    gone = {name: reason for name, reason in gone.items() if name not in there}
    lines = [f"* {name}: not here: {reason}" for name, reason in gone.items()]
    lines += [
        f"* {reason} ({counted(count, 'cell')})"
        for reason, count in skipped(report.cells, gone).items()
    ]
    return "\n".join(lines) or "Nothing."


def host_table(report: Report) -> str:
    """Host time to issue one eager call."""
    grids = grids_of(report.cells, "host", "hot")
    names = list(dict.fromkeys(name for grid in grids for name in grid.providers))
    rows = [
        [
            f"{grid.label}, {grid.n} × {grid.k}, M = {m}",
            *(microseconds(grid.time(name, m)).replace("-", "–") for name in names),
        ]
        for grid in grids
        for m in grid.tokens
    ]
    return markdown_table(["µs a call", *names], rows) if rows else "Not measured in this run."


def paths_table(report: Report) -> str:
    """What ours took for each shape and M, what bf16 would take, and where that is less."""
    rows, losses = [], []
    cells = [
        cell
        for cell in report.cells
        if (cell["mode"], cell["cache"]) == (report.mode, report.cache)
    ]
    for scheme in report.schemes:
        grids = report.of(scheme)
        losses += [f"* {scheme}, {text}".replace(" x ", " × ") for text in slower_than_bf16(grids)]
        for grid in grids:
            for tokens, path in paths_of(cells, grid):
                times = [
                    [microseconds(grid.time(name, m)) for m in tokens] for name in (OURS, grid.bf16)
                ]
                rows.append(
                    [
                        f"{scheme}, {grid.n} × {grid.k}, M = {', '.join(map(str, tokens))}",
                        *(", ".join(us).replace("-", "–") for us in times),
                        f"`{path}`",
                    ]
                )
    told = "\n".join(losses) or "Nowhere."
    table = markdown_table(["layer and tokens", "ours, µs", "bf16, µs", "path"], rows)
    return f"Slower than not quantizing, beyond noise:\n\n{told}\n\n{table}"


def variants_table(documents: Sequence[Mapping[str, Any]]) -> str:
    """How each variant stands, the host's times, where it was measured, and what has no time.

    ``documents``: of one machine, each cell in one of them.
    """
    cells = [cell for document in documents for cell in document["cells"]]
    titles = ["variant", "base", "M", "measure", "geometric mean", "worst", "wanted", "met"]
    rows = [
        [
            f"{found.part}: {found.variant}",
            found.base or "–",
            ", ".join(map(str, found.tokens)),
            MEASURE_WORDS[found.measure],
            f"{found.mean:.2f}",
            found.told(found.worst),
            found.limit,
            found.outcome,
        ]
        for found in regimes(cells)
    ]
    tidy = {"-": "–", "<= ": "≤ ", ">= ": "≥ ", " us": " µs"}
    for row in rows:
        row[5] = row[5].replace("x", " × ")
        for old, new in tidy.items():
            row[6] = row[6].replace(old, new)
        row[7] = row[7].replace("-", "–")
    parts = [markdown_table(titles, rows) if rows else "Nothing was timed."]
    host = [cell for cell in cells if cell["part"] == HOST and cell["skip"] is None]
    if host:
        times = [
            [
                f"{cell['variant']}, {cell['n']} × {cell['k']}, M = {cell['m']}",
                *(microseconds(cell[key]) for key in ("median_us", "done_us")),
            ]
            for cell in host
        ]
        parts.append(markdown_table(["host, µs a call", "to issue", "until done"], times))
    if missing := reasons(cells):
        told = [f"* {text} ({counted(count, 'cell')})" for text, count in missing.items()]
        parts.append("Without a time:\n\n" + "\n".join(told))
    for document in documents:
        env = document["environment"]
        whole_run = "" if document["complete"] else f"; not complete: {document['stopped']}"
        parts.append(
            f"{env['gpu']}, {document['date']}, {document['wall_s']:.0f} s, commit"
            f" {env['commit'] or 'unknown'}, `{document['command']}`{whole_run}."
        )
    return "\n\n".join(parts)


def tables(report: Report) -> dict[str, str]:
    """Everything a document can include, by name."""
    found = {
        "machine": machine_table(report),
        "summary": "\n".join(
            f"* {scheme}: {summary(report.of(scheme))}".replace(" x ", " × ")
            for scheme in report.schemes
        ),
        "missing": missing_list(report),
        "host": host_table(report),
        "paths": paths_table(report),
    }
    return found | {scheme: scheme_tables(report.of(scheme)) for scheme in report.schemes}


def whole(report: Report, beside: Mapping[str, str]) -> str:
    """All tables as one document, with what stands beside those of the runs."""
    titles = {"machine": "Machine", "summary": "Summary", "missing": "Without a time",
              "host": "Host time of an eager call", "paths": "Paths", "variants": "Variants"}  # fmt: skip
    parts = [
        f"## {titles.get(name, name.upper())}\n\n{text}"
        for name, text in (tables(report) | dict(beside)).items()
    ]
    return "\n\n".join(["# Benchmark", *parts]) + "\n"
