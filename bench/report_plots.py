# ruff: noqa: RUF001, RUF003  the sign of N × K
"""The plots of a run: time, share of the roof, speed-up over bf16, cells won and lost."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator
from PIL import Image

from pymllm.cli.bench_cells import BF16_NAMES, OURS, Grid

# 9 inches at 200 dots: twice the 900 pixels a README shows, sharp on dense screens.
WIDTH, DOTS = 9.0, (200, 180, 160, 130, 100)
MAX_BYTES = 150_000
COLUMNS = 3
# Okabe and Ito's palette, then Tol's; a marker each, so that no line needs its colour to be known.
STYLES = {
    "ours": ("#D55E00", "o"),
    "cublas_bf16": ("#3D3D3D", "s"),
    "torch_bf16": ("#3D3D3D", "s"),
    "humming": ("#0072B2", "^"),
    "marlin": ("#E69F00", "v"),
    "machete": ("#009E73", "D"),
    "cutlass": ("#882255", "h"),
    "gemlite": ("#CC79A7", "P"),
    "tinygemm": ("#56B4E9", "X"),
    "int_mm": ("#56B4E9", "X"),
    "dequant_matmul": ("#999933", "<"),
    "vllm_triton": ("#661100", ">"),
    "torchao": ("#332288", "d"),
}
SPARE = ("#117733", "#AA4499", "#DDCC77", "#44AA99")
ROOF = "#8A8A8A"
INK, SOFT_INK = "#222222", "#666666"
# Orange loses, blue wins, white is even; both ends are equally strong.
LOST_WON = LinearSegmentedColormap.from_list(
    "lost_won", ["#B35806", "#E08214", "#FDB863", "#FFFFFF", "#92C5DE", "#4393C3", "#2166AC"]
)
STRONGEST = 2.0
LOOK = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.edgecolor": "#999999",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
}


def draw_all(grids: Sequence[Grid], folder: Path, note: str) -> list[Path]:
    """All figures of one scheme as ``FOLDER/SCHEME_NAME.png``; those without data are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context(LOOK):
        for draw in (time, roof, speedup, heatmap):
            figure = draw(grids, note)
            if figure is not None:
                paths.append(folder / f"{grids[0].scheme}_{draw.__name__}.png")
                _save(figure, paths[-1])
    return paths


def time(grids: Sequence[Grid], note: str) -> Figure:
    """Time over M, log-log, with the roof; a much slower peer leaves at the top."""
    cut = {
        name
        for grid in grids
        for name in grid.providers
        if max(grid.us[name].values()) > _limits(grid)[1]
    }
    lines = [f"{grids[0].label}: time of one call (lower is better)", note]
    if cut:
        verb = "leaves" if len(cut) == 1 else "leave"
        lines.append(f"{', '.join(sorted(cut))} {verb} at the top, far slower; the tables have all")
    figure, panels, legend = _panels(grids, lines, "time of one call, µs")
    for grid, axes in zip(grids, panels, strict=True):
        _draw(axes, grid, grid.time)
        at = sorted(grid.roof)
        axes.plot(at, [grid.roof[m] for m in at], color=ROOF, ls=":", lw=1.6, zorder=1)
        axes.set_yscale("log")
        axes.set_ylim(*_limits(grid))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    _legend(legend, grids, roof="roof")
    return figure


