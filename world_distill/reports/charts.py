"""Small charts as SVG: data in, `Markup` out, nothing else.

The charts scale with their box (`viewBox`, no fixed size), take text and grid from the page's `currentColor`, and the
colour of a bar or line from the caller: any CSS colour, `var(--name)` included. A `<title>` names each chart for screen
readers, and each bar and point for a pointer that rests on it. All text is escaped.
"""

import dataclasses
import html
import math
import re
from collections.abc import Callable, Sequence

from markupsafe import Markup

from world_distill import console

Points = Sequence[tuple[float, float | None]]

_UNPRINTABLE = re.compile("[^\t\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar with its interval; what is None is not drawn."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    colour: str = "currentColor"


@dataclasses.dataclass(frozen=True)
class Series:
    """A line through (x, y) points, broken where y is None.

    Attributes:
      label: what it is, for the legend and the pointer.
      points: in the order of x.
      colour: CSS colour.
      dots: mark every point; for series of few points.
      dashed: for levels to compare with.
      ranges: (x, low, high) of whiskers.
    """

    label: str
    points: Points
    colour: str = "currentColor"
    dots: bool = False
    dashed: bool = False
    ranges: Sequence[tuple[float, float, float]] = ()


def clean(text: object) -> str:
    """The text without control characters and halves of surrogate pairs, which neither HTML nor SVG can hold."""
    return _UNPRINTABLE.sub("", str(text))


def escape(text: object) -> str:
    """Text from anywhere, `clean` and safe inside an element or a quoted attribute of HTML and SVG."""
    return html.escape(clean(text), quote=True)


def percent(value: float) -> str:
    """0.6391 as 63.9 %, as `console.percent` writes it, with a space that does not break."""
    return console.percent(value).replace(" ", "\u00a0")


def number(value: float) -> str:
    """At most four significant digits, without an exponent where that stays short."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        text = f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}" if value else "0"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "\u2212")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, at most about `most` steps apart."""
    if not high > low:
        pad = abs(low) / 2 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def thin(points: Points, most: int) -> list[tuple[float, float | None]]:
    """At most `most` points: means of neighbours, None where a whole run of neighbours is."""
    size = max(1, math.ceil(len(points) / most))
    return [_mean(points[i : i + size]) for i in range(0, len(points), size)]


def smooth(points: Points, reach: int) -> list[tuple[float, float | None]]:
    """Each y replaced by that of the straight line which fits it and up to `reach` neighbours on either side best."""
    result = []
    for i, (x, y) in enumerate(points):
        near = [(u - x, v) for u, v in points[max(0, i - reach) : i + reach + 1] if v is not None]
        if y is not None:
            u_mean, v_mean = (sum(p[axis] for p in near) / len(near) for axis in (0, 1))
            spread = sum((u - u_mean) ** 2 for u, _ in near)
            slope = sum((u - u_mean) * (v - v_mean) for u, v in near) / spread if spread else 0.0
            y = v_mean - slope * u_mean
        result.append((x, y))
    return result


def is_noisy(points: Points) -> bool:
    """Whether a long series goes up and down so often that its course is hard to see."""
    known = [y for _, y in points if y is not None]
    ways = [b - a for a, b in zip(known, known[1:], strict=False)]
    turns = sum(a * b < 0 for a, b in zip(ways, ways[1:], strict=False))
    return len(known) > 24 and turns > len(known) / 4


def bars(items: Sequence[Bar], *, title: str, show: Callable[[float], str] = percent) -> Markup:
    """Horizontal bars from 0 to 1 with whiskers over their intervals, labels at the left, figures at the right."""
    longest = max((len(bar.label) for bar in items), default=0)
    left, right, top, pitch, thick = min(max(96, 7 * longest + 8), 160), 254, 4, 28, 14
    bottom = top + pitch * len(items)
    x = lambda value: left + min(max(value, 0.0), 1.0) * (right - left)  # noqa: E731
    out = [_open(320, bottom + 18, title)]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        out.append(_line(x(tick), top, x(tick), bottom, 0.35 if tick == 0 else 0.13))
        if tick in (0, 0.5, 1):
            out.append(_text(x(tick), bottom + 13, show(tick).replace(".0", ""), 10, "middle", 0.75))
    for row, bar in enumerate(items):
        y = top + pitch * (row + 0.5)
        out.append(_text(left - 8, y + 4, bar.label, 12, "end"))
        if bar.value is None:
            out.append(_text(left + 6, y + 4, "no answer", 11, "start", 0.75))
            continue
        tip = f"{bar.label}: {show(bar.value)}"
        whisker = ""
        if bar.low is not None and bar.high is not None:
            tip += f", 95 % interval {show(bar.low)} to {show(bar.high)}"
            a, b = x(bar.low), x(bar.high)
            path = f"M{a:.1f} {y - 4:.1f}v8M{a:.1f} {y:.1f}H{b:.1f}M{b:.1f} {y - 4:.1f}v8"
            whisker = f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="1.4"/>'
        width = x(bar.value) - left
        radius = min(3.0, width)  # the end is round, the foot stands on the axis
        shape = (
            f"M{left} {y - thick / 2:.1f}h{width - radius:.1f}q{radius:.1f} 0 {radius:.1f} {radius:.1f}"
            f"v{thick - 2 * radius:.1f}q0 {radius:.1f} {-radius:.1f} {radius:.1f}h{radius - width:.1f}z"
        )
        out.append(
            f'<g><title>{escape(tip)}</title><path d="{shape}" style="fill:{escape(bar.colour)}"/>{whisker}'
            f"{_text(318, y + 4, show(bar.value), 12, 'end', weight=600)}</g>"
        )
    return Markup("".join([*out, "</svg>"]))


def lines(
    series: Sequence[Series],
    *,
    title: str,
    limits: tuple[float, float] | None = None,
    across: tuple[float, float] | None = None,
    x_label: str = "step",
    x_ticks: Sequence[tuple[float, str]] | None = None,
    marks: Sequence[tuple[float, str, str]] = (),
    show: Callable[[float], str] = number,
) -> Markup:
    """Lines over a common x, with axes. Long noisy series get a faint line of all points and a strong smooth one.

    Args:
      series: at least one that has a point.
      title: for screen readers; the page shows a caption of its own.
      limits: lowest and highest y; by default from the data.
      across: lowest and highest x; by default from the data.
      x_label: name of x.
      x_ticks: (x, text) of the marks under the axis; by default round numbers.
      marks: (x, short text, what it means) of upright lines at an x between the ends of `across`.
      show: y values as text.
    """
    found = [(x, y) for s in series for x, y in s.points if y is not None and math.isfinite(y)]
    if not found:
        raise ValueError(f"chart {title!r} has no points")
    low, high = limits or (min(y for _, y in found), max(y for _, y in found))
    first, last = across or (min(x for x, _ in found), max(x for x, _ in found))
    y_ticks = ticks(low, high, 4)
    low, high = y_ticks[0], y_ticks[-1]
    left, right, top, bottom = 48, 312, 16 if marks else 8, 150  # names of marks stand above the lines
    px = lambda x: left + (x - first) / ((last - first) or 1) * (right - left)  # noqa: E731
    py = lambda y: bottom - (min(max(y, low), high) - low) / (high - low) * (bottom - top)  # noqa: E731
    out = [_open(320, bottom + 34, title)]
    for tick in y_ticks:
        out.append(_line(left, py(tick), right, py(tick), 0.35 if tick == low else 0.13))
        out.append(_text(left - 6, py(tick) + 3.5, show(tick).replace(".0\u00a0", "\u00a0"), 10, "end", 0.75))
    round_ticks = [(t, number(t)) for t in ticks(first, last, 4) if first <= t <= last and t == round(t)]
    for tick, text in round_ticks if x_ticks is None else x_ticks:
        out.append(_line(px(tick), bottom, px(tick), bottom + 4, 0.5))
        out.append(_text(px(tick), bottom + 15, text, 10, "middle", 0.75))
    names = dict(x_ticks or ())
    out.append(_text((left + right) / 2, bottom + 30, x_label, 10, "middle", 0.75))
    for at, text, meaning in marks:
        out.append(
            f'<g class="mark"><title>{escape(meaning)}</title>'
            f'<path d="M{px(at):.1f} {top}V{bottom}" stroke="currentColor" stroke-dasharray="2 3"/>'
            f"{_text(px(at), top - 4, text, 9, 'middle', 0.75)}</g>"
        )
    for one in series:
        points = thin([(x, y if y is not None and math.isfinite(y) else None) for x, y in one.points], 200)
        style = f'style="stroke:{escape(one.colour)}" fill="none" stroke-linejoin="round" stroke-linecap="round"'
        if is_noisy(points):
            out.append(f'<path d="{_path(points, px, py)}" {style} stroke-width="1" stroke-opacity=".35"/>')
            points = smooth(points, max(2, len(points) // 20))
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        out.append(f'<path d="{_path(points, px, py)}" {style} stroke-width="{1.5 if one.dashed else 2}"{dash}/>')
        for x, low_end, high_end in one.ranges:
            whisker = f"M{px(x) - 4:.1f} {py(low_end):.1f}h8M{px(x):.1f} {py(low_end):.1f}V{py(high_end):.1f}m-4 0h8"
            out.append(f'<path d="{whisker}" {style} stroke-width="1.2"/>')
        stride = max(1, len(points) // 60)
        for x, y in [(x, y) for x, y in points if y is not None][::stride]:
            dot = one.dots or len(points) == 1
            look = f'r="3" style="fill:{escape(one.colour)}"' if dot else 'r="6" fill="transparent"'
            tip = f"{one.label}, {x_label} {names.get(x) or number(x)}: {show(y)}"
            out.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" {look}><title>{escape(tip)}</title></circle>')
    return Markup("".join([*out, "</svg>"]))


def _path(points: Points, px: Callable[[float], float], py: Callable[[float], float]) -> str:
    parts, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        parts.append(f"{pen}{px(x):.1f} {py(y):.1f}")
        pen = "L"
    return "".join(parts)


def _mean(points: Points) -> tuple[float, float | None]:
    known = [y for _, y in points if y is not None]
    return sum(x for x, _ in points) / len(points), sum(known) / len(known) if known else None


def _open(width: float, height: float, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">'
        f"<title>{escape(title)}</title>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, opacity: float) -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="currentColor" stroke-opacity="{opacity:g}"/>'


def _text(x: float, y: float, text: str, size: int, anchor: str, opacity: float = 1, weight: int = 400) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="currentColor"'
        f' fill-opacity="{opacity:g}" font-weight="{weight}">{escape(text)}</text>'
    )
