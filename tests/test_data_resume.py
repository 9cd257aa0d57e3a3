"""Going on from a checkpoint: the same batches as in the run that was not interrupted."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from simmim.checkpoints import KeepLast
from simmim.data import ImageFolderData
from support.training import quiet_trainer


class Notes(L.LightningModule):
    """Notes which images it was given, and when."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[Any, ...]] = []
        self.early = early

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        image = batch["image"].float().mean()
        place = (self.global_step, self.current_epoch, batch_idx)
        self.seen.append((*place, batch["index"].tolist(), image.item()))
        return self.weight * image

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/loss", batch["image"].float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.early:  # makes the loader before the trainer knows how far it was
            _ = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def fit(tmp_path: Path, make_images: Callable[..., Path]) -> Callable[..., list[Any]]:
    root = make_images(tmp_path / "root", 17, size=8)  # 14 train: three batches of four

    def run(
        folder: Path | None,
        checkpoint: Path | None = None,
        *,
        workers: int,
        early: bool,
        **kwargs: Any,
    ) -> list[Any]:
        kinds: list[dict[str, Any]] = [
            {"filename": "step_{step}", "every_n_train_steps": 1},
            {"filename": "epoch_{step}", "save_on_train_epoch_end": True},
            {"filename": "val_{step}", "monitor": "val/loss", "save_on_train_epoch_end": False},
        ]
        savers: list[L.Callback] = [
            ModelCheckpoint(folder, save_top_k=-1, **kind) for kind in kinds if folder is not None
        ]
        options: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": True, **kwargs}
        trainer = quiet_trainer(tmp_path, *savers, KeepLast(), num_sanity_val_steps=0, **options)
        module = Notes(early)
        data = ImageFolderData(
            str(root), img_size=8, batch_size=4, num_workers=workers, val_fraction=0.2
        )
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        return module.seen

    return run


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # no savers then
@pytest.mark.parametrize(
    ("workers", "early", "options"),
    [
        (0, False, {}),
        (0, True, {"accumulate_grad_batches": 2}),
        (1, True, {"max_epochs": 2}),
        (0, False, {"max_epochs": -1, "max_steps": 8}),
        (0, False, {"limit_train_batches": 2, "val_check_interval": 1}),
        (0, False, {"accumulate_grad_batches": 2, "val_check_interval": 1}),  # among two batches
    ],
)
def test_it_goes_on_with_the_next_batch(
    tmp_path: Path,
    fit: Callable[..., list[Any]],
    workers: int,
    early: bool,
    options: dict[str, Any],
) -> None:
    whole = fit(tmp_path / "whole", workers=workers, early=early, **options)
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert {c.name.split("_")[0] for c in checkpoints} == {"step", "epoch", "val"}
    for checkpoint in checkpoints:
        step = torch.load(checkpoint, weights_only=True)["global_step"]
        resumed = fit(None, checkpoint, workers=workers, early=early, **options)
        assert resumed == [seen for seen in whole if seen[0] >= step], checkpoint.name


def test_epochs_are_lightnings(fit: Callable[..., list[Any]]) -> None:
    seen = fit(None, workers=0, early=False)
    assert [place[:3] for place in seen] == [(3 * e + i, e, i) for e in range(3) for i in range(3)]
    assert len({tuple(place[3]) for place in seen}) == 9  # another order in each epoch


def test_a_changing_accumulation_is_refused(
    tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    trainer = L.Trainer(callbacks=[GradientAccumulationScheduler({1: 2})], logger=False)
    data = ImageFolderData(str(make_images(tmp_path, 4)), img_size=8)
    data.setup("fit")
    data.trainer = trainer
    with pytest.raises(ValueError, match=r"use trainer\.accumulate_grad_batches"):
        data.train_dataloader()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("change", ["more", "fewer", "renamed"])
def test_a_folder_that_has_changed_since_is_told(
    fit: Callable[..., list[Any]], tmp_path: Path, change: str
) -> None:
    fit(tmp_path / "run", workers=0, early=False, max_epochs=1)
    (checkpoint,) = (tmp_path / "run").glob("epoch_*.ckpt")
    fit(None, checkpoint, workers=0, early=False, max_epochs=2)  # without a warning
    data = ImageFolderData(str(tmp_path / "root"), val_fraction=0.2)
    data.setup("fit")
    first = Path(data.sets["training"].path(0))
    if change == "more":
        for i in range(20):
            shutil.copy(first, first.with_name(f"more{i}.png"))
    elif change == "fewer":
        first.unlink()
    else:
        first.rename(first.with_name("0.png"))
    with pytest.warns(UserWarning, match=r"not those that this run began with \(14 then, \d+ now"):
        fit(None, checkpoint, workers=0, early=False, max_epochs=2)


def test_overfitting_repeats_its_batches(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    module = Notes(early=False)
    trainer = quiet_trainer(tmp_path, max_epochs=2, overfit_batches=1)
    data = ImageFolderData(str(make_images(tmp_path / "root", 9)), img_size=8, batch_size=4)
    with pytest.warns(UserWarning, match="overfit"):
        trainer.fit(module, datamodule=data)
    assert module.seen[0][3:] == module.seen[1][3:]
