"""Files that cannot be read: replaced alike everywhere, counted, listed; or the run stops."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from simmim.data import ImageFolderData
from simmim.data.bad_files import write_bad_files
from simmim.data.dataset import collate
from simmim.data.decode import UnreadableImage
from simmim.data.detection import collate_boxes
from simmim.data.segmentation import collate_sizes
from support import exhaustive
from support.folders import make_images
from support.processes import in_processes
from support.training import Notes, quiet_trainer, trainer_of

BAD = ["002.png", "005.png", "011.png"]
GOOD = [f"{i:03d}.png" for i in range(16) if i not in (2, 5, 11)]
NO_FILE = r"could not be read and were "


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = make_images(tmp_path / "root", 16, size=16)
    contents = [b"", b"text", (folder / "001.png").read_bytes()[:60]]
    for name, content in zip(BAD, contents, strict=True):
        (folder / name).write_bytes(content)
    return folder


def data(root: Path, stage: str = "fit", **options: Any) -> ImageFolderData:
    options = {"img_size": 8, "batch_size": 4, "val_fraction": 0.0, **options}
    module = ImageFolderData(root=str(root), **options)
    module.setup(stage)
    return module


def test_others_take_their_place(root: Path) -> None:
    images = data(root).sets["training"]
    for index in (2, 5, 11):
        sample = images[3, index]
        assert sample["index"] not in (2, 5, 11)
        assert torch.equal(sample["image"], images[3, sample["index"]]["image"])
        assert sample["index"] == images[3, index]["index"]
    assert images.unreadable.nonzero().flatten().tolist() == [2, 5, 11]
    assert len({images[epoch, 2]["index"] for epoch in range(20)}) > 5  # not always the same one


@pytest.mark.slow
def test_the_same_ones_for_any_number_of_workers(root: Path) -> None:
    runs = []
    for num_workers in (0, 2):
        module = data(root, num_workers=num_workers)
        runs.append([batch["index"].tolist() for batch in module.train_dataloader()])
        assert module.sets["training"].unreadable.sum() == 3  # workers tell
    assert runs[0] == runs[1]


@pytest.mark.parametrize("num_workers", [0, exhaustive(1)])
def test_they_are_told_once_and_listed(root: Path, tmp_path: Path, num_workers: int) -> None:
    trainer = quiet_trainer(tmp_path / "run", max_epochs=2)
    with pytest.warns(UserWarning, match=NO_FILE) as warned:
        trainer.fit(Notes(), datamodule=data(root, num_workers=num_workers))
    (sentence,) = (str(w.message) for w in warned if "could not be read" in str(w.message))
    assert sentence.startswith("3 of 16 training images")
    lines = (tmp_path / "run" / "bad_files.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(root / name) for name in BAD]
    assert lines[0].split("\t")[1] == "the file is empty"
    for name in BAD:
        (root / name).unlink()
    quiet_trainer(tmp_path / "good").fit(Notes(), datamodule=data(root))  # in silence
    assert not (tmp_path / "good").exists()


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (4, 0), exhaustive(1, 1)])
def test_predictions_leave_them_out(
    root: Path, tmp_path: Path, batch_size: int, num_workers: int
) -> None:
    module = data(root, "predict", batch_size=batch_size, num_workers=num_workers)
    with pytest.warns(UserWarning, match=f"3 of 16 predict images {NO_FILE}left out"):
        batches = quiet_trainer(tmp_path).predict(Notes(), datamodule=module)
    assert batches is not None
    assert [Path(path).name for batch in batches for path in batch] == GOOD
    assert all(make([]) == {} for make in (collate, collate_boxes, collate_sizes))


def test_too_many_stop_the_run(root: Path, tmp_path: Path) -> None:
    sentence = r"of 16 training images cannot be read, .* data\.max_bad_share 0\.1 allows; one is '"
    with pytest.raises(UnreadableImage, match=sentence):
        quiet_trainer(tmp_path).fit(Notes(), datamodule=data(root, max_bad_share=0.1))
    for file in root.iterdir():
        file.write_bytes(b"text")
    with pytest.raises(UnreadableImage, match=r"32 files in a row .* it is no image"):
        next(iter(data(root).train_dataloader()))


@pytest.mark.parametrize("num_workers", [0, exhaustive(1)])
def test_raise_names_the_file(root: Path, num_workers: int) -> None:
    module = data(root, bad_files="raise", num_workers=num_workers)
    with pytest.raises(UnreadableImage, match=r"^'[^\n]*\.png' cannot be read: [^\n]*$") as caught:
        list(module.train_dataloader())
    assert str(root) in str(caught.value)  # in one line, also out of a worker


def test_awkward_names_are_one_line_each(tmp_path: Path) -> None:
    for name in ("new\nline.jpg", "tab\there.jpg", "plain.jpg", "画像.jpg"):
        (tmp_path / name).write_bytes(b"")
    images = data(tmp_path).sets["training"]
    images.unreadable[:] = 1
    for _ in range(2):  # a run that goes on adds to the list
        write_bad_files(images, tmp_path / "list.txt")
    lines = (tmp_path / "list.txt").read_text("utf-8").splitlines()
    assert sorted(Path(line.split("\t")[0]).name for line in lines) == [
        "new\\nline.jpg", "plain.jpg", "tab\\there.jpg", "画像.jpg",
    ]  # fmt: skip


class Meets(L.Callback):
    """The second process alone meets bad files: one before each of the first two batches."""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == 1:
            trainer.datamodule.sets["training"].unreadable[(2, 5)[batch_idx]] = 1


def stop_together() -> None:
    """Train where one process meets too many bad files."""
    module = ImageFolderData("good", img_size=8, batch_size=2, val_fraction=0.0, max_bad_share=0.1)
    trainer = trainer_of(2, Path(), Meets())
    with pytest.raises(UnreadableImage, match=r"^2 of 16 training images .*005\.png'"):
        trainer.fit(Notes(), datamodule=module)
    assert trainer.global_step == 2


@pytest.mark.slow
def test_all_processes_stop_where_one_meets_too_many(workdir: Path) -> None:
    make_images(workdir / "good", 16, size=16)
    in_processes(2, stop_together)
