"""Draw plots as SVG: lines, ridges or arrows on two axes.

We draw them here, without a library. So one style sheet colours plots and page, dark or light, and
the page's policy can forbid every other style.
"""
import math
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 440, 46, 76, 26, 40   # pixels at scale 1, and the margins
MARKS = ("M-3.5,0a3.5,3.5 0 1 0 7,0a3.5,3.5 0 1 0 -7,0", "M-3,-3h6v6h-6z", "M0,-4.5L4,3h-8z",
         "M0,-4.5L4.5,0 0,4.5 -4.5,0z", "M0,4.5L4,-3h-8z")  # circle, square, triangle, diamond, ...

STYLE = Path(__file__).with_name("plot.css").read_text(encoding="utf-8")


@dataclass
class Line:
    """One line of a plot. low and high: the ends of 95% intervals."""
    label: str                # written at its end
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    colour: int = 0           # 0 to 4; it also decides the shape of the marks
    dashed: bool = False      # with hollow marks
    marks: bool = True
    joined: bool = True


@dataclass
class Axis:
    """An axis that puts values from low to high at pixels from start to end. kind: "linear", "sqrt"
    or "log"."""
    kind: str
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        f = {"linear": float, "sqrt": lambda v: math.sqrt(max(v, 0)), "log": math.log10}[self.kind]
        share = (f(value) - f(self.low)) / ((f(self.high) - f(self.low)) or 1)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Choose round numbers on the axis, at least 22 pixels apart."""
        if self.kind == "sqrt":
            nice = [0, 0.1, 0.5, 1, 2, 4, 6, 8, 10, 15, 20, 30, 50, 100]
        elif self.kind == "log":
            nice = [10.0 ** k for k in range(-6, 7)]
        else:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(k * power for k in (1, 2, 5, 10) if k * power >= 0.999 * rough)
            nice = [k * step for k in range(math.ceil(self.low / step),
                                            math.floor(self.high / step) + 1)]
        ticks = []
        for tick in nice:
            room = abs(self(tick) - self(ticks[-1])) if ticks else math.inf
            if self.low <= tick <= self.high and room >= 22:
                ticks.append(tick)
        return ticks


def axis_for(kind: str, values: list[float], start: float, end: float) -> Axis:
    """Make an axis that holds all the values, with a little room."""
    low, high = min(values), max(values)
    if kind == "log":
        return Axis(kind, 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)),
                    start, end)
    room = 0.04 * (high - low) or 0.5
    return Axis(kind, 0 if kind == "sqrt" or low == 0 else low - room, high + room, start, end)


def svg(alt: str, height: float, parts: list[str]) -> Markup:
    return Markup(f'<svg class="plot" role="img" aria-label="{escape(alt)}" '
                  f'viewBox="0 0 {WIDTH} {height}">' + "\n".join(parts) + "</svg>")


def standing_alone(plot: Markup) -> str:
    """Make a plot a file of its own, with its style and a background."""
    return (str(plot).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
            .replace(">", f'><style>{STYLE}</style><rect width="100%" height="100%" '
                     'fill="var(--paper)"/>', 1))


def text(x: float, y: float, what, anchor: str = "start", label: str = "") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{label}">'
            f'{escape(what)}</text>')


def grid(x: Axis, xlabel: str, height: float, y: Axis | None = None, ylabel: str = "") -> list[str]:
    """Draw lines at the ticks of one or two axes, with their numbers and labels."""
    bottom = height - BOTTOM
    parts = [text(4, 13, ylabel), text((x.start + x.end) / 2, height - 6, xlabel, "middle")]
    for tick in x.ticks():
        parts += [f'<path class="grid" d="M{x(tick)},{TOP}V{bottom}"/>',
                  text(x(tick), bottom + 16, f"{tick:,g}", "middle")]
    for tick in y.ticks() if y else ():
        parts += [f'<path class="grid" d="M{x.start},{y(tick)}H{x.end}"/>',
                  text(x.start - 6, y(tick) + 4, f"{tick:g}", "end")]
    return parts


def apart(places: list[float], gap: float = 14) -> list[float]:
    """Move the heights of labels down where they would overlap."""
    moved, last = list(places), -math.inf
    for i in sorted(range(len(places)), key=places.__getitem__):
        last = moved[i] = max(places[i], last + gap)
    return moved


def draw(line: Line, x: Axis, y: Axis) -> list[str]:
    at = [(x(a), y(b)) for a, b in zip(line.x, line.y)]
    parts = []
    if line.joined:
        points = " ".join(f"{a},{b}" for a, b in at)
        parts.append(f'<path class="k{line.colour}{" dashed" * line.dashed}" d="M{points}"/>')
    if line.low:
        bars = "".join(f"M{a},{y(low)}V{y(high)}"
                       for (a, _), low, high in zip(at, line.low, line.high))
        parts.append(f'<path class="k{line.colour} bar" d="{bars}"/>')
    for a, b in at if line.marks else ():
        parts.append(f'<path class="k{line.colour} {"hollow" if line.dashed else "mark"}" '
                     f'transform="translate({a},{b})" d="{MARKS[line.colour]}"/>')
    return parts


def plot(title: str, xlabel: str, ylabel: str, lines: list[Line], x: str = "linear",
         y: str = "linear", guides: tuple = (), cursors: tuple = (), height: float = 280) -> Markup:
    """Plot lines against x, each labelled at its end. guides: heights of dashed grey lines;
    cursors: places of vertical lines; a script shows one of them."""
    lines = [line for line in lines if line.x]
    if not lines:
        return svg(f"{title}: nothing to show", 40, [text(4, 24, "too few samples")])
    values = [v for line in lines for v in (*line.y, *(line.low or ()), *(line.high or ()))]
    across = axis_for(x, [v for line in lines for v in line.x], LEFT, WIDTH - RIGHT)
    up = axis_for(y, [*values, *guides], height - BOTTOM, TOP)
    parts = grid(across, xlabel, height, up, ylabel)
    parts += [f'<path class="guide" d="M{across.start},{up(g)}H{across.end}"/>' for g in guides]
    parts += [f'<path class="cursor" d="M{across(c)},{TOP}V{height - BOTTOM}"/>' for c in cursors]
    for line in lines:
        parts += draw(line, across, up)
    named = [line for line in lines if line.label]
    for line, place in zip(named, apart([up(line.y[-1]) for line in named])):
        parts.append(text(across(line.x[-1]) + 8, place + 4, line.label, "start",
                          f"label k{line.colour}"))
    said = "; ".join(f"{line.label or ylabel} from {line.y[0]:.3g} to {line.y[-1]:.3g}"
                     for line in lines if not line.dashed)
    return svg(f"{title}, against {xlabel}: {said}", height, parts)


def ridges(title: str, xlabel: str, rows: list[tuple[str, list[float]]], low: float, high: float,
           gap: float = 26) -> Markup:
    """Draw a ridge for each row. A row is a label, and the fraction of samples in each of equal
    bins from low to high."""
    height = TOP + BOTTOM + gap * (len(rows) + 1)
    across = Axis("linear", low, high, LEFT + 24, WIDTH - 16)
    tallest = max(max(shares) for _, shares in rows)
    parts = grid(across, xlabel, height)
    for i, (label, shares) in enumerate(rows):
        floor, width = TOP + gap * (i + 2), (across.end - across.start) / len(shares)
        outline = "".join(f"V{floor - 1.6 * gap * share / tallest:.1f}h{width:.2f}"
                          for share in shares)
        parts += [f'<path class="ridge k0" d="M{across.start},{floor}{outline}V{floor}z"/>',
                  text(across.start - 8, floor, label, "end")]
    return svg(f"{title}: in the highest bin {rows[0][1][-1]:.0%} to {rows[-1][1][-1]:.0%}", height,
               parts)


def arrows(title: str, xlabel: str, rows: list[tuple[str, float, float]], high: float,
           colour: int) -> Markup:
    """Draw an arrow for each row (word, before, after), from before to after."""
    height = TOP + BOTTOM + 20 * len(rows)
    across = Axis("sqrt", 0, high, LEFT + 34, WIDTH - 16)
    parts = grid(across, xlabel, height)
    for i, (word, before, after) in enumerate(rows):
        y, a, b = TOP + 20 * i + 12, across(before), across(after)
        back = -6 if b > a else 6
        parts += [text(across.start - 8, y + 4, word, "end", "label"),
                  f'<path class="k{colour}" d="M{a},{y}H{b}m{back},-4l{-back},4l{back},4"/>',
                  f'<path class="hollow k{colour}" transform="translate({a},{y})" '
                  f'd="{MARKS[0]}"/>']
    return svg(f"{title}: " + ", ".join(f"{w} {a:.1f} to {b:.1f}" for w, a, b in rows), height,
               parts)
