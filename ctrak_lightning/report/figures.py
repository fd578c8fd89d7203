"""The numbers behind a page's charts: where lines and bars go, in the units of their SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrak_lightning.attribution.parts import Parts
from ctrak_lightning.attribution.result import Attribution, Share

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 44, 16, 44
_LABEL_GAP = 15
_MOST_TICKS = 8


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart: its ``label`` in the legend, its short ``mark`` at the line's end (at
    height ``mark_y``), the ``points`` of an SVG polyline, and the ``values`` drawn."""

    label: str
    mark: str
    mark_y: float
    points: str
    dots: list[tuple[float, float]]
    values: list[float]


@dataclass(frozen=True, slots=True)
class LineChart:
    """Lines over checkpoints, with the ticks ``(position, text)`` of both axes, and the ``band``
    behind them (an SVG polygon)."""

    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    zero: float | None
    band: str | None
    steps: list[int]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: from ``start`` to ``start + width``, in percent of the chart's width; ``value`` in
    percent of the whole."""

    label: str
    value: float
    start: float
    width: float


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars that start at ``zero``, in percent of the chart's width."""

    bars: list[Bar]
    zero: float


@dataclass(frozen=True, slots=True)
class ShareRow:
    """An owner's share with its interval, and the share that its number of images would give, all
    in percent of the chart."""

    share: Share
    images: float


def line_chart(
    named: Sequence[tuple[str, str, Tensor]],
    steps: Sequence[int],
    band: Tensor | None = None,
    unit: str = "",
) -> LineChart:
    """Lines over the checkpoints.

    Args:
        named: for each line its label, its mark and its values [M].
        steps: of the M checkpoints.
        band: lower and upper edge [2, M] of an area behind the lines.
        unit: behind the numbers of the axis.
    """
    all_values = torch.cat(
        [values.double() for _, _, values in named]
        + ([] if band is None else [band.double().flatten()])
    )
    ticks = _ticks(float(all_values.min()), float(all_values.max()))
    low, high = ticks[0], ticks[-1]
    span = max(steps[-1] - steps[0], 1)

    def x(step: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (step - steps[0]) / span, 1)

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 1)

    def points(values: Tensor) -> list[tuple[float, float]]:
        return [(x(step), y(float(value))) for step, value in zip(steps, values, strict=True)]

    heights = _apart([y(float(values[-1])) for _, _, values in named])
    lines = [
        Line(
            label, mark, height, _joined(points(values)), points(values), [float(v) for v in values]
        )
        for (label, mark, values), height in zip(named, heights, strict=True)
    ]
    every = -(-len(steps) // _MOST_TICKS)
    digits = max(0, -_exponent(ticks[1] - ticks[0]))
    return LineChart(
        lines=lines,
        x_ticks=[(x(step), f"{step:,}") for step in steps[::every]],
        y_ticks=[(y(tick), f"{tick:.{digits}f}{unit}") for tick in ticks],
        zero=y(0.0) if low <= 0 <= high else None,
        band=None if band is None else _joined(points(band[0]) + points(band[1])[::-1]),
        steps=list(steps),
    )


def best_timeline(attribution: Attribution, most: int = 6) -> LineChart | None:
    """The best-ranked samples' scores per checkpoint, before the middle half of all samples; None
    of one checkpoint."""
    if len(attribution.steps) < 2:
        return None
    timeline = attribution.timeline()  # [M, N]
    order = attribution.order()[:most].tolist()
    quartiles = torch.stack([_quantile(timeline, 0.25), _quantile(timeline, 0.75)])
    named = [
        (attribution.samples.sample_ids[i], f"#{rank}", timeline[:, i])
        for rank, i in enumerate(order, start=1)
    ]
    return line_chart(named, attribution.steps, quartiles)


def group_timeline(
    attribution: Attribution, column: str, groups: Sequence[str]
) -> LineChart | None:
    """Each group's part of the positive scores, per checkpoint, in percent; None of one checkpoint,
    or where a checkpoint has no positive score."""
    positive = attribution.timeline().double().clamp(min=0)  # [M, N]
    totals = positive.sum(1)
    if len(attribution.steps) < 2 or not bool((totals > 0).all()):
        return None
    values = attribution.samples.metadata[column]
    named = []
    for number, group in enumerate(groups, start=1):
        member = torch.tensor([value == group for value in values], dtype=torch.float64)
        named.append((group, f"{number}", 100 * (positive @ member) / totals))
    return line_chart(named, attribution.steps, unit=" %")


def part_bars(parts: Parts, scores: Tensor, best: Sequence[int]) -> tuple[Bars, Bars]:
    """What each timestep (most noise first) and each group of layers adds to the scores of some
    samples, summed, in percent of that sum: the bars add up to 100.

    Args:
        parts: of all samples.
        scores: of all samples [N].
        best: positions of the samples, whose scores are positive.
    """
    whole = float(scores.double()[list(best)].sum())
    by_timestep = [
        (f"t = {timestep}", 100 * float(part.double()[list(best)].sum()) / whole)
        for timestep, part in sorted(
            zip(parts.timesteps, parts.by_timestep, strict=True), key=lambda pair: -pair[0]
        )
    ]
    by_layer = [
        (name, 100 * float(part.double()[list(best)].sum()) / whole)
        for name, part in parts.by_layer_group.items()
    ]
    return _bars(by_timestep), _bars(sorted(by_layer, key=lambda pair: -pair[1]))


def share_rows(attribution: Attribution, column: str) -> list[ShareRow]:
    """Every group's share, largest first.

    Raises:
        ValueError: nothing positive to share out.
    """
    total = len(attribution.samples)
    return [ShareRow(share, share.samples / total) for share in attribution.by_group(column)]


def _bars(values: Sequence[tuple[str, float]]) -> Bars:
    low, high = min(0.0, *(v for _, v in values)), max(0.0, *(v for _, v in values))
    span = (high - low) or 1.0
    zero = 100 * -low / span
    return Bars(
        [
            Bar(
                label,
                value,
                round(zero + 100 * min(value, 0.0) / span, 2),
                round(100 * abs(value) / span, 2),
            )
            for label, value in values
        ],
        round(zero, 2),
    )


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from at or below ``low`` to at or above ``high``."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 4
    unit = 10.0 ** _exponent(rough)
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = int(low // step), int(-(-high // step))
    return [i * step for i in range(first, last + 1)]


def _exponent(value: float) -> int:
    """The power of ten at or below a positive number."""
    return int(f"{value * (1 + 1e-9):e}".partition("e")[2])


def _apart(heights: Sequence[float]) -> list[float]:
    """Heights of labels, moved as far as needed that none covers another, in the order given."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed: dict[int, float] = {}
    floor = float(TOP)
    for i in order:
        placed[i] = max(heights[i], floor)
        floor = placed[i] + _LABEL_GAP
    ceiling = float(HEIGHT - BOTTOM + _LABEL_GAP)
    for i in reversed(order):
        placed[i] = round(min(placed[i], ceiling), 1)
        ceiling = placed[i] - _LABEL_GAP
    return [placed[i] for i in range(len(heights))]


def _joined(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _quantile(rows: Tensor, share: float) -> Tensor:
    """Over the samples of rows [M, N]; torch.quantile refuses more than 2^24 numbers."""
    return rows.sort(1).values[:, int(share * (rows.shape[1] - 1))]
