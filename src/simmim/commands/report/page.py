"""A page and what it is made of. Pictures and curves lie inside the file."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from simmim.base.files import write_whole

POINTS = 800  # of a curve; more are averaged in groups
NAMED = 20  # curves of a diagram up to which a legend names them, in as many colours


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
    """Rows under column names; numbers are aligned to the right.

    Without names, the first column says what the second is.
    """

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
    links = [f'<a href="#part-{i}">{escape(h)}</a>' for i, (h, _) in enumerate(page.sections)]
    body.append(f"<nav>{' '.join(links)}</nav>")
    for i, (heading, parts) in enumerate(page.sections):
        body.append(f'<section id="part-{i}"><h2>{escape(heading)}</h2>')
        body += [_html(part, heading) for part in parts]
        body.append("</section>")
    text = _PAGE.format(title=escape(page.title), style=_STYLE, body="\n".join(body), script=_JS)
    write_whole(path, text.encode("utf-8", "backslashreplace"))  # names of files may be no text
    return path


def _html(part: Part, heading: str) -> str:
    match part:
        case Text():
            return _text(part)
        case Table():
            return _table(part)
        case Picture():
            return _figure(part, heading)
        case Flow():
            return _flow(part, heading)
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
    if not any(part.columns):
        rows = [f'<th scope="row">{escape(str(row[0]))}</th>{_cells(row[1:])}' for row in part.rows]
        head = ""
    else:
        first = part.rows[0] if part.rows else [""] * len(part.columns)
        names = "".join(
            f"<th{_aligned(value)}>{escape(name)}</th>"
            for name, value in zip(part.columns, first, strict=True)
        )
        rows, head = [_cells(row) for row in part.rows], f"<thead><tr>{names}</tr></thead>"
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _cells(row: Sequence[object]) -> str:
    return "".join(
        f"<td{_aligned(v)}>{_number(v) if _is_number(v) else escape(str(v))}</td>" for v in row
    )


def _aligned(value: object) -> str:
    return ' class="number"' if _is_number(value) else ""


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _figure(part: Picture, heading: str) -> str:
    data = b64encode(part.path.read_bytes()).decode()
    caption = f"<figcaption>{escape(part.caption)}</figcaption>" if part.caption else ""
    said = escape(f"{heading}, {part.caption}" if part.caption else heading)
    return f'<figure>{caption}<img alt="{said}" src="data:image/png;base64,{data}"></figure>'


def _flow(part: Flow, heading: str) -> str:
    if len(part.pictures) == 1:
        return _figure(part.pictures[0], heading)
    last = len(part.pictures) - 1
    label = escape(f"{heading}: which picture")
    slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="{label}">'
    figures = "".join(_figure(picture, heading) for picture in part.pictures)
    return f'<div class="flow">{slider}{figures}</div>'


def _curves(part: Curves) -> str:
    drawn = [_draw(title, curves, part.x_label) for title, curves in part.diagrams]
    return f'<div class="diagrams">{"".join(drawn)}</div>'


def _draw(title: str, curves: Sequence[Curve], x_label: str) -> str:
    """A diagram as SVG, whose numbers are also there for those who cannot see it."""
    import matplotlib
    from matplotlib.figure import Figure

    # Letters stay letters: a tenth of the size, and they can be searched.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10}):
        colours = matplotlib.colormaps["tab10" if len(curves) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
        named = [
            (c, matplotlib.colors.to_hex(colours[i % len(colours)])) for i, c in enumerate(curves)
        ]
        figure = Figure(figsize=(4, 2.4), layout="constrained")
        axes: Any = figure.subplots()
        for curve, colour in named:
            x, y = _thin(np.asarray(curve.x, float), np.asarray(curve.y, float))
            axes.plot(x, y, color=colour, linewidth=1.4, marker="." if len(x) < 30 else None)
        axes.set_xlabel(x_label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue().replace("#000000", "currentColor")  # the page is dark where others are
    said = "; ".join(f"{c.name}: {c.y[0]:.4g} to {c.y[-1]:.4g}" for c in curves)
    label = escape(f"{title}. {said}")
    keys = [
        f'<span><i style="background:{colour}"></i>{escape(curve.name)}</span>'
        for curve, colour in named
    ]
    legend = f'<div class="legend">{" ".join(keys)}</div>' if 1 < len(keys) <= NAMED else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{legend}"
        f'<div role="img" aria-label="{label}">{svg[svg.index("<svg") :]}</div></figure>'
    )


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
:root { color-scheme: light dark; --ink: #222; --pale: #5c5c5c; --paper: #fff; --soft: #f4f4f4;
  --line: #ddd; --link: #0b57a4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --pale: #a0a0a0; --paper: #16181b; --soft: #23262a; --line: #3a3e43;
    --link: #8ab8f0; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
h1 { margin-bottom: 0; line-height: 1.2; overflow-wrap: anywhere; }
h2 { border-bottom: 1px solid var(--line); margin-top: 2.5rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.lead { font-size: 1.15rem; white-space: pre-line; overflow-wrap: anywhere; }
table { border-collapse: collapse; }
th, td { padding: .25rem 1.2rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { white-space: nowrap; }
th[scope] { font-weight: normal; color: var(--pale); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.wide, pre, figure { overflow-x: auto; }
pre { background: var(--soft); padding: .8rem; border-radius: 4px; font-size: .85rem; }
figure { margin: 1rem 0; }
figcaption { color: var(--pale); font-size: .9rem; margin-bottom: .3rem; }
img { max-width: max(100%, 36rem); border-radius: 4px; }  /* on a phone it is wider, and scrolls */
.diagrams { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
  gap: 1.5rem 1rem; margin: 1rem 0; }
.diagrams figure { margin: 0; display: flex; flex-direction: column; }
.diagrams figcaption { color: var(--ink); margin: 0; }
.diagrams [role] { margin-top: auto; }
.diagrams svg { display: block; width: 100%; height: auto; }
.diagrams text { fill: currentColor; }
.legend { font-size: .8rem; display: flex; flex-wrap: wrap; gap: 0 .9rem; }
.legend i { display: inline-block; width: .7em; height: .7em; margin-right: .35em; }
.flow input { width: 100%; max-width: 40rem; }
.flow figure[hidden] { display: none; }
summary { cursor: pointer; }
"""

# Without it, all pictures of a flow are shown below each other.
_JS = """
for (const flow of document.querySelectorAll(".flow")) {
  const slider = flow.querySelector("input");
  const pictures = flow.querySelectorAll("figure");
  const show = () => {
    pictures.forEach((p, i) => { p.hidden = i !== Number(slider.value); });
    slider.ariaValueText = pictures[slider.value].innerText;
  };
  slider.addEventListener("input", show);
  show();
}
"""
