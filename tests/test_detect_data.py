"""Images with boxes: what is read from COCO and VOC, what is left out aloud, and where boxes go."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from PIL import Image
from torch.utils.data import DataLoader

from simmim.data import DetectionData, ImageFolderData, index_cache
from simmim.data.annotations import read_coco, read_voc
from simmim.data.boxes import Fit, Jitter, Placement
from simmim.data.detection import Annotated
from simmim.data.draws import uniforms
from simmim.data.mapped import open_tensors, write_tensors
from support.folders import write_coco

# What most folders here are like, and nothing that these tests are about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* classes have no objects"),
    pytest.mark.filterwarnings("ignore:.* count for nothing"),
]
Make = Callable[..., Path]
BLOOD = Path(__file__).parents[2] / "shared" / "data" / "detection"


def voc(path: Path, objects: list[tuple[str, tuple[float, ...], int]], size: int = 40) -> None:
    """Write an xml: objects as (name, edges, difficult)."""
    entries = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
        f"<xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax>"
        "</bndbox></object>"
        for name, box, difficult in objects
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<annotation><size><width>{size}</width><height>{size}</height></size>{entries}"
        "</annotation>"
    )


def data(root: Path, stage: str = "fit", **kwargs: Any) -> DetectionData:
    options = {"img_size": 40, "batch_size": 2, "num_workers": 0, **kwargs}
    made = DetectionData(root=str(root), **options)
    made.setup(stage)
    return made


def truth(made: DetectionData, part: str = "validation") -> dict[str, tuple[list[Any], list[int]]]:
    """Boxes and labels by the names of the images."""
    images = made.sets[part]
    found = {}
    for i in range(len(images)):
        objects = images[i]["truth" if part != "training" else "target"]
        found[images.name(i)] = (objects["boxes"].tolist(), objects["labels"].tolist())
    return found


@pytest.fixture
def folder(tmp_path: Path, make_images: Make) -> Path:
    """A data set of 40 x 40 px: train/ with 4 images, val/ with 2, and boxes."""
    root = tmp_path / "set"
    for part, n in (("train", 4), ("val", 2)):
        make_images(root / part, n, size=40)
        names = [(10 * i, f"{i:03d}.png") for i in range(n)]
        boxes = [(0, 7, [1, 2, 10, 20]), (0, 3, [5.5, 6, 8, 8]), (10, 3, [0, 0, 40, 40])]
        write_coco(root / part / "annotations.json", names, boxes)
    return root


# COCO --------------------------------------------------------------------------------------------


def test_coco_is_read_as_it_is_written(folder: Path) -> None:
    made = data(folder)
    assert (made.classes, made.category_ids) == (["cat", "dog"], [3, 7])
    assert truth(made) == {
        "000.png": ([[1, 2, 11, 22], [5.5, 6, 13.5, 14]], [1, 0]),
        "001.png": ([[0, 0, 40, 40]], [0]),
    }
    assert made.num_train == 4  # two of which have no object
    sample = made.sets["training"][2]
    assert sample["target"]["boxes"].shape == (0, 4)
    assert made.sets["validation"][0]["truth"]["area"].tolist() == [7, 7]
    assert not made.has_masks


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("train/annotations.json", "{}"),
        ("train/_annotations.coco.json", "images/{}"),
        ("instances_train.json", "{}"),
        ("annotations/instances_train.json", "train/images/{}"),
        ("train/labels.json", "C:\\data\\train\\{}"),
    ],
)
def test_annotations_are_found_where_people_keep_them(
    tmp_path: Path, make_images: Make, place: str, name: str
) -> None:
    make_images(tmp_path / "train" / "images", 2, size=40)
    names = [(i, name.format(f"{i:03d}.png")) for i in range(2)]
    write_coco(tmp_path / place, names, [(1, 3, [1, 2, 3, 4])])
    made = data(tmp_path, val_fraction=0, scale_jitter=(1, 1), hflip=0)
    assert truth(made, "training")["images/001.png"] == ([[1, 2, 4, 6]], [0])


def test_coco_s_own_folders_are_found(tmp_path: Path, make_images: Make) -> None:
    for part in ("train2017", "val2017"):
        make_images(tmp_path / part, 2, size=40)
        file = tmp_path / "annotations" / f"instances_{part}.json"
        write_coco(file, [(0, "000.png"), (1, "001.png")], [(0, 3, [1, 2, 3, 4])])
    made = data(tmp_path)
    assert (made.num_train, len(made.sets["validation"])) == (2, 2)


def test_one_file_for_a_folder_is_split_as_every_task_splits(
    tmp_path: Path, make_images: Make
) -> None:
    for part in ("a", "b"):
        make_images(tmp_path / "all" / part, 10, size=40)
    names = [f"{part}/{i:03d}.png" for part in ("a", "b") for i in range(10)]
    boxes = [(i, 3, [i, i, 2, 2]) for i in range(20)]
    file = write_coco(tmp_path / "elsewhere.json", list(enumerate(names)), boxes)  # type: ignore[arg-type]
    made = data(tmp_path / "all", annotations=str(file), val_fraction=0.2)
    pretraining = ImageFolderData(root=str(tmp_path / "all"), val_fraction=0.2, num_workers=0)
    pretraining.setup("fit")
    for part in ("training", "validation"):
        mine, theirs = made.sets[part], pretraining.sets[part]
        assert {mine.name(i) for i in range(len(mine))} == {
            theirs.name(i) for i in range(len(theirs))
        }
    for name, (boxes_found, _) in truth(made).items():
        corner = names.index(name)
        assert boxes_found == [[corner, corner, corner + 2, corner + 2]]


def test_one_file_for_train_and_val(folder: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        (folder / part / "annotations.json").unlink()
    names = [(i, f"{part}/{i % 4:03d}.png") for i, part in enumerate(["train"] * 4 + ["val"])]
    file = write_coco(tmp_path / "all.json", names, [(i, 3, [1, 1, 2, 2]) for i in (0, 4)])
    made = data(folder, annotations=str(file))
    assert truth(made) == {"000.png": ([[1, 1, 3, 3]], [0])}
    assert made.num_train == 4


def test_what_is_wrong_is_left_out_and_counted(tmp_path: Path, make_images: Make) -> None:
    make_images(tmp_path / "train", 4, size=40)
    images = [(0, "000.png"), (1, "001.png"), (1, "other.png"), (2, "gone.png"), (3, "000.png")]
    boxes: list[Any] = [
        (0, 3, [5, 5, 0, 10]),
        (0, 3, [50, 5, 10, 10]),
        (0, 3, [30, 30, 20, 20]),
        (0, 9, [1, 1, 2, 2]),
        (8, 3, [1, 1, 2, 2]),
        (1, 3, ["x", 1, 2, 2]),
        (3, 7, [1, 1, 2, 2]),  # a second entry of the first file
        (0, 3, [1, 1, float("nan"), 2]),
    ]
    write_coco(tmp_path / "train" / "annotations.json", images, boxes)
    made = data(tmp_path, val_fraction=0, scale_jitter=(1, 1), hflip=0)
    assert truth(made, "training") == {
        "000.png": ([[30, 30, 40, 40], [1, 1, 3, 3]], [0, 1]),
        "001.png": ([], []),
    }
    split = made.summary().splits["train"]
    assert (split.images, split.class_counts) == (2, [1, 1])
    assert split.counts == {"with objects": 1, "objects": 2, "clipped to their image": 1}
    file = tmp_path / "train" / "annotations.json"
    assert {(one.what, one.reason): (one.count, one.example) for one in split.left_out} == {
        ("objects", "box without any area"): (1, "000.png, annotation 0"),
        ("objects", "box outside of its image"): (1, "000.png, annotation 1"),
        ("objects", "no known category"): (1, "000.png, annotation 3"),
        ("objects", "no box"): (2, "000.png, annotation 7"),
        ("objects", f"of images that {file} does not list"): (1, "annotation 4"),
        ("images", "an id that another image has"): (1, "other.png"),
        ("images", f"listed in {file}, but not on the disk"): (1, "gone.png"),
        ("images", f"not in {file}"): (2, "002.png"),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no valid json"),
        ("[1, 2]", "hold a list"),
        ('{"images": []}', "no list 'annotations'"),
        ('{"images": [], "annotations": []}', "lists no image"),
        ('{"images": [{"id": 1, "file_name": "no.png"}], "annotations": []}', "names 'no.png'"),
    ],
)
def test_annotations_that_are_none_are_refused(folder: Path, text: str, words: str) -> None:
    (folder / "train" / "annotations.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        data(folder)


def test_missing_annotations_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.json cannot be read"):
        data(folder, annotations=str(tmp_path / "no.json"))
    (folder / "val" / "annotations.json").unlink()
    with pytest.raises(ValueError, match=r"'.*val' has images, but no annotations"):
        data(folder)


def test_an_image_of_another_size_than_was_annotated_is_a_bad_file(folder: Path) -> None:
    Image.new("RGB", (30, 40)).save(folder / "train" / "001.png")
    made = data(folder, bad_files="raise")
    with pytest.raises(ValueError, match="has 30 x 40 px, but its annotations are for 40 x 40"):
        made.sets["training"][1]
    made = data(folder)
    assert made.sets["training"][1]["index"] != 1  # another stands in for it, with its own boxes
    assert made.sets["training"].unreadable.tolist() == [0, 1, 0, 0]


def test_classes_are_numbered_as_a_model_that_knows_more(folder: Path) -> None:
    made = data(folder)
    before = truth(made)
    made.number_classes_as(["emu", "dog", "cat"])  # the data's are cat and dog
    for name, (boxes, labels) in truth(made).items():
        assert (boxes, labels) == (before[name][0], [2 - label for label in before[name][1]])


def test_crowds_are_ignored(folder: Path) -> None:
    change(folder, 1, iscrowd=1)
    sample = data(folder).sets["validation"][0]
    assert sample["target"]["labels"].tolist() == [0]
    assert sample["truth"]["iscrowd"].tolist() == [1, 0]


def rewrite(folder: Path, change: Callable[[str, list[Any]], None]) -> None:
    """Change the annotations of train/ and val/."""
    for part in ("train", "val"):
        file = folder / part / "annotations.json"
        content = json.loads(file.read_text())
        change(part, content["annotations"])
        file.write_text(json.dumps(content))


def change(folder: Path, n: int | None = None, **fields: Any) -> None:
    """Give the first n objects of each part these fields."""
    rewrite(folder, lambda _, entries: [entry.update(fields) for entry in entries[:n]])  # type: ignore[arg-type, return-value]


SPELLINGS = {
    "no": (0, 0.0, False, None, "0", "0.0", "", " false ", "False", "no", "Unspecified", "none"),
    "yes": (1, 1.0, True, "1", "1.0", "true", "True", "YES", "y"),
}


@pytest.mark.parametrize(("word", "value"), [(w, v) for w, vs in SPELLINGS.items() for v in vs])
def test_yes_and_no_are_read_in_any_spelling(folder: Path, word: str, value: object) -> None:
    change(folder, 1, iscrowd=value)
    table = read_coco(str(folder / "val" / "annotations.json"))
    assert [o.reason for o in table.objects[0]] == ["iscrowd" if word == "yes" else "", ""]
    xml = folder / "val" / "0.xml"
    voc(xml, [("cat", (1, 2, 11, 22), "" if value is None else value)])  # type: ignore[list-item]
    ((found,),) = read_voc("xml", {"000.png": str(xml)}).objects
    assert found.reason == ("difficult" if word == "yes" else "")


@pytest.mark.parametrize("spell", [str, float, lambda i: f"{i}.0"])
def test_ids_are_the_numbers_that_they_spell(folder: Path, spell: Callable[[int], Any]) -> None:
    def respell(part: str, entries: list[Any]) -> None:
        for entry in entries:
            entry |= {key: spell(entry[key]) for key in ("image_id", "category_id")}

    expected = truth(data(folder))
    rewrite(folder, respell)
    made = data(folder)
    assert truth(made) == expected
    assert made.category_ids == [3, 7]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"iscrowd": 1}, "iscrowd"),
        ({"bbox": [0.1, 0.2, 0.3, 0.8]}, "in shares of the image: multiply it by width and height"),
        ({"bbox": [4, 4, 0.5, 9]}, r"under 1 px on the canvas of 40 x 40 px \(model.img_size\)"),
        ({"category_id": 99}, "no known category"),
        ({"bbox": None}, "no box"),
        ({"image_id": 99}, "of images that .* does not list"),
    ],
)
def test_what_has_no_object_to_learn_is_refused(
    folder: Path, fields: dict[str, Any], reason: str
) -> None:
    change(folder, **fields)
    said = f"no objects to train on in .*: 3 objects left out: .*{reason}.*first: "
    with pytest.raises(ValueError, match=said):
        data(folder)


def test_validation_images_without_objects_are_told(folder: Path) -> None:
    write_coco(folder / "val" / "annotations.json", [(0, "000.png")], [])
    with pytest.warns(UserWarning, match="val has no objects that count, so it scores nothing"):
        data(folder)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_turned_images_are_read_as_they_were_annotated(folder: Path, orientation: int) -> None:
    image = Image.new("RGB", (96, 64), "black")
    image.paste("white", (8, 4, 40, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(folder / "val" / "a.jpg", exif=exif, quality=95)
    file = folder / "val" / "annotations.json"
    write_coco(file, [(1, "a.jpg")], [(1, 3, [8, 4, 32, 12])], (96, 64))
    sample = data(folder).sets["validation"][0]
    assert sample["original"].tolist() == [64, 96]
    bright = (data(folder, img_size=96).sets["validation"][0]["image"] > 127).all(0).nonzero()
    assert bright.amin(0).tolist() == [4, 8]
    write_coco(file, [(1, "a.jpg")], [(1, 3, [4, 8, 12, 32])], (64, 96))
    assert data(folder).sets["validation"][0]["original"].tolist() == [96, 64]


# Masks -------------------------------------------------------------------------------------------


def with_outlines(folder: Path, compressed: bool = False) -> None:
    """Give each object an outline: a polygon in train/, run lengths in val/."""

    def outline(part: str, entries: list[Any]) -> None:
        for entry in entries:
            x, y, w, h = entry["bbox"]
            entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            if part == "val":
                mask = np.zeros((40, 40), np.uint8, order="F")
                mask[int(y) : int(y + h), int(x) : int(x + w)] = 1
                runs = np.flatnonzero(np.diff(np.r_[0, mask.T.ravel(), 0]))
                counts = np.diff(np.r_[0, runs, mask.size]).tolist()
                entry["segmentation"] = {"size": [40, 40], "counts": counts}
                if compressed:
                    packed = coco_mask.encode(mask)
                    entry["segmentation"] = {"size": [40, 40], "counts": packed["counts"].decode()}

    rewrite(folder, outline)


@pytest.mark.parametrize("compressed", [False, True])
def test_outlines_become_masks(folder: Path, compressed: bool) -> None:
    with_outlines(folder, compressed)
    made = data(folder)
    assert made.has_masks
    masks = made.sets["validation"][0]["truth"]["masks"]
    assert masks.shape == (2, 40, 40)
    assert masks[0, 2:22, 1:11].all()
    assert masks[0].sum() == 200
    plain = data(folder, scale_jitter=(1, 1), hflip=0).sets["training"][0]["target"]["masks"]
    assert plain[0, 2:22, 1:11].all()
    assert plain[0].sum() == 200
    assert made.sets["training"][2]["target"]["masks"].shape[0] == 0
    assert "masks" not in data(folder, masks=False).sets["training"][0]["target"]


SQUARE = [1, 2, 11, 2, 11, 22, 1, 22]
SQUARE_RUNS = {"size": [40, 40], "counts": [42, *[20, 20] * 9, 20, 1178]}
TURNED = {"size": [20, 80], "counts": [42, 20, 1538]}


@pytest.mark.parametrize(
    "outline",
    [
        [SQUARE],
        SQUARE,
        [[x, y] for x, y in zip(SQUARE[::2], SQUARE[1::2], strict=True)],
        [str(value) for value in SQUARE],
        [SQUARE, [1, 2, 3, 4]],  # a line beside it
        SQUARE_RUNS,
        {**SQUARE_RUNS, "counts": [float(n) for n in SQUARE_RUNS["counts"]]},  # type: ignore[attr-defined]
    ],
)
def test_outlines_are_read_as_people_write_them(folder: Path, outline: Any) -> None:
    with_outlines(folder)
    change(folder, 1, segmentation=outline)
    made = data(folder)
    assert made.has_masks
    mask = made.sets["validation"][0]["truth"]["masks"][0]
    assert mask[2:22, 1:11].all()
    assert mask.sum() == 200


@pytest.mark.parametrize(
    ("outline", "reason"),
    [
        (None, "no segmentation"),
        ([], "no segmentation"),
        ([[1, 2, 11, 22]], "fewer than 3 points"),
        ([[1, 2, 11, 22, 1, 2]], "without any area"),
        ([[]], "fewer than 3 points"),
        ([[*SQUARE, 5]], "odd number"),
        ([[*SQUARE[:-1], float("nan")]], "other things than numbers"),
        ([["a", *SQUARE[1:]]], "other things than numbers"),
        ([[1e30, *SQUARE[1:]]], "other things than numbers"),
        ([[0.1, 0.1, 0.5, 0.1, 0.5, 0.5]], "outside of its box"),
        ({"size": [40, 40], "counts": [100, 50]}, "run lengths"),
        ({"size": [40, 40], "counts": [100, 5000]}, "run lengths"),
        ({"size": [40, 40], "counts": [1600]}, "run lengths"),
        ({"size": [40, 40], "counts": [-1, 1601]}, "run lengths"),
        ({"size": [40, 40], "counts": "abc"}, "run lengths"),
        ({"size": [40, 40], "counts": "T3b1"}, "run lengths"),
        ({"size": [40], "counts": [1600]}, "run lengths"),
        (TURNED, "run lengths"),
        ({"counts": [1600]}, "run lengths"),
    ],
)
def test_an_object_with_a_bad_outline_is_named(folder: Path, outline: Any, reason: str) -> None:
    with_outlines(folder)
    change(folder, 1, segmentation=outline)
    said = rf"1 of 3 objects of train has no outline \(.*{reason}.*; first: 000.png, annotation 0\)"
    with pytest.warns(UserWarning, match=f"{said}, so boxes alone are learned: --model.masks true"):
        assert not data(folder).has_masks
    made = data(folder, masks=True, scale_jitter=(1, 1), hflip=0)
    (left_out,) = made.summary().splits["train"].left_out
    assert (left_out.what, left_out.count) == ("objects", 1)
    assert left_out.example == "000.png, annotation 0"
    assert reason in left_out.reason
    assert made.sets["training"][0]["target"]["masks"].shape == (1, 40, 40)
    whole = made.sets["validation"][0]["truth"]
    assert whole["iscrowd"].tolist() == [1, 0]
    assert whole["masks"][0].sum() == 200  # its box, which is ignored


def test_a_few_objects_without_an_outline_do_not_turn_masks_off(folder: Path) -> None:
    for part, n in (("train", 4), ("val", 2)):
        names = [(i, f"{i:03d}.png") for i in range(n)]
        write_coco(folder / part / "annotations.json", names, [(0, 3, [1, 2, 10, 20])] * 20)
    with_outlines(folder)
    change(folder, 1, segmentation=[])
    made = data(folder)
    assert made.has_masks
    assert made.summary().splits["train"].counts["objects"] == 19
    change(folder, 2, segmentation=[])
    with pytest.warns(UserWarning, match="2 of 20 objects of train have no outline"):
        assert not data(folder).has_masks


def test_masks_that_are_not_there_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no segmentation"):
        data(folder, masks=True)


# Pascal VOC --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["{}", "annotations_voc/{}", "Annotations/{}", "../Annotations/{}"]
)
def test_voc_is_found_and_read(tmp_path: Path, make_images: Make, place: str) -> None:
    images = "images" if "/" in place else "."
    make_images(tmp_path / "train" / images, 9, size=40)
    for i in range(8):
        objects = [("wbc", (1, 2, 11, 22), 0), ("rbc", (3, 3, 9, 9), 1), ("rbc", (4, 4, 4, 9), 0)]
        voc(tmp_path / "train" / place.format(f"{i:03d}.xml"), objects)
    made = data(tmp_path, val_fraction=0.5)
    assert made.classes == ["rbc", "wbc"]
    sample = made.sets["validation"][0]
    assert sample["truth"]["boxes"].tolist() == [[0, 1, 11, 22], [2, 2, 9, 9]]  # counted from 1
    assert sample["truth"]["iscrowd"].tolist() == [0, 1]  # difficult
    assert sample["target"]["labels"].tolist() == [1]
    assert len(made.sets["training"]) + len(made.sets["validation"]) == 8


def test_a_folder_of_xml_can_be_named(tmp_path: Path, make_images: Make) -> None:
    make_images(tmp_path / "pictures", 4, size=40)
    for i in range(4):
        voc(tmp_path / "labels" / f"{i:03d}.xml", [("cat", (i, 1, 20, 30), 0)])
    made = data(tmp_path / "pictures", annotations=str(tmp_path / "labels"))
    for name, (boxes, _) in truth(made).items():
        assert boxes == [[max(int(name[:3]) - 1, 0), 0, 20, 30]]


def test_broken_xml_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "1.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"1\.xml are no valid xml"):
        read_voc("labels", {"1.png": str(tmp_path / "1.xml")})


@pytest.mark.exhaustive
@pytest.mark.skipif(not BLOOD.is_dir(), reason="the shared data are not there")
@pytest.mark.parametrize("part", ["train", "val"])
def test_blood_cells_are_the_same_in_both_formats(part: str) -> None:
    as_coco = read_coco(str(BLOOD / f"instances_{part}.json"))
    xml = {p.stem + ".jpg": str(p) for p in (BLOOD / part / "annotations_voc").glob("*.xml")}
    as_voc = read_voc("xml", xml)
    assert (
        sum(not o.reason for each in as_coco.objects for o in each)
        == {"train": 771, "val": 253}[part]
    )
    rows = {name: row for row, name in enumerate(as_voc.names)}
    for name, objects in zip(as_coco.names, as_coco.objects, strict=True):
        mine = {(as_coco.classes[o.label], o.box) for o in objects if not o.reason}
        others = [o for o in as_voc.objects[rows[name]] if not o.reason]  # one point is left out
        assert mine == {(as_voc.classes[o.label], o.box) for o in others}


# Transforms --------------------------------------------------------------------------------------


def painted(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """An image with each box in a colour of its own."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for i, (left, top, right, bottom) in enumerate(boxes.round().int().tolist()):
        image[i, top:bottom, left:right] = 255
    return image


