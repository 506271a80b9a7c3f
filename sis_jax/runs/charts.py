"""Small SVG charts for the report, in the colours of the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from jaxtyping import Float

from sis_jax.data.draw import Real, colour


def swatch(class_id: int, size: int = 12) -> str:
    """A small square of the class colour, as SVG."""
    return (
        f'<svg class="swatch" width="{size}" height="{size}" viewBox="0 0 12 12" '
        'aria-hidden="true">'
        f'<rect width="12" height="12" rx="2.5" fill="{colour(class_id)}"/></svg>'
    )


def line_chart_svg(
    series: Mapping[str, Sequence[tuple[Real, Real]]],
    *,
    x_label: str = "",
    y_label: str = "",
    marked: Sequence[tuple[Real, Real]] = (),
    width: int = 560,
    height: int = 260,
) -> str:
    """Lines through (x, y) points, a colour and marker per name, as SVG; `marked` are ringed."""
    series = {name: [p for p in points if np.isfinite(p).all()] for name, points in series.items()}
    every = [p for points in series.values() for p in points]
    if not every:
        return ""
    left, right, top, bottom = 52, 12, 12, 40
    per_row = max(1, min(4, (width - left) // (20 + 7 * max(map(len, series)))))
    legend = 20 * (-(-len(series) // per_row)) if len(series) > 1 else 0
    xs, ys = _ticks(*_range([p[0] for p in every]), 6), _ticks(*_range([p[1] for p in every]), 5)
    x0, x1 = min([xs[0], *(p[0] for p in every)]), max([xs[-1], *(p[0] for p in every)])
    y0, y1 = min([ys[0], *(p[1] for p in every)]), max([ys[-1], *(p[1] for p in every)])

    def at(p: tuple[Real, Real]) -> tuple[float, float]:
        x = left + (p[0] - x0) / (x1 - x0) * (width - left - right)
        return round(x, 1), round(
            height - bottom - (p[1] - y0) / (y1 - y0) * (height - top - bottom), 1
        )

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height + legend}" role="img" '
        'xmlns="http://www.w3.org/2000/svg">'
    ]
    for y in ys:
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{at((x0, y))[1]}" y2="{at((x0, y))[1]}" '
            'class="rule"/>'
        )
        parts.append(
            f'<text x="{left - 6}" y="{at((x0, y))[1] + 4}" text-anchor="end">{number(y)}</text>'
        )
    parts += [
        f'<text x="{at((x, y0))[0]}" y="{height - bottom + 16}" '
        f'text-anchor="middle">{number(x)}</text>'
        for x in xs
    ]
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text transform="translate(12 {(height - bottom) / 2 + 6}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    for i, (name, points) in enumerate(series.items()):
        dots = [at(p) for p in sorted(points)]
        line = " ".join(f"{x},{y}" for x, y in dots)
        parts.append(
            f'<polyline points="{line}" fill="none" {_series(i)} stroke="currentColor" '
            'stroke-width="2" stroke-linejoin="round"/>'
        )
        parts += [_marker(i, x, y) for x, y in dots] if len(dots) <= 60 else []
        if legend:
            row, column = divmod(i, per_row)
            x, y = left + column * (width - left) / per_row, height + 12 + 20 * row
            parts.append(
                f'{_marker(i, x + 5, y - 4)}<text x="{x + 14}" y="{y}">{escape(name)}</text>'
            )
    parts += [
        f'<circle cx="{x}" cy="{y}" r="9" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        for x, y in map(at, marked)
    ]
    return "".join(parts) + "</svg>"


def _marker(i: int, x: Real, y: Real) -> str:
    """Circle, square, triangle, diamond in turn: lines differ without colour too."""
    shapes = (
        "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0",
        "M-3-3h6v6h-6z",
        "M0-4L4 3h-8z",
        "M0-4.5L4.5 0L0 4.5L-4.5 0z",
    )
    place = f'transform="translate({x} {y})"'
    return f'<path d="{shapes[i % 4]}" {place} {_series(i)} fill="currentColor"/>'


def _series(i: int) -> str:
    """The colour of a line, lighter where the page is dark."""
    shade = colour(i + 1)
    return f'class="series" color="{shade}" style="--shade:{shade}"'


def heatmap_svg(
    values: Float[np.ndarray, "r c"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    chosen: tuple[int, int] | None = None,
    cell: int = 46,
) -> str:
    """A table of numbers shaded by value as SVG; NaN stays empty, `chosen` is framed."""
    values = np.asarray(values, np.float64)
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    left, top, tall = 16 + 8 * max((len(r) for r in rows), default=0), 24, 30
    out = [
        f'<svg class="chart heat" width="{left + cell * len(columns) + 2}" viewBox="0 0 '
        f"{left + cell * len(columns) + 2} "
    ]
    out += [f'{top + tall * len(rows) + 2}" role="img" xmlns="http://www.w3.org/2000/svg">']
    out += [
        f'<text x="{left + cell * (j + 0.5)}" y="16" text-anchor="middle">{escape(c)}</text>'
        for j, c in enumerate(columns)
    ]
    for i, row in enumerate(rows):
        y = top + tall * i
        out.append(f'<text x="{left - 8}" y="{y + 19}" text-anchor="end">{escape(row)}</text>')
        for j, value in enumerate(values[i]):
            x = left + cell * j
            if not np.isfinite(value):
                continue
            t = (value - low) / (high - low) if high > low else 0.5
            r, g, b = (round(a + (z - a) * t) for a, z in zip((222, 235, 247), (8, 69, 138)))
            frame = ' stroke="currentColor" stroke-width="2.5"' if (i, j) == chosen else ""
            out.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{tall - 2}" rx="3" '
                f'fill="rgb({r},{g},{b})"{frame}/>'
            )
            ink = "#fff" if t > 0.5 else "#123"
            out.append(
                f'<text x="{x + cell / 2}" y="{y + 19}" text-anchor="middle" '
                f'style="fill:{ink}">{number(value)}</text>'
            )
    return "".join(out) + "</svg>"


def number(value: Real) -> str:
    """Three significant digits, without an exponent where that is readable: 0.813, 12.5, 3000."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        return f"{value:.2g}"
    return f"{value:.0f}" if size >= 100 or float(value).is_integer() else f"{value:.3g}"


def _range(values: Sequence[Real]) -> tuple[float, float]:
    low, high = float(min(values)), float(max(values))
    pad = 0.5 * abs(low) or 0.5
    return (low, high) if high > low else (low - pad, high + pad)


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers that cover [low, high]: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** np.floor(np.log10(raw))
    step = power * min((s for s in (1, 2, 5, 10) if s * power >= raw * 0.999), default=10)
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    return [round(float(i * step), 10) for i in np.arange(first, last + 1)]
