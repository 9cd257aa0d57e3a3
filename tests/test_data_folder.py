"""The data module: parts, labels, batches, workers, options; what it refuses, in one sentence."""

import inspect
import re
from collections.abc import Callable
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

Make = Callable[..., Path]


@pytest.fixture
def classes(tmp_path: Path, make_images: Make) -> Path:
    """Two classes of ten images, without a split."""
    for name in ("cat", "dog"):
        make_images(tmp_path / "root" / name, 10, size=(20, 16))
    return tmp_path / "root"


def data(root: Path, stage: str | None = "fit", **kwargs: Any) -> ImageFolderData:
    module = ImageFolderData(root=str(root), **{"img_size": 8, "batch_size": 4, **kwargs})
    module.setup(stage)
    return module


def names(module: ImageFolderData, part: str) -> list[str]:
    images = module.sets[part]
    return [images.name(i) for i in range(len(images))]


def test_it_comes_from_the_package() -> None:
    assert simmim.ImageFolderData is ImageFolderData


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
    val = next(iter(module.val_dataloader()))
    assert val.keys() == {"image", "index", "label"}


def test_the_flip_happens_after_the_transfer(classes: Path) -> None:
    module = data(classes)
    batch = next(iter(module.train_dataloader()))
    before, flip = batch["image"].clone(), batch["flip"].clone()
    batch = module.on_after_batch_transfer(batch, 0)
    assert "flip" not in batch
    assert 0 < flip.sum() < 4
    assert torch.equal(batch["image"][flip], before[flip].flip(-1))
    assert torch.equal(batch["image"][~flip], before[~flip])
    assert "flip" not in next(iter(data(classes, hflip=0.0).train_dataloader()))
    images = torch.zeros(2, 3, 8, 8)
    assert module.on_after_batch_transfer(images, 0) is images


def test_parts_that_exist_are_taken(tmp_path: Path, make_images: Make) -> None:
    for part in ("train", "val", "test"):
        for name in ("b", "a"):
            make_images(tmp_path / part / name, 3)
    module = data(tmp_path)
    for part, images in {"train": "training", "val": "validation", "test": "test"}.items():
        theirs = ImageFolder(str(tmp_path / part))
        assert module.sets[images].samples == theirs.samples
        assert module.sets[images].class_to_idx == theirs.class_to_idx == module.class_to_idx
        assert module.sets[images].classes == theirs.classes == module.classes
    assert module.class_counts == [3, 3]
    assert len(module.test_dataloader().dataset) == 6


def test_training_and_testing_are_train_and_test(tmp_path: Path, make_images: Make) -> None:
    for folder in ("Training/glioma", "Training/none", "Testing/glioma", "Testing/none"):
        make_images(tmp_path / folder, 10 if folder[1] == "r" else 4)
    module = data(tmp_path)
    counts = {name: len(images) for name, images in module.sets.items()}
    assert (module.classes, counts["training"], counts["validation"]) == (["glioma", "none"], 18, 2)
    assert all("Testing" in module.sets["test"].path(i) for i in range(counts["test"]))
    assert (counts["test"], module.has_labels) == (8, True)


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


def test_no_class_folders_no_labels(tmp_path: Path, make_images: Make) -> None:
    make_images(tmp_path, 6)
    module = data(tmp_path)
    assert (module.has_labels, module.classes, module.class_counts) == (False, [], [])
    for loader in (module.train_dataloader(), module.val_dataloader(), module.probe_dataloader()):
        assert "label" not in next(iter(loader))


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