@pytest.mark.parametrize("seed", range(8))
def test_boxes_and_masks_stay_on_their_objects(seed: int) -> None:
    draws = uniforms(seed)
    height, width = 50 + int(next(draws) * 100), 50 + int(next(draws) * 100)
    corners = torch.tensor([[next(draws) for _ in range(4)] for _ in range(3)])
    boxes = torch.cat([corners.view(3, 2, 2).amin(1), corners.view(3, 2, 2).amax(1)], 1)
    boxes = (boxes * torch.tensor([width, height] * 2)).round()
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 4)
    boxes = boxes.clamp(max=torch.tensor([width, height] * 2))
    image = painted(boxes, height, width)
    for transform in (Fit((96, 64)), Jitter((96, 64), (0.3, 3.0), 0.5)):
        placement = transform.place(height, width, draws)
        shown = placement.image(image, (96, 64))
        masks = placement.masks((image > 127).to(torch.uint8))
        h, w = placement.size
        assert shown.shape == (3, 96, 64)
        assert masks.shape == (3, h, w)
        assert not shown[:, h:].any()
        assert not shown[:, :, w:].any()
        for i, (left, top, right, bottom) in enumerate(placement.boxes(boxes).tolist()):
            assert 0 <= left <= right <= w
            assert 0 <= top <= bottom <= h
            for pixels in (shown[i, :h, :w] > 127, masks[i] > 0):
                rows, columns = pixels.any(1).nonzero()[:, 0], pixels.any(0).nonzero()[:, 0]
                if len(rows) == 0:
                    assert min(right - left, bottom - top) < 2.5
                    continue
                tight = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                for edge, expected in zip((left, top, right, bottom), tight, strict=True):
                    assert abs(edge - float(expected)) < 1.6  # of pixels that are up to 3 wide


