"""The data module: parts, labels, batches, workers, options; what it refuses, in one sentence."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import simmim
from simmim.data import ImageFolderData
from support.folders import make_classes, make_images


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two classes of ten images, without a split."""
    return make_classes(tmp_path / "root", 10, "cat dog", size=(20, 16))


def data(root: Path, stage: str | None = "fit", **kwargs: Any) -> ImageFolderData:
    module = simmim.ImageFolderData(root=str(root), **{"img_size": 8, "batch_size": 4, **kwargs})
    module.setup(stage)
    return module


def names(module: ImageFolderData, part: str) -> list[str]:
    return list(module.sets[part].all_names())


def test_a_batch(classes: Path) -> None:
    module = data(classes)
    batch = next(iter(module.train_dataloader()))
    assert {k: (v.dtype, tuple(v.shape)) for k, v in batch.items()} == {
        "image": (torch.uint8, (4, 3, 8, 8)),
        "index": (torch.int64, (4,)),
        "label": (torch.int64, (4,)),
        "flip": (torch.bool, (4,)),
    }
    images = module.sets["training"]
    for index, label in zip(batch["index"].tolist(), batch["label"].tolist(), strict=True):
        assert Path(images.path(index)).parent.name == module.classes[label]
    assert next(iter(module.val_dataloader())).keys() == {"image", "index", "label"}
    # The flip happens after the transfer.
    before, flip = batch["image"].clone(), batch["flip"].clone()
    batch = module.on_after_batch_transfer(batch, 0)
    assert "flip" not in batch
    assert 0 < flip.sum() < 4
    assert torch.equal(batch["image"][flip], before[flip].flip(-1))
    assert torch.equal(batch["image"][~flip], before[~flip])
    assert "flip" not in next(iter(data(classes, hflip=0.0).train_dataloader()))
    assert module.on_after_batch_transfer(before, 0) is before


def test_parts_that_exist_are_taken(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        make_classes(tmp_path / part, 3, "ba")
    module = data(tmp_path)
    for part, images in {"train": "training", "val": "validation", "test": "test"}.items():
        theirs = ImageFolder(str(tmp_path / part))
        assert module.sets[images].samples == theirs.samples
        assert module.sets[images].class_to_idx == theirs.class_to_idx == module.class_to_idx
        assert module.sets[images].classes == theirs.classes == module.classes
    assert module.class_counts == [3, 3]
    assert len(module.test_dataloader().dataset) == 6


def test_a_folder_without_parts_is_split(classes: Path) -> None:
    module = data(classes, val_fraction=0.2)
    train, val = names(module, "training"), names(module, "validation")
    assert (len(train), len(val), module.num_train) == (16, 4, 16)
    assert set(train).isdisjoint(val)
    assert names(module, "probe") == train
    assert module.class_counts == [8, 8]
    assert names(data(classes, val_fraction=0.2, split_seed=1), "validation") != val
    with pytest.warns(UserWarning, match="has no test/, so test/ scores its validation images"):
        assert len(module.test_dataloader().dataset) == 4


def test_groups_lie_on_one_side(tmp_path: Path) -> None:
    make_classes(tmp_path, 3, "p0 p1 p2 p3 p4 p5 p6 p7 p8 p9", size=8)
    module = data(tmp_path, val_fraction=0.2, group_pattern=r"(p\d)/")
    patients = {name[:2] for name in names(module, "validation")}
    assert len(patients) == 2
    assert patients.isdisjoint(name[:2] for name in names(module, "training"))


def test_no_class_folders_no_labels(tmp_path: Path) -> None:
    module = data(make_images(tmp_path / "flat", 6))
    assert (module.has_labels, module.classes, module.class_counts) == (False, [], [])
    for loader in (module.train_dataloader(), module.val_dataloader(), module.probe_dataloader()):
        assert "label" not in next(iter(loader))
    make_images(tmp_path / "parts" / "train" / "a", 4)
    make_images(tmp_path / "parts" / "val", 2)
    assert not data(tmp_path / "parts").has_labels  # only where all parts have them


def test_a_stray_image_and_a_class_without_reader_are_told(classes: Path) -> None:
    (classes / "plum").mkdir()
    (classes / "plum" / "1.heic").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"class folders left out: .heic is not read .*plum/"):
        summary = data(classes).summary()
    assert "train: 1 files left out: .heic is not read here" in summary.table()
    (classes / "plum" / "1.heic").unlink()
    min((classes / "dog").iterdir()).rename(classes / "cover.jpg")
    with pytest.warns(UserWarning, match=r"1 of 20 images \(cover.jpg\) lies beside the class"):
        assert not data(classes).has_labels