@pytest.mark.parametrize(
    ("batch_size", "told"), [(14, "4 of 18 .* --data.batch_size 9 leaves out 0"), (9, "")]
)
def test_a_batch_of_more_than_half_the_folder_is_told(
    classes: Path, batch_size: int, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        data(classes, batch_size=batch_size).train_dataloader()
    assert re.search(told, caplog.text) if told else "left out of each epoch" not in caplog.text


def test_labels_only_where_all_parts_have_them(tmp_path: Path, make_images: Make) -> None:
    make_images(tmp_path / "train" / "a", 4)
    make_images(tmp_path / "val", 2)
    assert not data(tmp_path).has_labels


@pytest.mark.parametrize("parts", [["val"], ["Valid", "test"], ["Testing", "dev", "tst_set"]])
def test_parts_without_a_train_are_no_classes(
    tmp_path: Path, make_images: Make, parts: list[str]
) -> None:
    for part in parts:
        make_images(tmp_path / part / "cats", 4)
    with pytest.raises(ValueError, match=rf"has .*{parts[0]}/.*no train/.* give .*{parts[0]}"):
        ImageFolderData(str(tmp_path), img_size=32).setup("fit")
    data = ImageFolderData(str(tmp_path), img_size=32)
    data.setup("predict")  # which reads all there is
    assert len(data.sets["predict"]) == 4 * len(parts)


def test_folders_that_mention_splits_are_no_classes(tmp_path: Path, make_images: Make) -> None:
    for name in ("seg_train", "seg_test"):
        make_images(tmp_path / name / "forest", 4)
    with pytest.raises(ValueError, match=r"seg_test/, seg_train/ in .* call them train/, val/"):
        data(tmp_path)
    make_images(tmp_path / "shoes", 4)
    assert data(tmp_path).classes == ["seg_test", "seg_train", "shoes"]


def test_a_val_among_classes_is_said_to_be_one(tmp_path: Path, make_images: Make) -> None:
    for name in ("cats", "dogs", "val"):
        make_images(tmp_path / name, 4)
    data = ImageFolderData(str(tmp_path), img_size=32)
    with pytest.warns(UserWarning, match="val/ in .* is taken for a class"):
        data.setup("fit")
    assert data.classes == ["cats", "dogs", "val"]


def test_classes_are_numbered_alike_in_all_parts(tmp_path: Path, make_images: Make) -> None:
    for folder in ("train/b", "train/c", "val/a", "val/c", "test/c", "test/x"):
        make_images(tmp_path / folder, 2)
    module = data(tmp_path)
    assert module.classes == ["a", "b", "c"]
    assert [label for _, label in module.sets["validation"].samples] == [0, 0, 2, 2]
    assert module.class_counts == [0, 2, 2]
    assert module.sets["test"].labels is None  # it has a class that nobody learns


def test_predict_reads_the_whole_folder_in_order(tmp_path: Path, make_images: Make) -> None:
    for folder in ("train/a", "val/a", "loose"):
        make_images(tmp_path / folder, 3)
    module = data(tmp_path, "predict")
    paths = [path for batch in module.predict_dataloader() for path in batch["path"]]
    assert paths == sorted(map(str, tmp_path.rglob("*.png")))
    one = data(make_images(tmp_path / "one", 1), "predict")  # no split, so one is enough
    assert len(list(one.predict_dataloader())) == 1


def test_probe_images_are_the_training_images_unaugmented(classes: Path) -> None:
    module = data(classes)
    batches = list(module.probe_dataloader())
    index = torch.cat([batch["index"] for batch in batches]).tolist()
    assert index == list(range(module.num_train))
    again = torch.cat([batch["image"] for batch in module.probe_dataloader()])
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), again)
    few = module.probe_dataloader(limit=5)
    assert len(few.dataset) == 5
    paths = [few.dataset.path(i) for i in range(5)]
    assert paths == [module.probe_dataloader(limit=5).dataset.path(i) for i in range(5)]
    assert len(module.probe_dataloader(limit=1000).dataset) == module.num_train


@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_depend_on_seed_epoch_and_index_alone(classes: Path, num_workers: int) -> None:
    def epoch(number: int, **kwargs: Any) -> dict[int, tuple[Any, ...]]:
        loader = data(classes, val_fraction=0.2, **kwargs).train_dataloader()
        loader.sampler.set_epoch(number)
        return {
            int(i): (image.numpy().tobytes(), bool(flip))
            for batch in loader
            for i, image, flip in zip(batch["index"], batch["image"], batch["flip"], strict=True)
        }

    reference = epoch(3)
    assert epoch(3, batch_size=2, num_workers=num_workers) == reference
    assert epoch(4, num_workers=num_workers) != reference
    assert epoch(3, seed=1) != reference