def test_an_image_fits_with_its_aspect_ratio() -> None:
    placement = Fit((100, 200)).place(400, 400, iter(()))
    assert placement == Placement((0, 0, 400, 400), (100, 100))  # type: ignore[arg-type]
    assert Fit((100, 200)).place(50, 10, iter(())).size == (100, 20)
    assert Fit((100, 200)).place(1, 1000, iter(())).size == (1, 200)


def test_jitter_keeps_its_range_and_mirrors_half() -> None:
    transform = Jitter((64, 64), (0.5, 2.0), 0.5)
    found = [transform.place(64, 64, uniforms(0, 0, i)) for i in range(400)]
    scales = [max(p.size) / max(p.part[2:]) for p in found]
    assert min(scales) == pytest.approx(0.5, abs=0.02)
    assert max(scales) == pytest.approx(2.0, abs=0.05)
    assert np.mean(scales) == pytest.approx(1.25, abs=0.05)
    assert sum(p.flip for p in found) == pytest.approx(200, abs=40)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(same(one[k], other[k]) for k in one)
    return one == other


def test_a_sample_depends_on_seed_epoch_and_index_alone(folder: Path) -> None:
    with_outlines(folder)
    wide = {"scale_jitter": (0.3, 2.0)}
    first, again = data(folder, **wide), data(folder, **wide)
    other = data(folder, seed=1, **wide)
    for index in (3, 0, 2, 1):
        assert same(first.sets["training"][2, index], again.sets["training"][2, index])
    assert not same(first.sets["training"][2, 0], first.sets["training"][3, 0])
    assert not same(first.sets["training"][2, 0], other.sets["training"][2, 0])
    assert same(first.sets["validation"][0], other.sets["validation"][0])


