"""Boxes on pictures: where they are drawn, in which colour, and what programs get."""

import numpy as np
import pytest
import torch

from simmim.callbacks.boxes import (
    COLOURS,
    IGNORED,
    SIDE,
    board_boxes,
    draw_boxes,
    select,
)
from simmim.callbacks.detections import Detections, coco_results
from simmim.callbacks.pictures import PictureNames, draw_table


def found(masks: bool = False) -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[20.0, 60.0, 60.0, 90.0], [0.0, 0.0, 10.0, 10.0]])
    one = {"boxes": boxes, "labels": torch.tensor([1, 0]), "scores": torch.tensor([0.9, 0.2])}
    if masks:
        one["masks"] = torch.zeros(2, 100, 100, dtype=torch.bool)
        one["masks"][0, 60:90, 20:60] = True
    return one


def test_boxes_are_drawn_where_they_are_in_the_colour_of_their_class() -> None:
    picture = torch.full((3, 50, 50), 200, dtype=torch.uint8)  # of an image of 100 x 100
    drawn = draw_boxes(picture, found(), ["cat", "dog"], (100, 100))
    assert drawn.size == (SIDE, SIDE)
    pixels = np.asarray(drawn)
    scale = SIDE / 100
    for x, y in ((20, 75), (60, 75), (40, 90)):
        row, column = round(y * scale), round(x * scale)
        near = pixels[row - 2 : row + 3, column - 2 : column + 3].reshape(-1, 3)
        assert COLOURS[1] in map(tuple, near.tolist())
    assert tuple(pixels[round(75 * scale), round(40 * scale)]) == (200, 200, 200)  # inside
    assert tuple(pixels[round(58 * scale), round(21 * scale)]) == COLOURS[1]  # behind the name


def test_ignored_objects_are_gray_and_named_so() -> None:
    picture = torch.full((3, 100, 100), 200, dtype=torch.uint8)
    truth = {**found(masks=True), "iscrowd": torch.tensor([1, 0])}
    del truth["scores"]
    pixels = np.asarray(draw_boxes(picture, truth, ["cat", "dog"], (100, 100))).reshape(-1, 3)
    colours = set(map(tuple, pixels.tolist()))
    assert IGNORED in colours
    assert COLOURS[0] in colours
    assert COLOURS[1] not in colours
    (entry,) = board_boxes(truth, ["cat", "dog"], 1.0)["box_data"]
    assert entry["class_id"] == 0


def test_masks_are_laid_over_their_objects() -> None:
    picture = torch.full((1, 100, 100), 1.0)  # of a deep scan, gray
    pixels = np.asarray(draw_boxes(picture, found(masks=True), ["cat", "dog"], (100, 100)))
    inside, outside = pixels[round(75 * 5.12), round(40 * 5.12)], pixels[400, 500]
    assert outside.tolist() == [255, 255, 255]
    assert np.abs(inside.astype(int) - (255 + np.array(COLOURS[1])) / 2).max() <= 1


def test_nothing_to_draw_is_no_accident_and_unlike_pictures_lie_below_each_other() -> None:
    kept = select(found(), 0.5)
    assert (kept["labels"].tolist(), kept["boxes"].shape) == ([1], (1, 4))
    none = {name: tensor[:0] for name, tensor in found(masks=True).items()}
    picture = torch.zeros(3, 1000, 10, dtype=torch.uint8)
    empty = draw_boxes(picture, none, [], (1000, 10))
    assert empty.size == (10, 1000)
    assert coco_results(none, []) == []
    wide = draw_boxes(torch.zeros(3, 200, 700, dtype=torch.uint8), kept, ["a", "b"], (200, 700))
    panel = draw_table([{"truth": empty, "prediction": empty}, {"truth": wide, "prediction": wide}])
    assert panel.width >= 2 * wide.width
    assert panel.height >= empty.height + wide.height


def test_the_board_gets_boxes_in_its_own_format() -> None:
    said = board_boxes(found(), ["cat", "dog"], 2.0)
    assert said["class_labels"] == {0: "cat", 1: "dog"}
    first = said["box_data"][0]
    assert first["position"] == {"minX": 40, "minY": 120, "maxX": 120, "maxY": 180}
    assert (first["class_id"], first["domain"], first["box_caption"]) == (1, "pixel", "dog 0.90")
    assert first["scores"]["score"] == pytest.approx(0.9)
    truth = {name: tensor for name, tensor in found().items() if name != "scores"}
    assert "scores" not in board_boxes(truth, ["cat", "dog"], 1.0)["box_data"][0]


def test_programs_get_coco_s_results() -> None:
    results = coco_results(found(masks=True), [3, 7])
    assert results[0]["bbox"] == [20, 60, 40, 30]
    assert [one["category_id"] for one in results] == [7, 3]
    assert results[0]["segmentation"]["size"] == [100, 100]
    assert coco_results(found(), [])[0]["category_id"] == 2


def test_pictures_of_unlike_images_have_unlike_names(tmp_path: object) -> None:
    names = PictureNames("/data")
    assert names("/data/a/1.jpg") == "a/1.jpg.png"
    assert names("/data/a/1.JPG").casefold() != "a/1.jpg.png"  # one file on macOS and Windows
    assert names("/data/a/1.jpg") == "a/1.jpg.png"
    assert names.relative("/data/a/1.jpg") == "a/1.jpg"
    paths = ["00.png", "a/1.jpg", "b/1.jpg", "b/1.PNG", "c/2.png", "c/2.png.tif", "D.jpg", "d.tif"]
    names = PictureNames("/data", [f"/data/{path}" for path in paths])
    assert [names(f"/data/{path}") for path in reversed(paths)][::-1] == [
        "00.png", "a/1.png", "b/1.jpg.png", "b/1.PNG.png", "c/2.png", "c/2.png.tif.png",
        "D.jpg.png", "d.tif.png",
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{"every_n_epochs": -1}, {"num_images": 0}])
def test_options_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"-1 is negative|0 is too few"):
        Detections(**options)
