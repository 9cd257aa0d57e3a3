"""Pictures of features: a map of all images in two dimensions, and images beside their nearest."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from simmim.callbacks.pictures import BACKGROUND, INK, fitting, to_rgb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.floating[Any]]

METHODS = {"tsne": "t-SNE", "umap": "UMAP", "pca": "PCA", "none": ""}
NAMED = 20  # classes with a colour of their own; the rarer ones of more are drawn gray
COMPONENTS = 50  # to which features are reduced before t-SNE, as its authors advise
REST = "#c8c8c8"
SIDE, GAP, LINE = 96, 6, 15  # px of a tile at least, between tiles, and of a line below one
RIGHT, WRONG = (44, 160, 44), (214, 39, 40)  # frames of neighbours of the same and another class


def check_map(method: str) -> None:
    """Refuse a map that could not be drawn in the end.

    Raises:
        ValueError: If its name is not known, or umap-learn is missing.
    """
    if method not in METHODS:
        raise ValueError(f"--map {method} is not known: use {', '.join(METHODS)}")
    if method == "umap" and find_spec("umap") is None:
        raise ValueError("--map umap needs umap-learn: pip install 'simmim[umap]', or use tsne")


def project(features: Floats, method: str, seed: int = 0) -> Floats:
    """Lay features out in the plane, near to near; the same way for the same seed.

    Args:
        features: (N, D), N at least 3.
        method: tsne, umap or pca. Of fewer than 5 images always pca.
        seed: Of t-SNE's and UMAP's randomness.

    Returns:
        (N, 2).
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    n = len(features)
    if not np.ptp(features, axis=0).any():  # all alike: there is nothing to lay out
        return np.zeros((n, 2))
    reduced = PCA(min(COMPONENTS, *features.shape), random_state=seed).fit_transform(features)
    if reduced.shape[1] < 2:  # features of one dimension
        reduced = np.pad(reduced, ((0, 0), (0, 1)))
    if method == "pca" or n < 5:
        return cast(Floats, reduced[:, :2])
    if method == "umap":
        from umap import UMAP

        return cast(
            Floats,
            UMAP(n_neighbors=min(15, n - 1), random_state=seed, n_jobs=1).fit_transform(reduced),
        )
    perplexity = min(30.0, (n - 1) / 3)
    return cast(Floats, TSNE(perplexity=perplexity, random_state=seed).fit_transform(reduced))


def draw_map(
    features: Floats,
    labels: npt.NDArray[np.int64],
    classes: Sequence[str],
    method: str,
    seed: int = 0,
    title: str = "",
) -> "Figure":
    """Draw a map of features, coloured by class.

    Args:
        features: (N, D), N at least 3.
        labels: Class of each, (N,); -1: none.
        classes: Names of the classes. The 20 most frequent of more have colours.
        method: tsne, umap or pca.
        seed: Of the layout, and of the order in which the points are drawn.
        title: What the features are.
    """
    from matplotlib.figure import Figure

    plane = project(features, method, seed)
    width, height = np.ptp(plane, axis=0)
    figure = Figure(figsize=(8, float(np.clip(7 * height / max(width, 1e-9), 4, 9))))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    heading = f"{METHODS[method]} of {len(features):,} images\n{title}"
    axes.set_title(heading, fontsize=10, parse_math=False)
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    colours, legend = _colours(labels, classes)
    order = np.random.default_rng(seed).permutation(len(plane))  # no class lies above the others
    size = float(np.clip(20_000 / len(plane), 6, 40))
    axes.scatter(
        plane[order, 0], plane[order, 1], c=colours[order], s=size, linewidths=0, alpha=0.8
    )
    if legend:
        _add_legend(axes, legend)
    return figure