@pytest.mark.exhaustive
def test_workers_change_nothing(folder: Path) -> None:
    def batches(workers: int) -> Iterator[dict[str, Any]]:
        made = data(folder, num_workers=workers, scale_jitter=(0.3, 2.0))
        loader = made.train_dataloader()
        assert isinstance(loader, DataLoader)
        return iter(loader)

    for alone, helped in zip(batches(0), batches(2), strict=True):
        assert torch.equal(alone["image"], helped["image"])
        for one, other in zip(alone["target"], helped["target"], strict=True):
            assert same(one, other)


# Batches -----------------------------------------------------------------------------------------


def test_a_batch_is_what_it_says(folder: Path) -> None:
    made = data(folder, img_size=[32, 48])
    batch = next(iter(made.train_dataloader()))
    assert batch["image"].shape == (2, 3, 32, 48)
    assert batch["image"].dtype == torch.uint8
    assert batch["size"].shape == (2, 2)
    assert [set(target) for target in batch["target"]] == [{"boxes", "labels"}] * 2
    shown = made.samples_to_draw(5)
    assert shown["index"].tolist() == [0, 1]
    assert shown["picture"][0].shape == (3, 40, 40)
    assert shown["original"].tolist() == [[40, 40], [40, 40]]


def test_predict_reads_any_folder_and_knows_ids(folder: Path, tmp_path: Path) -> None:
    made = data(folder / "val", "predict")
    batch = next(iter(made.predict_dataloader()))
    assert [Path(path).name for path in batch["path"]] == ["000.png", "001.png"]
    assert [made.image_id(i) for i in (0, 1)] == [0, 10]  # of the annotations.json beside them
    file = write_coco(tmp_path / "one.json", [("2", "001.png")], [])
    named = data(folder / "val", "predict", annotations=str(file))
    assert named.image_id(1) == "2"
    both = data(folder, "predict")  # whose ids are each two images'
    assert [both.image_id(i) for i in range(6)] == [1, 2, 3, 4, 5, 6]
    (folder / "val" / "annotations.json").write_text("{")
    assert data(folder / "val", "predict").image_id(1) == 2


