"""Going on from a checkpoint: the same batches as in the run that was not interrupted."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from simmim.data import ImageFolderData
from simmim.runs.checkpoints import KeepLast
from support import exhaustive
from support.folders import make_images
from support.training import Notes, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # no savers


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., list[Any]]:
    root = make_images(tmp_path / "root", 17, size=8)  # 14 train: three batches of four

    def run(
        folder: Path | None = None,
        checkpoint: Path | None = None,
        *,
        workers: int = 0,
        early: bool = False,
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
        module, images = Notes(early), {"img_size": 8, "batch_size": 4, "val_fraction": 0.2}
        data = ImageFolderData(str(root), num_workers=workers, **images)  # type: ignore[arg-type]
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        return module.seen

    return run


@pytest.mark.parametrize(
    ("workers", "early", "options"),
    [
        (0, False, {}),
        (0, True, {"accumulate_grad_batches": 2}),
        exhaustive(1, True, {"max_epochs": 2}),
        (0, False, {"max_epochs": -1, "max_steps": 8}),
        exhaustive(0, False, {"limit_train_batches": 2, "val_check_interval": 1}),
        (0, False, {"accumulate_grad_batches": 2, "val_check_interval": 1}),  # among two batches
    ],
)
@pytest.mark.slow
def test_it_goes_on_with_the_next_batch(
    tmp_path: Path,
    fit: Callable[..., list[Any]],
    workers: int,
    early: bool,
    options: dict[str, Any],
) -> None:
    whole = fit(tmp_path / "whole", workers=workers, early=early, **options)
    if not options:  # the epochs are Lightning's, each in another order
        places = [(3 * e + i, e, i) for e in range(3) for i in range(3)]
        assert [place[:3] for place in whole] == places
        assert len({tuple(place[3]) for place in whole}) == 9
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert {c.name.split("_")[0] for c in checkpoints} == {"step", "epoch", "val"}
    for checkpoint in checkpoints:
        step = torch.load(checkpoint, weights_only=True)["global_step"]
        resumed = fit(None, checkpoint, workers=workers, early=early, **options)
        assert resumed == [seen for seen in whole if seen[0] >= step], checkpoint.name


def test_a_changing_accumulation_is_refused(tmp_path: Path) -> None:
    data = ImageFolderData(str(make_images(tmp_path, 4)), img_size=8)
    data.setup("fit")
    data.trainer = L.Trainer(callbacks=[GradientAccumulationScheduler({1: 2})], logger=False)
    with pytest.raises(ValueError, match=r"use trainer\.accumulate_grad_batches"):
        data.train_dataloader()


@pytest.mark.slow
def test_a_folder_that_has_changed_since_is_told(
    fit: Callable[..., list[Any]], tmp_path: Path
) -> None:
    fit(tmp_path / "run", max_epochs=1)
    (checkpoint,) = (tmp_path / "run").glob("epoch_*.ckpt")
    fit(None, checkpoint, max_epochs=2)  # without a warning
    data = ImageFolderData(str(tmp_path / "root"), val_fraction=0.2)
    data.setup("fit")
    first, second = (Path(data.sets["training"].path(i)) for i in (0, 1))
    other = first.with_name("0.png")
    sentence = r"not those that this run began with \(14 then, \d+ now"
    first.rename(other)
    with pytest.warns(UserWarning, match=sentence):
        fit(None, checkpoint, max_epochs=2)
    other.unlink()
    with pytest.warns(UserWarning, match=sentence):
        fit(None, checkpoint, max_epochs=2)
    for i in range(20):
        shutil.copy(second, first.with_name(f"more{i}.png"))
    with pytest.warns(UserWarning, match=sentence):
        fit(None, checkpoint, max_epochs=2)


def test_overfitting_repeats_its_batches(tmp_path: Path) -> None:
    module = Notes()
    trainer = quiet_trainer(tmp_path, max_epochs=2, overfit_batches=1)
    data = ImageFolderData(str(make_images(tmp_path / "root", 9)), img_size=8, batch_size=4)
    with pytest.warns(UserWarning, match="overfit"):
        trainer.fit(module, datamodule=data)
    assert module.seen[0][3:] == module.seen[1][3:]