def test_workers_that_stay_learn_of_the_next_epoch(classes: Path) -> None:
    with_workers = data(classes, num_workers=1).train_dataloader()
    without = data(classes, num_workers=0).train_dataloader()
    for _ in range(3):
        for one, other in zip(with_workers, without, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.exhaustive
def test_workers_can_be_spawned(classes: Path) -> None:
    """As on macOS and Windows, where workers import everything anew."""
    loader = data(classes, num_workers=2).train_dataloader()
    here = list(data(classes, num_workers=0).train_dataloader())
    loader.multiprocessing_context = "spawn"
    for one, other in zip(loader, here, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_two_processes_share_the_global_batch(classes: Path) -> None:
    def batches(replicas: int, rank: int, batch_size: int) -> list[dict[str, torch.Tensor]]:
        module = data(classes, batch_size=batch_size)
        module.trainer = fake_trainer(num_replicas=replicas, rank=rank)
        assert len(module.train_dataloader()) == module.batches_per_epoch(replicas)
        return list(module.train_dataloader())

    alone, first, second = batches(1, 0, 8), batches(2, 0, 4), batches(2, 1, 4)
    assert len(alone) == len(first) == len(second) == 2
    for one, a, b in zip(alone, first, second, strict=True):
        for key in one:
            assert torch.equal(one[key], torch.cat([a[key], b[key]]))


def test_two_processes_validate_each_image_once(classes: Path) -> None:
    seen, counts = [], []
    for rank in (0, 1):
        module = data(classes, val_fraction=0.45, batch_size=2)  # 9 images
        module.trainer = fake_trainer(num_replicas=2, rank=rank)
        batches = list(module.val_dataloader())
        counts.append(len(batches))
        seen += [int(i) for batch in batches for i in batch["index"]]
    assert sorted(seen) == list(range(9))
    assert counts[0] == counts[1]


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


def test_batches_of_an_epoch(tmp_path: Path, make_images: Make) -> None:
    module = data(make_images(tmp_path, 23), batch_size=3, val_fraction=0.0)
    assert [module.batches_per_epoch(world_size) for world_size in (1, 2, 3)] == [7, 3, 2]
    module.trainer = fake_trainer(accumulate=2)
    assert module.batches_per_epoch(1) == 6  # every optimiser step has two
    module.trainer = fake_trainer(accumulate=50)
    assert module.batches_per_epoch(1) == 7


def test_a_folder_smaller_than_a_batch(tmp_path: Path, make_images: Make) -> None:
    module = data(make_images(tmp_path, 6), batch_size=128)
    (batch,) = module.train_dataloader()
    assert len(batch["image"]) == module.num_train == 5
    module.trainer = fake_trainer(num_replicas=8, rank=0)
    with pytest.raises(ValueError, match="5 training images are fewer than the 8 processes"):
        module.train_dataloader()


def test_deep_scans_and_photographs_in_one_batch(tmp_path: Path, make_images: Make) -> None:
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
    shape = (4, in_chans, 8, 16 if isinstance(size, list) else 8)
    for loader in (module.train_dataloader(), module.val_dataloader(), module.probe_dataloader()):
        assert next(iter(loader))["image"].shape[1:] == shape[1:]


def test_no_validation_wanted(tmp_path: Path, make_images: Make) -> None:
    module = data(make_images(tmp_path, 4), val_fraction=0.0)
    assert module.val_dataloader() == []
    assert module.num_train == 4
    with pytest.raises(ValueError, match=r"has no val/, and data\.val_fraction is 0: make one"):
        data(tmp_path, "validate", val_fraction=0.0)


def test_groups(tmp_path: Path, make_images: Make) -> None:
    for patient in range(10):
        make_images(tmp_path / f"p{patient}", 3)
    module = data(tmp_path, val_fraction=0.2, group_pattern=r"(p\d)/")
    patients = {name[:2] for name in names(module, "validation")}
    assert len(patients) == 2
    assert patients.isdisjoint(name[:2] for name in names(module, "training"))


def test_every_option_is_explained() -> None:
    doc = inspect.getdoc(ImageFolderData) or ""
    documented = re.findall(r"^    (\w+): ", doc.split("Attributes:")[0].split("Args:")[1], re.M)
    assert documented == list(inspect.signature(ImageFolderData).parameters)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "no data: give data.root, a folder of images, or data.dataset digits"),
        ({"root": "nowhere"}, "data.root 'nowhere' does not exist: give a folder of images"),
        ({"root": __file__}, r"data\.root '.*' is a file: give the folder that holds the images"),
        ({"dataset": "digit"}, "data.dataset 'digit' is not known: did you mean 'digits'"),
        ({"img_size": [1, 2, 3]}, r"data.img_size \[1, 2, 3\] is neither a number nor"),
        ({"img_size": 0}, "data.img_size 0 is neither"),
        ({"batch_size": 0}, "data.batch_size 0 is out of range: use 1 or more"),
        ({"val_fraction": 1.0}, "data.val_fraction 1.0 is out of range: use 0 to 0.99"),
        ({"num_workers": -1}, "data.num_workers -1 is out of range: use 0 or more"),
        (
            {"crop_scale": (0.0, 1.0)},
            r"data.crop_scale \[0.0, 1.0\] is no range: .* at least 0.001",
        ),
        (
            {"crop_ratio": (2.0, 1.0)},
            r"data.crop_ratio \[2.0, 1.0\] is no range: use \[low, high\]",
        ),
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


def test_folders_that_cannot_do(tmp_path: Path, make_images: Make) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' holds no images"):
        data(tmp_path / "empty")
    make_images(tmp_path / "parts" / "train", 3)
    (tmp_path / "parts" / "val").mkdir()
    with pytest.raises(ValueError, match="val' holds no images"):
        data(tmp_path / "parts")
    with pytest.raises(ValueError, match="has no image to validate with, which takes two images"):
        data(make_images(tmp_path / "one", 1))
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "1.dcm").touch()
    if not _has_pydicom():
        with pytest.raises(ValueError, match="need pydicom: pip install"):
            data(tmp_path / "dicom")


def _has_pydicom() -> bool:
    from importlib.util import find_spec

    return find_spec("pydicom") is not None
