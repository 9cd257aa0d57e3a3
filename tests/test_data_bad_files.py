"""Files that cannot be read: replaced alike everywhere, counted, listed; or the run stops."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from simmim.data import ImageFolderData
from simmim.data.bad_files import BadFiles, write_bad_files
from simmim.data.dataset import collate
from simmim.data.decode import UnreadableImage
from simmim.data.detection import collate_boxes
from simmim.data.segmentation import collate_sizes

BAD = ["002.png", "005.png", "011.png"]


class Looks(L.LightningModule):
    """Learns nothing, and notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen += batch["index"].tolist()
        return self.weight * batch["image"].float().mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.seen += batch["index"].tolist()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        return batch["path"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def root(tmp_path: Path, make_images: Callable[..., Path]) -> Path:
    folder = make_images(tmp_path / "root", 16, size=16)
    for name, content in zip(
        BAD, [b"", b"text", (folder / "001.png").read_bytes()[:60]], strict=True
    ):
        (folder / name).write_bytes(content)
    return folder


def module_of(root: Path, **kwargs: Any) -> ImageFolderData:
    options = {"img_size": 8, "batch_size": 4, "val_fraction": 0.0, **kwargs}
    return ImageFolderData(root=str(root), **options)


def trainer_in(folder: Path, **kwargs: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, **kwargs},
    )


def test_others_take_their_place(root: Path) -> None:
    module = module_of(root)
    module.setup("fit")
    data = module.sets["training"]
    for index in (2, 5, 11):
        sample = data[3, index]
        assert sample["index"] not in (2, 5, 11)
        whole = data[3, sample["index"]]
        assert torch.equal(sample["image"], whole["image"])
        assert sample["index"] == data[3, index]["index"]
    assert data.unreadable.nonzero().flatten().tolist() == [2, 5, 11]
    replacements = {data[epoch, 2]["index"] for epoch in range(20)}
    assert len(replacements) > 5  # not always the same one


def test_the_same_ones_for_any_number_of_workers(root: Path) -> None:
    runs = []
    for num_workers in (0, 2):
        module = module_of(root, num_workers=num_workers)
        module.setup("fit")
        runs.append([batch["index"].tolist() for batch in module.train_dataloader()])
        assert module.sets["training"].unreadable.sum() == 3  # workers tell
    assert runs[0] == runs[1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_they_are_listed_at_the_end_of_the_epoch(
    root: Path, tmp_path: Path, num_workers: int
) -> None:
    module, run = module_of(root, num_workers=num_workers), tmp_path / "run"
    with pytest.warns(UserWarning, match="3 of 16 training images could not be read and were rep"):
        trainer_in(run).fit(Looks(), datamodule=module)
    lines = (run / "bad_files.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(root / name) for name in BAD]
    assert lines[0].split("\t")[1] == "the file is empty"


def test_they_are_told_once(root: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="could not be read") as warned:
        trainer_in(tmp_path, max_epochs=3).fit(Looks(), datamodule=module_of(root))
    assert len([w for w in warned if "could not be read" in str(w.message)]) == 1


def test_a_good_folder_is_passed_over_in_silence(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    root = make_images(tmp_path / "good", 8)
    trainer_in(tmp_path).fit(Looks(), datamodule=module_of(root))
    assert not (tmp_path / "bad_files.txt").exists()


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_predictions_leave_them_out(root: Path, tmp_path: Path, batch_size: int) -> None:
    trainer = trainer_in(tmp_path)
    with pytest.warns(UserWarning, match="3 of 16 predict images could not be read and were left"):
        batches = trainer.predict(Looks(), datamodule=module_of(root, batch_size=batch_size))
    assert batches is not None
    paths = [path for batch in batches for path in batch]
    assert paths == [str(root / f"{i:03d}.png") for i in range(16) if i not in (2, 5, 11)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_of_nothing_else_is_left_out(root: Path, num_workers: int) -> None:
    module = module_of(root, batch_size=1, num_workers=num_workers)
    module.setup("predict")
    names = [Path(batch["path"][0]).name for batch in module.predict_dataloader()]
    assert names == [f"{i:03d}.png" for i in range(16) if i not in (2, 5, 11)]
    assert module.sets["predict"].unreadable.nonzero().flatten().tolist() == [2, 5, 11]
    assert all(make([]) == {} for make in (collate, collate_boxes, collate_sizes))


def test_too_many_stop_the_run(root: Path, tmp_path: Path) -> None:
    sentence = r"of 16 training images cannot be read, .* data\.max_bad_share 0\.1 allows; one is '"
    with pytest.raises(UnreadableImage, match=sentence):
        trainer_in(tmp_path).fit(Looks(), datamodule=module_of(root, max_bad_share=0.1))


def test_nothing_but_bad_files(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(b"text")
    module = module_of(tmp_path)
    module.setup("fit")
    with pytest.raises(UnreadableImage, match=r"32 files in a row .* it is no image"):
        next(iter(module.train_dataloader()))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_raise_names_the_file(root: Path, num_workers: int) -> None:
    module = module_of(root, bad_files="raise", num_workers=num_workers)
    module.setup("fit")
    with pytest.raises(UnreadableImage) as caught:
        list(module.train_dataloader())
    message = str(caught.value)
    assert message.startswith(f"{str(root)!r}"[:-1])
    assert " cannot be read: " in message
    assert "\n" not in message  # no traceback, also out of a worker


def test_awkward_names_are_one_line_each(tmp_path: Path) -> None:
    for name in ("new\nline.jpg", "tab\there.jpg", "plain.jpg", "画像.jpg"):
        (tmp_path / name).write_bytes(b"")
    module = module_of(tmp_path)
    module.setup("fit")
    data = module.sets["training"]
    data.unreadable[:] = 1
    for _ in range(2):  # a run that goes on adds to the list
        write_bad_files(data, tmp_path / "list.txt")
    lines = (tmp_path / "list.txt").read_text("utf-8").splitlines()
    assert sorted(Path(line.split("\t")[0]).name for line in lines) == [
        "new\\nline.jpg", "plain.jpg", "tab\\there.jpg", "画像.jpg",
    ]  # fmt: skip


def _count_in_two_processes(rank: int, folder: str) -> None:
    """Look for too many bad files where the second process alone has met some."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )

    def reduce(tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor

    module: Any = SimpleNamespace(device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(world_size=2, strategy=SimpleNamespace(reduce=reduce))
    data = module_of(Path(folder, "root"))
    data.setup("fit")
    images = data.sets["training"]
    bad = BadFiles({"training": images}, max_share=0.1)
    if rank == 1:
        images.unreadable[2] = 1
    bad.on_train_batch_end(trainer, module, None, None, 0)  # 1 of 16 is allowed
    if rank == 1:
        images.unreadable[5] = 1
    with pytest.raises(UnreadableImage, match=r"^2 of 16 training images .*005\.png'"):
        bad.on_train_batch_end(trainer, module, None, None, 1)
    torch.distributed.destroy_process_group()


def test_all_processes_stop_where_one_meets_too_many(root: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_count_in_two_processes, (str(tmp_path),), 2)