def test_deep_and_gray_images_are_taken(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    Image.fromarray(np.full((40, 40), 5, np.uint8)).save(tmp_path / "train" / "a.png")
    deep = (np.arange(1600).reshape(40, 40) * 40).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "train" / "b.png")
    names = [(1, "a.png"), (2, "b.png")]
    write_coco(tmp_path / "train" / "annotations.json", names, [(1, 3, [1, 2, 10, 20])])
    made = data(tmp_path, val_fraction=0, in_chans=1, statistics="measured")
    batch = next(iter(made.train_dataloader()))
    assert batch["image"].dtype == torch.float32
    assert batch["image"].shape == (2, 1, 40, 40)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale_jitter": (2.0, 1.0)}, "scale_jitter"),
        ({"hflip": 2.0}, "hflip"),
        ({"img_size": [1, 2, 3]}, "img_size"),
        ({"val_fraction": 1.0}, "val_fraction"),
    ],
)
def test_options_are_checked(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        data(folder, **options)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        data(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        data(tmp_path / "empty")


# Kept --------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, make_images: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with val/, outlines and something to complain of, as old as what is kept."""
    monkeypatch.setattr(index_cache, "WORTH", 1)
    for part, n in {"train": 4, "val": 2}.items():
        make_images(tmp_path / "kept" / part, n, size=40)
        images = [(i, f"{i:03d}.png") for i in range(n)]
        objects = [(i, 3 + 4 * (i % 2), [2.0, 3.0, 20.0, 10.0]) for i in range(n)]
        path = write_coco(tmp_path / "kept" / part / "annotations.json", images, objects)
        content = json.loads(path.read_text())
        for entry in content["annotations"]:
            entry["segmentation"] = [[2, 3, 22, 3, 22, 13.5]]
        content["images"].append({"id": 99, "file_name": "gone.png"})
        if part == "val":
            content["categories"].reverse()
            content["categories"].append({"id": 1, "name": "owl"})
        path.write_text(json.dumps(content))
    return settle(tmp_path / "kept")


def settle(place: Path) -> Path:
    """Let files and folders have been changed an hour ago."""
    for path in (place, *place.rglob("*")):
        os.utime(path, (time.time() - 3600,) * 2)
    return place


def all_of(root: Path, **options: Any) -> list[Any]:
    """Everything that is read of a folder."""
    module = DetectionData(str(root), **options)
    module.setup("fit")
    table = module.summary().table()
    found: list[Any] = [module.classes, module.category_ids, module.has_masks, table]
    for data in (module.sets["training"], module.sets["validation"]):
        assert isinstance(data, Annotated)
        for index in range(len(data)):
            objects = data.annotations.of(data._place(index))
            plain = [x.tolist() if isinstance(x, torch.Tensor) else x for x in objects]
            found.append((data.path(index), plain))
    return found


def never(*_: object) -> None:
    raise AssertionError("it was read once more")


def test_annotations_are_read_once(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = all_of(kept)
    assert first[:3] == [["cat", "dog", "owl"], [3, 7, 1], True]
    assert first[3].count("gone.png") == 2
    monkeypatch.setattr("simmim.data.listed.read_coco", never)
    assert all_of(kept) == first
    monkeypatch.undo()
    monkeypatch.setenv("SIMMIM_CACHE", "off")
    assert all_of(kept) == first


def test_annotations_are_parsed_once_before_all_processes(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DetectionData(str(kept)).prepare_data()
    monkeypatch.setattr("simmim.data.listed.read_coco", never)
    module = DetectionData(str(kept))
    module.setup("fit")
    module = DetectionData(str(kept / "val"))
    module.setup("predict")
    assert [module.image_id(i) for i in range(2)] == [0, 1]


@pytest.mark.parametrize("change", ["annotations", "images"])
def test_changed_annotations_are_read_anew(kept: Path, make_images: Make, change: str) -> None:
    first = all_of(kept)
    if change == "images":
        (kept / "train" / "003.png").unlink()
    else:
        path = kept / "train" / "annotations.json"
        path.write_text(path.read_text().replace('"bbox": [2.0', '"bbox": [5.0'))
    found = all_of(kept)
    assert found != first
    assert len(found) == len(first) - (change == "images")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["0.starts", "0.labels", "0.outline_starts", "0.boxes"])
def test_damaged_arrays_of_boxes_are_made_anew(kept: Path, name: str) -> None:
    first = all_of(kept)
    cache = index_cache.cache_folder()
    assert cache is not None
    for file in cache.glob("boxes-*"):
        tensors, notes = open_tensors(file)
        plain = {key: tensor.clone() for key, tensor in tensors.items()}
        plain[name] = plain[name][:-1] if name == "0.boxes" else plain[name] + 9
        file.unlink()
        write_tensors(file, plain, notes)
    assert all_of(kept) == first


def test_one_file_for_all_folders_is_kept_too(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [(i, f"train/{i:03d}.png") for i in range(4)] + [(9, "val/000.png")]
    path = write_coco(kept / "all.json", images, [(i, 7, [1.0, 1.0, 9.0, 9.0]) for i in (0, 9)])
    settle(kept)
    first = all_of(kept, annotations=str(path))
    assert len(first) == 4 + 4 + 1
    monkeypatch.setattr("simmim.data.listed.read_coco", never)
    assert all_of(kept, annotations=str(path)) == first