def test_a_batch_of_more_than_half_the_folder_is_told(
    classes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    data(classes, batch_size=9).train_dataloader()
    assert "left out of each epoch" not in caplog.text
    data(classes, batch_size=14).train_dataloader()
    assert re.search("4 of 18 .* --data.batch_size 9 leaves out 0", caplog.text)


@pytest.mark.parametrize("parts", [["val"], ["Valid", "test"], ["Testing", "dev", "tst_set"]])
def test_parts_without_a_train_are_no_classes(tmp_path: Path, parts: list[str]) -> None:
    for part in parts:
        make_images(tmp_path / part / "cats", 4)
    with pytest.raises(ValueError, match=rf"has .*{parts[0]}/.*no train/.* give .*{parts[0]}"):
        data(tmp_path)
    assert len(data(tmp_path, "predict").sets["predict"]) == 4 * len(parts)  # all there is


def test_folders_that_are_named_like_parts(tmp_path: Path) -> None:
    make_images(tmp_path / "a" / "seg_train" / "forest", 4)
    make_images(tmp_path / "a" / "seg_test" / "forest", 4)
    with pytest.raises(ValueError, match=r"seg_test/, seg_train/ in .* call them train/, val/"):
        data(tmp_path / "a")
    make_images(tmp_path / "a" / "shoes", 4)
    assert data(tmp_path / "a").classes == ["seg_test", "seg_train", "shoes"]
    make_classes(tmp_path / "b", 4, "cats dogs val")
    with pytest.warns(UserWarning, match="val/ in .* is taken for a class"):
        assert data(tmp_path / "b").classes == ["cats", "dogs", "val"]


def test_classes_are_numbered_alike_in_all_parts(tmp_path: Path) -> None:
    for folder in ("train/b", "train/c", "val/a", "val/c", "test/c", "test/x"):
        make_images(tmp_path / folder, 2)
    module = data(tmp_path)
    assert module.classes == ["a", "b", "c"]
    assert [label for _, label in module.sets["validation"].samples] == [0, 0, 2, 2]
    assert module.class_counts == [0, 2, 2]
    assert module.sets["test"].labels is None  # it has a class that nobody learns


def test_predict_reads_the_whole_folder_in_order(tmp_path: Path) -> None:
    for folder in ("train/a", "val/a", "loose"):
        make_images(tmp_path / folder, 3)
    batches = data(tmp_path, "predict").predict_dataloader()
    assert [path for batch in batches for path in batch["path"]] == sorted(
        map(str, tmp_path.rglob("*.png"))
    )
    one = data(make_images(tmp_path / "one", 1), "predict")  # no split, so one is enough
    assert len(list(one.predict_dataloader())) == 1


def test_probe_images_are_the_training_images_unaugmented(classes: Path) -> None:
    module = data(classes)
    batches = list(module.probe_dataloader())
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(18))
    for batch, again in zip(batches, module.probe_dataloader(), strict=True):
        assert torch.equal(batch["image"], again["image"])
    few, again = (module.probe_dataloader(limit=5).dataset for _ in range(2))
    assert [few.path(i) for i in range(5)] == [again.path(i) for i in range(5)]
    assert len(module.probe_dataloader(limit=1000).dataset) == module.num_train


def fake_trainer(accumulate: int = 1, **sampler_kwargs: int) -> Any:
    return SimpleNamespace(
        distributed_sampler_kwargs=sampler_kwargs or None,
        accumulate_grad_batches=accumulate,
        global_step=0,
        limit_train_batches=1.0,
        callbacks=[],
        num_devices=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def test_two_processes_validate_each_image_once(classes: Path) -> None:
    seen, counts = [], []
    for rank in (0, 1):
        module = data(classes, val_fraction=0.45, batch_size=2)  # 9 images
        module.trainer = fake_trainer(num_replicas=2, rank=rank)
        batches = list(module.val_dataloader())
        counts.append(len(batches))
        seen += [int(i) for batch in batches for i in batch["index"]]
    assert (sorted(seen), counts[0]) == (list(range(9)), counts[1])


def test_batches_of_an_epoch(tmp_path: Path) -> None:
    module = data(make_images(tmp_path, 23), batch_size=3, val_fraction=0.0)
    assert [module.batches_per_epoch(world_size) for world_size in (1, 2, 3)] == [7, 3, 2]
    for accumulate, batches in ((2, 6), (50, 7)):  # every optimiser step has two
        module.trainer = fake_trainer(accumulate=accumulate)
        assert module.batches_per_epoch(1) == batches == len(module.train_dataloader())


def test_a_folder_smaller_than_a_batch(tmp_path: Path) -> None:
    module = data(make_images(tmp_path, 6), batch_size=128)
    (batch,) = module.train_dataloader()
    assert len(batch["image"]) == module.num_train == 5
    module.trainer = fake_trainer(num_replicas=8, rank=0)
    with pytest.raises(ValueError, match="5 training images are fewer than the 8 processes"):
        module.train_dataloader()


def test_deep_scans_and_photographs_in_one_batch(tmp_path: Path) -> None:
    make_images(tmp_path, 3)
    Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30)).save(tmp_path / "deep.png")
    module = data(tmp_path, "predict", batch_size=2)
    first, second = (batch["image"] for batch in module.predict_dataloader())
    assert (first.dtype, second.dtype) == (torch.uint8, torch.float32)
    assert 0.3 < second[0].mean() < 0.7
    assert 0.3 < second[1].mean() < 0.7
    assert second.max() <= 1


