"""Line charts as SVG: lines told apart by colour and dash, each labelled at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from balanceopt.reporting._run import Series
from balanceopt.reporting._tables import Quantity

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 40, 84, 10, 34
_LABEL = 13  # height of a label
# With six colours these are 30 different lines.
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "5 2 1.5 2 1.5 2")
COLOURS = 6
_POINTS = 120


def chart(
    title: str, quantity: Quantity, lines: Mapping[str, Series], last_step: int, marks: Sequence[int] = ()
) -> str:
    """Draw one quantity over the steps.

    Args:
        title: read out in place of the picture.
        quantity: title, unit and scale.
        lines: name -> series; those without a finite value are left out.
        last_step: end of the axis.
        marks: steps with a vertical line.

    Returns:
        An `<svg>` element; an empty string if there is nothing to draw.
    """
    shown = {name: _drawable(series, log=quantity.log) for name, series in lines.items()}
    if not any(len(s.finite.steps) for s in shown.values()):
        return ""
    height = max(190, _TOP + _BOTTOM + _LABEL * len(shown))
    values = np.concatenate([s.finite.values for s in shown.values()])
    scale = _Scale(values, quantity, height)
    end = max(last_step, 1)
    parts = [_axes(scale, end, height, quantity)]
    for step in marks:
        x = _x(step, end)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
    ends = {}
    for i, (name, series) in enumerate(shown.items()):
        if len(series.finite.steps):
            parts.append(_line(series, i, end, scale, name))
            ends[i, name] = scale(series.last)
    parts.append(_labels(ends, height))
    described = " ".join(f"{name}: {quantity.format(s.last)} at the end." for name, s in shown.items())
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escaped(f"{title}. {described}")}">'
        f"{''.join(parts)}</svg>"
    )


def style(index: int) -> str:
    """Attributes of the line with this index."""
    dash = DASHES[index % len(DASHES)]
    return f'class="line c{index % COLOURS}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def escaped(text: str) -> str:
    """Escape text for HTML, characters that can't be shown replaced."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


class _Scale:
    """The vertical axis: values to pixels, and its ticks."""

    def __init__(self, values: np.ndarray, quantity: Quantity, height: int) -> None:
        self.log = quantity.log
        low, high = float(values.min()), float(values.max())
        if quantity.balance is not None:
            low, high = min(low, quantity.balance), max(high, quantity.balance)
        if quantity.share:
            low, high = math.floor(10 * low) / 10, math.ceil(10 * high) / 10
            room = 0.0
        elif self.log:
            low, high = math.log10(low), math.log10(high)
            room = 0.05 * (high - low)
        else:
            low = min(low, 0.0)
            room = 0.05 * (high - low)
        self.low, self.high = low - room * (low != 0 or self.log), high + room
        if self.high - self.low < 1e-9:
            self.low, self.high = self.low - 0.1, self.high + 0.1
        self.top, self.bottom = _TOP, height - _BOTTOM

    def __call__(self, value: float) -> float:
        at = (math.log10(value) if self.log else value) - self.low
        return self.bottom - at / (self.high - self.low) * (self.bottom - self.top)

    def ticks(self) -> list[float]:
        if not self.log:
            return _nice(self.low, self.high, 4)
        for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            ticks = [
                s * 10.0**d
                for d in decades
                for s in steps
                if self.low <= math.log10(s * 10.0**d) <= self.high
            ]
            if len(ticks) <= 6:
                break
        ticks = ticks[:: math.ceil(len(ticks) / 6)] if ticks else []
        return ticks if len(ticks) > 1 else [10**x for x in np.linspace(self.low, self.high, 3)]


def _drawable(series: Series, *, log: bool) -> Series:
    """A series with few enough points, NaN where there is nothing to draw."""
    bad = ~np.isfinite(series.values.astype(float)) | ((series.values <= 0) if log else False)
    return Series(series.steps, np.where(bad, math.nan, series.values.astype(float))).smooth(_POINTS)


def _x(step: float, end: float) -> float:
    return _LEFT + min(step / end, 1) * (_WIDTH - _LEFT - _RIGHT)


def _axes(scale: _Scale, end: int, height: int, quantity: Quantity) -> str:
    parts = []
    right, bottom = _WIDTH - _RIGHT, height - _BOTTOM
    for tick in scale.ticks():
        y = scale(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{quantity.format(tick)}</text>'
        )
    if quantity.balance is not None:
        y = scale(quantity.balance)
        parts.append(f'<line class="even" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for tick in _nice(0, end, 4):
        if tick == int(tick):
            x = _x(tick, end)
            parts.append(
                f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{_short(int(tick))}</text>'
            )
    parts.append(f'<text x="{(_LEFT + right) / 2:.0f}" y="{bottom + 29}" text-anchor="middle">step</text>')
    return "".join(parts)


def _line(series: Series, index: int, end: int, scale: _Scale, name: str) -> str:
    pieces: list[list[str]] = [[]]
    for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
        if math.isfinite(value):
            pieces[-1].append(f"{_x(step, end):.1f},{scale(value):.1f}")
        elif pieces[-1]:
            pieces.append([])
    drawn = []
    for piece in filter(None, pieces):
        if len(piece) == 1:
            x, y = piece[0].split(",")
            drawn.append(f'<circle class="dot d{index % COLOURS}" cx="{x}" cy="{y}" r="2.5"/>')
        else:
            drawn.append(f'<polyline {style(index)} points="{" ".join(piece)}"/>')
    return f"<g><title>{escaped(name)}</title>{''.join(drawn)}</g>"


def _labels(ends: Mapping[tuple[int, str], float], height: int) -> str:
    """Names at the lines' ends, moved apart where they would overlap."""
    order = sorted(ends, key=lambda key: ends[key])
    places: list[float] = []
    for key in order:
        places.append(max(ends[key], places[-1] + _LABEL if places else _TOP))
    # What was pushed out at the bottom moves up again.
    limit = height - _BOTTOM + 4.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - _LABEL
    parts = []
    x = _WIDTH - _RIGHT
    for (index, name), y in zip(order, places, strict=True):
        at = ends[index, name]
        parts.append(
            f'<line class="lead k{index % COLOURS}" x1="{x}" y1="{at:.1f}" x2="{x + 8}" y2="{y:.1f}"/>'
        )
        short = name if len(name) <= 11 else f"{name[:10]}…"
        parts.append(
            f'<text class="name t{index % COLOURS}" x="{x + 10}" y="{y + 4:.1f}">{escaped(short)}</text>'
        )
    return "".join(parts)


def _nice(low: float, high: float, count: int) -> list[float]:
    """Round numbers between two limits, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(step: int) -> str:
    if step >= 10_000_000:
        return f"{step / 1_000_000:g} M"
    return f"{step:,}"