def roof(grids: Sequence[Grid], note: str) -> Figure | None:
    """Share of the roof over M."""
    grids = [grid for grid in grids if grid.roof]
    if not grids:
        return None
    lines = [f"{grids[0].label}: share of the roof that is reached (higher is better)", note]
    figure, panels, legend = _panels(grids, lines, "share of the roof")
    top = 1.05
    for grid, axes in zip(grids, panels, strict=True):
        shares = _draw(axes, grid, lambda name, m, grid=grid: grid.roof_fraction(m, name))
        axes.axhline(1, color=ROOF, ls=":", lw=1.6, zorder=1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        top = max([top, *(1.02 * share for share in shares)])
    for axes in panels:
        axes.set_ylim(0, top)
    _legend(legend, grids, roof="roof = 100 %")
    return figure


def speedup(grids: Sequence[Grid], note: str) -> Figure | None:
    """Speed-up over unquantized bf16 over M."""
    grids = [grid for grid in grids if grid.bf16]
    if not grids:
        return None
    lines = [f"{grids[0].label}: speed-up over unquantized bf16 (below 1×: slower than it)", note]
    figure, panels, legend = _panels(grids, lines, "bf16 time / time")
    top = 1.2
    for grid, axes in zip(grids, panels, strict=True):
        ratios = _draw(
            axes,
            grid,
            lambda name, m, grid=grid: grid.speed_up(m, name),
            without=BF16_NAMES,
        )
        axes.axhline(1, color=_style(grid.bf16 or "", ())[0], lw=1.3, zorder=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        top = max([top, *(1.04 * ratio for ratio in ratios)])
    for axes in panels:
        axes.set_ylim(0, top)
    _legend(legend, grids, line_only=BF16_NAMES)
    return figure


def heatmap(grids: Sequence[Grid], note: str) -> Figure | None:
    """Time of the fastest other provider over ours, cell by cell, with that provider's name."""
    columns = sorted({m for grid in grids for m in grid.tokens if grid.ratio(m) is not None})
    grids = [grid for grid in grids if OURS in grid.us]
    if not columns:
        return None
    ratios = [ratio for grid in grids for m in columns if (ratio := grid.ratio(m)) is not None]
    won = sum(ratio > 1 for ratio in ratios)
    told = f"blue, above 1: ours is faster ({won} cells);  orange, below 1: ours is slower"
    told += f" ({len(ratios) - won} cells);  named: the fastest other provider"
    lines = [f"{grids[0].label}: time of the fastest other provider / time of ours", told, note]
    head = _head(lines)
    figure = Figure(figsize=(WIDTH, head + 0.6 + 0.46 * len(grids)), layout="constrained")
    axes = figure.subplots()
    for row, grid in enumerate(grids):
        for column, m in enumerate(columns):
            if (ratio := grid.ratio(m)) is not None:
                _heat_cell(axes, column, row, ratio, _short(grid, grid.best_other(m) or ""))
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(grids) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), [f"{m}" for m in columns])
    axes.set_yticks(range(len(grids)), [_shape(grid) for grid in grids])
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("M, rows of x")
    axes.set_ylabel("N × K")
    _write_head(figure, lines)
    return figure


def _heat_cell(axes: Any, column: int, row: int, ratio: float, name: str) -> None:
    strength = math.log(ratio) / math.log(STRONGEST)
    colour = LOST_WON((1 + max(-1.0, min(1.0, strength))) / 2)
    dark = 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2] < 0.5
    ink = "white" if dark else INK
    axes.add_patch(
        Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=2)
    )
    centre = {"ha": "center", "va": "center", "color": ink}
    axes.text(column, row - 0.13, f"{ratio:.2f}", fontsize=10.5, **centre)
    axes.text(column, row + 0.27, name, fontsize=7, **centre)


def _panels(
    grids: Sequence[Grid], lines: Sequence[str], unit: str
) -> tuple[Figure, list[Any], Any]:
    """One panel a shape and a place for the legend, under a head of several lines."""
    columns = min(COLUMNS, len(grids) + 1)
    rows = math.ceil((len(grids) + 1) / columns)
    height = _head(lines) + 0.25 + 2.15 * rows
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    tokens = sorted({m for grid in grids for m in grid.tokens})
    ticks = _spread(tokens)
    for grid, axes in zip(grids, every, strict=False):
        axes.set_title(_shape(grid), loc="left", color=INK, fontweight="bold")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{m}" for m in ticks])
        axes.set_xlim(tokens[0] / 1.4, tokens[-1] * 1.4)
    for axes in every[len(grids) :]:
        axes.axis("off")
    figure.supxlabel("M, rows of x", fontsize=9)
    figure.supylabel(unit, fontsize=9)
    _write_head(figure, lines)
    return figure, every[: len(grids)], every[len(grids)]


