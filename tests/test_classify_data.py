"""Images to classify: which keep their labels, labels from a table, stateless augmentation."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.data import ImageFolderData
from simmim.data.classification import ClassificationData
from simmim.data.labels import read_labels

Make = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, make_images: Make) -> Path:
    for name, n in (("cat", 30), ("dog", 20), ("emu", 10)):
        make_images(tmp_path / "images" / name, n, size=40)
    return tmp_path / "images"


def data(root: Path, **kwargs: Any) -> ClassificationData:
    made = ClassificationData(root=str(root), img_size=32, batch_size=4, num_workers=0, **kwargs)
    made.setup("fit")
    return made


def names(made: ImageFolderData, part: str = "training") -> set[str]:
    images = made.sets[part]
    return {images.name(i) for i in range(len(images))}


# Which images ------------------------------------------------------------------------------------


def test_the_split_is_that_of_pretraining(folder: Path) -> None:
    pretraining = ImageFolderData(root=str(folder), img_size=32, num_workers=0)
    pretraining.setup("fit")
    made = data(folder)
    assert names(made) == names(pretraining)
    assert names(made, "validation") == names(pretraining, "validation")
    assert made.classes == ["cat", "dog", "emu"]
    assert made.class_counts == [27, 18, 9]


def test_classes_that_nobody_teaches_are_told(tmp_path: Path, make_images: Make) -> None:
    for name in ("train/cat", "train/dog", "val/cat", "val/emu"):
        make_images(tmp_path / name, 4)
    with pytest.warns(UserWarning, match="1 of 3 classes have no images in train, such as 'emu'"):
        assert data(tmp_path).class_counts == [4, 4, 0]


def test_few_labels_are_the_same_for_the_same_seed(folder: Path) -> None:
    few = data(folder, labels_per_class=3, seed=5)
    assert few.class_counts == [3, 3, 3]
    assert names(few) == names(data(folder, labels_per_class=3, seed=5)) == names(few, "probe")
    assert names(few) < names(data(folder, labels_per_class=6, seed=5))
    assert names(few) != names(data(folder, labels_per_class=3, seed=6))
    assert names(few, "validation") == names(data(folder), "validation")
    assert data(folder, labels_per_class=0.1).class_counts == [3, 2, 1]
    assert names(data(folder, labels_per_class=0.1)) < names(data(folder, labels_per_class=0.4))
    assert data(folder, labels_per_class=1.0).class_counts == [27, 18, 9]  # all
    assert data(folder, labels_per_class=1).class_counts == [1, 1, 1]
    assert data(folder, labels_per_class=9.0).class_counts == [9, 9, 9]
    labels = [few.sets["training"][i]["label"] for i in range(9)]
    assert sorted(labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_few_labels_are_the_same_wherever_the_folder_lies(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    few = data(folder, labels_per_class=4)
    assert names(few) == names(data(tmp_path / "elsewhere" / "copy", labels_per_class=4))
    expected = {"cat": (1, 5, 7, 25), "dog": (5, 15, 18, 19), "emu": (0, 1, 2, 7)}  # seed 0
    assert names(few) == {f"{kind}/{i:03d}.png" for kind, all_i in expected.items() for i in all_i}


def test_a_group_is_on_one_side_for_every_task(folder: Path) -> None:
    for path in sorted(folder.rglob("*.png")):  # four images of a patient
        path.rename(path.with_name(f"p{int(path.stem) // 4}_{path.name}"))
    options = {"group_pattern": r"(\w+/p\d+)_", "val_fraction": 0.3}
    made = data(folder, labels_per_class=3, **options)
    pretraining = ImageFolderData(root=str(folder), img_size=32, num_workers=0, **options)
    pretraining.setup("fit")
    assert names(made, "validation") == names(pretraining, "validation")
    groups = [
        {name.split("_")[0] for name in names(pretraining, p)} for p in ("training", "validation")
    ]
    assert groups[0].isdisjoint(groups[1])
    assert names(made) < names(pretraining)
    assert len(names(made)) == 9


def test_a_class_with_one_image_trains(folder: Path) -> None:
    for path in sorted((folder / "emu").iterdir())[1:]:
        path.unlink()
    made = data(folder)
    assert made.class_counts[2] == 1
    assert {name.split("/")[0] for name in names(made, "validation")} == {"cat", "dog"}


def test_impossible_choices_are_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="9 training images of class 'emu'"):
        data(folder, labels_per_class=10)
    for amount in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"labels_per_class {amount} is neither"):
            data(folder, labels_per_class=amount)
    with pytest.raises(ValueError, match="no labels"):
        data(folder / "cat")
    with pytest.raises(ValueError, match=r"only folder below .* which holds the folders .*cat"):
        data(folder.parent)
    stray = min((folder / "cat").iterdir())
    stray.rename(folder / stray.name)
    with pytest.raises(ValueError, match=rf"\({stray.name}\) lies beside the class folders"):
        data(folder)
    (folder / stray.name).rename(stray)
    with pytest.raises(ValueError, match="timm's notation"):
        data(folder, randaugment="strong")
    with pytest.raises(ValueError, match=r"needs data\.labels"):
        data(folder, multi_label=True)


# Labels from a table -----------------------------------------------------------------------------


@pytest.fixture
def flat(tmp_path: Path, make_images: Make) -> Path:
    return make_images(tmp_path / "flat", 20, size=32)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_one_label_an_image_from_a_table(flat: Path, tmp_path: Path) -> None:
    rows = "".join(f"{i:03d}.png,{'odd' if i % 2 else 'even'}\n" for i in range(20))
    made = data(flat, labels=write(tmp_path / "labels.csv", "path,label\n" + rows))
    pretraining = ImageFolderData(root=str(flat), img_size=32, num_workers=0)
    pretraining.setup("fit")
    assert names(made, "validation") == names(pretraining, "validation")
    assert made.classes == ["even", "odd"]
    for i in range(len(made.sets["training"])):
        number = int(made.sets["training"].name(i)[:3])
        assert made.sets["training"][i]["label"] == number % 2
    assert sum(made.class_counts) == 18


@pytest.mark.parametrize("columns", ["names", "flags"])
def test_several_labels_an_image(flat: Path, tmp_path: Path, columns: str) -> None:
    small, third = (lambda i: i < 10), (lambda i: i % 3 == 0)
    header = "path,labels\n" if columns == "names" else "path,small,third\n"
    text = ""
    for i in range(20):
        both = [name for name, has in (("small", small(i)), ("third", third(i))) if has]
        flags = f"{int(small(i))},{int(third(i))}"
        text += f"{i:03d}.png,{'|'.join(both) if columns == 'names' else flags}\n"
    made = data(flat, labels=write(tmp_path / "labels.csv", header + text), multi_label=True)
    assert made.classes == ["small", "third"]
    batch = next(iter(made.train_dataloader()))
    assert batch["label"].shape == (4, 2)
    for index, label in zip(batch["index"].tolist(), batch["label"], strict=True):
        number = int(made.sets["training"].name(index)[:3])
        assert label.tolist() == [small(number), third(number)]
    total = torch.stack([made.sets["training"][i]["label"] for i in range(18)]).sum(0)
    assert made.class_counts == total.tolist()


def test_images_that_are_not_in_the_table_are_left_out_aloud(flat: Path, tmp_path: Path) -> None:
    rows = "".join(f"{i:03d}.png,{i % 2}\n" for i in range(15))
    labels = write(tmp_path / "labels.csv", f"path,label\n{rows}gone.png,1\n")
    with pytest.warns(UserWarning, match="left out"):
        made = data(flat, labels=labels)
    assert f"train: 1 rows left out: {labels} names no image there" in made.summary().table()
    assert len(names(made) | names(made, "validation")) == 15


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("path\n1.png\n", "a path and labels"),
        ("path,label\n1.png,a;b\n", "2 labels, not one"),
        ("path,a,b\n1.png,1,maybe\n", "'maybe'"),
        ("path,a,b\n1.png,1\n", "not 3 columns"),
        ("path,a\n1.png,1\n./1.png,0\n", "1 images in several rows, such as 1.png"),
    ],
)
def test_tables_that_are_none_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_labels(write(tmp_path / "labels.csv", text), several=False)


def test_predict_needs_no_table(flat: Path) -> None:
    made = ClassificationData(
        root=str(flat), img_size=32, num_workers=0, multi_label=True, labels="gone.csv"
    )
    made.setup("predict")
    assert len(made.sets["predict"]) == 20
    with pytest.raises(ValueError, match=r"gone\.csv cannot be read"):
        made.setup("fit")


# Transforms --------------------------------------------------------------------------------------


def test_augmentation_depends_on_seed_epoch_and_index_alone(folder: Path) -> None:
    def look(key: tuple[int, int], seed: int = 0) -> torch.Tensor:
        made = data(folder, randaugment="rand-m9-mstd0.5-inc1", seed=seed)
        random.seed(key[1] * 7)
        np.random.seed(key[1] * 7)  # noqa: NPY002
        before = random.getstate()
        image: torch.Tensor = made.sets["training"][key]["image"]
        assert random.getstate() == before
        return image

    first = look((2, 5))
    assert first.dtype == torch.uint8
    assert first.shape == (3, 32, 32)
    made = data(folder, randaugment="rand-m9-mstd0.5-inc1")
    made.sets["training"][0, 1]
    assert torch.equal(first, made.sets["training"][2, 5]["image"])
    assert not torch.equal(first, look((3, 5)))
    assert not torch.equal(first, look((2, 5), seed=1))


def test_the_strongest_augmentation_can_be_applied(folder: Path) -> None:
    """timm's posterize would keep 0 bits there, which Pillow refuses."""
    made = data(folder, randaugment="rand-m10-n8-inc1").sets["training"]
    assert all(made[epoch, 0]["image"].shape == (3, 32, 32) for epoch in range(40))


