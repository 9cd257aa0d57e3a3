"""A miniature of `SimMIM` and its data module: what the callbacks' tests watch.

8-px digits, a patch of 2 px and cells of 4 px: an epoch takes a fraction of a second.
"""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from simmim.loss import l1_error, masked_mean
from simmim.masking import draw_masks, random_mask, sample_keys, upsample_mask
from support.training import quiet_trainer


class Digits(Dataset[dict[str, Tensor]]):
    """Scans of digits as batches have them: uint8 images, their place, their label."""

    def __init__(self, first: int, last: int, labels: bool = True) -> None:
        pixels, targets = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels[first:last]).mul(255 / 16).byte().view(-1, 1, 8, 8)
        self.images, self.labels, self.has_labels = images, torch.from_numpy(targets), labels
        self.first = first
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        self.read.append(i)
        sample = {"image": self.images[i], "index": torch.tensor(i)}
        return sample | ({"label": self.labels[self.first + i]} if self.has_labels else {})


class DigitsData(L.LightningDataModule):
    def __init__(self, train: int = 256, val: int = 96, labels: bool = True) -> None:
        super().__init__()
        self.train, self.val = Digits(0, train, labels), Digits(1000, 1000 + val, labels)
        self.has_labels = labels

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=32, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=32)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=32)

    def probe_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=100)


class MiniEncoder(nn.Module):
    """Patches, a mask token, two residual layers that look at the whole image, dropout."""

    mask_grid, num_features = (2, 2), 32

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 2, 2)
        self.mask_token = nn.Parameter(torch.zeros(32, 1, 1))
        self.place = nn.Parameter(0.02 * torch.randn(32, 4, 4))
        self.mix = nn.ModuleList(nn.Linear(16 * 32, 16 * 32) for _ in range(2))
        self.drop = nn.Dropout(0.1)

    def forward(self, images: Tensor, mask: Tensor | None = None, keys: Any = None) -> Tensor:
        x = self.stem(images)
        if mask is not None:
            x = torch.where(upsample_mask(mask, (4, 4)), self.mask_token, x)
        x = x + self.place
        for layer in self.mix:
            x = x + self.drop(layer(x.flatten(1)).relu()).view_as(x)
        return x

    def tokens(self, images: Tensor, layer: int | None = None) -> Tensor:
        return self(images) if layer is None else self.stem(images)


class MiniSimMIM(L.LightningModule):
    loss_region = "hidden"

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters({"lr": lr})
        self.encoder = MiniEncoder()
        self.head = nn.Sequential(nn.Conv2d(32, 4, 1), nn.PixelShuffle(2))
        self.target, self.error = nn.Identity(), l1_error

    def forward(self, images: Tensor, mask: Tensor, keys: Any = None) -> Tensor:
        return self.head(self.encoder(images, mask))

    def inputs(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        raw = batch["image"]
        return raw, raw.float() / 127.5 - 1, batch["index"]

    def draw_mask(self, raw: Tensor, index: Tensor, *, validation: bool) -> tuple[Tensor, Tensor]:
        keys = sample_keys(index, 1 if validation else 0, 0 if validation else self.current_epoch)
        return draw_masks(random_mask, keys, (2, 2), 0.5), keys

    def step(self, batch: Any, validation: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        raw, images, index = self.inputs(batch, 0)
        mask, _ = self.draw_mask(raw, index, validation=validation)
        error = self.error(self(images, mask), images)
        return masked_mean(error, mask), {"index": index, "mask": mask, "error": error}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _ = self.step(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        loss, parts = self.step(batch, True)
        self.log("val/loss", loss, batch_size=len(batch["image"]))
        return parts

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.step(batch, True)[0], batch_size=len(batch["image"]))

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        raw, images, index = self.inputs(batch, batch_idx)
        return self.reconstruct(images, *self.draw_mask(raw, index, validation=True))

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor, keys: Any = None) -> dict[str, Tensor]:
        hidden = upsample_mask(mask, (8, 8))
        original = images / 2 + 0.5
        prediction = (self(images, mask) / 2 + 0.5).clamp(0, 1)
        return {
            "original": original,
            "masked": original.masked_fill(hidden, 0.5),
            "prediction": prediction,
            "pasted": torch.where(hidden, prediction, original),
            "error": (prediction - original).abs() * hidden,
        }

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    defaults = {"num_sanity_val_steps": 0, "max_epochs": 2, "log_every_n_steps": 4}
    return quiet_trainer(folder, *callbacks, **{**defaults, **options})
