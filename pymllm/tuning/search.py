"""Which of some candidates is taken: timed side by side, ties decided by their order and not by noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Config = Any
Sample = Callable[[], float]
"""Measures once: microseconds."""

# Candidates within this of the fastest are ties; the first in order is taken. The order is that of the
# cost model, the same everywhere, so that two runs differ only where one lies on the edge of the band.
TIE_BAND = 0.03
# A first sample farther behind than this is not measured again.
_SCREEN = 0.12
# Rounds after which it is asked whether more are needed. Asked after each, chance would stop too early.
_LOOKS = (8, 16, 32, 64)
# Standard errors between a candidate and the edge of the band before its side is believed.
_SURE = 3.0
# Of a median beside that of a mean.
_MEDIAN_ERROR = 1.25


class Unfit(Exception):
    """A candidate that does not compile, does not run, or gives a wrong result."""


class Outcome(NamedTuple):
    """What a search found.

    Attributes:
        winner: the candidate taken.
        runner_up: the fastest of the others, or ``None``.
        times: microseconds of each candidate, ``None`` for the unfit.
        unfit: why some are.
        timed: the candidates measured in this search.
    """

    winner: Config
    runner_up: Config | None
    times: dict[Config, float | None]
    unfit: dict[Config, str]
    timed: tuple[Config, ...]


def search(
    candidates: Sequence[Config],
    prepare: Callable[[Config], Sample],
    known: Mapping[Config, float | None] | None = None,
) -> Outcome:
    """Times the candidates that are not known yet and chooses among all.

    Every candidate is sampled once; those near the fastest again and again in turns, forwards and
    backwards, so that a drifting clock meets all alike, until it is sure which of them are ties.

    Args:
        candidates: in order of preference, each once.
        prepare: compiles and checks a candidate and gives what measures it; raises :class:`Unfit`.
        known: times of candidates from an earlier search.

    Raises:
        Unfit: no candidate is fit.
    """
    times: dict[Config, float | None] = {c: t for c, t in (known or {}).items() if c in candidates}
    todo = [c for c in candidates if c not in times]
    samples: dict[Config, list[float]] = {}
    sampled: dict[Config, Sample] = {}
    unfit: dict[Config, str] = {}
    for config in todo:
        try:
            sample = prepare(config)
            samples[config] = [sample()]
        except Unfit as error:
            times[config], unfit[config] = None, str(error)
            continue
        fastest = min(values[0] for values in samples.values())
        sampled[config] = sample
        for slow in [c for c in sampled if samples[c][0] > (1 + _SCREEN) * fastest]:
            # What it holds on the GPU is freed.
            del sampled[slow]
    times |= {config: values[0] for config, values in samples.items()}
    times |= _measured_together(candidates, sampled, until_decided=len(todo) == len(candidates))
    winner = choose(candidates, times)
    others = [c for c in candidates if c != winner and times[c] is not None]
    runner_up = min(others, key=lambda c: times[c] or math.inf, default=None)
    return Outcome(winner, runner_up, times, unfit, tuple(todo))


def choose(candidates: Sequence[Config], times: Mapping[Config, float | None]) -> Config:
    """The first candidate within the tie band of the fastest.

    Raises:
        Unfit: none has a time.
    """
    fit = [(c, t) for c in candidates if (t := times.get(c)) is not None]
    if not fit:
        raise Unfit("no candidate compiles, runs and gives a right result")
    fastest = min(t for _, t in fit)
    return next(c for c, t in fit if t <= (1 + TIE_BAND) * fastest)


def _measured_together(
    candidates: Sequence[Config], sampled: Mapping[Config, Sample], until_decided: bool
) -> dict[Config, float]:
    """Times of the contenders from rounds in which each is sampled once."""
    order = [c for c in candidates if c in sampled]
    samples: list[list[float]] = [[] for _ in order]
    for turn in range(_LOOKS[-1] if order else 0):
        for place in range(len(order)) if turn % 2 == 0 else reversed(range(len(order))):
            samples[place].append(sampled[order[place]]())
        if turn + 1 in _LOOKS and (not until_decided or _decided(_relative(samples))):
            break
    if not order:
        return {}
    usual = statistics.median(statistics.fmean(values) for values in zip(*samples, strict=True))
    relative = _relative(samples)
    return {c: usual * statistics.median(relative[place]) for place, c in enumerate(order)}


def _relative(samples: Sequence[Sequence[float]]) -> list[list[float]]:
    """Samples over the mean of their round: what slows a whole round down cancels out."""
    means = [statistics.fmean(values) for values in zip(*samples, strict=True)]
    return [[a / b for a, b in zip(values, means, strict=True)] for values in samples]


def _decided(relative: Sequence[Sequence[float]]) -> bool:
    """Whether more rounds would hardly change the choice; of each contender, in order."""
    fastest = min(relative, key=statistics.median)
    edge = 1 + TIE_BAND
    for values in relative:
        if values is fastest:
            return True
        ratios = [a / b for a, b in zip(values, fastest, strict=True)]
        middle = statistics.median(values) / statistics.median(fastest)
        error = _MEDIAN_ERROR * statistics.stdev(ratios) / math.sqrt(len(ratios))
        if middle + _SURE * error <= edge:
            return True
        if middle - _SURE * error <= edge:
            return False
    return True