def test_the_middle_is_resized_as_published(tmp_path: Path, make_images: Make) -> None:
    """Resize to 256/224 of the size, bicubic, and cut out the middle: as Pillow does it."""
    for name in ("a", "b"):
        make_images(tmp_path / "images" / name, 4, size=(120, 90))
    made = data(tmp_path / "images", val_crop=0.875)
    image = made.sets["validation"][0]
    picture = Image.open(made.sets["validation"].path(0))
    side = 32 / 0.875 / 90 * 120  # 36.57 high, 48.76 wide
    whole = picture.resize((round(side), 37), Image.Resampling.BICUBIC)
    left, top = (whole.width - 32) // 2, (37 - 32) // 2
    published = np.asarray(whole.crop((left, top, left + 32, top + 32)), dtype=float)
    found = image["image"].permute(1, 2, 0).numpy().astype(float)
    assert np.abs(found - published).mean() < 3  # of 255; the published sides are whole pixels


@pytest.mark.parametrize("in_chans", [1, 3])
def test_deep_scans_and_gray_are_augmented_too(tmp_path: Path, in_chans: int) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "scans" / name).mkdir(parents=True)
        for i in range(3):
            scan = (rng.random((40, 40)) * 60000).astype(np.uint16)
            Image.fromarray(scan).save(tmp_path / "scans" / name / f"{i}.png")
    made = data(tmp_path / "scans", randaugment="rand-m9-mstd0.5-inc1", in_chans=in_chans)
    images = [made.sets["training"][epoch, 0]["image"] for epoch in range(12)]
    assert all(image.shape == (in_chans, 32, 32) for image in images)
    plain = data(tmp_path / "scans", in_chans=in_chans).sets["training"][0]["image"]
    assert plain.dtype == torch.float32
    assert plain.min() >= 0
    assert plain.max() <= 1
