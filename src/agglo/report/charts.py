"""Charts as inline SVG and plain HTML, without scripts; colours follow the page's theme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from agglo.report.markup import Child, Markup, tag
from agglo.results.tables import MINUS, number

Point = tuple[float, float]

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 26
LOG_RANGE = 12.0
"""A curve whose values span a larger factor gets a logarithmic axis."""
MAX_POINTS = 400
"""Points drawn at most: about one per pixel."""


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Two-sided exponential average: ``s_t = sum_i a^|t-i| x_i / sum_i a^|t-i|``, ``a = 1 - 1/span``.

    ``span`` is the number of values on each side with a notable weight; 1 returns the values.
    """
    decay = 1 - 1 / max(1.0, span)

    def one_side(ordered: Sequence[float]) -> list[tuple[float, float]]:
        total, weight, out = 0.0, 0.0, []
        for value in ordered:
            total, weight = decay * total + value, decay * weight + 1
            out.append((total, weight))
        return out

    past, future = one_side(values), one_side(values[::-1])[::-1]
    # Both sides include x_t with weight 1, so it is subtracted once.
    return [(p + f - x) / (v + w - 1) for x, (p, v), (f, w) in zip(values, past, future, strict=True)]


def linear_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) inside ``[low, high]``, about ``count`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * m for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Ticks at 1, 2 and 5 times powers of ten inside ``[low, high]``, thinned to about ``count``."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        ticks = [
            m * 10.0**d for d in decades for m in mantissas if low * (1 - 1e-9) <= m * 10.0**d <= high * (1 + 1e-9)
        ]
        if len(ticks) <= count:
            break
    return ticks[:: math.ceil(len(ticks) / (count + 1))] if len(ticks) > count else ticks


def wants_log(values: Sequence[float]) -> bool:
    """Whether values are all positive and span more than :data:`LOG_RANGE`."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > LOG_RANGE


class Axis:
    """Values to pixels along one axis, with ticks.

    Args:
        low, high: the range of the data; a range of zero length is widened.
        start, end: pixels of ``low`` and ``high``.
        log: logarithmic; needs ``low > 0``.
        margin: share of the range added at both ends.
    """

    def __init__(
        self, low: float, high: float, start: float, end: float, *, log: bool = False, margin: float = 0.06
    ) -> None:
        self.log, self.start, self.end = log, start, end
        a, b = (math.log10(low), math.log10(high)) if log else (low, high)
        if not b > a:
            a, b = a - (abs(a) * 0.1 or 1.0), b + (abs(b) * 0.1 or 1.0)
        room = (b - a) * margin
        self.low, self.high = a - room, b + room

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        x = math.log10(value) if self.log else value
        return self.start + (x - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        """Tick values."""
        if self.log:
            ticks = log_ticks(10**self.low, 10**self.high)
            return ticks if len(ticks) > 1 else linear_ticks(10**self.low, 10**self.high, count)
        return linear_ticks(self.low, self.high, count)


def tick_label(value: float) -> str:
    """A tick's number in at most four significant digits."""
    if value and (abs(value) >= 10_000 or abs(value) < 0.001):
        mantissa, _, exponent = f"{value:.2g}".partition("e")
        if exponent:
            return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    return f"{value:.4g}".replace("-", MINUS)


def line_chart(title: str, points: Sequence[Point], colour: int, *, unit: str = "", tint: bool = True) -> Markup:
    """A metric over steps: the raw curve faint, the smoothed one strong, its first and last value in the caption.

    Args:
        title: of the chart.
        points: finite ``(step, value)`` in order of step.
        colour: index of the page's series colour.
        unit: of the numbers in the caption.
        tint: fill the area under the curve.
    """
    name = tag("span", title, class_="chart-name")
    if not points:
        empty = tag("span", "no finite value", class_="chart-range")
        return tag("figure", tag("figcaption", name, empty), class_="chart")
    steps, values = [p[0] for p in points], [p[1] for p in points]
    calm = smooth(values, max(1.0, len(values) / 25))
    log = wants_log(values)
    x = Axis(steps[0], steps[-1], LEFT, WIDTH - RIGHT, margin=0.0 if len(points) > 1 else 0.06)
    y = Axis(min(values), max(values), HEIGHT - BOTTOM, TOP, log=log)
    keep = (
        range(0, len(points), math.ceil(len(points) / MAX_POINTS)) if len(points) > MAX_POINTS else range(len(points))
    )
    shown = sorted({*keep, len(points) - 1})
    raw = [(x(steps[i]), y(values[i])) for i in shown]
    soft = [(x(steps[i]), y(calm[i])) for i in shown]
    marks: list[Child] = [_grid(x, y)]
    if len(points) == 1:
        marks.append(tag("circle", cx=_px(raw[0][0]), cy=_px(raw[0][1]), r=4, class_="dot"))
        caption = f"{number(values[0])}{unit} at step {steps[0]:g}"
    else:
        if tint:
            floor = _px(HEIGHT - BOTTOM)
            area = f"{_path(soft)}L{_px(soft[-1][0])} {floor}L{_px(soft[0][0])} {floor}Z"
            marks.append(tag("path", d=area, class_="area"))
        marks += [tag("path", d=_path(raw), class_="raw"), tag("path", d=_path(soft), class_="line")]
        marks.append(tag("circle", cx=_px(soft[-1][0]), cy=_px(soft[-1][1]), r=3.5, class_="dot"))
        caption = f"{number(calm[0])} → {number(calm[-1])}{unit}"
    label = f"{title}: {caption}" + (", logarithmic axis" if log else "")
    svg = tag("svg", marks, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)
    note = tag("span", "log", class_="chip") if log else None
    head = tag("figcaption", name, note, tag("span", caption, class_="chart-range"))
    return tag("figure", head, svg, class_=f"chart c{colour % 8}")


def curve_chart(title: str, series: dict[int, tuple[str, list[tuple[int, float]]]]) -> Markup:
    """Curves of several models over the input size.

    ``series`` maps a colour to a name and two or more ``(pixels, value)`` points by rising x.
    """
    every = [point for _, points in series.values() for point in points]
    x = Axis(min(p[0] for p in every), max(p[0] for p in every), LEFT, WIDTH - RIGHT, margin=0.03)
    y = Axis(min(p[1] for p in every), max(p[1] for p in every), HEIGHT - BOTTOM, TOP)
    marks: list[Child] = [_grid(x, y)]
    for colour, (name, points) in series.items():
        at = [(x(a), y(b)) for a, b in points]
        dots = [tag("circle", cx=_px(a), cy=_px(b), r=3, class_="dot") for a, b in at]
        values = ", ".join(f"{a} px {number(b)}" for a, b in points)
        line = tag("path", tag("title", f"{name}: {values}"), d=_path(at), class_="line")
        marks.append(tag("g", line, dots, class_=f"c{colour % 8}"))
    svg = tag("svg", marks, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)
    legend = [tag("li", tag("i", class_=f"c{colour % 8}"), name) for colour, (name, _) in series.items()]
    head = tag("figcaption", tag("span", title, class_="chart-name"))
    return tag("figure", head, svg, tag("ul", legend, class_="legend"), class_="chart")


def _grid(x: Axis, y: Axis) -> list[Markup]:
    marks = []
    for value in y.ticks():
        at = y(value)
        if not TOP - 1 <= at <= HEIGHT - BOTTOM + 1:
            continue
        marks.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_px(at), y2=_px(at), class_="grid"))
        marks.append(tag("text", tick_label(value), x=LEFT - 8, y=_px(at + 3.5), text_anchor="end"))
    whole = [value for value in x.ticks() if value == int(value)]
    for value in whole or [round((x.low + x.high) / 2)]:
        at = x(value)
        anchor = "end" if at > WIDTH - RIGHT - 12 else "middle"
        marks.append(tag("text", tick_label(value), x=_px(at), y=HEIGHT - 8, text_anchor=anchor))
    marks.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
    return marks


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{_px(a)} {_px(b)}" for a, b in points)


def _px(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def stacked_bar(parts: Mapping[str, float]) -> Markup:
    """Shares of a whole as one bar, and a legend with seconds and per cent."""
    total = sum(parts.values())
    if not total > 0:
        return tag("p", "No times are logged.", class_="empty")
    bars, legend = [], []
    for index, (name, seconds) in enumerate(parts.items()):
        share = 100 * seconds / total
        percent = f"{share:.0f} %" if share >= 1 else f"{share:.1f} %"
        bars.append(tag("i", class_=f"c{index % 8}", style=f"width:{share:.3f}%", title=f"{name}: {percent}"))
        key = [tag("i", class_=f"c{index % 8}"), name, tag("b", percent), tag("span", f"{seconds:,.1f} s")]
        legend.append(tag("li", key))
    label = ", ".join(f"{name} {100 * seconds / total:.1f} %" for name, seconds in parts.items())
    stack = tag("div", bars, class_="stack", role="img", aria_label=label)
    return tag("div", stack, tag("ul", legend, class_="legend"))


def dumbbell(before: float | None, after: float | None, *, colour: int = 0) -> Markup:
    """A score in [0, 1] before and after, on one line; values outside the range are drawn at its ends."""
    width, height, pad = 220, 20, 8
    axis = Axis(0.0, 1.0, pad, width - pad, margin=0.0)

    def at(value: float) -> float:
        return axis(min(1.0, max(0.0, value)))

    middle = height / 2
    marks = [tag("line", x1=pad, x2=width - pad, y1=middle, y2=middle, class_="axis")]
    if before is not None and after is not None:
        marks.append(tag("line", x1=_px(at(before)), x2=_px(at(after)), y1=middle, y2=middle, class_="bond"))
    if before is not None:
        marks.append(tag("circle", cx=_px(at(before)), cy=middle, r=4.5, class_="ring"))
    if after is not None:
        marks.append(tag("circle", cx=_px(at(after)), cy=middle, r=5.5, class_="dot"))
    values = [f"{word} {number(v)}" for word, v in (("before", before), ("after", after)) if v is not None]
    return tag(
        "svg", marks, viewBox=f"0 0 {width} {height}", class_=f"dumbbell c{colour % 8}", role="img",
        aria_label=", ".join(values),
    )  # fmt: skip