def save_figure(figure: "Figure", file: Path | BinaryIO) -> None:
    """Write a figure as PNG. Letters that matplotlib's font lacks become boxes, without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="png", dpi=150)


def most_similar(
    features: Tensor, queries: Tensor, n: int, own: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Find the images that are most similar to each query, by the cosine of their features.

    Args:
        features: Of all images, (N, D).
        queries: Of the queries, (Q, D).
        n: How many are wanted; no more than there are.
        own: Place of each query among the images, which does not count; -1: it is another.

    Returns:
        Cosine similarity and place of each, most similar first, (Q, n).
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(features, dim=1).T
    places = torch.tensor(own)
    inside = places >= 0
    similarity[inside.nonzero()[:, 0], places[inside]] = -torch.inf
    best = similarity.topk(min(n, len(features) - int(inside.any())), dim=1)
    return best.values, best.indices


@dataclass(frozen=True)
class Tile:
    """A picture with a line or two below it.

    Attributes:
        picture: uint8, or float in 0..1, (C, H, W).
        caption: The lines.
        agrees: Frames it: whether it is of the query's class; None where that is not known.
    """

    picture: Tensor
    caption: str
    agrees: bool | None = None


def draw_neighbours(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Draw queries with their neighbours: a row for each, the query on the left.

    Args:
        rows: The query and its neighbours, all pictures of one size.

    Returns:
        The picture, RGB.
    """
    tiles = [[_enlarged(tile.picture) for tile in row] for row in rows]
    width, height = tiles[0][0].size
    lines = max(tile.caption.count("\n") + 1 for row in rows for tile in row)
    across, down = width + GAP, height + lines * LINE + 2 * GAP
    columns = max(map(len, rows))
    panel = Image.new("RGB", (columns * across + 3 * GAP, len(rows) * down + GAP), BACKGROUND)
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(size=11)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            left, top = GAP + x * across + (2 * GAP if x else 0), GAP + y * down
            panel.paste(tiles[y][x], (left, top))
            if tile.agrees is not None:
                box = (left - 2, top - 2, left + width + 1, top + height + 1)
                draw.rectangle(box, outline=RIGHT if tile.agrees else WRONG, width=2)
            for i, line in enumerate(tile.caption.split("\n")):
                middle = (left + width // 2, top + height + i * LINE + LINE // 2 + 3)
                draw.text(middle, fitting(line, font, width), INK, font, anchor="mm")
    x = GAP + across
    draw.line((x, GAP, x, panel.height - 2 * GAP), fill=(200, 200, 200))
    return panel


def _colours(
    labels: npt.NDArray[np.int64], classes: Sequence[str]
) -> tuple[Floats, list[tuple[str, Any]]]:
    """Colour of each point, RGBA, and the legend: name and colour of the classes, if any."""
    from matplotlib import color_sequences
    from matplotlib.colors import to_rgba

    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    there = int((counts > 0).sum())
    kept = np.sort(np.argsort(-counts, kind="stable")[: min(there, NAMED)])
    palette = color_sequences["tab10" if len(kept) <= 10 else "tab20"]
    colours = np.tile(to_rgba(REST), (len(labels), 1))
    legend: list[tuple[str, Any]] = []
    for colour, label in zip(palette, kept.tolist(), strict=False):
        colours[labels == label] = to_rgba(colour)
        legend.append((classes[label], colour))
    if there > len(kept):
        legend.append((f"{there - len(kept)} other classes", REST))
    if legend and (labels < 0).any():
        legend.append(("no class", REST))
    if not legend:
        colours[:] = to_rgba(palette[0])
    return colours, legend


def _add_legend(axes: Any, legend: Sequence[tuple[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, marker="o", linestyle="", markersize=6) for _, c in legend]
    drawn = axes.legend(
        handles, ["name"] * len(legend), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
    )
    for text, (name, _) in zip(drawn.get_texts(), legend, strict=True):
        text.set_parse_math(False)  # names are plain text: dollars and leading dashes as well
        text.set_text(name if len(name) <= 24 else f"{name[:23]}…")
        text.set_fontsize(9)


def _enlarged(picture: Tensor) -> Image.Image:
    """A picture of SIDE px or a little more: small ones are enlarged by whole pixels."""
    unit = picture.float() / 255 if picture.dtype == torch.uint8 else picture
    image = Image.fromarray(to_rgb(unit[None])[0])
    longest = max(image.size)
    if longest < SIDE:
        factor = -(-SIDE // longest)
        size = image.width * factor, image.height * factor
        return image.resize(size, Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image