def _draw(
    axes: Any,
    grid: Grid,
    value: Callable[[str, int], float | None],
    without: Collection[str] = (),
) -> list[float]:
    """One line a provider over the M that it has; returns what it drew."""
    drawn: list[float] = []
    for name in grid.providers:
        if name in without:
            continue
        points = [(m, y) for m in sorted(grid.us[name]) if (y := value(name, m)) is not None]
        colour, marker = _style(name, grid.providers)
        axes.plot(
            [m for m, _ in points],
            [y for _, y in points],
            color=colour,
            marker=marker,
            **_weight(name, name in grid.published),
        )
        drawn += [y for _, y in points]
    return drawn


def _legend(
    axes: Any, grids: Sequence[Grid], *, roof: str | None = None, line_only: Collection[str] = ()
) -> None:
    names = dict.fromkeys(name for grid in grids for name in grid.providers)
    published = {name for grid in grids for name in grid.published}
    handles = []
    for name in names:
        colour, marker = _style(name, list(names))
        label = f"{name}† (published)" if name in published else name
        look = _weight(name, name in published)
        if name in line_only:
            look, marker = {"lw": 1.3}, ""
        handles.append(Line2D([], [], color=colour, marker=marker, label=label, **look))
    if roof is not None:
        handles.append(Line2D([], [], color=ROOF, ls=":", lw=1.6, label=roof))
    axes.legend(handles=handles, loc="center left", fontsize=9, labelspacing=0.45, handlelength=3)


def _style(provider: str, names: Collection[str]) -> tuple[str, str]:
    if provider in STYLES:
        return STYLES[provider]
    unknown = sorted(name for name in names if name not in STYLES)
    place = unknown.index(provider) if provider in unknown else 0
    return SPARE[place % len(SPARE)], "p"


def _weight(name: str, published: bool) -> dict[str, Any]:
    if name == OURS:
        return {"lw": 2.3, "ms": 5, "zorder": 5}
    look = {"lw": 1.2, "ms": 4.4, "zorder": 3, "markeredgewidth": 0}
    return {**look, "ls": (0, (4, 1.6))} if published else look


def _shape(grid: Grid) -> str:
    return f"{grid.n} × {grid.k}"


def _short(grid: Grid, name: str) -> str:
    short = name.removeprefix("cublas_").removeprefix("torch_").removesuffix("_matmul")
    return f"{short}†" if name in grid.published else short


def _limits(grid: Grid) -> tuple[float, float]:
    """Up to three times the unquantized provider, or the median one, at the largest M."""
    every = [us for times in grid.us.values() for us in times.values()]
    last = grid.tokens[-1]
    ends = sorted(times[last] for times in grid.us.values() if last in times)
    end = grid.time(grid.bf16, last) or ends[(len(ends) - 1) // 2]
    wanted = max(3 * end, 1.3 * (grid.time(OURS, last) or 0))
    return min([*every, *grid.roof.values()]) / 1.3, min(max(every) * 1.3, wanted)


def _spread(tokens: Sequence[int]) -> list[int]:
    """Few enough tick labels for a third of the width."""
    kept: list[int] = []
    for m in tokens:
        if not kept or m >= 4 * kept[-1]:
            kept.append(m)
    return kept


def _head(lines: Sequence[str]) -> float:
    """Inches that the head takes."""
    return 0.42 + 0.18 * (sum(bool(line) for line in lines) - 1)


def _write_head(figure: Figure, lines: Sequence[str]) -> None:
    lines = [line for line in lines if line]
    height = figure.get_figheight()
    # Constrained layout leaves room for a title of one style only.
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - _head(lines) / height))  # type: ignore[union-attr]
    figure.text(
        0.008, 1 - 0.09 / height, lines[0], va="top", fontsize=11.5, fontweight="bold", color=INK
    )
    for number, line in enumerate(lines[1:]):
        place = 1 - (0.32 + 0.17 * number) / height
        figure.text(0.008, place, line, va="top", fontsize=8.5, color=SOFT_INK)


def _save(figure: Figure, path: Path) -> None:
    """With a palette of 128 colours, a third of the bytes; many panels take fewer dots."""
    for dots in DOTS:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=dots, format="png")
        image = Image.open(buffer).convert("RGB")
        image.quantize(128, kmeans=1, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            return
