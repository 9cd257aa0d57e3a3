"""Maps of features and pictures of neighbours: what is near, what is coloured, what is framed."""

from importlib.util import find_spec
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from simmim.commands.embed.pictures import (
    RIGHT,
    WRONG,
    Tile,
    draw_map,
    draw_neighbours,
    most_similar,
    project,
    save_figure,
)

needs_umap = pytest.mark.skipif(find_spec("umap") is None, reason="umap-learn is not installed")


def blobs(n: int = 60, dims: int = 16) -> tuple[Any, Any]:
    """Three groups, far from each other."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 3
    centres = 20 * rng.standard_normal((3, dims))
    return (centres[labels] + rng.standard_normal((n, dims))).astype(np.float32), labels


def share_of_neighbours_alike(plane: Any, labels: Any) -> float:
    distance = ((plane[:, None] - plane[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    return float((labels[distance.argmin(1)] == labels).mean())


def png(figure: Any) -> bytes:
    file = BytesIO()
    save_figure(figure, file)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tsne", "pca", pytest.param("umap", marks=needs_umap)])
@pytest.mark.filterwarnings("ignore:Tensorflow not installed:ImportWarning")  # umap-learn's own
def test_what_is_near_stays_near(method: str) -> None:
    features, labels = blobs()
    plane = project(features, method)
    assert plane.shape == (60, 2)
    assert share_of_neighbours_alike(plane, labels) == 1
    assert np.array_equal(plane, project(features, method))


@pytest.mark.parametrize(("n", "dims"), [(3, 5), (6, 1), (7, 200), (9, 0)])
def test_few_images_and_few_or_constant_features(n: int, dims: int) -> None:
    noise = np.random.default_rng(0).standard_normal((n, dims)).astype(np.float32)
    plane = project(noise if dims else np.ones((n, 4), np.float32), "tsne")
    assert plane.shape == (n, 2)
    assert np.isfinite(plane).all()


def drawn(labels: Any, classes: list[str]) -> tuple[list[str], list[str], set[str]]:
    """Names and colours of the legend, and the colours of the points."""
    features = np.random.default_rng(0).standard_normal((len(labels), 4)).astype(np.float32)
    figure = draw_map(features, np.asarray(labels), classes, "pca", title="runs/a_b$c$")
    png(figure)
    axes = figure.axes[0]
    points = {to_hex(colour) for colour in axes.collections[0].get_facecolors()}
    legend = axes.get_legend()
    if legend is None:
        return [], [], points
    names = [text.get_text() for text in legend.get_texts()]
    return names, [to_hex(handle.get_color()) for handle in legend.legend_handles], points


def test_classes_have_colours_and_names() -> None:
    names, colours, points = drawn([0, 1, 2] * 5, ["_hidden 猫", "$5 and $6", "x" * 40])
    assert names == ["_hidden 猫", "$5 and $6", "x" * 23 + "…"]
    assert len(set(colours)) == 3
    assert points == set(colours)


def test_of_many_classes_the_frequent_ones_have_colours() -> None:
    labels = [label for label in range(25) for _ in range(3 if label >= 5 else 2)]
    names, colours, points = drawn(labels, [str(label) for label in range(25)])
    assert names == [*map(str, range(5, 25)), "5 other classes"]
    assert len(set(colours)) == 21
    assert points == set(colours)


def test_images_without_a_class() -> None:
    assert drawn([-1] * 6, [])[0] == []
    names, colours, points = drawn([0, 1, -1] * 3, ["a", "b"])
    assert names == ["a", "b", "no class"]
    assert points == set(colours)


def test_neighbours_are_those_of_smallest_angle() -> None:
    features = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, 3.0], [-1.0, -0.1]])
    similarity, places = most_similar(features, features[[0, 2]], 3, [0, 2])
    assert places.tolist() == [[1, 2, 3], [1, 0, 3]]
    assert similarity[0].tolist() == pytest.approx([10 / 101**0.5, 0, -1 / 1.01**0.5])
    stranger = torch.tensor([[1.0, 0.1]])
    assert most_similar(features, stranger, 9, [-1])[1].tolist() == [[1, 0, 2, 3]]
    assert most_similar(features, torch.cat([stranger, stranger]), 9, [-1, 0])[1].shape == (2, 3)


def test_frames_say_whether_the_class_agrees() -> None:
    tile = torch.full((3, 32, 48), 100, dtype=torch.uint8)
    row = [
        Tile(tile, "cat"),
        Tile(tile, "0.9\na", True),
        Tile(tile, "b" * 99, False),
        Tile(tile, ""),
    ]
    picture = draw_neighbours([row, row[:2]])
    width, height = 96, 64  # 2 px for each of the 48 and 32
    assert picture.size == (4 * (width + 6) + 18, 2 * (height + 30 + 12) + 6)
    lefts = [6, *(6 + i * (width + 6) + 12 for i in (1, 2, 3))]
    frames = [picture.getpixel((left - 1, 6 + height // 2)) for left in lefts]
    assert frames == [(255, 255, 255), RIGHT, WRONG, (255, 255, 255)]
    assert picture.getpixel((lefts[3] + 5, 10)) == (100, 100, 100)
    assert picture.getpixel((lefts[3] + 5, 10 + height + 42)) == (255, 255, 255)  # a shorter row
