"""A page and what it is made of. Pictures and curves lie inside the file."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from simmim.durable import write_whole

POINTS = 800  # of a curve; more are averaged in groups
NAMED = 10  # curves of a diagram up to which a legend names them


@dataclass(frozen=True)
class Text:
    """Paragraphs, or lines as they are.

    Attributes:
        text: Plain text; it is escaped.
        verbatim: Whether spaces and line breaks count, as in commands and configs.
        folded: A title, if it is shown only when asked for.
    """

    text: str
    verbatim: bool = False
    folded: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under column names; numbers are aligned to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Picture:
    """A PNG file and what it shows."""

    path: Path
    caption: str = ""


@dataclass(frozen=True)
class Flow:
    """Pictures in an order, shown one at a time and moved through with a slider."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Curve:
    """Values over x, both of the same length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Curves:
    """Small diagrams side by side, each with a title and its curves."""

    diagrams: Sequence[tuple[str, Sequence[Curve]]]
    x_label: str = "step"


Part = Text | Table | Picture | Flow | Curves


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: Its heading.
        lead: A sentence or two below it: what matters most.
        sections: Headings and what stands below them.
    """

    title: str
    lead: str
    sections: Sequence[tuple[str, Sequence[Part]]]


def write_page(page: Page, path: Path) -> Path:
    """Write a page as one file that needs no other, and put it into place when it is whole.

    Args:
        page: What to say.
        path: The .html file; one that is there is replaced.

    Returns:
        The path.
    """
    body = [f"<h1>{escape(page.title)}</h1>", f'<p class="lead">{escape(page.lead)}</p>']
    for heading, parts in page.sections:
        body.append(f"<section><h2>{escape(heading)}</h2>")
        body += [_html(part) for part in parts]
        body.append("</section>")
    text = _PAGE.format(title=escape(page.title), style=_STYLE, body="\n".join(body), script=_JS)
    write_whole(path, text.encode("utf-8", "backslashreplace"))  # names of files may be no text
    return path


def _html(part: Part) -> str:
    match part:
        case Text():
            return _text(part)
        case Table():
            return _table(part)
        case Picture():
            return _figure(part)
        case Flow():
            return _flow(part)
        case Curves():
            return _curves(part)


def _text(part: Text) -> str:
    if part.verbatim:
        html = f"<pre>{escape(part.text)}</pre>"
    else:
        html = "".join(f"<p>{escape(text)}</p>" for text in part.text.split("\n\n"))
    if not part.folded:
        return html
    return f"<details><summary>{escape(part.folded)}</summary>{html}</details>"


def _table(part: Table) -> str:
    first = part.rows[0] if part.rows else [""] * len(part.columns)
    numbers = [' class="number"' if _is_number(value) else "" for value in first]
    head = "".join(
        f"<th{number}>{escape(name)}</th>"
        for name, number in zip(part.columns, numbers, strict=True)
    )
    rows = ["".join(_cell(value) for value in row) for row in part.rows]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _cell(value: object) -> str:
    if _is_number(value):
        return f'<td class="number">{_number(value)}</td>'
    return f"<td>{escape(str(value))}</td>"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _figure(part: Picture) -> str:
    data = b64encode(part.path.read_bytes()).decode()
    caption = escape(part.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _flow(part: Flow) -> str:
    if len(part.pictures) == 1:
        return _figure(part.pictures[0])
    last = len(part.pictures) - 1
    slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="which picture">'
    return f'<div class="flow">{slider}{"".join(_figure(p) for p in part.pictures)}</div>'


def _curves(part: Curves) -> str:
    drawn = [_draw(title, curves, part.x_label) for title, curves in part.diagrams]
    return f'<div class="diagrams">{"".join(drawn)}</div>'


def _draw(title: str, curves: Sequence[Curve], x_label: str) -> str:
    """A diagram as SVG, whose numbers are also there for those who cannot see it."""
    import matplotlib
    from matplotlib.figure import Figure

    # Letters stay letters: a tenth of the size, and they can be searched.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        axes: Any = figure.subplots()
        for curve in curves:
            x, y = _thin(np.asarray(curve.x, float), np.asarray(curve.y, float))
            axes.plot(x, y, label=curve.name, linewidth=1.4, marker="." if len(x) < 30 else None)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if 1 < len(curves) <= NAMED:
            axes.legend(frameon=False)
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    said = "; ".join(f"{c.name}: {c.y[0]:.4g} to {c.y[-1]:.4g}" for c in curves)
    label = escape(f"{title}. {said}")
    return f'<figure role="img" aria-label="{label}">{svg[svg.index("<svg") :]}</figure>'


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages of neighbours, where there are more points than can be seen."""
    if len(x) <= POINTS:
        return x, y
    groups = zip(np.array_split(x, POINTS), np.array_split(y, POINTS), strict=True)
    means = np.array([(a.mean(), b.mean()) for a, b in groups])
    return means[:, 0], means[:, 1]


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }
h1 { margin-bottom: 0; overflow-wrap: anywhere; }
h2 { border-bottom: 1px solid #ddd; margin-top: 2.5rem; }
.lead { font-size: 1.15rem; }
table { border-collapse: collapse; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #eee; }
th:first-child, td:first-child { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.wide, pre { overflow-x: auto; }
pre { background: #f6f6f6; padding: .8rem; border-radius: 4px; font-size: .85rem; }
figure { margin: 1rem 0; }
figcaption { color: #666; font-size: .9rem; }
img { max-width: 100%; }
.diagrams { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr));
  gap: 1rem; }
.diagrams figure { margin: 0; }
.diagrams svg { width: 100%; height: auto; }
.flow input { width: 100%; }
.flow figure { display: flex; flex-direction: column; align-items: flex-start; }
.flow figure[hidden] { display: none; }
.flow figcaption { order: -1; margin-bottom: .3rem; }
summary { cursor: pointer; }
"""

# Without it, all pictures of a flow are shown below each other.
_JS = """
for (const flow of document.querySelectorAll(".flow")) {
  const slider = flow.querySelector("input");
  const pictures = flow.querySelectorAll("figure");
  const show = () => pictures.forEach((p, i) => { p.hidden = i !== Number(slider.value); });
  slider.addEventListener("input", show);
  show();
}
"""
