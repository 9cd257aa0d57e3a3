"""Images with masks: pairs, classes, joint transforms, and mistakes in one sentence."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.base.errors import explain
from simmim.data import ImageFolderData, SegmentationData, value_counts
from simmim.data.class_map import VOID, Legend, WrongMask, read_legend
from simmim.data.draws import uniforms
from simmim.data.joint import PairCrop, Whole, crop_mask, random_window
from simmim.data.pack import pack
from simmim.data.segmentation import MaskedImages
from simmim.data.transforms import Box, crop_and_resize

Make = Callable[..., Path]


def write(folder: Path, name: str, mask: Any, mode: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(mask), mode=mode).save(folder / f"{name}.png")


def make_pairs(folder: Path, n: int, size: tuple[int, int] = (24, 32), values: Any = (0, 1, 2)):
    """Write images whose red channel tells the value of the mask: bands of each value."""
    height, width = size
    for i in range(n):
        rng = np.random.default_rng(i)
        mask = np.asarray(values)[rng.integers(0, len(values), (height // 4, width // 4))]
        mask = mask.repeat(4, 0).repeat(4, 1).astype(np.uint8 if max(values) < 256 else np.uint16)
        image = np.stack([mask * 20, mask * 0 + i, mask * 0 + 99], -1).astype(np.uint8)
        write(folder / "images", f"{i:03d}", image)
        write(folder / "masks", f"{i:03d}", mask)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_pairs(tmp_path / "d" / "train", 10)
    make_pairs(tmp_path / "d" / "val", 4)
    return tmp_path / "d"


def data(root: Path, **kwargs: Any) -> SegmentationData:
    options = {"img_size": 16, "batch_size": 4, "num_workers": 0, **kwargs}
    made = SegmentationData(root=str(root), **options)
    made.setup("fit")
    return made


def names(made: Any, part: str) -> list[str]:
    return [made.sets[part].name(i) for i in range(len(made.sets[part]))]


# Pairs -------------------------------------------------------------------------------------------


def test_images_and_masks_are_paired_by_stem_at_any_depth(tmp_path: Path) -> None:
    root = tmp_path / "train"
    for name, value in (("a", 0), ("sub/a", 1), ("sub/b", 2)):
        image = np.full((8, 8, 3), value * 20, np.uint8)
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "images" / f"{name}.jpg")
        write((root / "masks" / name).parent, Path(name).name, np.full((8, 8), value, np.uint8))
    made = data(tmp_path, val_fraction=0)
    training = made.sets["training"]
    assert names(made, "training") == ["a.jpg", "sub/a.jpg", "sub/b.jpg"]
    assert isinstance(training, MaskedImages)
    assert [Path(training.mask_path(i)).parent.name for i in range(3)] == ["masks", "sub", "sub"]
    for i in range(3):
        assert training.read(i)[1].unique().tolist() == [i]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parts", "flat", "inner"])
def test_folders_may_be_parted_above_or_below(tmp_path: Path, layout: str) -> None:
    if layout == "parts":
        make_pairs(tmp_path / "train", 5)
        make_pairs(tmp_path / "val", 2)
    elif layout == "flat":
        make_pairs(tmp_path, 7)
    else:
        for part, n in (("train", 5), ("val", 2)):
            made = make_pairs(tmp_path / "old" / part, n)
            for kind in ("images", "masks"):
                (tmp_path / kind).mkdir(exist_ok=True)
                (made / kind).rename(tmp_path / kind / part)
    made = data(tmp_path, val_fraction=2 / 7)
    assert len(made.sets["training"]) == 5
    assert len(made.sets["validation"]) == 2
    images = ImageFolderData(str(tmp_path), img_size=16, num_workers=0, val_fraction=2 / 7)
    images.setup()
    for part in ("training", "validation"):
        assert names(images, part) == names(made, part)
    assert len(images.sets["predict"]) == 7
    assert not images.has_labels
    pack(str(tmp_path), str(tmp_path.parent / f"{tmp_path.name}_packed"))
    packed = ImageFolderData(f"{tmp_path}_packed", img_size=16, num_workers=0, val_fraction=2 / 7)
    packed.setup("fit")
    assert len(packed.sets["training"]) == 5
    assert len(packed.sets["validation"]) == 2


def test_without_val_the_split_is_that_of_pretraining_on_the_images(tmp_path: Path) -> None:
    make_pairs(tmp_path / "train", 20)
    made = data(tmp_path, val_fraction=0.25)
    for root in (tmp_path / "train" / "images", tmp_path / "train", tmp_path):
        images = ImageFolderData(str(root), img_size=16, num_workers=0, val_fraction=0.25)
        images.setup()
        assert names(made, "training") == names(images, "training")
        assert names(made, "validation") == names(images, "validation")
        assert len(images.sets["predict"]) == 20
        assert not images.has_labels
    assert len(made.sets["validation"]) == 5


def test_a_missing_partner_is_named(folder: Path) -> None:
    (folder / "train" / "masks" / "003.png").rename(folder / "003.png")
    with pytest.raises(ValueError, match=r"1 of 10 images have no mask.*003\.png.*masks.003\.png"):
        data(folder)
    (folder / "003.png").rename(folder / "train" / "masks" / "999.png")
    (folder / "train" / "images" / "003.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 10 masks have no image.*999\.png"):
        data(folder)
    (folder / "train" / "masks" / "999.png").unlink()
    (folder / "train" / "images" / "004.bmp").write_bytes(b"")
    with pytest.raises(ValueError, match="share the stem"):
        data(folder)


def test_masks_are_no_jpeg_and_folders_must_be_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images' is missing: segmentation needs images/ and"):
        data(folder / "train" / "images")
    (folder / "train" / "masks" / "000.png").unlink()
    Image.new("L", (32, 24)).save(folder / "train" / "masks" / "000.jpg")
    with pytest.raises(ValueError, match="JPEG changes the values"):
        data(folder)


def test_test_has_a_part_of_its_own_if_it_has_masks(folder: Path) -> None:
    make_pairs(folder / "test", 3)
    made = data(folder)
    assert len(made.sets["test"]) == 3
    for file in (folder / "test" / "masks").iterdir():
        file.unlink()
    (folder / "test" / "masks").rmdir()
    made = data(folder)
    assert "test" not in made.sets


# Classes -----------------------------------------------------------------------------------------


def test_classes_come_from_the_file_in_the_folder(folder: Path) -> None:
    said = {
        "classes": ["sky", "road"],
        "ignore_index": 2,
        "palette_rgb": [[1, 2, 3], [4, 5, 6]],
    }
    (folder / "classes.json").write_text(json.dumps(said))
    made = data(folder)
    assert (made.classes, made.values) == (["sky", "road"], [0, 1])
    assert made.colors == [(1, 2, 3), (4, 5, 6)]
    mask = made.sets["validation"][0]["mask"]
    stored = np.asarray(Image.open(folder / "val" / "masks" / "000.png")).astype(int)
    assert torch.equal(mask.long(), torch.tensor(np.where(stored == 2, VOID, stored)))
    other = folder.parent / "other.json"
    other.write_text(json.dumps({"classes": ["a", "b", "c"]}))
    assert data(folder, classes=str(other)).classes == ["a", "b", "c"]


def test_without_a_file_the_values_of_the_training_masks_are_the_classes(folder: Path) -> None:
    assert data(folder).classes == ["0", "1", "2"]
    assert data(folder, void=0).classes == ["1", "2"]
    assert data(folder, void=[1]).values == [0, 2]
    write(folder / "train" / "masks", "000", np.full((24, 32), 255, np.uint8))
    assert data(folder).classes == ["0", "1", "2"]  # 255 is void
    write(folder / "train" / "masks", "000", np.full((24, 32), 300, np.uint16))
    made = data(folder)
    assert made.values == [0, 1, 2, 300]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 255], [0, 255]),
        ([0, 128, 255], [0, 128, 255]),
        ([0, 1, 255], [0, 1]),
        ([0, 255, 300], [0, 255, 300]),
        ([5, 9, 255], [5, 9]),
    ],
)
def test_without_a_file_each_value_that_occurs_is_a_class(
    tmp_path: Path, values: list[int], expected: list[int]
) -> None:
    made = data(make_pairs(tmp_path, 8, values=values))
    assert (made.classes, made.values) == ([str(v) for v in expected], expected)
    made = data(tmp_path, void=values[-1]) if len(values) > 2 else made
    assert made.legend is not None
    assert made.values == (values[:-1] if len(values) > 2 else values)


@pytest.mark.parametrize(
    ("values", "content", "void", "expected"),
    [
        ([0, 255], {}, None, [0, 255]),
        ([0, 128, 255], {}, 255, [0, 128]),
        ([0, 128, 255], {"classes": ["x", "y", "z"]}, 0, [128, 255]),
        ([1, 2, 255], {"classes": ["x", "y"]}, None, [1, 2]),
        ([0, 1, 255], {"classes": ["x", "y"]}, None, [0, 1]),
        ([0, 1], {"classes": ["x", "y", "z"]}, None, [0, 1, 2]),
        ([0, 255], {"values": [0, 255]}, None, [0, 255]),
        ([0, 255, 7], {"classes": ["x", "y"], "values": [255, 0], "ignore_index": 7}, None,
         [255, 0]),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:1 of 3 classes have no pixels:UserWarning")
def test_names_belong_to_the_values_that_occur(
    tmp_path: Path, values: list[int], content: Any, void: int | None, expected: list[int]
) -> None:
    named = [f"class {v}" for v in values if v != void]
    make_pairs(tmp_path, 8, values=values)
    (tmp_path / "classes.json").write_text(json.dumps({"classes": named, **content}))
    made = data(tmp_path, void=void)
    assert made.values == expected
    counts = made.summary().splits["train"].class_counts
    paths = [tmp_path / "masks" / name for name in names(made, "training")]
    stored = np.stack([np.asarray(Image.open(path)) for path in paths])
    assert list(counts) == [int((stored == v).sum()) for v in expected]
    assert made.class_counts == list(counts)


@pytest.mark.parametrize(
    ("values", "content", "sentence"),
    [
        ([0, 255], {"ignore_index": 255}, r"no pixel of 'b'.* of the values 255, which are ignor"),
        ([1, 255], {}, r"no pixel of 'a'.* of the values 255, which are ignored"),
        ([0, 255], {"classes": ["a", "b", "c"]}, r"no pixel of 'b'.* of the values 255, which are"),
        ([0, 7, 9], {}, r"has the value 7, which is neither one of the 2 classes"),
    ],
)
def test_names_that_leave_a_class_without_pixels_are_refused(
    tmp_path: Path, values: list[int], content: Any, sentence: str
) -> None:
    make_pairs(tmp_path, 8, values=values)
    (tmp_path / "classes.json").write_text(json.dumps({"classes": ["a", "b"], **content}))
    with pytest.raises(ValueError, match=sentence):
        data(tmp_path)


def test_named_class_without_pixels_is_told_where_others_are_ignored(tmp_path: Path) -> None:
    make_pairs(tmp_path, 8, values=(0, 1, 255))
    (tmp_path / "classes.json").write_text('{"classes": ["a", "b", "c"]}')
    with (
        pytest.warns(UserWarning, match=r"no pixel of 'c', but [\d,]+ pixels of the values 255"),
        pytest.warns(UserWarning, match="1 of 3 classes have no pixels in train, such as 'c'"),
        pytest.warns(UserWarning, match="1 of 3 classes have no pixels in val"),
    ):
        summary = data(tmp_path).summary()
    assert "pixels left out: ignored, as data.void says (255)" in summary.table()


def soften(folder: Path, how: str) -> None:
    """Give all masks below a folder soft edges."""
    for path in folder.rglob("masks/*.png"):
        mask = Image.open(path)
        if how == "bilinear":
            large = mask.resize((mask.width * 3 - 1, mask.height * 3 - 1), Image.Resampling.BOX)
            mask = large.resize(mask.size, Image.Resampling.BILINEAR)
        elif how == "enlarged":
            small = mask.resize((mask.width // 4, mask.height // 4), Image.Resampling.NEAREST)
            mask = small.resize(mask.size, Image.Resampling.BICUBIC)
        else:
            mask.save(folder / "mask.jpg", quality=90)
            mask = Image.open(folder / "mask.jpg").convert("L")
        mask.save(path)


def make_discs(root: Path) -> None:
    """Write images of a disc whose masks are 0 and 255."""
    y, x = np.mgrid[:64, :64]
    for part, n in (("train", 4), ("val", 2)):
        for i in range(n):
            mask = np.where((y - 30 - i) ** 2 + (x - 34) ** 2 < 20**2, 255, 0).astype(np.uint8)
            write(root / part / "images", str(i), mask[..., None].repeat(3, 2))
            write(root / part / "masks", str(i), mask)


@pytest.mark.parametrize("how", ["bilinear", "enlarged", "jpeg"])
def test_masks_with_soft_edges_are_refused_with_the_remedy(tmp_path: Path, how: str) -> None:
    make_discs(tmp_path)
    assert data(tmp_path).values == [0, 255]
    soften(tmp_path, how)
    remedy = r'occur at edges alone.*nearest neighbours.*"values" in classes.json, such as \[0, 255'
    with pytest.raises(ValueError, match=remedy):
        data(tmp_path)
    named = {"classes": ["ground", "disc"]}
    (tmp_path / "classes.json").write_text(json.dumps(named))
    with pytest.raises(ValueError, match=remedy):
        data(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps({**named, "values": [0, 255]}))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = data(tmp_path)
    assert "of the pixels of train have values that are no class" in str(told[0].message)
    mask = made.sets["validation"][0]["mask"]
    assert (mask == 1).float().mean() > 0.2
    assert 0 < (mask == VOID).float().mean() < 0.3


def test_value_of_val_alone_is_ignored_and_told(folder: Path) -> None:
    write(folder / "val" / "masks", "001", np.full((24, 32), 7, np.uint8))
    with pytest.warns(
        UserWarning, match=r"768 of the pixels of val have values .* \(7\).*001\.png"
    ):
        made = data(folder)
    assert made.values == [0, 1, 2]
    assert made.sets["validation"][1]["mask"].unique().tolist() == [VOID]


def test_classes_are_numbered_as_a_model_that_knows_more(folder: Path) -> None:
    made = data(folder)
    assert made.classes == ["0", "1", "2"]
    before = made.sets["validation"][0]["mask"]
    made.number_classes_as(["9", "2", "1", "0"])
    assert made.classes == ["9", "2", "1", "0"]
    assert torch.equal(
        made.sets["validation"][0]["mask"], torch.where(before < 0, before, 3 - before)
    )


def test_masks_are_read_once_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pairs(tmp_path, 12)
    for path in (tmp_path / "masks").iterdir():
        os.utime(path, (10**9, 10**9))
    monkeypatch.setattr(value_counts, "WORTH", 10)
    read = Mock(side_effect=value_counts.decode_values)
    monkeypatch.setattr(value_counts, "decode_values", read)
    counts = data(tmp_path).class_counts
    assert read.call_count == 12
    assert data(tmp_path).class_counts == counts
    assert read.call_count == 12
    write(tmp_path / "masks", "003", np.full((24, 32), 9, np.uint8))
    assert data(tmp_path).values == [0, 1, 2, 9]
    assert read.call_count == 24


def test_a_legend_numbers_values_and_drops_what_is_void(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    said = {"classes": ["none", "a", "b"], "values": [0, 128, 255], "ignore_index": 0}
    file.write_text(json.dumps({**said, "palette_rgb": [[0, 0, 0], [9, 0, 0], [0, 9, 0]]}))
    legend = read_legend(str(file))
    assert (legend.classes, legend.values) == (["a", "b"], [128, 255])
    write(tmp_path, "m", np.array([[0, 128], [255, 128]], np.uint8))
    assert legend.read(str(tmp_path / "m.png")).tolist() == [[VOID, 0], [1, 0]]
    colors = np.array([[[0, 0, 0], [9, 0, 0]], [[0, 9, 0], [9, 0, 0]]], np.uint8)
    write(tmp_path, "rgb", colors)
    assert legend.read(str(tmp_path / "rgb.png")).tolist() == [[VOID, 0], [1, 0]]


def test_masks_may_have_a_palette_or_16_bits(tmp_path: Path) -> None:
    legend = Legend(["a", "b"], [0, 1])
    picture = Image.fromarray(np.array([[0, 1], [255, 1]], np.uint8), mode="P")
    picture.putpalette([200, 0, 0, 0, 200, 0] + 762 * [0])
    picture.save(tmp_path / "p.png")
    assert legend.read(str(tmp_path / "p.png")).tolist() == [[0, 1], [VOID, 1]]
    deep = Legend(["a", "b"], [0, 1000])
    write(tmp_path, "deep", np.array([[0, 1000]], np.uint16))
    assert deep.read(str(tmp_path / "deep.png")).tolist() == [[0, 1]]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert legend.read(str(tmp_path / "bits.png")).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("pixels", "sentence"),
    [
        (np.array([[0, 7]], np.uint8), "has the value 7, which is neither one of the 2 classes"),
        (np.zeros((2, 2, 3), np.uint8), "is a colour image"),
        (np.zeros((2, 2), np.float32), "holds fractions"),
        (np.full((2, 2), -1, np.int32), "below 0"),
    ],
)
def test_a_wrong_mask_is_named_with_the_reason(tmp_path: Path, pixels: Any, sentence: str) -> None:
    Image.fromarray(pixels).save(tmp_path / "wrong.tif")
    with pytest.raises(WrongMask, match=rf"wrong\.tif.*{sentence}"):
        Legend(["a", "b"], [0, 1]).read(str(tmp_path / "wrong.tif"))


def test_a_colour_that_is_not_in_the_palette_is_named(tmp_path: Path) -> None:
    write(tmp_path, "m", np.array([[[1, 1, 1], [2, 2, 2]]], np.uint8))
    legend = Legend(["a", "b"], [0, 1], colors=[(1, 1, 1), (3, 3, 3)])
    with pytest.raises(WrongMask, match=r"the colour \(2, 2, 2\), which is not in palette_rgb"):
        legend.read(str(tmp_path / "m.png"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1, 2]", "is no file of classes"),
        ("{", "is no file of classes"),
        ('{"classes": ["a"]}', "nothing to tell apart"),
        ('{"classes": ["a", "a"]}', "one name and one value"),
        ('{"classes": ["a", "b"], "values": [1]}', "one name and one value"),
        ('{"classes": ["a", "b"], "palette_rgb": [[0, 0, 0]]}', "1 colours for 2 classes"),
    ],
)
def test_a_wrong_file_of_classes_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_legend(str(tmp_path / "c.json"))
    with pytest.raises(ValueError, match="cannot be read"):
        read_legend(str(tmp_path / "none.json"))


def test_sizes_that_differ_stop_the_run_and_damaged_masks_are_skipped(folder: Path) -> None:
    write(folder / "train" / "masks", "002", np.zeros((10, 32), np.uint8))
    made = data(folder)
    with pytest.raises(WrongMask, match=r"002\.png' is 32 x 10 pixels, but .* is 32 x 24"):
        made.sets["training"][2]
    (folder / "train" / "masks" / "002.png").write_bytes(b"nothing")
    made = data(folder)
    assert made.sets["training"][2]["index"] != 2
    assert made.sets["training"].unreadable[2] == 1
    with pytest.raises(ValueError, match="cannot be read"):
        data(folder, bad_files="raise").sets["training"][2]


@pytest.mark.slow
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
def test_image_that_exif_turns_is_left_as_stored_for_a_mask_of_that_size(
    tmp_path: Path, orientation: int, kind: str
) -> None:
    stored = np.zeros((24, 32, 3), np.uint8)
    stored[:8, 16:] = 200
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "images").mkdir()
    Image.fromarray(stored).save(tmp_path / "images" / f"0.{kind}", exif=exif)
    write(tmp_path / "masks", "0", (stored[..., 0] > 0).astype(np.uint8))
    image, mask = data(tmp_path, val_fraction=0).sets["training"].read(0)
    assert image.shape == (3, 24, 32)
    assert torch.equal((image[0] > 100).long(), mask.long())


@pytest.mark.slow
def test_a_wrong_mask_in_a_worker_is_one_sentence(folder: Path) -> None:
    write(folder / "train" / "masks", "002", np.zeros((10, 32), np.uint8))
    made = data(folder, num_workers=1, batch_size=10)
    with pytest.raises(WrongMask) as caught:
        next(iter(made.train_dataloader()))
    sentence = explain(caught.value)
    assert sentence is not None
    assert sentence.startswith(repr(str(folder / "train" / "masks" / "002.png")))


# Transforms --------------------------------------------------------------------------------------


def test_mask_and_image_stay_together(folder: Path) -> None:
    """The red channel is 20 times the value: nearest pixels of both must agree."""
    training = data(folder, jitter=False, scale=(1.0, 1.0)).sets["training"]
    flipped = set()
    for epoch in range(20):
        sample = training[epoch, 1]
        assert torch.equal(sample["image"][0].long(), sample["mask"].long() * 20)
        flipped.add(sample["mask"].numpy().tobytes())
    assert len(flipped) > 10
    for epoch in range(20):  # enlarged or reduced, away from the edges of the cells
        sample = data(folder, jitter=False, scale=(2.0, 2.0)).sets["training"][epoch, 1]
        agree = (sample["image"][0].long() - sample["mask"].long() * 20).abs() <= 1
        assert agree.float().mean() > 0.6


def test_what_reaches_beyond_the_image_is_void_and_has_its_mean() -> None:
    image = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    mask = torch.ones(8, 8, dtype=torch.int16)
    places = set()
    for i in range(10):
        crop = PairCrop((12, 12), (0.5, 0.5), hflip=0, jitter=False)
        sample: dict[str, Any] = crop((image, mask), uniforms(i))
        inside = sample["mask"] >= 0
        assert inside.sum() == 16
        assert sample["image"].flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30]
        places.add(tuple(inside.nonzero()[0].tolist()))
    assert len(places) > 3


def test_a_window_lies_in_the_image_and_has_the_factor() -> None:
    draws = uniforms(5)
    for _ in range(200):
        height, width = 5 + int(next(draws) * 60), 5 + int(next(draws) * 60)
        factor = 0.3 + 2.5 * next(draws)
        box, inside, corner = random_window(height, width, factor, (20, 30), draws)
        assert 0 <= box.top <= box.top + box.height <= height
        assert 0 <= box.left <= box.left + box.width <= width
        assert 0 <= corner[0] <= 20 - inside[0]
        assert 0 <= corner[1] <= 30 - inside[1]
        for taken, shown in zip(box[2:], inside, strict=True):
            assert shown / taken == pytest.approx(factor, rel=0.6 / taken + 0.6 / shown)


def test_a_mask_is_resized_by_the_middle_of_each_pixel() -> None:
    mask = torch.arange(16, dtype=torch.int16).view(4, 4)
    assert torch.equal(crop_mask(mask, Box(0, 0, 4, 4), (4, 4)), mask)
    twice = crop_mask(mask, Box(1, 2, 2, 2), (4, 4))
    assert torch.equal(twice, mask[1:3, 2:4].repeat_interleave(2, 0).repeat_interleave(2, 1))
    # As an image whose pixels are the classes is, without blending.
    large = torch.rand(3, 30, 40)
    box = Box(3, 5, 20, 30)
    nearest = torch.nn.functional.interpolate(
        large[None, :, 3:23, 5:35], (13, 17), mode="nearest-exact"
    )[0]
    assert torch.equal(crop_mask(large[0], box, (13, 17)), nearest[0])


def test_one_class_does_not_fill_the_crop_if_others_can_be_had() -> None:
    mask = torch.zeros(64, 64, dtype=torch.int16)
    mask[:16, :16] = 1
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)

    def varied(share: float) -> int:
        crop = PairCrop((16, 16), (1, 1), max_class_share=share, jitter=False)
        found = [crop((image, mask), uniforms(i))["mask"] for i in range(60)]
        return sum(len(m.unique()) > 1 for m in found)  # type: ignore[attr-defined]

    assert varied(0.75) > 2 * varied(1.0)


@pytest.mark.slow
def test_a_sample_depends_on_seed_epoch_and_index_alone(folder: Path) -> None:
    one, two = data(folder, seed=3), data(folder, seed=3, num_workers=2)
    batches = [list(made.train_dataloader()) for made in (one, two)]
    assert len(batches[0]) == 2
    for first, second in zip(*batches, strict=True):
        assert all(torch.equal(first[k], second[k]) for k in ("image", "mask", "index"))
    again = data(folder, seed=4).sets["training"][0, 1]
    sample = one.sets["training"][0, 1]
    assert not torch.equal(sample["image"], again["image"])
    assert not torch.equal(sample["image"], one.sets["training"][1, 1]["image"])


@pytest.mark.parametrize("chans", [1, 2, 3])
@pytest.mark.parametrize("deep", [False, True])
def test_jitter_keeps_type_and_range(chans: int, deep: bool) -> None:
    image = torch.rand(chans, 12, 12) if deep else torch.randint(256, (chans, 12, 12)).byte()
    mask = torch.arange(144, dtype=torch.int16).view(12, 12)
    crop, plain = (PairCrop((12, 12), (1, 1), hflip=0, jitter=j) for j in (True, False))
    changed = 0
    for i in range(20):
        sample: dict[str, Any] = crop((image, mask), uniforms(i))
        assert sample["image"].dtype == image.dtype
        assert torch.equal(sample["mask"], plain((image, mask), uniforms(i))["mask"])  # type: ignore[arg-type]
        assert 0 <= sample["image"].min() <= sample["image"].max() <= (1 if deep else 255)
        changed += not torch.equal(sample["image"], image)
    assert changed > 10


def test_evaluation_is_of_whole_images_and_untouched_masks(folder: Path) -> None:
    write(folder / "val" / "images", "000", np.zeros((40, 20, 3), np.uint8))
    write(folder / "val" / "masks", "000", np.zeros((40, 20), np.uint8))
    batch = next(iter(data(folder).val_dataloader()))
    assert [tuple(image.shape) for image in batch["image"]] == [(3, 40, 20)] + [(3, 24, 32)] * 3
    assert [tuple(mask.shape) for mask in batch["mask"]] == [(40, 20)] + [(24, 32)] * 3
    batch = next(iter(data(folder, short_side=12).val_dataloader()))
    assert [tuple(image.shape) for image in batch["image"]] == [(3, 24, 12)] + [(3, 12, 16)] * 3
    assert batch["size"].tolist() == [[40, 20]] + [[24, 32]] * 3
    assert [tuple(mask.shape) for mask in batch["mask"]] == [(40, 20)] + [(24, 32)] * 3
    image = torch.randint(256, (3, 24, 32)).byte()
    sample: dict[str, Any] = Whole(12)(image, uniforms(0))
    assert torch.equal(sample["image"], crop_and_resize(image, Box(0, 0, 24, 32), (12, 16)))


def test_gray_deep_and_measured(tmp_path: Path) -> None:
    for i in range(6):
        ramp = np.linspace(i, 60000, 24 * 32).reshape(24, 32).astype(np.uint16)
        write(tmp_path / "train" / "images", f"{i}", ramp)
        write(tmp_path / "train" / "masks", f"{i}", (ramp > 30000).astype(np.uint8))
    made = data(tmp_path, in_chans=1, statistics="measured")
    batch = next(iter(made.train_dataloader()))
    assert batch["image"].dtype == torch.float32
    assert batch["image"].shape == (4, 1, 16, 16)
    assert made.mean is not None
    assert made.mean[0] == pytest.approx(0.5, abs=0.02)


def test_predict_reads_any_folder_and_leaves_masks_out(folder: Path, make_images: Make) -> None:
    made = SegmentationData(root=str(folder), num_workers=0)
    made.setup("predict")
    assert len(made.sets["predict"]) == 14
    assert all("/images/" in f"/{name}" for name in names(made, "predict"))
    make_images(folder / "elsewhere" / "cats", 3)
    made = SegmentationData(root=str(folder / "elsewhere"), num_workers=0)
    made.setup("predict")
    assert names(made, "predict") == [f"cats/{i:03d}.png" for i in range(3)]