@pytest.mark.parametrize(("in_chans", "size"), [(1, 8), (3, [8, 16])])
def test_channels_and_rectangles(classes: Path, in_chans: int, size: Any) -> None:
    module = data(classes, in_chans=in_chans, img_size=size)
    for loader in (module.train_dataloader(), module.val_dataloader(), module.probe_dataloader()):
        width = 16 if isinstance(size, list) else 8
        assert next(iter(loader))["image"].shape[1:] == (in_chans, 8, width)


def test_no_validation_wanted(tmp_path: Path) -> None:
    module = data(make_images(tmp_path, 4), val_fraction=0.0)
    assert (module.val_dataloader(), module.num_train) == ([], 4)
    with pytest.raises(ValueError, match=r"has no val/, and data\.val_fraction is 0: make one"):
        data(tmp_path, "validate", val_fraction=0.0)


def test_every_option_is_explained() -> None:
    doc = inspect.getdoc(ImageFolderData) or ""
    documented = re.findall(r"^    (\w+): ", doc.split("Attributes:")[0].split("Args:")[1], re.M)
    assert documented == list(inspect.signature(ImageFolderData).parameters)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "no data: give data.root, a folder of images, or data.dataset digits"),
        ({"root": "nowhere"}, "data.root 'nowhere' does not exist: give a folder of images"),
        ({"root": __file__}, r"data\.root '.*' is a file: give the folder"),
        ({"dataset": "digit"}, "data.dataset 'digit' is not known: did you mean 'digits'"),
        ({"img_size": [1, 2, 3]}, r"data.img_size \[1, 2, 3\] is neither a number nor"),
        ({"img_size": 0}, "data.img_size 0 is neither"),
        ({"batch_size": 0}, "data.batch_size 0 is out of range: use 1 or more"),
        ({"val_fraction": 1.0}, "data.val_fraction 1.0 is out of range: use 0 to 0.99"),
        ({"num_workers": -1}, "data.num_workers -1 is out of range: use 0 or more"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale \[0.0, 1.0\] is no range: .* at least 0.001"),
        ({"crop_ratio": (2.0, 1.0)}, r"crop_ratio \[2.0, 1.0\] is no range: use \[low, high\]"),
        ({"window": (1.0,)}, r"data.window \[1.0\] is no range"),
        ({"bad_files": "ignore"}, "data.bad_files 'ignore' is not known: use skip or raise"),
        ({"statistics": "mine"}, "data.statistics 'mine' is not known: use imagenet or measured"),
        ({"statistics": [[0.5], [0.2]]}, r"is not \[means, stds\] with 3 numbers each"),
        ({"group_pattern": "p"}, "data.group_pattern 'p' has no group"),
    ],
)
def test_mistakes_are_refused_at_once(options: dict[str, Any], sentence: str) -> None:
    root = {} if not options or {"root", "dataset"} & options.keys() else {"root": "."}
    with pytest.raises(ValueError, match=sentence):
        ImageFolderData(**root, **options)


def test_folders_that_cannot_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' holds no images"):
        data(tmp_path / "empty")
    make_images(tmp_path / "parts" / "train", 3)
    (tmp_path / "parts" / "val").mkdir()
    with pytest.raises(ValueError, match="val' holds no images"):
        data(tmp_path / "parts")
    with pytest.raises(ValueError, match="has no image to validate with, which takes two images"):
        data(make_images(tmp_path / "one", 1))


def test_a_folder_of_dicom_files_needs_pydicom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1.dcm").touch()
    monkeypatch.setattr("simmim.data.scans.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need pydicom: pip install 'simmim\[dicom\]'"):
        data(tmp_path)
